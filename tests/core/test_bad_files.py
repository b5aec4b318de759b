"""Files changed at random: a LoHaError that names the file and the key, and nothing else, ever.

What was found by hand has recipes in `attacks`.
"""

from __future__ import annotations

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
from .attacks.files import CONFIG, GOOD, WEIGHTS, container


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
    changed = bytearray(data)
    kind = draw(st.sampled_from(["flip", "flip header", "truncate", "cut", "append"]))
    end = len(changed) if kind != "flip header" else 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(end, len(changed)) - 1)))
        match kind:
            case "truncate":
                del changed[place:]
            case "cut":
                del changed[place : place + draw(st.integers(1, 16))]
            case "append":
                changed += draw(st.binary(max_size=16))
            case _ if changed:
                changed[place] = draw(st.integers(0, 255))
    return bytes(changed)


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
