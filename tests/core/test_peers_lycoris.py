"""Files that lycoris-lora itself writes: what we make of them, and what LyCORIS does."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loha_core import algebra, describe, load_adapter, save_adapter

from . import oracle

LycorisNetwork = pytest.importorskip("lycoris", reason="a peer to measure against: pip install .[peers]").LycorisNetwork
logging.getLogger("LyCORIS").setLevel(logging.ERROR)

INPUTS = {
    "linear": (3, 6),
    "conv1d": (2, 4, 7),
    "conv2d": (2, 4, 6, 5),
    "conv3d": (2, 4, 4, 4, 3),
    "point": (2, 4, 3, 3),
}


class Model(nn.Module):
    """One layer of each kind that LyCORIS adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.conv1d = nn.Conv1d(4, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(4, 6, (3, 2), stride=2, groups=2)
        self.conv3d = nn.Conv3d(4, 5, (2, 1, 3))
        self.point = nn.Conv2d(4, 6, 1)


def train(seed: int = 0, **options) -> tuple[Model, LycorisNetwork]:
    """A network that LyCORIS built, its zero and constant parameters made random as training would."""
    torch.manual_seed(seed)
    model = Model()
    LycorisNetwork.apply_preset({"target_module": [kind.__class__.__name__ for kind in model.children()]})
    arguments = {"lora_dim": 3, "conv_lora_dim": 2, "alpha": 2, "conv_alpha": 1.5, "network_module": "loha"} | options
    network = LycorisNetwork(model, **arguments)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.5)
    assert len(network.loras) == len(INPUTS)
    return model, network.eval()


def saved(network: LycorisNetwork, path, dtype: torch.dtype | None = None):
    network.save_weights(str(path), dtype, {"ss_network_module": "lycoris.kohya"})
    return load_file(path)


def outputs(model: Model, weights: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """What each layer makes of one input: through LyCORIS' forward, or in float64 with the weights given."""
    random = torch.Generator().manual_seed(5)
    found = {}
    for name, shape in INPUTS.items():
        x, layer = torch.randn(shape, generator=random), getattr(model, name)
        if weights is None:
            found[name] = oracle.wide(layer(x))
        else:
            exact = getattr(Model(), name).double()
            exact.load_state_dict({"weight": torch.from_numpy(weights[name]), "bias": layer.bias})
            found[name] = oracle.wide(exact(x.double()))
    return found


def merged(model: Model, tensors, options, strength: float = 1.0) -> dict[str, np.ndarray]:
    """Each layer's adapted weight in float64, from the file's tensors."""
    found = {}
    for name in INPUTS:
        weight = getattr(model, name).weight.detach()
        delta = oracle.update(tensors, f"lycoris_{name}").reshape(weight.shape)
        magnitude = tensors.get(f"lycoris_{name}.dora_scale")
        axis = 0 if options.get("wd_on_out", True) else 1
        found[name] = (
            oracle.wide(weight) + strength * delta
            if magnitude is None
            else oracle.dora(weight, delta, magnitude, axis, strength)
        )
    return found


CASES = {
    "flat": {},
    "Tucker": {"use_tucker": True},
    "rs_lora": {"rs_lora": True},
    "rs_lora, Tucker": {"rs_lora": True, "use_tucker": True},
    "use_scalar": {"use_scalar": True},
    "use_scalar, Tucker": {"use_scalar": True, "use_tucker": True},
    "alpha 0 means rank": {"alpha": 0, "conv_alpha": 0},
    "DoRA on outputs": {"weight_decompose": True, "wd_on_out": True},
    "DoRA on inputs": {"weight_decompose": True, "wd_on_out": False},
    "DoRA on outputs, Tucker": {"weight_decompose": True, "wd_on_out": True, "use_tucker": True},
    "DoRA on inputs, Tucker": {"weight_decompose": True, "wd_on_out": False, "use_tucker": True},
    "everything": {"weight_decompose": True, "use_tucker": True, "use_scalar": True, "rs_lora": True},
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_update_is_the_float64_update(tmp_path, options, dtype):
    _, network = train(**options)
    tensors = saved(network, tmp_path / "peer.safetensors", dtype)
    adapter = load_adapter(tmp_path / "peer.safetensors")
    assert adapter.dialect == "lycoris-standalone" and not adapter.extras and not adapter.notes
    assert sorted(adapter.layers) == oracle.modules(tensors) == sorted(f"lycoris_{name}" for name in INPUTS)
    for name, factors in adapter.layers.items():
        wanted = oracle.update(tensors, name)
        assert oracle.error(factors.delta(), wanted) <= 1e-6
        assert oracle.error(factors.delta(torch.float64), wanted) <= 1e-13
        assert factors.dtype == (dtype or torch.float32)
        assert factors.is_tucker == (bool(options.get("use_tucker")) and "conv" in name)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_our_weight_is_the_one_that_lycoris_forward_uses(tmp_path, options):
    model, network = train(**options)
    tensors = saved(network, tmp_path / "peer.safetensors")
    adapter = load_adapter(tmp_path / "peer.safetensors")
    wanted = merged(model, tensors, options)
    for name in INPUTS:
        factors, weight = adapter.layers[f"lycoris_{name}"], getattr(model, name).weight.detach()
        update = factors.delta().reshape(weight.shape)
        dora = factors.dora_scale
        ours = weight + update if dora is None else algebra.dora(weight, update, dora)
        assert oracle.error(ours, wanted[name]) <= 1e-6
    peer, exact = outputs(model), outputs(model, wanted)
    for name in INPUTS:
        assert oracle.error(peer[name], exact[name]) <= 2e-6


@pytest.mark.parametrize("strength", [0.5, -0.7])
def test_lycoris_forward_at_another_strength(tmp_path, strength):
    model, network = train(use_tucker=True)
    tensors = saved(network, tmp_path / "peer.safetensors")
    network.set_multiplier(strength)
    peer, exact = outputs(model), outputs(model, merged(model, tensors, {}, strength))
    for name in INPUTS:
        assert oracle.error(peer[name], exact[name]) <= 2e-6


def test_lycoris_dora_at_strength_zero_is_not_the_base_weight(tmp_path, capsys):
    """Where the peer's forward is no reference: it scales only the magnitude, so at strength 0 it uses W + ΔW."""
    options = {"weight_decompose": True}
    model, network = train(**options)
    tensors = saved(network, tmp_path / "peer.safetensors")
    network.set_multiplier(0.0)
    peer, base = outputs(model), outputs(model, merged(model, tensors, options, 0.0))
    plain = {key: t for key, t in tensors.items() if not key.endswith("dora_scale")}
    undone = outputs(model, merged(model, plain, {}))
    for name in INPUTS:
        off = oracle.error(peer[name], base[name])
        with capsys.disabled():
            print(f"\n  lycoris-lora DoRA at strength 0, {name}: output off by {off:.0%} from the base model's")
        assert off > 0.01 and oracle.error(peer[name], undone[name]) <= 2e-6


def test_alpha_of_a_rank_stabilised_file_holds_the_root(tmp_path):
    _, network = train(rs_lora=True)
    saved(network, tmp_path / "peer.safetensors")
    layers = load_adapter(tmp_path / "peer.safetensors").layers
    assert layers["lycoris_linear"].scale == pytest.approx(2 / math.sqrt(3))
    assert layers["lycoris_conv2d"].scale == pytest.approx(1.5 / math.sqrt(2))


@pytest.mark.parametrize("name", INPUTS)
def test_lycoris_merge_is_wrong_and_ours_is_not(tmp_path, name, capsys):
    """DESIGN §11.5: get_diff_weight multiplies by alpha/r twice and leaves the scalar out."""
    model, network = train(use_scalar=True)
    tensors = saved(network, tmp_path / "peer.safetensors")
    wanted = oracle.update(tensors, f"lycoris_{name}")
    ours = load_adapter(tmp_path / "peer.safetensors").layers[f"lycoris_{name}"].delta()
    wrapper = getattr(network, f"lycoris_{name}")
    peer, _ = wrapper.get_diff_weight(shape=getattr(model, name).weight.shape)
    off = oracle.error(peer, wanted)
    with capsys.disabled():
        print(f"\n  lycoris-lora get_diff_weight, {name}: off by {off:.0%}; ours by {oracle.error(ours, wanted):.0e}")
    assert oracle.error(ours, wanted) <= 1e-6 < off
    explained = wanted * wrapper.scale / wrapper.scalar.item()
    assert oracle.error(peer, explained) <= 1e-6


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_lycoris_loads_what_we_save(tmp_path, options):
    """Its forward gives the same from our file as from its own."""
    model, network = train(**options)
    saved(network, tmp_path / "peer.safetensors")
    wanted = outputs(model)
    save_adapter(load_adapter(tmp_path / "peer.safetensors"), tmp_path / "ours.safetensors")
    plain = {key: value for key, value in options.items() if key != "use_scalar"}  # it is folded into w1_a
    other, loaded = train(seed=1, **plain)
    other.load_state_dict(model.state_dict())
    assert loaded.load_weights(str(tmp_path / "ours.safetensors")) == {}
    found = outputs(other)
    for name in INPUTS:
        assert oracle.error(found[name], wanted[name]) <= 1e-6


def test_the_files_of_lycoris_come_back_bit_for_bit(tmp_path):
    _, network = train(use_tucker=True, weight_decompose=True)
    tensors = saved(network, tmp_path / "peer.safetensors", torch.float16)
    save_adapter(load_adapter(tmp_path / "peer.safetensors"), tmp_path / "ours.safetensors")
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == tensors.keys()
    assert all(ours[k].dtype == t.dtype and torch.equal(ours[k], t) for k, t in tensors.items())


def test_older_files_keep_the_scalar_apart(tmp_path):
    """Older versions saved `scalar` beside w1; the effect is the product."""
    _, network = train()
    tensors = saved(network, tmp_path / "peer.safetensors")
    for name in INPUTS:
        tensors[f"lycoris_{name}.scalar"] = torch.tensor(-0.3)
    save_file(tensors, tmp_path / "old.safetensors")
    for name, factors in load_adapter(tmp_path / "old.safetensors").layers.items():
        assert oracle.error(factors.delta(), oracle.update(tensors, name)) <= 1e-6


def test_describe_a_peers_file(tmp_path):
    _, network = train(use_tucker=True)
    network.save_weights(
        str(tmp_path / "peer.safetensors"), torch.bfloat16, {"ss_tag_frequency": json.dumps({"5_x": {"cat": 4}})}
    )
    text = describe(load_adapter(tmp_path / "peer.safetensors"))
    assert "lycoris-standalone" in text and "bfloat16 ×5" in text and "3 layers" in text and "cat" in text
