"""Block swap on a CPU: what is where at each moment, the same bits as without it, and nothing left behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from loha_core import LoHaError
from loha_core.training.attach import attached, recomputing
from loha_core.training.swap import Swap, pin, swapping, waiting
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaLinear

from .training_script import wrap

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RANDOM = LoHaConfig(r=2, alpha=2, init_weights=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.register_buffer("shift", torch.randn(8))

    def forward(self, x):
        return x + self.narrow(torch.tanh(self.wide(self.norm(x) + self.shift)))


def model(count: int = 6) -> tuple[nn.ModuleList, list[LoHaLinear]]:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(count)).requires_grad_(False)
    return blocks, [wrap(block.wide, RANDOM) for block in blocks]  # type: ignore[misc]


def held(blocks: nn.ModuleList) -> list[int]:
    return [id(t) for part in blocks.modules() for t in (*part._parameters.values(), *part._buffers.values())]


def step(blocks, layers) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parameters = [p for layer in layers for p in layer.parameters_of("default")]
    for p in parameters:
        p.grad = None
    torch.manual_seed(1)
    x = torch.randn(3, 8)
    for block in blocks:
        x = block(x)
    loss = x.square().sum()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in parameters]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_same_bits_one_ahead_and_few_at_once(count, monkeypatch):
    blocks, layers = model()
    before = held(blocks)
    with attached(layers), recomputing(blocks):
        loss, gradients = step(blocks, layers)
    sent, began, copies = [], [], []
    real_send, real_enter = Swap._send, Swap.enter

    def send(swap, i):
        real_send(swap, i)
        sent.append(i)
        copies.extend(map(weakref.ref, swap.copies[i]))
        gc.collect()
        alive = [copy for copy in map(weakref.ref.__call__, copies) if copy is not None]
        # Neither autograd nor anything else keeps what has left.
        assert len(alive) == sum(map(len, swap.copies.values()))

    def enter(swap, i):
        real_enter(swap, i)
        began.append(i)
        for place, copy in zip(swap.places[i], swap.copies[i], strict=True):
            assert (place.part._parameters | place.part._buffers)[place.name] is copy

    monkeypatch.setattr(Swap, "_send", send)
    monkeypatch.setattr(Swap, "enter", enter)
    wait = waiting(blocks, count)
    with attached(layers), swapping(blocks, wait, CPU) as swap, recomputing(blocks):
        for n in range(3):
            again, same = step(blocks, layers)
            assert torch.equal(again, loss) and all(map(torch.equal, same, gradients)), n
    order = swap.order
    assert len(order) == count + 2 and began == 3 * [*order, *reversed(order)]
    # The first of all waits; each other was sent for when the one before it began.
    assert swap.counts.waits == 1 and swap.counts.ahead == len(began) - 1
    assert swap.counts.at_once == 2
    assert swap.counts.loads == len(sent) == 2 + 6 * (len(order) - 2)  # two are there at each turn
    assert 0 < swap.counts.bytes_at_once <= 2 * max(sum(p.tensor.nbytes for p in of) for of in swap.places)
    assert swap.counts.bytes_waiting == sum(t.nbytes for t in wait)
    assert held(blocks) == before and not any("forward" in vars(block) for block in blocks)


def test_without_running_again_autograd_keeps_what_has_left():
    """Hence its condition."""
    blocks, layers = model()
    with attached(layers), swapping(blocks, waiting(blocks, 4), CPU) as swap:
        kept = []
        real, swap._leave = swap._leave, lambda i: (kept.extend(map(weakref.ref, swap.copies[i])), real(i))
        x = torch.randn(3, 8)
        for block in blocks:
            x = block(x)
        gc.collect()
        assert any(copy() is not None for copy in kept)


def test_forwards_without_a_backward():
    """Previews, and what the base alone says."""
    blocks, _ = model()
    x = torch.randn(3, 8)
    wanted = nn.Sequential(*blocks)(x)
    with torch.no_grad(), swapping(blocks, waiting(blocks, 3), CPU) as swap:
        for _ in range(3):
            assert torch.equal(nn.Sequential(*blocks)(x), wanted)
        assert swap.counts.waits == 3 and swap.counts.at_once == 2
        swap.clear()
        assert not swap.copies


@pytest.mark.parametrize("where", range(6))
def test_an_error_or_a_cancel_leaves_nothing(where):
    blocks, layers = model()
    before = held(blocks)

    def interrupt(*_):
        raise KeyboardInterrupt

    for handle in (blocks[where].narrow.register_forward_pre_hook, blocks[where].narrow.register_full_backward_hook):
        hook = handle(interrupt)
        with pytest.raises(KeyboardInterrupt), attached(layers):
            with swapping(blocks, waiting(blocks, 4), CPU) as swap, recomputing(blocks):
                step(blocks, layers)
        hook.remove()
        assert held(blocks) == before and not swap.copies
        assert not any("forward" in vars(part) for part in blocks.modules())
    with attached(layers):
        step(blocks, layers)


@pytest.mark.parametrize("count", [-1, 0, 5, 6])
def test_how_many_can_be_swapped(count):
    with pytest.raises(LoHaError, match=f"blocks_to_swap is {count}; this model has 6 blocks, so 0 to 4"):
        waiting(model()[0], count)


def test_what_cannot_wait():
    blocks, _ = model()
    stray, trained = nn.Parameter(torch.zeros(1), requires_grad=False), blocks[0].wide.weight.requires_grad_(True)
    for tensor in (stray, trained):
        with (
            pytest.raises(LoHaError, match="1 of 1 tensors .* in no block, or are trained"),
            swapping(blocks, [tensor], CPU),
        ):
            pass


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The same bits, in less memory by the blocks that were asked for."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)) for _ in range(12))
    blocks.requires_grad_(False)
    layers = [wrap(block[0], RANDOM).to(device) for block in blocks]
    wait = waiting(blocks, 8)
    pin(wait)
    ids, size = set(map(id, wait)), sum(p.nbytes for p in blocks[0].parameters())

    def run() -> tuple[list[torch.Tensor], int]:
        torch.cuda.reset_peak_memory_stats()
        parameters = [p for layer in layers for p in layer.parameters_of("default")]
        for p in parameters:
            p.grad = None
        x = torch.ones(64, 1024, device=device)
        for block in blocks:
            x = block(x)
        x.square().mean().backward()
        return [p.grad.clone() for p in parameters], torch.cuda.max_memory_allocated()

    for p in blocks.parameters():
        if id(p) not in ids:
            p.data = p.data.to(device)
    with attached(layers), swapping(blocks, wait, device) as swap, recomputing(blocks):
        run()
        swapped, less = run()
    assert swap.counts.at_once == 2 and swap.counts.waits == 1
    blocks.to(device)
    with attached(layers), recomputing(blocks):
        run()
        wanted, more = run()
    assert all(map(torch.equal, swapped, wanted))
    assert more - less > 7 * size
