"""Concept sliders (arXiv 2311.12092): what a LoHa learns at strength 1 it learns the opposite of at −1.

    from prompts    ε_θ(target) at ±1  →  ε_base(target) ± guidance · (ε_base(positive) − ε_base(negative)), at one x_t
    from pictures   ε_θ(high) at 1 and ε_θ(low) at −1  →  ε, both with the same ε and t

Each is a data set, since what a run sees is all that differs; the objective says which noise and how errors count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...errors import LoHaError, about, check_number
from ..data.captions import Captions
from ..data.dataset import Dataset, Item, Sample
from ..digest import digest

T = TypeVar("T")


@dataclass(frozen=True)
class Concept:
    """A direction between two prompts.

    Attributes:
        positive, negative: what strength 1 moves towards, and away from; at −1 the other way.
        target: the prompt whose pictures move; "" moves those without a prompt.

    Raises:
        LoHaError: a prompt is empty, or both are the same.
    """

    positive: str
    negative: str
    target: str = ""

    def __post_init__(self) -> None:
        for name, end in (("positive", "1"), ("negative", "−1")):
            object.__setattr__(self, name, getattr(self, name).strip())
            if not getattr(self, name):
                raise LoHaError(f"{name} is empty; expected a prompt of what strength {end} shows")
        object.__setattr__(self, "target", self.target.strip())
        if self.positive == self.negative:
            raise LoHaError(f"positive and negative are both {self.positive!r}; between them is nothing to learn")


def texts(name: str, value: Any) -> tuple[str, ...]:
    """One text or several, without space around.

    Raises:
        LoHaError: anything else.
    """
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(text, str) for text in several):
        raise LoHaError(f"{name} is {value!r}; expected a text, or a list of texts")
    return tuple(text.strip() for text in several)


def concepts(positive: Sequence[str], negative: Sequence[str], target: Sequence[str] = ()) -> list[Concept]:
    """Concepts of equally many prompts, of which one stands for all: [a], [b], [x, y] -> (a, b, x), (a, b, y).

    Raises:
        LoHaError: unequal numbers, or what `Concept` refuses.
    """
    given = [list(prompts) or [""] for prompts in (positive, negative, target)]
    count = max(map(len, given))
    if any(len(prompts) not in (1, count) for prompts in given):
        raise LoHaError(
            f"the slider has {len(given[0])} positive, {len(given[1])} negative and {len(given[2])} target prompts; "
            "expected as many of each, or one for all"
        )
    return [Concept(*(prompts[i if len(prompts) > 1 else 0] for prompts in given)) for i in range(count)]


@dataclass(frozen=True, kw_only=True)
class PromptSample(Sample):
    """A target, in ``caption``, and the direction that it moves in."""

    positive: str
    negative: str
    guidance: float


@dataclass(frozen=True, kw_only=True)
class PictureSample(Sample):
    """The picture of strength 1, and that of strength −1."""

    low: Sample


class PromptSlider(Dataset):
    """Concepts as a data set.

    Args:
        concepts: at least one; each sample has one of them, at random.
        items: pictures whose noised latents the model is asked at; their captions are not used. Or one item of zeros,
            of the size to train at, if ``denoising_steps`` is not 0.
        encode: prompt -> conditioning.
        preserve: attributes that must not change with the concept. One at a time, at random, is added to both prompts,
            so that the direction has none of them: in expectation the paper's sum over them, divided by their number.
        guidance: length of the direction: how far strength 1 goes.
        denoising_steps: x_t is where the base gets from pure noise, for the target, in so many steps; 0: noised items.

    Raises:
        LoHaError: no concept, an attribute that is empty, a regularisation picture, or a number out of its range.
    """

    def __init__(
        self,
        concepts: Sequence[Concept],
        items: Sequence[Item],
        encode: Callable[[str], Any],
        *,
        preserve: Sequence[str] = (),
        guidance: float = 1.0,
        denoising_steps: int = 0,
    ) -> None:
        super().__init__(items, Captions(), encode)
        if not concepts:
            raise LoHaError("a slider has no concept; give it a positive and a negative prompt")
        self.concepts, self.preserve = tuple(concepts), texts("preserve", preserve)
        if not all(self.preserve):
            raise LoHaError("preserve has an empty attribute; expected words such as 'man' and 'woman', or none")
        if any(item.regularisation for item in items):
            raise LoHaError("a regularisation picture has no part in a slider, which learns no pictures; leave it out")
        check_number("guidance", guidance, above=0)
        check_number("denoising_steps", denoising_steps, minimum=0, integer=True)
        self.guidance, self.denoising_steps = guidance, denoising_steps

    def draw(self, index: int, generator: torch.Generator) -> PromptSample:
        item = super().draw(index, generator)
        concept, words = _one_of(self.concepts, generator), self.preserve and [_one_of(self.preserve, generator)]
        positive, negative = (", ".join([prompt, *words]) for prompt in (concept.positive, concept.negative))
        drawn = vars(item) | {"caption": concept.target, "conditioning": None}
        return PromptSample(**drawn, positive=positive, negative=negative, guidance=self.guidance)

    def all_captions(self) -> list[str]:
        ends = [prompt for concept in self.concepts for prompt in (concept.positive, concept.negative)]
        joined = [f"{prompt}, {word}" for prompt in ends for word in self.preserve] if self.preserve else ends
        return list(dict.fromkeys([*(concept.target for concept in self.concepts), *joined]))

    def fingerprint(self) -> str:
        settings = (self.concepts, self.preserve, self.guidance, self.denoising_steps)
        return digest([super().fingerprint(), repr(settings)])


class PictureSlider(Dataset):
    """Two data sets whose items are pairs, in this order: what strength 1 shows, and what −1 shows.

    Both pictures of a pair are mirrored together, and their captions vary alike.

    Raises:
        LoHaError: items that are no pairs, of different sizes or the same, or regularisation pictures.
    """

    def __init__(self, high: Dataset, low: Dataset) -> None:
        super().__init__(high.items, high.captions, high.encode)
        self.high, self.low = high, low
        if isinstance(high, SLIDERS) or isinstance(low, SLIDERS):
            raise LoHaError("high and low are data sets of pictures, and one of them is a slider already")
        if len(high) != len(low):
            raise LoHaError(f"{len(high)} pictures are high and {len(low)} low; expected pairs in the same order")
        for number, (one, other) in enumerate(zip(high.items, low.items, strict=True), 1):
            with about(f"pair {number}" + (f" ({one.name}, {other.name})" if one.name else "")):
                _check_pair(one, other)

    def draw(self, index: int, generator: torch.Generator) -> PictureSample:
        alike = torch.Generator()
        alike.set_state(generator.get_state())
        low, high = self.low.draw(index, alike), self.high.draw(index, generator)
        return PictureSample(**vars(high), low=low)

    def all_captions(self) -> list[str]:
        return list(dict.fromkeys([*self.high.all_captions(), *self.low.all_captions()]))

    def fingerprint(self) -> str:
        return digest([self.high.fingerprint(), self.low.fingerprint()])


SLIDERS = (PromptSlider, PictureSlider)


def _check_pair(high: Item, low: Item) -> None:
    if high.regularisation or low.regularisation:
        raise LoHaError("a regularisation picture has no opposite; leave those out")
    if high.latent.shape != low.latent.shape:
        raise LoHaError(
            f"the latents are {tuple(high.latent.shape)} and {tuple(low.latent.shape)}; expected pictures of one size"
        )
    if (high.flipped is None) != (low.flipped is None):
        raise LoHaError("one is mirrored and the other is not; set flip alike for both")
    if torch.equal(high.latent, low.latent):
        raise LoHaError("both pictures are the same; between them is nothing to learn")


def _one_of(values: Sequence[T], generator: torch.Generator) -> T:
    return values[int(torch.randint(len(values), (), generator=generator))]
