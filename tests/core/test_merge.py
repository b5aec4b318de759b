"""Merging: against float64, against LyCORIS as a reader, against peft's merge_utils, and against a dense SVD."""

from __future__ import annotations

import json
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from loha_core import Adapter, Compression, LoHaError, LoHaFactors, Sparse, load_adapter, merge, save_adapter
from loha_core.blocks import BlockStrength
from loha_core.transform import compress
from loha_core.transform.fit import fit
from loha_core.transform.lowrank import product, range_of, truncate
from loha_core.transform.merge import METHODS, combination

from . import oracle, samples

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def lora(name, shape, rank=3, seed=0, alpha=2.0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    out, inner, *kernel = shape
    up = torch.randn(out, rank, *[1] * len(kernel), generator=random)
    down = torch.randn(rank, inner, *kernel, generator=random)
    parts = {"lora_up.weight": up.to(dtype), "lora_down.weight": down.to(dtype), "alpha": torch.tensor(alpha)}
    return {f"{name}.{key}": tensor for key, tensor in parts.items()}


def exact(tensors, name):
    """One module's update in float64, of either kind, flat."""
    if f"{name}.hada_w1_a" in tensors:
        return oracle.update(tensors, name).reshape(tensors_out(tensors, name), -1)
    up, down = (oracle.wide(tensors[f"{name}.lora_{side}.weight"]) for side in ("up", "down"))
    alpha = float(tensors[f"{name}.alpha"]) / down.shape[0]
    return alpha * up.reshape(len(up), -1) @ down.reshape(len(down), -1)


def tensors_out(tensors, name):
    a = tensors[f"{name}.hada_w1_a"]
    return a.shape[1] if f"{name}.hada_t1" in tensors else a.shape[0]


def adapter(tmp_path, tensors, name="a", metadata=None):
    return load_adapter(samples.write(tmp_path / f"{name}.safetensors", tensors, metadata))


def single(factors, name=NAME, source="x", **options):
    return Adapter({name: factors}, source=source, **options)


MIXES = {
    "LoHa and LoHa": (
        samples.module(NAME, (12, 9), 2, alpha=3.0),
        samples.module(NAME, (12, 9), 3, seed=1),
    ),
    "LoHa and LoRA": (samples.module(NAME, (12, 9)), lora(NAME, (12, 9))),
    "LoRA and LoRA": (lora(NAME, (12, 9)), lora(NAME, (12, 9), 2, seed=4)),
    "Tucker and flat": (
        samples.module(CONV, (6, 5, 3, 3), tucker=True),
        samples.module(CONV, (6, 5, 3, 3), 3, seed=1, alpha=0.5),
    ),
    "Tucker and LoRA": (samples.module(CONV, (6, 5, 3, 3), tucker=True), lora(CONV, (6, 5, 3, 3))),
    "half and single": (
        samples.module(NAME, (12, 9), dtype=torch.float16),
        samples.module(NAME, (12, 9), seed=1, dtype=torch.bfloat16, alpha=2.0),
    ),
    "double and LoRA": (samples.module(NAME, (12, 9), dtype=torch.float64), lora(NAME, (12, 9))),
    "ranks beyond the weight": (samples.module(NAME, (4, 5), 4), samples.module(NAME, (4, 5), 3, seed=1)),
    "missing layers": (
        samples.module(NAME, (12, 9)) | samples.module(CONV, (6, 5, 3, 3), seed=2, dtype=torch.float16),
        samples.module(NAME, (12, 9), seed=1) | lora("lora_unet_mid_block_attentions_0_proj_in", (7, 8)),
    ),
}


@pytest.mark.parametrize("files", MIXES.values(), ids=MIXES)
def test_exact_against_float64(files, tmp_path):
    weights = [0.7, -1.3]
    merged, report = merge([adapter(tmp_path, f, str(i)) for i, f in enumerate(files)], weights)
    save_adapter(merged, tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    names = {key.rpartition(".")[0].removesuffix(".lora_up").removesuffix(".lora_down") for f in files for key in f}
    assert report.error == 0 and names
    for name in names:
        wanted = sum(w * exact(f, name) for f, w in zip(files, weights, strict=True) if f"{name}.alpha" in f)
        assert oracle.error(exact(found, name), wanted) < 1e-6, name


@settings(max_examples=30)
@given(st.data())
def test_exact_against_float64_for_any_shapes(data):
    kernel = data.draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), *kernel)
    count = data.draw(st.integers(1, 4))
    stack, weights = [], []
    for seed in range(count):
        options = {"tucker": bool(kernel) and data.draw(st.booleans()), "alpha": data.draw(st.sampled_from([1.0, 3.0]))}
        stack.append(samples.factors(shape, data.draw(st.integers(1, 5)), seed=seed, **options))
        weights.append(data.draw(st.sampled_from([1.0, 0.5, -0.75])))
    merged, _ = merge([single(f) for f in stack], weights)
    wanted = sum(
        w * oracle.wide(f.delta(torch.float64)).reshape(shape[0], -1) for f, w in zip(stack, weights, strict=True)
    )
    scale = sum(abs(w) * f.norm() for f, w in zip(stack, weights, strict=True))
    assert np.linalg.norm(oracle.wide(merged.layers[NAME].delta()).reshape(shape[0], -1) - wanted) < 1e-5 * scale


def test_lycoris_reads_the_sum(tmp_path):
    """LyCORIS' own forward, from our file, against float64."""
    lycoris = pytest.importorskip("lycoris", reason="a peer to measure against: pip install .[peers]")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    proj, conv = "lycoris_proj", "lycoris_conv"
    files = [
        samples.module(proj, (12, 9), 2, alpha=3.0) | samples.module(conv, (6, 5, 3, 3), tucker=True),
        lora(proj, (12, 9)) | samples.module(conv, (6, 5, 3, 3), 3, seed=1, dtype=torch.float16),
        samples.module(proj, (12, 9), 3, seed=5, dtype=torch.bfloat16) | lora(conv, (6, 5, 3, 3), 2),
    ]
    weights = [0.7, -1.3, 0.4]
    merged, _ = merge([adapter(tmp_path, f, str(i)) for i, f in enumerate(files)], weights)
    save_adapter(merged, tmp_path / "merged.safetensors")
    model = nn.ModuleDict({"proj": nn.Linear(9, 12), "conv": nn.Conv2d(5, 6, 3)})
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "merged.safetensors"), model)
    network.apply_to()
    for name, x in {"proj": torch.randn(4, 9), "conv": torch.randn(2, 5, 6, 6)}.items():
        layer = model[name]
        wanted = sum(w * exact(f, f"lycoris_{name}") for f, w in zip(files, weights, strict=True))
        plain = (nn.Linear(9, 12) if name == "proj" else nn.Conv2d(5, 6, 3)).double()
        change = torch.from_numpy(wanted.reshape(layer.weight.shape))
        plain.load_state_dict({"weight": layer.weight.double() + change, "bias": layer.bias.double()})
        assert oracle.error(layer(x), oracle.wide(plain(x.double()))) < 1e-5


# --- truncation ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_svd_is_the_optimal_truncation(out, inner, rank, wanted, seed):
    stack = [samples.factors((out, inner), rank, seed=seed), samples.factors((out, inner), 2, seed=seed + 1)]
    merged, report = merge([single(f) for f in stack], [1.0, -0.5], Compression(rank=wanted))
    whole = sum(w * oracle.wide(f.delta(torch.float64)) for f, w in zip(stack, [1.0, -0.5], strict=True))
    sigma = np.linalg.svd(whole, compute_uv=False)
    best = np.linalg.norm(sigma[wanted:])
    found = np.linalg.norm(oracle.wide(merged.layers[NAME].delta()) - whole)
    size = np.linalg.norm(whole)
    assert found <= best * (1 + 1e-4) + 1e-6 * size
    assert report.error == pytest.approx(best / size, abs=1e-6)


@pytest.mark.parametrize("bound", [{"energy": 0.9}, {"max_error": 0.3}, {"max_error": 0.0}, {"energy": 1.0}], ids=str)
def test_the_least_rank_that_is_within_a_bound(bound):
    stack = [samples.factors((30, 40), 3, seed=seed) for seed in (0, 1)]
    merged, report = merge([single(f) for f in stack], 1.0, Compression(**bound))
    sigma = np.linalg.svd(sum(oracle.wide(f.delta()) for f in stack), compute_uv=False)
    allowed = bound.get("max_error", (1 - bound.get("energy", 0)) ** 0.5)
    lost = np.sqrt(np.cumsum((sigma**2)[::-1])[::-1] / (sigma**2).sum())
    least = int((lost > max(allowed, 1e-5)).sum())
    assert report.layers[0].rank == merged.layers[NAME].rank == least and report.error <= max(allowed, 1e-6)


def test_the_range_of_a_noisy_matrix_is_near_the_best():
    u, v = product(samples.factors((300, 200), 3))
    whole = u @ v
    whole += 0.1 * whole.std() * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    lower = truncate(*range_of(whole, 25), rank=9)
    best = np.linalg.norm(np.linalg.svd(oracle.wide(whole), compute_uv=False)[9:])
    assert np.linalg.norm(oracle.wide(whole) - oracle.wide(lower[0]) @ oracle.wide(lower[1])) <= best * (1 + 1e-4)


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8])
def test_a_fit_finds_the_loha_that_is_there(rank):
    factors = samples.factors((320, 340) if rank == 8 else (180, 260), rank, seed=rank)
    found = fit(*product(factors), rank)
    assert found.factors.rank == rank and found.error < 1e-5
    assert oracle.error(found.factors.delta(), oracle.wide(factors.delta(torch.float64))) < 1e-5


@settings(max_examples=10)
@given(st.integers(3, 30), st.integers(3, 30), st.integers(1, 4), st.integers(0, 99))
def test_a_fit_is_never_worse_than_the_svd_of_its_rank(out, inner, rank, seed):
    stack = [samples.factors((out, inner), 3, seed=seed), samples.factors((out, inner), 2, seed=seed + 1)]
    u, v = (torch.cat(sides, axis) for sides, axis in zip(zip(*map(product, stack), strict=True), (1, 0), strict=True))
    found = fit(u, v, rank, starts=1, iterations=10)
    whole = oracle.wide(u) @ oracle.wide(v)
    sigma = np.linalg.svd(whole, compute_uv=False)
    size = np.linalg.norm(sigma)
    real = np.linalg.norm(oracle.wide(found.factors.delta()) - whole) / size
    assert real <= np.linalg.norm(sigma[rank:]) / size + 1e-6
    assert found.error == pytest.approx(real, abs=1e-6)
    assert found.svd_error == pytest.approx(np.linalg.norm(sigma[rank:]) / size, abs=1e-7)
    assert found.lora_error == pytest.approx(np.linalg.norm(sigma[2 * rank :]) / size, abs=1e-7)


def test_the_report_says_whether_a_fit_beats_a_lora_of_its_size():
    """One LoHa with itself: half the exact rank of the sum holds it. Two unrelated ones: it does not."""
    a, b = samples.factors((100, 120), 4), samples.factors((100, 120), 4, seed=9)
    _, same = merge([single(a), single(a)], 0.5, Compression("fit", rank=4))
    assert same.error < 1e-5 < (same.lora_error or 0) and "LoHa is better, and wins 1 layers" in same.text()
    merged, other = merge([single(a), single(b)], 0.5, Compression("fit", rank=1))
    assert other.error >= (other.lora_error or 0) and "LoHa is not better, and wins 0" in other.text()
    assert merged.layers[NAME].rank == 1


def test_zero_can_be_fitted():
    found = fit(torch.zeros(6, 2), torch.zeros(2, 5), 3)
    assert found.error == 0 and found.factors.rank == 3 and not found.factors.delta().any()


# --- by elements -----------------------------------------------------------------------------------------------------

PEER = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties", "magnitude_prune": "magnitude_prune"}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("method", PEER)
def test_elements_as_peft_merges_them(method, sign, density):
    utils = pytest.importorskip("peft.utils.merge_utils", reason="the reference: pip install .[peers]")
    random = torch.Generator().manual_seed(3)
    updates = [torch.randn(17, 23, generator=random) for _ in range(3)]
    weights = [0.7, 1.2, 0.4]
    options = {"majority_sign_method": sign} if method.endswith("ties") else {}
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density of 1
        wanted = getattr(utils, PEER[method])(updates, torch.tensor(weights), density, **options)
    found = Sparse(method, density, sign).combine(updates, weights, torch.Generator().manual_seed(11))
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_elements_through_the_whole_merge():
    stack = [samples.factors((12, 9), 2, seed=seed) for seed in (0, 1)]
    sparse = Sparse("ties", 0.4)
    merged, report = merge([single(f) for f in stack], [1.0, 0.5], Compression(rank=9), combine=sparse)
    wanted = sparse.combine([f.delta() for f in stack], [1.0, 0.5], torch.Generator())
    assert report.error < 1e-6 and oracle.error(merged.layers[NAME].delta(), oracle.wide(wanted)) < 1e-5
    fitted, worse = merge([single(f) for f in stack], 1.0, Compression("fit", rank=2), combine=sparse)
    assert fitted.layers[NAME].rank == 2 and worse.lora_error is not None


def test_chance_depends_on_seed_and_name_alone():
    stack = [samples.factors((12, 9), seed=seed) for seed in (0, 1)]
    runs = [
        merge(
            [Adapter({n: f for n in order}, source="x") for f in stack],
            1.0,
            Compression(rank=9),
            combine=Sparse("dare", 0.5, seed=seed),
        )
        .adapter.layers[NAME]
        .delta()
        for order, seed in (((NAME, CONV), 0), ((CONV, NAME), 0), ((NAME, CONV), 1))
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_evenly(t):
    x, y = samples.factors((12, 9)), samples.factors((12, 9), 3, seed=1)
    merged, _ = merge([single(x), single(y)], [1 - t, t], Compression(max_error=0), combine="slerp")
    a, b, found = (oracle.wide(f.delta(torch.float64)).ravel() for f in (x, y, merged.layers[NAME]))

    def angle(p, q):
        return math.acos(np.clip(p @ q / np.linalg.norm(p) / np.linalg.norm(q), -1, 1))

    assert angle(a, found) == pytest.approx(t * angle(a, b), abs=1e-3)
    assert np.linalg.norm(found) == pytest.approx((1 - t) * np.linalg.norm(a) + t * np.linalg.norm(b), rel=1e-5)


def test_slerp_along_one_line_is_linear():
    x = samples.factors((12, 9))
    merged, _ = merge([single(x), single(x)], [0.25, 0.75], Compression(max_error=0), combine="slerp")
    assert oracle.error(merged.layers[NAME].delta(), oracle.wide(x.delta())) < 1e-5


# --- names, blocks, metadata, what else is in a file -----------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "unet.down_blocks.0.attentions.0.proj_in",
        "base_model.model.down_blocks.0.attentions.0.proj_in",
        "lora_unet_input_blocks_1_1_proj_in",
        "diffusion_model.input_blocks.1.1.proj_in",
        "lycoris_down_blocks_0_attentions_0_proj_in",
    ],
)
def test_one_module_in_two_spellings(other):
    x, y = samples.factors((6, 5)), samples.factors((6, 5), seed=1)
    for names in ((NAME, other), (other, NAME)):
        merged, _ = merge([single(x, names[0]), single(y, names[1])])
        assert list(merged.layers) == [names[0]]
        assert oracle.error(merged.layers[names[0]].delta(), oracle.wide(x.delta() + y.delta())) < 1e-6


def test_layers_of_the_second_are_spelled_like_the_first():
    both, only = samples.factors((6, 5)), samples.factors((7, 5))
    second = {"unet.down_blocks.0.attentions.0.proj_in": both, "unet.up_blocks.1.resnets.0.conv1": only}
    merged, _ = merge([single(both), Adapter(second, source="y")])
    assert list(merged.layers) == [NAME, "lora_unet_up_blocks_1_resnets_0_conv1"]
    ldm = single(both, "lora_unet_input_blocks_1_1_proj_in")
    assert list(merge([ldm, Adapter(second, source="y")])[0].layers)[1] == "lora_unet_output_blocks_3_0_in_layers_2"
    bare = single(both, "down_blocks.0.attentions.0.proj_in")
    assert list(merge([bare, Adapter(second, source="y")])[0].layers)[1] == "up_blocks.1.resnets.0.conv1"


def test_a_weight_that_a_file_names_twice_counts_once():
    x = samples.factors((6, 5))
    twice = Adapter({NAME: x, "unet.down_blocks.0.attentions.0.proj_in": x}, source="x")
    merged, _ = merge([twice, single(x)])
    assert oracle.error(merged.layers[NAME].delta(), 2 * oracle.wide(x.delta())) < 1e-6


def test_weights_by_block_and_by_pattern():
    f = samples.factors((6, 5))
    te = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    up = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    whole = Adapter({NAME: f, up: f, te: f}, source="x")
    blocks = BlockStrength.parse("SD1.5", "IN=0.5, OUT03=2, BASE=0", "attn2: 0.1")
    merged, _ = merge([whole], 1.0, blocks=blocks)
    factor = {n: float((g.delta() / f.delta()).median()) for n, g in merged.layers.items()}
    assert factor == {NAME: pytest.approx(0.5), up: pytest.approx(0.2)}
    other, _ = merge([whole, whole], [1.0, -1.0], blocks=[None, blocks])
    assert oracle.error(other.layers[NAME].delta(), 0.5 * oracle.wide(f.delta())) < 1e-6
    assert oracle.error(other.layers[te].delta(), oracle.wide(f.delta())) < 1e-6


def test_a_lone_layer_keeps_its_factors():
    f = samples.factors((6, 5, 3, 3), tucker=True, dtype=torch.float16)
    merged, _ = merge([single(f, CONV), single(f, CONV)], [0.5, 0.0])
    [kept] = merged.layers.values()
    assert kept.alpha == 0.5 * f.alpha and all(torch.equal(kept.tensors()[k], t) for k, t in f.tensors().items())


def test_sums_of_sums_do_not_square_their_rank():
    f = [samples.factors((60, 70), 2, seed=seed) for seed in range(3)]
    once, _ = merge([single(x) for x in f[:2]])
    twice, _ = merge([once, single(f[2])])
    assert (once.layers[NAME].rank, twice.layers[NAME].rank) == (8, 12)
    assert oracle.error(twice.layers[NAME].delta(), sum(oracle.wide(x.delta()) for x in f)) < 1e-5


def test_metadata_of_a_merge(tmp_path):
    old = {
        "ss_network_dim": "2", "ss_network_alpha": "1", "ss_network_args": "{}", "sshs_model_hash": "x",
        "ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "cat", "ss_tag_frequency": '{"a": {"x": 1}}',
    }  # fmt: skip
    new = old | {"modelspec.trigger_phrase": "dog", "ss_tag_frequency": '{"a": {"x": 2}, "b": {"y": 1}}'}
    files = [adapter(tmp_path, samples.module(NAME, (12, 9), seed=i), str(i), m) for i, m in enumerate((old, new))]
    merged, _ = merge(files, [0.5, 0.7], Compression(rank=3))
    save_adapter(merged, tmp_path / "m.safetensors")
    found = load_adapter(tmp_path / "m.safetensors").metadata
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "3" and json.loads(found["ss_network_args"])
    assert found["modelspec.trigger_phrase"] == "cat, dog" and found["ss_base_model_version"] == "sd_v1"
    assert json.loads(found["ss_tag_frequency"]) == {"a": {"x": 3}, "b": {"y": 1}} and "sshs_model_hash" not in found
    [entry] = json.loads(found["loha_history"])
    assert entry["sources"] == ["0.safetensors", "1.safetensors"]
    assert (entry["operation"], entry["method"], entry["weights"], entry["rank"]) == ("merge", "svd", [0.5, 0.7], 3)
    again, _ = merge([load_adapter(tmp_path / "m.safetensors")], 2.0)
    assert len(json.loads(again.metadata["loha_history"])) == 2


def test_differences_and_embeddings():
    f = samples.factors((6, 5))
    extras = [
        {"lora_unet_a.w_norm": torch.ones(4), "bundle_emb.cat.clip_l": torch.ones(2, 3)},
        {"lora_unet_a.w_norm": torch.ones(4), "bundle_emb.cat.clip_l": torch.zeros(2, 3)},
    ]
    merged, report = merge([single(f, extras=e, source=n) for e, n in zip(extras, "xy", strict=True)], [0.5, 2.0])
    assert torch.equal(merged.extras["lora_unet_a.w_norm"], torch.full((4,), 2.5))
    assert torch.equal(merged.extras["bundle_emb.cat.clip_l"], torch.ones(2, 3)) and len(report.notes) == 2


def test_as_lora():
    x, y = samples.factors((6, 5, 3, 3), tucker=True), samples.factors((6, 5, 3, 3), seed=1)
    merged, _ = merge([single(x, CONV), single(y, CONV)], 1.0, Compression(kind="lora", rank=4))
    assert not merged.layers and merged.extras[f"{CONV}.lora_down.weight"].shape == (4, 5, 3, 3)
    assert merged.extras[f"{CONV}.lora_up.weight"].shape == (6, 4, 1, 1)
    assert merged.metadata["ss_network_module"] == "networks.lora" and merged.metadata["ss_network_dim"] == "4"


def test_a_smaller_dtype_and_what_it_costs():
    stack = [samples.factors((30, 20), seed=seed) for seed in (0, 1)]
    merged, report = merge([single(f) for f in stack], 1.0, Compression("exact", dtype=torch.float16))
    real = oracle.error(merged.layers[NAME].delta(), sum(oracle.wide(f.delta()) for f in stack))
    assert merged.layers[NAME].dtype == torch.float16 and 1e-5 < report.error < 1e-3
    assert report.error == pytest.approx(real, rel=0.05)


def test_progress_is_told_and_may_stop_it():
    class Stopped(Exception):
        pass

    f, seen = samples.factors((6, 5)), []
    merge([Adapter({NAME: f, CONV: f})], progress=lambda *state: seen.append(state))
    assert seen == [(0, 2, NAME), (1, 2, CONV), (2, 2, "")]

    def stop(*state):
        raise Stopped

    with pytest.raises(Stopped):
        merge([single(f)], progress=stop)


# --- DoRA and bad input ----------------------------------------------------------------------------------------------


def test_dora_alone_at_weight_one_stays():
    f = samples.factors((6, 5), dora_axis=0)
    merged, _ = merge([single(f), Adapter({CONV: f, NAME: f}, source="y")], [1.0, 0.0])
    assert torch.equal(merged.layers[NAME].dora_scale, f.dora_scale) and merged.layers[NAME].alpha == f.alpha


def merged_by(
    adapters, weights, *, method="exact", factor="svd", density=0.5, majority_sign="total", blocks=None, **form
):
    """By a method's name, as the command line and the node do it."""
    combine = combination(method, density, majority_sign)
    compression = Compression(method if method in compress.METHODS else factor, **form)
    return merge(adapters, weights, compression, combine=combine, blocks=blocks)


plain, dora = samples.factors((6, 5)), samples.factors((6, 5), dora_axis=0)
big = LoHaFactors(*[torch.full((6, 1), 1e30), torch.full((1, 5), 1e30)] * 2, alpha=1)
lokr = {f"{CONV}.lokr_w1": torch.ones(2, 2), f"{CONV}.lokr_w2": torch.ones(3, 3)}
BAD = {
    "no adapters": ([], 1.0, {}, "at least one"),
    "too few weights": ([plain, plain], [1.0], {}, "2 adapters and 1 weights"),
    "NaN weight": ([plain], [math.nan], {}, "x0: its weight is nan"),
    "all weights 0": ([plain, plain], 0.0, {}, "all weights are 0"),
    "no such method": ([plain], 1.0, {"method": "mean"}, "no method 'mean'; there are exact, svd"),
    "no bound": ([plain], 1.0, {"method": "svd"}, "one of rank, energy"),
    "two bounds": ([plain], 1.0, {"method": "svd", "rank": 2, "energy": 0.5}, "one of rank, energy"),
    "rank 0": ([plain], 1.0, {"method": "svd", "rank": 0}, "rank is 0; expected a whole number from 1"),
    "negative rank": ([plain], 1.0, {"method": "fit", "rank": -1}, "rank is -1"),
    "rank of an exact sum": ([plain], 1.0, {"rank": 2}, "exact result has the rank that it has"),
    "energy 0": ([plain], 1.0, {"method": "svd", "energy": 0.0}, "energy is 0.0"),
    "error 1": ([plain], 1.0, {"method": "svd", "max_error": 1.0}, "max_error is 1.0"),
    "fit as LoRA": ([plain], 1.0, {"method": "fit", "rank": 2, "kind": "lora"}, "fit makes LoHa"),
    "density 0": ([plain], 1.0, {"method": "dare", "rank": 2, "density": 0.0}, "density is 0.0"),
    "a wrong sign": ([plain], 1.0, {"method": "ties", "rank": 2, "majority_sign": "x"}, "total, frequency"),
    "slerp of three": ([plain] * 3, 1.0, {"method": "slerp", "rank": 2}, "expected 2 adapters, found 3"),
    "slerp backwards": ([plain, plain], [1.0, -1.0], {"method": "slerp", "rank": 2}, "weights from 0"),
    "an integer dtype": ([plain], 1.0, {"dtype": torch.int8}, "floating point"),
    "other shapes": (
        [plain, samples.factors((6, 7))],
        1.0,
        {},
        r"x1: .*proj_in has shape \(6, 7\), but x0 has \(6, 5\)",
    ),
    "DoRA at half weight": ([dora], 0.5, {}, "x0: .*proj_in is DoRA, and weight 0.5"),
    "DoRA and another": ([plain, dora], 1.0, {}, "x1: .*proj_in is DoRA, and 2 adapters act on it"),
    "too large": ([big, big], 1.0, {}, "proj_in: the update is not finite"),
    "too large alone": ([big], 1.0, {}, "proj_in: the update is not finite"),
    "too large for half": (
        [samples.factors((6, 5), alpha=1.0)],
        1e12,
        {"method": "svd", "rank": 1, "dtype": torch.float16},
        "beyond 65504",
    ),
    "wrong blocks": ([plain], 1.0, {"blocks": [None, None]}, "1 adapters and 2 block settings"),
}


@pytest.mark.parametrize(("factors", "weights", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input(factors, weights, options, message):
    with pytest.raises(LoHaError, match=message):
        merged_by([single(f, source=f"x{i}") for i, f in enumerate(factors)], weights, **options)


def test_an_unknown_combination():
    with pytest.raises(LoHaError, match="combine is 'mean'; expected 'sum', 'slerp'"):
        merge([single(plain)], combine="mean")


def test_no_layer_in_common():
    with pytest.raises(LoHaError, match="y: has no layer in common with the others .*proj_in, …"):
        merge([single(plain, CONV, "x"), single(plain, CONV, "z"), single(plain, source="y")])


def test_other_kinds_stand_alone_or_are_refused():
    kept, _ = merge([single(plain, extras=lokr), single(plain)], [1.0, 0.5])
    assert torch.equal(kept.extras[f"{CONV}.lokr_w2"], torch.ones(3, 3))
    with pytest.raises(LoHaError, match="x: .*lokr_w1 is of a kind that cannot be scaled or summed"):
        merge([single(plain, extras=lokr)], 0.5)


def test_half_a_lora():
    with pytest.raises(LoHaError, match="x: .*conv1: lora_up.weight is missing"):
        merge([single(plain, extras={f"{CONV}.lora_down.weight": torch.ones(2, 2)})])


def test_inputs_stay_as_they_are():
    f = samples.factors((6, 5))
    before = {key: tensor.clone() for key, tensor in f.tensors().items()}
    source = single(f, metadata={"a": "b"}, extras={"lora_unet_a.w_norm": torch.ones(4)})
    for method in METHODS:
        bound = {} if method == "exact" else {"rank": 2}
        merged_by([source, source], [1.0, 0.5], method=method, **bound)
    assert all(torch.equal(f.tensors()[key], tensor) for key, tensor in before.items())
    assert source.metadata == {"a": "b"} and torch.equal(source.extras["lora_unet_a.w_norm"], torch.ones(4))
