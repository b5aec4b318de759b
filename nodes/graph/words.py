"""The trigger words of adapters, for the prompt: from the file's metadata, or the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from loha_core import Adapter
from loha_core.formats import describe

from .inputs import number

DEFAULT_COUNT = 5


def word_inputs() -> list[Any]:
    return [
        number(
            "max_trigger_words",
            DEFAULT_COUNT,
            "How many trigger words are given out, at most, for each adapter: the first of the phrase that the trainer "
            "wrote into the file or, without one, the most frequent tags of its captions.",
            maximum=1000,
            optional=True,
        ),
        io.String.Input(
            "trigger_words",
            default="",
            optional=True,
            placeholder="those of the file",
            tooltip="Your own trigger words, given out in place of those of the file. Empty: those of the file.",
        ),
    ]


def words_output() -> Any:
    return io.String.Output(
        display_name="trigger_words",
        tooltip="The adapter's trigger words with commas between them, for the prompt; empty where the file has none.",
    )


def joined(adapters: Iterable[Adapter], count: int, own: str) -> str:
    """The user's ``own`` words or, without any, at most ``count`` of each adapter, none of them twice."""
    if own.strip():
        return own.strip()
    return ", ".join(dict.fromkeys(word for adapter in adapters for word in _words(adapter, count)))


def _words(adapter: Adapter, count: int) -> list[str]:
    # A file's own words may hold line breaks and control sequences.
    words = (describe.printable(" ".join(word.split())) for word in describe.trigger_words(adapter, count))
    return list(filter(None, words))[:count]
