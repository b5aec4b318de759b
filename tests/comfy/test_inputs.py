"""Every input of every node does something; this file has those that no other test of the nodes is about."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folder_paths
import pytest
import torch

from loha_core import Adapter, LoHaError, LoHaFactors, load_adapter
from loha_core.blocks import BlockStrength

from . import reduced
from .test_schema import SNAPSHOT
from .test_strength_nodes import patched
from .training import node

# They go through all nodes' inputs without saying what one does.
UNSPECIFIC = {"test_schema.py", "test_locales.py", "test_examples.py"}


def test_every_input_is_named_where_its_node_is_tested():
    sources = [path.read_text("utf-8") for path in Path(__file__).parent.glob("*.py") if path.name not in UNSPECIFIC]
    entries = (entry.split() for entry in json.loads(SNAPSHOT.read_text("utf-8")))
    inputs = [(entry[0], entry[2]) for entry in entries if entry[1:2] in (["required"], ["optional"])]
    assert len(inputs) > 100
    unnamed = [(kind, name) for kind, name in inputs if not any(named(kind, name, text) for text in sources)]
    assert not unnamed


def named(kind: str, name: str, source: str) -> bool:
    """Whether a file has a node's class, and one of its inputs as a key or a keyword."""
    return bool(re.search(rf"\b{kind}\b", source) and re.search(rf"""["']{name}["']|\b{name}=""", source))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's temporary folder, and its loras."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def run(family: str, name: str, **inputs: Any) -> tuple[Any, ...]:
    """A node's outputs, run as the graph runs it."""
    with torch.inference_mode():
        return getattr(node(f"graph.{family}"), name).execute(**inputs).args


# --- Load LoHa, Apply LoHa ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> reduced.Models:
    return reduced.build("sd15")


@pytest.fixture(params=["LoHaLoader", "LoHaApply"])
def apply(request: pytest.FixtureRequest, models: reduced.Models, folders: Path) -> Any:
    """Runs one of the two nodes; its outputs by name."""
    path, _ = reduced.write(models, "kohya", folders, rank=1)
    source = {"lora_name": path.name} if request.param == "LoHaLoader" else {"loha": load_adapter(path)}
    inputs = {**source, "model": models.model, "clip": models.clip, "strength_model": 1.0, "strength_clip": 1.0}

    def run_it(**changes: Any) -> Any:
        model, clip, report = run("loader", request.param, **inputs | {"mode": "merge"} | changes)[:3]
        return SimpleNamespace(model=model, clip=clip, report=report)

    return run_it


def change(patcher: Any) -> float:
    """How far patches move all weights."""
    before = patcher.model.state_dict()
    return float(torch.stack([(weight - before[key]).norm() for key, weight in patched(patcher).items()]).norm())


def test_applying(apply):
    plain = apply()
    on_model, on_clip = change(plain.model), change(plain.clip.patcher)
    half = apply(strength_model=0.5, strength_clip=0.25)
    assert change(half.model) == pytest.approx(0.5 * on_model, rel=1e-4)
    assert change(half.clip.patcher) == pytest.approx(0.25 * on_clip, rel=1e-4)
    without = apply(clip=None)
    assert without.clip is None and "belongs to the CLIP" in without.report and change(without.model) == on_model
    assert not apply(mode="live").model.patches and plain.model.patches
    blocks = BlockStrength.parse(None, rules=".: 0.5")
    assert change(apply(blocks=blocks).model) == pytest.approx(0.5 * on_model, rel=1e-4)
    [schedule] = run("strength", "LoHaSchedule", keyframes="0: 0, 1: 1", interpolation="linear", start_percent=0.0,
                     end_percent=1.0)[:1]  # fmt: skip
    assert "mode: live" in apply(mode="auto", schedule=schedule).report
    with pytest.raises(LoHaError, match="schedule"):
        apply(mode="merge", schedule=schedule)


# --- Merge, Convert, Extract, Save ----------------------------------------------------------------


def adapter(seed: int, layers: int = 2) -> Adapter:
    """A LoHa of rank 2 on attention layers of an SD1.5 U-Net."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(24, 2), (2, 16)] * 2
    names = [f"lora_unet_down_blocks_{n}_attentions_0_proj_in" for n in range(layers)]
    return Adapter({n: LoHaFactors(*(torch.randn(s, generator=rng) for s in shapes), alpha=2.0) for n in names})


def deltas(merged: Adapter) -> torch.Tensor:
    return torch.stack([factors.delta().flatten() for factors in merged.layers.values()])


def merge(**changes: Any) -> Adapter:
    inputs = {"loha_1": adapter(1), "loha_2": adapter(2), "weight_1": 1.0, "weight_2": 1.0, "method": "exact"}
    merged: Adapter = run("merge", "LoHaMerge", **{**inputs, "bound": "rank", "rank": 8, "amount": 0.99, **changes})[0]
    return merged


def test_a_merge_of_six():
    more = {"loha_3": adapter(3), "loha_4": adapter(4), "loha_5": adapter(5), "loha_6": adapter(6)}
    weights = {"weight_3": 0.3, "weight_4": -0.4, "weight_5": 0.5, "weight_6": 0.6}
    expected = deltas(adapter(1)) + deltas(adapter(2))
    expected += sum(weight * deltas(more[name.replace("weight", "loha")]) for name, weight in weights.items())
    torch.testing.assert_close(deltas(merge(**more, **weights)), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_s_other_inputs():
    blocks = BlockStrength.parse(None, rules="proj_in: 0.5")
    torch.testing.assert_close(deltas(merge(blocks=blocks)), 0.5 * deltas(merge()), rtol=1e-4, atol=1e-4)
    ties = {"method": "ties", "rank": 2}
    sparse, fitted = merge(**ties, density=0.1), merge(**ties, density=0.1, factor="fit")
    assert not torch.allclose(deltas(sparse), deltas(merge(**ties, density=0.9)), atol=0.1)
    assert not torch.allclose(deltas(sparse), deltas(fitted), atol=0.1)
    assert not merge(kind="LoRA").layers


def test_converting_with_blocks():
    inputs = {
        "loha": adapter(1),
        "kind": "as it is",
        "rank": 0,
        "names": "as they are",
        "alpha": 0.0,
        "dtype": "as it is",
    }
    blocks = BlockStrength.parse(None, rules="down_blocks_0: 0.5")
    converted = run("merge", "LoHaConvert", **inputs, blocks=blocks)[0]
    torch.testing.assert_close(deltas(converted), deltas(adapter(1)) * torch.tensor([[0.5], [1.0]]))


def test_extracting_some_layers_only(models, apply):
    inputs = {"base": models.model, "tuned": apply().model, "rank": 1, "conv_rank": 0, "method": "svd"}
    extracted = run("extract", "LoHaExtract", **inputs, only="attn2.*to_k")[0]
    assert extracted.layers and all(name.endswith("attn2_to_k") for name in extracted.layers)
    assert set(run("extract", "LoHaExtract", **inputs)[0].layers) > set(extracted.layers)


def test_saving_names_the_base_model(folders, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(folders)], {".safetensors"}))
    (folders / "base.safetensors").write_bytes(b"weights")
    inputs = {"loha": adapter(1), "filename": "it", "format": "LyCORIS (one file)", "dtype": "fp32"}
    saved = load_adapter(folders / run("save", "LoHaSave", **inputs, base_model="base.safetensors")[0])
    assert saved.metadata["ss_sd_model_name"] == "base.safetensors"
    assert len(saved.metadata["ss_new_sd_model_hash"]) == 64
    with pytest.raises(LoHaError, match="not among the checkpoints"):
        run("save", "LoHaSave", **inputs, base_model="other.safetensors")


# --- what is known before a run -------------------------------------------------------------------

WRONG: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("strength", "LoHaBlockStrength", {"vector": "", "rules": "attn(: 1", "family": "auto", "preset": "ALL"}, {}),
    ("strength", "LoHaBlockStrength", {"vector": "D20=0", "rules": "", "family": "Flux", "preset": "ALL"}, {}),
    ("strength", "LoHaBlockStrength", {"vector": "1,2", "rules": "", "family": "Flux", "preset": "ALL"}, {}),
    (
        "strength",
        "LoHaSchedule",
        {"keyframes": "half: 1", "start_percent": 0.0, "end_percent": 1.0},
        {"interpolation": "linear"},
    ),
    (
        "strength",
        "LoHaSchedule",
        {"keyframes": "0: 1", "start_percent": 0.8, "end_percent": 0.2},
        {"interpolation": "linear"},
    ),
    ("grid", "LoHaGrid", {"strengths": "much"}, {"model": None, "latent": {"samples": torch.zeros(1, 4, 8, 8)}}),
    (
        "grid",
        "LoHaGrid",
        {"strengths": "1", "files": "gone.safetensors"},
        {"model": None, "latent": {"samples": torch.zeros(1, 4, 8, 8)}},
    ),
    (
        "grid",
        "LoHaGrid",
        {"strengths": "1", "run": "no_such_run"},
        {"model": None, "latent": {"samples": torch.zeros(1, 4, 8, 8)}},
    ),
    ("network", "LoHaNetwork", {"patterns": "attn2: many"}, {}),
    ("network", "LoHaNetwork", {"layers": "(a+)+b"}, {}),
    ("network", "LoHaNetwork", {"exclude": "("}, {}),
    ("optimizer", "LoHaOptimizer", {"options": "{"}, {}),
    ("save", "LoHaSave", {"filename": "../a"}, {"loha": Adapter({}), "format": "lycoris", "dtype": "fp16"}),
    (
        "save",
        "LoHaSave",
        {"filename": "a", "metadata": "["},
        {"loha": Adapter({}), "format": "lycoris", "dtype": "fp16"},
    ),
    ("stack", "LoHaStack", {"rows": "[{"}, {}),
    ("loader", "LoHaLoader", {"lora_name": "gone.safetensors"}, {"model": None}),
    ("loader", "LoHaLoader", {"lora_name": ""}, {"model": None}),
    ("trainer", "LoHaTrainer", {"name": "a/b"}, {"model": None}),
    (
        "train_folder",
        "LoHaTrainFolder",
        {"folder": "no_such_folder"},
        dict.fromkeys(
            ("model", "clip", "vae", "trigger_word", "name", "steps", "rank", "learning_rate", "training_seed")
        ),
    ),
]


@pytest.mark.parametrize(("family", "name", "known", "others"), WRONG)
def test_what_a_run_would_fail_of_is_said_before_it(family: str, name: str, known: dict[str, Any], others: dict):
    kind = getattr(node(f"graph.{family}"), name)
    said = kind.validate_inputs(**known)
    with pytest.raises(LoHaError) as failed, torch.inference_mode():
        kind.execute(**known, **others)
    assert said == str(failed.value)


def test_connected_inputs_are_not_known_before_a_run():
    for family, name, _, _ in WRONG:
        assert getattr(node(f"graph.{family}"), name).validate_inputs() is True


def test_an_empty_folder_is_said_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    (tmp_path / "mine").mkdir()
    validate = node("graph.train_folder").LoHaTrainFolder.validate_inputs
    assert "there is no picture in it" in validate("mine", "my_loha")
    assert "no folder" in validate("mine", "a/b")  # both are said
