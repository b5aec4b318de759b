"""From given factors to those of another update, by the least change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import jvp, vjp

from ..algebra import Factors, halves
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..transform.lowrank import flat_shape

_STEPS = 6  # of Gauss–Newton
_SHARES = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)  # of a step that are tried until one comes nearer
_INNER = 16  # of conjugate gradients in each
_EXACT = 1e-9  # relative error at which nothing is left to do


def nearest(layer: LoHaFactors, target: Tensor) -> LoHaFactors:
    """Factors near the layer's whose update is nearer to ``target`` (o, n), in float64; never further than the layer's.

    Least squares by Gauss–Newton, each step solved by conjugate gradients from zero: of all changes that do as well
    they find the shortest (Björck, Numerical Methods for Least Squares Problems, 7.4). So the sizes of the factors,
    which an update does not determine, stay those that training gave them. Tucker cores change with the rest.

    Raises:
        LoHaError: a target of another shape.
    """
    if tuple(target.shape) != (shape := flat_shape(layer)):
        raise LoHaError(f"is an update of {shape}; expected {tuple(target.shape)}")
    target, scale = target.double(), layer.scale
    size = float(torch.linalg.vector_norm(target))
    factors = tuple(t.double() for t in layer.tensors().values())

    def update(*each: Tensor) -> Tensor:
        m1, m2 = halves(Factors(*each))
        return (m1 * m2).mul(scale).reshape(shape)

    rest = target - update(*factors)
    for _ in range(_STEPS):
        error = float(torch.linalg.vector_norm(rest))
        if error <= _EXACT * size:
            break
        back: Any = vjp(update, *factors)[1]
        change = _least_squares(update, back, factors, rest)
        for share in _SHARES:
            moved = tuple(f + share * c for f, c in zip(factors, change, strict=True))
            after = target - update(*moved)
            if float(torch.linalg.vector_norm(after)) < error:
                factors, rest = moved, after
                break
        else:
            break
    names = layer.tensors()
    return replace(layer, **{k: f.to(names[k].dtype) for k, f in zip(names, factors, strict=True)})  # type: ignore[arg-type]


def _least_squares(update: Any, back: Any, factors: tuple[Tensor, ...], rest: Tensor) -> tuple[Tensor, ...]:
    """d with J·d near ``rest``, by conjugate gradients on the normal equations (CGLS) from zero."""
    x = tuple(torch.zeros_like(f) for f in factors)
    gradient = back(rest)
    direction, size = gradient, _dot(gradient, gradient)
    for _ in range(_INNER):
        ahead = cast(Tensor, jvp(update, factors, direction)[1])
        curvature = float(ahead.square().sum())
        if not (size > 0 and curvature > 0):
            break
        step = size / curvature
        x = tuple(a + step * d for a, d in zip(x, direction, strict=True))
        rest = rest - step * ahead
        gradient = back(rest)
        size, before = _dot(gradient, gradient), size
        direction = tuple(g + size / before * d for g, d in zip(gradient, direction, strict=True))
    return x


def _dot(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(x, y, strict=True))
