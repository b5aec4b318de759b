"""What the widget of LoHa Block Strength draws."""

from __future__ import annotations

import re
from typing import Any

from loha_core.blocks import LAYOUTS, BlockStrength, Layout
from loha_core.naming.tables import FAMILIES as TABLES

AUTO = "auto"
# What `spell` writes of a model that is not in FAMILIES: its family if it has one, and its parts by the names of a
# family's parts or of the model's lists.
_PARTS = {part for layout in LAYOUTS.values() for part, _ in layout.parts}
_PARTS |= {part for table in TABLES.values() for part, _ in table.blocks}
_COUNT = rf"(?:{'|'.join(sorted(_PARTS))}|\w{{0,40}}(?:blocks|layers)):[1-9]\d{{0,2}}"
_SPELLED = re.compile(rf"(?:({'|'.join(map(re.escape, TABLES))})/)?({_COUNT}(?:,{_COUNT}){{0,15}})")


def spell(layout: Layout) -> str:
    """One of FAMILIES by its name; of other models the parts, as in 'blocks:30,layers:4' or 'Flux/D:4,S:8'."""
    if LAYOUTS.get(layout.family) == layout:
        return layout.family
    parts = ",".join(f"{part}:{count}" for part, count in layout.parts)
    return f"{layout.family}/{parts}" if layout.family in TABLES else parts


def bars(family: str, preset: str, vector: str) -> dict[str, Any]:
    """What the widget draws for these inputs.

    Args:
        family: "auto", one of FAMILIES, or what `spell` writes.

    Returns:
        family: whose blocks these are, or None; values: block -> multiplier; start: the same for the preset alone, or
        None where numbers replace it; listed: what each number of the vector stands for, or None.

    Raises:
        LoHaError: says what cannot be understood.
    """
    known: str | Layout | None = None if family == AUTO else family
    if spelled := _SPELLED.fullmatch(family):
        counts = (entry.partition(":") for entry in spelled[2].split(","))
        known = Layout.of_parts(((part, int(count)) for part, _, count in counts), spelled[1] or "")
    blocks = BlockStrength.parse(known, vector, preset=preset)
    answer: dict[str, Any] = {
        "family": blocks.layout and blocks.layout.family,
        "values": blocks.table(),
        "start": None,
        "listed": None,
    }
    if blocks.layout and vector.strip() and "=" not in vector:
        count = vector.rpartition(":")[2].strip().strip(",").count(",") + 1
        answer["listed"] = next(labels for labels in blocks.layout.vectors() if len(labels) == count)
    else:
        answer["start"] = BlockStrength.parse(known, preset=preset).table()
    return answer
