"""What is in the archive, what is not, and what its code must not do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from demo import comfyui

from .conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

MOST_BYTES = 3_000_000
FILES = {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
SUFFIXES = {
    "loha_core": {".py", ".typed"},
    "nodes": {".py"},
    "web": {".js", ".mjs", ".css", ".md", ".png", ".jpg", ".webp"},
    "locales": {".json"},
    "example_workflows": {".json", ".jpg", ".webp"},
    "subgraphs": {".json"},
}
# What each line does that must not be in code that ships, written as it might slip in.
FORBIDDEN = """
exec("1")
eval("1")
os.system("ls")
os.popen("ls")
os.execvp("ls", ["ls"])
os.spawnl(os.P_WAIT, "ls")
import subprocess
from subprocess import run
import multiprocessing.pool
asyncio.create_subprocess_exec("ls")
import pip
from pip._internal import main
import pickle as p
from marshal import loads
import shelve
torch.load("x.pt")
importlib.import_module("x")
import socket
from socket import create_connection
import http.client
from urllib import request
import urllib.request
from xmlrpc.client import ServerProxy
torch.hub.load_state_dict_from_url("x")
aiohttp.ClientSession()
async with aiohttp.request("GET", "x"): pass
""".strip().splitlines()


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as packed:
        return set(packed.namelist())


def test_only_what_users_need(archive):
    for name in names(archive) - FILES:
        path = PurePosixPath(name)
        assert len(path.parts) > 1 and path.suffix in SUFFIXES.get(path.parts[0], ()), name
    assert FILES <= names(archive)
    assert archive.stat().st_size < MOST_BYTES


def test_all_of_what_users_need(archive):
    """Of the folders that ship, every tracked file does: an ignored pattern is easily too wide."""
    tracked = subprocess.run(
        ["git", "ls-files", *SUFFIXES], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {name for name in tracked if (REPOSITORY / name).exists()} <= names(archive)
    assert {name.split("/")[0] for name in names(archive)} >= {"loha_core", "nodes", "web", "example_workflows"}


def test_the_readme_shows_its_pictures(unpacked):
    """On the registry's page and in the unpacked folder alike."""
    for page in (unpacked / "README.md", *(unpacked / "web" / "docs").glob("*.md")):
        text = page.read_text("utf-8")
        for picture in re.findall(r'!\[[^]]*\]\(([^)\s]+)|<img[^>]+src="([^"]+)', text):
            target = "".join(picture)
            assert re.match(r"https://", target) or (page.parent / target).is_file(), f"{page.name}: {target}"


def ruff(folder: Path, *arguments: str, source: str | None = None) -> list[dict]:
    """What ruff finds by the rules that lie in the archive; comments that silence it are not heard."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore-noqa", "--output-format", "json"]
    done = subprocess.run([*command, *arguments], cwd=folder, input=source, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def test_no_forbidden_construct(unpacked):
    security = ("--select", "S102,S3,S60,TID251,E702", "--ignore", "S311,S608")
    assert ruff(unpacked, *security, ".") == []
    head = "import aiohttp, asyncio, importlib, os, torch\n"
    source = head + "async def f():\n" + "".join(f"    {line}\n" for line in FORBIDDEN)
    for place in ("nodes/x.py", "loha_core/training/x.py", "__init__.py"):
        found = ruff(unpacked, *security, "--stdin-filename", place, "-", source=source)
        missed = set(range(len(FORBIDDEN))) - {each["location"]["row"] - 3 for each in found}
        assert not missed, [FORBIDDEN[line] for line in missed]


def imports(path: Path) -> set[str]:
    """Top-level names of the packages a source file imports, at once or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def module(requirement: str) -> str:
    """What a requirement is imported as."""
    name = re.match(r"[\w-]*", requirement)[0].lower()
    return {"pillow": "PIL", "lion-pytorch": "lion_pytorch"}.get(name, name)


def test_comfyui_brings_what_it_imports(unpacked):
    """The nodes need what ComfyUI itself requires and no more; the library also knows the extras."""
    comfy = comfyui.find()
    required = {module(line) for line in (comfy / "requirements.txt").read_text().splitlines() if line[:1].isalpha()}
    own = {path.stem for path in comfy.iterdir() if path.suffix == ".py" or path.is_dir()}
    project = tomllib.loads((unpacked / "pyproject.toml").read_text())["project"]
    extras = {module(line) for lines in project["optional-dependencies"].values() for line in lines}
    known = set(sys.stdlib_module_names) | required | {"loha_core"}
    assert {module(line) for line in project["dependencies"]} <= required
    for path in (unpacked / "__init__.py", *(unpacked / "nodes").rglob("*.py")):
        assert not imports(path) - known - own, path
    for path in (unpacked / "loha_core").rglob("*.py"):
        assert not imports(path) - known - extras, path


def test_its_own_library_is_the_one_that_is_used(unpacked, tmp_path):
    """Even beside a loha_core that pip has installed; and it loads without a ComfyUI."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {str(unpacked / "__init__.py")!r})
pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
pack._share_core()
import loha_core
print(loha_core.__file__)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (str(unpacked / "loha_core" / "__init__.py"), "")
