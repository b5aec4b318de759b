"""Output preservation, and the base's own prediction that it stands on: the frozen model to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from loha_core import LoHaError
from loha_core.training.data.batches import prompts
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset
from loha_core.training.diffusers import run
from loha_core.training.diffusers.pipeline import Diffusion
from loha_core.training.losses.preservation import Preservation
from loha_core.training.objectives import Objective
from loha_core.training.randomness import generator

from . import asking, pipelines
from .test_slider import models, tensors, write  # noqa: F401

# ruff: noqa: F811
pytestmark = pytest.mark.usefixtures("one_thread")


def data(d: Diffusion, family: str = "sd15", trigger: str = "sks", **options: Any) -> Dataset:
    return Dataset(asking.items(family), Captions(trigger, **options), d.encode)


def kept(weight: float = 1.0) -> Objective:
    return Objective(preservation=Preservation("sks", ("dog",), weight))


# --- the base's prediction ----------------------------------------------------------------------


@pytest.mark.parametrize("family", pipelines.FAMILIES)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_base_says_what_it_says_without_layers(family, text, dtype):
    """Bit for bit, while dropouts are on, text encoders are trained, and in mixed precision."""
    d = asking.diffusion(family, text=text, module_dropout=0.5, rank_dropout=0.5)
    feed = asking.feed(d, data(d, family), kept())
    batch, prompts = feed.batch(0), ["a dog", "a red dog"]
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        found = feed.base_prediction(batch, prompts)
    assert torch.equal(torch.get_rng_state(), state) and not found.requires_grad

    base = Diffusion(pipelines.build(family), asking.CPU)
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        wanted = base.output(batch.noisy, batch.timesteps, [base.encode(prompt) for prompt in prompts])
        assert torch.equal(found, wanted)
        for layer in d.strength.layers:
            layer.training = False
        assert not torch.allclose(feed.prediction(batch, prompts), wanted, rtol=0.01)


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_loss_and_gradients_are_those_of_the_equation(family):
    """Against float64 autograd; only the pass with the layers is differentiated."""
    d = asking.diffusion(family)
    feed = asking.feed(d, data(d, family), kept(weight=0.7))
    batch = feed.batch(4)
    loss = feed.loss(batch)
    loss.backward()
    exact = asking.Exactly(family, d)

    def output(prompts: list[str], strength: float) -> torch.Tensor:
        return exact.output(batch.noisy, batch.timesteps, prompts, strength)

    captions = [sample.caption for sample in batch.samples]
    classes = [caption.replace("sks", "dog") for caption in captions]
    assert batch.class_prompts == classes and all(c.startswith("dog, a cat, number") for c in classes)
    learnt = (output(captions, 1) - batch.target.double()).square().mean()
    preserved = (output(classes, 1) - output(classes, 0).detach()).square().mean()
    wanted = learnt + 0.7 * preserved
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    asking.close([p.grad for p in asking.trained(d)], exact.gradients(wanted), 1e-3)


def test_it_counts_nothing_where_nothing_has_been_learnt():
    d = asking.diffusion("sd15")
    for layer in d.strength.layers:
        layer.hada_w2_b["default"].data.zero_()
    losses = []
    for objective in (Objective(), kept()):
        feed = asking.feed(d, data(d), objective)
        losses.append(float(feed.loss(feed.batch(0)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_mask_weight_and_objective_hold_for_it_too():
    d = asking.diffusion("sd15")
    feed = asking.feed(d, data(d), replace(kept(), loss_type="l1", min_snr_gamma=5.0))
    batch = feed.batch(0)
    blind = replace(batch, sample_weight=torch.zeros(2))
    assert float(feed.loss(batch).detach()) > 0 == float(feed.loss(blind).detach())


# --- prompts ------------------------------------------------------------------------------------


def test_the_class_takes_the_triggers_place():
    p, rng = Preservation(" sks dog ", "dog"), torch.Generator()
    state = rng.get_state()
    assert p.class_prompt("a photo of sks dog, on grass", rng) == "a photo of dog, on grass"
    assert p.class_prompt("sks dogs", rng) == "dog" and p.class_prompt("", rng) == "dog"
    assert torch.equal(rng.get_state(), state)
    several = Preservation("x.y", ["cat", r"a\1b"])
    drawn = {several.class_prompt("an x.y, big", generator("class", i)) for i in range(20)}
    assert drawn == {"an cat, big", r"an a\1b, big"} == set(several.class_prompts(["an x.y, big"]))
    assert several.class_prompt("an xzy", generator("class", 0)) in ("cat", r"a\1b")


def test_batches_without_it_stay_what_they_were():
    d = asking.diffusion("sd15")
    plain, preserved = (asking.feed(d, data(d), objective).batch(3) for objective in (Objective(), kept()))
    assert torch.equal(plain.noisy, preserved.noisy) and plain.class_prompts is None
    assert prompts(data(d), kept())[-2:] == ["dog, a cat, number 0", "dog, a cat, number 1"]


# --- runs ---------------------------------------------------------------------------------------

PICTURES: dict[str, Any] = {"data": {"folder": "high", "trigger": "sks", "resolution": 32, "step": 4}, "slider": None}


def test_a_run_with_it_goes_on_bit_for_bit_and_is_another_run(write):
    preservation = {"trigger": "sks", "classes": ["dog", "cat"]}
    made = {
        (name, steps): tensors(
            run.train(write(**PICTURES, preservation=table, training={"steps": steps}, output={"folder": name}))
        )
        for name, table, steps in (
            ("whole", preservation, 4),
            ("parts", preservation, 2),
            ("parts", preservation, 4),
            ("without", None, 4),
        )
    }
    whole, parts, without = made["whole", 4], made["parts", 4], made["without", 4]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], without[name]) for name in whole)
    with pytest.raises(LoHaError, match="objective"):
        run.train(write(**PICTURES, training={"steps": 5}, output={"folder": "parts"}))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "trigger is empty"),
        ({"trigger": "sks"}, "class is empty"),
        ({"trigger": "sks", "classes": ["dog", ""]}, "class is empty"),
        ({"trigger": "sks", "classes": "sks"}, "both 'sks'"),
        ({"trigger": 3, "classes": "dog"}, "trigger is 3"),
        ({"trigger": "sks", "classes": [1]}, r"classes is \[1\]"),
        ({"trigger": "sks", "classes": "dog", "weight": 0.0}, "weight is 0"),
        ({"trigger": "zzz", "classes": "dog"}, "no caption has the trigger word 'zzz'.*'sks'"),
        ({"trigger": "sks", "class": "dog"}, "did you mean classes"),
    ],
)
def test_nonsense_is_refused_by_name(write, table, words):
    with pytest.raises(LoHaError, match=words):
        run.train(write(**PICTURES, preservation=table))


def test_a_conditioning_has_no_words_to_replace():
    d = asking.diffusion("sd15")
    items = [replace(item, conditioning=d.encode("x"), name="one.png") for item in asking.items("sd15")]
    with pytest.raises(LoHaError, match=r"needs captions, and one\.png has a conditioning"):
        asking.feed(d, Dataset(items), kept())


def test_preservation_is_no_key_of_training(write):
    with pytest.raises(LoHaError, match="unknown key 'preservation'"):
        run.train(write(**PICTURES, training={"preservation": "sks"}))
