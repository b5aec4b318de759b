"""ComfyUI in this process for the patcher's tests, and one real server for the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from demo import comfyui

comfyui.importable()  # before anything imports comfy
# Many small tensors: a second thread costs more than it brings, here and in the server.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

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


modes, patches, live, injection, acting, weights = (
    _module(f"host.{name}") for name in ("modes", "patches", "live", "injection", "acting", "weights")
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[comfyui.Server]:
    """One ComfyUI for the whole run, with this pack in its custom_nodes."""
    with comfyui.Server(comfyui.find(), base=tmp_path_factory.mktemp("comfyui"), start_timeout=600) as running:
        yield running


@pytest.fixture(scope="session")
def ready(server: comfyui.Server) -> comfyui.Server:
    """The demo's checkpoint, and in its LoHa's place random LoHas on all of its layers: nothing is trained here."""
    from demo import model, prepare, train_loha

    weights = model.load_int8(prepare.BASE)
    checkpoint = server.path("models", "checkpoints", prepare.CHECKPOINT)
    model.save_checkpoint(weights, checkpoint, {})
    with safe_open(checkpoint, "pt") as file:
        shapes = {k: file.get_slice(k).get_shape() for k in file.keys() if k.endswith(".weight")}
    names = {"model.diffusion_model.": "lora_unet_", "cond_stage_model.transformer.": "lora_te_"}
    for seed, file_name in enumerate((prepare.LOHA, "loha_demo_three.safetensors", "second.safetensors")):
        torch.manual_seed(seed)
        tensors = {}
        for key, shape in shapes.items():
            prefix = next((p for p in names if key.startswith(p)), None)
            if prefix is None or len(shape) < 2 or "embedding" in key:
                continue
            module = names[prefix] + key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
            columns = int(np.prod(shape[1:]))
            for name, size in (("w1_a", (shape[0], 4)), ("w1_b", (4, columns))):
                tensors[f"{module}.hada_{name}"] = torch.randn(size) * 0.24
                tensors[f"{module}.hada_{name.replace('1', '2')}"] = torch.randn(size) * 0.24
            tensors[f"{module}.alpha"] = torch.tensor(4.0)
        save_file(tensors, server.path("models", "loras", file_name))
    train_loha.write_pictures(server)
    server.object_info()
    return server
