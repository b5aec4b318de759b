"""Adapter files in ComfyUI's ``loras`` folders: their names, the paths of these, and reading each file once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import comfy.model_management
import folder_paths
from comfy_execution.utils import get_executing_context
from torch import Tensor

from loha_core import Adapter, LoHaError, load_adapter
from loha_core.formats.container import SUFFIXES
from loha_core.formats.peft import CONFIG_NAME

FOLDER = "loras"
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
BUDGET = int(comfy.model_management.total_ram * 2**20) // 8
"""Bytes of adapters that are kept: an eighth of the machine's memory."""


@dataclass
class _Kept:
    adapter: Adapter
    fingerprint: str
    size: int  # bytes
    prompt: str | None  # the last one that used it


_kept: dict[tuple[Path, bool], _Kept] = {}  # by file and legacy_tucker; the one used last comes last


@dataclass(frozen=True)
class _Listing:
    """What lies in the folders, until something in one of them changes."""

    state: object  # ComfyUI's own listing, which it makes anew when a folder has changed
    listed: list[str]

    @cached_property
    def names(self) -> list[str]:
        folders = {name.rpartition(os.sep)[0] for name in self.listed}
        peft = _peft_folders(folders)
        parts = {
            folder for folder in folders if peft and not peft.isdisjoint((folder, *map(str, Path(folder).parents)))
        }
        files = {n for n in self.listed if n.lower().endswith(SUFFIXES) and n.rpartition(os.sep)[0] not in parts}
        return sorted(files | peft, key=str.lower)

    @cached_property
    def pictured(self) -> list[str]:
        return _pictured(self.names)


_last = _Listing(None, [])


def _listing() -> _Listing:
    global _last
    listed = folder_paths.get_filename_list(FOLDER)
    state = folder_paths.filename_list_cache.get(FOLDER)
    if state is None or _last.state is not state or _last.listed != listed:
        _last = _Listing(state, listed)
    return _last


def names() -> list[str]:
    """What a user can choose: adapter files, and PEFT folders by the name of the outermost folder."""
    return list(_listing().names)


def pictured() -> list[str]:
    """Those of the names that have a picture beside them."""
    return list(_listing().pictured)


def _peft_folders(folders: Iterable[str]) -> set[str]:
    """Those that hold an adapter_config.json, or whose unet/, text_encoder/, … do; relative names.

    Each folder is looked at once, however many files are in it.
    """
    roots = folder_paths.get_folder_paths(FOLDER)
    found: set[str] = set()
    for folder in filter(None, folders):
        # Of folders of one name, the first counts: that is where `resolve` leads.
        path = next((path for root in roots if os.path.lexists(path := os.path.join(root, folder))), None)
        if path is not None and os.path.isfile(os.path.join(path, CONFIG_NAME)):
            outer, last = os.path.split(folder)
            is_part = last == "unet" or last.startswith(("text_encoder", "transformer"))
            found.add(outer if is_part and outer else folder)
    return found


def _pictured(chosen: Iterable[str]) -> list[str]:
    """Each folder is read once."""
    roots = folder_paths.get_folder_paths(FOLDER)
    stems: dict[str, set[str]] = {}
    found = []
    for name in chosen:
        folder, _, file = name.rpartition(os.sep)
        if folder not in stems:
            beside = (file for root in roots for file in _listed(os.path.join(root, folder)))
            pictures = (file.rpartition(".")[0] for file in beside if file.endswith(tuple(PICTURES)))
            stems[folder] = {stem.removesuffix(".preview") for stem in pictures}
        if stems[folder] and stem_of(file) in stems[folder]:
            found.append(name)
    return found


def stem_of(name: str) -> str:
    """A file's name without its suffix, or a PEFT folder's as it is: pictures beside are called by it."""
    return os.path.splitext(name)[0] if name.lower().endswith(SUFFIXES) else name


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # the folder is in another root
        return []


def resolve(name: str) -> Path:
    """The path of an adapter's name from the graph, which must lead to a place inside ComfyUI's model folders.

    Raises:
        LoHaError: no such file, a link that leads nowhere, or to a place outside.
    """
    if not name:
        raise LoHaError(
            f"no adapter is chosen; put a LoHa file or PEFT folder into ComfyUI's folder models/{FOLDER}, press R in "
            "the page, and choose it"
        )
    parts = Path(name).parts
    leads_out = not parts or ".." in parts or "\0" in name or Path(name).is_absolute()
    path = None if leads_out else _locate(Path(name))
    if path is None:
        raise LoHaError(f"{name!r}: no such adapter in ComfyUI's {FOLDER} folders; refresh the list and choose again")
    real = path.resolve()
    allowed = [Path(root).resolve() for root in (folder_paths.models_dir, *folder_paths.get_folder_paths(FOLDER))]
    if not path.exists():
        raise LoHaError(
            f"{name!r}: a link to a file that is not there; it was moved or deleted, or its drive is not mounted. "
            "Restore it, or delete the link"
        )
    for inner in (real, *(child.resolve() for child in _files(path))):
        if not any(inner.is_relative_to(root) for root in allowed):
            raise LoHaError(
                f"{name!r}: a link out of ComfyUI's model folders, and only what lies in them is opened. Name the "
                f"folder it leads to ({inner.parent.name!r}) under loras in extra_model_paths.yaml and restart: "
                "then the link and the file itself can be loaded; or put the file in the link's place"
            )
    return path


def load(name: str, *, legacy_tucker: bool = False) -> Adapter:
    """The adapter of that name; read again only when the file has changed, or when there was no room to keep it."""
    path, current = resolve(name), fingerprint(name)
    for key in [key for key, kept in _kept.items() if key[0] == path and kept.fingerprint != current]:
        del _kept[key]
    key, prompt = (path, legacy_tucker), _prompt()
    if key in _kept:
        _kept[key] = _kept.pop(key)
        _kept[key].prompt = prompt
    else:
        adapter = load_adapter(path, legacy_tucker=legacy_tucker)
        adapter.source = name
        _kept[key] = _Kept(adapter, current, _bytes(adapter), prompt)
        _make_room(prompt)
    return _kept[key].adapter


def _make_room(prompt: str | None) -> None:
    """Forget what was used longest ago, but nothing that this prompt has used: its next run, with another strength,
    uses all of that again. Called when a file was read; a prompt that reads none uses what is kept already.
    """
    excess = sum(kept.size for kept in _kept.values()) - BUDGET
    for key, kept in list(_kept.items())[:-1]:
        if excess > 0 and (prompt is None or kept.prompt != prompt):
            del _kept[key]
            excess -= kept.size


def _prompt() -> str | None:
    context = get_executing_context()
    return None if context is None else context.prompt_id


def _bytes(adapter: Adapter) -> int:
    """What its tensors hold, each storage once."""
    factors: Iterable[Tensor] = (t for f in adapter.layers.values() for t in f.tensors().values())
    storages = [t.untyped_storage() for t in (*factors, *adapter.extras.values())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def fingerprint(name: str) -> str:
    """Modification times and sizes of what the name stands for: changes when the file does."""
    path = resolve(name)
    stats = [child.stat() for child in (_files(path) or [path])]
    return ";".join(f"{s.st_mtime_ns}:{s.st_size}" for s in stats)


def _locate(name: Path) -> Path | None:
    candidates = (Path(root) / name for root in folder_paths.get_folder_paths(FOLDER))
    return next((path for path in candidates if os.path.lexists(path)), None)


def _files(path: Path) -> list[Path]:
    """The files of a PEFT folder."""
    if not path.is_dir():
        return []
    return sorted(child for child in path.glob("**/adapter_*") if len(child.relative_to(path).parts) <= 2)
