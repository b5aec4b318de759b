"""What runs on the server: rounds, the scores on pictures that no client has, and the model in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from loha_core.errors import LoHaError
from loha_core.federated.flower.adapters import AdapterFedAvg
from loha_core.federated.flower.records import copy_into, to_record
from loha_core.federated.flower.strategy import STRATEGIES, FactorStrategy

from . import data
from .methods import learner
from .training import score

app = ServerApp()
# What a resumed run may change.
FREE = ("rounds", "output", "local-state", "timeout", "min-clients")


def strategy(config: dict[str, Any]) -> FactorStrategy:
    """The strategy that a run's configuration names."""
    settings: dict[str, Any] = {
        "folder": Path(config["output"]) if config["output"] else None,
        "identity": {key: str(value) for key, value in config.items() if key not in FREE},
        "seed": config["seed"],
        "fraction_train": config["fraction"],
        # Where clients' data differ for good they test themselves, each on digits of its own kind.
        "fraction_evaluate": 1.0 if config["split"] == "two" else 0.0,
        "min_train_nodes": config["min-clients"],
        "min_evaluate_nodes": config["min-clients"],
        "min_available_nodes": config["min-clients"],
    }
    if config["method"] == "adapter" and config["strategy"] == "fedavg":
        return AdapterFedAvg(aggregation=config["aggregation"], **settings)
    if config["aggregation"] != "factors":
        raise LoHaError('aggregation "exact" is for method "adapter" with strategy "fedavg"')
    if config["strategy"] == "fedprox":
        settings["proximal_mu"] = config["proximal-mu"]
    if config["strategy"] == "fedadam":
        settings["eta"] = config["server-lr"]
    return STRATEGIES[config["strategy"]](**settings)


@app.main()
def main(grid: Grid, context: Context) -> None:
    run(grid, dict(context.run_config))


def run(grid: Grid, config: dict[str, Any]) -> FactorStrategy:
    """All rounds that are left to do."""
    torch.set_num_threads(1)
    chosen, judge = strategy(config), learner(config)
    pictures, labels = data.test_data(config["data"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if judge.private:
            return None  # without a client's own half there is no model to test
        copy_into(judge.shared, arrays)
        return MetricRecord(score(judge, judge.see(pictures), labels))

    arrays = chosen.restore(to_record(judge.shared))
    result = chosen.start(  # type: ignore[attr-defined]
        grid=grid,
        initial_arrays=arrays,
        num_rounds=max(0, config["rounds"] - chosen.resumed_from),
        timeout=config["timeout"],
        evaluate_fn=chosen.recorded(evaluate),
    )
    if chosen.folder:
        copy_into(judge.shared, result.arrays or arrays)
        save_file(
            {key: t.detach().contiguous() for key, t in judge.shared.items()}, chosen.folder / "model.safetensors"
        )
    return chosen
