"""LoHaModel: adapters in, out, on, off, merged, summed and converted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from loha_core import LoHaError
from loha_core.adapter import split_layers
from loha_core.factors import LoRAFactors
from loha_core.transform.report import Result
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaLayer
from loha_core.tuner.model import LoHaModel, get_peft_model


class Net(nn.Module):
    """A linear layer, a plain and a grouped convolution, a head, and something that LoHa cannot adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 4)
        self.note = "forwarded"

    def forward(self, x):
        x = self.norm(self.grouped(self.conv(x))).mean((2, 3))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


ALL = ["conv", "grouped", "0", "1", "2", "head"]
X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def adapted(net: nn.Module | None = None, **config) -> LoHaModel:
    return LoHaModel(net or Net(), LoHaConfig(**{"r": 2, "target_modules": ALL, "init_weights": False} | config))


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    """The base's state under the names that it has without us."""
    return {k.replace(".base_layer", ""): v.clone() for k, v in net.state_dict().items() if "hada_" not in k}


def test_injection_freezes_the_base_and_forwards_the_rest():
    net = Net()
    model = adapted(net, init_weights=True)
    assert model.model is net and isinstance(net.head, LoHaLayer) and model.note == "forwarded"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".hada_" in name for name in trained)
    assert model.targeted_module_names == ["conv", "grouped", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    torch.testing.assert_close(model(X), copy.deepcopy(model).unload()(X))
    with pytest.raises(AttributeError):
        _ = model.nonsense


def test_a_config_is_copied():
    config = LoHaConfig(target_modules="all-linear")
    LoHaModel(Net(), config)
    assert config.target_modules == "all-linear"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_modules": ["nowhere"]}, "match nothing"),
        ({"target_modules": ["head"], "exclude_modules": ["head"]}, "exclude_modules"),
        ({"target_modules": ["norm"]}, "norm is a GroupNorm"),
        ({"target_modules": ["head", "blocks"]}, "blocks is a ModuleList"),
        ({"target_modules": None}, "no default targets; pass target_modules"),
        ({"modules_to_save": ["nowhere"]}, "modules_to_save"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_the_model_left_alone(config, said):
    net = Net()
    with pytest.raises(LoHaError, match=said):
        adapted(net, **config)
    assert not any(isinstance(m, LoHaLayer) for m in net.modules())
    assert all(p.requires_grad for p in net.parameters())


def test_an_unknown_architecture_is_named():
    net = Net()
    net.config = type("Config", (), {"model_type": "perceptron"})()
    with pytest.raises(LoHaError, match="'perceptron' has no default targets"):
        adapted(net, target_modules=None)


def test_merge_and_unload_leaves_nothing_of_ours():
    model = adapted()
    y = model(X)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is Net and not any("hada" in key or "base_layer" in key for key in merged.state_dict())
    torch.testing.assert_close(merged(X), y)


def test_merge_and_unmerge_restore_every_bit():
    model = adapted()
    before, y = weights(model), model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y)
    model.unmerge_adapter()
    after = weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_safe_merge_merges_all_or_nothing(capsys):
    model = adapted()
    with torch.no_grad():
        model.model.head.hada_w1_a["default"][0, 0] = float("inf")
    before = weights(model)
    with pytest.raises(LoHaError, match="NaN or infinity"):
        model.merge_and_unload(safe_merge=True)
    after = weights(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.unload()
    adapted().merge_and_unload(progressbar=True)
    assert "merging 6/6" in capsys.readouterr().err


def test_unload_gives_the_model_back():
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = adapted(net)
    model.merge_adapter()
    assert model.unload() is net
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_merging_into_a_shared_weight_warns():
    net = Net()
    net.blocks[1].weight = net.blocks[0].weight
    model = adapted(net, target_modules=["blocks.0"])
    with pytest.warns(UserWarning, match="shared with another module"):
        model.merge_adapter()


def test_disable_adapter_is_the_base_for_a_while():
    model = adapted()
    base, y = copy.deepcopy(model).unload()(X), model(X)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(model(X), base)
        with model.disable_adapter():
            pass
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), y)
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    model.disable_adapter_layers()
    assert torch.equal(model(X), base)
    model.enable_adapter_layers()
    assert torch.equal(model(X), y)


def test_several_adapters():
    model = adapted()
    first = model(X)
    model.add_adapter("second", LoHaConfig(r=3, target_modules=["head", "conv"], init_weights=False))
    assert torch.equal(model(X), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith("second"))
    with pytest.raises(LoHaError, match="already"):
        model.add_adapter("second", LoHaConfig(target_modules=["head"]))
    model.set_adapter("second")
    second = model(X)
    trained = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"second"} and not torch.allclose(first, second)
    model.set_adapter(["default", "second"])
    both = model(X)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), both)
    with pytest.raises(LoHaError, match="Adapter third does not exist"):
        model.set_adapter("third")
    model.delete_adapter("default")
    torch.testing.assert_close(model(X), second)
    assert list(model.peft_config) == ["second"] and model.active_adapter == "second"


def test_setting_adapters_while_merged_unmerges():
    model = adapted()
    model.add_adapter("second", LoHaConfig(target_modules=["head"]))
    before = weights(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged"):
        model.set_adapter("second")
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(LoHaError, match="merged"):
        model.delete_adapter("default")


def test_all_linear_for_a_second_adapter_sees_no_adapters_insides():
    model = adapted(target_modules="all-linear")
    model.add_adapter("second", LoHaConfig(target_modules="all-linear"))
    assert sorted(model.peft_config["second"].target_modules) == ["blocks.0", "blocks.1", "blocks.2", "head"]


def test_modules_to_save_are_trained_apart_per_adapter():
    model = adapted(target_modules=["conv"], modules_to_save=["head"])
    before = model.unload().head.weight.clone()
    model = adapted(model.model, target_modules=["conv"], modules_to_save=["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "hada" not in n} == {
        "model.head.modules_to_save.default.weight", "model.head.modules_to_save.default.bias"
    }  # fmt: skip
    with torch.no_grad():
        model.model.head.modules_to_save["default"].weight.add_(1)
    y = model(X)
    with model.disable_adapter():
        assert torch.equal(model.model.head.weight, before)
    merged = model.merge_and_unload()
    assert isinstance(merged.head, nn.Linear) and torch.equal(merged.head.weight, before + 1)
    torch.testing.assert_close(merged(X), y)


def test_get_peft_model_trains_a_classifiers_new_head():
    net = Net()
    net.classifier = nn.Linear(4, 2)
    model = get_peft_model(net, LoHaConfig(target_modules=["conv"], task_type="SEQ_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert model.model.classifier.modules_to_save["default"].weight.requires_grad


def test_patterns_that_match_nothing_are_warned_of():
    with pytest.warns(UserWarning, match="rank_pattern: nose"):
        adapted(rank_pattern={"nose": 3})


@pytest.mark.parametrize("effective", [True, False])
def test_weighted_sums_are_exact(effective):
    model = adapted(use_effective_conv2d=effective)
    model.add_adapter("second", LoHaConfig(r=3, alpha=5, target_modules=["conv", "blocks.0"], init_weights=False))
    base = copy.deepcopy(model).unload()
    model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "sum")
    layer = model.model.conv
    wanted = 0.7 * layer.get_delta_weight("default") - 1.5 * layer.get_delta_weight("second")
    torch.testing.assert_close(layer.get_delta_weight("sum"), wanted)
    assert layer.r["sum"] == 4 + 9 and model.model.head.r["sum"] == 4
    model.set_adapter("sum")
    y = model(X)
    for name, module in base.named_modules():
        if name in model.targeted_module_names:
            for adapter, weight in (("default", 0.7), ("second", -1.5)):
                if adapter in (found := model.model.get_submodule(name)).adapters:
                    module.weight.data += weight * found.get_delta_weight(adapter).detach()
    torch.testing.assert_close(y, base(X), rtol=1e-4, atol=1e-5)


def test_weighted_sums_of_lower_rank_and_what_has_no_sum():
    model = adapted()
    model.add_adapter("second", LoHaConfig(r=2, target_modules=ALL, init_weights=False))
    model.add_weighted_adapter(["default", "second"], [1, 1], "sum", rank=5)
    assert model.model.conv.r["sum"] == 5
    with pytest.raises(LoHaError, match="2 adapters and 1 weights"):
        model.add_weighted_adapter(["default", "second"], [1], "again")
    model.add_adapter("dora", LoHaConfig(r=2, target_modules=["conv"], use_dora=True))
    with pytest.raises(LoHaError, match="DoRA"):
        model.add_weighted_adapter(["default", "dora"], [1, 1], "again")


def loras(converted: Result) -> tuple[dict[str, LoRAFactors], dict[str, float]]:
    """LoRA layers and their errors by name."""
    layers, others = split_layers(converted.adapter)
    assert not others and not converted.adapter.layers
    return layers, {entry.name: entry.error for entry in converted.report.layers}


def delta_of(layer: LoRAFactors) -> torch.Tensor:
    """B·A, shaped as the weight; the scale is 1."""
    assert layer.scale == 1
    return (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(layer.shape)


@pytest.mark.parametrize("effective", [True, False])
def test_convert_to_lora(effective):
    model = adapted(target_modules=["conv", "0", "1"], use_effective_conv2d=effective)
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in model.loha_layers()}
    layers, errors = loras(model.convert_to_lora())
    assert layers.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(delta_of(layers[name]), delta)
        assert layers[name].rank == 4 and errors[name] == 0
    layers, errors = loras(model.convert_to_lora(rank=2))
    for name, delta in deltas.items():
        error = float((delta_of(layers[name]) - delta).norm() / delta.norm())
        sigma = torch.linalg.svdvals(delta.flatten(1))
        best = float(sigma[2:].norm() / sigma.norm())
        assert layers[name].rank == 2 and abs(error - errors[name]) < 1e-5 and abs(error - best) < 1e-5
    layers, errors = loras(model.convert_to_lora(energy=0.9))
    assert all(error**2 <= 0.1 + 1e-6 for error in errors.values())
    assert all(1 <= layer.rank <= 4 for layer in layers.values())
    with pytest.raises(LoHaError, match="grouped"):
        adapted().convert_to_lora()


def test_counts(capsys):
    model = adapted(target_modules=["head"])
    assert model.get_nb_trainable_parameters() == (48, 48 + sum(p.numel() for p in Net().parameters()))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 48 || all params: ")
