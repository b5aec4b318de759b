"""Files that PEFT writes, and what PEFT makes of ours."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loha_core import Adapter, LoHaError, load_adapter, save_adapter

from . import oracle, samples

peft = pytest.importorskip("peft", reason="a peer to measure against: pip install .[peers]")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    """One layer of each kind that PEFT's LoHa adapts, as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(6, 4, (3, 2), groups=2)
        self.point = nn.Conv2d(4, 4, 1)
        self.conv1d = nn.Conv1d(4, 6, 3, padding=1)
        self.to_q = nn.Linear(6, 5)

    def forward(self, x):
        x = self.point(self.conv2d(self.conv_in(x)))
        return self.to_q(self.conv1d(x.flatten(2)).transpose(1, 2))


class Model(nn.Module):
    """Two blocks, so that patterns have ends of names to match."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


LAYERS = ("conv_in", "conv2d", "point", "conv1d", "to_q")
CASES = {
    "flat": {},
    "effective_conv2d": {"use_effective_conv2d": True},
    "alpha differs from rank": {"r": 3, "alpha": 5},
    "rank_pattern": {"rank_pattern": {"to_q": 4, "blocks.1.conv1d": 1}},
    "alpha_pattern": {"alpha_pattern": {"to_q": 4, r"blocks\.\d+\.conv.*": 0.5}},
    "both, first pattern wins": {
        "rank_pattern": {"blocks.0.to_q": 1, "to_q": 4, "conv2d": 3},
        "alpha_pattern": {"blocks.0.conv2d": 100, "conv2d": 6, "^blocks.1.point": 7},
        "use_effective_conv2d": True,
    },
}


def peer(seed: int = 0, dtype: torch.dtype = torch.float32, **options):
    """A PEFT model with random factors."""
    config = peft.LoHaConfig(**{"r": 2, "alpha": 2, "target_modules": list(LAYERS), "init_weights": False} | options)
    model = peft.get_peft_model(Model(), config)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
                parameter.data = parameter.data.to(dtype)
    return model.eval()


def layers_of(model) -> dict[str, nn.Module]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_update_is_the_float64_update_and_pefts(tmp_path, options, dtype):
    model = peer(dtype=dtype, **options)
    model.save_pretrained(tmp_path)
    tensors, theirs = load_file(tmp_path / WEIGHTS), layers_of(model)
    adapter = load_adapter(tmp_path)
    assert adapter.dialect == "peft" and not adapter.extras and not adapter.notes
    assert len(theirs) == 10 and adapter.layers.keys() == theirs.keys()
    for name, factors in adapter.layers.items():
        layer = theirs[name]
        assert (factors.rank, factors.alpha) == (layer.r["default"], layer.alpha["default"])
        wanted = oracle.update(tensors, f"base_model.model.{name}", alpha=factors.alpha)
        assert oracle.error(factors.delta(), wanted) <= 1e-6
        assert oracle.error(factors.delta(torch.float64), wanted) <= 1e-13
        rounding = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]  # PEFT sums in half
        assert oracle.error(layer.get_delta_weight("default"), wanted) <= rounding
        assert factors.is_tucker == (bool(options.get("use_effective_conv2d")) and "conv" in name)
        assert not factors.is_tucker or factors.shape[2:] == layer.weight.shape[2:]


@pytest.mark.parametrize("entry", [CONFIG, WEIGHTS])
def test_the_bare_file_beside_its_configuration(tmp_path, entry):
    peer(r=3, alpha=5, rank_pattern={"to_q": 2}).save_pretrained(tmp_path)
    if entry == CONFIG:
        with pytest.raises(LoHaError, match=CONFIG):
            load_adapter(tmp_path / CONFIG)
        return
    whole, bare = load_adapter(tmp_path), load_adapter(tmp_path / WEIGHTS)
    assert {n: (f.rank, f.alpha) for n, f in bare.layers.items()} == {
        n: (f.rank, f.alpha) for n, f in whole.layers.items()
    }
    assert bare.layers["blocks.0.to_q"].scale == 5 / 2 and not bare.notes


def test_the_bare_file_alone_has_scale_one_and_says_so(tmp_path):
    peer(r=3, alpha=5).save_pretrained(tmp_path / "folder")
    alone = tmp_path / "alone" / "style.safetensors"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "folder" / WEIGHTS, alone)
    adapter = load_adapter(alone)
    assert {f.scale for f in adapter.layers.values()} == {1.0} and len(adapter.layers) == 10
    assert len(adapter.notes) == 1 and CONFIG in adapter.notes[0] and "scale 1" in adapter.notes[0]


def test_networks_in_sub_folders_are_one_adapter(tmp_path):
    peer(alpha=3).save_pretrained(tmp_path / "unet")
    peer(seed=1, alpha=5, use_effective_conv2d=True).save_pretrained(tmp_path / "text_encoder")
    adapter = load_adapter(tmp_path)
    assert len(adapter.layers) == 20
    for folder, alpha in (("unet", 3), ("text_encoder", 5)):
        tensors = load_file(tmp_path / folder / WEIGHTS)
        for name in oracle.modules(tensors):
            mine = adapter.layers[f"{folder}.{name.removeprefix('base_model.model.')}"]
            assert oracle.error(mine.delta(), oracle.update(tensors, name, alpha)) <= 1e-6


def test_modules_to_save_are_kept_as_extras(tmp_path):
    options = {"target_modules": ["conv1d"], "modules_to_save": ["to_q"]}
    peer(**options).save_pretrained(tmp_path)
    kept = {key for key in load_file(tmp_path / WEIGHTS) if "hada_" not in key}
    adapter = load_adapter(tmp_path)
    assert kept and adapter.extras.keys() == kept and len(adapter.layers) == 2


def outputs(model) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return model(torch.randn(2, 3, 6, 5, generator=random))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_peft_loads_what_we_save(tmp_path, options):
    model = peer(**options)
    model.save_pretrained(tmp_path / "theirs")
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "ours", format="peft")
    theirs, ours = load_file(tmp_path / "theirs" / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert theirs.keys() == ours.keys() and all(torch.equal(t, ours[k]) for k, t in theirs.items())
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "ours").eval()
    change = outputs(model) - outputs(Model())
    assert oracle.error(outputs(loaded) - outputs(Model()), oracle.wide(change)) <= 1e-6
    assert torch.equal(outputs(loaded), outputs(model))


def test_peft_loads_what_came_from_lycoris(tmp_path):
    """Ranks and alphas of their own for every layer: PEFT needs a pattern for each."""
    shapes = {
        "conv_in": (6, 3, 3, 3),
        "conv2d": (4, 3, 3, 2),
        "conv1d": (6, 4, 3),
        "to_q": (5, 6),
        "point": (4, 4, 1, 1),
    }
    tensors = {}
    for block in (0, 1):
        for seed, (name, shape) in enumerate(shapes.items()):
            options = {"tucker": "conv" in name, "alpha": 0.5 + seed + block, "seed": seed + 10 * block}
            tensors |= samples.module(f"lora_unet_blocks_{block}_{name}", shape, 1 + (seed + block) % 3, **options)
    adapter = load_adapter(samples.write(tmp_path / "a.safetensors", tensors))
    save_adapter(adapter, tmp_path / "peft", format="peft")
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "peft" / "unet").eval()
    for name, layer in layers_of(loaded).items():
        wanted = oracle.update(tensors, f"lora_unet_{name.replace('.', '_')}")
        assert oracle.error(layer.get_delta_weight("default"), wanted) <= 1e-6
    assert len(layers_of(loaded)) == 10


def test_patterns_count_as_peft_reads_them(tmp_path):
    """PEFT sorts the patterns as it saves, so of two that fit, another than in training may win; the file decides."""
    trained = peer(alpha_pattern={"conv2d": 6, "blocks.0.conv2d": 100})
    trained.save_pretrained(tmp_path)
    read = layers_of(peft.PeftModel.from_pretrained(Model(), tmp_path))["blocks.0.conv2d"]
    assert layers_of(trained)["blocks.0.conv2d"].alpha["default"] == 6 and read.alpha["default"] == 100
    assert load_adapter(tmp_path).layers["blocks.0.conv2d"].alpha == 100


class Nested(nn.Module):
    """Names that are the ends of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(4, 4)
        self.z = nn.ModuleDict(
            {"proj": nn.Linear(4, 4), "a_proj": nn.Linear(4, 4), "z": nn.ModuleDict({"proj": nn.Linear(4, 4)})}
        )


def test_a_name_that_ends_another_keeps_its_own_rank_and_alpha(tmp_path):
    """PEFT takes the first pattern that matches the end of a name, so the order in the file matters."""
    names = ["proj", "z.proj", "z.a_proj", "z.z.proj"]
    layers = {name: samples.factors((4, 4), 1 + i, alpha=i + 0.5, seed=i) for i, name in enumerate(names)}
    save_adapter(Adapter(layers), tmp_path, format="peft")
    loaded = layers_of(peft.PeftModel.from_pretrained(Nested(), tmp_path))
    again = load_adapter(tmp_path).layers
    for name, factors in layers.items():
        assert (again[name].rank, again[name].alpha) == (factors.rank, factors.alpha)
        assert oracle.error(loaded[name].get_delta_weight("default"), oracle.wide(factors.delta())) <= 1e-6
