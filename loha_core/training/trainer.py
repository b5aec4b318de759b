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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoHaError
from ..factors import LoHaFactors
from ..tuner.layer import LoHaLayer
from . import state as checkpoint
from .config import MIXED_PRECISION, TrainingConfig
from .digest import digest
from .events import Callback, Event, PreviewDue, Saved, Stepped, Stopped, Validated
from .optimizers import OptimizerConfig, parameter_groups
from .randomness import fork_rng, generator
from .state import STATE

ADAPTER = "default"
# Of the loss in fp16; the interval is in steps without an overflow.
MAX_LOSS_SCALE, LOSS_SCALE_GROWTH_INTERVAL = 2.0**16, 1000


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
        config, optimizer: see there.
        init: `LoHaConfig.init_weights`, for LoRA+.
        folder: where the state and the losses are kept; None keeps nothing.
        identity: what else a resumed run must agree with, such as the data set's fingerprint.
        callbacks: get every `Event`. One that raises stops the run, after the state is saved.
        accelerator: of Hugging Face Accelerate, for several processes: each has all of the factors and its part of
            every batch, and gradients are averaged. The frozen model may be sharded.
        validate: gives the loss on held-out data, the same whenever the factors are; None has none.

    Attributes:
        step: optimizer steps done.
        losses: one per step.
        validation: step and loss of each time that it was taken.
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
        validate: Callable[[], float] | None = None,
    ) -> None:
        self.networks, self.batches, self._loss, self._validate = networks, batches, loss, validate
        self.config, self.optimizer_config = config, optimizer or OptimizerConfig()
        self.folder, self.callbacks, self.accelerator = folder, callbacks, accelerator
        self.optimizer = self.optimizer_config.build(parameter_groups(networks, self.optimizer_config, init))
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else None
        self.identity = self._identity() | dict(identity or {})
        self.step, self.losses, self.validation = 0, list[float](), list[tuple[int, float]]()
        self._loss_scale = MAX_LOSS_SCALE if config.mixed_precision == "fp16" else 1.0
        self._steps_since_overflow = 0
        self._updating = False  # the parameters are between two steps' values

    def run(self) -> None:
        """Train from where the run is to its last step.

        Raises:
            Diverged: the state that was saved last is still good.
            LoHaError: the state cannot be written.
        """
        c = self.config
        with fork_rng(), self._train_mode():
            try:
                self._validate_if_due()
                while self.step < c.steps:
                    self._emit(self._train_step())
                    self._validate_if_due()
                    if c.preview_every and self.step % c.preview_every == 0:
                        with self.eval_mode():
                            self._emit(PreviewDue(self.step))
            except BaseException as error:
                self._save_after(error)
                raise
            self.save()

    def _validate_if_due(self) -> None:
        """Unless it was done at this step: one that a callback's exception ended is done again when the run goes on.

        The state is saved with each best, so that a run that goes on never takes a worse one for it.
        """
        last = self.validation[-1][0] if self.validation else 0
        if self._validate is None or self.step <= last or self.step % self.config.validate_every:
            return
        with fork_rng(), self.eval_mode(), torch.no_grad(), self._autocast():
            loss = self._validate()
        if not math.isfinite(loss):
            raise Diverged(f"step {self.step}: the loss on held-out data is {loss:g}. Lower the learning rate.")
        best = loss < min((loss for _, loss in self.validation), default=math.inf)
        self.validation.append((self.step, loss))
        try:
            self._emit(Validated(self.step, loss, best))
        except BaseException:
            self.validation.pop()
            raise
        if best:
            self._write()

    # One step

    def _train_step(self) -> Stepped:
        """Gradients of this step's batches, and the optimizer's step.

        In fp16 the loss is scaled, or most gradients would round to zero (Micikevicius et al., arXiv 1710.03740,
        section 3.2). A scale at which they overflow is halved, and the step taken again: torch's GradScaler skips it.
        """
        c = self.config
        loss, norm = self._backward()
        while math.isfinite(loss) and not math.isfinite(norm) and self._loss_scale > 1:
            self._loss_scale, self._steps_since_overflow = self._loss_scale / 2, 0
            loss, norm = self._backward()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"step {self.step + 1}: the loss is {loss:g} and the gradients' norm {norm:g}. Lower the learning rate "
                f"({self.optimizer_config.lr:g} now), add warm-up steps, or train without mixed precision "
                f"({c.mixed_precision} now)."
            )
        # Only now is it known that the state is a good one: its loss is a number.
        if c.save_every and self.step and self.step % c.save_every == 0:
            self.save()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * self.optimizer_config.factor(self.step, c.steps)
        self._updating = True
        self.optimizer.step()
        if c.max_norm:
            for layer in self._layers():
                clip_delta_norm_(layer, c.max_norm)
        if self.average is not None:
            # The first steps count more: an average over at most as many steps as there have been.
            decay = min(c.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        self._steps_since_overflow += 1
        if c.mixed_precision == "fp16" and self._steps_since_overflow == LOSS_SCALE_GROWTH_INTERVAL:
            self._loss_scale, self._steps_since_overflow = min(2 * self._loss_scale, MAX_LOSS_SCALE), 0
        self._updating = False
        self.step += 1
        self.losses.append(loss)
        return Stepped(self.step, c.steps, loss, self.optimizer.param_groups[0]["lr"], norm)

    def _backward(self) -> tuple[float, float]:
        """Gradients of this step's batches, clipped; the mean loss, and the gradients' norm before clipping."""
        c, total = self.config, 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(self.step * c.gradient_accumulation_steps, (self.step + 1) * c.gradient_accumulation_steps):
            batch = self.batches(number)
            torch.manual_seed(generator(c.seed, "dropout", number, self._rank).initial_seed())
            with self._autocast():
                loss = self._loss(batch) / c.gradient_accumulation_steps
            if loss.requires_grad:
                (loss * self._loss_scale).backward()
            elif not any(layer.module_dropout[ADAPTER] for layer in self._layers()):
                raise LoHaError("the loss does not depend on any trained layer: none of them was run")
            total += float(loss.detach())
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            total = self._average_over_processes(total)
        if self._loss_scale != 1 and (gradients := [p.grad for p in self.parameters if p.grad is not None]):
            torch._foreach_div_(gradients, self._loss_scale)
        return total, float(nn.utils.clip_grad_norm_(self.parameters, c.max_grad_norm or math.inf))

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = MIXED_PRECISION[self.config.mixed_precision]
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

    def _average_over_processes(self, loss: float) -> float:
        """Gradients, and the loss, as the mean of all processes': one exchange, of no more than the factors' size.

        A layer that a process's batch left out has a gradient of zero there.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        packed = nn.utils.parameters_to_vector([gradients[0].new_tensor(loss), *gradients])
        mean = self.accelerator.reduce(packed, "mean")
        nn.utils.vector_to_parameters(mean[1:], gradients)
        return float(mean[0])

    # What has been learnt

    @contextmanager
    def _train_mode(self) -> Iterator[None]:
        """The layers apply their dropouts; an optimizer that tells training from evaluation is set to training."""
        layers = list(self._layers())
        modes = [layer.training for layer in layers]
        for layer in layers:
            layer.training = True  # not train(), which would reach the frozen modules
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        try:
            yield
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """While this lasts, the layers are as they would be saved: averaged, and without dropout."""
        set_eval, layers = getattr(self.optimizer, "eval", None), list(self._layers())
        averaged = set_eval is not None or self.average is not None
        raw = [p.detach().clone() for p in self.parameters] if averaged else None
        modes = [layer.training for layer in layers]
        if set_eval is not None:
            set_eval()
        if self.average is not None:
            _copy(self.parameters, self.average)
        for layer in layers:
            layer.training = False
            if averaged and self.config.max_norm:
                clip_delta_norm_(layer, self.config.max_norm)  # an average can be longer than what it is of
        try:
            yield
        finally:
            if set_eval is not None:
                self.optimizer.train()  # type: ignore[attr-defined]
            if raw is not None:
                _copy(self.parameters, raw)  # the optimizer's way back rounds
            for layer, mode in zip(layers, modes, strict=True):
                layer.training = mode

    def factors(self) -> dict[str, dict[str, LoHaFactors]]:
        """Network -> module name -> factors as they would be saved, copied to the CPU."""
        with self.eval_mode():
            return {
                label: {name: _on_cpu(layer.factors(ADAPTER)) for name, layer in layers.items()}
                for label, layers in self.networks.items()
            }

    def metadata(self, batch_size: int) -> dict[str, str]:
        """The run's settings, under kohya's names, for the file of what has been learnt by now."""
        held_out = dict(self.validation).get(self.step)
        return ({} if held_out is None else {"loha_validation_loss": f"{held_out:.6g}"}) | {
            "ss_learning_rate": f"{self.optimizer_config.lr:g}",
            "ss_optimizer": self.optimizer_config.name,
            "ss_lr_scheduler": self.optimizer_config.schedule,
            "ss_max_train_steps": str(self.config.steps),
            "ss_steps": str(self.step),
            "ss_total_batch_size": str(batch_size * self.config.gradient_accumulation_steps),
            "ss_seed": str(self.config.seed),
        }

    # Saving and resuming

    def _identity(self) -> dict[str, str]:
        """Settings that a resumed run must have in common with the run before; how often it saves is not among them."""
        free = ("steps", "save_every", "preview_every", "validate_every")
        settings = {key: value for key, value in asdict(self.config).items() if key not in free}
        if self.optimizer_config.schedule != "constant":
            settings["steps"] = self.config.steps  # the learning rate looks ahead
        network = [
            (label, name, *(getattr(layer, kind).get(ADAPTER) for kind in layer.other_param_names))
            for label, layers in self.networks.items()
            for name, layer in layers.items()
        ] + [tuple(p.shape) for p in self.parameters]
        named = {key: str(value) for key, value in (settings | asdict(self.optimizer_config)).items()}
        return named | {"network": digest(repr(network))}

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "identity": self.identity,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": (self._loss_scale, self._steps_since_overflow),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validation": self.validation,
        }

    def save(self) -> None:
        """Write the state, and the losses so far as a table beside it.

        Raises:
            LoHaError: it cannot be written; the state before is then still there.
        """
        if self._write() and self.folder is not None:
            self._emit(Saved(self.step, self.folder / STATE))

    def _write(self) -> bool:
        """Whether there is a folder, and this is the process that writes to it."""
        if self.folder is None or self._rank != 0:
            return False
        checkpoint.save(self.folder / STATE, self.state())
        checkpoint.save_losses(self.folder, self.losses, self.validation)
        return True

    def resume(self) -> bool:
        """Go on from the state in ``folder``; False if there is none.

        Raises:
            LoHaError: it belongs to another run: other data, network or settings.
        """
        if self.folder is None:
            return False
        if self._rank == 0:
            checkpoint.remove_unfinished(self.folder)
        path = self.folder / STATE
        if not path.is_file():
            return False
        state = checkpoint.load(path)
        checkpoint.check_identity(path, state.get("identity", {}), self.identity)
        _copy(self.parameters, state["parameters"])
        if self.average is not None:
            _copy(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._loss_scale, self._steps_since_overflow = state["loss_scale"]
        self.step, self.losses, self.validation = state["step"], state["losses"].tolist(), state.get("validation", [])
        return True

    def _save_after(self, error: BaseException) -> None:
        """Save the state if it is good, and tell the callbacks; ``error`` stays the one that is raised."""
        good = not (self._updating or isinstance(error, Diverged))
        try:
            if good and all(bool(torch.isfinite(p).all()) for p in self.parameters):
                self.save()
        except Exception as second:  # of the disk, or of a callback
            warnings.warn(f"what was learnt since the state was saved last is lost: {second}", stacklevel=3)
        for callback in self.callbacks:
            callback(Stopped(self.step, error))


def clip_delta_norm_(layer: LoHaLayer, max_norm: float) -> None:
    """Scale a layer's factors down, all alike, until ‖ΔW‖ is at most ``max_norm``. One that is not finite stays."""
    factors = layer.factors(ADAPTER)
    norm = factors.norm()
    if not max_norm < norm < math.inf:
        return
    names = [name for name in factors.tensors() if name != "dora_scale"]
    scale = (max_norm / norm) ** (1 / len(names)) * (1 - 2**-22)  # a little smaller: products are rounded
    for name in names:
        getattr(layer, f"hada_{name}")[ADAPTER].data.mul_(scale)


def _on_cpu(factors: LoHaFactors) -> LoHaFactors:
    copies: dict[str, Any] = {name: t.to("cpu", copy=True) for name, t in factors.tensors().items()}
    return replace(factors, **copies)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
