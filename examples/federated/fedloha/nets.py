"""Two small nets, and low-rank layers to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VGG(nn.Module):
    """(n, 1, s, s) -> (n, 10): 3x3 convolutions of w, 2w and 4w channels, each with group norm and pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [(1, width), (width, 2 * width), (2 * width, 4 * width)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(4, o) for _, o in sizes)
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class MLP(nn.Module):
    """(n, 1, s, s) -> (n, 10) by two hidden layers of 512."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(side * side, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(F.relu(self.first(x.flatten(1))))))
        return out


def net(name: str, side: int, width: int) -> nn.Module:
    """ "vgg" of this width, or "mlp" for pictures of side x side."""
    return VGG(width) if name == "vgg" else MLP(side)


def low_rank(layer: nn.Linear | nn.Conv2d, parameters: int) -> nn.Module:
    """A layer of the same shape and at most as many ``parameters`` (biases aside), at He's variance.

    A linear one is two linear layers; a convolution is Tucker-2: 1x1, the kernel, 1x1.
    """
    o, i = layer.weight.shape[:2]
    kernel = layer.weight[0, 0].numel()
    # The largest R with R(o + i) + R²k ≤ parameters, of which R²k only where there is a kernel.
    core = kernel if isinstance(layer, nn.Conv2d) else 0
    rank = (
        int((math.sqrt((o + i) ** 2 + 4 * core * parameters) - (o + i)) / (2 * core)) if core else parameters // (o + i)
    )
    if isinstance(layer, nn.Linear):
        parts: list[nn.Module] = [nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=layer.bias is not None)]
    else:
        middle = nn.Conv2d(rank, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)  # type: ignore[arg-type]
        parts = [nn.Conv2d(i, rank, 1, bias=False), middle, nn.Conv2d(rank, o, 1, bias=layer.bias is not None)]
    for place, part in enumerate(parts):
        fan_in = part.weight[0].numel()  # type: ignore[operator,union-attr,index]
        nn.init.normal_(part.weight, std=math.sqrt((2 if place == len(parts) - 1 else 1) / fan_in))  # type: ignore[arg-type]
    if layer.bias is not None:
        with torch.no_grad():
            parts[-1].bias.copy_(layer.bias)  # type: ignore[union-attr,operator]
    return nn.Sequential(*parts)
