"""LoHaDataset: what each of its inputs does to what is trained, against ComfyUI's own VAE and text encoder."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

from demo import comfyui, model, prepare
from loha_core import LoHaError
from loha_core.training.data.batches import BatchOrder
from loha_core.training.randomness import generator

from . import reduced

REPOSITORY = Path(__file__).resolve().parents[2]
WIDGETS: dict[str, Any] = {
    "reg_weight": 1.0,
    "resolution": 0,
    "aspect_buckets": True,
    "bucket_step": 16,
    "flip": False,
    "repeats": 1,
    "trigger_word": "",
    "shuffle_tags": False,
    "keep_tokens": 0,
    "caption_dropout": 0.0,
    "tag_dropout": 0.0,
}
TAGS = "one, two, three, four"


def picture(height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, height, width, 3, generator=generator("picture", seed))


class Counting:
    """A VAE or CLIP of ComfyUI that counts what it encodes."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, []
        self.cancel_after = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self._count(tuple(pixels.shape))
        return self.real.encode(pixels)

    def encode_from_tokens_scheduled(self, tokens: Any) -> Any:
        self._count(tokens)
        return self.real.encode_from_tokens_scheduled(tokens)

    def _count(self, what: Any) -> None:
        self.calls.append(what)
        if len(self.calls) == self.cancel_after:
            comfy.model_management.interrupt_current_processing()


@pytest.fixture(scope="module")
def vae() -> Any:
    return comfy.sd.VAE(model.vae_state_dict())


@pytest.fixture(scope="module")
def clip() -> Any:
    return reduced.build("sd15").clip


@pytest.fixture
def node(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    return sys.modules[f"{pack.__name__}.nodes.graph.dataset"].LoHaDataset


@pytest.fixture
def run(node: Any, vae: Any, clip: Any) -> Callable[..., Any]:
    """Runs the node as ComfyUI does: in inference mode, everything in lists. None takes an input away."""

    def run(**changes: Any) -> Any:
        inputs = {"images": [picture()], "texts": [TAGS], "vae": vae, "clip": clip} | WIDGETS | changes
        as_list = lambda value: value if isinstance(value, list) else [value]  # noqa: E731
        with torch.inference_mode():
            output = node.execute(**{name: as_list(value) for name, value in inputs.items() if value is not None})
        return output.result

    return run


def shapes(dataset: Any) -> list[tuple[int, ...]]:
    return [tuple(item.latent.shape) for item in dataset.items]


def draws(dataset: Any, index: int = 0, times: int = 100) -> list[Any]:
    return [dataset.draw(index, generator(n)) for n in range(times)]


def test_the_schema_has_tooltips_and_a_help_page(node):
    schema = node.define_schema()
    assert schema.category == "LoHa/train"
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])
    help_page = (REPOSITORY / "web" / "docs" / "LoHaDataset.md").read_text()
    assert all(f"**{entry.id}**" in help_page for entry in schema.inputs)
    assert {entry.id for entry in schema.inputs if not entry.optional} == set(WIDGETS)


# --- pictures -----------------------------------------------------------------------------------


def test_latents_and_encodings_are_those_of_comfyui(run, vae, clip):
    dataset, _ = run(images=[picture(40, 64), picture(32, 32, 1)], texts=[TAGS, "b"])
    with torch.inference_mode():
        wanted = [vae.encode(picture(40, 64))[0], vae.encode(picture(32, 32, 1))[0]]
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("b"))
    for item, latent in zip(dataset.items, wanted, strict=True):
        assert torch.equal(item.latent, latent)
    [[found, extra]], [[expected, more]] = dataset.encode("b"), conditioning
    assert torch.equal(found, expected) and extra.keys() == more.keys()
    assert dataset.clip is clip


def test_everything_can_be_trained_on(run):
    dataset, _ = run(flip=True, masks=[torch.ones(1, 32, 32)])
    weight = torch.ones(1, requires_grad=True)
    sample = dataset.draw(0, generator(0))
    [[conditioning, extra]] = dataset.encode(sample.caption)
    for tensor in (*(s.latent for s in draws(dataset)), sample.mask, conditioning, extra["pooled_output"]):
        (weight * tensor).sum().backward()


def test_batches_and_lists_of_any_sizes(run):
    batch = torch.cat([picture(seed=n) for n in range(3)])
    dataset, _ = run(images=[batch, picture(48, 32, 3)], texts=["a", "b", "c", "d"])
    assert [item.caption for item in dataset.items] == ["a", "b", "c", "d"]
    assert dataset.buckets() == [[0, 1, 2], [3]]
    assert [item.caption for item in run(images=[batch], texts=None)[0].items] == [""] * 3
    assert [item.caption for item in run(images=[batch], texts=["x"])[0].items] == ["x"] * 3


def test_pictures_go_to_the_vae_in_batches_of_one_size(run, vae):
    counting = Counting(vae)
    sizes = [(32, 32), (16, 32)] * 9
    run(images=[picture(*size, seed=n) for n, size in enumerate(sizes)], vae=counting, flip=True)
    assert Counter(counting.calls) == {(8, 32, 32, 3): 2, (1, 32, 32, 3): 2, (8, 16, 32, 3): 2, (1, 16, 32, 3): 2}


def test_alpha_is_left_out(run):
    assert torch.equal(
        run(images=[torch.cat([picture(), torch.zeros(1, 32, 32, 1)], -1)])[0].items[0].latent,
        run()[0].items[0].latent,
    )


def test_what_is_there_several_times_is_encoded_once_and_repeated(run, vae):
    counting = Counting(vae)
    images = [picture(), picture(), picture(seed=1), picture()]
    dataset, _ = run(images=images, texts=["a", "a", "a", "b"], vae=counting, repeats=3)
    assert [(item.caption, item.repeats) for item in dataset.items] == [("a", 6), ("a", 3), ("b", 3)]
    assert counting.calls == [(3, 32, 32, 3)]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"resolution": 0}, [(6, 4), (8, 12)]),  # 53×37 is cropped to a multiple of 8
        ({"resolution": 64}, [(10, 6), (6, 10)]),
        ({"resolution": 64, "bucket_step": 8}, [(9, 7), (6, 10)]),
        ({"resolution": 64, "bucket_step": 32}, [(8, 8), (8, 8)]),
        ({"resolution": 32}, [(4, 4), (4, 4)]),
        ({"resolution": 64, "aspect_buckets": False}, [(8, 8), (8, 8)]),
    ],
)
def test_resolution_buckets_and_step(run, settings, sizes):
    dataset, _ = run(images=[picture(53, 37), picture(64, 96)], **settings)
    assert [shape[-2:] for shape in shapes(dataset)] == sizes


def test_flip_encodes_the_mirrored_picture(run, vae):
    dataset, _ = run(flip=True)
    latent = dataset.items[0].latent
    with torch.inference_mode():
        mirrored = vae.encode(picture().flip(2))[0].clone()
    # This VAE gives channels a place, as some do: mirroring its latents would be wrong.
    assert not torch.allclose(mirrored, latent.flip(-1), atol=1e-3)
    seen = [s.latent for s in draws(dataset)]
    assert 30 < sum(torch.equal(s, mirrored) for s in seen) < 70
    assert all(torch.equal(s, mirrored) or torch.equal(s, latent) for s in seen)
    assert all(torch.equal(s.latent, latent) for s in draws(run()[0]))


def test_repeats(run):
    dataset, _ = run(images=[picture(), picture(seed=1)], repeats=5, reg_images=[picture(seed=2)])
    assert Counter(dataset.buckets()[0]) == {0: 5, 1: 5, 2: 1}
    assert BatchOrder(dataset.buckets(), 1, 0).batches_per_epoch == 11


def test_masks_are_cropped_and_mirrored_with_their_picture(run):
    mask = torch.zeros(1, 32, 64)
    mask[:, :, 20:48] = 1
    dataset, _ = run(images=[picture(32, 64)], masks=[mask], resolution=32, aspect_buckets=False, flip=True)
    seen = draws(dataset)
    masks = {str(sample.mask.tolist()) for sample in seen}
    assert len(masks) == 2
    # The middle 32 columns, 16 to 48, are kept: of its first eight, four are learned.
    assert torch.equal(dataset.items[0].mask, torch.tensor([0.5, 1, 1, 1]).expand(1, 4, 4))
    for sample in seen:
        plain = torch.equal(sample.latent, dataset.items[0].latent)
        assert torch.equal(sample.mask, dataset.items[0].mask if plain else dataset.items[0].mask.flip(-1))


def test_regularisation_pictures(run):
    dataset, _ = run(
        reg_images=[picture(seed=1), picture(seed=2)], reg_texts=["a cat"], reg_weight=0.3, trigger_word="sks"
    )
    found = [(dataset.draw(n, generator(0)).caption, item.weight) for n, item in enumerate(dataset.items)]
    assert found == [(f"sks, {TAGS}", 1.0), ("a cat", 0.3), ("a cat", 0.3)]


# --- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        ({}, lambda seen: seen == {TAGS}),
        ({"trigger_word": "sks"}, lambda seen: seen == {f"sks, {TAGS}"}),
        ({"shuffle_tags": True}, lambda seen: len(seen) > 15 and all(len(c) == len(TAGS) for c in seen)),
        ({"shuffle_tags": True, "keep_tokens": 3}, lambda seen: seen == {TAGS}),
        ({"shuffle_tags": True, "keep_tokens": 2}, lambda seen: seen == {TAGS, "one, two, four, three"}),
        ({"caption_dropout": 0.5}, lambda seen: seen == {TAGS, ""}),
        ({"tag_dropout": 0.5}, lambda seen: len(seen) > 10 and all(len(c) <= len(TAGS) for c in seen)),
        ({"tag_dropout": 1.0, "keep_tokens": 1}, lambda seen: seen == {"one"}),
    ],
)
def test_each_caption_setting_does_something(run, settings, holds):
    dataset, _ = run(**settings)
    assert holds({sample.caption for sample in draws(dataset)})
    assert (dataset.fingerprint() == run()[0].fingerprint()) == (not settings)


def test_captions_are_encoded_beforehand_and_once(run, clip):
    counting = Counting(clip)
    images = [picture(seed=n) for n in range(4)]
    dataset, _ = run(images=images, texts=["a", "b", "a", "b"], clip=counting, caption_dropout=0.1)
    assert len(counting.calls) == 3
    for sample in (s for n in range(4) for s in draws(dataset, n, 30)):
        dataset.encode(sample.caption)
    assert len(counting.calls) == 3
    run(clip=counting, shuffle_tags=True)
    assert len(counting.calls) == 3


# --- latents and conditioning -------------------------------------------------------------------


def conditioning(value: float = 0.0, entries: int = 1) -> list[Any]:
    return [[torch.full((1, 77, 8), value + n), {"pooled_output": torch.ones(1, 8)}] for n in range(entries)]


def latents(*sizes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    return [{"samples": torch.randn(size, generator=generator("latent"))} for size in sizes]


NO_TEXTS = {"texts": None, "clip": None}
NO_PICTURES = {"images": None, "vae": None, **NO_TEXTS}


def test_latents_with_conditioning(run):
    given = latents((2, 4, 8, 8), (1, 4, 8, 12))
    dataset, _ = run(**NO_PICTURES, latents=given, conditioning=[conditioning(n) for n in range(3)], repeats=2)
    assert dataset.buckets() == [[0, 0, 1, 1], [2, 2]]
    for number, item in enumerate(dataset.items):
        assert item.conditioning[0][0][0, 0, 0] == number and item.repeats == 2
        assert not item.conditioning[0][0].is_inference()
    assert torch.equal(dataset.items[1].latent, given[0]["samples"][1])
    assert dataset.draw(0, generator(0)).conditioning is dataset.items[0].conditioning


def test_one_conditioning_for_all_and_one_that_is_a_batch(run):
    three = latents((3, 4, 8, 8))
    shared, _ = run(**NO_PICTURES, latents=three, conditioning=[conditioning(5)])
    assert [item.conditioning[0][0].max() for item in shared.items] == [5, 5, 5]
    each, _ = run(**NO_PICTURES, latents=three, conditioning=[conditioning(0, 3)])
    assert [item.conditioning[0][0].max() for item in each.items] == [0, 1, 2]
    parts, _ = run(**NO_PICTURES, latents=latents((1, 4, 8, 8)), conditioning=[conditioning(0, 2)])
    assert len(parts.items[0].conditioning) == 2


def test_other_ways_to_combine_them(run, clip):
    texts, _ = run(**NO_PICTURES | {"texts": ["a"], "clip": clip}, latents=latents((2, 4, 8, 8)))
    assert [sample.caption for n in (0, 1) for sample in draws(texts, n, 1)] == ["a", "a"]
    pictures, _ = run(texts=None, clip=None, conditioning=[conditioning(2)])
    assert pictures.items[0].conditioning[0][0].max() == 2 and pictures.clip is None
    video, _ = run(**NO_PICTURES, latents=latents((1, 16, 5, 8, 8)), conditioning=[conditioning()])
    assert shapes(video) == [(16, 5, 8, 8)]


def test_masks_of_latents_are_resized(run):
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    dataset, _ = run(**NO_PICTURES, latents=latents((1, 4, 8, 8)), conditioning=[conditioning()], masks=[mask])
    assert torch.equal(dataset.items[0].mask, torch.tensor([1.0] * 4 + [0] * 4)[None, :, None].expand(1, 8, 8))


def test_the_native_node_s_latents_and_conditioning_give_the_same(run, vae, clip):
    from comfy_extras.nodes_dataset import MakeTrainingDataset

    images, texts = [picture(), picture(32, 48, 1)], ["a", "b"]
    with torch.inference_mode():
        native = MakeTrainingDataset.execute(images, [vae], [clip], texts).result
    ours, _ = run(images=images, texts=texts)
    theirs, _ = run(**NO_PICTURES, latents=native[0], conditioning=native[1])
    for one, other in zip(ours.items, theirs.items, strict=True):
        assert torch.equal(one.latent, other.latent)
        assert torch.equal(ours.encode(one.caption)[0][0], other.conditioning[0][0])


# --- fingerprint, Cancel ------------------------------------------------------------------------


def test_the_fingerprint_is_of_what_is_seen(run):
    plain = run()[0].fingerprint()
    assert run()[0].fingerprint() == plain
    other_vae = comfy.sd.VAE({name: w * 1.01 for name, w in model.vae_state_dict().items()})
    changes = [{"images": [picture(seed=1)]}, {"texts": ["x"]}, {"flip": True}, {"repeats": 2}, {"vae": other_vae}]
    changes += [{"masks": [torch.ones(1, 32, 32)]}, {"reg_images": [picture()]}, {"resolution": 64}]
    assert len({plain, *(run(**change)[0].fingerprint() for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(("at", "encoded"), [("vae", 1), ("clip", 2)])
def test_cancel_stops_at_once(run, vae, clip, at, encoded):
    counting = Counting({"vae": vae, "clip": clip}[at])
    counting.cancel_after = encoded
    images = [picture(8 * n, 32, n) for n in range(1, 9)]
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(images=images, texts=list("abcdefgh"), **{at: counting})
    assert len(counting.calls) == encoded


# --- the contact sheet --------------------------------------------------------------------------


def test_the_contact_sheet_shows_every_picture(run):
    _, few = run(images=[picture(seed=n) for n in range(3)])
    _, row = run(images=[picture(seed=n) for n in range(9)])
    _, many = run(images=[picture(seed=n) for n in range(47)])
    assert few.dtype == torch.float32 and few.shape[0] == 1 and few.shape[-1] == 3 and 0 <= few.min() <= few.max() <= 1
    assert few.shape[2] < row.shape[2] == many.shape[2] and few.shape[1] < row.shape[1] < many.shape[1]
    assert many.shape[1] - 5 * (row.shape[1] - few.shape[1]) < few.shape[1] + 60  # 40 of them and a line


def test_the_contact_sheet_shows_crop_mask_and_frame(run):
    red = torch.zeros(1, 32, 96, 3)
    red[:, :, 32:64, 0] = 1  # only the middle is red
    settings = {"images": [red], "resolution": 32, "aspect_buckets": False}
    thumb = lambda sheet: sheet[0, 60:210, 14:164]  # noqa: E731
    plain = thumb(run(**settings)[1])
    assert plain[..., 0].mean() > 0.97 and plain[..., 1].mean() < 0.03
    mask = torch.zeros(1, 32, 96)
    mask[:, 16:] = 1
    masked = thumb(run(**settings, masks=[mask])[1])
    assert masked[:70, :, 0].mean() < 0.3 and masked[80:, :, 0].mean() > 0.95
    framed = run(**settings, reg_images=[picture()])[1]
    assert framed[0, 59, 178 + 75, 0] > 0.7 > framed[0, 59, 14 + 75, 0]


def test_latents_are_shown_too(run):
    for channels in (1, 4, 16):
        _, sheet = run(**NO_PICTURES, latents=latents((1, channels, 8, 8)), conditioning=[conditioning()])
        assert sheet[0, 60:210, 14:164].std() > 0.1


@pytest.mark.parametrize("caption", ["", "word " * 500, "x" * 5000, "läßt, 猫, 🙂", "a\nb\n\nc", "…" * 400])
def test_any_caption_can_be_shown(run, caption):
    run(texts=[caption])


# --- bad input ----------------------------------------------------------------------------------

GOOD_LATENTS = {**NO_PICTURES, "latents": latents((2, 4, 8, 8)), "conditioning": [conditioning()]}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"images": None}, "nothing to train on: connect images"),
        ({"images": []}, "no image to train on: the list that is connected is empty"),
        ({"latents": latents((1, 4, 8, 8))}, "both images and latents"),
        ({"vae": None}, "connect vae"),
        ({"clip": None}, r"connect clip \(with texts\), or conditioning"),
        ({"conditioning": [conditioning()]}, "both texts and conditioning"),
        ({"images": [picture()] * 3, "texts": ["a", "b"]}, "2 of text for 3 of image"),
        ({"masks": [torch.ones(2, 32, 32)]}, "2 masks for 1 of image"),
        ({"masks": [torch.zeros(1, 64, 64)]}, "image 1: its mask has 64×64 pixels, the picture 32×32"),
        ({"masks": [torch.zeros(1, 32, 32)]}, "image 1.*not 0 throughout"),
        ({"images": [picture(), torch.full((1, 32, 32, 3), math.nan)]}, "image 2: holds NaN"),
        ({"images": [torch.zeros(1, 0, 32, 3)]}, "image 1: expected a picture"),
        ({"images": [picture() * 255]}, "go from 0 to 1"),
        ({"images": [picture(32, 7)]}, "image 1: a picture of 7×32 pixels is smaller than 8×8; take it out"),
        ({"resolution": 64, "bucket_step": 12}, "bucket_step is 12.*use a multiple of 8"),
        ({"resolution": 16, "bucket_step": 32}, "less than the step"),
        ({"reg_texts": ["a"]}, "reg_texts are connected without reg_images"),
        ({"reg_images": [picture(seed=n) for n in range(3)], "reg_texts": ["a", "b"]}, "2 of text for 3 of reg_image"),
        (
            {"texts": None, "clip": None, "conditioning": [conditioning()], "reg_images": [picture()]},
            "reg_images need clip",
        ),
        ({"texts": None, "conditioning": [conditioning()], "trigger_word": "x"}, "trigger_word would change captions"),
        ({**NO_PICTURES, "latents": latents((1, 4, 8, 8))}, "nothing says what the pictures show"),
        ({**GOOD_LATENTS, "conditioning": [conditioning()] * 3}, "3 of conditioning for 2 of latent"),
        ({**GOOD_LATENTS, "latents": latents((1, 4, 8, 8), (1, 16, 8, 8))}, "item 2 has a latent.*one VAE"),
        (
            {**GOOD_LATENTS, "latents": [{"samples": torch.full((1, 4, 8, 8), math.nan)}]},
            r"item 1 \(latent 1\): its latent",
        ),
        ({**GOOD_LATENTS, "flip": True}, "latents cannot be mirrored"),
        ({**GOOD_LATENTS, "latents": []}, "no latent to train on"),
        ({"caption_dropout": 2.0}, "caption_dropout is 2.0"),
    ],
)
def test_bad_input_says_what_to_do(run, inputs, message):
    with pytest.raises(LoHaError, match=message):
        run(**inputs)


# --- in a real server ---------------------------------------------------------------------------


def test_a_folder_becomes_a_dataset_in_the_server(ready, tmp_path):
    for number, folder in enumerate(("2_cats", "2_cats", ".")):
        path = ready.path("input", "training", folder, f"{number}.png")
        Image.fromarray((picture(32, 40, number)[0].numpy() * 255).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"cat number {number}")
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": prepare.CHECKPOINT}},
        "2": {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "training"}},
        "3": {
            "class_type": "LoHaDataset",
            "inputs": {"images": ["2", 0], "texts": ["2", 1], "vae": ["1", 2], "clip": ["1", 1]}
            | WIDGETS
            | {"flip": True, "trigger_word": "sks"},
        },
    }
    [sheet] = ready.images({"outputs": {"3": ready.queue(prompt)["outputs"]["3"]}})
    assert sheet.shape[1] > 460 and sheet.std() > 10
    with pytest.raises(comfyui.ComfyUIError, match="LoHaDataset.*connect vae"):
        prompt["3"]["inputs"].pop("vae")
        ready.queue(prompt)
