"""Where a model's weights are while it trains, and how much memory that takes.

ComfyUI itself decides which weights wait on the CPU (low VRAM), and casts those for each call. For block swap it is
asked to let more of them wait; what waits then comes to the device a block ahead, instead of within each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loha_core import LoHaError
from loha_core.training.events import Callback, Event, PreviewDue
from loha_core.training.swap import AT_ONCE, Swap, pin, stored_bytes, swapping
from loha_core.training.trainer import Trainer


class Placement:
    """A loaded diffusion model, some of whose weights wait.

    Args:
        patcher: of the model, loaded.
        blocks: in the order in which they run.
        count: blocks fewer on the device, by the size of the smallest; 0 leaves everything as ComfyUI placed it.
    """

    def __init__(self, patcher: Any, blocks: Sequence[nn.Module], count: int) -> None:
        self.patcher, self.blocks, self.count = patcher, blocks, count
        self.swap: Swap | None = None
        self._measures = patcher.load_device.type == "cuda"
        if self._measures:
            torch.cuda.reset_peak_memory_stats(patcher.load_device)
        self.offload()

    def offload(self) -> None:
        """Let ComfyUI take from the device what is to wait."""
        if not self.count:
            return
        wanted = sum(sorted(map(self._bytes, self.blocks))[: self.count])
        while (saved := self._saved()) < wanted:
            # It begins with the smallest layers, wherever they are.
            if not self.patcher.partially_unload(self.patcher.offload_device, wanted - saved):
                break

    def _saved(self) -> int:
        """Bytes that are not on the device when a block and the one ahead of it are."""
        waiting = set(map(id, self._waiting()))
        sizes = [self._bytes(block, waiting) for block in self.blocks]
        return sum(sizes) - max(sum(sizes[i : i + AT_ONCE]) for i in range(len(sizes)))

    @staticmethod
    def _bytes(block: nn.Module, of: Collection[int] | None = None) -> int:
        return sum(stored_bytes(tensor) for tensor in block.parameters() if of is None or id(tensor) in of)

    def _waiting(self) -> list[Tensor]:
        """Frozen tensors of the blocks that ComfyUI has not put on the device, or has taken from there."""
        modules = dict.fromkeys(part for block in self.blocks for part in block.modules())
        frozen = [(m, p) for m in modules for p in m.parameters(recurse=False) if not p.requires_grad]
        device = self.patcher.load_device
        if device.type != "cpu":
            return [tensor for _, tensor in frozen if tensor.device != device]
        return [tensor for part, tensor in frozen if not getattr(part, "comfy_patched_weights", False)]

    @contextmanager
    def swapping(self) -> Iterator[None]:
        """While this lasts, what waits comes a block ahead. Enter it before the blocks are recomputed."""
        if not self.count:
            yield
            return
        with swapping(self.blocks, self._pinned(), self.patcher.load_device) as self.swap:
            yield

    def around_previews(self, callback: Callback) -> Callback:
        """A callback in whose previews ComfyUI places the weights as it likes."""

        def call(event: Event) -> None:
            swap = self.swap if isinstance(event, PreviewDue) else None
            if swap is not None:
                swap.wait(())
            callback(event)
            if swap is not None:
                self.offload()
                swap.wait(self._pinned())

        return call

    def _pinned(self) -> list[Tensor]:
        waiting = self._waiting()
        if self.patcher.load_device.type == "cuda":
            pin(waiting)
        return waiting

    def memory_report(self, models: Iterable[nn.Module], trainer: Trainer) -> str:
        """What the run takes, by what it is for: sizes, and on a GPU what was allocated at most."""
        stored: Counter[tuple[str, str]] = Counter()
        for tensor in dict.fromkeys(parameter for model in models for parameter in model.parameters()):
            stored[str(tensor.device), kept_as(tensor)] += stored_bytes(tensor)
        lines = [f"frozen weights on {place}: {_size(n)} as {kind}" for (place, kind), n in sorted(stored.items())]
        if self.swap is not None:
            lines.append(f"block swap: {self.swap.counts.summary()}")
        factors = sum(p.nbytes for p in trainer.parameters)
        moments = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        kept = sum(t.nbytes for t in (*moments, *(trainer.average or ())))
        lines.append(f"factors {_size(factors)}, their gradients as much, optimizer and average {_size(kept)}")
        if self._measures:
            peak = torch.cuda.max_memory_allocated(self.patcher.load_device)
            lines.append(f"on {self.patcher.load_device} at most {_size(peak)}, with activations and previews")
        return "\n".join(lines)


def check_swap(count: int, blocks: Sequence[nn.Module], *, recomputed: bool) -> None:
    """
    Raises:
        LoHaError: there are too few blocks, or they are not run again in the backward.
    """
    most = max(len(blocks) - AT_ONCE, 0)
    if not 0 <= count <= most:
        raise LoHaError(f"blocks_to_swap is {count}; this model has {len(blocks)} blocks, so choose 0 to {most}")
    if count and not recomputed:
        raise LoHaError(
            f"blocks_to_swap is {count} with gradient_checkpointing off: each block's weights would be kept for its "
            "backward after all; switch gradient_checkpointing on, or set blocks_to_swap to 0"
        )


def kept_as(tensor: Any) -> str:
    """What a weight is kept as, in a word."""
    if hasattr(tensor, "_qdata"):
        name = str(getattr(tensor, "_layout_cls", None) or tensor._layout_type)
        return name.removeprefix("TensorCore").removeprefix("TensorWise").removesuffix("Layout").lower()
    if hasattr(tensor, "tensor_type"):
        return f"gguf {getattr(tensor.tensor_type, 'name', tensor.tensor_type)}".lower()
    if (state := getattr(tensor, "quant_state", None)) is not None:
        return str(state.quant_type)
    return str(tensor.dtype).removeprefix("torch.")


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"
