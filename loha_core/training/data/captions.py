"""How a caption varies from one time a picture is seen to the next."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...errors import check_number


@dataclass(frozen=True)
class Captions:
    """What happens to captions, which are tags separated by commas or sentences.

    Args:
        trigger: put in front of each caption that does not have it as a word already.
        shuffle: tags in another order each time.
        keep_tokens: so many tags from the start stay where they are and are never dropped; a trigger that was put in
            front stays in any case and does not count.
        caption_dropout: probability that the whole caption is replaced by "", trigger included. The model then also
            learns what it does without a prompt, which classifier-free guidance needs.
        tag_dropout: probability that a tag is left out. One that has the trigger is not.

    Raises:
        LoHaError: a probability outside 0…1, or keep_tokens below 0.

    >>> Captions("sks").draw("a cat", torch.Generator())
    'sks, a cat'
    """

    trigger: str = ""
    shuffle: bool = False
    keep_tokens: int = 0
    caption_dropout: float = 0.0
    tag_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("caption_dropout", "tag_dropout"):
            check_number(name, getattr(self, name), minimum=0, maximum=1)
        check_number("keep_tokens", self.keep_tokens, minimum=0, integer=True)
        object.__setattr__(self, "trigger", self.trigger.strip())

    def draw(self, caption: str, generator: torch.Generator, *, trigger: bool = True) -> str:
        """The caption as it is seen this time; random by ``generator`` alone.

        Args:
            caption: as it was given.
            trigger: False for regularisation pictures, which show the class without the thing that is learned.
        """
        if self.caption_dropout and _happens(self.caption_dropout, generator):
            return ""
        word = self.trigger if trigger else ""
        in_front = [word] if word and not _has(caption, word) else []
        if not (self.shuffle or self.tag_dropout):
            return ", ".join([*in_front, caption] if caption.strip() else in_front or [caption])
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        fixed, free = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.tag_dropout:
            free = [tag for tag in free if not _happens(self.tag_dropout, generator) or (word and _has(tag, word))]
        if self.shuffle:
            free = [free[place] for place in torch.randperm(len(free), generator=generator).tolist()]
        return ", ".join([*in_front, *fixed, *free])

    def all(self, caption: str, *, trigger: bool = True) -> list[str] | None:
        """Every form that `draw` can give the caption; None if shuffling or dropped tags make them too many to list."""
        if self.shuffle or self.tag_dropout:
            return None
        full = Captions(self.trigger).draw(caption, torch.Generator(), trigger=trigger)
        return [full, ""] if self.caption_dropout else [full]


def _happens(probability: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < probability


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
