"""What the runs say: tables in Markdown, and curves by round and by bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loha_core.federated.flower.strategy import bytes_of

from .plans import Part

Run = dict[str, Any]
Cells = Mapping[tuple[str, str], Sequence[Run]]
POINT = 0.01  # of accuracy, below the plain model's end


def curve(run: Run) -> list[tuple[int, float, float]]:
    """(round, megabytes of all training messages so far, accuracy as the mean of the last three rounds)."""
    points, spent, last = [], 0, []
    for each in run["rounds"]:
        spent += bytes_of(each)
        if scores := each.get("scores") or each.get("evaluation"):
            last = [*last[-2:], scores["accuracy"]]
            points.append((each["round"], spent / 1e6, sum(last) / len(last)))
    return points


def at_bytes(run: Run, megabytes: float) -> float:
    """The accuracy when so much was sent."""
    return max(((sent, found) for _, sent, found in curve(run) if sent <= megabytes), default=(0.0, 0.0))[1]


def bytes_to(run: Run, accuracy: float) -> float | None:
    """Megabytes until an accuracy is reached, or None."""
    return next((sent for _, sent, found in curve(run) if found >= accuracy), None)


def _text(values: Sequence[float], percent: bool = True) -> str:
    scale, digits = (100, 1) if percent else (1, 2)
    spread = f" ± {statistics.stdev(values) * scale:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values) * scale:.{digits}f}{spread}"


def table(part: Part, cells: Cells) -> str:
    """A table for each split: mean ± spread of the seeds, accuracies in percent."""
    lines = [f"\n**{part.title}, {part.clients} clients**"]
    for split in part.splits:
        found = {method: cells[split, method] for method in part.methods if (split, method) in cells}
        if not found:
            continue
        ends = {method: [curve(run)[-1] for run in runs] for method, runs in found.items()}
        plain = found.get("FedAvg")
        sending = [ends[m][0][1] for m in found if ends[m][0][1] > 0.1]
        least = min(sending) if sending else 0.0
        goal = statistics.fmean(end[2] for end in ends["FedAvg"]) - POINT if plain else None
        heads = ["method", "seeds", "lr", "kB a message", "MB", "accuracy", f"at {least:.1f} MB"]
        errors = any("error" in run["rounds"][-1] for runs in found.values() for run in runs)
        heads += ["loss", "error by round, %"] if errors else []
        heads += [f"MB to {goal * 100:.1f} %", "× fewer"] if goal is not None else []
        lines += [f"\n{split}\n", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        reached = {m: [bytes_to(run, goal) for run in runs] if goal is not None else [] for m, runs in found.items()}
        for method, runs in found.items():
            first = runs[0]["rounds"][1]
            row = [
                method,
                str(len(runs)),
                f"{runs[0]['settings']['lr']:g}",
                f"{first['bytes-down'] / first['nodes'] / 1e3:.1f}",
            ]
            row += [f"{ends[method][0][1]:.1f}", _text([end[2] for end in ends[method]])]
            row.append(_text([at_bytes(run, least) for run in runs]))
            if errors:
                row.append(_text([run["rounds"][-1]["scores"]["loss"] for run in runs], False))
                row.append(_errors(runs))
            if goal is not None:
                own, plains = reached[method], [each for each in reached["FedAvg"] if each is not None]
                sent = [each for each in own if each is not None]
                if len(sent) < len(own):
                    row += [f"not reached by {len(own) - len(sent)} of {len(own)}", ""]
                else:
                    row += [
                        _text(sent, False),
                        f"{statistics.fmean(plains) / statistics.fmean(sent):.1f}" if min(sent) > 1 else "",
                    ]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _errors(runs: Sequence[Run]) -> str:
    """How far each round's aggregate is from the mean of the updates, in percent: the mean of the seeds."""
    rounds = [[run["rounds"][i].get("error", 0.0) for run in runs] for i in range(1, len(runs[0]["rounds"]))]
    return " ".join(f"{statistics.fmean(values) * 100:.1f}" for values in rounds)


def draw(part: Part, cells: Cells, path: Path) -> None:
    """Curves of the mean of the seeds, with the range between them: by round on the left, by bytes on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = [split for split in part.splits if any(key[0] == split for key in cells)]
    figure, axes = pyplot.subplots(len(splits), 2, figsize=(10, 3.6 * len(splits)), squeeze=False, sharey="row")
    for row, split in zip(axes, splits, strict=True):
        for method in part.methods:
            if (split, method) not in cells:
                continue
            curves = [curve(run) for run in cells[split, method]]
            rounds, sent = [p[0] for p in curves[0]], [p[1] for p in curves[0]]
            values = [[c[i][2] for c in curves] for i in range(min(map(len, curves)))]
            for axis, x in zip(row, (rounds, sent), strict=True):
                x = x[: len(values)]
                (line,) = axis.plot(x, [statistics.fmean(v) for v in values], label=method, linewidth=1.4)
                axis.fill_between(
                    x, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color()
                )
        row[0].set(xlabel="round", ylabel="accuracy", title=split)
        row[1].set(xlabel="MB sent and received by the server", title=split, xscale="symlog")
        row[0].legend(fontsize=7)
    figure.suptitle(part.title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
