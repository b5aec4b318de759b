"""What `loha train` asks of each family's model, against what diffusers' own pipeline asks of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from loha_core import LoHaConfig, LoHaError, load_adapter
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.diffusers.pipeline import Diffusion, Feed, load_pipeline
from loha_core.training.diffusers.settings import ModelSettings
from loha_core.training.objectives import Objective
from loha_core.training.randomness import generator
from loha_core.training.trainer import Trainer

from ..reduced_families import PIPELINES
from . import pipelines
from .trained import train

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
HEIGHT, WIDTH = 32, 48  # of pictures
PROMPTS = ["a cat", "two dogs, old"]


class Layout(NamedTuple):
    """How a pipeline holds latents (n, c, h, w) between its steps, by its own functions, and how it is called.

    Attributes:
        packed, unpacked: (pipeline, latents) -> latents.
        options: for a call without guidance.
    """

    packed: Callable[[Any, Tensor], Tensor] = lambda pipe, x: x
    unpacked: Callable[[Any, Tensor], Tensor] = lambda pipe, x: x
    options: dict[str, Any] = {"guidance_scale": 1.0}


def _packed(pipe: Any, x: Tensor) -> Tensor:
    return pipe._pack_latents(x, *x.shape)


def _unpacked(pipe: Any, x: Tensor) -> Tensor:
    return pipe._unpack_latents(x, HEIGHT, WIDTH, pipe.vae_scale_factor)


def _flux2_packed(pipe: Any, x: Tensor) -> Tensor:
    return pipe._patchify_latents(x)


def _flux2_unpacked(pipe: Any, x: Tensor) -> Tensor:
    height, width = HEIGHT // 4, WIDTH // 4
    ids = pipe._prepare_latent_ids(torch.empty(len(x), 1, height, width))
    size = (height, width) if "klein" in type(pipe).__name__.lower() else ()
    return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(x, ids, *size))


_FRAMES = Layout(lambda pipe, x: x[:, :, None], lambda pipe, x: x[:, :, 0], {"guidance_scale": 1.0, "num_frames": 1})
LAYOUTS = {
    "sd3": Layout(),
    "SD 3.5": Layout(),
    "Kontext": Layout(_packed, _unpacked, {"guidance_scale": 1.0, "max_area": HEIGHT * WIDTH, "_auto_resize": False}),
    "AuraFlowPipeline": Layout(),
    "Lumina2Pipeline": Layout(),
    "PixArtAlphaPipeline": Layout(options={"guidance_scale": 1.0, "use_resolution_binning": False}),
    "PixArtSigmaPipeline": Layout(options={"guidance_scale": 1.0, "use_resolution_binning": False}),
    "flux": Layout(_packed, _unpacked),
    "ChromaPipeline": Layout(_packed, _unpacked),
    "Flux2Pipeline": Layout(_flux2_packed, _flux2_unpacked),
    "Flux2KleinPipeline": Layout(_flux2_packed, _flux2_unpacked),
    "QwenImagePipeline": Layout(_packed, lambda pipe, x: _unpacked(pipe, x)[:, :, 0], {"true_cfg_scale": 1.0}),
    "ZImagePipeline": Layout(options={"guidance_scale": 0.0}),
    "WanPipeline": _FRAMES,
    "Wan 2.2, 5B": _FRAMES,
}
SHIFTS = {
    "QwenImagePipeline": 2.2,
    "ZImagePipeline": 2.0,
    "WanPipeline": 3.0,
    "Wan 2.2, 5B": 3.0,
    "Lumina2Pipeline": 6.0,
    "AuraFlowPipeline": 1.73,
    # For pictures of 1024².
    "Flux2Pipeline": math.exp(1.15),
    "Flux2KleinPipeline": math.exp(1.15),
}
each_family = pytest.mark.parametrize("family", PIPELINES)


def picture() -> Tensor:
    return torch.rand(HEIGHT, WIDTH, 3, generator=generator("picture"))


def called(pipe: Any, layout: Layout, step: Callable[..., Any], **options: Any) -> Any:
    """A run of the pipeline, with another function for its scheduler's steps."""
    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(height=HEIGHT, width=WIDTH, **layout.options, **options)
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_model_is_asked_what_the_pipeline_asks_it(family):
    """With an adapter that does nothing yet: packing, places, timestep, guidance, masks, sign."""
    pipe, layout = pipelines.build(family), LAYOUTS[family]
    own, seen = pipe.scheduler.step, []

    def step(output: Tensor, timestep: Tensor, sample: Tensor, **rest: Any) -> Any:
        seen.append((layout.unpacked(pipe, output).clone(), timestep, layout.unpacked(pipe, sample).clone()))
        return own(output, timestep, sample, **rest)

    called(pipe, layout, step, prompt=list(PROMPTS), num_inference_steps=3, output_type="latent")
    diffusion = Diffusion(pipe, CPU)
    diffusion.networks(LoHaConfig(r=2), text_encoders=False)
    encoded = [diffusion.encode(prompt) for prompt in PROMPTS]
    assert len(seen) == 3 and len({float(timestep) for _, timestep, _ in seen}) == 3
    for output, timestep, sample in seen:
        with torch.no_grad():
            ours = diffusion.output(sample, timestep.expand(2).float(), encoded)
        assert ours.shape == output.shape and output.std() > 0.01
        torch.testing.assert_close(ours, output, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("family", [*LAYOUTS, "sd15"])
def test_the_usual_objective_is_the_family_s(family):
    """Its median time is 1/2 moved by the shift."""
    objective, shift = Diffusion(pipelines.build(family), CPU).objective(), SHIFTS.get(family, 1.0)
    if family == "sd15" or family.startswith("PixArt"):
        assert objective == Objective()
        return
    assert objective.timesteps == "logit-normal"
    assert objective.quantile(0.5) == pytest.approx(shift / (1 + shift))


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_pipeline_makes_the_vae_s_picture_of_our_latents(family):
    pipe, layout = pipelines.build(family), LAYOUTS[family]
    diffusion = Diffusion(pipe, CPU)
    latent = diffusion.latent(picture())
    assert latent.shape[1:] == (HEIGHT // diffusion.scale, WIDTH // diffusion.scale)
    found = called(
        pipe, layout, lambda output, timestep, sample, **rest: (sample,), prompt="a cat", num_inference_steps=2,
        latents=layout.packed(pipe, latent[None]), output_type="pt",
    )[0]  # fmt: skip
    pixels = picture().movedim(-1, 0)[None] * 2 - 1
    with torch.no_grad():
        if pipe.vae.config.get("latents_mean"):
            pixels = pixels[:, :, None]
        wanted = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample / 2 + 0.5
    assert wanted.std() > 0.01
    torch.testing.assert_close(found.flatten(), wanted.clamp(0, 1).flatten(), atol=1e-4, rtol=1e-4)


def feed_of(pipe: Any, size: int = 2) -> Feed:
    diffusion = Diffusion(pipe, CPU)
    latent = diffusion.latent(picture())
    dataset = Dataset([Item(latent, prompt) for prompt in PROMPTS], encode=diffusion.encode)
    return Feed(diffusion, dataset, Objective(), size, 7)


# What the last block makes of the text goes nowhere.
UNUSED = {
    "QwenImagePipeline": [
        f"transformer_blocks.1.{name}"
        for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    ]
}


def moved(factor: Tensor) -> bool:
    return factor.grad is not None and bool(factor.grad.any())


@each_family
def test_the_loss_falls_on_one_batch(family):
    feed = feed_of(pipelines.build(family))
    diffusion = feed.diffusion
    torch.manual_seed(0)
    layers = diffusion.networks(LoHaConfig(r=2), text_encoders=False)["model"]
    factors = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
    optimizer, batch, losses = torch.optim.AdamW(factors, 0.02), feed.batch(0), []
    for _ in range(6):
        loss = feed.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0], losses
    still = {name for name, layer in layers.items() for p in layer.parameters() if p.requires_grad and not moved(p)}
    assert {name.partition(".")[2] for name in still} == set(UNUSED.get(family, ()))


@each_family
def test_gradient_checkpointing_gives_the_same_gradients(family):
    feed = feed_of(pipelines.build(family))
    diffusion = feed.diffusion
    layers = diffusion.networks(LoHaConfig(r=2, init_weights=False), text_encoders=False)["model"]
    factors = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
    batch, found, counts = feed.batch(0), [], []
    list(layers.values())[-1].register_forward_pre_hook(lambda *_: counts.append(len(found)))
    for _ in range(2):
        found.append(torch.autograd.grad(feed.loss(batch), factors, allow_unused=True))
        diffusion.enable_gradient_checkpointing()
        diffusion.model.train()
    assert counts == [0, 1, 1], "a block runs again in the backward"
    for plain, other in zip(*found, strict=True):
        assert (plain is None) == (other is None)
        if plain is not None:
            torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-4)


def test_each_of_two_stages_is_asked_what_the_pipeline_asks_it():
    """Wan 2.2: by the same steps, at the times that are its own, and named."""
    pipe, seen, now = pipelines.build("Wan 2.2"), [], []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: now.append(name))
    own = pipe.scheduler.step

    def step(output: Tensor, timestep: Tensor, sample: Tensor, **rest: Any) -> Any:
        seen.append((now.pop(), output[:, :, 0].clone(), timestep, sample[:, :, 0].clone()))
        return own(output, timestep, sample, **rest)

    called(pipe, _FRAMES, step, prompt=PROMPTS[0], num_inference_steps=6, output_type="latent")
    assert {name for name, *_ in seen} == {"transformer", "transformer_2"}
    for stage, component in (("high-noise", "transformer"), ("low-noise", "transformer_2")):
        diffusion = Diffusion(pipe, CPU, stage)
        objective = diffusion.objective(Objective(timesteps="shifted"))
        drawn = [1000 * objective.quantile(u) for u in (0.0, 1.0)]
        for _, output, timestep, sample in (each for each in seen if each[0] == component):
            assert drawn[0] - 1 <= timestep <= drawn[1] + 1
            with torch.no_grad():
                ours = diffusion.output(sample, timestep[None].float(), [diffusion.encode(PROMPTS[0])])
            torch.testing.assert_close(ours, output, atol=5e-5, rtol=5e-5)
    with pytest.raises(LoHaError, match=r"for times from 0 to 0\.9: min_timestep is 0\.95"):
        diffusion.objective(Objective(min_timestep=0.95))
    with pytest.raises(LoHaError, match=r'stage which is trained: "high-noise" or "low-noise"'):
        Diffusion(pipe, CPU)
    with pytest.raises(LoHaError, match="this WanPipeline has one model for all noise; leave it out"):
        Diffusion(pipelines.build("WanPipeline"), CPU, "high-noise")


@pytest.mark.parametrize("family", ["ChromaPipeline", "Flux2Pipeline", "QwenImagePipeline"])
def test_text_encoders_that_are_not_trained_are_refused_by_name(family):
    diffusion = Diffusion(pipelines.build(family), CPU)
    kind = type(diffusion.pipe.text_encoder).__name__
    with pytest.raises(LoHaError, match=f"{kind}.* cannot be trained; set text_encoders to false. Those of Stable"):
        diffusion.networks(LoHaConfig(r=2), text_encoders=True)


# --- whole runs, in bfloat16 and with gradient checkpointing ----------------------------------------------------------


@each_family
def test_a_run_goes_on_bit_for_bit(family, tmp_path):
    whole = load_file(train(tmp_path, family, output={"folder": "whole"}))
    train(tmp_path, family, output={"folder": "parts"}, training={"steps": 1})
    parts = load_file(train(tmp_path, family, output={"folder": "parts"}))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    assert sum(bool(tensor.any()) for key, tensor in whole.items() if "hada_w2_b" in key) > 0.9 * len(whole) / 5


def test_layers_that_a_file_cannot_name_are_refused_before_anything_is_learned(tmp_path, monkeypatch):
    """Queries alone are a third of what readers of Z-Image know, and a DoRA has all rows of a weight."""
    monkeypatch.setattr(Trainer, "run", lambda trainer: pytest.fail("it began"))
    with pytest.raises(LoHaError, match="DoRA can be made one layer only"):
        train(tmp_path, "ZImagePipeline", network={"target_modules": ["to_q"], "use_dora": True})


@pytest.mark.parametrize("stage", ["high-noise", "low-noise"])
def test_a_stage_s_file_has_the_names_of_one_model_s(tmp_path, stage):
    one = load_adapter(train(tmp_path / "one", "WanPipeline", training={"steps": 1}))
    path = train(tmp_path / "two", "Wan 2.2", model={"stage": stage}, training={"steps": 1})
    assert load_adapter(path).layers.keys() == one.layers.keys()


def test_another_folder_takes_the_place_of_the_stage_s_model(tmp_path):
    pipe = pipelines.build("Wan 2.2")
    pipe.save_pretrained(tmp_path / "model")
    pipe.transformer_2.proj_out.bias.data += 1
    pipe.transformer_2.save_pretrained(tmp_path / "other")
    found = load_pipeline(ModelSettings("model", "other", stage="low-noise"), tmp_path)
    for name in ("transformer", "transformer_2"):
        assert torch.equal(getattr(found, name).proj_out.bias, getattr(pipe, name).proj_out.bias)
