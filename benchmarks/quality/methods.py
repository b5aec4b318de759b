"""What is compared: an adapter, its first values, and the optimizer's learning rates, all at equal parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loha_core import LoHaConfig, LoHaModel
from loha_core.training.optimizers import OptimizerConfig, parameter_groups

RANK = 4  # of each half of a LoHa; a LoRA of twice the rank has as many parameters
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Attributes:
        adapt: (model, names of modules, learning rate) -> the adapted model, and the optimizer's groups.
        note: what differs, for the table.
        weight_decay: AdamW's.
    """

    adapt: Callable[[nn.Module, list[str], float], tuple[nn.Module, Groups]]
    note: str
    weight_decay: float = 0.0


def _lora(zero_factor: float = 1.0) -> Callable[[nn.Module, list[str], float], tuple[nn.Module, Groups]]:
    def adapt(model: nn.Module, names: list[str], lr: float) -> tuple[nn.Module, Groups]:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=names)
        adapted = get_peft_model(model, config)
        trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        rates = [(lr * (zero_factor if "lora_B" in name else 1.0), p) for name, p in trained]
        return adapted, [{"params": [p for r, p in rates if r == rate], "lr": rate} for rate in {r for r, _ in rates}]

    return adapt


def _loha(
    init: str | bool, first_values: Callable[[Iterable[Any]], None] | None = None, times: float = 1.0, **options: Any
) -> Callable[[nn.Module, list[str], float], tuple[nn.Module, Groups]]:
    """Our layers, at so many times the rate; ``options`` are those of `LoHaConfig` and `OptimizerConfig`."""
    optimizer = {key: options.pop(key) for key in list(options) if key in OptimizerConfig.__dataclass_fields__}

    def adapt(model: nn.Module, names: list[str], lr: float) -> tuple[nn.Module, Groups]:
        config = LoHaConfig(**{"r": RANK, "alpha": RANK, "init_weights": init, "target_modules": names} | options)
        adapted = LoHaModel(model, config)
        layers = dict(adapted.loha_layers())
        if first_values is not None:
            first_values(layers.values())
        return adapted, parameter_groups({"model": layers}, OptimizerConfig(lr=lr * times, **optimizer), init)

    return adapt


def _zero_inside(layers: Iterable[Any]) -> None:
    """The zero on the input's side, as PEFT's LoHa has it, and all other factors of one size."""
    for layer in layers:
        outside, inside = (getattr(layer, f"hada_w1_{side}")["default"].data for side in ("a", "b"))
        outside.mul_(2)
        inside.div_(2**0.5)
        layer.hada_w2_a["default"].data.normal_(std=float(inside.std()))
        layer.hada_w2_b["default"].data.zero_()


def _around_one(layers: Iterable[Any]) -> None:
    """M₁ begins around one: the LoHa begins as a LoRA of rank r, which M₁ then modulates."""
    for layer in layers:
        for side in ("a", "b"):
            factor = getattr(layer, f"hada_w1_{side}")["default"].data
            factor.mul_(0.1 / factor.std())
            factor.select(1 if side == "a" else 0, 0).fill_(1.0)


def _orthogonal(layers: Iterable[Any]) -> None:
    """Columns of the outer and rows of the inner factors are orthogonal, of the size that they had."""
    for layer in layers:
        for name in ("w1_a", "w1_b", "w2_a"):
            factor = getattr(layer, f"hada_{name}")["default"].data
            size = factor.norm()
            nn.init.orthogonal_(factor)
            factor.mul_(size / factor.norm())


METHODS: dict[str, Method] = {
    "lora": Method(_lora(), "PEFT's LoRA, r = 8"),
    "lora+": Method(_lora(16.0), "PEFT's LoRA, B learns 16 times faster (LoRA+)"),
    "peft": Method(_loha(True), "LoHa r = 4, PEFT's first values"),
    "lycoris": Method(_loha("lycoris"), "LoHa r = 4, LyCORIS' first values"),
    "balanced": Method(_loha("balanced"), "LoHa r = 4, ours"),
    "zero inside": Method(_loha("balanced", _zero_inside), "ours, w2_b = 0 in place of w2_a, one size"),
    "equal": Method(_loha("balanced", times=1 / 3), "… its first values, at the rate as given"),
    "peft x3": Method(_loha(True, times=3.0), "PEFT's first values, three times the rate"),
    "balanced+": Method(_loha("balanced", lora_plus=3.0), "ours, w2_b another three times faster"),
    "one": Method(_loha("balanced", _around_one), "ours, M₁ around one"),
    "orthogonal": Method(_loha("balanced", _orthogonal), "ours, factors orthogonal"),
    "alpha 4r": Method(_loha("balanced", alpha=4 * RANK), "ours, scale 4"),
    "alpha r/4": Method(_loha("balanced", alpha=RANK / 4), "ours, scale 1/4"),
    "decay": Method(_loha("balanced"), "ours, weight decay 0.1", weight_decay=0.1),
}
