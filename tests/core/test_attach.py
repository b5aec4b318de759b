"""Layers that stand in for modules of a model that must not notice, and gradient checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from loha_core.training.attach import attached, blocks_of, recomputing
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaLinear

from .training_script import Task, wrap

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = LoHaConfig(r=2, alpha=2, init_weights=False)


def pair() -> tuple[nn.Linear, LoHaLinear]:
    base = nn.Linear(5, 6).requires_grad_(False)
    return base, wrap(base, RANDOM)  # type: ignore[return-value]


def test_a_base_module_acts_with_its_adapter_and_is_then_itself():
    base, layer = pair()
    x = torch.randn(3, 5)
    before, attributes, through = base(x), dict(vars(base)), layer(x)
    assert not torch.allclose(before, through)
    with attached([layer]):
        assert torch.equal(base(x), through) and torch.equal(base.forward(x), through)
        assert torch.equal(layer(x), through)
    assert torch.equal(base(x), before) and torch.equal(layer(x), through)
    assert vars(base).keys() == attributes.keys() and "forward" not in vars(base)


def test_two_layers_on_one_base_add_up():
    base, first = pair()
    second = wrap(base, RANDOM)
    x = torch.randn(3, 5)
    expected = first(x) + second(x) - base(x)
    with attached([first, second]):
        torch.testing.assert_close(base(x), expected)
    with attached([second]):
        inside = base(x)
        with attached([first]):
            torch.testing.assert_close(base(x), expected)
        assert torch.equal(base(x), inside)
    assert "forward" not in vars(base)


def test_twice_is_once():
    base, layer = pair()
    x = torch.randn(3, 5)
    through = layer(x)
    with attached([layer, layer]):
        with attached([layer]):
            assert torch.equal(base(x), through)
        assert torch.equal(base(x), through)
    assert "forward" not in vars(base)
    with attached([layer]):  # and again
        assert torch.equal(base(x), through)


def test_a_forward_that_somebody_put_there_is_called_and_comes_back():
    base, layer = pair()
    x, plain = torch.randn(3, 5), base.forward
    delta = layer(x) - base(x)
    base.forward = doubled = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    with attached([layer]):
        torch.testing.assert_close(base(x), 2 * plain(x) + delta)
    assert vars(base)["forward"] is doubled


def test_hooks_of_the_base_run_once_around_both():
    base, layer = pair()
    x, seen = torch.randn(3, 5), []
    through = layer(x)
    base.register_forward_pre_hook(lambda module, args: seen.append("before"))
    base.register_forward_hook(lambda module, args, y: seen.append("after") or y + 1)
    with attached([layer]):
        torch.testing.assert_close(base(x), through + 1)
    assert seen == ["before", "after"]


def test_a_module_that_is_not_exactly_torchs_keeps_its_own_forward():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    base = Scaled(5, 6).requires_grad_(False)
    layer = wrap(base, RANDOM)
    x = torch.randn(2, 5)
    delta = x @ layer.get_delta_weight("default").T
    with attached([layer]):
        torch.testing.assert_close(base(x), 3 * nn.functional.linear(x, base.weight, base.bias) + delta)


def test_an_error_inside_takes_the_layers_off():
    base, layer = pair()
    with pytest.raises(ZeroDivisionError), attached([layer]), recomputing([base]):
        raise ZeroDivisionError
    assert "forward" not in vars(base) and layer._link is None


# --- gradient checkpointing -----------------------------------------------------------------------

DROPPING = LoHaConfig(r=2, alpha=2, init_weights=False, rank_dropout=0.4, module_dropout=0.3)


def gradients(recompute: bool) -> tuple[list[torch.Tensor | None], int, torch.Tensor]:
    """Gradients of a batch, bytes that autograd kept for the backward, and the chance that came after."""
    task, kept = Task(config=DROPPING), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for layer in task.layers:
        layer.training = True
    batch = task.batch(0)
    torch.manual_seed(0)
    with attached(task.layers), recomputing(task.model.blocks if recompute else []):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = task.loss(batch)
        loss.backward()
    after = torch.rand(3)
    assert not any("forward" in vars(m) for m in task.model.modules())
    trained = [p for layer in task.layers for p in layer.parameters() if p.requires_grad]
    return [p.grad for p in trained], sum(kept.values()), after


def test_recomputing_gives_the_same_gradients_bit_for_bit_and_keeps_less():
    (plain, kept, after), (again, kept_less, after_again) = gradients(False), gradients(True)
    found = [(a, b) for a, b in zip(plain, again, strict=True) if a is not None or b is not None]
    assert len(plain) == 20 and len(found) == 12  # two layers were dropped
    assert all(torch.equal(a, b) for a, b in found)
    assert torch.equal(after, after_again)
    print(f"autograd keeps {kept} bytes, {kept_less} where blocks are recomputed")
    assert kept_less < kept / 2


def test_recomputing_without_gradients_runs_blocks_once(monkeypatch):
    task = Task(config=RANDOM)
    monkeypatch.setattr(torch_checkpoint, "checkpoint", None)
    batch = task.batch(0)
    with torch.no_grad(), recomputing(task.model.blocks):
        assert torch.equal(task.loss(batch), task.loss(batch))


def test_a_blocks_own_forward_comes_back():
    block = nn.Linear(2, 2)
    mine = block.forward
    block.forward = mine  # type: ignore[method-assign]
    with recomputing([block, block]):
        assert vars(block)["forward"] is not mine
        block(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert vars(block)["forward"] is mine


def test_blocks_are_the_entries_of_a_models_own_lists():
    task = Task()
    assert blocks_of(task.model) == list(task.model.blocks)
    model = nn.Module()
    model.downs, model.middle = nn.ModuleList([nn.Linear(1, 1)]), nn.Sequential(nn.Linear(1, 1), nn.SiLU())
    model.out = nn.Linear(1, 1)
    assert blocks_of(model) == [model.downs[0], model.middle[0]]
