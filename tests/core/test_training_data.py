"""What a training run is fed with: order, draws, captions, fingerprints, sizes."""

from __future__ import annotations

import doctest
import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError
from loha_core.training import randomness
from loha_core.training.data import captions, pictures
from loha_core.training.data.batches import BatchOrder
from loha_core.training.data.captions import Captions
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.data.pictures import Sizes, at_latent_size, check_picture, fit
from loha_core.training.randomness import generator

from .processes import PATIENCE

ROOT = Path(__file__).parents[2]
bucket_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)
seeds = st.integers(0, 2**64 - 1)


def item(seed: int = 0, shape: tuple[int, ...] = (4, 8, 8), caption: str = "a, b", **rest) -> Item:
    return Item(torch.randn(shape, generator=generator("item", seed)), caption, **rest)


@pytest.mark.parametrize("module", [randomness, captions, pictures])
def test_examples(module):
    found = doctest.testmod(module)
    assert found.failed == 0 and found.attempted


# --- order --------------------------------------------------------------------------------------


def buckets_of(sizes: list[int], repeats: int = 1) -> list[list[int]]:
    numbers = itertools.count()
    return [[next(numbers) for _ in range(size)] * repeats for size in sizes]


@given(sizes=bucket_sizes, repeats=st.integers(1, 3), batch=st.integers(1, 5), seed=seeds, epoch=st.integers(0, 4))
def test_an_epoch_shows_everything_and_never_mixes_buckets(sizes, repeats, batch, seed, epoch):
    buckets = buckets_of(sizes, repeats)
    run = BatchOrder(buckets, batch, seed)
    assert run.batches_per_epoch == sum(math.ceil(len(bucket) / batch) for bucket in buckets)
    start = epoch * run.batches_per_epoch
    batches = [run.indices(number) for number in range(start, start + run.batches_per_epoch)]
    assert all(len(found) == batch for found in batches)
    assert all(any(set(found) <= set(bucket) for bucket in buckets) for found in batches)
    seen = Counter(itertools.chain.from_iterable(batches))
    for bucket in buckets:
        filled = math.ceil(len(bucket) / batch) * batch
        assert sum(seen[index] for index in set(bucket)) == filled
        for index in set(bucket):
            assert seen[index] >= repeats
            if filled == len(bucket):
                assert seen[index] == repeats
            elif repeats == 1 and filled <= 2 * len(bucket):
                assert seen[index] <= 2


@given(sizes=bucket_sizes, batch=st.integers(1, 5), seed=seeds, numbers=st.lists(st.integers(0, 60), max_size=12))
def test_it_is_a_function_of_the_seed_and_the_number_alone(sizes, batch, seed, numbers):
    buckets = buckets_of(sizes)
    kept = BatchOrder(buckets, batch, seed)
    assert [kept.indices(number) for number in numbers] == [
        BatchOrder(buckets, batch, seed).indices(number) for number in numbers
    ]
    for number in numbers:
        kept.indices(number).append(-1)  # what it gives is the caller's
        assert -1 not in kept.indices(number)


def test_epochs_seeds_and_batches_differ():
    run, other = BatchOrder([list(range(40))], 4, 1), BatchOrder([list(range(40))], 4, 2)
    epochs = [[run.indices(number) for number in range(10 * e, 10 * e + 10)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [other.indices(number) for number in range(10)]
    mixed = BatchOrder([list(range(20)), list(range(20, 40))], 4, 1)
    assert len({mixed.indices(n)[0] < 20 for n in range(5)}) == 2, "batches of one bucket would come after each other"


def test_a_batch_larger_than_its_bucket_repeats_it_evenly():
    assert all(sorted(Counter(BatchOrder([[0, 1, 2]], 8, 0).indices(n)).values()) == [2, 3, 3] for n in range(9))
    filling = Counter(itertools.chain.from_iterable(BatchOrder([[0, 1, 2]], 2, 0).indices(n) for n in range(600)))
    assert max(filling.values()) - min(filling.values()) < 120, "the same picture always fills up"


@pytest.mark.parametrize(("buckets", "batch", "message"), [([[0]], 0, "batch_size is 0"), ([[]], 1, "nothing")])
def test_orders_that_cannot_be(buckets, batch, message):
    with pytest.raises(LoHaError, match=message):
        BatchOrder(buckets, batch, 0)


# --- generators -------------------------------------------------------------------------------------


def test_generators_are_the_same_in_every_process_and_differ_by_every_part():
    draw = lambda *parts: torch.rand(4, generator=generator(*parts)).tolist()  # noqa: E731
    parts = [(1, "draw", 2), (1, "draw", 3), (2, "draw", 2), (1, "noise", 2), ("1", "draw", 2), (1, "draw2"), (12, "")]
    assert len({tuple(draw(*each)) for each in parts}) == len(parts)
    code = "import torch; from loha_core.training.randomness import generator as g; "
    code += "print(torch.rand(4, generator=g(1, 'x')))"
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=True)
    assert found.stdout.strip() == str(torch.rand(4, generator=generator(1, "x")))


# --- captions -----------------------------------------------------------------------------------

TAGS = "one, two, three, four, five"


def drawn(settings: Captions, caption: str = TAGS, times: int = 300, **rest) -> list[str]:
    return [settings.draw(caption, generator(0, n), **rest) for n in range(times)]


def test_nothing_changes_unless_asked():
    assert set(drawn(Captions(), " a,b,  c\nd. ")) == {" a,b,  c\nd. "}


def test_the_trigger_goes_in_front_unless_it_is_there():
    assert set(drawn(Captions(" sks "))) == {f"sks, {TAGS}"}
    assert set(drawn(Captions("sks"), "")) == set(drawn(Captions("sks"), " ")) == {"sks"}
    assert set(drawn(Captions("sks"), "photo of sks cat, sitting")) == {"photo of sks cat, sitting"}
    assert set(drawn(Captions("cat"), "a category")) == {"cat, a category"}
    assert set(drawn(Captions("sks"), trigger=False)) == {TAGS}


def test_shuffle_reaches_every_order_and_keeps_the_first_tags():
    found = drawn(Captions(shuffle=True), "a, b,c", 200)
    assert set(found) == {", ".join(tags) for tags in itertools.permutations("abc")}
    kept = drawn(Captions("sks", shuffle=True, keep_tokens=2))
    assert all(caption.startswith("sks, one, two, ") for caption in kept) and len(set(kept)) == 6


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_dropouts_happen_as_often_as_they_say(share):
    empty = drawn(Captions("sks", caption_dropout=share), times=1000).count("") / 1000
    assert abs(empty - share) < 0.05
    kept = [caption.split(", ") for caption in drawn(Captions("sks", tag_dropout=share, keep_tokens=1), times=1000)]
    assert all(tags[:2] == ["sks", "one"] for tags in kept)
    assert abs(sum(len(tags) for tags in kept) / 1000 - (2 + 4 * (1 - share))) < 0.15


def test_a_tag_with_the_trigger_is_never_dropped():
    assert set(drawn(Captions("sks", tag_dropout=1.0), "big, a sks cat, red")) == {"a sks cat"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"tag_dropout": -1}, "tag_dropout"),
        ({"keep_tokens": -1}, "keep_tokens"),
    ],
)
def test_settings_that_cannot_be(bad, message):
    with pytest.raises(LoHaError, match=message):
        Captions(**bad)


@given(st.text("ab, s", max_size=12), st.sampled_from(["", "s"]), st.sampled_from([0.0, 0.5]), st.booleans())
def test_all_lists_what_draw_gives(caption, trigger, dropout, takes_trigger):
    settings = Captions(trigger, caption_dropout=dropout)
    found = set(drawn(settings, caption, 60, trigger=takes_trigger))
    assert found == set(settings.all(caption, trigger=takes_trigger))
    assert Captions(shuffle=True).all(caption) is None


# --- data set -----------------------------------------------------------------------------------


def test_buckets_go_by_shape_and_hold_repeats():
    items = [item(0), item(1, (4, 8, 12), repeats=2), item(2, repeats=3), item(3, (4, 12, 8))]
    assert Dataset(items).buckets() == [[0, 2, 2, 2], [1, 1], [3]]


def test_mirroring_takes_the_mask_along():
    mask = torch.rand(1, 8, 8)
    dataset = Dataset([item(0, flipped=torch.zeros(4, 8, 8), mask=mask), item(1, mask=mask)])
    samples = [dataset.draw(0, generator(n)) for n in range(200)]
    flipped = [sample for sample in samples if not sample.latent.any()]
    assert 70 < len(flipped) < 130
    assert all(torch.equal(sample.mask, mask.flip(-1)) for sample in flipped)
    assert all(torch.equal(sample.mask, mask) for sample in samples if sample.latent.any())
    assert all(torch.equal(dataset.draw(1, generator(n)).mask, mask) for n in range(20))


def test_a_draw_is_a_function_of_its_generator():
    dataset = Dataset([item(0, caption=TAGS, flipped=torch.zeros(4, 8, 8))], Captions(shuffle=True, tag_dropout=0.3))
    for n in range(20):
        one, two = (dataset.draw(0, generator(n)) for _ in range(2))
        assert torch.equal(one.latent, two.latent) and one.caption == two.caption
        torch.rand(1)  # the process's own chance plays no part


def test_regularisation_has_its_weight_and_no_trigger():
    dataset = Dataset([item(0), item(1, caption="a cat", weight=0.25, regularisation=True)], Captions("sks"))
    samples = [dataset.draw(index, generator(0)) for index in (0, 1)]
    assert [(sample.caption, sample.weight) for sample in samples] == [("sks, a, b", 1.0), ("a cat", 0.25)]
    assert dataset.all_captions() == ["sks, a, b", "a cat"]


def test_captions_are_encoded_once_while_there_is_room():
    calls: list[str] = []

    def encode(caption: str):
        calls.append(caption)
        return [[torch.ones(1, 64), {"pooled_output": torch.ones(64)}]]  # 512 bytes

    dataset = Dataset([item()], encode=encode, cache_bytes=1024)
    assert dataset.encode("a") is dataset.encode("a")
    dataset.encode("b"), dataset.encode("a"), dataset.encode("c")  # b has waited longest
    dataset.encode("a"), dataset.encode("c"), dataset.encode("b")
    assert calls == ["a", "b", "c", "b"]
    small = Dataset([item()], encode=encode, cache_bytes=1)
    assert small.encode("x") is small.encode("x")


def test_what_inference_mode_made_can_be_trained_on():
    with torch.inference_mode():
        made = [[torch.ones(1, 3), {"pooled_output": torch.ones(3), "area": (1, 2), "hooks": None}]]
        one = item(0, flipped=torch.zeros(4, 8, 8), mask=torch.ones(1, 8, 8), conditioning=made)
        dataset = Dataset([one, item(1)], encode=lambda caption: [[torch.ones(1, 3), {}]])
        encoded = dataset.encode("x")
    weight = torch.ones(1, requires_grad=True)
    for tensor in (
        *(dataset.draw(0, generator(n)).latent for n in range(8)),
        dataset.draw(0, generator(0)).mask,
        dataset.draw(0, generator(0)).conditioning[0][0],
        dataset.draw(0, generator(0)).conditioning[0][1]["pooled_output"],
        encoded[0][0],
    ):
        (weight * tensor).sum().backward()
    assert dataset.items[0].conditioning[0][1]["area"] == (1, 2)


def test_all_captions_are_those_that_are_drawn():
    items = [item(0, caption="x"), item(1, caption="y"), item(2, caption="x"), item(3, caption="z", conditioning=[1])]
    assert Dataset(items, Captions("sks", caption_dropout=0.1)).all_captions() == ["sks, x", "", "sks, y"]
    assert Dataset(items, Captions(shuffle=True)).all_captions() == []


def test_without_an_encoder_it_says_so():
    with pytest.raises(LoHaError, match="neither a text encoder nor conditioning"):
        Dataset([item()]).encode("a cat")


# --- fingerprint --------------------------------------------------------------------------------


def whole(**changes) -> Item:
    torch.manual_seed(0)
    parts = {"flipped": torch.randn(4, 8, 8), "mask": torch.rand(1, 8, 8), "conditioning": [[torch.ones(3), {"a": 1}]]}
    return item(0, **(parts | changes))


@pytest.mark.parametrize(
    "changed",
    [
        [item(0)],
        [whole(), whole()],
        [whole(caption="a, c")],
        [whole(flipped=None)],
        [whole(flipped=torch.zeros(4, 8, 8))],
        [whole(mask=torch.ones(1, 8, 8))],
        [whole(weight=0.5)],
        [whole(regularisation=True)],
        [whole(repeats=2)],
        [whole(conditioning=[[torch.ones(3), {"a": 2}]])],
        [whole(conditioning=[[torch.ones(3) + 1e-6, {"a": 1}]])],
        [whole(source="x")],
    ],
)
def test_the_fingerprint_changes_with_the_content(changed):
    assert Dataset(changed).fingerprint() != Dataset([whole()]).fingerprint()


def test_the_fingerprint_changes_with_the_order_and_the_settings_only():
    assert Dataset([whole(name="a")]).fingerprint() == Dataset([whole(name="b")]).fingerprint()
    assert Dataset([item(0), item(1)]).fingerprint() != Dataset([item(1), item(0)]).fingerprint()
    settings = [
        Captions(),
        Captions("x"),
        Captions(shuffle=True),
        Captions(caption_dropout=0.1),
        Captions(keep_tokens=1),
    ]
    assert len({Dataset([whole()], each).fingerprint() for each in settings}) == 5
    encoding = Dataset([whole()], encode=lambda caption: caption)
    encoding.encode("x")
    assert encoding.fingerprint() == Dataset([whole()]).fingerprint() and len(encoding.fingerprint()) == 32


def test_with_a_source_the_last_bits_of_a_latent_do_not_matter():
    one, two = (Dataset([whole(source="x", flipped=torch.zeros(4, 8, 8) + error)]) for error in (0, 1e-6))
    assert one.fingerprint() == two.fingerprint() != Dataset([whole(source="x", flipped=None)]).fingerprint()


# --- bad items ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "at least one picture"),
        ([item(shape=(8, 8))], r"item 1 \(a, b\): expected a latent"),
        ([item(shape=(4, 0, 8), name="cat.png")], r"item 1 \(cat.png\): expected a latent"),
        ([item(flipped=torch.zeros(4, 8, 9))], "mirrored latent"),
        ([item(mask=torch.ones(8, 8))], r"mask is \(8, 8\), but must be \(1, 8, 8\)"),
        ([item(mask=torch.zeros(1, 8, 8))], "not 0 throughout"),
        ([item(mask=torch.ones(1, 8, 8) * 2)], "from 0"),
        ([item(), Item(torch.full((4, 8, 8), math.nan))], "item 2: its latent holds NaN"),
        ([item(), item(shape=(16, 8, 8))], r"item 2 has a latent \(16, 8, 8\).*one VAE"),
        ([item(), item(shape=(4, 1, 8, 8))], "item 2 has a latent"),
        ([item(weight=math.inf)], r"item 1 \(a, b\): weight is inf; expected a finite number from 0"),
        ([item(repeats=0)], "repeats is 0; expected a whole number from 1"),
    ],
)
def test_items_that_cannot_be_trained_on(items, message):
    with pytest.raises(LoHaError, match=message):
        Dataset(items)


# --- sizes --------------------------------------------------------------------------------------

sides = st.integers(1, 5000)


@given(resolution=st.integers(64, 2048), step=st.sampled_from([8, 16, 32, 64]), height=sides, width=sides)
def test_a_bucket_is_made_of_steps_has_the_pixels_and_the_nearest_shape(resolution, step, height, width):
    sizes = Sizes(resolution, step)
    tall, wide = sizes.of(height, width)
    square = resolution // step * step
    assert tall % step == wide % step == 0 and tall * wide <= square**2
    assert sizes.of(width, height) == (wide, tall)
    # Nothing that is a step longer would fit as well.
    assert (tall + step) * (wide + step) > square**2
    error = abs(math.log(tall / wide) - math.log(height / width))
    assert all(abs(math.log(h / w) - math.log(height / width)) >= error - 1e-9 for h, w in sizes.all())
    assert Sizes(resolution, step, aspect_buckets=False).of(height, width) == (square, square)


def test_known_buckets():
    assert [Sizes(1024, 64).of(*size) for size in ((3000, 2000), (1080, 1920), (500, 500), (100, 1000))] == [
        (1216, 832),
        (768, 1344),
        (1024, 1024),
        (512, 2048),
    ]
    assert Sizes(0, 8).of(517, 333) == (512, 328)


@given(height=st.integers(8, 60), width=st.integers(8, 60), tall=st.integers(1, 8), wide=st.integers(1, 8))
def test_fitting_gives_the_size_for_pictures_and_masks_alike(height, width, tall, wide):
    size = (8 * tall, 8 * wide)
    mask = torch.rand(height, width)
    picture = fit(mask[:, :, None].expand(-1, -1, 3), size)
    assert picture.shape == (*size, 3) and 0 <= picture.min() <= picture.max() <= 1
    torch.testing.assert_close(fit(mask, size)[:, :, None].expand(-1, -1, 3), picture)
    small = (min(size[0], height), min(size[1], width))
    top, left = (height - small[0]) // 2, (width - small[1]) // 2
    assert torch.equal(fit(mask, small, enlarge=False), mask[top : top + small[0], left : left + small[1]])


def test_fitting_keeps_the_middle_and_the_colours():
    picture = torch.zeros(40, 120, 3)
    picture[:, 40:80] = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(fit(picture, (20, 20))[2:-2, 2:-2], picture[:16, 40:56], atol=1e-3, rtol=0)


def test_masks_at_latent_size_are_shares_of_area():
    mask = torch.zeros(16, 16)
    mask[:4, :8] = 1
    assert torch.equal(at_latent_size(mask, 2, 2), torch.tensor([[[0.5, 0], [0, 0]]]))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.zeros(0, 8, 3), "cat.png: expected a picture"),
        (torch.zeros(8, 8, 1), "expected a picture"),
        (torch.zeros(1, 8, 8, 3), "expected a picture"),
        (torch.full((8, 8, 3), math.nan), "cat.png: holds NaN"),
        (torch.full((8, 8, 3), 255.0), "values from 255 to 255"),
        (torch.full((8, 8, 3), -1.0), "go from 0 to 1"),
    ],
)
def test_pictures_that_are_none(picture, message):
    with pytest.raises(LoHaError, match=message):
        check_picture(picture, "cat.png")
    check_picture(torch.rand(8, 8, 3), "cat.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizes(512, 0), "step is 0; expected a whole number from 1"),
        (lambda: Sizes(32, 64), "less than the step"),
        (lambda: Sizes(0, 64).of(100, 63), "smaller than 64×64"),
    ],
)
def test_sizes_that_cannot_be(make, message):
    with pytest.raises(LoHaError, match=message):
        make()
