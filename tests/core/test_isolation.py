"""What loha_core may import, hold and run: the house of DESIGN §2 and §7, kept by the code and not by promise."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from .processes import PATIENCE

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loha_core"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOREIGN = {
    "comfy",
    "comfy_api",
    "nodes",
    "web",
    "folder_paths",
    "server",
    "peft",
    "lycoris",
    "diffusers",
    "transformers",
}

# What a module may import when it is used; `test_importing_it_brings_in_nothing_foreign` sees that it waits until then.
LATER = {"training/pipeline.py": {"diffusers"}}

# Lower layers know nothing of the higher.
FORBIDDEN = {
    "errors": {"*"},
    "algebra": {"adapter", "formats", "bind", "describe", "cli", "names"},
    "factors": {"adapter", "formats", "bind", "describe", "cli", "names"},
    "names": {"*"},
    "adapter": {"formats", "bind", "describe", "cli"},
    "formats": {"bind", "describe", "cli"},
    "bind": {"formats", "cli"},
    "describe": {"cli"},
}


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Absolute names of what a module imports, those for the type checker left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    package = ["loha_core", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{name}.{alias.name}" for alias in node.names}
    return found


def test_importing_it_brings_in_nothing_foreign():
    code = "import sys, loha_core, loha_core.cli, loha_core.training.diffusers.run; "
    code += f"print(sorted({FOREIGN!r} & {{name.split('.')[0] for name in sys.modules}}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_code_from_data(path):
    tree = ast.parse(path.read_text("utf-8"))
    modules = {name.split(".")[0] for name in imports(tree, path)}
    assert not modules & {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "pty", "runpy", "code", "pip"}
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "os.system", "os.popen", "torch.hub", "importlib.import_module"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    found = imports(ast.parse(path.read_text("utf-8")), path)
    later = LATER.get(path.relative_to(PACKAGE).as_posix(), set())
    assert not {name.split(".")[0] for name in found} & (FOREIGN - later)
    inside = {name.split(".")[1] for name in found if name.startswith("loha_core.")} - {module_of(path)}
    forbidden = FORBIDDEN.get(module_of(path), set())
    assert not inside & forbidden and not ("*" in forbidden and inside)


def test_the_public_names_are_there():
    import loha_core

    assert all(hasattr(loha_core, name) for name in loha_core.__all__)
    assert len(loha_core.__all__) == len(set(loha_core.__all__)) >= 10
