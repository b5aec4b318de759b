"""Block swap: frozen blocks wait on the CPU and come to the device one ahead, for models larger than its memory.

Blocks run in order in a forward, and the other way round in the backward of a model that runs them again there
(gradient checkpointing; without it autograd itself would keep what a block was run with). When one begins, the next
that waits in that direction is already on its way: at most two of those that wait are on the device. What is frozen
need not be written back, so leaving costs nothing.

    with swapping(blocks, waiting(blocks, 10), device), recomputing(blocks):
        trainer.run()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import LoHaError
from ..tuner.forwards import acting_as

AT_ONCE = 2  # blocks that wait and are on the device: the one that runs, and the one ahead


class _Place(NamedTuple):
    part: nn.Module
    name: str
    tensor: Tensor  # that waits

    def put(self, tensor: Tensor) -> None:
        held: Any = self.part._parameters if self.name in self.part._parameters else self.part._buffers
        held[self.name] = tensor


@dataclass
class Counts:
    """What a swap did.

    Attributes:
        loads: transfers of a block.
        ahead: blocks that were on their way, or there, before they began.
        waits: blocks that were not.
        at_once: most blocks, of those that wait, that were on the device together.
        bytes_at_once: their size.
        bytes_waiting: of all that wait.
    """

    loads: int = 0
    ahead: int = 0
    waits: int = 0
    at_once: int = 0
    bytes_at_once: int = 0
    bytes_waiting: int = 0

    def summary(self) -> str:
        came = f"{self.ahead} of {self.ahead + self.waits} came ahead"
        return (
            f"{self.bytes_waiting / 1e6:.3g} MB wait on the CPU; at most {self.at_once} blocks of them, "
            f"{self.bytes_at_once / 1e6:.3g} MB, on the device at once; {came}"
        )


def waiting(blocks: Sequence[nn.Module], count: int) -> list[Tensor]:
    """What has to wait for ``count`` blocks fewer on the device: the frozen tensors of that many and `AT_ONCE`.

    They are spread among all, so that the others compute while one comes.

    Raises:
        LoHaError: there are too few blocks.
    """
    most = len(blocks) - AT_ONCE
    if not 1 <= count <= most:
        raise LoHaError(
            f"blocks_to_swap is {count}; this model has {len(blocks)} blocks, so 0 to {max(most, 0)} of them"
        )
    of = count + AT_ONCE
    chosen = [(2 * n + 1) * len(blocks) // (2 * of) for n in range(of)]
    return [place.tensor for i in chosen for place in _frozen(blocks[i])]


@contextmanager
def swapping(blocks: Sequence[nn.Module], wait: Collection[Tensor], device: torch.device) -> Iterator[Swap]:
    """While this lasts, tensors in ``wait`` are on the device only while their block, or the one before it, runs.

    Enter it before `recomputing`. Afterwards, also after an error, the blocks hold the very tensors that they held.

    Args:
        blocks: in the order in which they run.
        wait: frozen parameters and buffers of theirs, by identity, on the CPU; best in pinned memory: `pin`.
        device: where the blocks run. On a CPU, too, they are copied, so that a swap can be watched without a GPU.

    Raises:
        LoHaError: a tensor is in no block, is trained, or cannot be copied.
    """
    swap = Swap(blocks, device)
    swap.wait(wait)
    with ExitStack() as stack:
        stack.callback(swap.clear)
        for i, block in enumerate(blocks):
            stack.enter_context(acting_as(block, swap.before(i)))
        yield swap


class Swap:
    """Blocks that wait, and those of them that are on the device."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.blocks, self.device, self.counts = blocks, device, Counts()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.places: list[list[_Place]] = [[] for _ in blocks]
        self.order: list[int] = []  # of blocks with something that waits
        self.copies: dict[int, list[Tensor]] = {}
        self.arrival: dict[int, Any] = {}
        self.last = -1  # the block that began last

    def wait(self, tensors: Collection[Tensor]) -> None:
        """Let these wait from now on, and no others; nothing of them is on the device yet."""
        self.clear()
        ids = {id(tensor) for tensor in tensors}
        places = [[place for place in _frozen(block) if id(place.tensor) in ids] for block in self.blocks]
        found = {id(place.tensor): place.tensor for of in places for place in of}
        if lost := ids - found.keys():
            raise LoHaError(f"{len(lost)} of {len(ids)} tensors that should wait are in no block, or are trained")
        if any(getattr(tensor, "quant_state", None) is not None for tensor in found.values()):
            raise LoHaError("bitsandbytes' weights take their scales along wherever they go; set blocks_to_swap to 0")
        self.places, self.order, self.last = places, [i for i, of in enumerate(places) if of], -1
        self.counts.bytes_waiting = sum(stored_bytes(tensor) for tensor in found.values())

    def before(self, i: int) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self.places[i]:
                self.enter(i)
            return forward(*args, **kwargs)

        return run

    def enter(self, i: int) -> None:
        """Block ``i`` begins: put its copies in place, and send for the next."""
        # A forward's last block is its backward's first, and a backward's last the next forward's first.
        step = 1 if i == self.order[0] or (i > self.last and i != self.order[-1]) else -1
        self.last, place = i, self.order.index(i) + step
        ahead = self.order[place] if 0 <= place < len(self.order) else None
        for other in [other for other in self.copies if other not in (i, ahead)]:
            self._leave(other)
        if i in self.copies:
            self.counts.ahead += 1
        else:
            self.counts.waits += 1
            self._send(i)
        self._use(i)
        if ahead is not None and ahead not in self.copies:
            self._send(ahead)

    def clear(self) -> None:
        """Nothing is on the device; what waits is in its place."""
        for i in list(self.copies):
            self._leave(i)

    def _send(self, i: int) -> None:
        with torch.no_grad(), nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            copies = [_copy(place.tensor, self.device) for place in self.places[i]]
            self.arrival[i] = None if self.stream is None else self.stream.record_event()
        self.copies[i] = copies
        c, on_device = self.counts, [copy for copies in self.copies.values() for copy in copies]
        c.loads, c.at_once = c.loads + 1, max(c.at_once, len(self.copies))
        c.bytes_at_once = max(c.bytes_at_once, sum(stored_bytes(copy) for copy in on_device))

    def _use(self, i: int) -> None:
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrival[i])
            for copy in self.copies[i]:
                _values(copy).record_stream(current)  # else its memory could be given away while it is read
        for place, copy in zip(self.places[i], self.copies[i], strict=True):
            place.put(copy)

    def _leave(self, i: int) -> None:
        for place in self.places[i]:
            place.put(place.tensor)
        del self.copies[i], self.arrival[i]


def pin(tensors: Collection[Tensor]) -> None:
    """Move what waits to memory from which a GPU copies while it computes, as far as there is any; same objects."""
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" and not tensor.is_pinned():
            try:
                tensor.data = tensor.data.pin_memory()
            except RuntimeError:  # the system gives no more; from other memory it is slower
                return


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor as it is kept: packed, with its scales."""
    if (values := _values(tensor)) is not tensor:
        params = vars(tensor._params) if hasattr(tensor, "_params") else tensor._layout_params
        return values.nbytes + sum(part.nbytes for part in params.values() if isinstance(part, Tensor))
    state = getattr(tensor, "quant_state", None)
    scales = [] if state is None else [part for part in vars(state).values() if isinstance(part, Tensor)]
    return int(tensor.nbytes) + sum(scale.nbytes for scale in scales)


def _frozen(block: nn.Module) -> Iterator[_Place]:
    for part in block.modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                yield _Place(part, name, tensor)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device, non_blocking=True, copy=True)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _values(tensor: Any) -> Tensor:
    """A quantised tensor's own storage; any other tensor itself."""
    return getattr(tensor, "_qdata", tensor)  # type: ignore[no-any-return]
