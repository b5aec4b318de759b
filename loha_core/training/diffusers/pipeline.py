"""A diffusers pipeline's model, its latents and encoded captions, and its loss.

SD1.5, SD2 and SDXL (UNets), SD3 and Flux (transformers). The pipeline itself encodes captions, and its scheduler's
configuration says how noise is added and what the output means. Needs diffusers and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LoHaError
from ...tuner.config import LoHaConfig
from ...tuner.layer import LoHaLayer
from ...tuner.model import LoHaModel
from ..data.batches import BatchSampler
from ..data.dataset import Dataset, Sample
from ..objectives import PREDICTIONS, Objective
from .settings import ModelSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTRA = "pip install 'comfyui-loha[train]'"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")

Conditioning = dict[str, Tensor]


# --- families -----------------------------------------------------------------------------------


class Family(NamedTuple):
    """The differences between architectures.

    Attributes:
        component: the pipeline's attribute that is trained.
        encode: (pipeline, caption, device) -> tensors with a leading 1, by name.
        forward: (model, noisy latents (n, c, h, w), timesteps (n,) in 0…1000, conditioning) -> output of their shape.
        multiple: sides of latents must be multiples of this.
    """

    component: str
    encode: Callable[[Any, str, torch.device], Conditioning]
    forward: Callable[[Any, Tensor, Tensor, Conditioning], Tensor]
    multiple: int


def _encode_sd(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _ = pipe.encode_prompt(caption, device, 1, False)
    return {"text": text}


def _encode_sdxl(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _, pooled, _ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _encode_sd3(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, _, pooled, _ = pipe.encode_prompt(caption, None, None, device=device, do_classifier_free_guidance=False)
    return {"text": text, "pooled": pooled}


def _encode_flux(pipe: Any, caption: str, device: torch.device) -> Conditioning:
    text, pooled, _ = pipe.encode_prompt(caption, None, device=device)
    return {"text": text, "pooled": pooled}


def _unet(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    added = {"text_embeds": cond["pooled"], "time_ids": cond["size"]} if "pooled" in cond else None
    output: Tensor = model(noisy, timesteps, encoder_hidden_states=cond["text"], added_cond_kwargs=added).sample
    return output


def _sd3(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    output: Tensor = model(
        noisy, encoder_hidden_states=cond["text"], pooled_projections=cond["pooled"], timestep=timesteps
    ).sample
    return output


def _flux(model: Any, noisy: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
    """Tokens are cells of 2×2 latents; their rows and columns are passed beside them."""
    n, c, height, width = noisy.shape
    tokens = noisy.reshape(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * 4)
    places = torch.zeros(height // 2, width // 2, 3, device=noisy.device)
    places[..., 1] += torch.arange(height // 2, device=noisy.device)[:, None]
    places[..., 2] += torch.arange(width // 2, device=noisy.device)
    output = model(
        tokens,
        encoder_hidden_states=cond["text"],
        pooled_projections=cond["pooled"],
        timestep=timesteps / 1000,
        img_ids=places.reshape(-1, 3),
        txt_ids=torch.zeros(cond["text"].shape[1], 3, device=noisy.device),
        # A distilled model is trained as if guidance were off.
        guidance=torch.ones(n, device=noisy.device) if model.config.guidance_embeds else None,
    ).sample
    output = output.reshape(n, height // 2, width // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(n, c, height, width)


# Class of the trained component -> family; a UNet with pooled text is SDXL's.
FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": Family("unet", _encode_sd, _unet, 1),
    "UNet2DConditionModel text_time": Family("unet", _encode_sdxl, _unet, 1),
    "SD3Transformer2DModel": Family("transformer", _encode_sd3, _sd3, 2),
    "FluxTransformer2DModel": Family("transformer", _encode_flux, _flux, 2),
}


# --- noise --------------------------------------------------------------------------------------


class Noising(NamedTuple):
    """How noise is added: x = signal·x₀ + noise·ε at a time in 0…1, and the model's prediction and timestep."""

    prediction: str
    at: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # times (n,) -> signal, noise, timestep


def noising(scheduler: Any) -> Noising:
    """From the configuration of a diffusers scheduler.

    Raises:
        LoHaError: a kind that is not known.
    """
    kind = type(scheduler).__name__
    if "FlowMatch" in kind:
        count = scheduler.config.num_train_timesteps
        return Noising("flow", lambda time: (1 - time, time, time * count))
    predictions = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    prediction = predictions.get(scheduler.config.get("prediction_type", "epsilon"))
    products = getattr(scheduler, "alphas_cumprod", None)
    if prediction is None or products is None:
        raise LoHaError(f"the pipeline's scheduler {kind} cannot be trained with; DDIMScheduler can")

    def at(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step = (time * len(products)).long().clamp(max=len(products) - 1)
        product = products[step].to(torch.float32)
        return product.sqrt(), (1 - product).sqrt(), step

    return Noising(prediction, at)


# --- the pipeline -------------------------------------------------------------------------------


def load_pipeline(settings: ModelSettings, root: Path) -> Any:
    """The pipeline of a local diffusers folder.

    Raises:
        LoHaError: diffusers is not installed, there is no such folder, or it cannot be loaded.
    """
    try:
        import diffusers
    except ImportError:
        raise LoHaError(f"training on the command line needs diffusers: {EXTRA}") from None
    path = root / settings.path
    index = path / "model_index.json"
    if not index.is_file():
        raise LoHaError(f"{path}: no diffusers folder (there is no model_index.json); convert the checkpoint to one")
    dtype = DTYPES[settings.dtype]
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    unused = {"safety_checker": None} if '"safety_checker"' in index.read_text("utf-8") else {}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(path),
            # In float16 some VAEs overflow, and it is used for a moment only.
            dtype={"vae": torch.float32, "default": dtype},
            **unused,
            **options,
        )
        if settings.component:
            name = next(each for each in ("unet", "transformer") if getattr(pipe, each, None) is not None)
            model_class = type(getattr(pipe, name))
            setattr(pipe, name, model_class.from_pretrained(str(root / settings.component), dtype=dtype, **options))
    except (OSError, ValueError, ImportError, StopIteration) as error:
        raise LoHaError(f"{path}: diffusers cannot load it: {error}") from error
    return pipe


@dataclass(frozen=True)
class Batch:
    """n samples with their noise, on the model's device."""

    noisy: Tensor  # (n, c, h, w)
    target: Tensor  # (n, c, h, w)
    gain: Tensor  # (n,)
    snr: Tensor  # (n,)
    timesteps: Tensor  # (n,)
    samples: list[Sample]
    mask: Tensor | None  # (n, 1, h, w)
    sample_weight: Tensor  # (n,)


class Diffusion:
    """A pipeline's model with LoHa layers, and what encodes pictures and captions for it.

    Args:
        pipe: a diffusers pipeline; what is trained of it is changed in place.
        device: where the model runs.

    Raises:
        LoHaError: an architecture that is not known.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        model = getattr(pipe, "unet", None)
        self.model: Any = model if model is not None else getattr(pipe, "transformer", None)
        kind = type(self.model).__name__
        if getattr(self.model, "config", {}).get("addition_embed_type") == "text_time":
            kind += " text_time"
        if kind not in FAMILIES:
            known = ", ".join(name for name in FAMILIES if " " not in name)
            raise LoHaError(f"{type(pipe).__name__} has a {kind}; these can be trained: {known}")
        self.family, self.noising = FAMILIES[kind], noising(pipe.scheduler)
        self.trains_text = False

    # What is trained

    def networks(self, config: LoHaConfig, text_encoders: bool) -> dict[str, dict[str, LoHaLayer]]:
        """LoHa layers in the model and, on request, in its text encoders, by their paths in the pipeline."""
        for part in (self.model, *self._text_encoders().values()):
            part.requires_grad_(False)
        networks = {"model": _wrapped(self.model, config, self.family.component)}
        self.trains_text = text_encoders
        if text_encoders:
            networks["text"] = {}
            for name, encoder in self._text_encoders().items():
                encoder.to(self.device)
                networks["text"] |= _wrapped(encoder, _for_text(config), name)
        return networks

    def _text_encoders(self) -> dict[str, nn.Module]:
        encoders = ((name, getattr(self.pipe, name, None)) for name in TEXT_ENCODERS)
        return {name: encoder for name, encoder in encoders if encoder is not None}

    # Encoding

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this."""
        return int(self.pipe.vae_scale_factor) * self.family.multiple

    def latent(self, picture: Tensor) -> Tensor:
        """(h, w, 3) in 0…1 -> (c, h/f, w/f), as the VAE gives it: the mode of its distribution."""
        vae = self.pipe.vae.to(self.device)
        pixels = picture.movedim(-1, 0)[None].to(self.device, vae.dtype) * 2 - 1
        with torch.no_grad():
            latent: Tensor = vae.encode(pixels).latent_dist.mode()[0]
        return latent.float().cpu()

    def encode(self, caption: str) -> Conditioning:
        for encoder in self._text_encoders().values():
            encoder.to(self.device)
        return self.family.encode(self.pipe, caption, self.device)

    def put_away(self, *, text_encoders: bool) -> None:
        """Move the VAE, and the text encoders on request, off the device."""
        for part in [self.pipe.vae, *(self._text_encoders().values() if text_encoders else ())]:
            part.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _wrapped(module: nn.Module, config: LoHaConfig, network: str) -> dict[str, LoHaLayer]:
    if config.target_modules is None:
        config = LoHaConfig(**{**vars(config), "target_modules": _blocks(module)})
    return {f"{network}.{name}": layer for name, layer in LoHaModel(module, config).loha_layers()}


def _blocks(model: nn.Module) -> list[str]:
    """Linear layers and convolutions in a network's blocks, without those of time and size embeddings."""
    kinds = (nn.Linear, nn.Conv2d)
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in named if re.search(r"\.\d+\.", name) and not re.search(r"time_emb|norm|embed", name)]


def _for_text(config: LoHaConfig) -> LoHaConfig:
    """The same for text encoders, whose modules have other names."""
    unset = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return LoHaConfig(**{**vars(config), **unset})


class Feed:
    """Batches of a data set for a model, and their loss.

    Args:
        places: which of a batch's places are this process's; all of them by default.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        dataset: Dataset,
        objective: Objective,
        batch_size: int,
        seed: int,
        places: range | None = None,
    ) -> None:
        self.diffusion, self.dataset, self.objective = diffusion, dataset, objective
        self.sampler = BatchSampler(dataset, objective, batch_size, seed, places)

    def batch(self, number: int) -> Batch:
        """This process's part of batch ``number`` since training began; all that is random follows from the number."""
        d, drawn = self.diffusion, self.sampler.batch(number)
        config = d.pipe.vae.config
        clean = (drawn.latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        prediction = PREDICTIONS[d.noising.prediction]
        signal, sigma, timesteps = d.noising.at(torch.tensor(drawn.times))
        a, s = (t.reshape(-1, 1, 1, 1) for t in (signal, sigma))
        return Batch(
            noisy=(a * clean + s * drawn.noise).to(d.device),
            target=prediction.target(clean, drawn.noise, a, s).to(d.device),
            gain=prediction.gain(signal, sigma).to(d.device),
            snr=(signal / sigma).square().to(d.device),
            timesteps=timesteps.to(d.device),
            samples=drawn.samples,
            mask=None if drawn.mask is None else drawn.mask.to(d.device),
            sample_weight=drawn.sample_weight.to(d.device),
        )

    def loss(self, batch: Batch) -> Tensor:
        """A scalar, differentiable with respect to the layers."""
        d = self.diffusion
        encode = d.encode if d.trains_text else self.dataset.encode
        encoded = [encode(sample.caption) for sample in batch.samples]
        dtype = d.model.dtype
        cond = {name: torch.cat([each[name].to(d.device) for each in encoded]).to(dtype) for name in encoded[0]}
        # SDXL takes the size of the picture, and the place and size of its crop: here, all of it.
        height, width = (side * int(d.pipe.vae_scale_factor) for side in batch.noisy.shape[-2:])
        size = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=d.device)
        cond["size"] = size.expand(len(encoded), -1)
        output = d.family.forward(d.model, batch.noisy.to(dtype), batch.timesteps, cond)
        return self.objective.loss(
            output, batch.target, batch.gain, batch.snr, mask=batch.mask, sample_weight=batch.sample_weight
        )
