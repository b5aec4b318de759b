"""Batches of one picture, or of a few, over and over: all alike but for the adapters that act on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loha_core import LoHaError

KEY = "loha_noise"
# Of the memory that ComfyUI could have for sampling, this much is planned with.
MEMORY_SHARE = 0.8

Latent = dict[str, Any]


def fitting(patcher: Any, shape: Sequence[int]) -> int:
    """How many pictures of a latent's shape (n, …) fit into memory, by ComfyUI's estimate; at least 1."""
    device = patcher.load_device
    loaded = [each for each in comfy.model_management.current_loaded_models if each.model and each.device == device]
    room = comfy.model_management.get_free_memory(device) + sum(each.model_loaded_memory() for each in loaded)
    both = patcher.memory_required([2, *shape[1:]])  # conditionings of a picture
    return max(1, int(MEMORY_SHARE * (room - patcher.model_size()) / both))


def repeated(latent: Latent, places: Sequence[int]) -> Latent:
    """A batch of these pictures of ``latent``; each has the noise of its place there.

    Raises:
        LoHaError: a latent of several tensors.
    """
    samples = latent["samples"]
    if samples.is_nested:
        raise LoHaError("this latent has several parts, such as picture and sound; only plain latents can be repeated")
    index = latent.get("batch_index") or range(len(samples))
    batch = latent | {"samples": samples[list(places)], "batch_index": [index[place] for place in places]}
    if (mask := latent.get("noise_mask")) is not None:
        batch["noise_mask"] = mask[[place % len(mask) for place in places]]
    return batch


def shared_noise(patcher: Any, places: Sequence[int], count: int) -> Any:
    """A clone of ``patcher`` under which every sampler draws as it would for a batch of ``count`` pictures.

    ComfyUI's first noise follows a latent's batch_index. What samplers add at each step they draw for the whole batch.

    Args:
        places: in that batch, of each picture that is sampled.
    """
    clone, noise = patcher.clone(), _SharedNoise(places, count)
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, noise.sample)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, noise.predict)
    return clone


class _SharedNoise:
    """ComfyUI's wrappers around a sampler's loop, and around the model within it, which is none of ours."""

    def __init__(self, places: Sequence[int], count: int) -> None:
        self.places, self.count = torch.tensor(places), count
        self.drawing: _Drawing | None = None

    def sample(
        self,
        executor: Any,
        model: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.drawing = _Drawing(tuple(noise.shape), self.places, self.count)
        try:
            with self.drawing:
                return executor(model, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            self.drawing = None

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        if self.drawing is None:
            return executor(*args, **kwargs)
        self.drawing.__exit__(None, None, None)
        try:
            return executor(*args, **kwargs)
        finally:
            self.drawing.__enter__()


class _Drawing(TorchFunctionMode):
    """Normal noise of a batch's shape is drawn for ``count`` pictures, and each picture takes its place's."""

    def __init__(self, shape: tuple[int, ...], places: Tensor, count: int) -> None:
        super().__init__()
        self.shape, self.places, self.count = shape, places, count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn_like and tuple(args[0].shape) == self.shape:
            like = args[0][:1].expand(self.count, *self.shape[1:])
            return self._placed(torch.randn_like(like, *args[1:], **kwargs))
        if function is torch.randn and self._size(args, kwargs) == self.shape:
            kwargs = {name: value for name, value in kwargs.items() if name != "size"}
            return self._placed(torch.randn((self.count, *self.shape[1:]), **kwargs))
        return function(*args, **kwargs)

    @staticmethod
    def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        size = args[0] if args and not isinstance(args[0], int) else args or kwargs.get("size", ())
        return tuple(size)

    def _placed(self, drawn: Tensor) -> Tensor:
        return drawn.index_select(0, self.places.to(drawn.device))
