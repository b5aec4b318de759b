"""Where alpha comes from in a file that holds no alpha tensors: from adapter_config.json beside it, from what diffusers
writes into the header, or from kohya's metadata. Where none of them says, the reader takes scale 1 and notes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..adapter import WRAPPER
from ..errors import LoHaError
from ..naming import names

CONFIG = "adapter_config.json"
DIFFUSERS = "lora_adapter_metadata"
_MAX_CONFIG_BYTES = 10_000_000

_UNSAID = object()

AlphaOf = Callable[[str, int], float | None]
"""(module as the file spells it, rank) -> alpha, or None where nothing says."""


def alpha_of(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> AlphaOf:
    """Asks ``config`` (an adapter_config.json's content) first, then the header's metadata."""
    packed = _object(metadata.get(DIFFUSERS))
    kohya = _kohya(metadata)

    def alpha(module: str, rank: int) -> float | None:
        found = None if config is None else _configured(config, module.removeprefix(WRAPPER))
        found = _packed(packed, module) if found is None else found
        return kohya(module, rank) if found is None else found

    return alpha


# --- PEFT's configuration, as a file or in diffusers' metadata -------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Raises:
        LoHaError: it is no JSON object, or of another kind of adapter.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise LoHaError(f"{path}: {path.stat().st_size} bytes is no adapter configuration")
        # From bytes, json finds out the encoding: editors write byte-order marks, PowerShell UTF-16.
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, LoHaError):
            raise
        raise LoHaError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise LoHaError(f"{path}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type", "LOHA")
    if kind != "LOHA":
        raise LoHaError(f"{path}: peft_type is {kind}, not LOHA; load it with a loader for that kind of adapter")
    return config


def config_beside(path: Path) -> dict[str, Any] | None:
    """What adapter_config.json in the file's folder says, or None where there is none."""
    return read_config(path.parent / CONFIG) if os.path.isfile(path.parent / CONFIG) else None


def _configured(config: Mapping[str, Any], module: str, where: str = CONFIG) -> float | None:
    """``alpha_pattern`` first, as PEFT's ``get_pattern_key``: the pattern that is the name or its end at a dot."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise LoHaError(f"{where}: alpha_pattern is {type(patterns).__name__}; expected an object of pattern: number")
    for pattern in patterns:
        _check_terminates(pattern, where)
    default = config.get("alpha", config.get("lora_alpha", _UNSAID))
    try:
        value = next((v for p, v in patterns.items() if names.pattern_matches(p, module)), default)
    except (re.error, RecursionError, OverflowError) as error:
        raise LoHaError(f"{where}: alpha_pattern holds a pattern that is no regular expression ({error})") from error
    if value is _UNSAID:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LoHaError(
            f"{where}: alpha_pattern or alpha gives {module} a value that is no number ({error})"
        ) from error


def _check_terminates(pattern: str, where: str) -> None:
    """Refuse patterns whose matching can take forever: a file must not hang the reader.

    Repeated groups backtrack exponentially, and k repetitions of single characters take up to n^k steps.
    """
    if len(pattern) > 1000 or re.search(r"\)\s*[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise LoHaError(f"{where}: the pattern {pattern[:80]!r} is too long or repeats too much to be matched safely")


def _packed(packed: Mapping[str, Any], module: str) -> float | None:
    """diffusers packs the configuration of each network under its name: ``transformer.alpha``, ``unet.r``, …

    ``save_lora_adapter``, which saves one network, writes them without a name in front.
    """
    leads = {key.rpartition(".")[0] for key in packed if key.rpartition(".")[2] in ("alpha", "lora_alpha")}
    lead = max((lead for lead in leads if not lead or module.startswith(f"{lead}.")), key=len, default=None)
    if lead is None:
        return None
    start = f"{lead}." if lead else ""
    config = {key.removeprefix(start): value for key, value in packed.items() if key.startswith(start)}
    return _configured(config, module.removeprefix(start).removeprefix(WRAPPER), DIFFUSERS)


# --- kohya's metadata ------------------------------------------------------------------------------------------------


def _kohya(metadata: Mapping[str, str]) -> AlphaOf:
    """``ss_network_alpha``, or LyCORIS' ``conv_alpha`` for layers of ``conv_dim``; only where the rank agrees."""
    arguments = _object(metadata.get("ss_network_args"))
    linear = _number(metadata.get("ss_network_dim")), _number(metadata.get("ss_network_alpha"))
    conv = _number(arguments.get("conv_dim")), _number(arguments.get("conv_alpha"))

    def alpha(module: str, rank: int) -> float | None:
        # Both ranks may be the same; then the kind of layer decides.
        order = (conv, linear) if names.kind_of(module) == "convolution" else (linear, conv)
        return next((alpha for dim, alpha in order if dim == rank and alpha is not None), None)

    return alpha


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object in metadata; {} for what is none: metadata is free text, and may be anything."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float | None:
    """Metadata has numbers as text; "Dynamic" and "None" are none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
