"""Sliders and output preservation inside ComfyUI: the base's own prediction, the nodes, and runs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException

from loha_core import LoHaError
from loha_core.training.attach import attached
from loha_core.training.data.batches import BatchSampler
from loha_core.training.losses.slider import SLIDERS, PromptSlider
from loha_core.training.losses.strength import Strength
from loha_core.training.objectives import Objective

from . import training as t
from .training import page  # noqa: F401

pytestmark = pytest.mark.usefixtures("page")
WITH_TEXT = ("sd15", "sd2v", "sd3")
AGE = {"positive": "an old man", "negative": "a young man", "target": "a man"}


@pytest.fixture(scope="module", params=WITH_TEXT)
def family(request):
    return t.models(request.param)


@pytest.fixture(scope="module")
def sd15():
    return t.models("sd15")


def slider(m, size=8, **inputs):
    latent = {"samples": torch.zeros(1, m.model.model.latent_format.latent_channels, size, size)}
    inputs = {"clip": m.clip, "latent": latent, "denoising_steps": 2, **AGE, **inputs}
    return t.node("graph.slider").LoHaSlider.execute(**inputs).args[0]


def preserved(trigger="house", classes="boat", weight=1.0, **more):
    return (
        t.node("graph.preservation")
        .LoHaPreservation.execute(trigger_word=trigger, class_word=classes, weight=weight, **more)
        .args[0]
    )


def acting(m, text=False, patcher=None, **network):
    """Layers on a model that do something, attached; and a Diffusion that knows them."""
    stack = ExitStack()
    config = t.job(m, network=network).values["network"]
    patcher = patcher or m.model
    build = t.node("host.layers").build
    comfy.model_management.load_models_gpu([patcher, *([m.clip.patcher] if text else [])])
    layers = [*build(patcher, "MODEL", config).values()]
    layers += build(m.clip.patcher, "CLIP", config).values() if text else []
    torch.manual_seed(0)
    for layer in layers:
        layer.training = True
        for p in layer.parameters_of("default"):
            p.data.normal_(0, 0.3)
    stack.enter_context(attached(layers))
    sampler = BatchSampler(t.data(m), Objective(), 2, 0)
    return stack, t.node("host.diffusion").Diffusion(patcher, sampler, m.clip if text else None, Strength(layers))


# --- the base's prediction ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("text", [False, True])
def test_the_base_says_what_it_says_without_layers(family, text, dtype):
    """Bit for bit, while dropouts are on, text encoders are trained, and in mixed precision."""
    prompts, plain = ["a boat", "two red boats"], t.diffusion(family)
    batch = plain.batch(0)
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        if text:
            plain.clip = family.clip
        wanted, own = plain.prediction(batch, prompts), plain.prediction(batch)
        stack, d = acting(family, text, module_dropout=0.3, rank_dropout=0.3)
        with stack:
            state = torch.get_rng_state()
            assert torch.equal(d.base_prediction(batch, prompts), wanted)
            assert torch.equal(d.base_prediction(batch), own)
            assert torch.equal(torch.get_rng_state(), state)
            for layer in d.strength.layers:
                layer.training = False
            assert not torch.allclose(d.prediction(batch, prompts), wanted, rtol=0.01)


@pytest.mark.parametrize("mode", ["merge", "live"])
def test_the_base_is_the_model_with_the_loha_that_it_carries(sd15, mode):
    first = t.train(sd15, steps=4, name="first")
    model = t.node("host.modes").apply(sd15.model, None, first, 1.0, 1.0, mode=mode)[0]
    with torch.no_grad():
        without = t.diffusion(sd15)
        batch = without.batch(0)
        bare = without.prediction(batch)
        wanted = t.diffusion(sd15, patcher=model).prediction(batch)
        stack, d = acting(sd15, patcher=model)
        with stack:
            found = d.base_prediction(batch)
    comfy.model_management.unload_all_models()
    sd15.model.detach()
    assert torch.equal(found, wanted) and not torch.equal(wanted, bare)


def test_the_base_of_a_run_that_goes_on_is_without_what_is_trained(sd15):
    """An adapter to go on from is trained: preserving its output would forbid to change it."""
    first = t.train(sd15, steps=4, name="first")
    seen, diffusion = [], t.node("host.diffusion").Diffusion

    class Watched(diffusion):
        def loss(self, batch):
            seen.append((batch, self.base_prediction(batch)))
            return super().loss(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t.node("host.training"), "Diffusion", Watched)
        t.train(sd15, loha=first, steps=1, name="on")
    with torch.no_grad():
        assert torch.equal(seen[0][1], t.diffusion(sd15).prediction(seen[0][0]))


# --- runs ---------------------------------------------------------------------------------------


def test_both_strengths_get_nearer_to_the_ends(sd15):
    """On noise that training has not seen, by the LoHa as it is applied to the model."""
    data = slider(sd15, guidance=100.0, dataset=t.data(sd15))  # prompts make little difference to a random model
    with t.untouched(sd15):
        adapter = t.train(sd15, data, steps=20, optimizer={"learning_rate": 0.005})
    with torch.no_grad():
        plain = t.diffusion(sd15, data)
        batch = plain.batch(900)
        target, positive, negative = (
            plain.prediction(batch, [AGE[name]] * 2) for name in ("target", "positive", "negative")
        )
        for strength in (1.0, -1.0):
            patcher = t.node("host.modes").apply(sd15.model, None, adapter, strength, 1.0, mode="live")[0]
            found = t.diffusion(sd15, patcher=patcher).prediction(batch, [AGE["target"]] * 2)
            way = strength * 100 * (positive - negative)
            assert (found - target - way).norm() < 0.97 * way.norm()
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("kind", ["prompts", "pictures", "pairs", "preservation"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_cancel_keeps_the_state_and_resuming_ends_as_if_nothing_had_been(sd15, kind, again):
    of, settings = t.data(sd15), {"gradient_checkpointing": again}
    if kind == "prompts":
        of = slider(sd15)
    if kind == "pictures":
        of = slider(sd15, dataset=of)
    if kind == "pairs":
        low = t.dataset(sd15, [replace(item, latent=-item.latent) for item in of.items])
        of = t.node("graph.slider").LoHaPictureSlider.execute(high=of, low=low).args[0]
    if kind == "preservation":
        settings["objective"] = None
    assert isinstance(of, SLIDERS) == (kind != "preservation")

    def job(**more):
        made = t.job(sd15, of, steps=4, **{k: v for k, v in settings.items() if k != "objective"}, **more)
        if kind == "preservation":
            made.values["objective"] = preserved()
        return made

    def run(job):
        with torch.inference_mode(False):
            return job.run()

    whole, cut = run(job(name="whole")), job(name="cut")
    watcher = t.node("graph.trainer").Watcher
    called = watcher.__call__

    def interrupt(self, event):
        called(self, event)
        if getattr(event, "step", 0) == 2:
            raise InterruptProcessingException

    with t.untouched(sd15):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptProcessingException):
            patch.setattr(watcher, "__call__", interrupt)
            run(cut)
        resumed = run(job(name="cut", resume=True))
    assert t.same(resumed, whole) and t.moved(whole) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["slider", "preservation"])
def test_recomputing_blocks_gives_the_same(sd15, kind, precision):
    adapters = []
    for again in (False, True):
        of = slider(sd15) if kind == "slider" else t.data(sd15)
        job = t.job(sd15, of, steps=2, name=f"again {again}", gradient_checkpointing=again, mixed_precision=precision)
        job.values["objective"] = preserved(weight=2.0) if kind == "preservation" else Objective()
        with torch.inference_mode(False):
            adapters.append(job.run())
    assert t.distance(*adapters) < (0.01 if precision == "fp32" else 0.2) and t.moved(adapters[0]) > 0


def test_each_input_of_a_slider_does_something(sd15):
    pictures = t.data(sd15)
    variants = [
        {},
        {"positive": "a child"},
        {"negative": "a child"},
        {"target": "a dog"},
        {"preserve": "red\nblue"},
        {"guidance": 2.0},
        {"denoising_steps": 3},
        {"size": 16},
        {"dataset": pictures},
        {"positive": "an old man\nold", "negative": "a young man\nyoung"},
    ]
    made = [slider(sd15, **variant) for variant in variants]
    assert len({data.fingerprint() for data in made}) == len(variants)
    assert all(isinstance(data, PromptSlider) for data in made)
    assert made[-2].denoising_steps == 0
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(made[-2].items, pictures.items, strict=True))
    losses = [t.diffusion(sd15, data) for data in made[:6]]
    found = [float(d.loss(d.batch(0)).detach()) for d in losses]
    assert len(set(found)) == len(found) and min(found) > 0


# --- nonsense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"clip": None}, "connect clip"),
        ({"positive": "\n "}, "positive is empty"),
        ({"negative": ""}, "negative is empty"),
        ({"negative": AGE["positive"]}, "both 'an old man'"),
        ({"positive": "a\nb\nc", "negative": "d\ne"}, "3 positive, 2 negative"),
        ({"guidance": 0.0}, "guidance is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"denoising_steps": 1.5}, "denoising_steps is 1.5"),
        ({"latent": {"samples": torch.randn(1, 4, 8, 8)}}, "the latent holds a picture"),
    ],
)
def test_a_slider_of_nonsense_is_refused_by_name(sd15, inputs, words):
    with pytest.raises(LoHaError, match=words):
        slider(sd15, **inputs)


def test_what_does_not_go_together_is_refused_by_name(sd15):
    regular = t.data(sd15, regularisation=True)
    for refused, words in (
        (lambda: slider(sd15, dataset=slider(sd15)), "dataset is a slider already"),
        (lambda: slider(sd15, dataset=regular), "a regularisation picture has no part"),
        (lambda: t.node("graph.slider").LoHaPictureSlider.execute(t.data(sd15), t.data(sd15)), "both pictures"),
        (lambda: t.train(sd15, slider(sd15), network={"dora": "output"}), "switch DoRA off"),
        (lambda: with_preservation(sd15, slider(sd15)), "no part in a slider"),
        (lambda: with_preservation(sd15, t.data(sd15), "zzz"), "no caption has the trigger word 'zzz'"),
        (lambda: with_preservation(sd15, t.data(sd15), ""), "trigger is empty"),
        (lambda: with_preservation(sd15, t.data(sd15), "house", "house"), "both 'house'"),
        (lambda: with_preservation(sd15, t.data(sd15, conditioning=t.conditioning())), "needs captions"),
    ):
        with pytest.raises(LoHaError, match=words), t.untouched(sd15):
            refused()


def with_preservation(m, data, *words):
    job = t.job(m, data, name="refused")
    with torch.inference_mode(False):
        t.node("graph.trainer").training_run(folder=job.folder, **job.values | {"objective": preserved(*words)})


def test_preservation_is_added_to_an_objective(sd15):
    given = Objective(min_snr_gamma=5.0)
    made = preserved("sks", "dog, cat", 0.5, objective=given)
    assert replace(made, preservation=None) == given and made.preservation.classes == ("dog", "cat")
