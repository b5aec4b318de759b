"""Every dialect that is read, the two that are written, and what is left on the disk when writing fails."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loha_core import Adapter, LoHaError, LoHaFactors, load_adapter, save_adapter
from loha_core.formats import DIALECTS

from . import oracle, samples

METADATA = {
    "ss_network_dim": "the trainer's own word",
    "ss_tag_frequency": '{"1_x": {"cat": 3}}',
    "modelspec.title": "Katze 猫",
}


def load(tmp_path, tensors, metadata=None, name="a.safetensors", **options) -> Adapter:
    return load_adapter(samples.write(tmp_path / name, tensors, metadata), **options)


def same_tensors(x, y) -> bool:
    return x.keys() == y.keys() and all(y[k].dtype == t.dtype and torch.equal(y[k], t) for k, t in x.items())


def same_factors(x: LoHaFactors, y: LoHaFactors) -> bool:
    return x.alpha == y.alpha and same_tensors(x.tensors(), y.tensors())


def same(x: Adapter, y: Adapter) -> bool:
    layers = x.layers.keys() == y.layers.keys() and all(same_factors(f, y.layers[n]) for n, f in x.layers.items())
    return layers and same_tensors(x.extras, y.extras)


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# Reading


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".SafeTensors"])
@pytest.mark.parametrize(("dialect", "tensors", "others"), samples.DIALECTS.values(), ids=samples.DIALECTS)
def test_every_dialect(tmp_path, dialect, tensors, others, suffix):
    adapter = load(tmp_path, tensors, METADATA, name=f"a{suffix}")
    assert adapter.dialect == dialect and dialect in DIALECTS
    assert adapter.metadata == METADATA and adapter.source.endswith(f"a{suffix}")
    assert bool(adapter.notes) == any(f"{name}.alpha" not in tensors for name in adapter.layers)
    assert sorted(adapter.layers) == oracle.modules(tensors)
    for name, factors in adapter.layers.items():
        assert oracle.error(factors.delta(), oracle.update(tensors, name)) <= 1e-6
        magnitude = tensors.get(f"{name}.dora_scale")
        assert (factors.dora_scale is None) == (magnitude is None)
        assert magnitude is None or torch.equal(factors.dora_scale, magnitude)
    loha = {key for key in tensors if key.rpartition(".")[0] in adapter.layers}
    assert adapter.extras.keys() == tensors.keys() - loha and len(adapter.extras) == others
    assert all(torch.equal(adapter.extras[key], tensors[key]) for key in adapter.extras)


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 3, 1)], ids=str)
def test_convolutions_that_kept_their_shape(tmp_path, kernel):
    tensors = samples.module("lora_transformer_conv_in", (6, 4, *kernel))
    shaped = samples._four_dimensional(tensors, kernel)
    assert shaped["lora_transformer_conv_in.hada_w1_b"].dim() == 2 + len(kernel)
    flat, kept = (load(tmp_path, t, name=f"{i}.safetensors") for i, t in enumerate((tensors, shaped)))
    assert same(flat, kept) and kept.dialect == "onetrainer"


def test_legacy_tucker_takes_t1_for_both_halves(tmp_path):
    name = "lora_unet_conv_in"
    tensors = samples.module(name, (6, 4, 3, 3), tucker=True) | samples.module("lora_unet_proj", (6, 4))
    old = tensors | {f"{name}.hada_t2": tensors[f"{name}.hada_t1"]}
    legacy, today = (load(tmp_path, tensors, legacy_tucker=choice).layers for choice in (True, False))
    assert oracle.error(legacy[name].delta(), oracle.update(old, name)) <= 1e-6
    assert oracle.error(today[name].delta(), oracle.update(tensors, name)) <= 1e-6
    assert same_factors(legacy["lora_unet_proj"], today["lora_unet_proj"])


@pytest.mark.parametrize("scalar", [0.5, -2.0, 1e-3, 0.0])
@pytest.mark.parametrize("shape", [torch.Size(()), torch.Size((1,))], ids=str)
def test_scalar_multiplies_the_update(tmp_path, scalar, shape):
    tensors = samples.module("lora_unet_a", (6, 4)) | {"lora_unet_a.scalar": torch.full(shape, scalar)}
    delta = load(tmp_path, tensors).layers["lora_unet_a"].delta()
    if scalar == 0:
        assert delta.abs().max() == 0
    else:
        assert oracle.error(delta, oracle.update(tensors, "lora_unet_a")) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.float8_e4m3fn], ids=str)
def test_alpha_in_any_dtype(tmp_path, dtype):
    tensors = samples.module("lora_unet_a", (6, 4)) | {"lora_unet_a.alpha": torch.tensor([3]).to(dtype)}
    assert load(tmp_path, tensors).layers["lora_unet_a"].alpha == 3


def test_alpha_zero_is_noted(tmp_path):
    adapter = load(tmp_path, samples.module("lora_unet_a", (6, 4), alpha=0.0))
    assert len(adapter.notes) == 1 and "lora_unet_a" in adapter.notes[0] and "alpha is 0" in adapter.notes[0]


def test_a_file_of_other_adapters_alone_is_kept(tmp_path):
    tensors = {"lora_unet_a.lora_up.weight": torch.ones(4, 2), "lora_unet_a.lora_down.weight": torch.ones(2, 4)}
    adapter = load(tmp_path, tensors)
    assert not adapter.layers and same_tensors(adapter.extras, tensors)


def test_factors_without_a_module_are_refused(tmp_path):
    with pytest.raises(LoHaError, match="hada_w1_a"):
        load(tmp_path, samples.parts((6, 4)))


def test_peft_extras_tell_their_networks_apart(tmp_path):
    extra = {"base_model.model.head.weight": torch.ones(2)}
    samples.write_peft(tmp_path / "unet", samples.WRAPPED | extra)
    samples.write_peft(tmp_path / "text_encoder", samples.WRAPPED_TEXT | extra)
    adapter = load_adapter(tmp_path)
    assert len(adapter.layers) == 4 and len(adapter.extras) == 2
    assert {key.split(".")[0] for key in adapter.extras} == {"unet", "text_encoder"}


def test_notes_of_every_peft_folder_are_kept(tmp_path):
    silent = samples.WRAPPED | {"base_model.model.down_blocks.0.attentions.0.proj_in.alpha": torch.tensor(0.0)}
    samples.write_peft(tmp_path / "unet", silent)
    samples.write_peft(tmp_path / "text_encoder", samples.WRAPPED_TEXT)
    (note,) = load_adapter(tmp_path).notes
    assert "proj_in" in note and "alpha is 0" in note


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path):
    path = samples.write(tmp_path / "a.safetensors", samples.module("lora_unet_a", (6, 4)))
    adapter = load_adapter(path)
    before = adapter.layers["lora_unet_a"].delta()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(adapter.layers["lora_unet_a"].delta(), before)


# Round trips


@pytest.mark.parametrize(("dialect", "tensors", "others"), samples.DIALECTS.values(), ids=samples.DIALECTS)
def test_lycoris_round_trip(tmp_path, dialect, tensors, others):
    first = load(tmp_path, tensors, METADATA)
    save_adapter(first, tmp_path / "b.safetensors")
    second = load_adapter(tmp_path / "b.safetensors")
    assert second.metadata.items() >= METADATA.items()
    assert same_tensors(first.extras, second.extras) and len(first.layers) == len(second.layers)
    assert all(same_factors(x, y) for x, y in zip(first.layers.values(), second.layers.values(), strict=True))
    save_adapter(second, tmp_path / "c.safetensors")
    assert same(second, load_adapter(tmp_path / "c.safetensors"))
    assert same_tensors(load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "c.safetensors"))
    assert metadata_of(tmp_path / "b.safetensors") == metadata_of(tmp_path / "c.safetensors")


KEPT = [case for case, (dialect, *_) in samples.DIALECTS.items() if dialect == "lycoris"]


@pytest.mark.parametrize("case", sorted(set(KEPT) - {"kohya without alpha", "kohya with scalar"}))
def test_a_kohya_file_comes_back_as_it_was(tmp_path, case):
    tensors = samples.DIALECTS[case][1]
    save_adapter(load(tmp_path, tensors, METADATA), tmp_path / "b.safetensors")
    assert same_tensors(load_file(tmp_path / "b.safetensors"), tensors)


def test_what_kohyas_readers_look_for(tmp_path):
    adapter = load(tmp_path, samples.DIALECTS["diffusers UNet"][1])
    save_adapter(adapter, tmp_path / "b.safetensors", names="kohya")
    found = metadata_of(tmp_path / "b.safetensors")
    assert (found["ss_network_module"], found["ss_network_dim"], found["ss_network_alpha"]) == (
        "lycoris.kohya",
        "2",
        "1",
    )
    assert json.loads(found["ss_network_args"]) == {"algo": "loha", "use_tucker": False}
    assert {key.split("_down")[0].split("_text")[0] for key in load_file(tmp_path / "b.safetensors")} == {
        "lora_unet",
        "lora_te",
    }


def test_hashes_of_other_tensors_are_dropped(tmp_path):
    hashes = {"sshs_model_hash": "1", "sshs_legacy_hash": "2"}
    adapter = load(tmp_path, samples.module("lora_unet_a", (6, 4)), hashes)
    save_adapter(adapter, tmp_path / "b.safetensors", dtype=torch.float16)
    save_adapter(adapter, tmp_path / "c.safetensors")
    assert not metadata_of(tmp_path / "b.safetensors").keys() & hashes.keys()
    assert metadata_of(tmp_path / "c.safetensors").items() >= hashes.items()


PEFT_ABLE = [
    case
    for case, (_, tensors, others) in samples.DIALECTS.items()
    if not others and not any("dora" in key for key in tensors) and case != "kohya Tucker 3-D"
]


@pytest.mark.parametrize("case", PEFT_ABLE)
def test_peft_round_trip(tmp_path, case):
    first = load(tmp_path, samples.DIALECTS[case][1], METADATA)
    save_adapter(first, tmp_path / "b", format="peft")
    second = load_adapter(tmp_path / "b")
    assert second.dialect == "peft" and len(second.layers) == len(first.layers) and not second.notes
    save_adapter(second, tmp_path / "c", format="peft")
    assert same(second, load_adapter(tmp_path / "c"))
    assert second.metadata.items() >= METADATA.items()


@pytest.mark.parametrize("case", [case for case in PEFT_ABLE if case in KEPT])
def test_lycoris_to_peft_to_lycoris_is_the_same(tmp_path, case):
    first = load(tmp_path, samples.DIALECTS[case][1], METADATA)
    save_adapter(first, tmp_path / "b", format="peft")
    save_adapter(load_adapter(tmp_path / "b"), tmp_path / "c.safetensors")
    last = load_adapter(tmp_path / "c.safetensors")
    assert same(first, last) and last.metadata.items() >= METADATA.items()


def test_a_convolution_of_width_one_survives_peft(tmp_path):
    """PEFT writes Conv1d's kernel as (k, 1), the shape of a Conv2d of that size."""
    for seed, kernel in enumerate([(3,), (3, 1), (1, 3)]):
        adapter = load(tmp_path, samples.module("lora_unet_conv_in", (6, 4, *kernel), tucker=True, seed=seed))
        save_adapter(adapter, tmp_path / str(seed), format="peft")
        (again,) = load_adapter(tmp_path / str(seed)).layers.values()
        (first,) = adapter.layers.values()
        assert torch.equal(again.delta().flatten(), first.delta().flatten())


@pytest.mark.parametrize("format", ["lycoris", "peft"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_dtype_casts_every_tensor_and_keeps_alpha(tmp_path, dtype, format):
    adapter = load(tmp_path, samples.module("lora_unet_a", (6, 4), alpha=0.3))
    path = tmp_path / ("b.safetensors" if format == "lycoris" else "b")
    save_adapter(adapter, path, format=format, dtype=dtype)
    (again,), (first,) = load_adapter(path).layers.values(), adapter.layers.values()
    assert {t.dtype for t in again.tensors().values()} == {dtype} and again.alpha == first.alpha
    assert all(torch.equal(t, first.tensors()[name].to(dtype)) for name, t in again.tensors().items())


@pytest.mark.parametrize("alpha", [0.3, 1e6, 1e-9, 1e300, -0.0, 7.25, 1 / 3])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_is_saved_exactly(tmp_path, alpha, stored):
    adapter = Adapter({"lora_unet_a": samples.factors((6, 4), dtype=stored)})
    adapter.layers["lora_unet_a"] = replace(adapter.layers["lora_unet_a"], alpha=alpha)
    save_adapter(adapter, tmp_path / "b.safetensors")
    assert load_adapter(tmp_path / "b.safetensors").layers["lora_unet_a"].alpha == alpha


def test_saving_does_not_change_the_adapter(tmp_path):
    adapter = load(tmp_path, samples.DIALECTS["kohya with LoRA, LoKr, norms"][1], METADATA)
    copy = load_adapter(tmp_path / "a.safetensors")
    save_adapter(adapter, tmp_path / "b.safetensors", dtype=torch.float16)
    assert same(adapter, copy) and adapter.metadata == copy.metadata


def test_tensors_that_share_memory_or_need_a_gradient_are_saved(tmp_path):
    a, b = torch.randn(6, 2, requires_grad=True), torch.randn(4, 2).T
    save_adapter(Adapter({"lora_unet_a": LoHaFactors(a, b, a, b, 2.0)}), tmp_path / "b.safetensors")
    again = load_adapter(tmp_path / "b.safetensors").layers["lora_unet_a"]
    assert torch.equal(again.delta(), ((a @ b) ** 2).detach())


# What cannot be saved


def one(**changes) -> Adapter:
    return Adapter({"lora_unet_a": replace(samples.factors((6, 4)), **changes)})


big = torch.full((6, 2), 1e5)
REFUSED = {
    "fp16 overflow": (one(w1_a=big), {"dtype": torch.float16}, "lora_unet_a.hada_w1_a: 12 of 12 .* 65504"),
    "fp8 overflow": (one(w2_a=big), {"dtype": torch.float8_e4m3fn}, "lora_unet_a.hada_w2_a"),
    "NaN": (one(w1_b=torch.full((2, 4), float("nan"))), {}, "lora_unet_a.hada_w1_b: 8 of 8"),
    "infinity in an extra": (replace(one(), extras={"x.diff": torch.tensor(float("inf"))}), {}, "x.diff: 1 of 1"),
    "an integer dtype": (one(), {"dtype": torch.int32}, "torch.int32"),
    "an unknown format": (one(), {"format": "kohya"}, "'kohya'"),
    "two names that become one": (
        Adapter({"unet.a": samples.factors((6, 4)), "lora_unet_a": samples.factors((6, 4), seed=1)}),
        {"names": "kohya"},
        "lora_unet_a",
    ),
    "an unknown spelling": (one(), {"names": "x"}, "no spelling 'x'"),
}


@pytest.mark.parametrize(("adapter", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, adapter, options, message):
    path = tmp_path / "b.safetensors"
    save_adapter(one(), path)
    before = path.read_bytes()
    with pytest.raises(LoHaError, match=message):
        save_adapter(adapter, path, **options)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["b.safetensors"]


PEFT_REFUSED = {
    "DoRA": (one(dora_scale=torch.ones(6, 1)), {}, "DoRA"),
    "an extra": (replace(one(), extras={"x.diff": torch.ones(1)}), {}, "x.diff"),
    "fp16 overflow": (one(w1_a=big), {"dtype": torch.float16}, "hada_w1_a"),
    "an integer dtype": (one(), {"dtype": torch.int32}, "torch.int32"),
    "two names that become one": (REFUSED["two names that become one"][0], {}, "unet.a"),
    "names that PEFT does not have": (one(), {"names": "native"}, "'native'"),
    "a network that is not named beside one that is": (
        Adapter({"lycoris_a": samples.factors((6, 4)), "lora_te_b": samples.factors((6, 4))}),
        {},
        "lycoris_a",
    ),
    "a kernel of three axes": (
        Adapter({"lora_unet_c": samples.factors((6, 4, 2, 2, 2), tucker=True)}),
        {},
        "lora_unet_c",
    ),
}


@pytest.mark.parametrize(("adapter", "options", "message"), PEFT_REFUSED.values(), ids=PEFT_REFUSED)
def test_what_peft_cannot_hold_leaves_the_old_folder(tmp_path, adapter, options, message):
    save_adapter(one(), tmp_path / "b", format="peft")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(LoHaError, match=message):
        save_adapter(adapter, tmp_path / "b", format="peft", **options)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} and before


@contextmanager
def files_of_at_most(size: int):
    """Any write beyond ``size`` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", ["lycoris", "peft"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, format):
    path = tmp_path / ("b.safetensors" if format == "lycoris" else "b")
    save_adapter(one(), path, format=format)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    large = Adapter({"lora_unet_a": samples.factors((512, 512), 16)})
    with files_of_at_most(20_000), pytest.raises(LoHaError, match=r"b.*cannot be written"):
        save_adapter(large, path, format=format)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("free_pages", [0, 1, 2])
def test_a_disk_that_fills_up_between_weights_and_configuration(small_disk, free_pages):
    """They belong together: new tensors beside old alphas are another adapter."""
    target = small_disk / "adapter"
    save_adapter(one(), target, format="peft")
    before = {str(file): file.read_bytes() for file in target.rglob("*.*")}
    status = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes((status.f_bfree - free_pages) * status.f_bsize))
    new = one(alpha=7.0)
    if free_pages < 2:
        with pytest.raises(LoHaError, match="No space left"):
            save_adapter(new, target, format="peft")
        assert {str(file): file.read_bytes() for file in target.rglob("*.*")} == before
    else:
        save_adapter(new, target, format="peft")
        assert {f.alpha for f in load_adapter(target).layers.values()} == {7.0}
        assert sorted(str(file) for file in target.rglob("*.*")) == sorted(before)


BAD_PATHS = {
    "a file as folder": ("lycoris", "file/b.safetensors"),
    "a file as PEFT folder": ("peft", "file"),
    "a folder as file": ("lycoris", "folder.safetensors"),
    "no suffix": ("lycoris", "b"),
    "a pickle's suffix": ("lycoris", "b.pt"),
    "a PEFT file": ("peft", "b.safetensors"),
    "a name too long": ("lycoris", f"{'b' * 300}.safetensors"),
    "a PEFT name too long": ("peft", "b" * 300),
    "a NUL": ("lycoris", "b\0.safetensors"),
    "a NUL in PEFT": ("peft", "b\0"),
}


@pytest.mark.parametrize(("format", "name"), BAD_PATHS.values(), ids=BAD_PATHS)
def test_a_path_that_cannot_be_written(tmp_path, format, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(LoHaError, match=name.split("/")[0].replace("\0", ".*")):
        save_adapter(one(), tmp_path / name, format=format)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.safetensors"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_saved_file_has_the_rights_of_a_new_file(tmp_path):
    save_adapter(one(), tmp_path / "b.safetensors")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", [*samples.DIALECTS, "PEFT"])
def test_a_header_alone_says_the_same(tmp_path, case, legacy):
    """``values=False``: names, shapes, dtypes, alphas and metadata without the values."""
    path = tmp_path / "a.safetensors"
    if case == "PEFT":
        path = tmp_path / "peft"
        samples.write_peft(path / "unet", samples.WRAPPED, alpha_pattern={"proj_in": 3})
        samples.write_peft(path / "text_encoder", samples.WRAPPED_TEXT)
    else:
        samples.write(path, samples.DIALECTS[case][1], {"a": "b"})
    full, header = (load_adapter(path, legacy_tucker=legacy, values=values) for values in (True, False))
    for field in ("dialect", "source", "metadata", "notes"):
        assert getattr(full, field) == getattr(header, field)
    assert list(full.layers) == list(header.layers) and list(full.extras) == list(header.extras)
    for name, layer in full.layers.items():
        other = header.layers[name]
        assert (other.alpha, other.shape) == (layer.alpha, layer.shape)
        assert (other.rank, other.dtype) == (layer.rank, layer.dtype)
        assert all(tensor.is_meta for tensor in other.raw if tensor is not None)
