"""A diffusers pipeline's model, its latents and encoded captions, and its loss.

The pipeline itself encodes captions, and its scheduler's configuration says how noise is added and what the output
means; what else differs between architectures is in `families`. Needs diffusers and transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import LoHaError, about
from ...tuner.config import LoHaConfig
from ...tuner.layer import LoHaLayer
from ...tuner.model import LoHaModel
from ..attach import recomputing
from ..data.batches import BatchSampler, TrainingBatch
from ..data.dataset import Dataset, Sample
from ..losses.loss import Model
from ..losses.strength import Strength
from ..objectives import PREDICTIONS, Objective
from .families import FAMILIES, Conditioning, Stage, collated, stages
from .placement import blocks_in
from .settings import ModelSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTRA = "pip install 'comfyui-loha[train]'"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


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
    kind, said = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
    if "FlowMatch" in kind or said == "flow_prediction":
        count = scheduler.config.num_train_timesteps
        return Noising("flow", lambda time: (1 - time, time, time * count))
    predictions = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    prediction = predictions.get(said)
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
            stage = stages(pipe).get(settings.stage)
            own = (stage.component,) if stage else ("unet", "transformer")
            name = next(each for each in own if getattr(pipe, each, None) is not None)
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
    signal: Tensor  # (n,), of the picture in noisy
    sigma: Tensor  # (n,), of the noise
    class_prompts: list[str] | None = None
    low: Batch | None = None  # of strength −1, in a slider


class Diffusion:
    """A pipeline's model with LoHa layers, and what encodes pictures and captions for it.

    Args:
        pipe: a diffusers pipeline; what is trained of it is changed in place.
        device: where the model runs.
        stage: which of its models is trained, where it has several.

    Raises:
        LoHaError: a pipeline that is not known, the message lists those that are; or a stage that it does not have.
    """

    def __init__(self, pipe: Any, device: torch.device, stage: str = "") -> None:
        self.pipe, self.device = pipe, device
        name = type(pipe).__name__
        if name not in FAMILIES:
            raise LoHaError(f"{name} cannot be trained; these can: {', '.join(FAMILIES)}")
        self.family = FAMILIES[name]
        self.noising = noising(pipe.scheduler)
        component, *self.times = (
            _stage(pipe, stage) if stage or stages(pipe) else Stage(self.family.component, 0.0, 1.0)
        )
        self.model: Any = getattr(pipe, component)
        if (found := type(self.model).__name__) != self.family.model:
            raise LoHaError(f"{name} has a {found}; expected a {self.family.model}")
        self.trains_text = False
        self.strength = Strength()

    # What is trained

    def networks(self, config: LoHaConfig, text_encoders: bool) -> dict[str, dict[str, LoHaLayer]]:
        """LoHa layers in the model and, on request, in its text encoders, by their paths in the pipeline.

        Raises:
            LoHaError: the family's text encoders are not trained.
        """
        if text_encoders and not self.family.trains_text:
            kinds = ", ".join(type(encoder).__name__ for encoder in self._text_encoders().values())
            can = ", ".join(name for name, family in FAMILIES.items() if family.trains_text)
            raise LoHaError(
                f"the text encoder of {type(self.pipe).__name__} ({kinds}) cannot be trained; set text_encoders to "
                f"false. Those of {can} can"
            )
        for part in (self.model, *self._text_encoders().values()):
            part.requires_grad_(False)
        networks = {"model": _wrapped(self.model, config, self.family.component)}
        self.trains_text = text_encoders
        if text_encoders:
            networks["text"] = {}
            for name, encoder in self._text_encoders().items():
                encoder.to(self.device)
                networks["text"] |= _wrapped(encoder, _for_text(config), name)
        self.strength.layers = [layer for layers in networks.values() for layer in layers.values()]
        return networks

    def _text_encoders(self) -> dict[str, nn.Module]:
        encoders = ((name, getattr(self.pipe, name, None)) for name in TEXT_ENCODERS)
        return {name: encoder for name, encoder in encoders if encoder is not None}

    # Encoding

    def objective(self, chosen: Objective | None = None) -> Objective:
        """The objective of a run: what was chosen or the family's usual one, at the times that are the model's.

        For a model of flows the usual one is a logit-normal whose times are shifted.

        Raises:
            LoHaError: none of the chosen times is.
        """
        if chosen is None and self.noising.prediction == "flow":
            family = self.family
            # A shift multiplies the odds of a time.
            chosen = Objective(
                timesteps="logit-normal", logit_mean=math.log(family.shift), resolution_shift=family.resolution_shift
            )
        chosen, (start, stop) = chosen or Objective(), self.times
        low, high = max(chosen.min_timestep, start), min(chosen.max_timestep, stop)
        with about(f"this model is for times from {start:g} to {stop:g}"):
            return replace(chosen, min_timestep=low, max_timestep=high)

    @property
    def multiple(self) -> int:
        """Sides of pictures must be multiples of this."""
        return self.scale * self.family.multiple

    @property
    def scale(self) -> int:
        """Pixels along a side of a place in a latent."""
        return self.family.scale(self.pipe)

    def latent(self, picture: Tensor) -> Tensor:
        """(h, w, 3) in 0…1 -> (c, h/f, w/f) as the model takes it: normalised, the mode of the VAE's distribution."""
        vae = self.pipe.vae.to(self.device)
        pixels = picture.movedim(-1, 0)[None].to(self.device, vae.dtype) * 2 - 1
        with torch.no_grad():
            return self.family.latent(vae, pixels)[0].float().cpu()

    def encode(self, caption: str) -> Conditioning:
        for encoder in self._text_encoders().values():
            encoder.to(self.device)
        return self.family.encode(self.pipe, caption, self.device)

    # The model

    def output(self, noisy: Tensor, timesteps: Tensor, encoded: Sequence[Conditioning]) -> Tensor:
        """What the model makes of noisy latents (n, c, h, w) at timesteps (n,), with what `encode` gave for each."""
        dtype = self.model.dtype
        cond = collated(encoded, self.device, dtype)
        # Some take the size of the picture, and the place and size of its crop: here, all of it.
        height, width = (side * self.scale for side in noisy.shape[-2:])
        size = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=self.device)
        cond["size"] = size.expand(len(encoded), -1)
        return self.family.forward(self.model, noisy.to(dtype), timesteps, cond)

    def enable_gradient_checkpointing(self) -> None:
        """Less memory for more time: blocks run again in the backward."""
        if not self.family.checkpointed:
            self.model.enable_gradient_checkpointing(self.strength.recomputed)
            return
        blocks = blocks_in(self.model, self.family.checkpointed)
        self._recomputing = ExitStack()  # held as long as this is
        self._recomputing.enter_context(recomputing(blocks, self.strength))

    def put_away(self, *, text_encoders: bool) -> None:
        """Move the VAE, and the text encoders on request, off the device."""
        for part in [self.pipe.vae, *(self._text_encoders().values() if text_encoders else ())]:
            part.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _stage(pipe: Any, stage: str) -> Stage:
    """The stage of this name."""
    found, name = stages(pipe), type(pipe).__name__
    if not found:
        raise LoHaError(f"[model] stage is {stage!r}, but this {name} has one model for all noise; leave it out")
    if stage not in found:
        which = " or ".join(f'"{each}"' for each in found)
        raise LoHaError(
            f"this {name} has a model for each of {len(found)} stages; say by [model] stage which is trained: {which}"
        )
    return found[stage]


def _wrapped(module: nn.Module, config: LoHaConfig, network: str) -> dict[str, LoHaLayer]:
    if config.target_modules is None:
        config = LoHaConfig(**{**vars(config), "target_modules": _blocks(module)})
    return {f"{network}.{name}": layer for name, layer in LoHaModel(module, config).loha_layers()}


_CONDITIONING = re.compile(r"time_emb|norm|embed|modulation|_mod\.|guidance")


def _blocks(model: nn.Module) -> list[str]:
    """Linear layers and convolutions in a network's blocks, without those of time and size embeddings."""
    kinds = (nn.Linear, nn.Conv2d)
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in named if re.search(r"\.\d+\.", name) and not _CONDITIONING.search(name)]


def _for_text(config: LoHaConfig) -> LoHaConfig:
    """The same for text encoders, whose modules have other names."""
    unset = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return LoHaConfig(**{**vars(config), **unset})


class Feed(Model[Batch]):
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
        self.diffusion, self.strength = diffusion, diffusion.strength
        self.sampler = BatchSampler(dataset, objective, batch_size, seed, places)

    def noised(self, drawn: TrainingBatch) -> Batch:
        """x = signal·x₀ + sigma·ε, on the model's device."""
        d, clean = self.diffusion, drawn.latents
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
            signal=signal.to(d.device),
            sigma=sigma.to(d.device),
            class_prompts=drawn.class_prompts,
            low=None if drawn.low is None else self.noised(drawn.low),
        )

    def parts(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents, normalised, and the noise that an output stands for, on the CPU."""
        a, s, gain = (t.reshape(-1, 1, 1, 1) for t in (batch.signal, batch.sigma, batch.gain))
        # x₀ is linear in the output, and the output for x₀ = 0 is that of the noise x/σ alone.
        nothing = PREDICTIONS[self.diffusion.noising.prediction].target(
            torch.zeros_like(batch.noisy), batch.noisy / s, a, s
        )
        clean = gain * (output.float() - nothing)
        return clean.cpu(), ((batch.noisy - a * clean) / s).cpu()

    # Predictions and the loss

    def prediction(self, batch: Batch, prompts: Sequence[str] | None = None) -> Tensor:
        d = self.diffusion
        encode = d.encode if d.trains_text else self.sampler.dataset.encode
        asked = [sample.caption for sample in batch.samples] if prompts is None else prompts
        return d.output(batch.noisy, batch.timesteps, [encode(prompt) for prompt in asked])

    def target(self, batch: Batch) -> Tensor:
        return batch.target

    def gain_and_snr(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.gain, batch.snr
