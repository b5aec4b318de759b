"""Fields of schemas, and checks of what people type: a prompt that comes by the API may hold anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from loha_core import LoHaError
from loha_core.errors import check_choice

# Parts of a schema that older ComfyUI does not know; it goes without.
NEWER = {"search_aliases", "has_intermediate_output"} - {field.name for field in fields(io.Schema)}


# What the page calls an input where that is more than its id with spaces; ids never change.
SHOWN = {
    "at_once": "Pictures at once",
    "bound": "Limited by",
    "dtype": "Data type",
    "effective_conv": "Tucker convolutions",
    "init": "Initialisation",
    "lora_name": "LoHa file",
    "lora_plus": "LoRA+ ratio",
    "min_snr_gamma": "Min-SNR gamma",
    "names": "Names of layers",
    "rank_stabilized": "Rank-stabilised (rsLoRA)",
    "strength_clip": "Strength (CLIP)",
    "strength_model": "Strength (model)",
    "text_learning_rate": "Learning rate (text encoders)",
}
WORDS = {
    "cfg": "CFG",
    "clip": "CLIP",
    "conv": "convolution",
    "dora": "DoRA",
    "ema": "EMA",
    "grad": "gradient",
    "loha": "LoHa",
    "lora": "LoRA",
    "prev": "previous",
    "reg": "regularisation",
    "tucker": "Tucker",
    "vae": "VAE",
}


def schema(**parts: Any) -> io.Schema:
    """A node's schema, as far as this ComfyUI knows its parts, each input under a name for people."""
    for input_ in parts.get("inputs", ()):
        input_.display_name = input_.display_name or shown_name(input_.id)
    # What a node has shown is told again after a run of other nodes, as to a page that was reloaded meanwhile.
    parts["has_intermediate_output"] = parts.get("is_output_node", False)
    return io.Schema(**{name: part for name, part in parts.items() if name not in NEWER})


def shown_name(name: str) -> str:
    """What the page calls the input of this id."""
    text = SHOWN.get(name) or " ".join(WORDS.get(word, word) for word in name.split("_"))
    return text[0].upper() + text[1:]


def number(
    name: str, default: float, tooltip: str, minimum: float = 0, maximum: float = 1_000_000, **options: Any
) -> Any:
    """A field for an integer, or for any number if ``default`` is a float."""
    kind, convert = (io.Int, int) if isinstance(default, int) else (io.Float, float)
    return kind.Input(name, default=default, min=convert(minimum), max=convert(maximum), tooltip=tooltip, **options)


def switch(name: str, tooltip: str, *, default: bool = False, optional: bool = False) -> Any:
    return io.Boolean.Input(name, default=default, tooltip=tooltip, optional=optional)


def one_of(name: str, options: Iterable[str], tooltip: str, *, default: str = "", optional: bool = False) -> Any:
    """A choice; by default its first option."""
    names = list(options)
    return io.Combo.Input(name, options=names, default=default or names[0], tooltip=tooltip, optional=optional)


def choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    """What ``value`` stands for."""
    check_choice(name, value, choices)
    return choices[value]


def problems(*checks: Callable[[], object]) -> bool | str:
    """What `validate_inputs` answers: why a run would fail, as far as it is known before, or True."""
    found = []
    for check in checks:
        try:
            check()
        except LoHaError as error:
            found.append(str(error))
    return "\n".join(found) or True


def json_object(name: str, text: str, example: str) -> dict[str, Any]:
    """An object written as JSON; no text is an empty one."""
    try:
        value = json.loads(text) if text.strip() else {}
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise LoHaError(f"{name} is {text!r} ({error}); expected JSON such as {example}") from error
    return value
