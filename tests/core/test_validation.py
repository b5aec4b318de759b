"""Held-out pictures: which they are, when and with which noise they are seen, and what a run keeps of their loss."""

from __future__ import annotations

import csv

import pytest
import torch

from loha_core import LoHaError, load_adapter
from loha_core.training import state as checkpoint
from loha_core.training.attach import attached
from loha_core.training.config import TrainingConfig
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.data.validation import DRAWS, Validation, held_out
from loha_core.training.events import Validated
from loha_core.training.losses.slider import Concept, PromptSlider
from loha_core.training.objectives import Objective
from loha_core.training.optimizers import OptimizerConfig
from loha_core.training.state import LOSSES, STATE
from loha_core.training.trainer import Diverged

from .training_script import Task

pytestmark = pytest.mark.usefixtures("one_thread")


def items(count: int, **changes) -> list[Item]:
    sizes = ((4, 4), (4, 6))
    return [
        Item(torch.full((2, *sizes[i % 2]), float(i)), f"cat, {i}", torch.zeros(2, *sizes[i % 2]), **changes)
        for i in range(count)
    ]


def captions(dataset: Dataset) -> list[str]:
    return [item.caption for item in dataset.items]


# --- what is held out -----------------------------------------------------------------------------


SHARES = [(10, 0.2, 2), (10, 0.25, 3), (3, 0.5, 2), (2, 0.5, 1), (9, 0.1, 1)]


@pytest.mark.parametrize(("count", "share", "out"), SHARES)
def test_a_share_is_held_out_and_never_trained_on(count, share, out):
    regular = [Item(torch.zeros(2, 4, 4), f"class {i}", regularisation=True) for i in range(2)]
    dataset = Dataset(items(count) + regular)
    learned, held = held_out(dataset, share, 5)
    assert len(held) == out and len(learned) == count - out + 2
    assert sorted(captions(learned) + captions(held)) == sorted(captions(dataset))
    assert not any(item.regularisation for item in held.items)
    assert captions(held_out(dataset, share, 5)[1]) == captions(held)
    prints = {each.fingerprint() for each in (dataset, learned, held)}
    assert len(prints) == 3 and held_out(dataset, share, 5)[0].fingerprint() == learned.fingerprint()


def test_another_seed_holds_others_out():
    assert len({tuple(captions(held_out(Dataset(items(10)), 0.3, seed)[1])) for seed in range(8)}) > 4


@pytest.mark.parametrize(
    ("count", "share", "says"),
    [
        (1, 0.5, "0.5 of 1 pictures is 1, which leaves 0 to train on; expected at least one of each"),
        (3, 0.9, "is 3, which leaves 0"),
        (4, 0.1, "0.1 of 4 pictures is 0, which leaves 4"),
        (4, 0.0, "validation share is 0"),
        (4, 1.0, "validation share is 1"),
    ],
)
def test_shares_that_leave_nothing(count, share, says):
    with pytest.raises(LoHaError, match=says):
        held_out(Dataset(items(count)), share, 0)


def test_what_cannot_be_validated_with():
    slider = PromptSlider([Concept("old", "young")], items(4), str)
    for call in (lambda: held_out(slider, 0.5, 0), lambda: Validation(slider, Objective(), 1, 0)):
        with pytest.raises(LoHaError, match="a slider learns a direction"):
            call()
    with pytest.raises(LoHaError, match="all pictures are for regularisation"):
        Validation(Dataset(items(2, regularisation=True)), Objective(), 1, 0)


# --- what is seen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Objective(), Objective(timesteps="logit-normal", max_timestep=0.5)], ids=str)
def test_times_are_quantiles_and_all_is_the_same_each_time(objective):
    varying = Captions("sks", shuffle=True, caption_dropout=0.9, tag_dropout=0.9)
    validation = Validation(Dataset(items(5), varying), objective, 3, 7)
    torch.manual_seed(0)
    seen = list(validation.batches())
    again = list(validation.batches())
    for one, other in zip(seen, again, strict=True):
        assert torch.equal(one.noise, other.noise) and one.times == other.times
    found = sorted(time for batch in seen for time in batch.times)
    assert found == [objective.quantile((i + 0.5) / 20) for i in range(5 * DRAWS)]
    of_item: dict[str, list[float]] = {}
    for batch in seen:
        assert 1 <= len(batch.samples) <= 3
        for sample, time in zip(batch.samples, batch.times, strict=True):
            of_item.setdefault(sample.caption, []).append(time)
            assert sample.latent.any() or sample.caption == "sks, cat, 0"  # the mirrored one is of zeros
    assert sorted(of_item) == [f"sks, cat, {i}" for i in range(5)]
    quarters = [objective.quantile(i / DRAWS) for i in range(1, DRAWS)]
    for times in of_item.values():  # each picture has a time in each quarter
        assert [sum(time > quarter for quarter in quarters) for time in sorted(times)] == list(range(DRAWS))
    other = next(Validation(Dataset(items(5), varying), objective, 3, 8).batches())
    assert not torch.equal(other.noise, seen[0].noise)
    assert set(validation.prompts()) == set(of_item)


# --- in a run -------------------------------------------------------------------------------------


class Curve:
    """Losses on held-out data, as if a run overfitted: a function of the step alone."""

    def __init__(self, values):
        self.values, self.asked = values, []

    def run(self, folder, steps=8, each=1, **config):
        task, events = Task(), []
        config = TrainingConfig(steps=steps, validate_every=each, save_every=3, **config)

        def watch(event):
            events.append(event)
            if isinstance(event, Validated) and event.best:
                kept[event.step] = trainer.factors()

        kept: dict[int, dict] = {}

        def validate():
            assert not torch.is_grad_enabled() and not any(layer.training for layer in task.layers)
            torch.rand(3)
            return self.values[trainer.step]

        trainer = task.trainer(config, OptimizerConfig(lr=0.01), folder=folder, callbacks=[watch], validate=validate)
        trainer.resume()
        with attached(task.layers):
            trainer.run()
        return trainer, [e for e in events if isinstance(e, Validated)], kept


FALLS_AND_RISES = [0.0, 5.0, 4.0, 3.0, 2.5, 2.75, 2.5, 3.0, 4.0]


def test_only_a_lower_loss_is_the_best(tmp_path):
    trainer, events, kept = Curve(FALLS_AND_RISES).run(tmp_path)
    assert [(e.step, e.loss) for e in events] == trainer.validation == list(enumerate(FALLS_AND_RISES))[1:]
    assert [e.step for e in events if e.best] == [1, 2, 3, 4] == list(kept)
    with (tmp_path / LOSSES).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation"]) for row in rows] == FALLS_AND_RISES[1:]
    assert [float(row["loss"]) for row in rows] == trainer.losses


def test_with_a_table_of_some_steps(tmp_path):
    Curve(FALLS_AND_RISES).run(tmp_path, each=3)
    with (tmp_path / LOSSES).open() as file:
        assert [row["validation"] for row in csv.DictReader(file)] == ["", "", "3.0", "", "", "2.5", "", ""]


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_run_that_goes_on_remembers_the_best(tmp_path, cut):
    whole, _, _ = Curve(FALLS_AND_RISES).run(tmp_path / "whole")
    Curve(FALLS_AND_RISES).run(tmp_path / "cut", steps=cut)
    resumed, events, _ = Curve(FALLS_AND_RISES).run(tmp_path / "cut")
    assert [e.step for e in events if e.best] == [step for step in (1, 2, 3, 4) if step > cut]
    assert resumed.validation == whole.validation
    for name in (STATE, LOSSES):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_is_killed_right_after_its_best_goes_on_from_there(tmp_path):
    """The state is written with it, so that a later and worse one cannot take its place."""

    class Killed(BaseException):
        pass

    def killed(event):
        if event.step == 5:
            trainer._updating = True  # as a kill would: nothing more is written
            raise Killed

    task = Task()
    trainer = task.trainer(
        TrainingConfig(steps=8, validate_every=2, save_every=0), folder=tmp_path, callbacks=[killed],
        validate=lambda: FALLS_AND_RISES[trainer.step],
    )  # fmt: skip
    with pytest.raises(Killed), attached(task.layers):
        trainer.run()
    assert checkpoint.load(tmp_path / STATE)["validation"] == [(2, 4.0), (4, 2.5)]


def test_validation_leaves_no_trace_in_what_is_learned():
    config = TrainingConfig(steps=5, validate_every=2, ema_decay=0.9)
    runs = [Task().run(config), Task().run(config, validate=lambda: float(torch.rand(())))]
    for a, b in zip(runs[0].parameters, runs[1].parameters, strict=True):
        assert torch.equal(a, b)
    assert runs[0].losses == runs[1].losses and len(runs[1].validation) == 2


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(Diverged, match="step 2: the loss on held-out data is nan"):
        Curve([0.0, 1.0, float("nan")]).run(tmp_path)


# --- loha train -----------------------------------------------------------------------------------

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from loha_core.training.diffusers import run  # noqa: E402

from .test_training_run import models, same, write  # noqa: E402, F401

SPLIT = {"data": {"validation_share": 0.5}}


def table(path):
    with path.open() as file:
        return [(int(row["step"]), row.get("validation", "")) for row in csv.DictReader(file)]


def test_the_command_validates_and_keeps_the_best(write, tmp_path, capsys):  # noqa: F811
    training = {"steps": 4, "validate_every": 2}
    whole = run.train(write(**SPLIT, training=training))
    best, losses = (whole.parent / name for name in ("mine-best.safetensors", LOSSES))
    curve = {step: float(loss) for step, loss in table(losses) if loss}
    least = min(curve, key=curve.get)
    assert list(curve) == [2, 4] and load_adapter(best).metadata["ss_steps"] == str(least)
    said = capsys.readouterr().err
    assert "2 pictures and 2 to validate with" in said
    assert f"step 2/4  validation loss {curve[2]:.4f}, the lowest so far" in said
    kept = {path.name: path.read_bytes() for path in whole.parent.iterdir()}
    for path in whole.parent.iterdir():
        path.unlink()
    run.train(write(**SPLIT, training=training | {"steps": 3}))
    run.train(write(**SPLIT, training=training))
    for name in (STATE, LOSSES):
        assert (whole.parent / name).read_bytes() == kept[name]
    assert {path.name for path in whole.parent.iterdir()} == kept.keys()


def test_a_folder_to_validate_with(write, tmp_path):  # noqa: F811
    write()
    (tmp_path / "others").mkdir()
    for name in ("2.png", "2.txt"):
        (tmp_path / "pictures" / name).rename(tmp_path / "others" / name)
    plain = run.train(write(output={"name": "plain"}, training={"steps": 2}))
    text = run.train(
        write(
            data={"validation": "others"}, training={"steps": 2, "validate_every": 1},
            output={"folder": "again", "name": "validated"},
        )
    )  # fmt: skip
    assert same(plain, text) and [bool(loss) for _, loss in table(tmp_path / "again" / LOSSES)] == [True, True]


def test_text_encoders_that_are_trained_encode_for_validation(write, tmp_path):  # noqa: F811
    """Where nothing else learns, the loss on held-out pictures moves by what they learn."""
    rates = {"lr": 0.0, "lr_text": 0.05}
    run.train(write(**SPLIT, optimizer=rates, training={"text_encoders": True, "steps": 2, "validate_every": 1}))
    (_, first), (_, second) = table(tmp_path / "out" / LOSSES)
    assert first != second


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"validation": "others", "validation_share": 0.5}}, "two ways to hold pictures back; choose one"),
        ({"data": {"validation": "nowhere"}}, "nowhere: there is no such folder"),
        ({"data": {"validation_share": 0.1}}, r"\[data\]: a validation share of 0.1 of 4 pictures is 0"),
        ({"data": {"validation_share": 1.0}}, "validation_share is 1"),
        ({**SPLIT, "slider": {"positive": "old", "negative": "new"}}, "validation_share has no part in a slider"),
        ({**SPLIT, "training": {"validate_every": 0}}, "validate_every is 0"),
    ],
)
def test_mistakes(write, changes, says):  # noqa: F811
    with pytest.raises(LoHaError, match=says):
        run.train(write(**changes))


def test_a_run_goes_on_only_with_what_it_held_out(write):  # noqa: F811
    run.train(write(**SPLIT))
    run.train(write(**SPLIT, training={"validate_every": 7, "steps": 3}))
    with pytest.raises(LoHaError, match=r"other settings: data .*, validation \("):
        run.train(write())
