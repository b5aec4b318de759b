"""What is run: a part of the comparison is a list of names and of settings that differ from the app's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
RATES = (0.001, 0.003, 0.01, 0.03)
TUNING = 9  # the seed that learning rates are chosen with, and that no table shows
Settings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One table.

    Attributes:
        settings: of all its runs.
        splits: of the data among clients.
        methods: name in the table -> settings.
        tuning: rounds of the runs that choose each method's learning rate among ``rates``.
    """

    title: str
    settings: Settings
    splits: tuple[str, ...]
    methods: dict[str, Settings]
    clients: int = 20
    tuning: int = 8
    rates: tuple[float, ...] = RATES


def _fedpara(*gammas: float) -> dict[str, Settings]:
    return {f"FedPara γ={gamma:g}": {"method": "fedpara", "gamma": gamma} for gamma in gammas}


SIZES = {
    "FedAvg": {"method": "plain"},
    "low-rank, as γ=0.1": {"method": "low-rank", "gamma": 0.1},
    **_fedpara(0.1, 0.3, 0.5),
}
PERSONAL = {
    "local only": {"method": "local"},
    "FedAvg": {"method": "plain"},
    "FedPer": {"method": "fedper"},
    "pFedPara": {"method": "pfedpara", "gamma": 0.5},
    "pFedPara, last layer stays": {"method": "pfedpara-head", "gamma": 0.5},
    "pFedPara, SGD at 0.1": {"method": "pfedpara", "gamma": 0.5, "optimizer": "sgd", "lr": 0.1},
}
CENTRAL = "central"  # one client has everything
ADAPTERS = {
    "factors": {"aggregation": "factors"},
    "exact": {"aggregation": "exact"},
    CENTRAL: {},
}
TRIED = {
    "flat factors": {"method": "fedpara", "tucker": False},
    "low-rank, as flat factors": {"method": "low-rank", "tucker": False},
    "tanh": {"method": "fedpara", "activation": "tanh"},
    "fan out": {"method": "fedpara", "fan": "out"},
    "SGD at 0.1": {"method": "fedpara", "optimizer": "sgd", "lr": 0.1},
    "SGD at 0.1, Jacobian correction 0.1": {"method": "fedpara", "optimizer": "sgd", "lr": 0.1, "jacobian": 0.1},
}

PARTS = {
    "mnist": Part(
        "MNIST (4,000 of 14×14), convolutions of 16, 32, 64",
        {"data": "mnist", "net": "vgg", "rounds": 40, "fraction": 0.25},
        ("iid", "dirichlet"), SIZES,
    ),
    "wide": Part(
        "MNIST (4,000 of 14×14), convolutions of 32, 64, 128",
        {"data": "mnist", "net": "vgg", "width": 32, "rounds": 40, "fraction": 0.25},
        ("iid", "dirichlet"), {method: SIZES[method] for method in ("FedAvg", "low-rank, as γ=0.1", "FedPara γ=0.1")},
        rates=(0.003, 0.01),
    ),
    "digits": Part(
        "Digits (1,438 of 8×8), MLP of 512", {"data": "digits", "net": "mlp", "rounds": 50, "fraction": 0.25},
        ("iid", "dirichlet"), SIZES,
    ),
    "personal": Part(
        "Two digits a client: MNIST, MLP of 512", {"data": "mnist", "net": "mlp", "rounds": 15}, ("two",), PERSONAL,
    ),
    # One learning rate for all: that of pFedPara and of local learning with 20 clients.
    "personal-50": Part(
        "Two digits a client: MNIST, MLP of 512", {"data": "mnist", "net": "mlp", "rounds": 15}, ("two",), PERSONAL,
        clients=50, rates=(0.003,),
    ),
    "adapters": Part(
        "A LoHa of rank 4 for turned digits (2,000 of MNIST), base of convolutions",
        {"data": "mnist", "net": "vgg", "method": "adapter", "rounds": 12},
        ("dirichlet",), ADAPTERS, clients=10, rates=(0.01, 0.03),
    ),
    "tried": Part(
        "Other forms of FedPara γ=0.1: MNIST, convolutions of 16, 32, 64",
        {"data": "mnist", "net": "vgg", "gamma": 0.1, "rounds": 40, "fraction": 0.25},
        ("dirichlet",), TRIED, rates=(0.01,),
    ),
}  # fmt: skip


def clients_of(part: Part, method: str) -> int:
    return 1 if method == CENTRAL else part.clients


def settings_of(part: Part, method: str, split: str, seed: int, rate: float, rounds: int | None = None) -> Settings:
    """What differs from the app's own configuration in one run."""
    own = {"lr": rate, **part.settings, **part.methods[method], "split": split, "seed": seed}
    if method == CENTRAL:
        own |= {"split": "iid", "min-clients": 1}
    return own if rounds is None else {**own, "rounds": rounds}
