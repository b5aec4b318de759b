"""The archive that the registry would get, and a clean ComfyUI with nothing but that installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo import comfyui

from ..browser.conftest import browser, ready, shoot  # noqa: F401

comfyui.importable()  # before anything imports comfy

REPOSITORY = comfyui.REPOSITORY
FOLDER = "comfyui-loha"
"""What an archive from the registry is unpacked to: the project's name, not the repository's."""


def run(folder: Path, *command: str) -> str:
    # comfy-cli keeps settings in the home folder, and would ask whether it may send statistics.
    quiet = os.environ | {"HOME": str(folder.parent), "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=quiet, **pipes, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comfy-cli packs of the tracked files, as they are now: in a copy, where it may leave what it writes."""
    copy = tmp_path_factory.mktemp("archive") / "copy"
    for name in run(REPOSITORY, "git", "ls-files", "-z").split("\0"):
        if (REPOSITORY / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, copy / name)
    run(copy, "git", "init", "--quiet")
    run(copy, "git", "add", "--force", ".")
    comfy = (sys.executable, "-m", "comfy_cli", "--skip-prompt")
    said = run(copy, *comfy, "node", "validate")
    assert "All validation checks passed" in said, said
    run(copy, *comfy, "node", "pack")
    return copy / "node.zip"


@pytest.fixture(scope="session")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive where ComfyUI-Manager and comfy-cli put it."""
    folder = tmp_path_factory.mktemp("clean") / "custom_nodes" / FOLDER
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def server(unpacked: Path) -> Iterator[comfyui.Server]:
    """A ComfyUI whose only pack is the unpacked archive."""
    with comfyui.Server(comfyui.find(), base=unpacked.parents[1], pack=None, start_timeout=600) as running:
        yield running
