"""What differs between the text-to-image pipelines of diffusers that can be trained: an entry for each, `FAMILIES`.

Latents are (n, c, h, w) here whatever a model takes, normalised as it takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

Conditioning = dict[str, Tensor]


class Family(NamedTuple):
    """The differences between architectures.

    Attributes:
        model: the class of what is trained.
        encode: (pipeline, caption, device) -> tensors with a leading 1, by name.
        forward: (model, noisy latents, timesteps (n,) in 0…1000, conditioning) -> output of their shape.
        latent: (VAE, pixels (1, 3, h, w) in -1…1) -> latents.
        multiple: sides of latents must be multiples of this.
        component: the pipeline's attribute that is trained.
        scale: pixels along the side of a place in a latent.
        trains_text: whether its text encoders can be trained, too; large language models are not.
        checkpointed: lists of blocks for gradient checkpointing, where diffusers' own leaves something out.
        shift: how far towards noise the times of a run are by default, as in `Objective.shift`: by trainers' guides
            (Qwen-Image, Z-Image, Wan) or its own scheduler.
        resolution_shift: whether they are by the picture's size, too.
        names: of modules in a file, see `save_adapter`; "keep" where ComfyUI's own loader knows diffusers' names.
    """

    model: str
    encode: Callable[[Any, str, torch.device], Conditioning]
    forward: Callable[[Any, Tensor, Tensor, Conditioning], Tensor]
    latent: Callable[[Any, Tensor], Tensor]
    multiple: int = 1
    component: str = "transformer"
    scale: Callable[[Any], int] = lambda pipe: int(pipe.vae_scale_factor)
    trains_text: bool = False
    checkpointed: tuple[str, ...] = ()
    shift: float = 1.0
    resolution_shift: bool = False
    names: str = "kohya"


class Stage(NamedTuple):
    """One of several models that a pipeline has for noise levels: its attribute, and the times that it is for."""

    component: str
    start: float
    stop: float


def stages(pipe: Any) -> dict[str, Stage]:
    """A pipeline's stages, by what they are called; none where one model does it all. Wan 2.2 has two."""
    boundary = pipe.config.get("boundary_ratio")
    if boundary is None or getattr(pipe, "transformer_2", None) is None:
        return {}
    return {"high-noise": Stage("transformer", boundary, 1.0), "low-noise": Stage("transformer_2", 0.0, boundary)}


def collated(encoded: Sequence[Conditioning], device: torch.device, dtype: torch.dtype) -> Conditioning:
    """One batch of what `Family.encode` gave for each sample.

    Texts (1, length, channels) of several lengths are filled up with zeros; "mask" (n, length) is then true for what
    is of the text.
    """
    cond = {name: [each[name][0].to(device, dtype) for each in encoded] for name in encoded[0]}
    lengths = torch.tensor([len(text) for text in cond["text"]], device=device)
    stacked = {name: nn.utils.rnn.pad_sequence(tensors, batch_first=True) for name, tensors in cond.items()}
    if len({len(text) for text in cond["text"]}) > 1:
        stacked["mask"] = torch.arange(stacked["text"].shape[1], device=device) < lengths[:, None]
    return stacked


# --- latents ------------------------------------------------------------------------------------


def _latent(vae: Any, pixels: Tensor) -> Tensor:
    latent: Tensor = vae.encode(pixels).latent_dist.mode()
    return (latent - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _latent_cells(vae: Any, pixels: Tensor) -> Tensor:
    """Flux.2: in cells of 2×2 each place has a mean and a deviation, those of the VAE's batch norm."""
    cells = functional.pixel_unshuffle(vae.encode(pixels).latent_dist.mode(), 2)
    mean, variance = (t.view(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
    return functional.pixel_shuffle((cells - mean) / (variance + vae.config.batch_norm_eps).sqrt(), 2)


def _latent_frame(vae: Any, pixels: Tensor) -> Tensor:
    """A picture as a video of one frame; each channel has a mean and a deviation."""
    latent = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        latent.new_tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latent - mean) / std


# --- tokens -------------------------------------------------------------------------------------


def _tokens(latents: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h/2·w/2, c·4): a token is a cell of 2×2."""
    return functional.pixel_unshuffle(latents, 2).flatten(2).mT


def _untokens(tokens: Tensor, like: Tensor) -> Tensor:
    height, width = like.shape[-2:]
    return functional.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


def _places(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """(height·width, axes): row and column of each token, in the second and the third place."""
    places = torch.zeros(height, width, axes, device=device)
    places[..., 1] += torch.arange(height, device=device)[:, None]
    places[..., 2] += torch.arange(width, device=device)
    return places.flatten(0, 1)


def _guidance(model: Any, noisy: Tensor) -> Tensor | None:
    """A distilled model is trained as if guidance were off."""
    return torch.ones(len(noisy), device=noisy.device) if model.config.guidance_embeds else None


def _encode_text(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _ = pipe.encode_prompt(caption, device=device)
    return {"text": text}


# --- Stable Diffusion 1.5, 2 and XL -------------------------------------------------------------


def _encode_sd(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _ = pipe.encode_prompt(caption, device, 1, False)
    return {"text": text}


def _encode_sdxl(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _, pooled, _ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _unet(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    added = {"text_embeds": cond["pooled"], "time_ids": cond["size"]} if "pooled" in cond else None
    output: Tensor = model(noisy, timesteps, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample
    return output


# --- Stable Diffusion 3 -------------------------------------------------------------------------


def _encode_sd3(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _, pooled, _ = pipe.encode_prompt(caption, None, None, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _sd3(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = model(
        noisy, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"], timestep=timesteps
    ).sample
    return output


# --- Flux, Chroma, Flux.2 -----------------------------------------------------------------------


def _encode_flux(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, pooled, _ = pipe.encode_prompt(caption, None, device=device)
    return {"text": text, "pooled": pooled}


def _flux(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    height, width = noisy.shape[-2:]
    output = model(
        _tokens(noisy),
        encoder_hidden_states=cond["text"],
        pooled_projections=cond["pooled"],
        timestep=timesteps / 1000,
        img_ids=_places(height // 2, width // 2, 3, noisy.device),
        txt_ids=torch.zeros(cond["text"].shape[1], 3, device=noisy.device),
        guidance=_guidance(model, noisy),
    ).sample
    return _untokens(output, noisy)


def _encode_chroma(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _, attended, *_ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
    return {"text": text, "attended": attended}


def _chroma(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """The text's padding is masked out but for its first token, the pipeline's way."""
    height, width = noisy.shape[-2:]
    tokens = _tokens(noisy)
    output = model(
        tokens,
        encoder_hidden_states=cond["text"],
        timestep=timesteps / 1000,
        img_ids=_places(height // 2, width // 2, 3, noisy.device),
        txt_ids=torch.zeros(cond["text"].shape[1], 3, device=noisy.device),
        attention_mask=torch.cat([cond["attended"], tokens.new_ones(tokens.shape[:2])], 1),
    ).sample
    return _untokens(output, noisy)


def _flux2(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """Four axes: time, row and column of a picture's token, and the place of a text's."""
    text, (height, width) = cond["text"], noisy.shape[-2:]
    words = torch.zeros(text.shape[1], 4, device=noisy.device)
    words[:, 3] += torch.arange(text.shape[1], device=noisy.device)
    output = model(
        _tokens(noisy),
        encoder_hidden_states=text,
        timestep=timesteps / 1000,
        img_ids=_places(height // 2, width // 2, 4, noisy.device).expand(len(noisy), -1, -1),
        txt_ids=words.expand(len(noisy), -1, -1),
        guidance=_guidance(model, noisy),
    ).sample
    return _untokens(output, noisy)


# --- Qwen-Image ---------------------------------------------------------------------------------


def _qwen(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    height, width = noisy.shape[-2:]
    output = model(
        _tokens(noisy),
        encoder_hidden_states=cond["text"],
        encoder_hidden_states_mask=cond.get("mask"),
        timestep=timesteps / 1000,
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        guidance=_guidance(model, noisy),
    ).sample
    return _untokens(output, noisy)


# --- Z-Image ------------------------------------------------------------------------------------


def _encode_z_image(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    [text], _ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
    return {"text": text[None]}


def _z_image(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """Samples are a list; time runs from noise to the picture, and so does the flow."""
    texts = list(cond["text"])
    if "mask" in cond:
        texts = [text[:length] for text, length in zip(texts, cond["mask"].sum(1).tolist(), strict=True)]
    output = model(list(noisy[:, :, None]), 1 - timesteps / 1000, texts).sample
    return -torch.stack(output)[:, :, 0]


# --- Wan ----------------------------------------------------------------------------------------


def _encode_wan(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False, max_sequence_length=512)
    return {"text": text}


def _wan(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = model(noisy[:, :, None], timesteps, cond["text"]).sample
    return output[:, :, 0]


# --- Lumina 2, AuraFlow, PixArt -----------------------------------------------------------------


def _encode_masked(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, attended, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, device=device)
    return {"text": text, "attended": attended}


def _lumina2(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """Time runs from noise to the picture, and so does the flow."""
    output: Tensor = model(noisy, 1 - timesteps / 1000, cond["text"], cond["attended"].bool()).sample
    return -output


def _aura_flow(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = model(noisy, cond["text"], timesteps / 1000).sample
    return output


def _pixart(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """Half of the output's channels are a variance, which is not trained."""
    size = cond["size"][:, :2] if model.config.use_additional_conditions else None
    output = model(
        noisy,
        encoder_hidden_states=cond["text"],
        encoder_attention_mask=cond["attended"],
        timestep=timesteps,
        added_cond_kwargs={"resolution": size, "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:]},
    ).sample
    return output[:, : noisy.shape[1]]


# --- the table ----------------------------------------------------------------------------------

_FLUX = Family("FluxTransformer2DModel", _encode_flux, _flux, _latent, multiple=2, trains_text=True, names="keep")
_FLUX2 = Family("Flux2Transformer2DModel", _encode_text, _flux2, _latent_cells, multiple=2, resolution_shift=True)
# The names of its layers alone might be of other families, too, so that the original's are not known by them.
_PIXART = Family("PixArtTransformer2DModel", _encode_masked, _pixart, _latent, multiple=2, names="diffusers")

# Class of the pipeline -> what is special about it.
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "UNet2DConditionModel", _encode_sd, _unet, _latent, component="unet", trains_text=True, names="keep"
    ),
    "StableDiffusionXLPipeline": Family(
        "UNet2DConditionModel", _encode_sdxl, _unet, _latent, component="unet", trains_text=True, names="keep"
    ),
    "StableDiffusion3Pipeline": Family(
        "SD3Transformer2DModel", _encode_sd3, _sd3, _latent, multiple=2, trains_text=True, names="keep"
    ),
    "FluxPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "ChromaPipeline": Family(
        "ChromaTransformer2DModel",
        _encode_chroma,
        _chroma,
        _latent,
        multiple=2,
        # There (0.42) the single blocks get no mask.
        checkpointed=("transformer_blocks", "single_transformer_blocks"),
    ),
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "QwenImagePipeline": Family(
        "QwenImageTransformer2DModel", _encode_text, _qwen, _latent_frame, multiple=2, shift=2.2
    ),
    "ZImagePipeline": Family("ZImageTransformer2DModel", _encode_z_image, _z_image, _latent, multiple=2, shift=2.0),
    "WanPipeline": Family(
        "WanTransformer3DModel",
        _encode_wan,
        _wan,
        _latent_frame,
        multiple=2,
        scale=lambda pipe: int(pipe.vae_scale_factor_spatial),
        shift=3.0,
    ),
    "Lumina2Pipeline": Family("Lumina2Transformer2DModel", _encode_masked, _lumina2, _latent, multiple=2, shift=6.0),
    "AuraFlowPipeline": Family(
        "AuraFlowTransformer2DModel", _encode_masked, _aura_flow, _latent, multiple=2, shift=1.73
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}
