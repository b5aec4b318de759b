"""Files of `loha train`, trained on diffusers' pipelines in their own environment: ComfyUI finds all their layers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import comfy.lora
import pytest
from safetensors.torch import load_file

from loha_core import load_adapter
from loha_core.naming.tables import FAMILIES
from loha_core.training.diffusers.families import FAMILIES as TRAINED

from ..reduced_families import PIPELINES
from .conftest import REPOSITORY
from .test_families import built
from .test_family_matrix import added, assert_same, by_us

PEERS = REPOSITORY / ".venv-peers" / "bin" / "python"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PEERS.exists():
        pytest.skip("needs the environment with diffusers beside this one: make test")
    folder = tmp_path_factory.mktemp("trained")
    command = [str(PEERS), "-m", "tests.core.trained", str(folder), *PIPELINES]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder


@pytest.mark.parametrize("family", PIPELINES)
def test_comfyui_s_own_loader_finds_all_of_it(pack, trained, family):
    path = trained / family / "out" / "mine.safetensors"
    adapter = load_adapter(path)
    _, model = built(FAMILIES[PIPELINES[family]])[0]
    keys = comfy.lora.model_lora_keys_unet(model, {})
    assert adapter.layers and not [name for name in adapter.layers if name not in keys]
    patches = comfy.lora.load_lora(load_file(path), keys, log_missing=False)
    assert len(patches) == len(adapter.layers)
    # Its update is the file's, weight by weight, and of the model's shapes.
    assert_same(added(model, patches.items()), by_us(pack, adapter, model))


def test_no_family_is_left_out() -> None:
    assert set(PIPELINES) == {name for name, family in TRAINED.items() if family.names != "keep"}
