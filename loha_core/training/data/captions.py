"""How a caption varies from one time a picture is seen to the next."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ...errors import LoHaError


@dataclass(frozen=True)
class Captions:
    """What happens to captions, which are tags separated by commas or sentences.

    Args:
        trigger: put in front of each caption that does not have it as a word already.
        shuffle: tags in another order each time.
        keep_tokens: so many tags from the start stay where they are and are never dropped; a trigger that was put in
            front stays in any case and does not count.
        dropout: how often the whole caption is replaced by "", trigger included, in 0…1. The model then also learns
            what it does without a prompt, which classifier-free guidance needs.
        tag_dropout: how often each tag is left out, in 0…1. One that has the trigger is not.

    Raises:
        LoHaError: a share outside 0…1, or keep_tokens below 0.

    >>> Captions("sks").draw("a cat", torch.Generator())
    'sks, a cat'
    """

    trigger: str = ""
    shuffle: bool = False
    keep_tokens: int = 0
    dropout: float = 0.0
    tag_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "tag_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise LoHaError(
                    f"{name} is a share of times, from 0 (never) to 1 (always); found {getattr(self, name)}"
                )
        if self.keep_tokens < 0:
            raise LoHaError(f"keep_tokens is a number of tags, 0 or more; found {self.keep_tokens}")
        object.__setattr__(self, "trigger", self.trigger.strip())

    def draw(self, caption: str, generator: torch.Generator, *, trigger: bool = True) -> str:
        """The caption as it is seen this time; all chance comes from ``generator``.

        Args:
            caption: as it was given.
            trigger: False for regularisation pictures, which show the class without the thing that is learned.
        """
        if self.dropout and _chance(self.dropout, generator):
            return ""
        word = self.trigger if trigger else ""
        in_front = [word] if word and not _has(caption, word) else []
        if not (self.shuffle or self.tag_dropout):
            return ", ".join([*in_front, caption] if caption.strip() else in_front or [caption])
        tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
        fixed, rest = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.tag_dropout:
            rest = [tag for tag in rest if not _chance(self.tag_dropout, generator) or (word and _has(tag, word))]
        if self.shuffle:
            rest = [rest[place] for place in torch.randperm(len(rest), generator=generator).tolist()]
        return ", ".join([*in_front, *fixed, *rest])

    def all(self, caption: str, *, trigger: bool = True) -> list[str] | None:
        """Every form that `draw` can give the caption; None if shuffling or dropped tags make them too many to list."""
        if self.shuffle or self.tag_dropout:
            return None
        whole = Captions(self.trigger).draw(caption, torch.Generator(), trigger=trigger)
        return [whole, ""] if self.dropout else [whole]


def _chance(share: float, generator: torch.Generator) -> bool:
    return torch.rand((), generator=generator).item() < share


def _has(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
