"""Names from the graph lead into ComfyUI's model folders and nowhere else."""

from __future__ import annotations

import os
import sys

import folder_paths
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext

from loha_core import Adapter, LoHaError, LoHaFactors, save_adapter


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    root = tmp_path / "models" / "loras"
    root.mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(root)], {".safetensors", ".pt"}))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    folder_paths.filename_list_cache.pop("loras", None)
    return sys.modules[f"{pack.__name__}.nodes.host.files"]


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
    with pytest.raises(LoHaError, match="a link out of ComfyUI's model folders"):
        files.resolve("a.safetensors")


def test_what_a_refused_link_needs_is_what_it_says(files, tmp_path, monkeypatch):
    """Row 11 of issue 14: a download cache's links are listed; its folder in extra_model_paths.yaml opens them."""
    cache, loras = tmp_path / "drive" / "blobs", tmp_path / "models" / "loras"
    cache.mkdir(parents=True)
    (cache / "a.safetensors").write_bytes(b"x")
    (loras / "a.safetensors").symlink_to(cache / "a.safetensors")
    (loras / "more").symlink_to(cache)
    for name in ("a.safetensors", "more/a.safetensors"):
        with pytest.raises(LoHaError, match=r"'blobs'\) under loras in extra_model_paths\.yaml and restart") as refused:
            files.resolve(name)
        assert str(tmp_path) not in str(refused.value)  # the page is told no places of this machine
    kept = ([str(loras), str(cache)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", kept)
    assert files.resolve("a.safetensors") == loras / "a.safetensors"
    assert files.resolve("more/a.safetensors").read_bytes() == b"x"


def test_a_link_that_leads_nowhere_says_so(files, tmp_path):
    (tmp_path / "models" / "loras" / "a.safetensors").symlink_to(tmp_path / "gone.safetensors")
    with pytest.raises(LoHaError, match=r"'a\.safetensors': a link to a file that is not there.*delete the link"):
        files.resolve("a.safetensors")


def test_nor_links_inside_a_peft_folder(files, tmp_path):
    folder = tmp_path / "models" / "loras" / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(LoHaError, match="a link out of ComfyUI's model folders"):
        files.resolve("peft")


@pytest.mark.parametrize("name", ["../x.safetensors", "a/../../x.safetensors", "/etc/hosts", "a\0b", "", "."])
def test_names_that_climb_out_are_refused(files, tmp_path, name):
    (tmp_path / "models" / "x.safetensors").write_bytes(b"x")
    with pytest.raises(LoHaError, match="no such adapter|no adapter is chosen"):
        files.load(name)


# --- many of them -------------------------------------------------------------------------------


@pytest.fixture
def many(files, tmp_path):
    """2,000 names in 110 folders, every tenth with a picture; a PEFT folder, and one in parts."""
    root = tmp_path / "models" / "loras"
    for number in range(2000):
        folder = root / f"group {number % 10}" / f"set {number % 110 // 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:04d}.v2.safetensors").touch()
        if number % 10 == 0:
            suffix = (".png", ".preview.webp", ".jpg", ".preview.jpeg")[number % 4]
            (folder / f"{number:04d}.v2{suffix}").touch()
    for part in ("peft", "whole/unet", "whole/text_encoder"):
        (root / part).mkdir(parents=True)
        (root / part / "adapter_config.json").touch()
        (root / part / "adapter_model.safetensors").touch()
    (root / "whole.png").touch()
    (root / "group 1" / "notes.png").touch()
    return files


def test_pictures_beside_files(many):
    names = many.names()
    assert len(names) == 2002 and {"peft", "whole"} < set(names)
    pictured = many.pictured()
    assert len(pictured) == 201 and {os.path.join("group 0", "set 0", "0000.v2.safetensors"), "whole"} < set(pictured)


def test_folders_are_looked_at_once_however_many_files_lie_in_them(many, monkeypatch):
    """Counted, not timed: two questions to the file system for each folder, beside ComfyUI's own."""
    folder_paths.get_filename_list("loras")
    asked = []
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, own=own, **k: asked.append(a) or own(*a, **k))
    folders = 110 + 10 + 4
    folder_paths.get_filename_list("loras")
    own_calls = len(asked)
    asked.clear()
    names = many.names()
    assert len(asked) <= own_calls + 2 * folders
    asked.clear()
    many.pictured()
    assert len(asked) <= own_calls + folders
    asked.clear()
    assert (many.names(), len(many.pictured())) == (names, 201)
    assert len(asked) <= 2 * own_calls  # nothing beside ComfyUI's own


def test_what_is_put_into_a_folder_is_seen(many, tmp_path):
    """Names are kept; a file, a picture and a PEFT folder's configuration each make them anew."""
    root = tmp_path / "models" / "loras"
    (root / "plain").mkdir()
    (root / "plain" / "adapter_model.safetensors").touch()
    before, pictures = many.names(), many.pictured()
    new = root / "group 2" / "set 4" / "new.safetensors"
    new.touch()
    assert set(many.names()) - set(before) == {os.path.join("group 2", "set 4", "new.safetensors")}
    new.with_suffix(".png").touch()
    assert len(many.pictured()) == len(pictures) + 1
    (root / "plain" / "adapter_config.json").touch()
    assert set(many.names()) ^ set(before) == {
        os.path.join("group 2", "set 4", "new.safetensors"),
        os.path.join("plain", "adapter_model.safetensors"),
        "plain",
    }
    new.unlink()
    assert len(many.pictured()) == len(pictures)


# --- reading once -------------------------------------------------------------------------------

SIZE = 4 * 2 * 64 * 4  # bytes of each file's tensors


def write(path, value: float = 1.0) -> None:
    a, b = torch.full((64, 2), value), torch.full((2, 64), value)
    save_adapter(Adapter({"lora_unet_a": LoHaFactors(a, b, a, b, 2.0)}), path)


@pytest.fixture
def reads(files, monkeypatch, tmp_path):
    """Names of the files that were read; five of them are there."""
    for name in "abcde":
        write(tmp_path / "models" / "loras" / f"{name}.safetensors")
    read, own = [], files.load_adapter
    monkeypatch.setattr(files, "load_adapter", lambda path, **k: read.append(path.stem) or own(path, **k))
    monkeypatch.setattr(files, "_kept", {})
    return read


def prompt(files, number: int, names: str) -> None:
    """Loads them in turn, as the nodes of a prompt do."""
    with CurrentNodeContext(str(number), "1"):
        for name in names:
            assert files.load(f"{name}.safetensors").layers


def kept(files) -> set[str]:
    return {path.stem for path, _ in files._kept}


def test_a_stack_is_read_once_however_often_its_slider_moves(files, reads):
    for number in range(5):
        prompt(files, number, "abcd")
    assert reads == ["a", "b", "c", "d"]


@pytest.mark.parametrize("budget", [0, 2.5 * SIZE])
def test_what_one_prompt_needs_is_kept_whatever_the_budget(files, reads, monkeypatch, budget):
    monkeypatch.setattr(files, "BUDGET", budget)
    for number in range(5):
        prompt(files, number, "abcd")
    assert reads == ["a", "b", "c", "d"]


def test_beyond_the_budget_what_was_used_longest_ago_goes(files, reads, monkeypatch):
    monkeypatch.setattr(files, "BUDGET", 2 * SIZE)
    for number, name in enumerate("abac"):
        prompt(files, number, name)
    assert kept(files) == {"a", "c"} and files._bytes(files.load("a.safetensors")) == SIZE
    prompt(files, 4, "abcde")
    prompt(files, 5, "ab")
    assert kept(files) == set("abcde")  # nothing was read, so nothing had to go
    write(folder_paths.get_full_path("loras", "a.safetensors"), 2.0)
    prompt(files, 6, "a")
    assert kept(files) == {"a", "b"}


def test_a_file_that_changed_is_read_again_and_its_old_self_is_gone(files, reads, monkeypatch):
    first = files.load("a.safetensors")
    files.load("a.safetensors", legacy_tucker=True)
    path = folder_paths.get_full_path("loras", "a.safetensors")
    write(path, 2.0)
    os.utime(path, ns=(1, 1))
    seen = []
    own = files.load_adapter
    monkeypatch.setattr(files, "load_adapter", lambda *a, **k: seen.append(len(files._kept)) or own(*a, **k))
    second = files.load("a.safetensors")
    assert seen == [0] and len(files._kept) == 1
    assert not torch.equal(first.layers["lora_unet_a"].w1_a, second.layers["lora_unet_a"].w1_a)
    assert second.source == "a.safetensors"


def test_tensors_that_are_one_count_once(files):
    t = torch.zeros(2, 2, 3, 3)
    f = LoHaFactors(*torch.zeros(4, 2, 8), alpha=1.0, t1=t, t2=t)
    assert files._bytes(Adapter({"a": f}, {"b": torch.zeros(5)})) == 4 * (4 * 16 + 36 + 5)
