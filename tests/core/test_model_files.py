"""LoHaModel and files: PEFT both ways, LyCORIS in and out."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from loha_core import Adapter, LoHaError, load_adapter, respell, save_adapter
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.model import LoHaModel

from . import samples

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.seq = nn.Conv1d(8, 8, 3, padding=1)
        self.proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.seq(self.conv(x).mean(3)).mean(2)
        return self.head(torch.tanh(self.proj(x)))


TARGETS = ["conv", "seq", "proj", "head"]
X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def adapted(**config) -> tuple[LoHaModel, Net]:
    """An adapted model, and its base."""
    net = Net()
    base = copy.deepcopy(net)
    return LoHaModel(net, LoHaConfig(**{"r": 2, "target_modules": TARGETS, "init_weights": False} | config)), base


CONFIGS = [
    {},
    {"alpha": 3, "rank_pattern": {"proj": 3}, "alpha_pattern": {"conv": 1.5, "proj": 6}},
    {"use_effective_conv2d": True},
    {"modules_to_save": ["head"]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_we_save_peft_loads(tmp_path, config):
    peft = pytest.importorskip("peft")
    model, base = adapted(**config)
    y = model(X)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(theirs(X), y)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_peft_saves_we_load(tmp_path, config):
    peft = pytest.importorskip("peft")
    net = Net()
    base = copy.deepcopy(net)
    config = {"r": 2, "target_modules": TARGETS, "init_weights": False} | config
    theirs = peft.get_peft_model(net, peft.LoHaConfig(**config))
    y = theirs(X)
    theirs.save_pretrained(tmp_path)
    model = LoHaModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(model(X), y)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.peft_config["default"].peft_version == peft.__version__


@pytest.mark.parametrize("config", [*CONFIGS, {"use_rslora": True}, {"use_scalar": True}])
def test_our_own_round_trip_goes_on_training(tmp_path, config):
    model, base = adapted(**config)
    y = model(X)
    model.save_pretrained(tmp_path)
    again = LoHaModel.from_pretrained(base, tmp_path, is_trainable=True)
    torch.testing.assert_close(again(X), y)
    assert any(p.requires_grad for p in again.parameters())
    again.save_pretrained(tmp_path / "again")
    assert load_adapter(tmp_path / "again").alphas == load_adapter(tmp_path).alphas


def test_several_adapters_have_a_folder_each(tmp_path):
    model, base = adapted()
    model.add_adapter("other", LoHaConfig(r=3, target_modules=["proj"], init_weights=False))
    model.save_pretrained(tmp_path)
    again = LoHaModel.from_pretrained(base, tmp_path)
    again.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        model.set_adapter(name)
        again.set_adapter(name, inference_mode=True)
        torch.testing.assert_close(again(X), model(X))
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    with pytest.raises(LoHaError, match="Adapter third does not exist"):
        model.save_pretrained(tmp_path, selected_adapters=["third"])


def test_lycoris_files_both_ways_with_dora(tmp_path):
    model, base = adapted(use_dora=True, use_effective_conv2d=True, alpha=3)
    y = model(X)
    with pytest.raises(LoHaError, match="format='lycoris'"):
        model.save_pretrained(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    save_adapter(model.to_adapter(), tmp_path / "lycoris.safetensors", format="lycoris")
    torch.testing.assert_close(LoHaModel.from_pretrained(base, tmp_path / "lycoris.safetensors")(X), y)


def test_a_lycoris_file_loads_into_a_diffusers_unet(tmp_path):
    """Written by lycoris-lora itself, onto the same model."""
    lycoris = pytest.importorskip("lycoris")
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    ).eval()  # fmt: skip
    base = copy.deepcopy(unet)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    network = lycoris.create_lycoris(
        unet, 1.0, linear_dim=2, linear_alpha=1, conv_dim=3, conv_alpha=2, algo="loha", use_tucker=True
    )
    network.apply_to()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16)
    y = unet(x, t, c).sample
    network.save_weights(str(tmp_path / "file.safetensors"), torch.float32, {})
    model = LoHaModel.from_pretrained(base, tmp_path / "file.safetensors")
    assert len(model.targeted_module_names) == len(network.loras)
    assert (model(x, t, c).sample - y).abs().max() <= 1e-5 * y.abs().max()


def test_our_lora_is_pefts_lora(tmp_path):
    peft = pytest.importorskip("peft")
    for number, config in enumerate(({"rank_pattern": {"proj": 3}}, {"alpha": 5}, {"use_effective_conv2d": True})):
        model, base = adapted(**config)
        folder = tmp_path / str(number)
        save_adapter(model.convert_to_lora().adapter, folder, format="peft")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and bool(config["rank_pattern"]) == (number == 0)
        theirs = peft.PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(theirs(X), model(X))


def test_what_pefts_lora_cannot_hold_is_refused_by_name(tmp_path):
    lora = adapted()[0].convert_to_lora().adapter
    conv = lora.extras["conv.lora_down.weight"].shape
    core = {"conv.lora_mid.weight": torch.ones(4, 4, 3, 3), "conv.lora_down.weight": torch.ones(4, conv[1], 1, 1)}
    for extras, layers, message in (
        ({"conv.dora_scale": torch.ones(8, 1, 1, 1)}, {}, r"PEFT's LoRA format cannot hold DoRA \(conv\)"),
        (core, {}, r"PEFT's LoRA format cannot hold a LoRA's core \(conv\)"),
        ({"norm.weight": torch.ones(3)}, {}, "PEFT's LoRA format cannot hold norm.weight"),
        ({}, {"other": samples.factors((4, 6))}, "PEFT's LoHa format cannot hold LoRA layers beside LoHa layers"),
    ):
        with pytest.raises(LoHaError, match=message):
            save_adapter(Adapter(layers, lora.extras | extras), tmp_path / "peft", format="peft")
    with pytest.raises(LoHaError, match=r"cannot hold DoRA \("):
        save_adapter(adapted(use_dora=True)[0].convert_to_lora().adapter, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()


def test_a_model_whose_paths_look_like_a_pipelines(tmp_path):
    """GPT-2's modules begin with "transformer.", which in single files names a network."""
    model = LoHaModel(nn.ModuleDict({"transformer": nn.Linear(3, 3)}), LoHaConfig(r=1, target_modules=["transformer"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    again = LoHaModel.from_pretrained(nn.ModuleDict({"transformer": nn.Linear(3, 3)}), tmp_path)
    assert again.targeted_module_names == ["transformer"]


def test_what_does_not_fit_is_named_and_the_model_left_alone(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    other = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(LoHaError, match="nothing in it fits this model"):
        LoHaModel.from_pretrained(other, tmp_path)
    wrong = Net()
    wrong.proj = nn.Linear(8, 9)
    with pytest.raises(LoHaError, match="made for another model"):
        LoHaModel.from_pretrained(wrong, tmp_path)
    assert isinstance(wrong.conv, nn.Conv2d) and wrong.conv.weight.requires_grad
    part = Net()
    del part.seq
    with pytest.warns(UserWarning, match="1 keys not applied: seq"):
        LoHaModel.from_pretrained(part, tmp_path)


def test_broken_values_are_not_saved(tmp_path):
    model, _ = adapted()
    with torch.no_grad():
        model.model.conv.hada_w1_a["default"][0, 0] = float("nan")
    with pytest.raises(LoHaError, match=r"conv\.hada_w1_a"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_only_the_main_process_writes(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_a_folders_unknown_fields_survive(tmp_path):
    model, base = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"from_the_future": 1}))
    LoHaModel.from_pretrained(base, tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["from_the_future"] == 1


def _whole_unet(family: str) -> torch.nn.Module:
    """All blocks of the real one, narrow."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {"norm_num_groups": 2, "attention_head_dim": 2, "layers_per_block": 2, "cross_attention_dim": 6}
    if family == "SD1.5":
        return diffusers.UNet2DConditionModel(**sizes, block_out_channels=(4, 4, 4, 4))
    return diffusers.UNet2DConditionModel(
        **sizes, block_out_channels=(4, 4, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    )  # fmt: skip


@pytest.mark.parametrize("style", ["kohya", "native"])
@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
def test_a_file_in_the_original_codes_names_loads_into_a_diffusers_unet(tmp_path, family, style):
    """Row 8 of issue 14: "nothing in it fits this model"."""
    unet = _whole_unet(family)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    weights = {name: tuple(m.weight.shape) for name, m in unet.named_modules() if isinstance(m, kinds)}
    layers = {name: samples.factors(shape, 1, seed=seed) for seed, (name, shape) in enumerate(weights.items())}
    there = respell(Adapter({f"unet.{name}": f for name, f in layers.items()}), style, "ldm").adapter
    assert any("output_blocks" in name for name in there.layers) and not any("up_blocks" in n for n in there.layers)
    save_adapter(there, tmp_path / "ldm.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = LoHaModel.from_pretrained(unet, tmp_path / "ldm.safetensors").to_adapter().layers
    assert found.keys() == weights.keys()
    for name, factors in found.items():
        torch.testing.assert_close(factors.delta().flatten(), layers[name].delta().flatten())


def test_and_a_file_in_diffusers_names_into_the_original_codes_unet(tmp_path):
    net = torch.nn.Module()
    net.middle_block = torch.nn.ModuleList([torch.nn.Module(), torch.nn.ModuleDict({"proj_in": torch.nn.Linear(6, 4)})])
    factors = samples.factors((4, 6))
    save_adapter(Adapter({"unet.mid_block.attentions.0.proj_in": factors}), tmp_path / "a.safetensors")
    (found,) = LoHaModel.from_pretrained(net, tmp_path / "a.safetensors").to_adapter().layers.items()
    assert found[0] == "middle_block.1.proj_in" and torch.equal(found[1].delta(), factors.delta())
