"""Random numbers that depend on a seed and a number alone, and torch's global generators left as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU whose seed is a hash of ``parts``.

    >>> a, b = (torch.rand(1, generator=generator(7, "draw", 12)) for _ in range(2))
    >>> bool(a == b)
    True
    """
    text = "\0".join(f"{type(part).__name__} {part}" for part in parts)
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(seed)


@contextmanager
def fork_rng() -> Iterator[None]:
    """Restore the random states of the CPU and of all devices afterwards.

    `torch.random.fork_rng` does so for one kind of device; ``torch.manual_seed`` sets those of all.
    """
    states = [(set_state, get_state()) for get_state, set_state in _random_states()]
    try:
        yield
    finally:
        for set_state, state in states:
            set_state(state)


def _random_states() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    """(get, set) of the CPU's state and of each kind of device that is available."""
    yield torch.get_rng_state, torch.set_rng_state
    for kind in (torch.cuda, torch.xpu):
        if kind.is_available():
            yield kind.get_rng_state_all, kind.set_rng_state_all
    if torch.backends.mps.is_available():
        yield torch.mps.get_rng_state, torch.mps.set_rng_state
