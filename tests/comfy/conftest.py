"""ComfyUI in this process for the patcher's tests, and one real server for the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from demo import comfyui

comfyui.importable()  # before anything imports comfy
torch.set_num_threads(1)  # many small tensors: a second thread costs more than it brings

REPOSITORY = Path(__file__).resolve().parents[2]


def load_pack() -> ModuleType:
    """The pack, from its folder, as ComfyUI loads custom nodes."""
    name = "ComfyUI-LoHa"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        asyncio.run(sys.modules[name].comfy_entrypoint())
    return sys.modules[name]


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    return load_pack()


def _module(name: str) -> Callable[[ModuleType], ModuleType]:
    """A fixture that gives one of the pack's modules."""

    @pytest.fixture(scope="session")
    def found(pack: ModuleType) -> ModuleType:
        return sys.modules[f"{pack.__name__}.nodes.{name}"]

    return found


bridge = _module("host.modes")
patches, live, acting, weights = (_module(f"host.{name}") for name in ("patches", "live", "acting", "weights"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfyui.Server]:
    """One ComfyUI for the whole run, with this pack in its custom_nodes."""
    with comfyui.Server(comfyui.find(), base=tmp_path_factory.mktemp("comfyui"), start_timeout=600) as running:
        yield running
