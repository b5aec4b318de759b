"""PEFT's surface on LoHaModel, with PEFT as the oracle: status, state dicts, keywords, results, model cards."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loha_core
from loha_core import LoHaConfig, LoHaError, LoHaModel, get_peft_model

peft = pytest.importorskip("peft", reason="what it is about: pip install .[peers]")


class Net(nn.Module):
    """Every kind of layer that PEFT's LoHa knows, a normalisation with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.seq = nn.Conv1d(8, 6, 3, padding=1)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.seq(self.norm(torch.tanh(self.conv(x)).flatten(2))).mean(2)
        return self.head(torch.tanh(self.linear(x)))


TARGETS = ["conv", "seq", "linear"]
X = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SETTINGS = {"r": 2, "alpha": 3, "target_modules": TARGETS, "init_weights": False}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def both(**settings):
    """Ours and PEFT's, equal."""
    found = []
    for make, config in ((get_peft_model, LoHaConfig), (peft.get_peft_model, peft.LoHaConfig)):
        base = net()
        torch.manual_seed(1)
        found.append(make(base, config(**SETTINGS | settings)))
    return found


def adapted(**settings) -> LoHaModel:
    return both(**settings)[0]


# Status


def statuses(model):
    layers = [vars(layer) for layer in model.get_layer_status()]
    return layers, vars(model.get_model_status())


@pytest.mark.parametrize("saved", [None, ["head", "norm"]])
def test_the_status_is_pefts(saved):
    ours, theirs = both(modules_to_save=saved)
    assert statuses(ours) == statuses(theirs)
    for model, config in ((ours, LoHaConfig), (theirs, peft.LoHaConfig)):
        model.add_adapter("other", config(r=1, target_modules=["linear", "head"] if saved is None else ["linear"]))
    assert statuses(ours) == statuses(theirs)
    for change in (
        lambda model: model.set_adapter("other"),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.disable_adapter_layers(),
        lambda model: model.enable_adapter_layers(),
        lambda model: model.set_requires_grad("default"),
        lambda model: model.set_requires_grad(["default", "other"], False),
    ):
        change(ours)
        change(theirs)
        assert statuses(ours) == statuses(theirs)


def test_what_is_irregular_is_said():
    ours, theirs = both()
    for model in (ours, theirs):
        model.base_model.model.linear.hada_w1_a["default"].requires_grad_(False)
        model.base_model.model.conv.enable_adapters(False)
        model.base_model.model.seq.set_adapter([])
        model.base_model.model.linear.merge()
    assert statuses(ours) == statuses(theirs)
    status = ours.get_model_status()
    assert (status.enabled, status.active_adapters, status.merged_adapters) == ("irregular",) * 3
    with pytest.warns(UserWarning, match="some adapter layers that are enabled and others that are disabled"):
        with ours.disable_adapter():
            torch.testing.assert_close(ours(X), net()(X))
    assert ours.get_model_status().enabled is True


# State dicts


@pytest.mark.parametrize("settings", [{}, {"use_effective_conv2d": True}, {"modules_to_save": ["head", "norm"]}])
def test_state_dicts_are_pefts_both_ways(settings):
    ours, theirs = both(**settings)
    mine, wanted = loha_core.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    changed = {key: tensor + 1 for key, tensor in wanted.items()}
    result = loha_core.set_peft_model_state_dict(ours, changed)
    peft.set_peft_model_state_dict(theirs, changed)
    assert result == ([], [])
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X))
    some = dict(list(changed.items())[1:]) | {"base_model.model.nowhere.hada_w1_a": torch.ones(1)}
    result = loha_core.set_peft_model_state_dict(ours, some)
    assert result.missing_keys == [next(iter(changed))]
    assert result.unexpected_keys == ["base_model.model.nowhere.hada_w1_a"]


def test_state_dicts_of_wrapped_models():
    model = adapted()
    wanted = loha_core.get_peft_model_state_dict(model)
    wrapped = nn.ModuleDict({"module": model})
    found = loha_core.get_peft_model_state_dict(wrapped)
    assert found.keys() == wanted.keys()
    gathered = {f"module.{key}": tensor * 2 for key, tensor in model.state_dict().items()}
    found = loha_core.get_peft_model_state_dict(wrapped, gathered)
    assert all(torch.equal(found[key], 2 * tensor) for key, tensor in wanted.items())
    with pytest.raises(LoHaError, match="Net has no LoHaModel in it"):
        loha_core.get_peft_model_state_dict(net())
    with pytest.raises(LoHaError, match="Adapter other does not exist"):
        loha_core.get_peft_model_state_dict(model, adapter_name="other")


def test_parameters_on_meta_take_the_tensors():
    model = LoHaModel(net(), LoHaConfig(**SETTINGS), low_cpu_mem_usage=True)
    trained = adapted()
    state = loha_core.get_peft_model_state_dict(trained)
    assert loha_core.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True) == ([], [])
    torch.testing.assert_close(model(X), trained(X))


def test_the_bases_own_state():
    model, base = adapted(modules_to_save=["head"]), net()
    found = loha_core.get_base_model_state_dict(model)
    assert found.keys() == base.state_dict().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in base.state_dict().items())
    changed = {key: tensor + 1 for key, tensor in found.items()}
    assert loha_core.set_base_model_state_dict(model, changed) == ([], [])
    assert torch.equal(model.model.conv.base_layer.weight, base.conv.weight + 1)
    odd = {"elsewhere": torch.ones(1)} | dict(list(found.items())[1:])
    with pytest.raises(LoHaError, match="misses .'conv.weight'., and has no .'elsewhere'."):
        loha_core.set_base_model_state_dict(model, odd)
    assert torch.equal(model.model.conv.base_layer.weight, base.conv.weight + 1)
    assert loha_core.set_base_model_state_dict(model, odd, strict=False) == (["conv.weight"], ["elsewhere"])


# Keywords


def dtypes(model) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if model.prefix in n}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_adapters_dtype_is_pefts(tmp_path, dtype, autocast):
    found = []
    for make, load, config in (
        (get_peft_model, LoHaModel.from_pretrained, LoHaConfig),
        (peft.get_peft_model, peft.PeftModel.from_pretrained, peft.LoHaConfig),
    ):
        model = make(net().to(dtype), config(**SETTINGS), autocast_adapter_dtype=autocast)
        model.add_adapter("other", config(**SETTINGS), autocast_adapter_dtype=autocast)
        model.save_pretrained(tmp_path)
        again = load(net().to(dtype), tmp_path, autocast_adapter_dtype=autocast)
        again.load_adapter(tmp_path / "other", "other", autocast_adapter_dtype=autocast)
        found.append((dtypes(model), dtypes(again)))
    assert found[0] == found[1] == ({torch.float32 if autocast else dtype},) * 2


def test_half_precision_adapters_compute_learn_and_merge():
    model = get_peft_model(net().bfloat16(), LoHaConfig(**SETTINGS), autocast_adapter_dtype=False).eval()
    x = X.bfloat16()
    y = model(x)
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=0.05, atol=0.05)


def test_pefts_keywords_of_loading(tmp_path):
    trained = adapted()
    trained.save_pretrained(tmp_path / "adapter")
    options = {"torch_device": "cpu", "low_cpu_mem_usage": True, "device_map": {"": "cpu"}}
    model = LoHaModel.from_pretrained(net(), tmp_path, subfolder="adapter", **options)
    torch.testing.assert_close(model(X), trained.eval()(X))
    assert model.load_adapter(tmp_path / "adapter", "other", **options) == ([], [])
    with pytest.raises(LoHaError, match="revision, token: nothing is downloaded here"):
        model.load_adapter(tmp_path / "adapter", "third", revision="main", token="x")
    with pytest.raises(TypeError, match="load_adapter has no argument is_trainabel"):
        model.load_adapter(tmp_path / "adapter", "third", is_trainabel=True)
    assert "third" not in model.peft_config


def test_a_configuration_that_is_given_becomes_the_adapters(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = LoHaConfig(r=7, module_dropout=0.5)
    model = LoHaModel.from_pretrained(net(), tmp_path, config=config)
    assert model.peft_config["default"] is config
    assert (config.r, config.inference_mode, config.target_modules) == (2, True, sorted(TARGETS))
    theirs = LoHaModel.from_pretrained(net(), tmp_path, config=peft.LoHaConfig(module_dropout=0.5))
    assert theirs.peft_config["default"].module_dropout == 0.5


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    model = adapted()
    for options, said in (
        ({"safe_serialization": False}, "safe_serialization=False would write a pickle"),
        ({"save_embedding_layers": True}, "name them in modules_to_save"),
    ):
        with pytest.raises(LoHaError, match=said):
            model.save_pretrained(tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()


def test_configurations_of_peft_and_of_other_kinds():
    ours = get_peft_model(net(), peft.LoHaConfig(**SETTINGS), revision="abc", mixed=True)
    assert ours.peft_config["default"].revision == "abc"
    ours.add_adapter("other", peft.LoHaConfig(**SETTINGS))
    ours.set_adapter(["default", "other"])
    for config in (peft.LoraConfig(target_modules=["linear"]), peft.PromptTuningConfig(num_virtual_tokens=2)):
        with pytest.raises(LoHaError, match=f"{type(config).__name__} is no configuration of LoHa"):
            ours.add_adapter("third", config)
        with pytest.raises(LoHaError, match=f"{type(config).__name__} is no configuration of LoHa"):
            get_peft_model(net(), config)


def test_several_configurations_at_once():
    configs = {"a": LoHaConfig(**SETTINGS), "b": peft.LoHaConfig(r=1, target_modules=["head"])}
    model = LoHaModel(net(), configs, "b")
    assert list(model.peft_config) == ["a", "b"] and model.active_adapter == "b"
    assert model.targeted_module_names == [*TARGETS, "head"]
    with pytest.raises(LoHaError, match="there are configurations for a, b; adapter_name 'default' is none"):
        LoHaModel(net(), configs)


# Results


def test_loading_says_what_is_missing_and_what_was_not_expected(tmp_path):
    adapted(modules_to_save=["head"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    left = {key: tensor for key, tensor in state.items() if ".linear." not in key and ".head." not in key}
    nowhere = {
        f"base_model.model.nowhere.hada_{factor}": torch.ones(2, 2) for factor in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    save_file(left | nowhere, file)
    model = LoHaModel(net(), LoHaConfig(r=2, target_modules=["conv"]), "first")
    with pytest.warns(UserWarning, match="Found missing adapter keys while loading"):
        result = model.load_adapter(tmp_path, "second")
    assert sorted(result.missing_keys) == sorted(set(state) - set(left))
    assert sorted(result.unexpected_keys) == sorted(nowhere)
    assert model.peft_config["second"].target_modules == ["conv", "seq"]


def test_a_file_that_has_all_is_not_warned_of(tmp_path):
    adapted(modules_to_save=["head"]).save_pretrained(tmp_path)
    model = LoHaModel(net(), LoHaConfig(r=2, target_modules=["conv"]), "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.load_adapter(tmp_path, "second") == ([], [])


def test_layers_tell_features_as_pefts_do():
    ours, theirs = both()
    for name in TARGETS:
        mine, wanted = getattr(ours.model, name), getattr(theirs.base_model.model, name)
        assert (mine.in_features, mine.out_features) == (wanted.in_features, wanted.out_features)


def test_merging_what_is_merged_is_warned_of():
    model = adapted().eval()
    model.merge_adapter()
    merged = model(X)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(model(X), merged)


def test_requires_grad_of_one_adapter():
    model = adapted(modules_to_save=["head"])
    model.add_adapter("other", LoHaConfig(target_modules=["linear"], modules_to_save=["head"]))
    model.set_requires_grad("other")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trains if "other" in name} == {n for n, _ in model.named_parameters() if "other" in n}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(LoHaError, match="Adapter third does not exist"):
        model.set_requires_grad("third")


def test_the_last_adapter_can_go():
    model, base = adapted(modules_to_save=["head"]), net()
    assert model.active_peft_config is model.peft_config["default"]
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.peft_config
    torch.testing.assert_close(model.eval()(X), base.eval()(X))
    with pytest.raises(LoHaError, match="no adapter is active"):
        _ = model.active_peft_config
    assert model.get_base_model() is model.model


# LoRA


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_of_the_energy_as_a_rank_is_pefts(share):
    ours, theirs = both(target_modules=["linear", "head"], r=3)
    assert ours.supports_lora_conversion()
    _, wanted = peft.convert_to_lora(theirs, rank=share)
    adapter = ours.convert_to_lora(rank=share).adapter
    for name in ("linear", "head"):
        down, up = (wanted[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        layer = adapter.extras[f"{name}.lora_down.weight"], adapter.extras[f"{name}.lora_up.weight"]
        assert layer[0].shape[0] == down.shape[0], name
        scale = adapter.extras[f"{name}.alpha"] / layer[0].shape[0]
        torch.testing.assert_close(scale * layer[1] @ layer[0], up @ down)
    with pytest.raises(LoHaError, match="energy"):
        ours.convert_to_lora(rank=1.5)
    with pytest.raises(LoHaError, match="give one"):
        ours.convert_to_lora(rank=0.5, energy=0.5)


@pytest.mark.parametrize("rank", [None, 3, 0.9])
def test_peft_reads_the_lora(tmp_path, rank):
    """Also where modules' names begin as a pipeline's folders do: GPT's `transformer`."""
    settings = SETTINGS | {"target_modules": ["conv", "linear"]}
    model = LoHaModel(nn.ModuleDict({"transformer": net()}), LoHaConfig(**settings))
    report = model.save_as_lora(tmp_path, rank=rank)
    theirs = peft.PeftModel.from_pretrained(nn.ModuleDict({"transformer": net()}), tmp_path)
    assert [layer.name for layer in report.layers] == ["transformer.conv", "transformer.linear"]
    for layer in report.layers:
        exact = model.model.get_submodule(layer.name).get_delta_weight("default")
        found = theirs.base_model.model.get_submodule(layer.name).get_delta_weight("default")
        error = ((found - exact).norm() / exact.norm()).item()
        assert error == pytest.approx(layer.error, rel=1e-3, abs=1e-5)
        assert (error < 1e-5) == (rank is None)


def test_what_no_lora_can_be_says_so(tmp_path):
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    model = LoHaModel(grouped, LoHaConfig(r=1, target_modules=["0"]))
    model.add_adapter("second", LoHaConfig(r=1, target_modules=["1"]))
    assert not model.supports_lora_conversion() and model.supports_lora_conversion("second")
    model.save_as_lora(tmp_path, "second")
    with pytest.raises(LoHaError, match="default has grouped convolutions or DoRA"):
        model.save_as_lora(tmp_path)


# The card


def test_the_card_is_one_that_peft_and_the_hub_read(tmp_path):
    yaml = pytest.importorskip("yaml")
    model = adapted()
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert yaml.safe_load(re.findall(r"\A---\n(.*?)\n---\n", text, re.DOTALL)[0]) == {
        "library_name": "peft", "tags": ["loha"],
    }  # fmt: skip
    named = net()
    named.config = {"_name_or_path": "some/model: one"}
    LoHaModel(named, LoHaConfig(r=1, target_modules=["linear"])).save_pretrained(tmp_path / "named")
    text = (tmp_path / "named" / "README.md").read_text("utf-8")
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "some/model: one"
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    # PEFT adds to it what it adds to its own.
    peft.PeftModel.from_pretrained(net(), tmp_path / "named").save_pretrained(tmp_path / "named")
    assert "library_name: peft" in (tmp_path / "named" / "README.md").read_text("utf-8")


def test_the_file_says_whose_format_it_is(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    assert values["peft_version"] == peft.LoHaConfig.from_pretrained(tmp_path).peft_version
    file.write_text(json.dumps(values | {"peft_version": "0.19.1"}))
    again = LoHaModel.from_pretrained(copy.deepcopy(net()), tmp_path)
    again.save_pretrained(tmp_path)
    assert json.loads(file.read_text())["peft_version"] == "0.19.1"
