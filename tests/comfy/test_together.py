"""Live adapters beside what else people put on a model: ControlNet, hooks, torch.compile, other packs' forwards."""

from __future__ import annotations

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import pytest
import torch

from loha_core import load_adapter

from . import reduced
from .test_live import close, run


@pytest.fixture(scope="module")
def models():
    return reduced.build("sd15")


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    return load_adapter(reduced.write(models, "kohya", tmp_path_factory.mktemp("adapters"))[0])


def test_torch_compile(modes, models, adapter):
    """As ComfyUI's TorchCompileModel node does it; the adapter may be changed under the compiled model."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    for strength in (0.7, -0.3):
        alive, _, _ = modes.apply(models.model, None, adapter, strength, 1.0, mode="live")
        wanted = run(alive)
        compiled = alive.clone()
        set_torch_compile_wrapper(compiled, backend="eager")
        comfy.model_management.load_models_gpu([compiled])
        assert close(run(compiled), wanted)


def test_hooks(modes, models, adapter):
    """A conditioning hook patches weights for some prompts only; live adapters act on top of either."""
    key = "diffusion_model.middle_block.1.proj_in.weight"
    weight = models.model.model.state_dict()[key]
    diff = torch.randn_like(weight) * 0.3
    alive, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="live")
    hook, group = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0), comfy.hooks.HookGroup()
    hook.need_weight_init = False
    group.add(hook)
    alive.add_hook_patches(hook=hook, patches={key: ("diff", (diff,))}, strength_patch=1.0)
    without = run(alive)
    alive.patch_hooks(group)
    hooked = run(alive, load=False)
    alive.unpatch_hooks()
    reference = models.model.clone()
    reference.add_patches({key: ("diff", (diff,))}, 1.0)
    reference, _, _ = modes.apply(reference, None, adapter, 0.7, 1.0, mode="merge")
    assert close(hooked, run(reference)) and not close(without, hooked)


def test_another_packs_forward_stays_beneath(modes, models, adapter):
    module = models.model.model.diffusion_model.middle_block[0].in_layers[2]
    original = module.forward
    module.forward = lambda x: original(x) * 1.5
    try:
        merged, _, _ = modes.apply(models.model, None, adapter, 0.4, 1.0, mode="merge")
        alive, _, _ = modes.apply(models.model, None, adapter, 0.4, 1.0, mode="live")
        wanted = run(merged)
        assert close(run(alive), wanted)
        comfy.model_management.unload_all_models()
        assert "forward" in vars(module)
    finally:
        del module.forward


def test_controlnet_sees_the_plain_features_of_its_own_network(modes, models, adapter):
    """ControlNet's residuals enter between the layers; live and merged take them alike."""
    merged, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="merge")
    alive, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="live")
    torch.manual_seed(1)
    control = {"middle": [torch.randn(1, 128, 2, 2)], "output": [torch.randn(1, 128, 2, 2)]}
    results = []
    for patcher in (merged, alive):
        comfy.model_management.load_models_gpu([patcher])
        x, context = torch.ones(2, 4, 8, 8), torch.ones(2, 77, 768)
        with torch.inference_mode():
            copied = {name: list(values) for name, values in control.items()}
            results.append(patcher.model.apply_model(x, torch.full((2,), 3.0), c_crossattn=context, control=copied))
    assert close(*results)
