"""An adapter by prompt, place and time: LoHa Hook beside ComfyUI's own weight hooks, which patch weights for each."""

from __future__ import annotations

import gc
import hashlib
import sys

import comfy.hooks
import comfy.model_management
import comfy.sample
import comfy.utils
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import nodes_hooks
from safetensors.torch import load_file, save_file
from torch import nn

from loha_core import LoHaError, load_adapter

from . import bases, reduced

SIZE, STEPS = 8, 4
LEFT = torch.zeros(SIZE * 8, SIZE * 8)
LEFT[:, : SIZE * 4] = 1


@pytest.fixture(scope="module")
def host(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.hooks"]


@pytest.fixture(scope="module")
def models():
    return reduced.build("sd15")


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Two LoHas of all layers."""
    path, _ = reduced.write(models, "kohya", tmp_path_factory.mktemp("adapters"))
    torch.manual_seed(9)
    tensors = {k: t if k.endswith("alpha") else torch.randn_like(t) * 0.3 for k, t in load_file(path).items()}
    save_file(tensors, path.with_name("other.safetensors"))
    return path, path.with_name("other.safetensors")


def native(path, model=1.0, clip=1.0):
    return comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(str(path)), model, clip)


@pytest.fixture(scope="module")
def ours(host):
    adapters = {}

    def create(path, model=1.0, clip=1.0):
        adapters.setdefault(path, load_adapter(path))
        return host.create(adapters[path], model, clip)

    return create


def prompt(seed, hooks=None, mask=None, steps=None, area="default"):
    torch.manual_seed(seed)
    conditioning = [[torch.randn(1, 77, 768), {}]]
    return comfy.hooks.set_conds_props(
        [conditioning], strength=1.0, set_cond_area=area, mask=mask, hooks=hooks, timesteps_range=steps
    )[0]


def sampled(model, positive, negative, callback=None):
    torch.manual_seed(3)
    noise, latent = torch.randn(2, 4, SIZE, SIZE), torch.zeros(2, 4, SIZE, SIZE)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, 4.0, "euler", "normal", positive, negative, latent,
            disable_pbar=True, callback=callback, seed=1,
        )  # fmt: skip


def error(found, wanted) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def digest(module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def keyframes(*points, guarantee=0):
    group = comfy.hooks.HookKeyframeGroup()
    for strength, start in points:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=guarantee))
    return group


def with_keyframes(hooks, *points, **options):
    hooks = hooks.clone()
    hooks.set_keyframes_on_hooks(keyframes(*points, **options))
    return hooks


# --- one scene with each kind of hook: files -> positive and negative conditioning ---------------------------------


def masks(make, one, two):
    a, b = make(one), make(two, 0.6)
    return prompt(1, a, LEFT) + prompt(2, b, 1 - LEFT), prompt(3, a, LEFT) + prompt(3, b, 1 - LEFT)


def bounds_of_masks(make, one, two):
    positive = prompt(1, make(one), LEFT, area="mask bounds") + prompt(2, make(two), 1 - LEFT, area="mask bounds")
    return positive, prompt(3)


def prompt_only(make, one, two):
    return prompt(1, make(one, 0.8)), prompt(3)


def other_hooks_on_the_negative(make, one, two):
    return prompt(1, make(one)), prompt(3, make(two, -0.7))


def several_on_one_prompt(make, one, two):
    return prompt(1, comfy.hooks.HookGroup.combine_all_hooks([make(one, 0.4), make(two, 0.5)])), prompt(3, make(two))


def keyframes_of_strength(make, one, two):
    hooks = with_keyframes(make(one), (1.0, 0.0), (0.3, 0.4), (-0.5, 0.7))
    return prompt(1, hooks), prompt(3)


def keyframes_by_interpolation(make, one, two):
    (group,) = nodes_hooks.CreateHookKeyframesInterpolated().create_hook_keyframes(0.0, 1.0, "ease_in", 0.0, 1.0, 5)
    hooks = make(one).clone()
    hooks.set_keyframes_on_hooks(group)
    return prompt(1, hooks), prompt(3, hooks)


def one_hook_with_two_keyframes(make, one, two):
    """The prompts' hooks are one to ComfyUI, but for their keyframes."""
    hook = make(one)
    return prompt(1, with_keyframes(hook, (0.2, 0.0), (1.0, 0.5))), prompt(3, with_keyframes(hook, (0.9, 0.0)))


def ranges_of_timesteps(make, one, two):
    positive = prompt(1, make(one), steps=(0.0, 0.5)) + prompt(1, make(two), steps=(0.5, 1.0))
    return positive, prompt(3)


def beside_a_native_hook(make, one, two):
    both = comfy.hooks.HookGroup.combine_all_hooks([native(one, 0.5), make(two, 0.5)])
    return prompt(1, both, LEFT) + prompt(2, make(one), 1 - LEFT), prompt(3, native(two, 0.3))


def a_default_prompt(make, one, two):
    positive = comfy.hooks.set_default_conds_and_combine([prompt(1, make(one), LEFT)], [prompt(2)], hooks=make(two))[0]
    return positive, prompt(3)


def strength_0(make, one, two):
    return prompt(1, make(one, 0.0, 1.0), LEFT) + prompt(2, make(two), 1 - LEFT), prompt(3)


SCENES = [
    masks, bounds_of_masks, prompt_only, other_hooks_on_the_negative, several_on_one_prompt, keyframes_of_strength,
    keyframes_by_interpolation, one_hook_with_two_keyframes, ranges_of_timesteps, beside_a_native_hook,
    a_default_prompt, strength_0,
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_as_comfyuis_own_weight_hooks(models, files, ours, injection, scene):
    model, network = models.model, models.model.model
    before, plain = digest(network), sampled(model, prompt(1), prompt(3))
    wanted = sampled(model, *scene(native, *files))
    held = dict(vars(model))

    written = {name: p._version for name, p in network.named_parameters()}
    found = sampled(model, *scene(ours, *files))
    effect = error(wanted, plain)
    assert effect > 1e-4 and error(found, wanted) < min(1e-4, effect / 100)
    if scene is not beside_a_native_hook:
        assert written == {name: p._version for name, p in network.named_parameters()}, "a weight was written"
    assert digest(network) == before

    assert type(model) is type(models.model.clone()) and not model.injections and not model.wrappers
    assert {name: vars(model)[name] for name in held if name not in ("patches_uuid", "hook_patches")} == {
        name: held[name] for name in held if name not in ("patches_uuid", "hook_patches")
    }
    assert network not in injection.LiveAdapters.injected
    assert torch.equal(sampled(model, prompt(1), prompt(3)), plain)


def test_runs_do_not_add_up(models, files, ours):
    results = []
    for strength in (1.0, 0.3, 0.3, 1.0):
        results.append(sampled(models.model, prompt(1, ours(files[0], strength)), prompt(3)))
    first, second, same, again = results
    assert torch.equal(first, again) and torch.equal(second, same) and error(first, second) > 1e-3
    hooks = ours(files[0], 0.3)
    for _ in range(2):
        assert torch.equal(sampled(models.model, prompt(1, hooks), prompt(3)), second)


@pytest.mark.parametrize("scheduled", (False, True))
def test_on_top_of_a_live_adapter(modes, models, files, ours, scheduled):
    """Also where weight hooks patch beside it: ComfyUI then asks for all weights, which a schedule must not refuse."""
    adapter = load_adapter(files[1])
    alive, _, _ = modes.apply(
        models.model, None, adapter, 0.5, 0.0, mode="live", schedule=(lambda percent: 1.0) if scheduled else None
    )
    merged, _, _ = modes.apply(models.model, None, adapter, 0.5, 0.0, mode="merge")
    plain = sampled(alive, prompt(1), prompt(3))
    for scene in (masks, beside_a_native_hook):
        assert error(sampled(alive, *scene(ours, *files)), sampled(merged, *scene(native, *files))) < 1e-4
    assert error(sampled(alive, prompt(1), prompt(3)), plain) == 0


def test_an_error_while_sampling_leaves_the_model_as_it_was(models, files, ours, injection):
    def stop(step, *_):
        raise InterruptedError

    plain = sampled(models.model, prompt(1), prompt(3))
    with pytest.raises(InterruptedError):
        sampled(models.model, *masks(ours, *files), callback=stop)
    assert models.model.model not in injection.LiveAdapters.injected
    assert torch.equal(sampled(models.model, prompt(1), prompt(3)), plain)


def test_layers_are_prepared_once_a_run(models, files, ours, injection, monkeypatch):
    """Not at each change from one prompt to the next."""
    inject, times = injection.LiveAdapters._inject, []
    monkeypatch.setattr(
        injection.LiveAdapters, "_inject", lambda live, patcher: (times.append(1), inject(live, patcher))
    )
    sampled(models.model, *masks(ours, *files))
    assert len(times) <= 2


def test_blocks(host, models, files):
    adapter = load_adapter(files[0])
    without = host.create(adapter, 1.0, 1.0, lambda key, name: 0.0)
    middle = host.create(adapter, 1.0, 1.0, lambda key, name: float("middle_block" in key))
    plain = sampled(models.model, prompt(1), prompt(3))
    found = sampled(models.model, prompt(1, middle), prompt(3, middle))
    tensors = comfy.utils.load_torch_file(str(files[0]))
    part = comfy.hooks.create_hook_lora({k: t for k, t in tensors.items() if "mid_block" in k}, 1.0, 1.0)
    assert error(sampled(models.model, prompt(1, without), prompt(3, without)), plain) < 1e-5
    assert error(found, sampled(models.model, prompt(1, part), prompt(3, part))) < 1e-4 and error(found, plain) > 1e-4


def test_torch_compile(models, files, ours):
    compiled = models.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    wanted = sampled(models.model, *masks(ours, *files))
    assert error(sampled(compiled, *masks(ours, *files)), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["GGUF Q8_0", "int8", "NF4"])
def test_on_a_quantised_base(modes, files, ours, kind):
    """Hooks on both prompts are as the live adapter on the model is; on one only, another picture."""
    models = reduced.build("sd15")
    patcher = None
    for module in models.model.model.diffusion_model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= 64 and child.bias is not None:
                base = bases.BASES[kind](child.weight.data, child.bias.data)
                setattr(module, name, base.layer)
                patcher = base.patcher
    model = patcher(models.model.model, load_device=bases.CPU, offload_device=bases.CPU)
    comfy.model_management.load_models_gpu([model])  # torch moves no quantised tensors in inference mode
    alive, _, _ = modes.apply(model, None, load_adapter(files[0]), 0.7, 0.0, mode="live")
    hooks, plain = ours(files[0], 0.7), sampled(model, prompt(1), prompt(3))
    wanted = sampled(alive, prompt(1), prompt(3))
    assert error(sampled(model, prompt(1, hooks), prompt(3, hooks)), wanted) < 1e-5 and error(wanted, plain) > 1e-3
    assert error(sampled(model, prompt(1, hooks), prompt(3)), wanted) > 1e-3
    assert torch.equal(sampled(model, prompt(1), prompt(3)), plain)


# --- text encoders -------------------------------------------------------------------------------------------------


def set_hooks(clip, hooks, schedule=False):
    return nodes_hooks.SetClipHooks().apply_hooks(clip, schedule, True, hooks)[0]


def encoded(clip):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled({"l": [[(7, 1.0)] * 77]}, show_pbar=False)


def texts_agree(found, wanted) -> bool:
    return all(
        error(a[0], b[0]) < 1e-4 and a[1].get("clip_start_percent") == b[1].get("clip_start_percent")
        for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("schedule", (False, True))
def test_text_encoders(models, files, ours, schedule):
    network, plain = models.clip.cond_stage_model, encoded(models.clip)
    before = digest(network)

    def both(make):
        hooks = [make(files[0], 0.0, 0.7), with_keyframes(make(files[1], 1.0, 0.5), (1.0, 0.0), (0.2, 0.6))]
        return comfy.hooks.HookGroup.combine_all_hooks(hooks)

    wanted = encoded(set_hooks(models.clip, both(native), schedule))
    hooked = set_hooks(models.clip, both(ours), schedule)
    found = encoded(hooked)
    assert len(found) == 1 + schedule and texts_agree(found, wanted) and not texts_agree(found[:1], plain)
    assert len(found[0][1]["hooks"]) == 2
    layered = hooked.clone()
    layered.clip_layer(-2)
    other = set_hooks(models.clip, both(native), schedule)
    other.clip_layer(-2)
    assert texts_agree(encoded(layered), encoded(other))
    assert torch.equal(encoded(models.clip)[0][0], plain[0][0]) and texts_agree(encoded(hooked), wanted)
    del hooked, layered, other
    gc.collect()
    assert torch.equal(encoded(models.clip)[0][0], plain[0][0]) and digest(network) == before


def test_hooks_set_anew_replace_those_set_before(models, files, ours):
    first = set_hooks(models.clip, ours(files[0]))
    hooks, wanted = ours(files[1]), encoded(set_hooks(models.clip, native(files[1])))
    assert texts_agree(encoded(set_hooks(first, hooks)), wanted)
    assert texts_agree(encoded(set_hooks(set_hooks(first, hooks), hooks)), wanted)
    assert texts_agree(encoded(set_hooks(first, native(files[1]))), wanted)


def test_text_hooks_on_top_of_live_and_beneath_it(modes, models, files, ours):
    adapter = load_adapter(files[1])
    alive, merged = (modes.apply(None, models.clip, adapter, 0.0, 0.5, mode=mode)[1] for mode in ("live", "merge"))
    wanted = encoded(set_hooks(merged, native(files[0])))
    assert texts_agree(encoded(set_hooks(alive, ours(files[0]))), wanted)
    above = modes.apply(None, set_hooks(models.clip, ours(files[0])), adapter, 0.0, 0.5, mode="live")[1]
    assert texts_agree(encoded(above), wanted)


def test_merges_of_models_leave_hooks_out_as_they_leave_comfyuis(models, files, ours):
    hooked = set_hooks(models.clip, ours(files[0]))
    assert hooked.get_key_patches().keys() == models.clip.get_key_patches().keys()
    assert all(len(patches) == 1 for patches in hooked.get_key_patches().values())


def test_saving_hooked_text_encoders_is_refused(models, files, ours):
    hooked = set_hooks(models.clip, ours(files[0]))
    with pytest.raises(LoHaError, match="before its hooks were set"):
        if hasattr(hooked.patcher, "model_state_dict_for_saving"):
            hooked.patcher.model_state_dict_for_saving()
        comfy.model_management.load_models_gpu([hooked.patcher], force_patch_weights=True)


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_a_file_for_another_model_is_refused(host, files, models, tmp_path):
    save_file({k.replace("lora_unet_", "lora_unet_x"): t for k, t in load_file(files[0]).items()}, tmp_path / "x.sft")
    hooks = host.create(load_adapter(tmp_path / "x.sft"), 1.0, 1.0)
    with pytest.raises(LoHaError, match="nothing in this file fits"):
        sampled(models.model, prompt(1, hooks), prompt(3))


def test_a_file_for_one_network_leaves_the_other_alone(host, files, models, tmp_path):
    unet = {k: t for k, t in load_file(files[0]).items() if k.startswith("lora_unet_")}
    text = {k: t for k, t in load_file(files[0]).items() if not k.startswith("lora_unet_")}
    plain, plain_text = sampled(models.model, prompt(1), prompt(3)), encoded(models.clip)
    save_file(unet, tmp_path / "unet.sft")
    save_file(text, tmp_path / "text.sft")
    hooks = {name: host.create(load_adapter(tmp_path / f"{name}.sft"), 1.0, 1.0) for name in ("unet", "text")}
    assert torch.equal(encoded(set_hooks(models.clip, hooks["unet"]))[0][0], plain_text[0][0])
    assert error(sampled(models.model, prompt(1, hooks["text"]), prompt(3)), plain) < 1e-5
    assert not texts_agree(encoded(set_hooks(models.clip, hooks["text"])), plain_text)
    assert error(sampled(models.model, prompt(1, hooks["unet"]), prompt(3)), plain) > 1e-3


def test_layers_that_live_mode_cannot_reach_are_refused_by_name(models, files, ours, live, monkeypatch):
    class Odd(nn.Module):
        """Of another pack: it has a weight, and nobody knows what it does with it."""

        def __init__(self, weight):
            super().__init__()
            self.weight = nn.Parameter(weight, requires_grad=False)

    block = models.model.model.diffusion_model.middle_block[1]
    monkeypatch.setitem(block._modules, "proj_in", Odd(block.proj_in.weight.data))
    with pytest.raises(LoHaError, match=r"middle_block\.1\.proj_in\.weight.*Odd.*Create Hook LoRA"):
        sampled(models.model, prompt(1, ours(files[0])), prompt(3))


def test_several_gpus_are_refused(models, files, ours):
    model = models.model.clone()
    model.set_additional_models("multigpu", [models.model.clone()])
    with pytest.raises(LoHaError, match="several"):
        model.register_all_hook_patches(
            ours(files[0]), comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model), {}
        )


def test_hooks_outside_of_a_sampler_are_refused(models, files, ours):
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    with pytest.raises(LoHaError, match="Cond Set Props"):
        models.model.clone().register_all_hook_patches(ours(files[0]), target)


def test_the_node(pack, files, models):
    node = sys.modules[f"{pack.__name__}.nodes.graph.hook"].LoHaHook
    adapter, other = load_adapter(files[0]), native(files[1], 0.5)
    (alone,), (both,) = node.execute(adapter, 0.6, 0.2).args, node.execute(adapter, 0.6, 0.2, prev_hooks=other).args
    assert len(alone) == 1 and len(both) == 2 and len(other) == 1
    (none,) = node.execute(adapter, 0.0, 0.0, prev_hooks=other).args
    assert none.hooks == other.hooks
    found = sampled(models.model, prompt(1, both), prompt(3))
    wanted = comfy.hooks.HookGroup.combine_all_hooks([native(files[0], 0.6), other])
    assert error(found, sampled(models.model, prompt(1, wanted), prompt(3))) < 1e-4
    with pytest.raises(LoHaError, match="strength_model"):
        node.execute(adapter, float("nan"), 0.0)
    named = {"loha": adapter, "strength_model": 0.6, "strength_clip": 0.2}
    (nowhere,) = node.execute(**named, blocks=lambda key, name: 0.0).args
    found = sampled(models.model, prompt(1, nowhere), prompt(3))
    assert error(found, sampled(models.model, prompt(1), prompt(3))) < 1e-5
