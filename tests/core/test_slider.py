"""Concept sliders: the paper's equation in float64, both strengths in one step, and what is no slider."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from loha_core import LoHaError, load_adapter
from loha_core.formats.toml import read_toml
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.diffusers import run
from loha_core.training.diffusers.settings import OPTIONAL, read_settings
from loha_core.training.diffusers.sliders import SliderSettings
from loha_core.training.events import Stepped
from loha_core.training.losses.preservation import Preservation
from loha_core.training.losses.slider import Concept, PictureSlider, PromptSlider, concepts
from loha_core.training.losses.strength import Strength
from loha_core.training.randomness import generator
from loha_core.training.trainer import Trainer

from . import asking, pipelines

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("sd15", "sdxl", "sd3")  # noise, v and a flow
AGE = Concept("an old man", "a young man", "a man")


def slider(d: Any, family: str = "sd15", **options: Any) -> PromptSlider:
    return PromptSlider([AGE], asking.items(family), d.encode, **options)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_papers(family):
    """Against float64 autograd through weights to which the update is added by hand."""
    d = asking.diffusion(family)
    feed = asking.feed(d, slider(d, family, guidance=1.5))
    batch = feed.batch(0)
    loss = feed.loss(batch)
    loss.backward()

    exact = asking.Exactly(family, d)

    def output(prompt: str, strength: float) -> torch.Tensor:
        return exact.output(batch.noisy, batch.timesteps, [prompt] * 2, strength)

    direction = 1.5 * (output(AGE.positive, 0) - output(AGE.negative, 0)).detach()
    target = output(AGE.target, 0).detach()
    wanted = sum((output(AGE.target, s) - (target + s * direction)).square().mean() for s in (1, -1)) / 2
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    asking.close([p.grad for p in asking.trained(d)], exact.gradients(wanted), 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_pictures_it_is_asked_where_the_base_gets_from_noise(family):
    """DDIM by hand in float64, from the same noise, with the base and the target's prompt."""
    d = asking.diffusion(family)
    feed = asking.feed(d, slider(d, family, denoising_steps=4))
    batch, drawn = feed.batch(3), feed.sampler.batch(3)
    exact, start = asking.Exactly(family, d), torch.full((2,), 1 - 1e-6)
    noise, latents = drawn.noise.double(), torch.zeros_like(drawn.latents).double()
    for step in range(5):
        signal, sigma, timesteps = d.noising.at(start + (torch.tensor(drawn.times) - start) * step / 4)
        a, s = (t.double().view(-1, 1, 1, 1) for t in (signal, sigma))
        x = a * latents + s * noise
        output = exact.output(x.float(), timesteps, [AGE.target] * 2, 0).detach()
        latents = {
            "epsilon": lambda x, y, a, s: (x - s * y) / a,
            "v": lambda x, y, a, s: a * x - s * y,
            "flow": lambda x, y, a, s: x - s * y,
        }[d.noising.prediction](x, output, a, s)
        noise = (x - a * latents) / s
    assert torch.equal(batch.timesteps, timesteps)
    assert float((batch.noisy - x).norm() / x.norm()) < 1e-3
    # Not the noise that it began with: the base has had a say.
    alone = s * drawn.noise
    assert float((batch.noisy - alone).norm() / alone.norm()) > 0.02


def test_a_batch_follows_from_its_number_and_not_from_what_was_learnt():
    d = asking.diffusion("sd15")
    feed = asking.feed(d, slider(d, denoising_steps=2))
    first, state = feed.batch(5), torch.get_rng_state()
    for p in asking.trained(d):
        p.data.add_(1.0)
    assert torch.equal(feed.batch(5).noisy, first.noisy) and not torch.equal(feed.batch(6).noisy, first.noisy)
    assert torch.equal(torch.get_rng_state(), state)


def test_concepts_and_what_is_preserved_are_drawn():
    many = concepts(["old", "large"], ["young", "small"], ["man"])
    assert many == [Concept("old", "young", "man"), Concept("large", "small", "man")]
    dataset = PromptSlider(many, [Item(torch.zeros(4, 2, 2))], str, preserve=["dark", "red"], denoising_steps=1)
    drawn = {(s.positive, s.negative, s.caption) for s in (dataset.draw(0, generator("draw", i)) for i in range(100))}
    assert drawn == {
        (f"{c.positive}, {word}", f"{c.negative}, {word}", "man") for c in many for word in ("dark", "red")
    }
    asked = {prompt for of_one in drawn for prompt in of_one}
    assert asked == set(dataset.all_captions()) and len(dataset.all_captions()) == 9


def test_the_fingerprint_is_of_all_that_decides():
    items = [Item(torch.zeros(4, 2, 2))]
    plain: dict[str, Any] = {"concepts": [AGE], "items": items, "encode": str, "denoising_steps": 2}
    changes: list[dict[str, Any]] = [
        {},
        {"concepts": [Concept("old", "young")]},
        {"items": [Item(torch.zeros(4, 2, 3))]},
        {"denoising_steps": 3},
        {"guidance": 2.0},
        {"preserve": ["red"]},
    ]
    assert len({PromptSlider(**plain | change).fingerprint() for change in changes}) == len(changes)


# --- pictures -----------------------------------------------------------------------------------


def ends(d: Any, **both: Any) -> tuple[Dataset, Dataset]:
    high = [replace(item, **both) for item in asking.items("sd15")]
    low = [replace(item, latent=-item.latent, caption="a dog", **both) for item in high]
    return Dataset(high, Captions(), d.encode), Dataset(low, Captions(), d.encode)


def test_pairs_are_learnt_at_both_strengths_with_the_same_noise():
    d = asking.diffusion("sd15")
    high, low = ends(d)
    feed = asking.feed(d, PictureSlider(high, low))
    batch = feed.batch(2)
    feed.loss(batch).backward()
    exact, wanted = asking.Exactly("sd15", d), torch.zeros(())
    drawn = feed.sampler.batch(2)
    signal, sigma, timesteps = d.noising.at(torch.tensor(drawn.times))
    a, s = (t.double().view(-1, 1, 1, 1) for t in (signal, sigma))
    for strength, latents, prompts in (
        (1, drawn.latents, [sample.caption for sample in drawn.samples]),
        (-1, -drawn.latents, ["a dog"] * 2),
    ):
        output = exact.output((a * latents + s * drawn.noise).float(), timesteps, prompts, strength)
        wanted = wanted + (output - drawn.noise).square().mean() / 2
    assert float(feed.loss(batch).detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    asking.close([p.grad for p in asking.trained(d)], exact.gradients(wanted), 1e-3)


def test_both_pictures_of_a_pair_are_mirrored_together():
    d = asking.diffusion("sd15")
    high, low = ends(d)
    high, low = (
        Dataset([replace(i, flipped=i.latent.flip(-1)) for i in of.items], Captions(caption_dropout=0.5), d.encode)
        for of in (high, low)
    )
    pairs = PictureSlider(high, low)
    seen = set()
    for number in range(40):
        sample = pairs.draw(0, generator("pair", number))
        assert torch.equal(sample.low.latent, -sample.latent) and bool(sample.caption) == bool(sample.low.caption)
        seen.add((torch.equal(sample.latent, high.items[0].latent), bool(sample.caption)))
    assert len(seen) == 4


# --- strength -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_recomputed_blocks_act_as_strongly_again(family):
    """In the backward the strength is 1 again, and −1 must be found anew."""
    gradients = []
    for recompute in (False, True):
        d = asking.diffusion(family)
        if recompute:
            d.model.enable_gradient_checkpointing(d.strength.recomputed)
        feed = asking.feed(d, slider(d, family))
        d.model.train()
        for module in d.model.modules():
            if "Dropout" in type(module).__name__:
                module.eval()
        feed.loss(feed.batch(0)).backward()
        gradients.append([p.grad.double() for p in asking.trained(d)])
    asking.close(gradients[1], gradients[0], 1e-5)


def test_strength_is_one_again_whatever_happens():
    d = asking.diffusion("sd15")
    with pytest.raises(KeyboardInterrupt), d.strength.at(-1):
        assert {layer.scaling["default"] for layer in d.strength.layers} == {-1.0}
        with d.strength.at(0):
            assert all(layer.disable_adapters for layer in d.strength.layers)
        assert d.strength.now == -1 and not any(layer.disable_adapters for layer in d.strength.layers)
        raise KeyboardInterrupt
    assert d.strength.now == 1 and {layer.scaling["default"] for layer in d.strength.layers} == {1.0}


def test_no_strength_scales_a_dora():
    d = asking.diffusion("sd15", use_dora=True)
    feed = asking.feed(d, slider(d))
    with pytest.raises(LoHaError, match=r"at strength -1.*DoRA"):
        feed.loss(feed.batch(0))
    with Strength(d.strength.layers).at(0):
        pass


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipelines.build("sd15").save_pretrained(folder / "sd15")
    return folder


PLAIN: dict[str, dict[str, Any]] = {
    "model": {"path": "sd15"},
    "network": {"r": 2, "alpha": 2.0},
    "optimizer": {"lr": 0.01, "schedule": "constant"},
    "training": {"steps": 2, "batch_size": 2, "save_every": 0},
    "output": {"folder": "out", "name": "mine"},
    "slider": {"positive": "old", "negative": "young", "denoising_steps": 2, "width": 32, "height": 32},
}


@pytest.fixture
def write(tmp_path: Path, models: Path) -> Any:
    (tmp_path / "sd15").symlink_to(models / "sd15")
    for number, name in enumerate(("high", "low")):
        (tmp_path / name).mkdir()
        Image.linear_gradient("L").rotate(90 * number).resize((32, 32)).save(tmp_path / name / "one.png")

    def write(**changes: dict[str, Any] | None) -> Path:
        lines = []
        for name in dict.fromkeys([*PLAIN, *changes]):
            if (change := changes.get(name, {})) is None:
                continue
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in (PLAIN.get(name, {}) | change).items())]
        path = tmp_path / "config.toml"
        path.write_text("\n".join(lines), "utf-8")
        return path

    return write


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t for n, f in load_adapter(path).layers.items() for k, t in f.tensors().items()}


PAIRS: dict[str, Any] = {"data": {"folder": "high", "resolution": 32, "step": 4}, "slider": {"low": "low"}}


@pytest.mark.parametrize("kind", ["prompts", "noised pictures", "pairs", "text encoders", "recomputed"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(write, tmp_path, monkeypatch, kind):
    changes: dict[str, Any] = {"training": {"steps": 4}}
    if kind in ("noised pictures", "pairs"):
        changes["data"] = PAIRS["data"]
    if kind == "pairs":
        monkeypatch.setitem(PLAIN, "slider", {})
        changes["slider"] = PAIRS["slider"]
    if kind == "text encoders":
        changes["training"] |= {"text_encoders": True}
    if kind == "recomputed":
        changes["training"] |= {"gradient_checkpointing": True}
    whole = tensors(run.train(write(**changes, output={"name": "whole", "folder": "whole"})))
    emit = Trainer._emit

    def cancel(self, event):
        emit(self, event)
        if isinstance(event, Stepped) and event.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_emit", cancel)
        run.train(write(**changes))
    resumed = tensors(run.train(write(**changes)))
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(float(t.abs().max()) > 0 for name, t in whole.items() if name.endswith("w2_b"))


def test_another_slider_is_another_run(write):
    run.train(write())
    with pytest.raises(LoHaError, match="data"):
        run.train(write(slider={"negative": "a child"}, training={"steps": 3}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"slider": {"positive": ""}}, r"\[slider\]: positive is empty"),
        ({"slider": {"negative": " "}}, r"\[slider\]: negative is empty"),
        ({"slider": {"negative": "old"}}, "positive and negative are both 'old'"),
        ({"slider": {"positive": ["a", "b", "c"], "negative": ["d", "e"]}}, "3 positive, 2 negative and 1 target"),
        ({"slider": {"positive": 3}}, "positive is 3; expected a text, or a list of texts"),
        ({"slider": {"guidance": 0}}, "guidance is 0"),
        ({"slider": {"denoising_steps": 0}}, "denoising_steps is 0"),
        ({"slider": {"low": "low"}, "data": {"folder": "high"}}, "low is for pairs of pictures, and there are prompts"),
        ({"slider": {"preserve": ["red", ""]}}, "preserve has an empty attribute"),
        ({"slider": {"positiv": "old"}}, "did you mean positive"),
        ({"slider": None}, r"\[data\]: folder is missing"),
        ({"data": {"regularisation": "low", "folder": "high"}}, "regularisation has no part in a slider"),
        ({"preservation": {"trigger": "sks", "classes": "man"}}, "no part in a slider"),
        ({"network": {"use_dora": True}}, "switch DoRA off"),
    ],
)
def test_nonsense_is_refused_by_name(write, changes, words):
    with pytest.raises(LoHaError, match=words):
        run.train(write(**changes))


def test_what_is_no_pair_is_refused():
    d = asking.diffusion("sd15")
    high, low = ends(d)
    wide = [Item(torch.zeros(4, 8, 16)), low.items[1]]
    for one, other, words in (
        (high, Dataset(low.items[:1]), "2 pictures are high and 1 low"),
        (high, high, "pair 1: both pictures are the same"),
        (high, Dataset(wide), r"pair 1: the latents are \(4, 8, 8\) and \(4, 8, 16\)"),
        (Dataset([replace(i, regularisation=True) for i in high.items]), low, "a regularisation picture"),
        (Dataset([replace(i, flipped=i.latent) for i in high.items]), low, "one is mirrored and the other is not"),
        (PictureSlider(high, low), low, "is a slider already"),
    ):
        with pytest.raises(LoHaError, match=words):
            PictureSlider(one, other)


def test_the_examples_optional_tables_have_every_key_with_its_default(tmp_path):
    example = (Path(__file__).parents[2] / "examples" / "train.toml").read_text("utf-8")
    tables = re.sub(r"^# (\[\w+\].*|\w+ = .*)$", r"\1", example, flags=re.MULTILINE)
    (tmp_path / "config.toml").write_text(tables.replace('"a person, smiling" ', '["a", "b"]'), "utf-8")
    parsed = read_toml(tmp_path / "config.toml")
    for name, kind in (("slider", SliderSettings), ("preservation", Preservation)):
        assert OPTIONAL[name] is kind
        assert parsed[name].keys() == {each.name for each in fields(kind)}
    numbers = ("guidance", "denoising_steps", "width", "height", "low")
    assert all(parsed["slider"][each.name] == each.default for each in fields(SliderSettings) if each.name in numbers)
    assert parsed["preservation"]["weight"] == 1.0
    read = read_settings(tmp_path / "config.toml")
    assert read.preservation == Preservation("sks dog", "dog") and read.slider is not None
    assert read.slider.positive == ("a", "b") and read.slider.preserve == ()


def test_settings_say_what_is_asked(write):
    slider = read_settings(write(slider={"positive": ["old", " grey "], "preserve": "man"})).slider
    assert slider is not None and slider.positive == ("old", "grey") and slider.preserve == ("man",)
    assert read_settings(write(slider=None, data={"folder": "high"})).slider is None
