"""Optimizers by name, and learning rates over the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from ..errors import LoHaError, about, check_choice, check_number
from ..naming.patterns import get_pattern_key, path_end

Curve = Literal["constant", "linear", "cosine", "restarts"]


class Source(NamedTuple):
    """An optimizer's class, and the options that it needs."""

    load: Callable[[], Any]  # its class
    extra: str = ""  # of our package, which installs it; empty for torch's own
    options: Mapping[str, Any] = {}
    one_rate: bool = False  # it estimates one learning rate for all groups
    fused: bool = False  # by default, use its kernel for all parameters at once on CPU and CUDA


def _adamw8bit() -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def _prodigy() -> Any:
    from prodigyopt import Prodigy

    return Prodigy


def _schedule_free() -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree


def _lion() -> Any:
    from lion_pytorch import Lion

    return Lion


SOURCES: dict[str, Source] = {
    "adamw": Source(lambda: torch.optim.AdamW, fused=True),
    "adamw8bit": Source(_adamw8bit, "adamw8bit"),
    "prodigy": Source(_prodigy, "prodigy", {"safeguard_warmup": True, "use_bias_correction": True}, one_rate=True),
    "schedule-free": Source(_schedule_free, "schedule-free"),
    "adafactor": Source(lambda: torch.optim.Adafactor),
    "lion": Source(_lion, "lion"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning rates.

    Attributes:
        name: one of `SOURCES`.
        lr: learning rate. Prodigy finds its own and wants 1. Factors that began "balanced" learn three times as fast.
        lr_text: for text encoders; None is ``lr``.
        lora_plus: LoRA+ (arXiv 2402.12354): the factor that begins at zero learns this much faster than the others.
        schedule: "constant", "linear" or "cosine" down to ``lr_end`` · lr, or "restarts", ``cycles`` cosines.
        warmup_steps: optimizer steps over which the rate rises from 0.
        options: further arguments of the optimizer's own, such as {"betas": [0.9, 0.99]}.
        lr_pattern: name or regular expression of a layer's path, or of its end -> factor of its learning rate; the
            first that matches counts.

    Raises:
        LoHaError: a value out of its range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    lr_text: float | None = None
    weight_decay: float = 0.0
    lora_plus: float = 1.0
    schedule: Curve = "constant"
    warmup_steps: int = 0
    cycles: int = 1
    lr_end: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    lr_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise LoHaError(f"no optimizer {self.name!r}; there are {', '.join(SOURCES)}")
        check_choice("schedule", self.schedule, get_args(Curve))
        for name in ("lr", "lora_plus", "weight_decay", "lr_end"):
            check_number(name, getattr(self, name), minimum=0)
        if self.lr_text is not None:
            check_number("lr_text", self.lr_text, minimum=0)
        check_number("warmup_steps", self.warmup_steps, minimum=0, integer=True)
        check_number("cycles", self.cycles, minimum=1, integer=True)
        if not isinstance(self.lr_pattern, Mapping):
            raise LoHaError(f"lr_pattern is {self.lr_pattern!r}; expected pattern: factor pairs")
        for pattern, factor in self.lr_pattern.items():
            with about("lr_pattern"):
                path_end(pattern)
            check_number(f"lr_pattern[{pattern!r}]", factor, minimum=0)

    def factor(self, step: int, steps: int) -> float:
        """The factor of all learning rates at optimizer step ``step``, from 0, of ``steps``."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "linear":
            falling = 1 - progress
        else:
            turn = progress * self.cycles % 1.0 if self.schedule == "restarts" else progress
            falling = (1 + math.cos(math.pi * turn)) / 2
        return self.lr_end + (1 - self.lr_end) * falling

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over ``groups``, as `parameter_groups` makes them.

        Raises:
            LoHaError: its library is not installed, or refuses the options.
        """
        source = SOURCES[self.name]
        try:
            kind = source.load()
        except (ImportError, AttributeError) as error:
            how = f"pip install 'comfyui-loha[{source.extra}]'" if source.extra else "update torch"
            raise LoHaError(f"the optimizer {self.name} needs a library that is not here ({error}): {how}") from error
        groups = list(groups)
        options = {**source.options, **self.options}
        devices = {p.device.type for group in groups for p in group["params"]}
        if source.fused and devices <= {"cpu", "cuda"} and not {"fused", "foreach"} & options.keys():
            options["fused"] = True
        if source.one_rate and len({group["lr"] for group in groups}) > 1:
            raise LoHaError(f"the optimizer {self.name} has one learning rate: leave out lr_text, lora_plus and "
                            "lr_pattern")  # fmt: skip
        try:
            optimizer: torch.optim.Optimizer = kind(groups, lr=self.lr, weight_decay=self.weight_decay, **options)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise LoHaError(f"the optimizer {self.name} does not take these options: {error}") from error
        return optimizer


# The factor that begins at zero, by the name of the init, unless a scalar does.
_ZERO = {"lycoris": "hada_w2_a", "balanced": "hada_w2_a"}
# What the factors' learning rate is multiplied by, so that the rate is one that suits a LoRA (docs/recipes.md).
_RATIO = {"balanced": 3.0}


def parameter_groups(
    networks: Mapping[str, Mapping[str, nn.Module]], config: OptimizerConfig, init: bool | str = True
) -> list[dict[str, Any]]:
    """One group for each network and learning rate.

    Args:
        networks: "model" and "text" -> path of a layer -> what is trained there.
        init: `LoHaConfig.init_weights`, which says which factor begins at zero.

    Raises:
        LoHaError: nothing asks for gradients, or a pattern of ``lr_pattern`` has no effect on any layer.
    """
    refuse_unmatched("lr_pattern", config.lr_pattern, [path for layers in networks.values() for path in layers])
    groups = []
    for network, layers in networks.items():
        lr = config.lr_text if network == "text" and config.lr_text is not None else config.lr
        named = [
            (f".{name}.", config.lr_pattern.get(get_pattern_key(config.lr_pattern, path), 1.0), p)
            for path, layer in layers.items()
            for name, p in layer.named_parameters()
            if p.requires_grad and ".base_layer." not in f".{name}."
        ]
        ratio = 1.0 if SOURCES[config.name].one_rate else _RATIO.get(str(init), 1.0)
        zero = "scalar" if any(".scalar." in name for name, *_ in named) else _ZERO.get(str(init), "hada_w2_b")
        by_rate: dict[float, list[nn.Parameter]] = {}
        for faster in (False, True):
            for name, factor, parameter in named:
                if (f".{zero}." in name and config.lora_plus != 1) == faster:
                    rate = lr * (config.lora_plus if faster else 1.0) * (ratio if ".hada_" in name else 1.0) * factor
                    by_rate.setdefault(rate, []).append(parameter)
        groups += [{"params": parameters, "lr": rate, "base_lr": rate} for rate, parameters in by_rate.items()]
    if not groups:
        raise LoHaError("there is nothing to train: no parameter asks for gradients")
    return groups


def refuse_unmatched(name: str, patterns: Iterable[str], paths: Sequence[str]) -> None:
    """Patterns of paths of which none is for nothing.

    Raises:
        LoHaError: names the first that matches no layer, or only layers that a pattern before it matches.
    """
    patterns = list(patterns)
    used = {get_pattern_key(patterns, path) for path in paths} if patterns else set()
    for pattern in patterns:
        if pattern not in used:
            shadowed = any(path_end(pattern).match(path) for path in paths)
            why = "matches only layers that a pattern before it matches" if shadowed else "matches no layer"
            raise LoHaError(
                f"{name}: {pattern!r} {why}; expected the end of a path, such as {', '.join(list(paths)[:3])}"
            )
