"""What PEFT's users run into with a model of their own: each was wrong once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from loha_core import LoHaConfig, LoHaError, LoHaModel


class Net(nn.Module):
    """With a list called layers and a name, as transformers' models have them."""

    name_or_path = "someone/some-model"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3)
        self.pushed = False

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)

    def push_to_hub(self) -> None:
        self.pushed = True

    def enable_adapters(self) -> None:
        raise AssertionError("transformers' method, which knows nothing of LoHa layers")


def model(*, targets=("0", "1"), **settings) -> LoHaModel:
    torch.manual_seed(0)
    return LoHaModel(Net(), LoHaConfig(r=2, target_modules=list(targets), init_weights=False, **settings))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_model_drops_nothing_unless_it_is_to_be_trained(tmp_path, x, is_trainable):
    model(module_dropout=0.9).save_pretrained(tmp_path)
    loaded = LoHaModel.from_pretrained(Net().train(), tmp_path, is_trainable=is_trainable)
    assert loaded.training == is_trainable
    if not is_trainable:
        assert all(torch.equal(loaded(x), loaded(x)) for _ in range(5))


def test_methods_that_would_act_on_the_base_alone_are_not_passed_on():
    wrapped = model()
    for name in ("enable_adapters", "disable_adapters", "set_adapters"):
        assert not hasattr(wrapped, name)
    with pytest.raises(LoHaError, match="upload_folder"):
        wrapped.push_to_hub("someone/some-adapter")
    assert wrapped.base_model is wrapped and not wrapped.model.pushed


def test_the_wrapped_models_own_layers_are_there():
    wrapped = model()
    assert isinstance(wrapped.layers, nn.ModuleList) and len(wrapped.layers) == 2
    assert [name for name, _ in wrapped.loha_layers()] == ["layers.0", "layers.1"]


def test_two_adapters_that_share_a_module_saved_whole_are_refused_together(x):
    wrapped = model(targets=["0"], modules_to_save=["head"])
    wrapped.add_adapter("other", LoHaConfig(target_modules=["0"], modules_to_save=["head"]))
    before = wrapped(x)
    with pytest.raises(LoHaError, match="default, other each have a copy of head"):
        wrapped.set_adapter(["default", "other"])
    assert wrapped.active_adapters == ["default"] and torch.equal(wrapped(x), before)


def test_the_configuration_names_its_base_model(tmp_path):
    wrapped = model()
    wrapped.save_pretrained(tmp_path)
    assert LoHaConfig.from_pretrained(tmp_path).base_model_name_or_path == "someone/some-model"
    assert model(base_model_name_or_path="another").peft_config["default"].base_model_name_or_path == "another"


def test_a_refused_adapter_leaves_nothing_behind():
    wrapped = model()
    keys = list(wrapped.state_dict())
    wrapped.model.layers[1].base_layer.weight = nn.Parameter(torch.zeros(18, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LoHaError, match="packed"):
        wrapped.add_adapter("second", LoHaConfig(target_modules=["0", "1"], use_dora=True))
    assert list(wrapped.state_dict()) == keys
    wrapped.add_adapter("second", LoHaConfig(target_modules=["0"]))
    assert "second" not in wrapped.model.layers[0].dora_scale


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("dora", [(True, True), (False, True), (True, False)])
def test_dora_adapters_merge_one_after_the_other_as_they_do_together(x, dora, together):
    wrapped = model(targets=["0"], use_dora=dora[0])
    torch.manual_seed(2)
    settings = {"target_modules": ["0"], "init_weights": False, "use_dora": dora[1], "r": 3}
    wrapped.add_adapter("second", LoHaConfig(**settings))
    wrapped.set_adapter(["default", "second"])
    expected, base = wrapped(x), wrapped.model.layers[0].base_layer.weight.clone()
    for names in [["default", "second"]] if together else [["default"], ["second"]]:
        wrapped.merge_adapter(names)
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
    wrapped.unmerge_adapter()
    assert torch.equal(wrapped.model.layers[0].base_layer.weight, base)


def test_the_update_of_a_parametrised_layer_is_not_turned_round():
    base = Net()
    parametrizations.weight_norm(base.head)  # the layer is then of a class made for it
    wrapped = LoHaModel(base, LoHaConfig(r=2, target_modules=["head"], init_weights=False))
    assert wrapped.head.get_delta_weight("default").shape == (3, 6)


def test_a_layer_that_attention_reads_without_calling_it_is_refused():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    with pytest.raises(LoHaError, match=r"attention\.out_proj: nn\.MultiheadAttention reads"):
        LoHaModel(Attending(), LoHaConfig(target_modules=["out_proj"]))
    wrapped = LoHaModel(Attending(), LoHaConfig(target_modules="all-linear"))
    assert wrapped.targeted_module_names == ["linear"]


def test_values_from_a_file_outlive_an_offloaded_base(tmp_path):
    trained = model()
    trained.save_pretrained(tmp_path)
    with torch.device("meta"):
        base = Net()
    loaded = LoHaModel.from_pretrained(base, tmp_path)
    theirs = dict(trained.loha_layers())
    for name, layer in loaded.loha_layers():
        torch.testing.assert_close(layer.hada_w1_a["default"], theirs[name].hada_w1_a["default"])


def test_an_unknown_argument_is_also_pythons_own_error():
    with pytest.raises(TypeError, match="no field rnak"):
        LoHaConfig(rnak=8)
    assert copy.copy(LoHaConfig()) == LoHaConfig()
