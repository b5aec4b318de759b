"""Quantised checkpoints: baking and extraction against float64, in every format; the others are refused by name."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loha_core import Adapter, LoHaError, apply_to_checkpoint, extract, load_adapter, save_adapter
from loha_core.adapter import split_layers
from loha_core.cli import main
from loha_core.models.quantised import Storage
from loha_core.models.tensor_file import TensorFile
from loha_core.transform.lowrank import product

from . import oracle, packing, samples
from .packing import E4M3, FORMATS

pytestmark = pytest.mark.usefixtures("one_thread")

LEAD = "model.diffusion_model."
QKV, OUT = f"{LEAD}double_blocks.3.img_attn.qkv", f"{LEAD}single_blocks.2.linear2"
SHAPES = {QKV: (192, 64), OUT: (64, 160)}
PLAIN = f"{LEAD}img_in"
# Names in adapters: a part of the fused weight, and a whole one.
TO_K, TO_OUT = "transformer.transformer_blocks.3.attn.to_k", "lora_unet_single_blocks_2_linear2"


def weights(seed=0):
    """In float64, with rows of different sizes, as trained ones have."""
    random = np.random.default_rng(seed)
    return {k: random.normal(size=s) * np.exp(random.normal(size=(s[0], 1))) * 0.02 for k, s in SHAPES.items()}


def checkpoint(form, seed=0, of=None):
    """A file's tensors and metadata: two quantised layers among others."""
    tensors = {f"{PLAIN}.weight": torch.ones(64, 32).half(), f"{PLAIN}.bias": torch.ones(64), "step": torch.tensor(7)}
    metadata = {"format": "pt"}
    if form is None:
        return tensors | {f"{k}.weight": torch.from_numpy(w).half() for k, w in (of or weights(seed)).items()}, metadata
    for layer, weight in (of or weights(seed)).items():
        tensors |= {f"{layer}.{name}": tensor for name, tensor in packing.packed(form, weight).items()}
        tensors[f"{layer}.{'scale_input' if form.names == packing.OLD else 'input_scale'}"] = torch.tensor(0.25)
    if form.marker is not None:
        tensors[f"{LEAD}scaled_fp8"] = form.marker
    if form.metadata:
        metadata["_quantization_metadata"] = json.dumps({"layers": dict.fromkeys(SHAPES, form.declared)})
    return tensors, metadata


def dense(form, tensors):
    if form is None:
        return {layer: tensors[f"{layer}.weight"].double().numpy() for layer in SHAPES}
    names = ("weight", *form.names)
    return {layer: packing.meant(form, {n: tensors[f"{layer}.{n}"] for n in names}) for layer in SHAPES}


def adapter(seed=0):
    factors = {TO_K: samples.factors((64, 64), seed=seed, alpha=0.04), TO_OUT: samples.factors((64, 160), alpha=0.04)}
    return Adapter(factors, source="a.safetensors")


def with_update(before, whole, strength=1.0):
    """In float64."""
    after = {layer: weight.copy() for layer, weight in before.items()}
    after[QKV][64:128] += strength * oracle.wide(whole.layers[TO_K].delta(torch.float64))
    after[OUT] += strength * oracle.wide(whole.layers[TO_OUT].delta(torch.float64))
    return after


def rounding(form, wanted):
    """What the format itself loses of a weight."""
    return oracle.error(packing.meant(form, packing.packed(form, wanted)), wanted)


by_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


# --- baking ----------------------------------------------------------------------------------------------------------


def check_baked(form, before, out, whole, strength):
    after = load_file(out)
    wanted = with_update(dense(form, before), whole, strength)
    found = dense(form, after)
    for layer in SHAPES:
        lost, own = oracle.error(found[layer], wanted[layer]), rounding(form, wanted[layer])
        print(f"{form.kind}: {lost:.3g} of the weight lost; its rounding {own:.3g}")
        assert lost <= 1.001 * own + 1e-6
        # What was asked for was done: the rounding is small beside it.
        change = wanted[layer] - dense(form, before)[layer]
        assert oracle.error(found[layer] - dense(form, before)[layer], change) < 0.25
        ours, ideal = (t[form.names[0]] for t in (stripped(after, layer), packing.packed(form, wanted[layer])))
        assert torch.allclose(ours.float(), ideal.float(), rtol=1e-3)
    changed = {f"{layer}.{name}" for layer in SHAPES for name in ("weight", *form.names)}
    assert list(TensorFile(out)) == list(TensorFile(out.with_name("m.safetensors")))
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype and after[key].shape == tensor.shape
        same = torch.equal(after[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert same or key in changed


def stripped(tensors, layer):
    return {key.removeprefix(f"{layer}."): t for key, t in tensors.items() if key.startswith(f"{layer}.")}


@by_format
def test_bake(tmp_path, form):
    before, metadata = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors", metadata)
    [dry] = apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 0.7, tmp_path / "o.safetensors", dry_run=True)
    assert not (tmp_path / "o.safetensors").exists()
    [report] = apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 0.7, tmp_path / "o.safetensors")
    check_baked(form, before, tmp_path / "o.safetensors", adapter(), 0.7)
    said = (form.declared or {"format": f"float8_{form.kind}".replace("e4m3", "e4m3fn")})["format"]
    assert report.notes == dry.notes and f"re-quantised in their own format: 2 × {said}" in report.text()
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert metadata.items() <= file.metadata().items()


@by_format
def test_bake_on_the_command_line(tmp_path, form, capsys):
    before, metadata = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors", metadata)
    save_adapter(adapter(), tmp_path / "a.safetensors")
    call = ["bake", *(str(tmp_path / f"{name}.safetensors") for name in "ma"), "--strengths", "0.7"]
    call += ["-o", str(tmp_path / "o.safetensors")]
    assert main([*call, "--dry-run"]) == 0 and "re-quantised in their own format: 2 ×" in capsys.readouterr().out
    assert main(call) == 0 and "re-quantised in their own format: 2 ×" in capsys.readouterr().out
    check_baked(form, before, tmp_path / "o.safetensors", adapter(), 0.7)


def test_a_stack_is_rounded_once(tmp_path):
    form = FORMATS["float8_e4m3fn"]
    before, _ = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors")
    apply_to_checkpoint(tmp_path / "m.safetensors", [adapter(), adapter(5)], [0.7, -0.4], tmp_path / "o.safetensors")
    wanted = with_update(with_update(dense(form, before), adapter(), 0.7), adapter(5), -0.4)
    found = dense(form, load_file(tmp_path / "o.safetensors"))
    assert all(oracle.error(found[k], wanted[k]) <= 1.001 * rounding(form, wanted[k]) + 1e-6 for k in SHAPES)


def test_dora_and_differences_act_on_what_is_meant(tmp_path):
    form = FORMATS["scaled fp8"]
    before, _ = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors")
    parts = samples.parts(SHAPES[OUT], 2, dora_axis=0, alpha=0.01)
    difference = torch.randn(SHAPES[QKV]) * 0.02
    tensors = {f"{TO_OUT}.{k}": t for k, t in parts.items()} | {f"{QKV.removeprefix('model.')}.diff": difference}
    whole = load_adapter(samples.write(tmp_path / "a.safetensors", tensors))
    apply_to_checkpoint(tmp_path / "m.safetensors", [whole], 0.7, tmp_path / "o.safetensors")
    meant = dense(form, before)
    change = oracle.update({f"m.{k}": t for k, t in parts.items()}, "m")
    wanted = {
        OUT: oracle.dora(torch.from_numpy(meant[OUT]), change, parts["dora_scale"], 0, 0.7),
        QKV: meant[QKV] + 0.7 * oracle.wide(difference),
    }
    found = dense(form, load_file(tmp_path / "o.safetensors"))
    assert all(oracle.error(found[k], wanted[k]) <= 1.001 * rounding(form, wanted[k]) + 1e-6 for k in SHAPES)


@by_format
def test_no_strength_leaves_every_byte(tmp_path, form):
    before, metadata = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors", metadata)
    [report] = apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 0.0, tmp_path / "o.safetensors")
    after = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(after[k].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))
               for k, t in before.items()) and not report.notes  # fmt: skip


@by_format
def test_a_weight_that_becomes_zero_and_one_that_is_tiny(tmp_path, form):
    """Scales that would be zero divide by nothing."""
    before, metadata = checkpoint(form, of={QKV: np.zeros(SHAPES[QKV]) + 1e-30, OUT: weights()[OUT] * 1e-7})
    save_file(before, tmp_path / "m.safetensors", metadata)
    shift = torch.from_numpy(-dense(form, before)[QKV]).float()
    factors = {TO_OUT: samples.factors(SHAPES[OUT], alpha=1e-9)}
    whole = Adapter(factors, extras={f"{QKV.removeprefix('model.')}.diff": shift}, source="a")
    apply_to_checkpoint(tmp_path / "m.safetensors", [whole], 1.0, tmp_path / "o.safetensors")
    found = dense(form, load_file(tmp_path / "o.safetensors"))
    assert np.all(found[QKV] == 0) and np.all(np.isfinite(found[OUT]))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8_tensorwise by rows", "mxfp8"])
def test_metadata_with_the_diffusion_models_own_names(tmp_path, name):
    """As ComfyUI 0.3.75 wrote them, in a checkpoint whose keys have a prefix."""
    form = FORMATS[name]
    before = {k: t for k, t in checkpoint(form)[0].items() if not k.endswith("comfy_quant")}
    layers = {layer.removeprefix(LEAD): form.declared for layer in SHAPES}
    save_file(before, tmp_path / "m.safetensors", {"_quantization_metadata": json.dumps({"layers": layers})})
    apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 0.7, tmp_path / "o.safetensors")
    check_baked(form, before, tmp_path / "o.safetensors", adapter(), 0.7)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '{"layers": 3}', '{"layers": {"x": 3}}'], ids=len)
def test_metadata_that_say_nothing_hide_no_scale(tmp_path, text):
    form = FORMATS["fp8 that nothing declares"]
    before, _ = checkpoint(form)
    save_file(before, tmp_path / "m.safetensors", {"_quantization_metadata": text})
    apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 0.7, tmp_path / "o.safetensors")
    check_baked(form, before, tmp_path / "o.safetensors", adapter(), 0.7)


def test_plain_fp8_stays_as_it_was(tmp_path):
    before = {f"{layer}.weight": torch.from_numpy(w).to(E4M3) for layer, w in weights().items()}
    save_file(before, tmp_path / "m.safetensors")
    [report] = apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 1.0, tmp_path / "o.safetensors")
    wanted = with_update({layer: before[f"{layer}.weight"].double().numpy() for layer in SHAPES}, adapter())
    after = load_file(tmp_path / "o.safetensors")
    for layer in SHAPES:
        ideal = packing.rounded(wanted[layer], E4M3).double().numpy()
        assert oracle.error(after[f"{layer}.weight"], ideal) < 1e-2
    assert not report.notes and after.keys() == before.keys()


# --- extraction ------------------------------------------------------------------------------------------------------

# (base, tuned, whether they are in memory): each format on each side, in a file and in memory.
MIXED = {
    **{(None, form): False for form in (None, *FORMATS)},
    **{(form, None): True for form in FORMATS},
    **{(form, "scaled fp8"): False for form in FORMATS},
    **{("scaled fp8", form): True for form in FORMATS},
    **{(form, form): n % 2 == 0 for n, form in enumerate(FORMATS)},
}


@pytest.mark.parametrize(
    ("one", "two", "memory"),
    [(*pair, memory) for pair, memory in MIXED.items()],
    ids=[f"{a} to {b}, {'in memory' if memory else 'files'}" for (a, b), memory in MIXED.items()],
)
def test_extract(tmp_path, one, two, memory):
    """The whole difference of what two models multiply by, whatever holds it."""
    forms = [FORMATS[name] if name else None for name in (one, two)]
    files = [checkpoint(forms[0]), checkpoint(forms[1], of=with_update(weights(), adapter()))]
    for name, (tensors, metadata) in zip("ab", files, strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata)
    models = [tensors for tensors, _ in files] if memory else [tmp_path / f"{name}.safetensors" for name in "ab"]
    made, report = extract(*models, rank=64, method="svd", kind="lora")
    layers, _ = split_layers(made)
    base, tuned = (dense(form, tensors) for form, (tensors, _) in zip(forms, files, strict=True))
    names = {"lora_unet_double_blocks_3_img_attn_qkv": QKV, TO_OUT: OUT}
    assert set(layers) == set(names)
    for name, layer in names.items():
        u, v = product(layers[name])
        lost = oracle.error(oracle.wide(u) @ oracle.wide(v), tuned[layer] - base[layer])
        assert lost < 1e-4, f"{name}: {lost}"
    assert len([note for note in report.notes if "quantised weights in" in note]) == len([f for f in forms if f])


@by_format
def test_extract_on_the_command_line(tmp_path, form, capsys):
    """The LoHa that was baked comes back, as far as the rounding of the checkpoint lets it."""
    tensors, metadata = checkpoint(form)
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 1.0, tmp_path / "o.safetensors")
    call = ["extract", *(str(tmp_path / f"{name}.safetensors") for name in "mo"), "--rank", "2"]
    assert main([*call, "--only", "linear2", "-o", str(tmp_path / "a.safetensors")]) == 0
    assert f"quantised weights in {tmp_path}" in capsys.readouterr().out
    found = load_adapter(tmp_path / "a.safetensors").layers[TO_OUT].delta()
    lost = oracle.error(found, oracle.wide(adapter().layers[TO_OUT].delta()))
    print(f"{form.kind}: {lost:.3g}")
    assert lost < 0.15


def test_equal_models_in_one_format_have_nothing_to_extract():
    tensors, _ = checkpoint(FORMATS["nvfp4"])
    with pytest.raises(LoHaError, match="no layer differs"):
        extract(tensors, dict(tensors), rank=2)


# --- what is refused -------------------------------------------------------------------------------------------------


def without(name, *suffixes):
    """A checkpoint in which one layer lacks a piece."""
    return {k: t for k, t in checkpoint(FORMATS[name])[0].items() if k not in [f"{OUT}.{s}" for s in suffixes]}


def with_pieces(name, **pieces):
    """A checkpoint in which one layer has other pieces, or more."""
    return checkpoint(FORMATS[name])[0] | {f"{OUT}.{s.replace('__', '.')}": t for s, t in pieces.items()}


def other(format_, **more):
    return torch.tensor(list(json.dumps({"format": format_} | more).encode()), dtype=torch.uint8)


def only(**pieces):
    """A layer of which only this is left, beside a plain one."""
    tensors = checkpoint(None)[0]
    tensors.pop(f"{OUT}.weight")
    return tensors | {f"{OUT}.{s.replace('__', '.')}": t for s, t in pieces.items()}


four_bits, byte = torch.zeros(5120, 1, dtype=torch.uint8), torch.zeros(64, 160, dtype=torch.uint8)
half, narrow = torch.ones(64, 160).half(), byte[:, :5].clone()
REFUSED = {
    "a scale is missing": (lambda: without("scaled fp8", "scale_weight"), "float8_e4m3fn, but has 0 scales"),
    "a declared scale is missing": (lambda: without("float8_e5m2", "weight_scale"), "float8_e5m2, but has 0 scales"),
    "an int8 scale is missing": (lambda: without("int8_tensorwise", "weight_scale"), "but has 0 scales"),
    "a scale of blocks is missing": (lambda: without("mxfp8", "weight_scale"), "mxfp8, but has 0 scales"),
    "the scale of all is missing": (lambda: without("nvfp4", "weight_scale_2"), "nvfp4, but .*weight_scale_2 is"),
    "int8 that nothing declares": (lambda: without("int8_tensorwise", "comfy_quant"), "is stored as I8"),
    "nvfp4 that nothing declares": (lambda: without("nvfp4", "comfy_quant"), "is stored as U8"),
    "mxfp8 that nothing declares": (lambda: without("mxfp8", "comfy_quant"), r"is \(128, 8\) of F8_E8M0"),
    "two scales": (lambda: with_pieces("scaled fp8", weight_scale=torch.ones(())), "but has 2 scales"),
    "a scale of another shape": (lambda: with_pieces("scaled fp8", scale_weight=torch.ones(1, 160)), r"is \(1, 160\)"),
    "a scale for 16-bit floats": (lambda: with_pieces("scaled fp8", weight=half), "stored as F16"),
    "a scale of integers": (lambda: with_pieces("int8_tensorwise", weight_scale=torch.tensor(1)), "of I64"),
    "blocks' scales in no tiles": (lambda: with_pieces("mxfp8", weight_scale=narrow), r"expected \(128, 8\)"),
    "another dtype than declared": (lambda: with_pieces("float8_e4m3fn", comfy_quant=other("float8_e5m2")), "F8_E5M2"),
    "an unknown format": (lambda: with_pieces("nvfp4", comfy_quant=other("int3_new")), "quantised as 'int3_new'"),
    "ConvRot in 4 bits": (lambda: with_pieces("int8_tensorwise", comfy_quant=other("convrot_w4a4")), "'convrot_w4a4'"),
    "no format": (lambda: with_pieces("nvfp4", comfy_quant=torch.tensor([7, 8], dtype=torch.uint8)), "as None"),
    "no power of four": (
        lambda: with_pieces("int8_tensorwise", comfy_quant=other("int8_tensorwise", convrot=True, convrot_groupsize=8)),
        "turned by 8 columns",
    ),
    "groups that do not divide": (
        lambda: with_pieces("int8_tensorwise", comfy_quant=other("int8_tensorwise", convrot=True)),
        "turned by 256 columns",
    ),
    "smoothed inputs": (lambda: with_pieces("nvfp4", pre_quant_scale=torch.ones(160)), "pre_quant_scale"),
    "NF4": (
        lambda: only(weight=four_bits, weight__absmax=torch.ones(99), weight__quant_state__bitsandbytes__nf4=byte),
        "bitsandbytes' 4 bits",
    ),
    "bitsandbytes' int8": (lambda: only(weight=byte.char(), SCB=torch.ones(64)), "bitsandbytes' int8"),
    "blocks of fp8": (lambda: only(weight=byte.view(E4M3), weight_scale_inv=torch.ones(1, 2)), "scales of square"),
    "GPTQ": (lambda: only(qweight=torch.zeros(20, 64, dtype=torch.int32), scales=torch.ones(1, 64)), "GPTQ, AWQ"),
    "integers": (lambda: only(weight=torch.zeros(64, 20, dtype=torch.int32)), "is stored as I32"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_before_anything_is_written(tmp_path, make, why, capsys):
    path, plain = tmp_path / "m.safetensors", tmp_path / "plain.safetensors"
    save_file(make(), path)
    save_file(checkpoint(None, seed=1)[0], plain)
    message = rf"(?s)m.safetensors: {OUT}.weight .*{why}.*Use an fp16, bf16 or fp8 checkpoint"
    for dry_run in (False, True):
        with pytest.raises(LoHaError, match=message):
            apply_to_checkpoint(path, [adapter()], 1.0, tmp_path / "o.safetensors", dry_run=dry_run)
    whole = Adapter({}, extras={f"{OUT.removeprefix('model.')}.diff": torch.ones(64, 160)}, source="a")
    with pytest.raises(LoHaError, match=message):
        apply_to_checkpoint(path, [whole], 1.0, tmp_path / "o.safetensors")
    for models in ((path, plain), (plain, path)):
        with pytest.raises(LoHaError, match=message):
            extract(*models, rank=2)
        made, _ = extract(*models, rank=2, only="qkv", method="svd")  # what is asked for can be read
        assert len(made.layers) == 1
    with pytest.raises(LoHaError, match=rf"the model: {OUT}.weight .*{why}"):
        extract(make(), checkpoint(None)[0], rank=2)
    assert main(["extract", str(path), str(plain), "--rank", "2", "-o", str(tmp_path / "a.safetensors")]) == 1
    assert f"{OUT}.weight" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "plain.safetensors"]
    [report] = apply_to_checkpoint(path, [Adapter({TO_K: adapter().layers[TO_K]})], 1.0, tmp_path / "o.safetensors")
    assert report.matched["checkpoint"] == [TO_K], "a layer that is not touched is no reason to refuse"


@pytest.mark.parametrize("part", ["to_q", "to_k", "to_v"])
def test_any_part_of_a_fused_weight_is_refused(tmp_path, part):
    tensors = checkpoint(None)[0]
    tensors |= {f"{QKV}.weight": four_bits, f"{QKV}.weight.absmax": torch.ones(9)}
    save_file(tensors, tmp_path / "m.safetensors")
    whole = Adapter({f"transformer.transformer_blocks.3.attn.{part}": samples.factors((64, 64))})
    with pytest.raises(LoHaError, match=f"{QKV}.weight is packed by bitsandbytes"):
        apply_to_checkpoint(tmp_path / "m.safetensors", [whole], 1.0, tmp_path / "o.safetensors")


def test_a_scale_that_is_no_number(tmp_path):
    save_file(with_pieces("scaled fp8", scale_weight=torch.tensor(float("nan"))), tmp_path / "m.safetensors")
    with pytest.raises(LoHaError, match=f"{OUT}.weight: .* NaN"):
        apply_to_checkpoint(tmp_path / "m.safetensors", [adapter()], 1.0, tmp_path / "o.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- comfy-kitchen ---------------------------------------------------------------------------------------------------

# sha256 of what comfy-kitchen 0.2.31's layouts make of `reference()`, on a CPU: the weight's bytes, then the scale's.
KITCHEN = {
    "float8_e4m3fn": "c43ce0b7c9460f7325a56f49f53cea12af149b92217a340598d849ee6d97f9e6",
    "float8_e5m2": "dba1c25d7cd794e02c9e3e4b8770acc25698cdce2d82ba3363bdec51be16fd77",
    "int8_tensorwise": "b01f449002c5be3583dedd65b4139cb7db82d86ffdfb60d0b5769faee35f0ff6",
    "int8_tensorwise by rows": "e4716b0d36d25b3bf4a47a76e98877ebfe4a4c802744fe7b8fc4a745c8b9547a",
    "int8 with convrot": "ebd1a338c32387a655ae01d196d808930f99640230c427812a3bb235b847269e",
    "nvfp4": "53f35f6426fb0f932abcab91a6eb5f7fa48cdbf26482ee197aa313fa10f46d05",
    "mxfp8": "4c15388c188d10c375838e0f0b136214cce2cbbeb2857a4249295b1b1373db54",
}


def reference():
    """Numbers that every machine makes alike: (160, 96), with a large row, and blocks of zeros."""
    numbers = (torch.arange(160 * 96) * 7919 % 2003 - 1001).reshape(160, 96).float() / 8192
    numbers[3] *= 16
    numbers[5, :64] = 0
    return numbers


@pytest.mark.parametrize(("name", "digest"), KITCHEN.items(), ids=KITCHEN)
def test_byte_for_byte_what_comfy_kitchen_writes(name, digest):
    form = FORMATS[name]
    parts = [torch.zeros_like(t) for t in list(packing.packed(form, weights()[QKV][:160, :32].repeat(3, 1)).values())]
    parts = parts[: 1 + len(form.names)]
    storage = Storage(form.declared["format"], ("weight", *form.names), (160, 96), form.rotation)
    storage.store_(reference(), parts)
    assert sha256(b"".join(bytes(t.reshape(-1).view(torch.uint8).tolist()) for t in parts[:2])).hexdigest() == digest
    named = dict(zip(("weight", *form.names), parts, strict=True))
    assert oracle.error(storage.dense(parts), packing.meant(form, named)) < 1e-6
