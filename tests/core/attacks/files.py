"""Damaged and hostile files as recipes: each writes its files into a folder, and yields them with what is said of them.

A message of None is that of a file that may also be read; nobody may hang or fail over it in any other way.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .. import samples

Attack = tuple[Path, str | None]

KEY = "lora_unet_a"
GOOD = samples.module(KEY, (6, 4))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WORD = "down_blocks.0.attentions.0.proj_in"


def container(header: object, body: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BODY = struct.pack("<16f", *range(16))


def headers(**changes: object) -> dict[str, object]:
    """Four factors (2, 2) over one body; ``changes`` replaces entries."""
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    entries = {f"{KEY}.hada_{name}": entry(offsets=(16 * i, 16 * i + 16)) for i, name in enumerate(names)}
    return entries | {f"{KEY}.hada_{name}": change for name, change in changes.items()}


def _files(folder: Path, contents: Mapping[str, tuple[bytes, str | None]]) -> Iterator[Attack]:
    for name, (data, message) in contents.items():
        path = folder / f"{name}.safetensors"
        path.write_bytes(data)
        yield path, message


def ends_too_early(folder: Path) -> Iterator[Attack]:
    """The file is shorter than its header says, or longer."""
    contents: dict[str, tuple[bytes, str | None]] = {
        "empty": (b"", "empty"),
        "one byte": (b"{", "not a safetensors"),
        "eight bytes": (bytes(8), "not a safetensors"),
        "half": (save(GOOD)[:100], "not a safetensors"),
        "last byte missing": (save(GOOD)[:-1], "truncated"),
        "a byte too many": (save(GOOD) + b"\0", "safetensors"),
    }
    yield from _files(folder, contents)


def claims_memory(folder: Path) -> Iterator[Attack]:
    """Lengths of header and tensors that would make a reader allocate terabytes, or overflow its integers."""
    contents: dict[str, tuple[bytes, str | None]] = {
        "a header of terabytes": (struct.pack("<Q", 2**42) + b'{"a":1}', "4398046511104"),
        "a header of 2⁶⁴": (b"\xff" * 8 + b"{}", "18446744073709551615"),
        "a tensor of terabytes": (container(headers(w1_a=entry(shape=(2**20, 2**20))), BODY), "safetensors"),
        "a tensor beyond 2⁶⁴": (container(headers(w1_a=entry(shape=(2**40, 2**40))), BODY), "safetensors"),
        "an axis of 2⁶³ beside one of 0": (
            container({"a.hada_w1_a": entry(shape=(2**63, 0), offsets=(0, 0))}),
            "safetensors",
        ),
        "an axis of 2⁶² beside one of 0": (
            container({"a.hada_w1_a": entry(shape=(0, 2**62, 4), offsets=(0, 0))}),
            "safetensors",
        ),
    }
    yield from _files(folder, contents)


def lies_in_its_header(folder: Path) -> Iterator[Attack]:
    """Offsets that leave the file, turn round or overlap; dtypes that are none; headers that are none."""
    contents: dict[str, tuple[bytes, str | None]] = {
        "offsets out of the file": (container(headers(w2_b=entry(offsets=(48, 2**40))), BODY), "safetensors"),
        "offsets backwards": (container(headers(w1_a=entry(offsets=(16, 0))), BODY), "safetensors"),
        "offsets negative": (container(headers(w1_a=entry(offsets=(-16, 0))), BODY), "safetensors"),
        "offsets that overlap": (container(headers(w1_b=entry(offsets=(0, 16))), BODY), "safetensors"),
        "a dtype that is none": (container(headers(w1_a=entry(dtype="F31")), BODY), "safetensors"),
        "a dtype that torch has no sums in": (container(headers(w1_a=entry(dtype="U16", shape=(2, 4))), BODY), "w1_a"),
        "integers": (container(headers(w1_a=entry(dtype="I32")), BODY), rf"{KEY}: w1_a has dtype torch.int32"),
        "a list": (container([1, 2], BODY), "safetensors"),
        "no JSON": (container(b"{" + b"x" * 40), "safetensors"),
        "no text": (container(b"{\xff\xfe" + b"x" * 40), "safetensors"),
        "nested 100,000 deep": (container(b'{"a":' * 100_000), "safetensors"),
        "metadata of numbers": (container(headers() | {"__metadata__": {"a": 1}}, BODY), "safetensors"),
        "no tensors": (container({}), "no tensors"),
    }
    yield from _files(folder, contents)


def of_another_format(folder: Path) -> Iterator[Attack]:
    """Pickles, which run code when they are read, and other files under a safetensors file's name."""

    def pickled(protocol: int) -> bytes:
        return pickle.dumps({key: tensor.tolist() for key, tensor in GOOD.items()}, protocol=protocol)

    zipped = io.BytesIO()
    torch.save(GOOD, zipped)
    contents: dict[str, tuple[bytes, str | None]] = {
        "torch.save": (zipped.getvalue(), "pickle"),
        "pickle, protocol 0": (pickled(0), "not a safetensors"),
        **{f"pickle, protocol {protocol}": (pickled(protocol), "pickle") for protocol in (2, 4, 5)},
        "a web page": (b"<!DOCTYPE html><html><body>404</body></html>" * 9, "web page"),
        "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a safetensors"),
        "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "not a safetens"),
    }
    yield from _files(folder, contents)


def has_another_suffix(folder: Path) -> Iterator[Attack]:
    """A sound file whose name says that it is of a format that can run code."""
    for name in ("a.pt", "a.ckpt", "a.bin", "a", "a.safetensors.bak"):
        (folder / name).write_bytes(save(GOOD))
        yield folder / name, rf"{name}: only .safetensors"


def is_no_file(folder: Path) -> Iterator[Attack]:
    """Paths that lead to a folder, to a pipe that never ends, in circles, or nowhere."""
    samples.write(folder / "a.safetensors", GOOD)
    (folder / "folder.safetensors").mkdir()
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    yield folder, "a folder without adapter_config.json"
    yield folder / "folder.safetensors", "a folder"
    nowhere = ("b", "dangling", "loop", "pipe", "a\0", "a" * 300, "a.safetensors/b")
    for name in nowhere:
        yield folder / f"{name}.safetensors", "no such file"


def pipes_in_a_folder(folder: Path) -> Iterator[Attack]:
    """A PEFT folder whose files are pipes, links in circles, or folders."""
    for name in (CONFIG, WEIGHTS):
        for kind in ("pipe", "loop", "folder"):
            path = samples.write_peft(folder / f"{kind} {name}", samples.WRAPPED) / name
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "loop":
                path.symlink_to(path)
            else:
                path.mkdir()
            yield path.parent, "a folder without adapter_config.json" if name == CONFIG else WEIGHTS


def spoils_a_layer(folder: Path) -> Iterator[Attack]:
    """Factors that are missing, do not fit together, or are no factors."""
    nan, inf, ones = torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones

    def without(*parts: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in GOOD.items() if key.rpartition(".")[2] not in parts}

    def changed(**parts: Tensor) -> dict[str, Tensor]:
        return GOOD | {f"{KEY}.{name}": tensor.clone() for name, tensor in parts.items()}

    huge = torch.tensor(1e300, dtype=torch.float64)
    spoilt = {
        "w1_a missing": (without("hada_w1_a"), ": hada_w1_a missing"),
        "three missing": (without("hada_w1_a", "hada_w1_b", "hada_w2_b"), "hada_w1_a, hada_w1_b, hada_w2_b missing"),
        "t2 alone": (changed(hada_t2=ones(2, 2, 3)), "t1 and t2"),
        "t1 alone": (changed(hada_t1=ones(2, 2, 3)), "t1 and t2"),
        "a rank that differs": (changed(hada_w1_b=ones(3, 4)), r"w1_a \(6, 2\) and w1_b \(3, 4\)"),
        "halves that differ": (changed(hada_w1_b=ones(2, 5)), r"\(6, 5\) and \(6, 4\)"),
        "a factor that is a number": (changed(hada_w1_b=torch.tensor(1.0)), r"w1_b \(\)"),
        "no elements": (changed(hada_w1_a=ones(0, 2), hada_w2_a=ones(0, 2)), r"\(0, 4\)"),
        "five axes": (changed(hada_w1_a=ones(6, 2, 2, 1, 1)), r"w1_a"),
        "NaN": (changed(hada_w1_a=nan.expand(6, 2)), ".hada_w1_a: 12 of 12"),
        "infinity": (changed(hada_w2_b=inf.expand(2, 4).half()), "hada_w2_b: 8 of 8"),
        "8-bit NaN": (changed(hada_w2_b=nan.expand(2, 4).to(torch.float8_e4m3fn)), "hada_w2_b: 8 of 8"),
        "an alpha that is NaN": (changed(alpha=nan), "alpha: 1 of 1"),
        "alpha of two": (changed(alpha=ones(2)), r"alpha has shape \(2,\)"),
        "alpha of none": (changed(alpha=ones(0)), r"alpha has shape \(0,\)"),
        "alpha of one by one by two": (changed(alpha=ones(1, 1, 2)), r"alpha has shape \(1, 1, 2\)"),
        "scalar of two": (changed(scalar=ones(2)), r"scalar has shape \(2,\)"),
        "alpha·scalar too large": (changed(alpha=huge, scalar=huge), ": alpha"),
        "dora_scale of neither axis": (changed(dora_scale=ones(5, 1)), r"dora_scale \(5, 1\)"),
        "NaN in a tensor of no LoHa": (changed(diff=nan), ".diff: 1 of 1"),
        "a checkpoint": ({"model.weight": ones(3)}, "model.weight.*checkpoint"),
    }
    for name, (tensors, message) in spoilt.items():
        where = "" if name == "a checkpoint" else f"{KEY}.*"
        yield samples.write(folder / f"{name}.safetensors", tensors), where + message


def spoils_a_configuration(folder: Path) -> Iterator[Attack]:
    """adapter_config.json beside sound weights: no JSON, of another kind, or without numbers where numbers belong."""
    texts: dict[str, tuple[str | bytes, str]] = {
        "no JSON": ("{", "not readable as JSON"),
        "empty": ("", "not readable as JSON"),
        "no text": (b"\xff\xfe\x00", "not readable as JSON"),
        "huge": (" " * 10_000_001, "10000001 bytes"),
        "nested": ("[" * 200_000, "not readable as JSON"),
        "a number of 10,000 digits": ('{"r": ' + "1" * 10_000 + "}", "not readable as JSON"),
    }
    values: dict[str, tuple[object, str]] = {
        "a list": ([1], "found list"),
        "a number": (1, "found int"),
        "null": (None, "found NoneType"),
        "another kind": ({"peft_type": "LORA"}, "peft_type is LORA"),
        "no kind at all": ({"peft_type": ["LOHA"]}, "peft_type"),
        "alpha a word": ({"alpha": "many"}, f"{WORD}.*no number"),
        "alpha a list": ({"alpha": [1]}, f"{WORD}.*no number"),
        "alpha null": ({"alpha": None}, f"{WORD}.*no number"),
        "alpha NaN": ({"alpha": float("nan")}, "alpha is nan"),
        "alpha infinite": ({"alpha": float("inf")}, "alpha is inf"),
        "alpha of 400 digits": ({"alpha": 10**400}, f"{WORD}.*no number"),
        "alpha_pattern a list": ({"alpha_pattern": ["proj_in"]}, "alpha_pattern is list"),
        "alpha_pattern of words": ({"alpha_pattern": {"proj_in": "x"}}, f"{WORD}.*no number"),
        "alpha_pattern null": ({"alpha_pattern": {"proj_in": None}}, f"{WORD}.*no number"),
        "a pattern that is no pattern": ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
        "a pattern that repeats nothing": ({"alpha_pattern": {"*": 1}}, "not a regular expression"),
        "a pattern that repeats too often": ({"alpha_pattern": {f"a{{{10**12}}}": 1}}, "not a regular expression"),
        "a pattern that is none within another": ({"alpha_pattern": {"(?i)a": 1}}, "not a regular expression"),
        "a pattern nested too deep": ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 1}}, "not a regular expression"),
    }
    texts |= {name: (json.dumps(value), message) for name, (value, message) in values.items()}
    for name, (text, message) in texts.items():
        path = samples.write_peft(folder / name, samples.WRAPPED)
        (path / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
        yield path, f"{CONFIG}: .*{message}"
        yield path / WEIGHTS, f"{CONFIG}: .*{message}"


HANGING = ("(a+)+b", ".*a.*a.*a.*b", ".*a.*b.*c.*d.*e", "(.*a){12}b", "(a|a?)+b", r"(a+)\1+b", "(a{2,}){2,}b")


def hangs_in_a_pattern(folder: Path) -> Iterator[Attack]:
    """Patterns that backtrack for minutes or for ever on a module's name of 800 letters.

    The first that was found took 41 s: a rank_pattern `.*a.*a.*a.*b`.
    """
    name = "a" * 800
    wrapped = {f"base_model.model.{key}": t for key, t in samples.module(name, (6, 4), alpha=None).items()}
    for number, pattern in enumerate(HANGING):
        alphas = samples.write_peft(folder / f"alphas {number}", wrapped, alpha_pattern={pattern: 1})
        yield alphas, f"{CONFIG}: alpha_pattern: .* may take very long"
        for field in ("rank_pattern", "target_modules", "exclude_modules", "modules_to_save"):
            value = {pattern: 1} if field == "rank_pattern" else [pattern] if field == "modules_to_save" else pattern
            yield samples.write_peft(folder / f"{field} {number}", wrapped, **{field: value}), None
        packed = json.dumps({"alpha": 1, "alpha_pattern": {pattern: 2}})
        tensors = samples.module(f"transformer.{name}", (6, 4), alpha=None)
        path = folder / f"metadata {number}.safetensors"
        yield samples.write(path, tensors, {"lora_adapter_metadata": packed}), "alpha_pattern: .* may take very long"


def has_names_without_end(folder: Path) -> Iterator[Attack]:
    """Names so long that a pattern which is quick on others takes minutes."""
    wrapped = {f"base_model.model.{key}": t for key, t in samples.module("a" * 100_000, (6, 4), alpha=None).items()}
    yield samples.write_peft(folder / "long", wrapped, alpha_pattern={".*a.*b": 1}), "key of 100027 letters"


def has_numbers_for_matrices(folder: Path) -> Iterator[Attack]:
    """A LoRA beside the LoHa whose factors have no axes, which are looked at only when layers are sorted."""
    for up, down in (((), (2, 4)), ((6, 2), ()), ((6,), (2,))):
        lora = {"b.lora_up.weight": torch.ones(up), "b.lora_down.weight": torch.ones(down)}
        yield samples.write(folder / f"{len(up)} {len(down)}.safetensors", GOOD | lora), None


def has_very_many_patterns(folder: Path) -> Iterator[Attack]:
    """Thousands of patterns, each of which is quick."""
    wrapped = {f"base_model.model.{key}": t for key, t in samples.module("a" * 800, (6, 4), alpha=None).items()}
    patterns = {f".*{number}.*x": 1 for number in range(5000)}
    yield samples.write_peft(folder / "many", wrapped, alpha_pattern=patterns), None


ATTACKS = [recipe for recipe in list(vars().values()) if inspect.isgeneratorfunction(recipe) and recipe is not _files]
