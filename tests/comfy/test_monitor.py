"""What the server keeps of a run for the page that comes later."""

from __future__ import annotations

import pytest
from comfy_execution.utils import CurrentNodeContext

from . import training as t
from .training import page  # noqa: F401


@pytest.fixture(scope="module")
def flux():
    return t.models("flux")


@pytest.fixture
def monitor(monkeypatch):
    module = t.node("page.monitor")
    monkeypatch.setattr(module, "runs", {})
    return module


def run(flux, node, workflow="w", **values):
    with CurrentNodeContext("prompt", node):
        job = t.job(flux, workflow=workflow, **values)
        job.run()
    return job


def test_a_run_belongs_to_a_node_of_a_workflow(page, flux, monitor):  # noqa: F811
    for workflow, node in (("w", "5"), ("w", "9:5"), ("other", "5"), ("", "7")):
        run(flux, node, workflow, name=f"{workflow}{node.replace(':', '')}", steps=1)
    names = {
        ("w", "5"): ["w5"],
        ("w", ":5"): ["w95"],  # in whichever of a subgraph's places
        ("w", "9:5"): ["w95"],
        ("other", "5"): ["other5"],
        ("w", "7"): ["7"],  # came by the API, without a workflow
        ("w", "6"): [],
        ("third", "5"): [],
        ("", ""): ["w5", "w95", "other5", "7"],
    }
    for asked, expected in names.items():
        assert [run.name for run in monitor.runs_of(*asked)] == expected, asked


def test_the_run_before_and_a_run_that_goes_on(page, flux, monitor):  # noqa: F811
    first = run(flux, "5", name="first", steps=2)
    again = run(flux, "5", name="again", steps=3, training_seed=1)
    [second] = monitor.runs_of("w", "5")
    assert (second.losses, second.previous) == (again.losses, first.losses)
    longer = run(flux, "5", name="again", steps=5, training_seed=1, resume=True)
    [resumed] = monitor.runs_of("w", "5")
    assert resumed.id != second.id and resumed.previous == first.losses
    assert resumed.losses == longer.losses and resumed.losses[:3] == again.losses and len(resumed.losses) == 5
    assert resumed.summary()["step"] == 5 and resumed.since(3)["losses"] == longer.losses[3:]
    assert "previous" not in resumed.since(3) and resumed.full()["previous"] == first.losses


def test_few_runs_are_kept(page, flux, monitor):  # noqa: F811
    for node in range(monitor.MAX_RUNS + 2):
        run(flux, str(node), steps=1)
    assert [run.node for run in monitor.runs_of("w", "")] == [str(node) for node in range(2, monitor.MAX_RUNS + 2)]
