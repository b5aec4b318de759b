"""The archive in a clean ComfyUI: everything is there, and the log has nothing to complain of."""

from __future__ import annotations

import json
import sys
import urllib.parse
from pathlib import Path

import pytest

from demo import comfyui
from demo.comfyui import Server

from .conftest import FOLDER


@pytest.fixture(scope="module")
def ours(server: Server) -> dict:
    """The nodes that come from the archive, by name."""
    return {
        name: info for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{FOLDER}"
    }


def shipped(folder: Path, pattern: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file()}


def test_every_node_and_its_help(server, unpacked, ours):
    pages = {path.stem for path in (unpacked / "web" / "docs").glob("*.md")}
    assert set(ours) == pages and len(ours) >= 17
    for name in ours:
        page = server.get_bytes(f"/extensions/{FOLDER}/docs/{name}.md").decode()
        assert page.startswith("# ") and ours[name]["description"]


def test_the_page_gets_its_scripts(server, unpacked):
    scripts = {f"/extensions/{FOLDER}/{name}" for name in shipped(unpacked / "web", "*.js")}
    assert scripts and scripts <= set(server.get("/extensions"))
    for name in shipped(unpacked / "web", "**/*"):
        url = f"/extensions/{FOLDER}/{urllib.parse.quote(name)}"
        assert server.get_bytes(url) == (unpacked / "web" / name).read_bytes()


def test_the_template_browser_has_the_example_workflows(server, unpacked, ours):
    folder = unpacked / "example_workflows"
    names = shipped(folder, "*.json")
    assert set(server.get("/workflow_templates")[FOLDER]) == {name.removesuffix(".json") for name in names}
    for name in shipped(folder, "*"):
        url = f"/api/workflow_templates/{FOLDER}/{urllib.parse.quote(name)}"
        assert server.get_bytes(url) == (folder / name).read_bytes()
    workflows = [json.loads((folder / name).read_text("utf-8")) for name in names]
    assert set(ours) <= {node["type"] for workflow in workflows for node in workflow["nodes"]}


def test_languages(server, unpacked, ours):
    languages = {path.name for path in (unpacked / "locales").iterdir()}
    told = server.get("/i18n")
    assert languages >= {"en", "zh"}
    for language in languages:
        assert set(ours) <= set(told[language]["nodeDefs"])


def test_the_routes_answer(server):
    assert server.get("/loha/adapters")["names"] is not None
    assert server.get("/loha/training")["runs"] is not None
    assert server.get("/loha/blocks?family=SD1.5")["family"] == "SD1.5"


def of_ours(log: str, *folders: Path) -> list[str]:
    """Lines of a log that are ours or name us, wherever these folders lie: their names say nothing of who speaks."""
    for folder in sorted(map(str, folders), key=len, reverse=True):
        log = log.replace(folder, "")
    return [line for line in log.splitlines() if "loha" in line.lower()]


def test_nothing_in_the_log_is_ours(server):
    """But the time that it took to import."""
    environments = (Path(sys.prefix), Path(sys.base_prefix), Path.home())
    lines = of_ours(server.log(), server.base, server.folder, comfyui.REPOSITORY, *environments)
    assert len(lines) == 1 and "seconds:" in lines[0] and lines[0].endswith(FOLDER)


def test_where_a_clone_lies_is_nothing_that_we_say():
    clone, base = Path("/home/me/ComfyUI-LoHa"), Path("/tmp/loha/clean")
    log = f"""Python executable: {clone}/.venv/bin/python
Set user directory to: {base}/user
{clone}/.venv/lib/python3.11/site-packages/torch/x.py:1: UserWarning: old
   0.1 seconds: {base}/custom_nodes/{FOLDER}"""
    fine, ours = f"   0.1 seconds: /custom_nodes/{FOLDER}", "LoHa: something is wrong"
    assert of_ours(log, clone, base) == [fine]
    trace = f"File {base}/custom_nodes/{FOLDER}/nodes/files.py"
    assert of_ours(f"{log}\n{ours}\n{trace}", clone, base) == [fine, ours, trace.replace(str(base), "")]
