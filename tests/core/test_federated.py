"""Rounds on Flower: what travels, what is refused, what a wrapper changes, and runs that go on after a kill.

Messages, strategies, wrappers and mods are Flower's; only that nodes answer in this process is not (`InProcess`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    Krum,
)

from benchmarks.federated.grid import InProcess
from loha_core.errors import LoHaError
from loha_core.federated.flower.client import answer, keep, proximal, recall, receive
from loha_core.federated.flower.records import size, to_record, to_tensors
from loha_core.federated.flower.strategy import FactorFedAdam, FactorFedAvg, FactorFedProx, FactorStrategy

START = {"w": torch.zeros(2, 3), "b": torch.ones(2)}
Change = Callable[[int, RecordDict], object]


class FactorFedAvgM(FactorStrategy, FedAvgM):
    """One that the library does not name."""


class FactorKrum(FactorStrategy, Krum):
    """And one that chooses among the answers."""


def clients(change: Change | None = None, mods: list | None = None) -> ClientApp:
    """Node n moves everything by n/10 and weighs n; ``change`` spoils its answer."""
    app = ClientApp(mods=mods)

    def train(message: Message, context: Context) -> Message:
        tensors = {key: torch.empty_like(t) for key, t in START.items()}
        receive(message, tensors)
        node = context.node_id
        reply = answer(message, {key: t + node / 10 for key, t in tensors.items()}, node, {"loss": 1 / node})
        if change is not None:
            change(node, reply.content)
        return reply

    if mods:  # Flower gives mods to a function's own list
        app.train(mods=mods)(train)
    else:
        app.train()(train)
    return app


def run(strategy, rounds: int = 1, app: ClientApp | None = None, nodes: int = 4, arrays=None, **settings):
    grid = InProcess(app or clients(), nodes, {})
    initial = to_record(START) if arrays is None else arrays
    result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, **settings)
    return to_tensors(result.arrays)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.allclose(first[key], second[key]) for key in first)


# --- strategies of Flower's stay what they are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "flowers", "settings"),
    [
        (FactorFedAvg, FedAvg, {}),
        (FactorFedAdam, FedAdam, {"eta": 0.03}),
        (FactorFedProx, FedProx, {"proximal_mu": 0.3}),
        (FactorFedAvgM, FedAvgM, {"server_momentum": 0.9}),
    ],
)
def test_with_sound_replies_a_strategy_gives_what_flowers_own_gives(ours, flowers, settings):
    assert close(run(ours(**settings), 3), run(flowers(**settings), 3))


def test_a_strategy_that_chooses_among_answers_gets_the_sound_ones():
    found = run(FactorKrum(num_malicious_nodes=1), app=clients(poison(4, "w", float("nan"))))
    assert any(close(found, {key: t + node / 10 for key, t in START.items()}) for node in (1, 2, 3))


def test_the_mean_is_weighted_and_named_by_hand():
    # weights 1 … 4 of steps 0.1 … 0.4: (1 + 4 + 9 + 16) / 10 / 10
    assert close(run(FactorFedAvg()), {key: t + 0.3 for key, t in START.items()})


def test_fedprox_sends_its_weight_and_the_term_is_the_papers():
    seen = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        tensors = {key: torch.empty_like(t) for key, t in START.items()}
        seen.append(receive(message, tensors)["proximal-mu"])
        return answer(message, tensors, 1, {})

    run(FactorFedProx(proximal_mu=0.3), app=app, nodes=2)
    assert seen == [0.3, 0.3]
    moved = {"w": torch.full((2, 3), 2.0, requires_grad=True), "b": torch.ones(2, requires_grad=True)}
    term = proximal(moved, START)
    assert term.item() == 0.5 * 6 * 4
    term.backward()
    assert torch.equal(moved["w"].grad, torch.full((2, 3), 2.0))  # ∇ ½‖w − w₀‖² = w − w₀


def test_wrappers_for_differential_privacy_clip_and_still_refuse():
    strategy = FactorFedAvg()
    # Each step n/10 on 8 numbers has the norm n/10·√8, so that clipping at 0.1·√8 leaves 0.1 of all of them.
    limit = 0.1 * 8**0.5
    found = run(DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, limit, 4))
    assert close(found, {key: t + 0.1 for key, t in START.items()})
    spoiled = clients(poison(3, "b", float("nan")))
    strategy = FactorFedAvg()
    found = run(DifferentialPrivacyServerSideFixedClipping(strategy, 0.0, limit, 4), app=spoiled)
    assert close(found, {key: t + 0.1 for key, t in START.items()})
    assert [text.split(":")[0] for text in strategy.rounds[1]["refused"]] == ["node 3"]


def test_the_mod_for_clipping_works_at_the_client():
    limit = 0.1 * 8**0.5
    wrapped = DifferentialPrivacyClientSideFixedClipping(FactorFedAvg(), 0.0, limit, 4)
    found = run(wrapped, app=clients(mods=[fixedclipping_mod]))
    assert close(found, {key: t + 0.1 for key, t in START.items()})


# --- what is refused -------------------------------------------------------------------------------------------------


def poison(node: int, key: str, value: float) -> Change:
    def change(which: int, content: RecordDict) -> None:
        if which == node:
            array = content["arrays"][key].numpy().copy()
            array.flat[0] = value
            content["arrays"][key] = Array(array)

    return change


def at_node_2(change: Callable[[RecordDict], object]) -> Change:
    return lambda node, content: change(content) if node == 2 else None


def _no_key(content: RecordDict) -> None:
    del content["arrays"]["b"]


def _one_more_key(content: RecordDict) -> None:
    content["arrays"]["c"] = Array(np.zeros(1))


def _other_shape(content: RecordDict) -> None:
    content["arrays"]["w"] = Array(np.zeros((1, 3), dtype=np.float32))


def _not_an_array(content: RecordDict) -> None:
    content["arrays"]["w"] = Array("float32", (2, 3), "numpy.ndarray", b"no array at all")


def _a_pickle(content: RecordDict) -> None:
    content["arrays"]["w"] = Array(np.zeros((2, 3), dtype=np.float32))
    content["arrays"]["w"].data = b"\x80\x04N."


def _no_weight(content: RecordDict) -> None:
    content["metrics"]["num-examples"] = 0


def _endless_weight(content: RecordDict) -> None:
    content["metrics"]["num-examples"] = float("inf")


def _other_metrics(content: RecordDict) -> None:
    content["metrics"]["mine"] = 1.0


def _two_records(content: RecordDict) -> None:
    content["more"] = MetricRecord({"num-examples": 1})


def _far_away(content: RecordDict) -> None:
    content["arrays"]["b"] = Array(np.full(2, 1e6, dtype=np.float32))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_key, ["b is missing"]),
        (_one_more_key, ["c is not among"]),
        (_other_shape, ["w is (1, 3)", "(2, 3)"]),
        (_not_an_array, ["w is no array"]),
        (_a_pickle, ["w is no array"]),
        (_no_weight, ["num-examples is 0"]),
        (_endless_weight, ["num-examples is inf"]),
        (_other_metrics, ["mine"]),
        (_two_records, ["2 of metrics"]),
        (_far_away, ["median", "in b"]),
    ],
)
def test_a_reply_that_cannot_be_used_is_refused_by_name(spoil, words, caplog):
    strategy = FactorFedAvg()
    found = run(strategy, app=clients(at_node_2(spoil)))
    assert close(found, {key: t + (1 + 9 + 16) / 80 for key, t in START.items()})  # as if node 2 were not there
    (refused,) = strategy.rounds[1]["refused"]
    assert refused.startswith("node 2: ") and all(word in refused for word in words), refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ours", [FactorFedAvg, FactorFedAdam, FactorFedProx])
def test_numbers_that_are_not_finite_name_node_and_key(ours, value):
    strategy = ours()
    found = run(strategy, app=clients(poison(3, "w", value)))
    assert strategy.rounds[1]["refused"] == ["node 3: w: 1 of 6 values are NaN or infinite"]
    assert all(torch.isfinite(t).all() for t in found.values())
    # The others' alone, whatever the strategy makes of them.
    assert close(found, run(ours(), app=_without(3)))


def _without(node: int) -> ClientApp:
    def change(which: int, content: RecordDict) -> None:
        if which == node:
            raise RuntimeError("this node is gone")

    return clients(change)


def test_a_round_goes_on_without_a_node_that_fails_and_stays_when_all_do():
    strategy = FactorFedAvg()
    found = run(strategy, app=_without(2))
    assert close(found, {key: t + (1 + 9 + 16) / 80 for key, t in START.items()})
    assert (strategy.rounds[1]["nodes"], strategy.rounds[1]["answers"]) == (4, 3)

    def spoil(node: int, content: RecordDict) -> None:
        poison(node, "w", float("nan"))(node, content)

    strategy = FactorFedAvg()
    assert run(strategy, app=clients(spoil)) == {}  # Flower's word for "as it began"
    assert len(strategy.rounds[1]["refused"]) == 4


def test_bytes_are_those_of_the_messages():
    sent: list[int] = []

    class Counting(InProcess):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            messages = list(messages)
            replies = list(super().send_and_receive(messages))
            sent.append(size(messages) + size(replies))
            return replies

    strategy = FactorFedAvg(fraction_evaluate=0.0)
    grid = Counting(clients(), 4, {})
    strategy.start(grid=grid, initial_arrays=to_record(START), num_rounds=2)
    assert strategy.bytes == sum(sent) > 2 * 2 * 4 * 8 * 4  # rounds, ways, nodes, numbers, bytes


# --- runs that go on -------------------------------------------------------------------------------------------------


def scored(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"round": server_round, "sum": float(sum(t.sum() for t in to_tensors(arrays).values()))})


@pytest.mark.parametrize(
    ("ours", "settings"),
    [
        (FactorFedAvg, {"fraction_train": 0.5}),
        (FactorFedAdam, {"eta": 0.03}),
        (FactorFedAvgM, {"server_momentum": 0.9, "server_learning_rate": 0.5}),
    ],
)
def test_a_resumed_run_equals_one_that_was_not_disturbed(ours, settings, tmp_path):
    def started(folder: str, rounds: int):
        strategy = ours(folder=tmp_path / folder, **settings)
        arrays = strategy.restore(to_record(START))
        left = rounds - strategy.resumed_from
        return strategy, run(strategy, left, nodes=6, arrays=arrays, evaluate_fn=strategy.recorded(scored))

    whole, expected = started("whole", 5)
    started("cut", 2)
    resumed, found = started("cut", 5)
    assert resumed.resumed_from == 2
    assert same(found, expected)
    assert resumed.rounds == whole.rounds
    assert [each["scores"]["round"] for each in whole.rounds] == [0, 1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "cut" / "rounds.json").read_text()) == whole.rounds


def test_the_order_of_answers_does_not_matter():
    class Backwards(InProcess):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            return list(super().send_and_receive(messages))[::-1]

    both = []
    for kind in (InProcess, Backwards):
        strategy = FactorFedAvg()
        result = strategy.start(grid=kind(clients(), 7, {}), initial_arrays=to_record(START), num_rounds=3)
        both.append(to_tensors(result.arrays))
    assert same(*both)


def test_a_run_of_other_settings_or_another_model_is_not_resumed(tmp_path):
    run(FactorFedAvg(folder=tmp_path, identity={"lr": "0.1"}))
    with pytest.raises(LoHaError, match=r"lr \(0.1 then, 0.2 now\)"):
        FactorFedAvg(folder=tmp_path, identity={"lr": "0.2"}).restore(to_record(START))
    with pytest.raises(LoHaError, match="strategy"):
        FactorFedAdam(folder=tmp_path, identity={"lr": "0.1"}).restore(to_record(START))
    with pytest.raises(LoHaError, match=r"w is \(2, 3\); expected \(3, 3\)"):
        FactorFedAvg(folder=tmp_path, identity={"lr": "0.1"}).restore(to_record({**START, "w": torch.zeros(3, 3)}))


# --- a client's side -------------------------------------------------------------------------------------------------


def test_what_a_client_keeps_is_there_in_its_next_round_and_after_a_restart(tmp_path):
    mine = {"m": torch.randn(3, 2)}
    path = tmp_path / "client-0.safetensors"
    context = Context(1, 1, {}, RecordDict(), {})
    found = {"m": torch.zeros(3, 2)}
    assert not recall(context, found, path)
    keep(context, mine, path)
    assert recall(context, found) and same(found, mine)
    later = Context(2, 1, {}, RecordDict(), {})
    found = {"m": torch.zeros(3, 2)}
    assert not recall(later, found)
    assert recall(later, found, path) and same(found, mine)
    with pytest.raises(LoHaError, match=r"client-0.*m is \(3, 2\); expected \(4, 2\)"):
        recall(later, {"m": torch.zeros(4, 2)}, path)


def test_arrays_of_another_model_are_refused_by_the_client():
    seen = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with pytest.raises(LoHaError, match=r"another model: w is \(2, 3\); expected \(2, 4\)") as found:
            receive(message, {**START, "w": torch.zeros(2, 4)})
        seen.append(found)
        return answer(message, START, 1, {})

    run(FactorFedAvg(), app=app)
    assert len(seen) == 4


def test_bfloat16_travels_exactly():
    values = torch.randn(5, dtype=torch.bfloat16)
    assert torch.equal(to_tensors(to_record({"x": values}))["x"].bfloat16(), values)
