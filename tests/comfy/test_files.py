"""Names from the graph lead into ComfyUI's model folders and nowhere else."""

from __future__ import annotations

import sys

import folder_paths
import pytest

from loha_core import LoHaError


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    root = tmp_path / "models" / "loras"
    root.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(root)], {".safetensors", ".pt"}))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    folder_paths.filename_list_cache.pop("loras", None)
    return sys.modules[f"{pack.__name__}.nodes.files"]


def test_links_within_the_model_folders_are_fine(files, tmp_path):
    real = tmp_path / "models" / "shared" / "a.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"x")
    link = tmp_path / "models" / "loras" / "a.safetensors"
    link.symlink_to(real)
    assert files.resolve("a.safetensors") == link


def test_links_out_of_them_are_not(files, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (tmp_path / "models" / "loras" / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(LoHaError, match="outside ComfyUI's model folders"):
        files.resolve("a.safetensors")


def test_nor_links_inside_a_peft_folder(files, tmp_path):
    folder = tmp_path / "models" / "loras" / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(LoHaError, match="outside ComfyUI's model folders"):
        files.resolve("peft")


@pytest.mark.parametrize("name", ["../x.safetensors", "a/../../x.safetensors", "/etc/hosts", "a\0b", "", "."])
def test_names_that_climb_out_are_refused(files, tmp_path, name):
    (tmp_path / "models" / "x.safetensors").write_bytes(b"x")
    with pytest.raises(LoHaError, match="no such adapter"):
        files.load(name)
