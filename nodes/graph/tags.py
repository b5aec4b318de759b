"""<lora:name:strength:clip> in a prompt: read, written, and which adapter such a name stands for.

A1111's syntax, with ComfyUI's order of the two strengths: the model's first.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

from loha_core import LoHaError
from loha_core.errors import about
from loha_core.formats.container import SUFFIXES

EXAMPLE = "<lora:name:0.8>, <lora:name:0.8:0.6> (model, text encoders) or <lora:name:unet=0.8:te=0.6>"
_BEGIN = r"<(?:lora|lyco):"
_TAG = rf"{_BEGIN}[^<>]*>"
_LEVELS = 4  # how many forms a name has
_KEYWORDS = {"unet": 0, "te": 1}
# Tags and what parts them. A run that is a whole item of a list takes the comma before it along.
_RUN = re.compile(
    rf"(?:,\s*)?{_TAG}(?:[\s,]*{_TAG})*(?=\s*(?:,|$))|(?<![ \t])[ \t]*{_TAG}(?:[ \t]*{_TAG})*", re.IGNORECASE
)


class Tag(NamedTuple):
    name: str
    strength_model: float
    strength_clip: float


def read(text: str) -> tuple[str, list[Tag]]:
    """A prompt without its tags, and these in order; of text without tags nothing changes.

    >>> read("a cat <lora:style:0.8:0.5>, <lyco:anna> on a mat")
    ('a cat, on a mat', [Tag(name='style', strength_model=0.8, strength_clip=0.5), Tag(name='anna', ...)])

    Raises:
        LoHaError: a tag without an end, without a name, or with something else than strengths; says which.
    """
    tags = [_read(tag) for tag in re.findall(_TAG, text, re.IGNORECASE)]
    if broken := re.search(_BEGIN, re.sub(_TAG, "", text, flags=re.IGNORECASE), re.IGNORECASE):
        rest = broken.string[broken.start() :]
        raise LoHaError(f"text has a tag without its '>': {rest:.80}; write {EXAMPLE}")
    if not tags:
        return text, []
    return _RUN.sub("", text).strip().removeprefix(",").lstrip(), tags


def _read(tag: str) -> Tag:
    with about(tag[:200]):
        name, *settings = (part.strip() for part in tag[1:-1].split(":")[1:])
        if not name:
            raise LoHaError(f"a tag without a name; write {EXAMPLE}")
        strengths: list[float | None] = [None, None]
        for place, setting in enumerate(settings):
            key, is_named, value = setting.rpartition("=")
            at = _KEYWORDS.get(key.strip().lower(), 2) if is_named else place
            if at > 1 or not math.isfinite(number := _number(value)):
                raise LoHaError(
                    f"{setting!r} is neither of the two strengths; write {EXAMPLE}. Strengths by block come from "
                    "LoHa Block Strength, and by time from LoHa Schedule"
                )
            strengths[at] = number
    # As in A1111: te= alone counts for both, unet= alone leaves the text encoders at 1.
    model = next(strength for strength in (*strengths, 1.0) if strength is not None)
    alone = model if settings and "=" not in settings[0] else 1.0
    return Tag(name, model, alone if strengths[1] is None else strengths[1])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


class Names:
    """The adapters that tags can mean: with or without extension and folder, letters' case as a last resort.

    Args:
        names: as the file list has them, with "/" or the system's separator.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._by_form: dict[tuple[int, str], list[str]] = defaultdict(list)
        for name in self._names:
            for level, form in enumerate(_forms(name)):
                self._by_form[level, form].append(name)
                self._by_form[level + _LEVELS, form.casefold()].append(name)

    def find(self, wanted: str) -> str | None:
        """The adapter that a tag's name stands for; None if there is none.

        Raises:
            LoHaError: several would fit equally well; names them.
        """
        found = self._fitting(wanted)
        if len(found) > 1:
            raise LoHaError(f"{wanted!r} may be {', '.join(found[:8])}; write the folder or the extension, too")
        return found[0] if found else None

    def _fitting(self, wanted: str) -> list[str]:
        form = wanted.replace("\\", "/")
        exact = (self._by_form.get((level, form), []) for level in range(_LEVELS))
        folded = (self._by_form.get((level, form.casefold()), []) for level in range(_LEVELS, 2 * _LEVELS))
        return next(filter(None, (*exact, *folded)), [])

    def nearest(self, wanted: str) -> list[str]:
        """Up to three adapters whose names look like this one."""
        stems = defaultdict(list)
        for name in self._names:
            stems[_forms(name)[-1].casefold()].append(name)
        near = get_close_matches(_forms(wanted)[-1].casefold(), stems, 3, 0.5)
        return [name for stem in near for name in stems[stem]][:3]

    def write(self, name: str, strength_model: float, strength_clip: float) -> str | None:
        """The shortest tag that is read as this adapter; None if no tag can hold its name."""
        strengths = [repr(strength).removesuffix(".0") for strength in (strength_model, strength_clip)]
        if strength_model == strength_clip:
            strengths.pop()
        # A list from another pack may hold what is not here, by names of its own.
        is_here = name in self._names
        for form in reversed(_forms(name)) if is_here else (name,):
            tag = f"<lora:{':'.join([form, *strengths])}>"
            if self._fitting(form) == [name] * is_here and _holds(tag, form):
                return tag
        return None


def _holds(tag: str, name: str) -> bool:
    try:
        return [found.name for found in read(tag)[1]] == [name]
    except LoHaError:
        return False


def _forms(name: str) -> tuple[str, str, str, str]:
    """How a tag may name an adapter, from the most exact: path, path without extension, and both without folder."""
    path = name.replace("\\", "/")
    suffix = next((suffix for suffix in SUFFIXES if path.lower().endswith(suffix)), "")
    stem = path[: len(path) - len(suffix)]
    return path, stem, path.rpartition("/")[2], stem.rpartition("/")[2]
