"""Blocks, schedules and stacks in a real server: what they do to a model, what they show, and their errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from demo import comfyui, workflows
from demo.comfyui import ComfyUIError, Server
from loha_core import LoHaError
from loha_core.blocks import BlockStrength, Layout, block_of_key

from . import reduced
from .test_sampling import draw  # noqa: F401  (what the demo's model in the server draws)

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS: dict[str, Any] = {"preset": "ALL", "vector": "", "rules": "", "family": "auto"}
SCHEDULE: dict[str, Any] = {
    "keyframes": "0: 0, 0.5: 1, 1: 0.3",
    "interpolation": "smooth",
    "start_percent": 0.1,
    "end_percent": 0.9,
}


def run(server: Server, node: str, **inputs: Any) -> dict:
    """What a preview of its picture, the node's second output, has."""
    preview = {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}}
    return server.queue({"1": {"class_type": node, "inputs": inputs}, "2": preview})["outputs"]["2"]


def stacked(*names: str, on: bool = True, strength: float = 1.0) -> dict[str, Any]:
    """The stack's widgets, with a row for each of these adapters."""
    rows = [{"on": on, "name": name, "strength_model": strength, "strength_clip": strength} for name in names]
    return {"rows": json.dumps(rows), "mode": "merge"}


@pytest.fixture(scope="module")
def loras(server: Server) -> list[str]:
    """Two adapters in the server's folder and, by the same names, in this process's."""
    models = reduced.build("sd15")
    folder = server.path("models", "loras", "x").parent
    for rank, name in ((2, "stack_one.safetensors"), (3, "stack_two.safetensors")):
        path, _ = reduced.write(models, "kohya", folder, rank)
        path.rename(folder / name)
    server.object_info("LoHaStack")
    return ["stack_one.safetensors", "stack_two.safetensors"]


@pytest.fixture
def stack(pack: ModuleType, server: Server, loras: list[str], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import folder_paths

    folder = str(server.path("models", "loras", "x").parent)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [folder])
    monkeypatch.setattr(folder_paths, "models_dir", str(Path(folder).parent))
    return sys.modules[f"{pack.__name__}.nodes.graph.stack"]


@pytest.mark.parametrize("node", ["LoHaBlockStrength", "LoHaSchedule", "LoHaStack"])
def test_they_are_there_with_tooltips_and_help(server, loras, node):
    description = server.object_info(node)
    assert description["category"] == "LoHa" and description["description"]
    for section in ("required", "optional"):
        for name, spec in description["input"].get(section, {}).items():
            assert spec[1].get("tooltip"), f"{node}.{name}"
    assert all(description["output_tooltips"])
    assert server.get_bytes(f"/extensions/ComfyUI-LoHa/docs/{node}.md").startswith(b"# ")
    assert any(f'"{node}"' in path.read_text() for path in (REPOSITORY / "example_workflows").glob("*.json"))


# --- blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"preset": "OUTALL"},
        {"vector": "OUT03-OUT05=0.5, BASE=0", "rules": "attn2.*: 0.3\nff: -1"},
        {"vector": "1,1,1,1,0.5,0.5,0.5,0,0,0,-0.5,0,0,0,0,0,2"},
        {"family": "Flux", "vector": "D=0.5, S10-S20=2"},
    ],
)
def test_block_strength_shows_a_picture(server, inputs):
    shown = run(server, "LoHaBlockStrength", **BLOCKS | inputs)
    [picture] = server.images({"outputs": {"1": shown}})
    assert picture.shape[1] >= 460 and picture.std() > 10


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"vector": "1,1,1"}, "the vector has 3 numbers; known lengths are SD1.5: 17, 26"),
        ({"vector": ",".join("1" * 20)}, "may mean SDXL or Flux: choose the family, or connect the model"),
        ({"rules": "fine: 1\nattn2(: 1"}, "rule in line 2: 'attn2\\(' is not a regular expression"),
        ({"family": "Flux", "preset": "OUTALL"}, "preset OUTALL: no block OUT; Flux has D00…D18, S00…S37"),
    ],
)
def test_block_strength_errors_reach_the_user(server, inputs, message):
    with pytest.raises(ComfyUIError, match=f"LoHaBlockStrength.*{message}"):
        run(server, "LoHaBlockStrength", **BLOCKS | inputs)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_model_s_own_keys_give_its_blocks(family):
    models = reduced.build(family)
    keys = list(models.model.model.state_dict())
    layout = Layout.of_keys(keys)
    unet = models.model.model.diffusion_model
    counts = (len(unet.input_blocks), len(unet.middle_block), len(unet.output_blocks))
    assert layout.parts == tuple(zip(("IN", "M", "OUT"), counts, strict=True))
    outside = {key for key in keys if block_of_key(key) is None and key.startswith("diffusion_model.")}
    assert {key.split(".")[1] for key in outside} <= {"time_embed", "label_emb", "out"}
    assert all(block_of_key(key) is None for key in models.clip.cond_stage_model.state_dict())


OWN = [
    {"input_blocks": 2, "middle_block": 1, "output_blocks": 2},
    {"layers": 30},
    {"double_blocks": 2, "single_blocks": 3},
]


@pytest.mark.parametrize("parts", OWN, ids=str)
def test_the_widget_draws_the_bars_of_any_model(pack, parts):
    """It asks with what the last run said of the model's blocks."""
    page = sys.modules[f"{pack.__name__}.nodes.page.blocks"]
    within = {"double_blocks": "img_mod.lin.", "single_blocks": "modulation.lin."}  # Flux's, reduced
    keys = [
        f"diffusion_model.{part}.{n}.{within.get(part, '')}weight"
        for part, count in parts.items()
        for n in range(count)
    ]
    blocks = BlockStrength.parse(keys, preset="NONE")
    answer = page.bars(page.spell(blocks.layout), "NONE", "")
    assert answer["values"] == blocks.table() and answer["family"] == blocks.layout.family


def test_real_models_have_the_blocks_that_we_say_they_have():
    """ComfyUI's own classes at full depth, built on the meta device."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    meta = {"device": "meta", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    flux = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8}
    flux |= {"hidden_size": 64, "mlp_ratio": 1.0, "num_heads": 2, "depth": 19, "depth_single_blocks": 38}
    flux |= {"axes_dim": [8, 12, 12], "theta": 10_000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True}
    unet = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 2}
    unet |= {"use_spatial_transformer": True, "context_dim": 8, "transformer_depth_middle": 1}
    sd15 = {"channel_mult": (1, 2, 4, 4), "num_res_blocks": [2] * 4, "transformer_depth": [1] * 6 + [0] * 2}
    sd15["transformer_depth_output"] = [1] * 9 + [0] * 3
    sdxl = {"channel_mult": (1, 2, 4), "num_res_blocks": [2] * 3, "transformer_depth": [0, 0, 2, 2, 10, 10]}
    sdxl["transformer_depth_output"] = [0, 0, 0, 2, 2, 2, 10, 10, 10]
    models = {
        "SD1.5": UNetModel(**unet, **sd15, **meta),
        "SDXL": UNetModel(**unet, **sdxl, **meta),
        "SD3": MMDiT(input_size=None, adm_in_channels=8, depth=24, **meta),
        "SD3.5 large": MMDiT(input_size=None, adm_in_channels=8, depth=38, **meta),
        "Flux": Flux(**flux, **reduced.FLUX_MORE, **meta),
    }
    for family, model in models.items():
        assert Layout.of_keys(f"diffusion_model.{key}" for key in model.state_dict()).family == family


def test_blocks_say_how_much_of_each_weight_changes(modes, stack, loras):
    models = reduced.build("sd15")
    before = models.weights()
    blocks = BlockStrength.parse(list(models.model.model.state_dict()), "ALL=0, BASE=0.5, OUT01-OUT02=0.25", "attn1: 2")
    adapter = stack.files.load(loras[0])
    full, _, _ = modes.apply(models.model, None, adapter, 1, 0, mode="merge")
    some, some_clip, _ = modes.apply(models.model, models.clip, adapter, 1, 1, mode="merge", blocks=blocks)
    full_weights, weights = patched(full), patched(some)
    for key, whole in full_weights.items():
        multiplier = blocks(key)
        in_block = 0.25 if "output_blocks.1." in key or "output_blocks.2." in key else 0
        assert multiplier == (0.5 if block_of_key(key) is None else in_block) * (2 if "attn1" in key else 1)
        base = before["MODEL", key]
        torch.testing.assert_close(weights.get(key, base), base + multiplier * (whole - base), atol=1e-5, rtol=1e-4)
    assert some_clip is not models.clip


def patched(patcher: Any) -> dict[str, torch.Tensor]:
    """The weights that a patcher changes, as ComfyUI calculates them."""
    import comfy.lora

    weights = patcher.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, weights[key].clone(), key) for key, patches in patcher.patches.items()
    }


# --- schedules --------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [{}, {"keyframes": ""}, {"keyframes": "0:0\n50%:-2", "interpolation": "step"}])
def test_schedule_shows_its_curve(server, inputs):
    [picture] = server.images({"outputs": {"1": run(server, "LoHaSchedule", **SCHEDULE | inputs)}})
    assert picture.shape[:2] == (300, 520) and picture.std() > 5


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"keyframes": "0:0, 7:1"}, "keyframe '7:1': progress goes from 0 to 1"),
        ({"keyframes": "soon"}, "keyframe 'soon': expected 'progress: strength'"),
        ({"end_percent": 0.05}, "end_percent 0.05 lies before start_percent 0.1"),
    ],
)
def test_schedule_errors_reach_the_user(server, inputs, message):
    with pytest.raises(ComfyUIError, match=f"LoHaSchedule.*{message}"):
        run(server, "LoHaSchedule", **SCHEDULE | inputs)


@pytest.fixture
def sample(ready: Server) -> Any:
    """Pictures of an example workflow in 4 steps, with other values of its nodes' inputs, by class of node."""

    def run(name: str, **changes: dict[str, Any]) -> np.ndarray:
        workflow = workflows.filled(workflows.EXAMPLES / f"{name}.json")
        prompt = comfyui.to_api(workflow, ready.object_info())
        for node in prompt.values():
            node["inputs"] |= changes.get(node["class_type"], {})
            node["inputs"] |= {"steps": 4} if node["class_type"] == "KSampler" else {}
        saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
        return pictures(ready, prompt, saved)

    return run


@pytest.fixture
def sample_stack(sample: Any) -> Any:
    """Pictures of the stack's example with the prompt of the others alone."""
    asked, joined = {"text": "a handwritten seven"}, {"delimiter": ""}
    return lambda **inputs: sample("03 Stack several LoHas", LoHaStack=asked | inputs, StringConcatenate=joined)


def pictures(server: Server, prompt: dict, saved: list[str]) -> np.ndarray:
    outputs = server.queue(prompt)["outputs"]
    return server.images({"outputs": {key: outputs[key] for key in saved}}).astype(int)


def test_a_schedule_is_what_two_samplings_after_each_other_are(ready, sample):
    """A step from 0.3 to 1 half way, against merged models in a sampler for each half."""
    settings = {"sampler_name": "euler", "steps": 4}  # euler has no memory of earlier steps
    nothing = {"preset": "ALL", "vector": "", "rules": ""}
    # In the "normal" scheduler 4 steps begin at 0, a quarter, half and three quarters of the timesteps.
    step = {"keyframes": "0: 0.3, 0.4: 1", "interpolation": "step"}
    found = sample("04 Blocks and schedule", LoHaSchedule=step, LoHaBlockStrength=nothing, KSampler=settings)

    workflow = workflows.filled(workflows.LOADER)
    prompt = comfyui.to_api(workflow, ready.object_info())
    by_class = {node["class_type"]: key for key, node in prompt.items()}
    loader, sampling = prompt[by_class["LoHaLoader"]], prompt.pop(by_class["KSampler"])["inputs"] | settings
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "PreviewAny"}
    shared = {name: sampling[name] for name in ("cfg", "scheduler", "positive", "negative")} | settings
    halves = (("a", 0.3, sampling["latent_image"], 0, 2), ("b", 1.0, ["sample a", 0], 2, 4))
    for half, strength, latent, start, end in halves:
        changed = {"mode": "merge", "strength_model": strength}
        prompt[f"load {half}"] = {"class_type": "LoHaLoader", "inputs": loader["inputs"] | changed}
        leftover = {"add_noise": "enable", "return_with_leftover_noise": "enable"}
        if half == "b":
            leftover = dict.fromkeys(leftover, "disable")
        place = {"model": [f"load {half}", 0], "latent_image": latent, "start_at_step": start, "end_at_step": end}
        inputs = shared | leftover | place | {"noise_seed": sampling["seed"]}
        prompt[f"sample {half}"] = {"class_type": "KSamplerAdvanced", "inputs": inputs}
    prompt[by_class["VAEDecode"]]["inputs"]["samples"] = ["sample b", 0]
    wanted = pictures(ready, prompt, [by_class["SaveImage"]])
    assert np.abs(found - wanted).max() <= 1


def test_blocks_and_schedules_that_are_zero_draw_what_no_adapter_draws(sample, sample_stack):
    plain = sample_stack(rows="[]")
    assert np.abs(sample_stack() - plain).max() > 10
    no_blocks = {"LoHaBlockStrength": {"preset": "NONE", "vector": ""}}
    # A schedule is about sampling; text encoders are done by then.
    never = {"LoHaSchedule": {"keyframes": "0: 0"}, "LoHaLoader": {"strength_clip": 0.0}}
    for changes in (no_blocks, never):
        assert np.abs(sample("04 Blocks and schedule", **changes) - plain).max() == 0


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m_sde"])
def test_schedules_act_under_other_samplers(sample, sampler):
    settings = {"KSampler": {"sampler_name": sampler}, "LoHaBlockStrength": {"vector": "", "rules": ""}}
    run = lambda keyframes, strength: sample(  # noqa: E731
        "04 Blocks and schedule",
        LoHaSchedule={"keyframes": keyframes},
        LoHaLoader={"strength_model": strength},
        **settings,
    )
    half = run("0: 0.5", 1.0)
    assert np.abs(half - run("", 0.5)).max() <= 1
    assert np.abs(half - run("0: 0.5, 0.6: 0", 1.0)).max() > 5


def test_stacked_strengths_of_one_adapter_add_up(sample_stack, draw):  # noqa: F811
    for mode in ("merge", "live"):
        whole = draw(mode=mode, strength_model=1.0, strength_clip=1.0)
        assert np.abs(sample_stack(mode=mode) - whole).max() <= 1


# --- stacks -----------------------------------------------------------------------------------


def test_a_stack_without_a_model_is_a_list_that_chains(server, loras):
    entry = server.queue(
        {
            "1": {"class_type": "LoHaStack", "inputs": stacked(loras[0], strength=0.5)},
            "2": {"class_type": "LoHaStack", "inputs": stacked(loras[1]) | {"lora_stack": ["1", 2]}},
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}},
            "4": {"class_type": "PreviewAny", "inputs": {"source": ["2", 3]}},
        }
    )
    assert all(name in entry["outputs"]["3"]["text"][0] for name in loras)
    assert entry["outputs"]["4"]["text"] == ["2 adapters in the list; none applied here"]


def test_a_stack_refuses_names_that_are_not_in_the_list(server, loras):
    with pytest.raises(ComfyUIError, match="not in list|no such adapter"):
        stack = {"class_type": "LoHaStack", "inputs": stacked("../../outside.safetensors")}
        server.queue({"1": stack, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 3]}}})


def test_a_stack_adds_up_its_adapters(stack, loras):
    models = reduced.build("sd15")
    before = models.weights()
    widgets = stacked(*loras, strength=0.5)
    model, clip, entries, report, *_ = stack.LoHaStack.execute(**widgets, model=models.model, clip=models.clip).result
    assert entries == [(name, 0.5, 0.5) for name in loras]
    assert all(name in report for name in loras)
    alone = []
    for name in loras:
        one, *_ = stack.LoHaStack.execute(**stacked(name, strength=0.5), model=models.model).result
        alone.append(patched(one))
    for key, weight in patched(model).items():
        wanted = before["MODEL", key] + sum(one[key] - before["MODEL", key] for one in alone)
        torch.testing.assert_close(weight, wanted, atol=1e-5, rtol=1e-4)
    assert clip.patcher.patches and models.weights().keys() == before.keys()


def test_what_is_off_is_left_out(stack, loras):
    models = reduced.build("sd15")
    off = stack.LoHaStack.execute(**stacked(*loras, on=False), model=models.model).result
    assert (off[0], off[1], off[2], off[3]) == (models.model, None, [], "no adapter is on")
    rows = json.dumps([{"on": False, "name": "gone.safetensors"}, {"name": loras[1], "strength_model": 0.5}])
    assert stack.chosen(rows) == [(loras[1], 0.5, 0.5)]
    assert stack.LoHaStack.fingerprint_inputs(rows=rows) == stack.files.fingerprint(loras[1])
    assert stack.LoHaStack.fingerprint_inputs(rows=None) == ""  # connected: not known yet


def test_any_number_of_rows(stack, loras):
    assert stack.chosen(stacked(*loras * 50)["rows"]) == [(name, 1.0, 1.0) for name in loras * 50]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "rows is not JSON"),
        ("[" * 100_000, "rows is not JSON"),
        ('{"name": "a"}', "rows is dict; expected a list such as"),
        ('["a"]', "row 1: expected an object with a name"),
        ('[{"name": ""}]', "row 1: expected an object with a name"),
        ('[{"name": "a"}, {"name": 3}]', "row 2: expected an object with a name"),
        ('[{"name": "a", "on": "yes"}]', "row 1 (a): on is 'yes'; write true or false"),
        ('[{"name": "a", "strength": 1}]', "row 1 (a): unknown strength"),
        ('[{"name": "a", "strength_model": "1"}]', "row 1 (a): strength_model is '1'; expected a finite number"),
        ('[{"name": "a", "strength_model": NaN}]', "row 1 (a): strength_model is nan"),
        ('[{"name": "a", "strength_clip": 1e999}]', "row 1 (a): strength_clip is inf"),
        ('[{"name": "a", "strength_clip": true}]', "row 1 (a): strength_clip is True"),
        ('[{"name": "a", "strength_clip": null, "on": false}]', "row 1 (a): strength_clip is None"),
    ],
)
def test_rows_that_cannot_be_understood(stack, rows, message):
    with pytest.raises(LoHaError) as raised:
        stack.LoHaStack.execute(rows=rows, model=object())
    assert message in str(raised.value)


def test_lists_of_other_packs_are_applied_first_and_checked(stack, loras):
    models = reduced.build("sd15")
    foreign = [(loras[0], 0.5, None), ("None", 1.0, 1.0), [loras[1], 1, 1]]
    everything = {"model": models.model, "clip": models.clip, "lora_stack": foreign}
    model, clip, entries, *_ = stack.LoHaStack.execute(**stacked(loras[0]), **everything).result
    assert entries == [(loras[0], 0.5, 0.0), (loras[1], 1.0, 1.0), (loras[0], 1.0, 1.0)]
    on_model, on_clip = (
        max(len(patch.weights) for entries in patches.values() for _, patch, *_ in entries)
        for patches in (model.patches, clip.patcher.patches)
    )
    assert (on_model, on_clip) == (3, 2)
    for wrong in (["x"], [("x", 1)], [("x", "strong", 1)], [("x", float("nan"), 1)], [(3, 1, 1)]):
        with pytest.raises(LoHaError, match=r"entry 1 of the lora_stack input: expected \(name, model strength"):
            stack.received(wrong)
    with pytest.raises(LoHaError, match="no such adapter"):
        stack.LoHaStack.execute(**stacked(), model=models.model, lora_stack=[("../secret.safetensors", 1, 1)])
