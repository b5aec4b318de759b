"""How training goes, for the page: events while it runs, and the whole run for whoever looks later."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from comfy_execution.utils import get_executing_context

from loha_core.training.events import Stepped, Validated
from loha_core.training.trainer import Trainer

EVENT = "loha.training"
MIN_EVENT_INTERVAL = 0.25  # seconds
MAX_RUNS = 8  # that are kept

# Sends an event to the pages; a running server sets it.
tell: Callable[[str, dict[str, Any]], object] = lambda event, data: None  # noqa: E731
# What ComfyUI executes now, as its queue has it: (number, prompt's id, prompt, extra data, …); set likewise.
executing: Callable[[], Iterable[tuple[Any, ...]]] = lambda: ()  # noqa: E731

# By the workflow and the node that trains, the latest last.
runs: dict[tuple[str, str], Run] = {}


@dataclass
class Run:
    """One run, as the page shows it."""

    name: str
    workflow: str  # its id; none where a prompt came without one
    node: str
    steps: int
    losses: list[float]
    prompt: str = ""  # the id of the one that it belongs to
    rates: list[float] = field(default_factory=list)
    previews: list[tuple[int, list[str]]] = field(default_factory=list)  # step, files in the run's folder
    state: str = "running"
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    began: float = field(default_factory=time.time)
    first: int = 0  # steps done when it began
    previous: list[float] = field(default_factory=list)  # losses of the node's run before
    sent: float = 0.0
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss on held-out data

    def stepped(self, event: Stepped) -> None:
        self.losses.append(event.loss)
        self.rates.append(event.lr)
        if event.step == self.steps:
            self.state = "done"
        if time.time() - self.sent >= MIN_EVENT_INTERVAL or self.state == "done":
            self._send()

    def validated(self, event: Validated) -> None:
        self.validation.append((event.step, event.loss))
        self._send()

    def previewed(self, step: int, files: list[str]) -> None:
        self.previews.append((step, files))
        self._send()

    def ended(self, reason: str) -> None:
        self.state = "cancelled" if reason == "InterruptProcessingException" else "failed"
        self._send()

    def seconds_left(self) -> float | None:
        done = len(self.losses) - self.first
        return (time.time() - self.began) / done * (self.steps - len(self.losses)) if done else None

    def summary(self) -> dict[str, Any]:
        """The data of an event; `full` has the losses, too."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "name": self.name,
            "workflow": self.workflow,
            "node": self.node,
            "step": len(self.losses),
            "steps": self.steps,
            "loss": self.losses[-1] if self.losses else None,
            "lr": self.rates[-1] if self.rates else None,
            "seconds_left": self.seconds_left(),
            "previews": self.previews,
            "validation": self.validation,
            "state": self.state,
            "began": self.began,
        }

    def full(self) -> dict[str, Any]:
        return self.summary() | {"losses": self.losses, "previous": self.previous}

    def since(self, number: int) -> dict[str, Any]:
        """For a page that has this many losses already: the later ones."""
        return self.summary() | {"losses": self.losses[number:]}

    def _send(self) -> None:
        self.sent = time.time()
        tell(EVENT, self.summary())


def begin(name: str, workflow: str, trainer: Trainer) -> Run:
    """A new run of the node that is executed now."""
    context = get_executing_context()
    node = "" if context is None else str(context.node_id)
    prompt = "" if context is None else context.prompt_id
    run = Run(name, workflow, node, trainer.config.steps, list(trainer.losses), prompt, first=trainer.step)
    run.validation = list(trainer.validation)
    if before := runs.pop((workflow, node), None):
        # A resumed run has the losses of the run that it goes on from.
        run.previous = before.previous if run.first and before.name == name else before.losses
    runs[workflow, node] = run
    while len(runs) > MAX_RUNS:
        runs.pop(next(iter(runs)))
    return run


def runs_of(workflow: str, node: str) -> list[Run]:
    """The runs of a node, the latest last.

    Args:
        workflow: its id; a run that came without one may be anyone's.
        node: its id, or ``:id`` for a node of a subgraph, whichever of its places runs; "" for all.
    """
    return [run for run in list(runs.values()) if _is_of(run.workflow, run.node, workflow, node)]


def preparing(workflow: str, node: str) -> str:
    """The id of the prompt that is executed now and will come to this node, or has, but trains nothing yet; or ""."""
    begun = {run.prompt for run in runs_of(workflow, node)}
    for _, prompt_id, prompt, extra, *_ in executing():
        sent = workflow_id(extra.get("extra_pnginfo"))
        if node and prompt_id not in begun and any(_is_of(sent, other, workflow, node) for other in prompt):
            return str(prompt_id)
    return ""


def _is_of(its_workflow: str, its_node: str, workflow: str, node: str) -> bool:
    same_workflow = its_workflow in (workflow, "") or not workflow
    return same_workflow and (its_node == node or not node or (node.startswith(":") and its_node.endswith(node)))


def workflow_id(extra_pnginfo: Any) -> str:
    """The id of the workflow that the page sent along; a prompt by the API may have none, or anything."""
    workflow = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, dict) else None
    return str(workflow.get("id", "")) if isinstance(workflow, dict) else ""
