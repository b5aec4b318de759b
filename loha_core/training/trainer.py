"""The training loop. It knows no model and no ComfyUI: only layers, batches, a loss, and an optimizer.

Everything random is a function of (seed, number of the batch, place in it), never of what was drawn before. So a run
that was interrupted goes on bit for bit with nothing but its factors and its optimizer's state, and processes that
share the work draw what one process would have drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoHaError
from ..factors import LoHaFactors
from ..formats.container import atomic
from ..tuner.layer import LoHaLayer
from . import state as checkpoint
from .data.dataset import digest, generator
from .optimizers import OptimizerConfig, parameter_groups

ADAPTER = "default"
STATE, HISTORY = "state.safetensors", "loss.csv"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the loss in fp16, and steps without an overflow after which it doubles again.
MOST_SCALE, RAISE_SCALE_AFTER = 2.0**16, 1000


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how much at once, and what is kept.

    Attributes:
        steps: optimizer steps.
        accumulation: batches per step.
        seed: of everything.
        precision: "fp32", or "bf16" or "fp16" for autocast around the loss; factors stay float32.
        max_grad_norm: gradients are scaled down to this norm; 0 is off.
        ema: decay of the exponential moving average that is saved and shown instead of the factors; 0 is off.
        max_norm: no layer's ‖ΔW‖ gets above this; 0 is off.
        save_every, preview_every: in steps; 0 is never (the state is saved at the end in any case).

    Raises:
        LoHaError: a value out of its range.
    """

    steps: int = 1000
    accumulation: int = 1
    seed: int = 0
    precision: str = "fp32"
    max_grad_norm: float = 1.0
    ema: float = 0.0
    max_norm: float = 0.0
    save_every: int = 100
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulation", 1), ("save_every", 0), ("preview_every", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise LoHaError(f"{name} is {value}; expected a whole number from {least}")
        for name in ("max_grad_norm", "max_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise LoHaError(f"{name} is {getattr(self, name)}; expected a number from 0")
        if not 0 <= self.ema < 1:
            raise LoHaError(f"ema is {self.ema}; expected a decay from 0 up to but not 1, such as 0.999")
        if self.precision not in PRECISIONS:
            raise LoHaError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class Stepped:
    """After an optimizer step.

    Attributes:
        step: how many there have been, of ``steps``.
        loss: the mean over this step's batches.
        lr: the first group's learning rate.
        norm: the gradients' norm before clipping.
    """

    step: int
    steps: int
    loss: float
    lr: float
    norm: float


@dataclass(frozen=True)
class PreviewDue:
    """Time to show what has been learnt: while callbacks get this, the layers act as they would be saved."""

    step: int


@dataclass(frozen=True)
class Saved:
    """The state was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopped:
    """The run ended before its last step, by an exception; what there was is saved."""

    step: int
    reason: BaseException


Event = Stepped | PreviewDue | Saved | Stopped
Callback = Callable[[Event], None]


class Diverged(LoHaError):
    """The loss or the factors are no longer finite."""


class Trainer:
    """Trains LoHa layers.

    >>> trainer = Trainer({"model": layers}, batches, loss, TrainingConfig(steps=100))     # doctest: +SKIP
    >>> trainer.run()                                                                      # doctest: +SKIP
    >>> trainer.factors()["model"]                                                         # doctest: +SKIP

    Args:
        networks: "model" and perhaps "text" -> module name -> layer with one adapter, named `ADAPTER`. They act
            wherever the loss makes them act: in a `LoHaModel`, or `attached`.
        batches: number of a batch, counted from the start of training -> the batch. A pure function.
        loss: batch -> scalar loss.
        config, optimizer: what they say.
        init: `LoHaConfig.init_weights`, for LoRA+.
        folder: where the state and the losses are kept; None keeps nothing.
        identity: what else a resumed run must agree with, such as the data set's fingerprint.
        callbacks: get every `Event`. One that raises stops the run, after the state is saved.
        accelerator: of Hugging Face Accelerate, for several processes: each has all of the factors and its share of
            every batch, and gradients are averaged. The frozen model may be sharded.

    Attributes:
        step: optimizer steps done.
        losses: one per step.
    """

    def __init__(
        self,
        networks: Mapping[str, Mapping[str, LoHaLayer]],
        batches: Callable[[int], Any],
        loss: Callable[[Any], Tensor],
        config: TrainingConfig,
        optimizer: OptimizerConfig | None = None,
        *,
        init: bool | str = True,
        folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        callbacks: Sequence[Callback] = (),
        accelerator: Any = None,
    ) -> None:
        self.networks = networks
        self.batches, self.config, self.optimizing = batches, config, optimizer or OptimizerConfig()
        self.folder, self.callbacks, self.accelerator = folder, callbacks, accelerator
        modules = {label: nn.ModuleList(layers.values()) for label, layers in networks.items()}
        self.optimizer = self.optimizing.build(parameter_groups(modules, self.optimizing, init))
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else None
        self.identity = self._identity() | dict(identity or {})
        self.step, self.losses = 0, list[float]()
        self._loss_scale, self._steps_at_scale = (MOST_SCALE if config.precision == "fp16" else 1.0), 0
        self._whole = True  # not amid an optimizer step
        self._loss = loss

    def run(self) -> None:
        """Train from where the run is to its last step.

        Raises:
            Diverged: the state that was saved last is still good.
            LoHaError: the state cannot be written.
        """
        c = self.config
        with own_randomness(), self._training():
            try:
                while self.step < c.steps:
                    loss, norm = self._backward()
                    # Only now is it known that the state is a good one: its loss is a number.
                    if c.save_every and self.step and self.step % c.save_every == 0:
                        self.save()
                    self._update()
                    self.step += 1
                    self.losses.append(loss)
                    self._emit(Stepped(self.step, c.steps, loss, self.optimizer.param_groups[0]["lr"], norm))
                    if c.preview_every and self.step % c.preview_every == 0:
                        with self.averaged():
                            self._emit(PreviewDue(self.step))
            except BaseException as reason:
                self._keep(reason)
                raise
            self.save()

    # One step

    def _backward(self) -> tuple[float, float]:
        """Gradients of this step's batches; the mean loss, and the gradients' norm.

        In fp16 the loss is scaled, or most gradients would round to zero (Micikevicius et al., arXiv 1710.03740,
        section 3.2). A scale at which they overflow is halved, and the step taken again.
        """
        c = self.config
        while True:
            total = self._gradients()
            norm = float(nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm or math.inf))
            if math.isfinite(total) and math.isfinite(norm):
                return total, norm
            if not math.isfinite(total) or self._loss_scale <= 1:
                break
            self._loss_scale, self._steps_at_scale = self._loss_scale / 2, 0
        raise Diverged(
            f"step {self.step + 1}: the loss is {total:g} and the gradients' norm {norm:g}. Lower the learning "
            f"rate ({self.optimizing.lr:g} now), add warm-up steps, or use a wider precision than {c.precision}."
        )

    def _gradients(self) -> float:
        """Of this step's batches, in the parameters' ``grad``; the mean loss."""
        c, total = self.config, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(c.accumulation):
            number = self.step * c.accumulation + part
            batch = self.batches(number)
            torch.manual_seed(generator(c.seed, "dropout", number, self._rank).initial_seed())
            with self._autocast():
                loss = self._loss(batch) / c.accumulation
            if loss.requires_grad:
                (loss * self._loss_scale).backward()
            elif not any(layer.module_dropout[ADAPTER] for layer in self._layers()):
                raise LoHaError("the loss does not depend on any trained layer: none of them was run")
            total += float(loss.detach())
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            total = self._average(total)
        if self._loss_scale != 1 and (found := [p.grad for p in self.parameters if p.grad is not None]):
            torch._foreach_div_(found, self._loss_scale)
        return total

    def _update(self) -> None:
        """The optimizer's step, and what follows from it."""
        factor = self.optimizing.factor(self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self._whole = False
        self.optimizer.step()
        if self.config.max_norm:
            for layer in self._layers():
                limit_norm(layer, self.config.max_norm)
        if self.average is not None:
            # The first steps count more: an average over at most as many steps as there have been.
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self._steps_at_scale += 1
        if self.config.precision == "fp16" and self._steps_at_scale == RAISE_SCALE_AFTER:
            self._loss_scale, self._steps_at_scale = min(2 * self._loss_scale, MOST_SCALE), 0
        self._whole = True

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = PRECISIONS[self.config.precision]
        return nullcontext() if dtype is None else torch.autocast(self.parameters[0].device.type, dtype=dtype)

    def _layers(self) -> Iterator[LoHaLayer]:
        return (layer for layers in self.networks.values() for layer in layers.values())

    def _emit(self, event: Event) -> None:
        for callback in self.callbacks:
            callback(event)

    # Several processes

    @property
    def _rank(self) -> int:
        return 0 if self.accelerator is None else int(self.accelerator.process_index)

    def _average(self, loss: float) -> float:
        """Gradients, and the loss, as the mean of all processes': one exchange, of no more than the factors' size.

        A layer that a process's batch left out has a gradient of zero there.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        own = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        mean = self.accelerator.reduce(nn.utils.parameters_to_vector([own[0].new_tensor(loss), *own]), "mean")
        nn.utils.vector_to_parameters(mean[1:], own)
        return float(mean[0])

    # What has been learnt

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While this lasts, the layers are as they would be saved: averaged, not training, dropping nothing."""
        swap, layers = getattr(self.optimizer, "eval", None), list(self._layers())
        own = None if swap is None and self.average is None else [p.detach().clone() for p in self.parameters]
        training = [layer.training for layer in layers]
        if swap is not None:
            swap()
        if self.average is not None:
            _copy(self.parameters, self.average)
        for layer in layers:
            layer.training = False
            if own is not None and self.config.max_norm:
                limit_norm(layer, self.config.max_norm)  # an average can be longer than what it is of
        try:
            yield
        finally:
            if swap is not None:
                self.optimizer.train()  # type: ignore[attr-defined]
            if own is not None:
                _copy(self.parameters, own)  # the optimizer's way back rounds
            for layer, before in zip(layers, training, strict=True):
                layer.training = before

    def factors(self) -> dict[str, dict[str, LoHaFactors]]:
        """Network -> module name -> what was learnt, on the CPU."""
        with self.averaged():
            return {
                label: {name: _copied(layer.factors(ADAPTER)) for name, layer in layers.items()}
                for label, layers in self.networks.items()
            }

    # Going on

    def _identity(self) -> dict[str, str]:
        """What must be the same for a resumed run to be the same run; when it saves or shows something is not."""
        free = ("steps", "save_every", "preview_every")
        settings = {key: value for key, value in asdict(self.config).items() if key not in free}
        if self.optimizing.schedule != "constant":
            settings["steps"] = self.config.steps  # the learning rate looks ahead
        network = [
            (label, name, *(getattr(layer, kind).get(ADAPTER) for kind in layer.other_param_names))
            for label, layers in self.networks.items()
            for name, layer in layers.items()
        ] + [tuple(p.shape) for p in self.parameters]
        named = {key: str(value) for key, value in (settings | asdict(self.optimizing)).items()}
        return named | {"network": digest(repr(network))}

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "identity": self.identity,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": (self._loss_scale, self._steps_at_scale),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }

    def save(self) -> None:
        """Write the state, and the losses so far as a table beside it.

        Raises:
            LoHaError: it cannot be written; the state before is then still there.
        """
        if self.folder is None or self._rank != 0:
            return
        checkpoint.save(self.folder / STATE, self.state())
        with atomic(self.folder / HISTORY) as temporary:
            rows = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(self.losses, 1))
            temporary.write_text(f"step,loss\n{rows}", "utf-8")
        self._emit(Saved(self.step, self.folder / STATE))

    def resume(self) -> bool:
        """Go on from the state in ``folder``; False if there is none.

        Raises:
            LoHaError: it belongs to another run: other data, network or settings.
        """
        if self.folder is None:
            return False
        if self._rank == 0:
            # What a run that was killed amid a save left behind; safetensors' own files have six letters.
            for pattern in (f".{STATE}.*.tmp", f".{HISTORY}.*.tmp", ".tmp??????"):
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
        path = self.folder / STATE
        if not path.is_file():
            return False
        state = checkpoint.load(path)
        then, now = state.get("identity", {}), self.identity
        differing = [
            f"{key} ({then.get(key, 'not set')} then, {now.get(key, 'not set')} now)"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if differing:
            raise LoHaError(
                f"{path}: a run with other settings: {', '.join(differing)}. It can only go on as it began: "
                "set them back, choose another name, or start again without resume."
            )
        _copy(self.parameters, state["parameters"])
        if self.average is not None:
            _copy(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._loss_scale, self._steps_at_scale = state["loss_scale"]
        self.step, self.losses = state["step"], state["losses"].tolist()
        return True

    def _keep(self, reason: BaseException) -> None:
        """Save what is good after an exception, which stays the one that is raised."""
        good = self._whole and not isinstance(reason, Diverged)
        try:
            if good and all(bool(torch.isfinite(p).all()) for p in self.parameters):
                self.save()
        except Exception as error:  # of the disk, or of a callback
            warnings.warn(f"what was learnt since the state was saved last is lost: {error}", stacklevel=3)
        for callback in self.callbacks:
            callback(Stopped(self.step, reason))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The layers drop what they are told to; the optimizer knows, if it wants to."""
        layers = list(self._layers())
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.training = True  # not train(), which would reach the frozen modules
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        try:
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer.training = was


def limit_norm(layer: LoHaLayer, most: float) -> None:
    """Scale a layer's factors down, all alike, until ‖ΔW‖ is at most ``most``. One that is not finite stays."""
    factors = layer.factors(ADAPTER)
    norm = factors.norm()
    if not most < norm < math.inf:
        return
    names = [name for name in factors.tensors() if name != "dora_scale"]
    shrink = (most / norm) ** (1 / len(names)) * (1 - 2**-22)  # a little more: what follows is rounded
    for name in names:
        getattr(layer, f"hada_{name}")[ADAPTER].data.mul_(shrink)


def _copied(factors: LoHaFactors) -> LoHaFactors:
    """On the CPU, and nobody else's."""
    copies: dict[str, Any] = {name: t.to("cpu", copy=True) for name, t in factors.tensors().items()}
    return replace(factors, **copies)


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(to, source, strict=True):
            target.copy_(value)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Seeds set here are not seen outside: ``torch.manual_seed`` sets those of all devices, used or not."""
    states = [(put, get()) for get, put in _random_states()]
    try:
        yield
    finally:
        for put, state in states:
            put(state)


def _random_states() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """How to get and to set them, for the CPU and each kind of device that is there."""
    yield torch.get_rng_state, torch.set_rng_state
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            yield kind.get_rng_state_all, kind.set_rng_state_all
    if torch.backends.mps.is_available():
        yield torch.mps.get_rng_state, torch.mps.set_rng_state
