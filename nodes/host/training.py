"""ComfyUI's models made right for autograd: those that change their activations in place, above all.

Some of ComfyUI's models write ``x += y`` into a tensor that a norm before has kept for its backward (Flux, Hunyuan,
LTX: it saves memory when sampling). Autograd refuses the backward of that, and gradient checkpointing, which runs a
block again on what it kept, gives wrong gradients in silence. So while a model trains, a tensor that is about to be
changed moves to memory of its own first, and whoever kept it keeps the old one: what ``x = x + y`` would have done.
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

from .weights import in_training

# End in an underscore and change no values.
_HARMLESS = {"requires_grad_", "detach_", "set_", "share_memory_"}


class _MoveFirst(TorchFunctionMode):
    """Before a method such as ``add_`` changes a tensor that is no view, that tensor gets memory of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name not in _HARMLESS and torch.is_grad_enabled():
            tensor = args[0] if args else None
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor._is_view():
                return self._moved(func, tensor, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _moved(func: Any, tensor: Tensor, args: Any, kwargs: Any) -> Any:
        tensor.data = tensor.data.clone()
        # The values that were kept have not changed, so neither has their version.
        with torch.autograd._unsafe_preserve_version_counter(tensor):
            return func(*args, **kwargs)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    # Autograd would keep the very tensor, and it would move with it.
    return tensor.detach(), tensor._version


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError("a view that is needed for the backward was changed in place")
    return tensor


@contextmanager
def allowed(blocks: Iterable[nn.Module], *, again: bool) -> Iterator[None]:
    """While this lasts, a model's backward is right whatever its blocks change in place.

    Args:
        blocks: what of the model is given a tensor and may change it.
        again: they run again in the backward, with what they were given.
    """
    with ExitStack() as stack:
        stack.enter_context(in_training())
        for block in blocks:
            stack.enter_context(acting_as(block, partial(_run, again)))
        with saved_tensors_hooks(_pack, _unpack):
            yield


def _run(again: bool, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    def given(value: Any) -> Any:
        copy = isinstance(value, Tensor) and value.is_floating_point() and (again or value._is_view())
        return value.clone() if copy else value

    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with _MoveFirst():  # here, since the backward may be another thread's
        return forward(*map(given, args), **{name: given(value) for name, value in kwargs.items()})
