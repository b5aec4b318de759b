"""Damaged and hostile files: a LoHaError that names the file and the key, and nothing else, ever."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from loha_core import LoHaError, describe, load_adapter, save_adapter

from . import samples

KEY = "lora_unet_a"
GOOD = samples.module(KEY, (6, 4))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def container(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def headers(**changes) -> dict:
    """Four factors (2, 2) over one body; ``changes`` replaces entries."""
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    found = {f"{KEY}.hada_{n}": entry(offsets=(16 * i, 16 * i + 16)) for i, n in enumerate(names)}
    return found | {f"{KEY}.hada_{n}": change for n, change in changes.items()}


BODY = struct.pack("<16f", *range(16))


def archive(protocol: int | None = None) -> bytes:
    """What torch.save writes (a zip), or a bare pickle."""
    buffer = io.BytesIO()
    if protocol is None:
        torch.save(GOOD, buffer)
    else:
        pickle.dump({key: t.tolist() for key, t in GOOD.items()}, buffer, protocol=protocol)
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "empty"),
    "one byte": (b"{", "not a safetensors"),
    "eight bytes": (bytes(8), "not a safetensors"),
    "half": (save(GOOD)[:100], "not a safetensors"),
    "last byte missing": (save(GOOD)[:-1], "truncated"),
    "a byte too many": (save(GOOD) + b"\0", "safetensors"),
    "a header of terabytes": (struct.pack("<Q", 2**42) + b'{"a":1}', "4398046511104"),
    "a header of 2⁶⁴": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "a tensor of terabytes": (container(headers(w1_a=entry(shape=(2**20, 2**20))), BODY), "safetensors"),
    "a tensor beyond 2⁶⁴": (container(headers(w1_a=entry(shape=(2**40, 2**40))), BODY), "safetensors"),
    "an axis of 2⁶³ beside one of 0": (
        container({"a.hada_w1_a": entry(shape=(2**63, 0), offsets=(0, 0))}),
        "a.safetensors",
    ),
    "an axis of 2⁶² beside one of 0": (
        container({"a.hada_w1_a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}),
        "a.safetensors",
    ),
    "offsets out of the file": (container(headers(w2_b=entry(offsets=(48, 2**40))), BODY), "safetensors"),
    "offsets backwards": (container(headers(w1_a=entry(offsets=(16, 0))), BODY), "safetensors"),
    "offsets negative": (container(headers(w1_a=entry(offsets=(-16, 0))), BODY), "safetensors"),
    "offsets that overlap": (container(headers(w1_b=entry(offsets=(0, 16))), BODY), "safetensors"),
    "a dtype that is none": (container(headers(w1_a=entry(dtype="F31")), BODY), "safetensors"),
    "a dtype that torch has no sums in": (container(headers(w1_a=entry(dtype="U16", shape=(2, 4))), BODY), "w1_a"),
    "integers": (container(headers(w1_a=entry(dtype="I32")), BODY), rf"{KEY}: w1_a has dtype torch.int32"),
    "a header that is a list": (container([1, 2], BODY), "safetensors"),
    "a header that is no JSON": (container(b"{" + b"x" * 40), "safetensors"),
    "a header that is no text": (container(b"{\xff\xfe" + b"x" * 40), "safetensors"),
    "a header nested 100,000 deep": (container(b'{"a":' * 100_000), "safetensors"),
    "metadata of numbers": (container(headers() | {"__metadata__": {"a": 1}}, BODY), "safetensors"),
    "no tensors": (container({}), "no tensors"),
    "torch.save": (archive(), "pickle"),
    "pickle, protocol 0": (archive(0), "not a safetensors"),
    "pickle, protocol 2": (archive(2), "pickle"),
    "pickle, protocol 4": (archive(4), "pickle"),
    "pickle, protocol 5": (archive(5), "pickle"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>" * 9, "web page"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "not a safetensors"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tmp_path, data, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoHaError, match=message) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value)


def without(*parts: str) -> dict[str, torch.Tensor]:
    return {key: t for key, t in GOOD.items() if key.rpartition(".")[2] not in parts}


def changed(**parts: torch.Tensor) -> dict[str, torch.Tensor]:
    return GOOD | {f"{KEY}.{name}": tensor for name, tensor in parts.items()}


nan, inf, ones = torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones
SPOILT = {
    "w1_a missing": (without("hada_w1_a"), "hada_w1_a missing"),
    "three missing": (without("hada_w1_a", "hada_w1_b", "hada_w2_b"), "hada_w1_a, hada_w1_b, hada_w2_b missing"),
    "t2 alone": (changed(hada_t2=ones(2, 2, 3)), "t1 and t2"),
    "t1 alone": (changed(hada_t1=ones(2, 2, 3)), "t1 and t2"),
    "a rank that differs": (changed(hada_w1_b=ones(3, 4)), r"w1_a \(6, 2\) and w1_b \(3, 4\)"),
    "halves that differ": (changed(hada_w1_b=ones(2, 5)), r"\(6, 5\) and \(6, 4\)"),
    "a factor that is a number": (changed(hada_w1_b=torch.tensor(1.0)), r"w1_b \(\)"),
    "a factor without elements": (changed(hada_w1_a=ones(0, 2), hada_w2_a=ones(0, 2)), r"\(0, 4\)"),
    "five axes": (changed(hada_w1_a=ones(6, 2, 2, 1, 1)), r"w1_a"),
    "NaN": (changed(hada_w1_a=nan.expand(6, 2).clone()), "hada_w1_a: 12 of 12"),
    "infinity": (changed(hada_w2_b=inf.expand(2, 4).half()), "hada_w2_b: 8 of 8"),
    "8-bit NaN": (changed(hada_w2_b=nan.expand(2, 4).to(torch.float8_e4m3fn)), "hada_w2_b: 8 of 8"),
    "an alpha that is NaN": (changed(alpha=nan), "alpha: 1 of 1"),
    "alpha of two": (changed(alpha=ones(2)), r"alpha has shape \(2,\)"),
    "alpha of none": (changed(alpha=ones(0)), r"alpha has shape \(0,\)"),
    "scalar of two": (changed(scalar=ones(2)), r"scalar has shape \(2,\)"),
    "alpha·scalar too large": (
        changed(alpha=torch.tensor(1e300).double(), scalar=torch.tensor(1e300).double()),
        "alpha",
    ),
    "dora_scale of neither axis": (changed(dora_scale=ones(5, 1)), r"dora_scale \(5, 1\)"),
    "NaN in a tensor of no LoHa": (changed(diff=nan), "diff: 1 of 1"),
    "a checkpoint": ({"model.weight": ones(3)}, "model.weight.*checkpoint"),
}


@pytest.mark.parametrize(("tensors", "message"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_layer(tmp_path, tensors, message):
    path = samples.write(tmp_path / "a.safetensors", {key: t.clone() for key, t in tensors.items()})
    with pytest.raises(LoHaError, match=message) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value)
    assert KEY in str(caught.value) or "model.weight" in tensors


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a", "a.safetensors.bak"])
def test_only_safetensors_are_opened(tmp_path, name):
    (tmp_path / name).write_bytes(save(GOOD))
    with pytest.raises(LoHaError, match=rf"{name}: only .safetensors"):
        load_adapter(tmp_path / name)


def test_a_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(LoHaError):
            load_adapter(tmp_path / name)
    samples.write_peft(tmp_path / "peft", samples.WRAPPED)
    (tmp_path / "peft" / WEIGHTS).unlink()
    (tmp_path / "peft" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(LoHaError, match=WEIGHTS):
        load_adapter(tmp_path / "peft")
    assert not (tmp_path / "ran").exists()


PATHS = {
    "nothing there": ("b.safetensors", "no such file"),
    "a folder": ("", "a folder without adapter_config.json"),
    "a folder with a file's name": ("folder.safetensors", "a folder"),
    "a dangling link": ("dangling.safetensors", "no such file"),
    "a link to itself": ("loop.safetensors", "no such file"),
    "a pipe": ("pipe.safetensors", "no such file"),
    "a NUL": ("a\0.safetensors", "no such file"),
    "a name too long": (f"{'a' * 300}.safetensors", "no such file"),
    "a file as folder": ("a.safetensors/b.safetensors", "no such file"),
}


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(("name", "message"), PATHS.values(), ids=PATHS)
def test_a_path_that_is_no_file(tmp_path, name, message, kind):
    samples.write(tmp_path / "a.safetensors", GOOD)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to("nowhere")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(LoHaError, match=message) as caught:
        load_adapter(kind(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


WORD = "down_blocks.0.attentions.0.proj_in"
CONFIGS = {
    "no JSON": ("{", "not readable as JSON"),
    "empty": ("", "not readable as JSON"),
    "no text": (b"\xff\xfe\x00", "not readable as JSON"),
    "huge": (" " * 10_000_001, "10000001 bytes"),
    "nested": ("[" * 200_000, "not readable as JSON"),
    "a list": ([1], "found list"),
    "a number": (1, "found int"),
    "null": (None, "found NoneType"),
    "another kind": ({"peft_type": "LORA"}, "peft_type is LORA"),
    "no kind at all": ({"peft_type": ["LOHA"]}, "peft_type"),
    "alpha a word": ({"alpha": "many"}, f"{WORD}.*no number"),
    "alpha a list": ({"alpha": [1]}, f"{WORD}.*no number"),
    "alpha null": ({"alpha": None}, f"{WORD}.*no number"),
    "alpha NaN": ({"alpha": float("nan")}, f"{WORD}.*alpha is nan"),
    "alpha infinite": ({"alpha": float("inf")}, f"{WORD}.*alpha is inf"),
    "alpha of 400 digits": ({"alpha": 10**400}, f"{WORD}.*no number"),
    "alpha_pattern a list": ({"alpha_pattern": ["proj_in"]}, "alpha_pattern is list"),
    "alpha_pattern of words": ({"alpha_pattern": {"proj_in": "x"}}, f"{WORD}.*no number"),
    "a pattern that is no pattern": ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    "a pattern that repeats nothing": ({"alpha_pattern": {"*": 1}}, "no regular expression"),
    "a pattern that repeats too often": ({"alpha_pattern": {f"a{{{10**12}}}": 1}}, "no regular expression"),
    "a pattern that backtracks forever": ({"alpha_pattern": {"(a+)+b": 1}}, "too long or repeats"),
    "a pattern that backtracks for years": ({"alpha_pattern": {".*a.*b.*c.*d.*e": 1}}, "too long or repeats"),
    "a pattern nested too deep": ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}}, "too long or repeats"),
}


@pytest.mark.parametrize("bare", [False, True], ids=["folder", "bare file"])
@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_broken_configuration(tmp_path, config, message, bare):
    samples.write_peft(tmp_path, samples.WRAPPED)
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (tmp_path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LoHaError, match=message) as caught:
        load_adapter(tmp_path / WEIGHTS if bare else tmp_path)
    assert CONFIG in str(caught.value) or WEIGHTS in str(caught.value)
    assert str(tmp_path) in str(caught.value)


# Fuzz

SEEDS = {
    "kohya": save(samples.module("lora_unet_a", (3, 4), dora_axis=0) | samples.module("lora_te_b", (3, 3)), {"a": "b"}),
    "Tucker": save(samples.module("lora_unet_c", (3, 2, 3, 3), tucker=True, dtype=torch.float16)),
    "OneTrainer": save(samples._four_dimensional(samples.module("lora_transformer_conv_in", (3, 2, 3, 3)))),
    "native": save(samples.module("diffusion_model.a", (3, 4)) | {"diffusion_model.a.diff_b": torch.ones(3)}),
    "diffusers": save(samples.module("unet.a", (3, 4)) | {"unet.a.scalar": torch.ones(())}),
    "tags": save(samples.module("lycoris_a", (3, 4)), {"ss_tag_frequency": '{"1_x": {"cat": 3}}'}),
}
PEFT_SEED = save(
    {f"base_model.model.a.{key}": t for key, t in samples.parts((3, 4, 3), tucker=True, alpha=None).items()}
)
PEFT_CONFIG = {"peft_type": "LOHA", "r": 2, "alpha": 4, "alpha_pattern": {"a": 3}, "rank_pattern": {}}

atoms = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-4, 4),
    st.sampled_from([2**31, 2**62, 2**63, 2**64, -1, 10**400, float("nan"), float("inf"), 1e308]),
    st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "I8", "U8", "U16", "BOOL", "C64"]),
    st.sampled_from(["", "LOHA", "(", "(a+)+", "a", "\0", "\ud800", "猫", "a." * 50]),
    st.text(max_size=8),
)
values = st.recursive(atoms, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
suffixes = st.sampled_from(
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2 alpha scalar dora_scale diff w_norm lora_A lokr_w1".split()
)
shapes = st.lists(st.integers(0, 13), max_size=5) | st.just([2**62, 0]) | st.just([0, 2**63])


def parse(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@st.composite
def mutated_headers(draw, data: bytes) -> bytes:
    """One to three changes of the header; the body as it was."""
    header, body = parse(data)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__") or [""]))
        module, _, part = key.rpartition(".")
        info = header.get(key)
        match draw(st.integers(0, 8)):
            case 0:
                header.pop(key, None)
            case 1:
                header[f"{module}.{draw(suffixes)}"] = header.pop(key, None)
            case 2:
                header[f"{module}.{draw(suffixes)}"] = info
            case 3:
                header[
                    f"{draw(st.sampled_from(['', 'lora_unet_x', 'base_model.model.a', 'unet.a', 'bundle_emb']))}.{part}"
                ] = info
            case 4 if isinstance(info, dict):
                header[key] = info | {"dtype": draw(atoms)}
            case 5 if isinstance(info, dict):
                header[key] = info | {"shape": draw(shapes)}
            case 6 if isinstance(info, dict) and len(info.get("shape") or []) > 1:
                header[key] = info | {"shape": draw(st.permutations(info["shape"]))}
            case 7:
                tags = draw(st.dictionaries(st.text(max_size=4), values, max_size=3))
                text = json.dumps({"x": tags} if draw(st.booleans()) else tags)
                header["__metadata__"] = draw(
                    st.sampled_from([{"ss_tag_frequency": text}, {"modelspec.trigger_phrase": text}, tags])
                )
            case _:
                header[key] = draw(values)
    return container(header, body)


@st.composite
def mutated_bytes(draw, data: bytes) -> bytes:
    """Bytes changed, cut out, or cut off."""
    found = bytearray(data)
    kind = draw(st.sampled_from(["flip", "flip header", "truncate", "cut", "append"]))
    end = len(found) if kind != "flip header" else 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(end, len(found)) - 1)))
        match kind:
            case "truncate":
                del found[place:]
            case "cut":
                del found[place : place + draw(st.integers(1, 16))]
            case "append":
                found += draw(st.binary(max_size=16))
            case _ if found:
                found[place] = draw(st.integers(0, 255))
    return bytes(found)


@st.composite
def mutated_configs(draw) -> bytes:
    config = dict(PEFT_CONFIG)
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.integers(0, 3)):
            case 0:
                config[draw(st.sampled_from(sorted(config)))] = draw(values)
            case 1:
                config["alpha_pattern"] = draw(st.dictionaries(st.text(max_size=6), values, max_size=3))
            case 2:
                config.pop(draw(st.sampled_from(sorted(config))), None)
            case _:
                return draw(mutated_bytes(container(json.dumps(config).encode())))[8:]
    return json.dumps(config if draw(st.integers(0, 9)) else draw(values)).encode()


def survives(path: Path) -> bool:
    """Loads and describes, or raises a LoHaError; anything else, BaseException too, fails the test."""
    try:
        adapter = load_adapter(path)
    except LoHaError as error:
        assert str(path) in str(error)
        return False
    describe(adapter)
    for factors in adapter.layers.values():
        assert factors.delta().shape == factors.shape
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("mutate", [mutated_headers, mutated_bytes], ids=["headers", "bytes"])
@pytest.mark.parametrize("seed", SEEDS)
@settings(max_examples=200)
@given(data=st.data())
def test_fuzz_files(scratch, seed, mutate, data):
    path = scratch / "a.safetensors"
    path.write_bytes(data.draw(mutate(SEEDS[seed])))
    survives(path)


@pytest.mark.parametrize("mutate", [mutated_headers, mutated_bytes], ids=["headers", "bytes"])
@settings(max_examples=150)
@given(data=st.data())
def test_fuzz_peft_weights(scratch, mutate, data):
    folder = samples.write_peft(scratch / "peft", samples.WRAPPED)
    (folder / CONFIG).write_text(json.dumps(PEFT_CONFIG))
    (folder / WEIGHTS).write_bytes(data.draw(mutate(PEFT_SEED)))
    survives(folder)
    survives(folder / WEIGHTS)


@settings(max_examples=300)
@given(config=mutated_configs())
def test_fuzz_peft_configurations(scratch, config):
    folder = scratch / "configs"
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(PEFT_SEED)
    (folder / CONFIG).write_bytes(config)
    survives(folder)


def test_the_seeds_of_the_fuzz_are_good(scratch):
    for seed in SEEDS.values():
        (scratch / "seed.safetensors").write_bytes(seed)
        assert survives(scratch / "seed.safetensors")
    (scratch / "seed" / CONFIG).parent.mkdir()
    (scratch / "seed" / WEIGHTS).write_bytes(PEFT_SEED)
    (scratch / "seed" / CONFIG).write_text(json.dumps(PEFT_CONFIG))
    assert survives(scratch / "seed")


def test_a_refused_file_leaves_nothing_open(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(GOOD)[:-1])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(LoHaError):
            load_adapter(path)
    assert not before or len(os.listdir("/proc/self/fd")) <= before + 1
    path.write_bytes(save(GOOD))
    save_adapter(load_adapter(path), path)
    assert load_adapter(path).layers
