"""Validation in Train LoHa (LoHaTrainer): on the demo's base a run that is made to overfit, its best LoHa kept."""

from __future__ import annotations

import comfy.sd
import pytest
import torch

from loha_core import LoHaError, load_adapter
from loha_core.training.attach import attached
from loha_core.training.data.batches import BatchSampler
from loha_core.training.data.dataset import Item
from loha_core.training.data.validation import Validation, held_out
from loha_core.training.losses.strength import Strength
from loha_core.training.objectives import Objective

from . import reduced
from . import training as t
from .training import page  # noqa: F401

pytestmark = pytest.mark.usefixtures("page")
SEVENS, SHARE, SEED = 12, 1 / 3, 3
RUN = {
    "steps": 80, "batch_size": 8, "validation_share": SHARE, "validate_every": 8, "training_seed": SEED,
    "optimizer": {"learning_rate": 0.001, "schedule": "constant"},
    "network": {"rank": 8, "conv_rank": 8, "init": "lycoris"},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The demo's base, which has never seen a seven."""
    from demo import model, prepare

    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    model.save_checkpoint(model.load_int8(prepare.BASE), path, {})
    loaded = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)
    return reduced.Models("sd15", loaded[0], None)


@pytest.fixture(scope="module")
def sevens(base):
    from demo import digits, model

    pictures = torch.from_numpy(digits.load()[0].only((7,)).pictures[:SEVENS])
    prompt = [[model.encode_prompts([digits.prompt(7)]), {}]]
    latents = model.to_latents(pictures) / model.SD15_FACTOR
    return t.dataset(base, [Item(latent, conditioning=prompt, name=f"seven {i}") for i, latent in enumerate(latents)])


def loss_of(base, adapter, dataset):
    """The loss of a file on what a run holds back, taken apart from any run."""
    held = held_out(dataset, SHARE, SEED)[1]
    job = t.job(base, dataset, network=RUN["network"])
    layers = t.node("host.layers").build(base.model, "MODEL", job.values["network"], adapter)
    for layer in layers.values():
        layer.training = False
    diffusion = t.node("host.diffusion").Diffusion(
        base.model, BatchSampler(held, Objective(), 1, SEED), None, Strength(layers.values())
    )
    with attached(layers.values()):
        return Validation(held, Objective(), RUN["batch_size"], SEED).loss(diffusion)


def test_the_best_of_a_run_that_overfits_is_kept(base, sevens, tmp_path):
    t.job(base, sevens, name="overfit", save_every=8, **RUN).run()
    folder = tmp_path / "loha" / "overfit"
    rows = [line.split(",") for line in (folder / "loss.csv").read_text().splitlines()]
    assert rows[0] == ["step", "loss", "validation"] and len(rows) == RUN["steps"] + 1
    curve = {int(step): float(loss) for step, _, loss in rows[1:] if loss}
    print(", ".join(f"{step}: {loss:.4f}" for step, loss in curve.items()))
    assert list(curve) == list(range(8, 81, 8))
    best = min(curve, key=curve.get)
    trained = [float(row[1]) for row in rows[1:]]
    assert 8 < best < 64 and curve[80] > 1.03 * curve[best] and sum(trained[-16:]) < sum(trained[:16])
    # What is in the files, taken again.
    kept = load_adapter(folder / "best.safetensors")
    assert (kept.metadata["ss_steps"], kept.metadata["loha_validation_loss"]) == (str(best), f"{curve[best]:.6g}")
    assert loss_of(base, kept, sevens) == pytest.approx(curve[best], rel=1e-5)
    last = load_adapter(folder / "overfit.safetensors")
    assert loss_of(base, last, sevens) == pytest.approx(curve[80], rel=1e-5)


@pytest.fixture(scope="module")
def flux():
    return t.models("flux")


SHORT = {
    "steps": 8, "validation_share": 0.5, "validate_every": 2, "save_every": 3, "resume": True,
    "optimizer": {"learning_rate": 0.05},
}  # fmt: skip


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("cut", [3, 4, 6])
def test_a_run_that_was_cut_off_keeps_the_best(page, flux, tmp_path, monkeypatch, cut):  # noqa: F811
    """It ends with the same curve and the same files; also if it was cut off amid a validation's own events."""
    data = t.data(flux, 4)
    t.job(flux, data, name="whole", **SHORT).run()
    watcher = t.node("graph.trainer").Watcher
    call = watcher.__call__

    def cut_off(self, event):
        call(self, event)
        if event.step == cut and type(event).__name__ == ("Validated" if cut == 4 else "Stepped"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(watcher, "__call__", cut_off)
        t.job(flux, data, name="cut", **SHORT).run()
    t.job(flux, data, name="cut", **SHORT).run()
    whole, found = (files(tmp_path / "loha" / name) for name in ("whole", "cut"))
    for name in ("state.safetensors", "loss.csv"):
        assert found[name] == whole[name]
    one, other = (load_adapter(tmp_path / "loha" / name / "best.safetensors") for name in ("whole", "cut"))
    assert t.same(one, other) and one.metadata["ss_steps"] == other.metadata["ss_steps"]
    rows = [line.split(",") for line in whole["loss.csv"].decode().splitlines()[1:]]
    assert page[-1][1]["validation"] == [(int(step), float(loss)) for step, _, loss in rows if loss]


def test_validation_changes_nothing_that_is_learned(page, flux):  # noqa: F811
    """The same pictures without validation, and with another frequency, give the same LoHa."""
    data = t.data(flux, 4)
    with_it = t.train(flux, data, name="with", **SHORT)
    assert t.same(with_it, t.train(flux, data, name="often", **SHORT | {"validate_every": 1}))
    learned = held_out(data, 0.5, 0)[0]
    assert t.same(with_it, t.train(flux, learned, name="without", **SHORT | {"validation_share": 0.0}))


def test_text_encoders_that_are_trained_encode_for_validation(page):  # noqa: F811
    """Where nothing else learns, the loss on held-out pictures moves by what they learn."""
    sd15 = t.models("sd15")
    rates = {"learning_rate": 0.0, "text_learning_rate": 0.05}
    t.train(sd15, t.data(sd15, 4), text=True, name="text", **SHORT | {"steps": 4, "optimizer": rates})
    (_, first), (_, second) = page[-1][1]["validation"]
    assert first != second


@pytest.mark.parametrize(
    ("count", "share", "says"),
    [(1, 0.5, "0.5 of 1 pictures is 1, which leaves 0 to train on"), (4, 0.1, "0.1 of 4 pictures is 0"),
     (2, 0.9, "leaves 0 to train on")],
)  # fmt: skip
def test_shares_that_leave_nothing(page, flux, count, share, says):  # noqa: F811
    with pytest.raises(LoHaError, match=says):
        t.train(flux, t.data(flux, count), name="few", validation_share=share)


def test_a_run_of_the_name_of_its_own_files(page, flux):  # noqa: F811
    for name in ("best", "state"):
        with pytest.raises(LoHaError, match="a file of its own"):
            t.job(flux, name=name)


def test_what_masks_leave_out_is_kept_as_the_base_makes_it(page, flux):  # noqa: F811
    """The same run with and without: outside of the mask, the output is nearer to the base's."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    data = t.data(flux, 2, mask=mask)
    moved = {}
    for weight in (0.0, 3.0):
        run = {"steps": 30, "optimizer": {"learning_rate": 0.02}, "objective": {"masked_preservation": weight}}
        run["network"] = {"init": "lycoris"}  # which moves inside far enough in so few steps at this weight
        adapter = t.train(flux, data, name=f"kept {weight:g}", **run)
        job = t.job(flux, data)
        layers = t.node("host.layers").build(flux.model, "MODEL", job.values["network"], adapter).values()
        d = t.node("host.diffusion").Diffusion(
            flux.model, BatchSampler(data, Objective(), 2, 1), None, Strength(layers)
        )  # fmt: skip
        with torch.no_grad(), attached(layers):
            batch = d.batch(0)
            change = (d.prediction(batch) - d.base_prediction(batch)).square()
        moved[weight] = [float(part.mean()) for part in (change[..., :4], change[..., 4:])]
    (inside, outside), (inside_kept, outside_kept) = moved[0.0], moved[3.0]
    assert outside_kept < 0.5 * outside and inside_kept > 0.3 * inside
