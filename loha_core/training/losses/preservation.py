"""Output preservation: with the class in place of the trigger word, the model goes on saying what its base says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import LoHaError, check_number
from ..data.dataset import Dataset
from .slider import SLIDERS, texts


@dataclass(frozen=True)
class Preservation:
    """Adds weight · ‖ε_θ(x_t, class prompt) − ε_base(x_t, class prompt)‖² to the loss, at the pictures' own x_t.

    The class prompt is the caption with a class word in place of the trigger word; of a caption without the trigger
    word (dropped, or a regularisation picture's), the class word alone. ε stands for whatever the model puts out, and
    the error counts as the objective says.

    Attributes:
        trigger: the word, or words, that stand for what is learned.
        classes: what it is one of, such as "dog"; of several, one is drawn each time.
        weight: how much this counts, against 1 for what is learned.

    Raises:
        LoHaError: no trigger word, no class, both the same, or a weight below 0.
    """

    trigger: str = ""
    classes: str | Sequence[str] = field(default_factory=tuple)
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "trigger", self.trigger.strip())
        object.__setattr__(self, "classes", texts("classes", self.classes))
        if not self.trigger:
            raise LoHaError("trigger is empty; expected the word in the captions that stands for what is learned")
        if not self.classes or not all(self.classes):
            raise LoHaError("class is empty; expected what the trigger word is one of, such as 'dog'")
        if self.trigger in self.classes:
            raise LoHaError(f"trigger and class are both {self.trigger!r}; what is learned could not be told from it")
        check_number("weight", self.weight, above=0)

    def class_prompt(self, caption: str, generator: torch.Generator) -> str:
        """What is asked for in place of a caption; random by ``generator`` alone, and only among several classes."""
        place = int(torch.randint(len(self.classes), (), generator=generator)) if len(self.classes) > 1 else 0
        return self._of(caption, self.classes[place])

    def class_prompts(self, captions: Iterable[str]) -> list[str]:
        """All that `class_prompt` can give for these captions."""
        return list(dict.fromkeys(self._of(caption, word) for caption in captions for word in self.classes))

    def check(self, dataset: Dataset) -> None:
        """Refuse what has no captions to put the class into.

        Raises:
            LoHaError: a slider, conditionings in place of captions, or no caption with the trigger word.
        """
        if isinstance(dataset, SLIDERS):
            raise LoHaError("output preservation has no part in a slider, which has prompts to preserve of its own")
        for item in dataset.items:
            if item.conditioning is not None:
                name = item.name or "an item"
                raise LoHaError(f"output preservation needs captions, and {name} has a conditioning in place of one")
        captions = [
            dataset.captions.draw(item.caption, torch.Generator(), trigger=True)
            for item in dataset.items
            if not item.regularisation
        ]
        if captions and not any(map(self._pattern().search, captions)):
            raise LoHaError(
                f"no caption has the trigger word {self.trigger!r} that output preservation is to replace; the first "
                f"is {captions[0]!r:.80}. Write it into the captions, or set it as the data's trigger word"
            )

    def _of(self, caption: str, word: str) -> str:
        return self._pattern().sub(lambda _: word, caption) if self._pattern().search(caption) else word

    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?<!\w){re.escape(self.trigger)}(?!\w)")
