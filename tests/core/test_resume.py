"""Runs that are cut off: killed, cancelled, out of disk, diverged. What was kept is whole, and goes on bit for bit."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError
from loha_core.training import state as checkpoint
from loha_core.training.attach import attached
from loha_core.training.config import TrainingConfig
from loha_core.training.events import Saved, Stepped, Stopped
from loha_core.training.optimizers import SOURCES, OptimizerConfig
from loha_core.training.state import LOSSES, STATE
from loha_core.training.trainer import Diverged
from loha_core.tuner.config import LoHaConfig

from .test_formats import files_of_at_most
from .test_optimizers import installed
from .training_script import KILLED, Task, killed

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_were(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    command = [sys.executable, "-m", "tests.core.training_script", "kill", str(cut), "20"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    print(found.stdout)
    kills, amid = (int(n) for n in re.findall(r"(\d+) kills, (\d+)", found.stdout)[0])
    assert kills == 20 and amid >= 3
    losses = killed(whole).losses
    assert len(losses) == KILLED.steps
    for folder in cut.iterdir():
        # Nothing else is left lying there, such as files that were never finished.
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
    rows = (whole / LOSSES).read_text().splitlines()
    assert rows[0] == "step,loss" and rows[1:] == [f"{step},{loss!r}" for step, loss in enumerate(losses, 1)]


OPTIONS = {"adamw8bit": {"min_8bit_size": 16}}


@pytest.mark.parametrize("name", SOURCES)
def test_each_optimizer_goes_on_bit_for_bit(name, tmp_path):
    if not installed(name):
        pytest.skip(f"needs the extra {SOURCES[name].extra}")
    rate = 1.0 if name == "prodigy" else 0.01
    optimizer = OptimizerConfig(name, lr=rate, weight_decay=0.01, warmup_steps=2, options=OPTIONS.get(name, {}))
    config = TrainingConfig(steps=9, save_every=0, ema_decay=0.9 if name == "adamw" else 0)
    whole = Task().run(config, optimizer, folder=tmp_path / "whole")
    begun = Task().run(replace(config, steps=5), optimizer, folder=tmp_path / "cut")
    assert any(not torch.equal(a, b) for a, b in zip(begun.parameters, whole.parameters, strict=True))
    resumed = Task().run(config, optimizer, folder=tmp_path / "cut")
    for found, expected in zip(resumed.factors()["model"].values(), whole.factors()["model"].values(), strict=True):
        assert all(map(torch.equal, found.tensors().values(), expected.tensors().values()))
    for file in (STATE, LOSSES):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    if name == "adamw8bit":  # it did keep its state in 8 bits
        kept = checkpoint.load(tmp_path / "whole" / STATE)["optimizer"]["state"].values()
        assert any(state["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for state in kept)


def test_fp16_goes_on_with_its_scale(tmp_path):
    def task() -> Task:
        made = Task()
        own = made.loss
        made.loss = lambda batch: own(batch) * 10  # overflows at first
        return made

    config = TrainingConfig(steps=6, mixed_precision="fp16", save_every=2)
    task().run(config, folder=tmp_path / "whole")
    task().run(replace(config, steps=3), folder=tmp_path / "cut")
    resumed = task().run(config, folder=tmp_path / "cut")
    assert resumed.step == 6
    for file in (STATE, LOSSES):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# --- what a state can hold ------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8]
DTYPES += [torch.uint8, torch.bool]
tensors = st.builds(
    lambda dtype, shape, values: torch.tensor(values[: math.prod(shape)]).reshape(shape).to(dtype),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (3,), (2, 2), (1, 2, 3)]),
    st.lists(st.integers(0, 100), min_size=6, max_size=6),
)
leaves = tensors | st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.integers() | st.text() | st.sampled_from(["$tensor", "$tuple", "$items"])
states = st.dictionaries(
    keys,
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


def same(a, b) -> bool:
    """Equal in type and value throughout, tensors in dtype, too; NaN is NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path):
    """Its length, which comes first in the file, begins as a pickle does."""
    path, length = tmp_path / "state.safetensors", 0
    while not path.exists() or path.read_bytes()[:2] != b"\x80\x02":
        length += 1
        checkpoint.save(path, {"text": "x" * length})
    assert checkpoint.load(path) == {"text": "x" * length}


@given(states)
def test_a_state_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "state.safetensors"
    checkpoint.save(path, state)
    assert same(checkpoint.load(path), state)


def test_what_a_killed_save_left_behind_goes(tmp_path):
    for name in (f".{STATE}.a1b2.tmp", f".{LOSSES}.a1b2.tmp", ".tmpHFaoQh", "mine.tmp", ".tmp", "a.safetensors"):
        (tmp_path / name).touch()
    assert not Task().trainer(TrainingConfig(), folder=tmp_path).resume()
    assert sorted(os.listdir(tmp_path)) == [".tmp", "a.safetensors", "mine.tmp"]


def test_what_is_no_state(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / STATE
    trainer = Task().trainer(TrainingConfig(), folder=tmp_path)
    assert not trainer.resume()
    for metadata in ({}, {"loha_run": "[]"}, {"loha_run": "{"}, {"loha_run": '{"$items": [["a", {"$tensor": "1"}]]}'}):
        save_file({"a": torch.zeros(1)}, path, metadata)
        with pytest.raises(LoHaError, match=r"state\.safetensors: not the state of a training run.*without resume"):
            trainer.resume()


# --- other runs -----------------------------------------------------------------------------------

CONFIG = TrainingConfig(steps=4, save_every=2)
ADAMW = OptimizerConfig(lr=0.01)


@pytest.mark.parametrize(
    ("config", "optimizer", "task", "identity", "says"),
    [
        (replace(CONFIG, seed=1), ADAMW, {}, "a", r"seed \(0 then, 1 now\)"),
        (replace(CONFIG, gradient_accumulation_steps=2), ADAMW, {}, "a", "gradient_accumulation_steps"),
        (replace(CONFIG, mixed_precision="bf16"), ADAMW, {}, "a", "mixed_precision"),
        (replace(CONFIG, ema_decay=0.9), ADAMW, {}, "a", "ema_decay"),
        (CONFIG, replace(ADAMW, lr=0.02), {}, "a", r"lr \(0.01 then, 0.02 now\)"),
        (CONFIG, OptimizerConfig("adafactor", lr=0.01), {}, "a", r"name \(adamw then, adafactor now\)"),
        (CONFIG, replace(ADAMW, schedule="cosine"), {}, "a", r"schedule \(.*, steps \(not set then, 4 now\)"),
        (CONFIG, replace(ADAMW, options={"eps": 1e-6}), {}, "a", "options"),
        (CONFIG, ADAMW, {"r": 3, "alpha": 2}, "a", "network"),
        (CONFIG, ADAMW, {"r": 2, "alpha": 1}, "a", "network"),
        (CONFIG, ADAMW, {"r": 2, "alpha": 2, "rank_dropout": 0.5}, "a", "network"),
        (CONFIG, ADAMW, {}, "b", r"data \(a then, b now\)"),
    ],
)
def test_another_run_is_refused_and_the_difference_named(tmp_path, config, optimizer, task, identity, says):
    Task().run(CONFIG, ADAMW, folder=tmp_path, identity={"data": "a"})
    other = Task(config=LoHaConfig(init_weights="lycoris", **task) if task else Task().config)
    trainer = other.trainer(config, optimizer, folder=tmp_path, identity={"data": identity})
    before = [p.clone() for p in trainer.parameters]
    with pytest.raises(LoHaError, match=rf"{STATE}: a run with other settings: .*{says}.*without resume"):
        trainer.resume()
    assert trainer.step == 0 and all(map(torch.equal, before, trainer.parameters))


def test_more_steps_are_the_same_run_where_the_rate_does_not_look_ahead(tmp_path):
    for steps, save_every, preview_every in ((3, 1, 2), (7, 2, 0), (9, 0, 1)):
        config = TrainingConfig(steps=steps, save_every=save_every, preview_every=preview_every)
        Task().run(config, folder=tmp_path / "parts")
    Task().run(TrainingConfig(steps=9), folder=tmp_path / "whole")
    assert (tmp_path / "parts" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()
    cosine = OptimizerConfig(lr=0.01, schedule="cosine")
    Task().run(TrainingConfig(steps=3), cosine, folder=tmp_path / "cosine")
    with pytest.raises(LoHaError, match=r"steps \(3 then, 5 now\)"):
        Task().trainer(TrainingConfig(steps=5), cosine, folder=tmp_path / "cosine").resume()


# --- cancelled ------------------------------------------------------------------------------------


class Cancelled(Exception):
    pass


@pytest.mark.parametrize("once", [True, False])
def test_cancel_keeps_the_state_and_can_go_on(tmp_path, once):
    events = []

    def cancel(event):
        if (isinstance(event, Stepped) and event.step == 3) or (not once and isinstance(event, Saved)):
            raise Cancelled(f"at {event.step}")

    config = TrainingConfig(steps=6, save_every=0, ema_decay=0.5)
    task = Task()
    trainer = task.trainer(config, folder=tmp_path / "cut", callbacks=[events.append, cancel])
    with attached(task.layers), pytest.raises(Cancelled, match="at 3") as caught:
        if once:
            trainer.run()
        else:
            with pytest.warns(match="since the state was saved last is lost: at 3"):
                trainer.run()
    assert events[-1] == Stopped(3, caught.value)
    assert events[-2] == Saved(3, tmp_path / "cut" / STATE)
    Task().run(config, folder=tmp_path / "cut")
    Task().run(config, folder=tmp_path / "whole")
    assert (tmp_path / "cut" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_nothing_is_saved_amid_an_optimizer_step(tmp_path):
    task = Task()
    trainer = task.trainer(TrainingConfig(steps=6, save_every=2), folder=tmp_path)
    real, calls = trainer.optimizer.step, 0

    def step():
        nonlocal calls
        calls += 1
        if calls == 4:
            trainer.parameters[0].data.add_(1)
            raise MemoryError("amid")
        real()

    trainer.optimizer.step = step
    with attached(task.layers), pytest.raises(MemoryError, match="amid"):
        trainer.run()
    assert checkpoint.load(tmp_path / STATE)["step"] == 2


# --- out of disk ----------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_state_and_the_run_goes_on_later(tmp_path):
    config = TrainingConfig(steps=8, save_every=2)
    Task().run(replace(config, steps=3), folder=tmp_path / "cut")
    before = {file: file.read_bytes() for file in (tmp_path / "cut").iterdir()}
    task = Task()
    trainer = task.trainer(config, folder=tmp_path / "cut")
    with attached(task.layers):
        trainer.resume()
        with (
            files_of_at_most(2000),
            pytest.raises(LoHaError, match=rf"{STATE}: cannot be written.*nothing was changed"),
        ):
            with pytest.warns(match="since the state was saved last is lost"):
                trainer.run()
        assert before == {file: file.read_bytes() for file in (tmp_path / "cut").iterdir()}
        assert checkpoint.load(tmp_path / "cut" / STATE)["step"] == 3 and trainer.step == 4
        trainer.run()  # there is room again
    Task().run(config, folder=tmp_path / "whole")
    assert (tmp_path / "cut" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here already")
    with pytest.warns(match="is lost"), pytest.raises(LoHaError, match="cannot be written"):
        Task().run(TrainingConfig(steps=2, save_every=1), folder=tmp_path / "file")


# --- diverged -------------------------------------------------------------------------------------

ADVICE = r"Lower the learning rate \(.* now\), add warm-up steps, or train without mixed precision \(no now\)"


def test_nan_in_a_loss_stops_and_keeps_the_last_good_state(tmp_path):
    config, task = TrainingConfig(steps=8, save_every=2), Task()

    def broken(number: int):
        batch = task.batch(number)
        return (batch[0] * (math.nan if number == 5 else 1), *batch[1:])

    with pytest.raises(Diverged, match=f"step 6: the loss is nan.*{ADVICE}"):
        task.run(config, batches=broken, folder=tmp_path / "cut")
    assert checkpoint.load(tmp_path / "cut" / STATE)["step"] == 4
    Task().run(config, folder=tmp_path / "cut")  # the picture was mended
    Task().run(config, folder=tmp_path / "whole")
    assert (tmp_path / "cut" / STATE).read_bytes() == (tmp_path / "whole" / STATE).read_bytes()


def test_a_rate_that_explodes_at_once(tmp_path):
    with pytest.raises(Diverged, match=ADVICE):
        Task().run(TrainingConfig(steps=8, save_every=1), OptimizerConfig(lr=1e30), folder=tmp_path)
    assert not (tmp_path / STATE).exists()  # no state was good but the first


# Adafactor limits its rate itself; with a bound on the norm, Prodigy's own numbers overflow before the loss does.
@pytest.mark.parametrize(
    ("name", "max_norm"),
    [
        (name, max_norm)
        for name in SOURCES
        for max_norm in (0, 1.0)
        if name != "adafactor" and (name, max_norm) != ("prodigy", 1.0) and installed(name)
    ],
)
def test_a_rate_that_explodes_leaves_a_state_whose_loss_is_a_number(tmp_path, name, max_norm):
    config = TrainingConfig(steps=6, save_every=1, max_norm=max_norm)
    rate = 1.0 if name == "prodigy" else 0.01
    rising = OptimizerConfig(name, lr=rate, schedule="linear", lr_end=1e20)  # this first, then far too much
    with pytest.raises(Diverged, match=ADVICE):
        Task().run(config, rising, folder=tmp_path)
    task = Task()
    trainer = task.trainer(config, rising, folder=tmp_path)
    assert trainer.resume() and trainer.step >= 1
    with attached(task.layers):
        assert math.isfinite(float(task.loss(task.batch(trainer.step)).detach()))
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
