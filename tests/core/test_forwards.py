"""Links in a module's place: any number, in any order, beside other packages that replace forwards."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn

from loha_core.tuner import forwards


def adding(n: float):
    return lambda forward, *args, **kwargs: forward(*args, **kwargs) + n


class Other:
    """Another package: it keeps the forward that it finds, and puts that back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before, self.had = module, module.forward, "forward" in vars(module)
        module.forward = lambda x: 10 * self.before(x)

    def leave(self) -> None:
        if self.had:
            self.module.forward = self.before
        else:
            del self.module.forward


@pytest.fixture
def module():
    return nn.Identity()


ONE = torch.ones(1)


def test_links_run_from_the_outermost_in(module):
    forwards.push(module, lambda forward, x: forward(x) + 1)
    forwards.push(module, lambda forward, x: forward(2 * x))
    forwards.push(module, lambda forward, x: 100 * forward(x), innermost=True)
    assert module(ONE) == 201


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_they_leave_in_any_order(module, order):
    links = [forwards.push(module, adding(10**n)) for n in range(3)]
    left = 111
    for n in order:
        assert module(ONE) == 1 + left and forwards.has_links(module)
        forwards.remove(links[n])
        forwards.remove(links[n])  # twice is once
        left -= 10**n
    assert not forwards.has_links(module) and set(vars(module)) == set(vars(nn.Identity()))


@pytest.mark.parametrize("order", list(itertools.permutations(["ours", "theirs", "more of ours"])))
@pytest.mark.parametrize("last", ["ours", "theirs", "more of ours"])
def test_beside_another_package_no_dead_forward_comes_back(module, order, last):
    """Whoever comes and goes in whatever order: in the end only those act that are there."""
    here, links = {}, {"ours": 1.0, "more of ours": 2.0}
    for who in order:
        here[who] = Other(module) if who == "theirs" else forwards.push(module, adding(links[who]))
    for who in [*(o for o in order if o != last), last]:
        if who == "theirs":
            here.pop(who).leave()
        else:
            forwards.remove(here.pop(who))
        for left in here.values():
            if isinstance(left, forwards.Link):
                forwards.renew(left)
        ours = sum(links[name] for name in here if name != "theirs")
        low, high = sorted((1 + ours, 10 * (1 + ours)))
        if "theirs" not in here:
            assert module(ONE) == 1 + ours
        elif vars(module).get("forward") is not None:
            assert low <= module(ONE) <= high
    assert module(ONE) == 1
    assert isinstance(vars(module).get("forward"), forwards._Chain | None)  # at most one that passes calls on
    forwards.remove(forwards.push(module, adding(5)))
    assert module(ONE) == 1


def test_a_link_that_lost_its_place_acts_again_once_and_only_once(module):
    theirs = Other(module)
    link = forwards.push(module, adding(1))
    assert module(ONE) == 11
    theirs.leave()  # and takes us along
    assert module(ONE) == 1
    forwards.renew(link)
    assert module(ONE) == 2
    forwards.renew(link)
    assert module(ONE) == 2
    around = Other(module)
    forwards.renew(link)
    assert module(ONE) == 11  # outside of them now, and not inside as well
    around.leave()
    forwards.renew(link)
    assert module(ONE) == 2
    forwards.remove(link)
    assert module(ONE) == 1
    forwards.renew(link)  # it is gone
    assert module(ONE) == 1


def test_an_input_by_name():
    module = nn.Linear(2, 2)
    seen = []
    forwards.push(module, lambda forward, *a, **k: seen.append(forwards.first(a, k)) or forward(*a, **k))
    x = torch.ones(1, 2)
    assert torch.equal(module(input=x), module(x)) and seen[0] is x and seen[1] is x


def test_links_may_change_within_a_call(module):
    link = None

    def once(forward, x):
        forwards.remove(link)
        return forward(x) + 1

    forwards.push(module, adding(2))
    link = forwards.push(module, once)
    assert module(ONE) == 4 and module(ONE) == 3


def test_a_copy_has_links_of_its_own(module):
    link = forwards.push(module, adding(1))
    twin = copy.deepcopy(module)
    forwards.remove(link)
    assert twin(ONE) == 2 and module(ONE) == 1


def test_links_keep_no_module_alive():
    module = nn.Identity()
    link, dead = forwards.push(module, adding(1)), weakref.ref(module)
    del module, link
    gc.collect()
    assert dead() is None


def test_whose_forward_is_beneath(module):
    assert forwards.is_own(module)
    inner = forwards.push(module, adding(1))
    outer = forwards.push(module, adding(1))
    assert [forwards.is_own(module, link) for link in (None, inner, outer)] == [False, True, False]
    forwards.remove(inner)
    forwards.remove(outer)
    module.forward = lambda x: x
    assert not forwards.is_own(module)
    link = forwards.push(module, adding(1))
    assert not forwards.is_own(module, link)
