"""The words of the nodes: English as the schema has them, Chinese for each of them.

After a change of a node: `python -m tests.comfy.test_locales`, which updates the schema's snapshot, too.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from demo import comfyui

from .test_schema import REPOSITORY, SNAPSHOT, contract, ours

LOCALES = REPOSITORY / "locales"
# The words of our own widgets, in main.json: by what they are in English, and read by web/words.mjs.
WORDS = "main.loha."
# ComfyUI's page takes a translation for a template; with these it would show something else, or nothing.
TEMPLATE = re.compile(r"[{}@|]")
# What a translation keeps: numbers, and the names of programs, files, formats and inputs.
KEPT = re.compile(r"\d+(?:\.\d+)?%?|[a-z0-9]+_[a-z0-9_]+|[A-Za-z]*[A-Z]{2}[A-Z]*|[A-Z]?[a-z]+[A-Z]\w*|[/.]\w+")


def english(info: dict[str, Any]) -> dict[str, str]:
    """What the nodes say, by the paths at which ComfyUI's page looks it up."""
    texts = {}
    for node, about in ours(info).items():
        path = f"nodeDefs.{node}"
        texts |= {f"{path}.{key}": about[key] for key in ("display_name", "description")}
        for name, (_, options) in (about["input"].get("required", {}) | about["input"].get("optional", {})).items():
            texts[f"{path}.inputs.{name}.name"] = options["display_name"]
            texts[f"{path}.inputs.{name}.tooltip"] = options["tooltip"]
        for index, name in enumerate(about["output_name"]):
            if name != about["output"][index]:  # else the page has a name of its own for the type
                texts[f"{path}.outputs.{index}.name"] = name
            texts[f"{path}.outputs.{index}.tooltip"] = about["output_tooltips"][index]
        texts |= {f"main.nodeCategories.{part}": part for part in about["category"].split("/")}
    return texts


def read(language: str) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, str):
            found[path] = value
        else:
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)

    for file in (LOCALES / language).glob("*.json"):
        walk(file.stem, json.loads(file.read_text("utf-8")))
    return found


def write(language: str, texts: dict[str, str]) -> None:
    files: dict[str, Any] = {}
    for path, text in texts.items():
        *parts, last = path.split(".")
        place = files
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = text
    for name, content in files.items():
        file = LOCALES / language / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def shown(texts: dict[str, str]) -> dict[str, str]:
    """Those that the page can show from a file; the others it takes from the node itself."""
    return {path: text for path, text in texts.items() if not TEMPLATE.search(text)}


@pytest.fixture
def wanted(server: comfyui.Server) -> dict[str, str]:
    return english(server.object_info())


def test_english_is_what_the_nodes_say(wanted):
    assert read("en") == shown(wanted), "run python -m tests.comfy.test_locales"


def test_chinese_says_all_that_english_says(wanted, server):
    chinese = {path: text for path, text in read("zh").items() if not path.startswith(WORDS)}
    assert chinese.keys() == wanted.keys()
    assert shown(chinese) == chinese and all(text.strip() for text in chinese.values())
    options = {
        f"nodeDefs.{node}.inputs.{name}.tooltip": set(map(str, spec[1]["options"]))
        for node, about in ours(server.object_info()).items()
        for inputs in about["input"].values()
        for name, spec in inputs.items()
        if spec[0] == "COMBO"
    }
    lost = {}
    for path, text in wanted.items():
        if path.endswith((".tooltip", ".description")):
            assert re.search(r"[\u4e00-\u9fff]", chinese[path]), path
            kept = set(KEPT.findall(text)) | options.get(path, set()) & set(re.findall(r"[\w.-]+", text))
            lost[path] = {word for word in kept if word not in chinese[path]}
    assert not {path: words for path, words in lost.items() if words}


def test_chinese_has_the_widgets_words():
    words = {path.removeprefix(WORDS): text for path, text in read("zh").items() if path.startswith(WORDS)}
    sources = "".join(path.read_text("utf-8") for path in (REPOSITORY / "web").glob("*.*js"))
    said = set(re.findall(r'\bt\(\s*"([^"\\]+)"', sources))
    assert len(said) > 60 and said <= words.keys(), said - words.keys()
    # The others are said by their variables: hints, a run's states, and what the server tells of a file.
    told = sources + "".join(path.read_text("utf-8") for path in (REPOSITORY / "nodes").rglob("*.py"))
    assert not {word for word in words.keys() - said if f'"{word}"' not in told and word != "file"}
    for english, text in words.items():
        assert text.strip() and set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", english)), english


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base, comfyui.Server(comfyui.find(), base=Path(base)) as running:
        SNAPSHOT.write_text(contract(running.object_info()))
        write("en", shown(english(running.object_info())))
