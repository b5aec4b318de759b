"""What a strategy of Flower's needs for factors: replies are looked at, bytes counted, and each round is saved."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoHaError, about, check_number
from ...formats.container import atomic
from ...training import state
from .records import ArrayRecord, Message, distances, fault, size, to_record, to_tensors, total

# The module above says what to install.
# isort: split
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx

ROUNDS = "rounds.json"
LOG = logging.getLogger("flwr")
Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


class FactorStrategy:
    """Put before a strategy of Flower's: ``class Mine(FactorStrategy, FedYogi)``; wrappers of Flower's go around it.

    - A reply with values that are not finite, other keys or shapes than were sent, no positive weight, or an update
      far larger than the others' is refused: a warning names the node and the key, and the round goes on without it, as
      it does without nodes that do not answer.
    - Replies are added up in an order that does not depend on who answers first.
    - ``rounds`` says for each round who took part, what was refused, the bytes of all messages, and the scores.
    - With a folder, the server's state is saved after each round; `restore` goes on from it.

    Args:
        folder: where ``state.safetensors`` and ``rounds.json`` are kept; None keeps nothing.
        identity: what a resumed run must have in common with the saved one, such as its settings.
        seed: of the choice of nodes, when only a fraction of them takes part.
        outlier: an update is refused when its norm is so many times the round's median; three replies are needed.
        settings: of Flower's strategy.
    """

    kept = ("m_t", "v_t", "momentum_vector")
    """Attributes of Flower's strategies that last from round to round: arrays, in dictionaries or lists."""

    def __init__(
        self,
        *,
        folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        seed: int = 0,
        outlier: float = 10.0,
        **settings: Any,
    ) -> None:
        check_number("outlier", outlier, above=1)
        super().__init__(**settings)
        self.folder, self.seed, self.outlier = folder, seed, outlier
        self.identity = {"strategy": type(self).__name__, **(identity or {})}
        self.rounds: list[dict[str, Any]] = [{"round": 0}]
        self.resumed_from = 0
        self._sent: dict[str, Tensor] = {}
        self._arrays = ArrayRecord()

    # --- a run that goes on ------------------------------------------------------------------------------------------

    def restore(self, arrays: ArrayRecord) -> ArrayRecord:
        """The arrays to start from: those of the state in the folder, or ``arrays`` where there is none.

        Then ``start(…, num_rounds=rounds - strategy.resumed_from)`` does what is left. Flower's own count, in its log
        and its Result, begins at 1 again; that of ``rounds`` and of what is sent to clients goes on.

        Raises:
            LoHaError: the state is damaged, or of other settings or another model.
        """
        if self.folder is None or not (path := self.folder / state.STATE).is_file():
            return arrays
        state.remove_unfinished(self.folder)
        saved = state.load(path)
        state.check_identity(path, saved["identity"], self.identity)
        with about(path):
            if found := fault(saved["arrays"], to_tensors(arrays)):
                raise LoHaError(f"the state of another model: {found}")
        self.rounds = saved["rounds"]
        self.resumed_from = self.rounds[-1]["round"]
        for name, value in saved["kept"].items():
            setattr(self, name, _mapped(value, Tensor.numpy))
        return to_record(saved["arrays"])

    def _save(self) -> None:
        if self.folder is None:
            return
        kept = {name: getattr(self, name) for name in self.kept if getattr(self, name, None) is not None}
        state.save(self.folder / state.STATE, {
            "identity": self.identity, "rounds": self.rounds, "arrays": to_tensors(self._arrays),
            "kept": {name: _mapped(value, torch.as_tensor) for name, value in kept.items()},
        })  # fmt: skip
        with atomic(self.folder / ROUNDS) as temporary:
            temporary.write_text(json.dumps(self.rounds, indent=1), "utf-8")

    def recorded(self, evaluate_fn: Evaluate) -> Evaluate:
        """``evaluate_fn`` for ``start``: it is told the run's own rounds, and its scores are kept in ``rounds``."""

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            current = self.rounds[-1]
            if "scores" in current:  # the last round before a resumed run
                return MetricRecord(current["scores"])
            scores = evaluate_fn(server_round + self.resumed_from, arrays)
            if scores is not None:
                current["scores"] = dict(scores)
                self._arrays = arrays
                self._save()
                text = ", ".join(f"{name} {value:.4g}" for name, value in current["scores"].items())
                LOG.info("round %d: %s; %.2f MB so far", current["round"], text, self.bytes / 1e6)
            return scores

        return evaluate

    @property
    def bytes(self) -> int:
        """Of all training messages so far, to and from all nodes."""
        return sum(map(bytes_of, self.rounds))

    # --- Flower's four steps of a round ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        server_round += self.resumed_from
        self._sent = to_tensors(arrays)
        with _seeded(f"{self.seed} {server_round}"):
            messages = list(super().configure_train(server_round, arrays, config, grid))  # type: ignore[misc]
        self.rounds.append({"round": server_round, "nodes": len(messages), "bytes-down": size(messages)})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        server_round += self.resumed_from
        replies = list(replies)
        current = self.rounds[-1]
        refused = self._refused(replies)
        for node, why in refused.items():
            LOG.warning("round %d: the update of node %d is refused: %s", server_round, node, why)
        sound = [m for m in replies if m.has_error() or m.metadata.src_node_id not in refused]
        current |= {
            "bytes-up": size(replies),
            "answers": sum(m.has_content() for m in replies),
            "refused": [f"node {node}: {why}" for node, why in refused.items()],
        }
        arrays, metrics = self.combine(server_round, sorted(sound, key=_fingerprint))
        if arrays is None:
            LOG.warning("round %d: no update that can be used; the model stays as it is", server_round)
        current["metrics"] = dict(metrics or {})
        return arrays, metrics

    def combine(self, server_round: int, replies: list[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sound replies, and errors, to the next arrays: Flower's strategy does it."""
        return super().aggregate_train(server_round, replies)  # type: ignore[misc,no-any-return]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._arrays = arrays  # with what a wrapper did to them
        with _seeded(f"{self.seed} {server_round + self.resumed_from} evaluate"):
            messages = list(
                super().configure_evaluate(server_round + self.resumed_from, arrays, config, grid)  # type: ignore[misc]
            )
        self.rounds[-1]["evaluate-bytes"] = size(messages)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        replies = list(replies)
        self.rounds[-1]["evaluate-bytes"] += size(replies)
        metrics: MetricRecord | None = super().aggregate_evaluate(  # type: ignore[misc]
            server_round + self.resumed_from, sorted(replies, key=_fingerprint)
        )
        self.rounds[-1]["evaluation"] = dict(metrics or {})
        self._save()
        return metrics

    # --- what is refused ---------------------------------------------------------------------------------------------

    def _refused(self, replies: Iterable[Message]) -> dict[int, str]:
        """Node -> why its reply is not used."""
        refused, moved = {}, {}
        answers = {m.metadata.src_node_id: m for m in replies if m.has_content()}
        names = Counter(frozenset(record) for m in answers.values() for record in m.content.metric_records.values())
        usual = names.most_common(1)[0][0] if names else frozenset()
        for node, message in answers.items():
            try:
                moved[node] = self._moved(message, usual)
            except LoHaError as error:
                refused[node] = str(error)
        norms = {node: total(parts) for node, parts in moved.items()}
        usual_norm = statistics.median(norms.values()) if len(norms) > 2 else 0.0
        for node, norm in norms.items():
            if usual_norm and norm > self.outlier * usual_norm:
                key = max(moved[node], key=moved[node].__getitem__)
                refused[node] = f"its norm is {norm:.3g} beside a median of {usual_norm:.3g}, most of it in {key}"
        return refused

    def _moved(self, message: Message, metrics: frozenset[str]) -> dict[str, float]:
        """How far a reply moved each array.

        Raises:
            LoHaError: it cannot be used.
        """
        arrays, numbers = message.content.array_records, message.content.metric_records
        if len(arrays) != 1 or len(numbers) != 1:
            raise LoHaError(f"{len(arrays)} records of arrays and {len(numbers)} of metrics; expected one each")
        record = next(iter(numbers.values()))
        if set(record) != metrics:
            raise LoHaError(f"metrics {', '.join(sorted(record))}; others sent {', '.join(sorted(metrics))}")
        key = self.weighted_by_key  # type: ignore[attr-defined]
        check_number(key, record.get(key), above=0)
        tensors = to_tensors(next(iter(arrays.values())))
        if found := self.fault(tensors):
            raise LoHaError(found)
        return self.moved(tensors)

    def fault(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with a node's tensors, or None."""
        return fault(tensors, self._sent)

    def moved(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """The norm of a node's update, by name."""
        return distances(tensors, self._sent)


class FactorFedAvg(FactorStrategy, FedAvg):
    """Weighted mean (McMahan et al., arXiv 1602.05629)."""


class FactorFedProx(FactorStrategy, FedProx):
    """FedAvg whose clients stay near where they start (Li et al., arXiv 1812.06127)."""


class FactorFedAdam(FactorStrategy, FedAdam):
    """Adam on the server (Reddi et al., arXiv 2003.00295)."""


STRATEGIES = {"fedavg": FactorFedAvg, "fedprox": FactorFedProx, "fedadam": FactorFedAdam}


def bytes_of(entry: Mapping[str, Any]) -> int:
    """Of a round's training messages, both ways."""
    return int(entry.get("bytes-down", 0) + entry.get("bytes-up", 0))


def _fingerprint(message: Message) -> str:
    """An order of replies by what they say; node ids are drawn anew for each run."""
    digest = hashlib.blake2b()
    if message.has_content():
        for name, record in message.content.array_records.items():
            for key, array in record.items():
                digest.update(f"{name} {key}".encode() + array.data)
        for name, numbers in message.content.metric_records.items():
            digest.update(f"{name} {sorted(numbers.items())}".encode())
    return digest.hexdigest()


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same dictionaries and lists with another kind of array."""
    if isinstance(value, dict):
        return {key: _mapped(inner, function) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mapped(inner, function) for inner in value]
    return function(value)


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Flower draws nodes from Python's own generator."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
