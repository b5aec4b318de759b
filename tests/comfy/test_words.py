"""Trigger words, tags in prompts, files that are missing, and by which words the nodes are found."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_api.latest import io
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from demo.comfyui import ComfyUIError, Server
from loha_core import LoHaError

from . import reduced
from .test_sampling import draw  # noqa: F401  (what `sample` asks for)
from .test_schema import ours
from .test_strength_nodes import patched, sample, sample_stack  # noqa: F401
from .training import node

tags, stack = node("graph.tags"), node("graph.stack")

# What trainers write: kohya, the same with a phrase, ai-toolkit, OneTrainer (which writes no words).
COUNTS = {"10_anna": {"anna": 30, "red hair": 20, "smile": 5}, "2_more": {"smile": 18, "hat": 1}}
KOHYA = {"ss_network_module": "lycoris.kohya", "ss_tag_frequency": json.dumps(COUNTS)}
METADATA = {
    "kohya": KOHYA,
    "phrase": KOHYA | {"modelspec.trigger_phrase": "sks woman,  photo\nof, x, y, z, last"},
    "ai-toolkit": {"ss_tag_frequency": json.dumps({"1_mytrigger": {"mytrigger": 1}})},
    "onetrainer": {"modelspec.title": "x", "modelspec.architecture": "stable-diffusion-v1/lora", "ot_branch": "master"},
    "none": {},
}


def write(path: Path, metadata: dict[str, str] | None = None) -> None:
    torch.manual_seed(0)
    factors = {f"lora_unet_mid_block_x.hada_{name}": torch.randn(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    save_file(factors | {"lora_unet_mid_block_x.alpha": torch.tensor(2.0)}, path, metadata or None)


@pytest.fixture(scope="module")
def worded(server: Server) -> Path:
    """Files of each trainer in the server's loras folder, below words/."""
    folder = server.path("models", "loras", "words", "x").parent
    for name, metadata in METADATA.items():
        write(folder / f"{name}.safetensors", metadata)
    server.object_info("LoHaStack")
    return folder


def shown(server: Server, kind: str, *outputs: int, **inputs: Any) -> list[str]:
    """What a node gives out as text, by the numbers of its outputs."""
    prompt = {"node": {"class_type": kind, "inputs": inputs}}
    prompt |= {str(n): {"class_type": "PreviewAny", "inputs": {"source": ["node", n]}} for n in outputs}
    found = server.queue(prompt)["outputs"]
    return [found[str(n)]["text"][0] for n in outputs]


# --- trigger words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "inputs", "words"),
    [
        ("kohya", {}, "anna, smile, red hair, hat"),
        ("kohya", {"max_trigger_words": 2}, "anna, smile"),
        ("kohya", {"max_trigger_words": 0}, ""),
        ("phrase", {}, "sks woman, photo of, x, y, z"),
        ("phrase", {"max_trigger_words": 1}, "sks woman"),
        ("ai-toolkit", {}, "mytrigger"),
        ("onetrainer", {}, ""),
        ("none", {}, ""),
        ("none", {"trigger_words": " my own, words "}, "my own, words"),
        ("kohya", {"trigger_words": "mine", "max_trigger_words": 0}, "mine"),
    ],
)
def test_words_come_from_the_file_or_from_the_user(server, worded, file, inputs, words):
    name = os.path.join("words", f"{file}.safetensors")
    assert shown(server, "LoHaLoadAdapter", 1, lora_name=name, legacy_tucker=False, **inputs) == [words]


def test_load_loha_gives_the_same_words(ready, worded):
    checkpoint = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "loha_demo_digits.safetensors"}}
    path = ready.path("models", "loras", "loha_demo_seven.safetensors")
    named = path.with_name("named_seven.safetensors")
    save_file(load_file(path), named, KOHYA)
    inputs = {"model": ["1", 0], "lora_name": named.name, "strength_model": 0.0, "strength_clip": 0.0}
    words = {}
    for own in ("", "mine"):
        loader = {"class_type": "LoHaLoader", "inputs": inputs | {"max_trigger_words": 2, "trigger_words": own}}
        preview = {"class_type": "PreviewAny", "inputs": {"source": ["2", 3]}}
        words[own] = ready.queue({"1": checkpoint, "2": loader, "3": preview})["outputs"]["3"]["text"][0]
    assert words == {"": "anna, smile", "mine": "mine"}


def test_a_stack_joins_the_words_of_what_is_on(server, worded):
    entries = [("kohya", 1.0), ("phrase", 0.0), ("ai-toolkit", -0.5), ("kohya", 0.5)]
    rows = [{"name": f"words/{name}.safetensors", "strength_model": strength} for name, strength in entries]
    rows.append({"on": False, "name": "words/phrase.safetensors"})
    given = {"rows": json.dumps(rows), "max_trigger_words": 2}
    assert shown(server, "LoHaStack", 4, **given) == ["anna, smile, mytrigger"]
    assert shown(server, "LoHaStack", 4, **given, trigger_words="mine") == ["mine"]


# --- tags: the text alone -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt", "found"),
    [
        ("a cat , ", "a cat , ", []),
        ("<lora:a>", "", [("a", 1.0, 1.0)]),
        ("<LORA: a b : .8 >", "", [("a b", 0.8, 0.8)]),
        ("a cat <lora:x/a.sft:0.8:-0.6> sits", "a cat sits", [("x/a.sft", 0.8, -0.6)]),
        ("a cat, <lora:a:0>, sits", "a cat, sits", [("a", 0.0, 0.0)]),
        ("a cat,\n<lora:a> <lyco:b:1e-2>, <lora:c>, sits", "a cat, sits",
         [("a", 1.0, 1.0), ("b", 0.01, 0.01), ("c", 1.0, 1.0)]),
        ("<lora:a>, a cat<lora:b>", "a cat", [("a", 1.0, 1.0), ("b", 1.0, 1.0)]),
        ("cat <lyco:a:te=0.8:unet=0.6>", "cat", [("a", 0.6, 0.8)]),
        ("cat <lyco:a:te=0.8>", "cat", [("a", 0.8, 0.8)]),
        ("cat <lyco:a:unet=0.8>", "cat", [("a", 0.8, 1.0)]),
        ("cat <lora:a:0.5:te=0.2> <hypernet:a:1>", "cat <hypernet:a:1>", [("a", 0.5, 0.2)]),
    ],
)  # fmt: skip
def test_a_prompt_and_its_tags(text, prompt, found):
    assert tags.read(text) == (prompt, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<lora:>", "<lora:>: a tag without a name"),
        ("<lora::0.5>", "a tag without a name"),
        ("<lora:a:>", "<lora:a:>: '' is neither of the two strengths"),
        ("<lora:a:strong>", "'strong' is neither"),
        ("<lora:a:nan>", "'nan' is neither"),
        ("<lora:a:1:1:1>", "'1' is neither"),
        ("<lora:a:1:1:lbw=OUTALL>", "'lbw=OUTALL' is neither .* Strengths by block come from LoHa Block Strength"),
        ("<lora:a:dyn=8>", "'dyn=8' is neither"),
        ("a <lora:a:0.8 cat", "a tag without its '>': <lora:a:0.8 cat; write <lora:name:0.8>"),
        ("a <lora:a <lora:b>", "a tag without its '>': <lora:a"),
    ],
)
def test_tags_that_cannot_be_understood(text, message):
    with pytest.raises(LoHaError, match=message):
        tags.read(text)


NAMES = ["a.safetensors", "x/a.safetensors", "x/Bob.safetensors", "y/bob.sft", "peft", "y/c.sft", "y/c.safetensors"]
NAMES += ["z/v1.5:final.safetensors", "z/v1.5.safetensors", "deep/er/style 2.safetensors"]


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("a", "a.safetensors"),
        ("x/a", "x/a.safetensors"),
        ("x\\a.safetensors", "x/a.safetensors"),
        ("X/A", "x/a.safetensors"),
        ("Bob", "x/Bob.safetensors"),
        ("bob", "y/bob.sft"),
        ("bob.sft", "y/bob.sft"),
        ("PEFT", "peft"),
        ("v1.5", "z/v1.5.safetensors"),
        ("er/style 2", None),
        ("", None),
    ],
)
def test_what_a_name_stands_for(wanted, name):
    assert tags.Names(NAMES).find(wanted) == name


@pytest.mark.parametrize(
    ("wanted", "names"), [("c", "y/c.sft, y/c.safetensors"), ("BOB", "x/Bob.safetensors, y/bob.sft")]
)
def test_a_name_of_several_is_refused(wanted, names):
    with pytest.raises(LoHaError, match=f"'{wanted}' may be {names}; write the folder"):
        tags.Names(NAMES).find(wanted)


def test_the_shortest_tag_that_is_read_as_the_adapter():
    written = {name: tags.Names(NAMES).write(name, 0.5, 1.0) for name in [*NAMES, "other/pack's.pt"]}
    assert list(written.values()) == [
        *("<lora:a:0.5:1>", "<lora:x/a:0.5:1>", "<lora:Bob:0.5:1>", "<lora:bob:0.5:1>", "<lora:peft:0.5:1>"),
        *("<lora:c.sft:0.5:1>", "<lora:c.safetensors:0.5:1>", None, "<lora:v1.5:0.5:1>", "<lora:style 2:0.5:1>"),
        "<lora:other/pack's.pt:0.5:1>",
    ]


LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
STRENGTHS = st.floats(-20, 20)


@given(st.lists(st.tuples(LETTERS, st.booleans()), min_size=1, max_size=6), STRENGTHS, STRENGTHS)
def test_what_is_written_is_read_as_it_was(parts, model, clip):
    files = list(dict.fromkeys(f"{'x/' if inside else ''}{name}.safetensors" for name, inside in parts))
    names = tags.Names(files)
    for file in files:
        if tag := names.write(file, model, clip):
            prompt, [found] = tags.read(f"a {tag} b")
            assert (prompt, names.find(found.name), *found[1:]) == ("a b", file, model, clip)
        else:
            assert set(file) & set("<>:\\") or file != file.lstrip()


@given(
    st.lists(st.sampled_from(["cat", "a (red:1.2) hat", ",", "\n", " ", "<x>", "<lora:a:0.5>", "<lyco:b>"]), max_size=9)
)
def test_nothing_but_tags_leaves_a_prompt(parts):
    text = "".join(parts)
    prompt, found = tags.read(text)
    assert len(found) == sum("<l" in part for part in parts)
    assert re.sub(r"[\s,]", "", prompt) == re.sub(r"[\s,]", "", re.sub(r"<l[^>]*>", "", text))
    assert prompt == text or found
    assert tags.read(prompt) == (prompt, [])


# --- tags: what they do ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's loras folder, with two adapters for a reduced SD1.5."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    folder_paths.filename_list_cache.pop("loras", None)
    models = reduced.build("sd15")
    for rank, name in ((2, "one.safetensors"), (3, "sub/two.safetensors")):
        path, _ = reduced.write(models, "kohya", tmp_path, rank)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        path.rename(tmp_path / name)
    return tmp_path


def stacked(**inputs: Any) -> SimpleNamespace:
    with torch.inference_mode():
        found = stack.LoHaStack.execute(**{"rows": "[]", "mode": "merge"} | inputs).args
    return SimpleNamespace(
        **dict(zip("model clip entries report trigger_words prompt lora_tags".split(), found, strict=True))
    )


ROWS = [
    {"name": "one.safetensors", "strength_model": 0.1 + 0.2, "strength_clip": -1 / 3},
    {"name": "sub/two.safetensors", "strength_model": 0.7},
    {"name": "one.safetensors", "strength_model": 0.0},
    {"name": "sub/two.safetensors", "on": False},
]


def test_tags_written_and_read_again_give_the_same_models_bit_for_bit(folder):
    models = reduced.build("sd15")
    both = {"model": models.model, "clip": models.clip}
    by_rows = stacked(rows=json.dumps(ROWS), **both)
    assert by_rows.lora_tags == "<lora:one:0.30000000000000004:-0.3333333333333333> <lora:two:0.7> <lora:one:0>"
    by_tags = stacked(text=f"a cat, {by_rows.lora_tags}", **both)
    assert (by_tags.prompt, by_tags.entries, by_tags.lora_tags) == ("a cat", by_rows.entries, by_rows.lora_tags)
    plain = models.model.model.state_dict()
    for one, other in ((by_rows.model, by_tags.model), (by_rows.clip.patcher, by_tags.clip.patcher)):
        wanted, found = patched(one), patched(other)
        assert wanted.keys() == found.keys() and wanted
        assert all(torch.equal(found[key], weight) for key, weight in wanted.items())
    assert any(not torch.equal(weight, plain[key]) for key, weight in patched(by_tags.model).items())


def test_tags_come_after_rows_and_lists(folder):
    rows = json.dumps([{"name": "sub/two.safetensors", "strength_model": 0.5}])
    found = stacked(rows=rows, text="<lora:ONE:0.2>", lora_stack=[("one.safetensors", 1.0, None)])
    assert found.entries == [
        ("one.safetensors", 1.0, 0.0),
        ("sub/two.safetensors", 0.5, 0.5),
        ("one.safetensors", 0.2, 0.2),
    ]
    assert found.report == "3 adapters in the list; none applied here"


def test_a_tag_draws_what_its_row_draws(sample_stack):  # noqa: F811
    """In a real server, from the widget to the picture."""
    rows = [{"name": "loha_demo_seven.safetensors", "strength_model": 0.7, "strength_clip": 0.4}]
    by_row = sample_stack(rows=json.dumps(rows), mode="merge")
    by_tag = sample_stack(rows="[]", text="a handwritten seven <lora:loha_demo_seven:0.7:0.4>", mode="merge")
    assert np.array_equal(by_row, by_tag)
    assert np.abs(by_row - sample_stack(rows="[]")).max() > 10


def test_a_connected_text_is_read_when_it_comes(server, worded):
    text = {"class_type": "PrimitiveString", "inputs": {"value": "cat <lora:kohya:0.8>"}}
    prompt = {
        "1": text,
        "2": {"class_type": "LoHaStack", "inputs": {"rows": "[]", "text": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 6]}},
    }
    assert server.queue(prompt)["outputs"]["3"]["text"] == ["<lora:kohya:0.8>"]
    text["inputs"]["value"] = "cat <lora:kohia>"
    with pytest.raises(ComfyUIError, match=r"LoHaStack \(node 2\): 'kohia': no such adapter .* nearest: words.kohya"):
        server.queue(prompt)


def test_what_no_tag_can_hold_is_said(folder):
    (folder / "one.safetensors").rename(folder / "v1:final.safetensors")
    found = stacked(rows=json.dumps([{"name": "v1:final.safetensors"}]))
    assert found.lora_tags == "" and "v1:final.safetensors: not among lora_tags" in found.report


# --- files that are missing -----------------------------------------------------------------------


BOTH = {"rows": json.dumps([{"name": "words/late.safetensors"}, {"name": "words/kohya.safetensors"}])}
ALSO = {"rows": "[]", "text": "cat <lora:late:0.5> <lora:kohya>"}


@pytest.mark.parametrize("inputs", [BOTH, ALSO], ids=["rows", "tags"])
def test_a_missing_file_is_an_error_before_the_run_or_is_skipped(server, worded, inputs):
    late = worded / "late.safetensors"
    late.unlink(missing_ok=True)
    with pytest.raises(ComfyUIError, match=r"Custom validation failed for node: .*late.*: no such adapter"):
        shown(server, "LoHaStack", 2, **inputs)
    skipping = inputs | {"skip_missing": True}
    entries, report, words = shown(server, "LoHaStack", 2, 3, 4, **skipping)
    assert "late" not in entries and "kohya" in entries and words == "anna, smile, red hair, hat"
    assert report.startswith("left out: ") and "late" in report and "1 adapters in the list" in report
    assert re.search("LoHa Stack left out .*late.*: no such adapter", server.log())
    write(late, {"modelspec.trigger_phrase": "late"})
    entries, report, words = shown(server, "LoHaStack", 2, 3, 4, **skipping)  # the very same prompt
    assert "late" in entries and report.startswith("2 adapters") and words == "late, anna, smile, red hair, hat"
    late.unlink()
    assert "late" not in shown(server, "LoHaStack", 2, **skipping)[0]


def test_fingerprints_follow_files_that_come_and_go(folder):
    rows = json.dumps([{"name": "late.safetensors"}, {"name": "one.safetensors"}])
    fingerprint = lambda: stack.LoHaStack.fingerprint_inputs(rows=rows, text="<lora:late>", skip_missing=True)  # noqa: E731
    before = fingerprint()
    write(folder / "late.safetensors")
    folder_paths.filename_list_cache.pop("loras", None)
    there = fingerprint()
    (folder / "late.safetensors").unlink()
    folder_paths.filename_list_cache.pop("loras", None)
    assert before != there and fingerprint() == before


def test_what_is_applied_here_may_be_skipped_too(folder):
    models = reduced.build("sd15")
    foreign = {"lora_stack": [("gone.safetensors", 1.0, 1.0), ("one.safetensors", 1.0, 1.0)], "model": models.model}
    with pytest.raises(LoHaError, match=r"'gone\.safetensors': no such adapter"):
        stacked(**foreign)
    found = stacked(**foreign, skip_missing=True)
    assert found.entries == [("one.safetensors", 1.0, 1.0)] and found.model.patches
    assert found.report.startswith("left out: 'gone.safetensors'")
    (folder / "broken.safetensors").write_bytes(b"\x10")
    with pytest.raises(LoHaError, match="broken"):  # it is there: nothing to skip
        stacked(rows=json.dumps([{"name": "broken.safetensors"}]), model=models.model, skip_missing=True)


def test_a_list_that_passes_through_keeps_other_packs_names(folder):
    foreign = [("another pack's.gguf", 1.0, 1.0)]
    found = stacked(lora_stack=foreign)
    assert found.entries == foreign and found.lora_tags == "<lora:another pack's.gguf:1>"
    assert "another pack's.gguf: no trigger words, as it cannot be read" in found.report
    assert stacked(lora_stack=foreign, skip_missing=True).entries == []


# --- said on the node before a run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("LoHaLoadAdapter", {"lora_name": "gone.safetensors", "legacy_tucker": False}, "'gone.safetensors': no such"),
        ("LoHaStack", {"rows": "["}, "rows is not JSON"),
        ("LoHaStack", {"rows": '[{"name": "a", "strength_model": "1"}]'}, r"row 1 \(a\): strength_model is '1'"),
        ("LoHaStack", {"rows": "[]", "text": "<lora:a:b>"}, "'b' is neither of the two strengths"),
        ("LoHaStack", {"rows": "[]", "text": "<lora:kohia>"}, r"'kohia': no such adapter .* nearest: words.kohya"),
    ],
)
def test_what_can_be_known_before_a_run(server, worded, kind, inputs, message):
    prompt = {
        "1": {"class_type": kind, "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    with pytest.raises(ComfyUIError, match=rf"{kind} \(node 1\): Custom validation failed for node: \w+ - .*{message}"):
        server.post("/prompt", {"prompt": prompt})


def test_what_is_not_known_yet_is_not_refused(folder):
    for kind, inputs in (("LoHaLoader", {"lora_name": None}), ("LoHaStack", {"rows": None, "text": None})):
        family = "loader" if kind == "LoHaLoader" else "stack"
        assert getattr(node(f"graph.{family}"), kind).validate_inputs(**inputs) is True
    missing = json.dumps([{"name": "gone.safetensors"}])
    assert stack.LoHaStack.validate_inputs(rows=missing, skip_missing=None) is True  # connected
    assert "no such adapter" in stack.LoHaStack.validate_inputs(rows=missing, skip_missing=False)
    assert stack.LoHaStack.validate_inputs(rows=missing, skip_missing=True) is True


# --- found by other words -------------------------------------------------------------------------


def test_nodes_are_found_by_other_words_where_comfyui_knows_them(server):
    known = "search_aliases" in {field.name for field in fields(io.Schema)}
    nodes = ours(server.object_info())
    aliases = {name: about.get("search_aliases") for name, about in nodes.items()}
    if not known:
        assert not any(aliases.values())
    else:
        assert {"lora", "lycoris", "slider"} <= set(aliases["LoHaLoader"])
        assert {"power lora", "lora stack", "lycoris stack"} <= set(aliases["LoHaStack"])
        assert "block weight" in aliases["LoHaBlockStrength"]
        assert all(aliases.values()), [name for name, words in aliases.items() if not words]
