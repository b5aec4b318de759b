"""ComfyUI's models made right for autograd: those that change their activations in place, above all.

Some of ComfyUI's models write ``x += y`` into a tensor that a norm before has kept for its backward (Flux, Hunyuan,
LTX: it saves memory when sampling). Autograd refuses the backward of that, and gradient checkpointing, which runs a
block again on its kept input, gives wrong gradients in silence. So while a model trains, a tensor that is about to be
changed is first copied to new memory, and whoever kept it keeps the old values: what ``x = x + y`` would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from loha_core.tuner.forwards import acting_as

from .versions import in_training

# Methods that end in an underscore and change no values.
_CHANGE_NO_VALUES = {"requires_grad_", "detach_", "set_", "share_memory_"}


class _CopyBeforeInPlace(TorchFunctionMode):
    """Before a method such as ``add_`` changes a tensor that is no view, that tensor is copied to new memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name not in _CHANGE_NO_VALUES and torch.is_grad_enabled():
            tensor = args[0] if args else None
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor._is_view():
                return self._on_a_copy(func, tensor, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _on_a_copy(func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        tensor.data = tensor.data.clone()
        # The kept values have not changed, so neither has their version.
        with torch.autograd._unsafe_preserve_version_counter(tensor):
            return func(*args, **kwargs)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    # Autograd would keep the tensor object itself, and so see the copy.
    return tensor.detach(), tensor._version


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("a view that is needed for the backward was changed in place")
    return tensor


@contextmanager
def in_place_allowed(blocks: Iterable[nn.Module], *, recomputed: bool) -> Iterator[None]:
    """While this lasts, a model's backward is right even if its blocks change tensors in place.

    Args:
        blocks: the modules that may change tensors, their inputs too.
        recomputed: they run again in the backward, on the same inputs.
    """
    with ExitStack() as stack:
        stack.enter_context(in_training())
        for block in blocks:
            stack.enter_context(acting_as(block, partial(_run, recomputed)))
        with saved_tensors_hooks(_pack, _unpack):
            yield


def _run(recomputed: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def protected(value: Any) -> Any:
        copy = isinstance(value, Tensor) and value.is_floating_point() and (recomputed or value._is_view())
        return value.clone() if copy else value

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with _CopyBeforeInPlace():  # here, since the backward may be another thread's
        return forward(*map(protected, args), **{name: protected(value) for name, value in kwargs.items()})


@contextmanager
def trainable_weights(*modules: nn.Module | None) -> Iterator[None]:
    """Replace weights that were made in inference mode, as a graph loads them, since autograd refuses those.

    Each is replaced by a copy with the same values, one after the other, under all of its names, for good. While this
    lasts no weight requires gradients.
    """
    required: list[nn.Parameter] = []
    for places in _places(modules):
        tensor = getattr(*places[0])
        if tensor.is_inference():
            copy = tensor.detach().clone()
            copy = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
            _put(copy, places)
        elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            tensor.requires_grad_(False)
            required.append(tensor)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextmanager
def quantised_weights_movable(*modules: nn.Module) -> Iterator[None]:
    """Quantised weights that were made in inference mode are so again afterwards: there ComfyUI can move no others."""
    quantised = [places for places in _places(modules) if hasattr(getattr(*places[0]), "_qdata")]
    found = [places for places in quantised if getattr(*places[0]).is_inference()]
    try:
        yield
    finally:
        with torch.inference_mode():
            for places in found:
                if not (tensor := getattr(*places[0])).is_inference():
                    _put(nn.Parameter(tensor.clone(), requires_grad=False), places)


def _put(tensor: Tensor, places: Iterable[tuple[nn.Module, str]]) -> None:
    for part, name in places:
        setattr(part, name, tensor)


def _places(modules: Iterable[nn.Module | None]) -> list[list[tuple[nn.Module, str]]]:
    """For each parameter and buffer its (module, name) pairs: several, if weights are tied."""
    by_id: dict[int, list[tuple[nn.Module, str]]] = {}
    members = [part for module in modules if module is not None for part in module.modules()]
    for part in dict.fromkeys(members):  # modules, too, may be shared
        parameters = part.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in (*parameters, *part.named_buffers(recurse=False, remove_duplicate=False)):
            by_id.setdefault(id(tensor), []).append((part, name))
    return list(by_id.values())
