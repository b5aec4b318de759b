"""The examples run, and count what PEFT counts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# The import line, in the words of the documents that the examples come from.
OURS = "from loha_core import LoHaConfig, LoHaModel"

for module in ("transformers", "diffusers", "peft"):
    pytest.importorskip(module)
import loha_core.peft  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    loha_core.peft.disable()


def run(source: str, path: Path, monkeypatch, capsys, steps: int = 8) -> str:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(path), "--steps", str(steps)])
    exec(compile(source, str(path), "exec"), {"__name__": "__main__", "__doc__": path.stem})
    return capsys.readouterr().out


NAMES = [
    "language_model", "stable_diffusion", "layer_specific_ranks", "several_adapters", "dropout", "train_minimal",
    "with_peft",
]  # fmt: skip


def test_every_example_is_tested():
    assert sorted(NAMES) == sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "models")


@pytest.mark.parametrize("name", NAMES)
def test_example_runs_and_learns(name, monkeypatch, capsys):
    path = EXAMPLES / f"{name}.py"
    printed = run(path.read_text("utf-8"), path, monkeypatch, capsys)
    for before, after in re.findall(r"loss ([\d.]+) -> ([\d.]+)", printed):
        assert float(after) < float(before)
    for what, difference in re.findall(r"(loaded again|merged|as one LoHa|in use|resumed).* by ([\d.e-]+)", printed):
        assert float(difference) < 1e-4, what
    for difference in re.findall(r"(?:without adapters|in training)[^\n]* by ([\d.e-]+)", printed):
        assert float(difference) > 1e-3


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("several_adapters", "with_peft")])
def test_counts_are_pefts(name, monkeypatch, capsys):
    """The same file with PEFT in the import line, up to where it prints its counts."""
    path = EXAMPLES / f"{name}.py"
    ours = counts(run(path.read_text("utf-8"), path, monkeypatch, capsys, steps=1))
    # PEFT's LoHaModel alone prints nothing: its PeftModel does.
    source = re.split(r"\n(?:ids, wanted|ids = |size, |# 2\.)", path.read_text("utf-8"))[0]
    source = re.sub(r"for name, layer in model\.loha_layers.*?\n\n", "\n", source + "\n\n", flags=re.S)
    source = source.replace("lora_alpha=", "alpha=").replace(", get_peft_model", "")
    source = source.replace(OURS, "from peft import LoHaConfig, get_peft_model")
    source = source.replace("LoHaModel(", "get_peft_model(")
    assert ours and counts(run(source, path, monkeypatch, capsys)) == ours


def test_peft_alone_counts_and_learns_the_same(monkeypatch, capsys):
    """The same file without the line that switches our layers on."""
    path = EXAMPLES / "with_peft.py"
    source = path.read_text("utf-8")
    alone = source.replace("loha_core.peft.enable()\n", "", 1)
    assert alone != source
    ours, theirs = (run(text, path, monkeypatch, capsys) for text in (source, alone))
    results = re.compile(r"^(?:loss|trainable|resumed).*", re.M)
    assert len(results.findall(ours)) == 5 and results.findall(ours) == results.findall(theirs)


def counts(printed: str) -> list[str]:
    return re.findall(r"trainable params: .*", printed)
