"""What loha_core may import, hold and run: the house of CONTRIBUTING.md, kept by the code and not by promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from .processes import PATIENCE

ROOT = Path(__file__).parents[2]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("loha_core", "nodes")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
CORE = {name: path for name, path in SOURCES.items() if name.startswith("loha_core")}
FOREIGN = set("comfy comfy_api nodes web folder_paths server peft lycoris diffusers transformers".split())

# What a module may import when it is used; `test_importing_it_brings_in_nothing_foreign` sees that it waits until then.
LATER = {"loha_core.training.diffusers.pipeline": {"diffusers"}, "loha_core.peft": {"peft"}}

# They gather what the rooms offer, and are no room themselves.
FACES = {"loha_core", "loha_core.__main__", "nodes"}


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it may use, as CONTRIBUTING.md draws them: `room -> rooms` in its block of arrows."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    lines = re.findall(r"^ {4}([\w. ]+?) +-> ?(.*)$", text, re.MULTILINE)
    return {room: set(allowed.split()) for rooms, allowed in lines for room in rooms.split()}


ARROWS = arrows()


def reachable(room: str) -> set[str]:
    """All rooms below one."""
    below: set[str] = set()
    waiting = set(ARROWS[room])
    while waiting:
        below.add(next_one := waiting.pop())
        waiting |= ARROWS[next_one] - below
    return below


def room_of(module: str) -> str:
    """`loha_core.ops.apply` -> `ops`; `nodes.host.live` -> `nodes.host`."""
    top, *parts = module.split(".")
    return parts[0] if top == "loha_core" else ".".join([top, *parts[:1]])


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Absolute names of what a module imports, anywhere in it and for the type checker too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{name}.{alias.name}" for alias in node.names}
    return names


def modules_used(source: str, module: str, is_package: bool = False) -> set[str]:
    """Our modules among its imports; `from . import x` is x's, `from .x import y` too."""
    used = set()
    for name in imports(source, module, is_package):
        candidates = [name, name.rpartition(".")[0]]
        used |= {next((each for each in candidates if each in SOURCES), "")}
    return used - {"", module}


def wrong_arrows(source: str, module: str) -> set[str]:
    """Rooms that a module uses and must not."""
    room = room_of(module)
    used = {room_of(name) for name in modules_used(source, module) - FACES}
    return used - {room} - reachable(room)


def test_importing_it_brings_in_nothing_foreign():
    code = "import sys, loha_core, loha_core.cli, loha_core.training.diffusers.run; "
    code += f"print(sorted({FOREIGN!r} & {{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_no_source_runs_code_from_data():
    for module, path in CORE.items():
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        packages = {name.split(".")[0] for name in imports(source, module, path.name == "__init__.py")}
        forbidden = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "pty", "runpy", "code", "pip"}
        assert not packages & forbidden, module
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        assert not called & {"eval", "exec", "compile", "__import__"}, module
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not attributes & {"torch.load", "os.system", "os.popen", "torch.hub", "importlib.import_module"}, module


def test_core_imports_nothing_foreign():
    for module, path in CORE.items():
        packages = {name.split(".")[0] for name in imports(path.read_text("utf-8"), module, path.name == "__init__.py")}
        assert not packages & (FOREIGN - LATER.get(module, set())), module


def test_every_room_is_drawn():
    assert set(ARROWS) == {room_of(module) for module in SOURCES if module not in FACES}
    assert set().union(*ARROWS.values()) <= set(ARROWS)


@pytest.mark.parametrize("module", sorted(set(SOURCES) - FACES))
def test_imports_follow_the_arrows(module):
    # The public face gathers everything: to import from it is to use a room above.
    source = SOURCES[module].read_text("utf-8")
    is_package = SOURCES[module].name == "__init__.py"
    room = room_of(module)
    used = modules_used(source, module, is_package)
    if module.startswith("loha_core"):
        assert "loha_core" not in used
    assert {room_of(name) for name in used - FACES} - {room} - reachable(room) == set()


@pytest.mark.parametrize(("upper", "lower"), [(room, lower) for room, below in ARROWS.items() for lower in below])
def test_an_arrow_that_is_turned_round_is_seen(upper, lower):
    """A module of the lower room that imports from the upper one, in every way to write that."""
    lower_module, upper_module = (
        next(name for name in SOURCES if name not in FACES and room_of(name) == room) for room in (lower, upper)
    )
    parent, _, leaf = upper_module.rpartition(".")
    for source in (
        f"import {upper_module}",
        f"from {parent} import {leaf}",
        f"from {upper_module} import anything",
        f"def later():\n    from {upper_module} import anything",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {upper_module} import anything",
    ):
        assert wrong_arrows(source, lower_module) == {upper}, source


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        module: modules_used(path.read_text("utf-8"), module, path.name == "__init__.py") - FACES
        for module, path in SOURCES.items()
        if module not in FACES
    }
    # A package's own __init__ gathers its modules, as the faces do.
    packages = {module for module, path in SOURCES.items() if path.name == "__init__.py"}
    tuple(TopologicalSorter({m: used - packages for m, used in graph.items()}).static_order())
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(graph | {"loha_core.errors": {"loha_core.cli"}}).static_order())


def test_rooms_and_files_stay_small():
    for folder in {path.parent for path in CORE.values()}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 10, folder
    for module, path in SOURCES.items():
        assert len(path.read_text("utf-8").splitlines()) <= 400, module


def test_the_public_names_are_there():
    import loha_core

    assert all(hasattr(loha_core, name) for name in loha_core.__all__)
    assert len(loha_core.__all__) == len(set(loha_core.__all__)) >= 10


def test_ten_questions_have_one_file_each():
    """CONTRIBUTING's questions are answered by files that are there."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    answers = re.findall(r"^\| .+\? \| `([^`]+)` \|$", text, re.MULTILINE)
    assert len(answers) >= 10
    assert all((ROOT / answer).is_file() for answer in answers)
