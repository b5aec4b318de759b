"""Run the comparison, print the tables, draw the curves. See the package's text."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plans import PARTS, SEEDS, TUNING, Part, Settings, clients_of, settings_of
from .report import draw, table

CACHE = Path(__file__).parents[2] / ".cache" / "federated"
RUNS = CACHE / "runs.jsonl"
APP = Path(__file__).parents[2] / "examples" / "federated" / "pyproject.toml"
Run = dict[str, Any]


def execute(settings: Settings, clients: int) -> Run:
    """One run of the app in this process: its rounds, and its seconds."""
    import tomllib

    from examples.federated.fedloha import client_app, server_app

    from .grid import InProcess

    logging.getLogger("flwr").setLevel(logging.ERROR)  # importing it has set another
    defaults = tomllib.loads(APP.read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    config = {**defaults, **settings}
    started = time.perf_counter()
    strategy = server_app.run(InProcess(client_app.app, clients, config), config)
    return {"rounds": strategy.rounds, "seconds": round(time.perf_counter() - started, 1)}


class Log:
    """The runs that there are, by their settings."""

    def __init__(self) -> None:
        lines = RUNS.read_text("utf-8").splitlines() if RUNS.is_file() else []
        self.runs: dict[str, Run] = {self.key(run["settings"], run["clients"]): run for run in map(json.loads, lines)}

    @staticmethod
    def key(settings: Mapping[str, Any], clients: int) -> str:
        return json.dumps([clients, settings], sort_keys=True)

    def find(self, settings: Settings, clients: int) -> Run | None:
        return self.runs.get(self.key(settings, clients))

    def get(self, settings: Settings, clients: int) -> Run:
        """A run that is there, or is now."""
        if (run := self.find(settings, clients)) is None:
            run = {"settings": settings, "clients": clients, **execute(settings, clients)}
            self.runs[self.key(settings, clients)] = run
            CACHE.mkdir(parents=True, exist_ok=True)
            with RUNS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {settings}: {accuracy(run):.3f} in {run['seconds']} s", flush=True)
        return run


def accuracy(run: Run) -> float:
    """Mean of the last three rounds: of the server's pictures, or of the clients' own where those differ."""
    last = [each.get("scores") or each.get("evaluation") for each in run["rounds"][-3:]]
    return sum(each["accuracy"] for each in last) / len(last)


def best_rate(log: Log, part: Part, method: str, run: bool) -> float | None:
    """The rate with the best accuracy on the part's last, more skewed split; None where that was not measured."""
    if len(part.rates) == 1:
        return part.rates[0]
    found = {}
    for rate in part.rates:
        settings = settings_of(part, method, part.splits[-1], TUNING, rate, part.tuning)
        clients = clients_of(part, method)
        measured = log.get(settings, clients) if run else log.find(settings, clients)
        if measured is not None:
            found[rate] = accuracy(measured)
    return max(found, key=found.__getitem__) if len(found) == len(part.rates) else None


def results(log: Log, part: Part) -> dict[tuple[str, str], list[Run]]:
    """(split, method) -> the runs of all seeds that there are, at the method's rate."""
    cells = {}
    for method in part.methods:
        if (rate := best_rate(log, part, method, run=False)) is None:
            continue
        for split in part.splits:
            clients = clients_of(part, method)
            seeds = [log.find(settings_of(part, method, split, seed, rate), clients) for seed in SEEDS]
            if found := [run for run in seeds if run is not None]:
                cells[split, method] = found
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print what has been measured, run nothing")
    o = parser.parse_args()
    log = Log()
    # Seeds outermost: what is there when somebody stops it has a row for every method.
    for seed in () if o.table else o.seeds:
        for part in (PARTS[name] for name in o.parts):
            rates = {method: best_rate(log, part, method, run=True) for method in part.methods}
            for split in part.splits:
                for method, rate in rates.items():
                    assert rate is not None
                    log.get(settings_of(part, method, split, seed, rate), clients_of(part, method))
    for name in o.parts:
        if cells := results(log, PARTS[name]):
            print(table(PARTS[name], cells))
            draw(PARTS[name], cells, CACHE / f"{name}.png")


if __name__ == "__main__":
    main()
