"""From a flat dictionary of tensors to layers: what all dialects share."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import LoHaError, about
from ..factors import LoHaFactors
from .scales import AlphaOf

_FACTORS = ("w1_a", "w1_b", "w2_a", "w2_b")
_PARTS = {f"hada_{name}": name for name in (*_FACTORS, "t1", "t2")} | {
    name: name for name in ("alpha", "dora_scale", "scalar")
}

# PEFT's parameters carry the adapter's name behind them: ``proj.hada_w1_a.default``.
_NAMED = re.compile(rf"(.+\.hada_(?:{'|'.join((*_FACTORS, 't1', 't2'))}))\.([^.]+)")


def group(
    tensors: Mapping[str, Tensor],
    *,
    name_of: Callable[[str], str] = lambda module: module,
    alpha_of: AlphaOf = lambda module, rank: None,
) -> Adapter:
    """Sort tensors into LoHa layers and others. Layers of which nothing tells the alpha are noted.

    Args:
        name_of: module name in the file -> name of the layer.
        alpha_of: asked where no alpha tensor says.

    Raises:
        LoHaError: a factor is missing or has a wrong shape, or there are several adapters; names the key.
    """
    tensors = _of_one_adapter(tensors)
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, _, part = key.rpartition(".")
        if module and part in _PARTS:
            modules[module][_PARTS[part]] = tensor

    layers: dict[str, LoHaFactors] = {}
    used: set[str] = set()
    notes: list[str] = []
    guessed: list[str] = []
    for module, parts in modules.items():
        if not any(name in parts for name in (*_FACTORS, "t1", "t2")):
            continue  # an alpha or a dora_scale of some other adapter
        with about(module):
            factors = _factors(parts, _noting(alpha_of, module, guessed))
        if "alpha" in parts and factors.alpha == 0 and "scalar" not in parts:
            notes.append(f"{module}: alpha is 0, so this layer does nothing")
        name = name_of(module)
        if name in layers:
            raise LoHaError(f"two spellings of the module {name} in one file; which one counts is unknown")
        layers[name] = factors
        used.update(f"{module}.{part}" for part, field in _PARTS.items() if field in parts)
    if guessed:
        which = (
            "any layer" if len(guessed) == len(layers) else f"{len(guessed)} of {len(layers)} layers ({guessed[0]}, …)"
        )
        notes.append(
            f"nothing says the alpha of {which}, neither a tensor nor adapter_config.json nor the file's metadata: "
            "scale 1 (alpha = rank) is assumed"
        )
    extras = {key: tensor for key, tensor in tensors.items() if key not in used}
    return Adapter(layers, extras, notes=notes)


def _of_one_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under keys without PEFT's adapter name."""
    named = {key: match for key in tensors if (match := _NAMED.fullmatch(key))}
    adapters = sorted({match[2] for match in named.values()})
    if len(adapters) > 1:
        raise LoHaError(
            f"holds {len(adapters)} adapters, {', '.join(adapters)}; expected one. Save each into a file of "
            f"its own: save_pretrained(…, selected_adapters=[{adapters[0]!r}])"
        )
    plain = {named[key][1] if key in named else key: tensor for key, tensor in tensors.items()}
    if len(plain) < len(tensors):
        twice = next(key for key, match in named.items() if match[1] in tensors)
        raise LoHaError(f"{twice} is there with and without {adapters[0]}; which one counts is unknown")
    return plain


def _noting(alpha_of: AlphaOf, module: str, guessed: list[str]) -> Callable[[int], float | None]:
    """The alpha of a module by its rank; None is put down in ``guessed``."""

    def alpha(rank: int) -> float | None:
        value = alpha_of(module, rank)
        if value is None:
            guessed.append(module)
        return value

    return alpha


def _factors(parts: Mapping[str, Tensor], alpha_of: Callable[[int], float | None]) -> LoHaFactors:
    missing = [f"hada_{name}" for name in _FACTORS if name not in parts]
    if missing:
        raise LoHaError(f"{', '.join(missing)} missing from the file; it is incomplete, so save or download it again")
    tucker = "t1" in parts
    tensors = {name: _two_dimensional(name, parts[name], tucker) for name in _FACTORS}
    for name in ("alpha", "scalar"):
        if name in parts and parts[name].numel() != 1:
            raise LoHaError(f"{name} has shape {tuple(parts[name].shape)}; expected one number")
    rank = next(iter(tensors["w1_b"].shape), 0)  # LoHaFactors refuses what has no axes
    # A file without alpha has scale 1.
    alpha = float(parts["alpha"]) if "alpha" in parts else alpha_of(rank)
    factors = LoHaFactors(
        **tensors,
        alpha=rank if alpha is None else alpha,
        t1=parts.get("t1"),
        t2=parts.get("t2"),
        dora_scale=parts.get("dora_scale"),
    )
    return _fold_scalar(factors, float(parts["scalar"])) if "scalar" in parts else factors


def _two_dimensional(name: str, tensor: Tensor, tucker: bool) -> Tensor:
    """OneTrainer keeps a convolution's shape: (o, r, 1, 1) and (r, i, *k); the flat form is the same numbers."""
    return tensor.flatten(1) if tensor.dim() > 2 and not tucker else tensor


def _fold_scalar(factors: LoHaFactors, scalar: float) -> LoHaFactors:
    """LyCORIS' learned scalar multiplies w1; in alpha it is exact. Not 0, which some readers take for 'unset'."""
    if factors.alpha * scalar != 0:
        return replace(factors, alpha=factors.alpha * scalar)
    return replace(factors, w1_a=torch.zeros_like(factors.w1_a))
