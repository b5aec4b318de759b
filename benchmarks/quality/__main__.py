"""Run the comparison, and print the table. See the package's text."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from .methods import METHODS
from .tasks import CACHE, TASKS, Task, targets

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RUNS = CACHE / "runs.jsonl"
Run = dict[str, Any]


def train(task: Task, method: str, lr: float, seed: int) -> Run:
    """One run: AdamW, a cosine to zero, gradients clipped to a norm of one."""
    torch.manual_seed(seed)
    model = task.model().requires_grad_(False)
    model, groups = METHODS[method].adapt(model, targets(task, model), lr)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=METHODS[method].weight_decay, fused=True)
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    for _ in range(task.steps):
        batch = task.batch(generator)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        curve.step()
    seconds = (time.perf_counter() - started) / task.steps
    scores = task.score(model.eval())
    scores = {name: value if math.isfinite(value) else None for name, value in scores.items()}
    size = sum(p.numel() for p in parameters)
    return {"task": task.name, "method": method, "lr": lr, "seed": seed, "parameters": size, "step": seconds, **scores}


def runs() -> list[Run]:
    return [json.loads(line) for line in RUNS.read_text("utf-8").splitlines()] if RUNS.is_file() else []


def _key(run: Run) -> tuple[Any, ...]:
    return run["task"], run["method"], run["lr"], run["seed"]


def table(results: Iterable[Run]) -> str:
    """Markdown: a row for each task and method, a column for each learning rate, mean ± spread of the seeds.

    In bold: each method's best rate. Then further scores at that rate.
    """
    cells: dict[str, dict[str, dict[float, list[Run]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    rates = set()
    for run in results:
        cells[run["task"]][run["method"]][run["lr"]].append(run)
        rates.add(run["lr"])
    lines = []
    for task, methods in cells.items():
        more = sorted({k for m in methods.values() for c in m.values() for r in c for k in r} - _PLAIN)
        heads = ["method", *(f"{rate:g}" for rate in sorted(rates)), *more]
        lines += [f"\n**{task}**: loss on held-out data by learning rate\n", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        for method in (m for m in METHODS if m in methods):
            by_rate = methods[method]
            best = min(by_rate, key=lambda rate: _mean(by_rate[rate], "loss"))
            row = [method]
            for rate in sorted(rates):
                text = _text(by_rate[rate], "loss") if rate in by_rate else ""
                row.append(f"**{text}**" if rate == best else text)
            row += [_text(by_rate[best], name) for name in more]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


_PLAIN = {"task", "method", "lr", "seed", "parameters", "step", "loss"}


def _values(cell: list[Run], name: str) -> list[float]:
    return [math.inf if run[name] is None else run[name] for run in cell]


def _mean(cell: list[Run], name: str) -> float:
    return statistics.fmean(_values(cell, name))


def _text(cell: list[Run], name: str) -> str:
    values = _values(cell, name)
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and all(map(math.isfinite, values)) else ""
    return f"{_mean(cell, name):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--table", action="store_true", help="print what has been measured, run nothing")
    o = parser.parse_args()
    done = {_key(run) for run in runs()}
    for name in [] if o.table else o.tasks:
        task = TASKS[name]()
        # Seeds outermost: what is there when somebody stops it has a row for every method.
        for seed in o.seeds:
            for lr in o.rates:
                for method in o.methods:
                    if (name, method, lr, seed) in done:
                        continue
                    run = train(task, method, lr, seed)
                    CACHE.mkdir(parents=True, exist_ok=True)
                    with RUNS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(run) + "\n")
                    print(json.dumps(run), flush=True)
    for name, method in METHODS.items():
        print(f"- {name}: {method.note}")
    print(table(run for run in runs() if run["task"] in o.tasks and run["method"] in o.methods))


if __name__ == "__main__":
    main()
