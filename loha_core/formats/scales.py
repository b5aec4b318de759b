"""Where alpha comes from in a file that holds no alpha tensors: from adapter_config.json beside it, from what diffusers
writes into the header, or from kohya's metadata. Where none of them says, the reader takes scale 1 and notes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from time import monotonic
from typing import Any

from ..adapter import WRAPPER
from ..errors import LoHaError, about, check_number
from ..naming import names
from ..naming.patterns import path_end

DIFFUSERS = "lora_adapter_metadata"
_UNSAID = object()
_MAX_SECONDS = 20.0  # for all patterns of a file; those of thousands of layers take one or two

AlphaOf = Callable[[str, int], float | None]
"""(module as the file spells it, rank) -> alpha, or None where nothing says."""


def alpha_of(metadata: Mapping[str, str], config: Mapping[str, Any] | None = None) -> AlphaOf:
    """Asks ``config`` (an adapter_config.json's content) first, then the header's metadata."""
    configured = _configured(config or {}, "adapter_config.json")
    diffusers = _packed(_object(metadata.get(DIFFUSERS)))
    kohya = _kohya(metadata)

    def alpha(module: str, rank: int) -> float | None:
        value = configured(module.removeprefix(WRAPPER))
        value = diffusers(module) if value is None else value
        return kohya(module, rank) if value is None else value

    return alpha


# --- PEFT's configuration, as a file or in diffusers' metadata -------------------------------------------------------


def _configured(config: Mapping[str, Any], where: str) -> Callable[[str], float | None]:
    """``alpha_pattern`` first, as PEFT's ``get_pattern_key``: the pattern that is the name or its end at a dot."""
    default = config.get("alpha", config.get("lora_alpha", _UNSAID))
    seconds = 0.0

    @cache
    def patterns() -> list[tuple[re.Pattern[str], Any]]:
        given = config.get("alpha_pattern") or {}
        if not isinstance(given, dict):
            raise LoHaError(f"alpha_pattern is {type(given).__name__}; expected an object of pattern: number")
        with about("alpha_pattern"):
            return [(path_end(pattern), value) for pattern, value in given.items()]

    def alpha(module: str) -> float | None:
        nonlocal seconds
        with about(where):
            value, start = default, monotonic()
            for pattern, number in patterns():
                if pattern.match(module):
                    value = number
                    break
                if seconds + monotonic() - start > _MAX_SECONDS:
                    raise LoHaError("alpha_pattern takes too long to match; use fewer or simpler patterns")
            seconds += monotonic() - start
            if value is _UNSAID:
                return None
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise LoHaError(f"alpha_pattern or alpha gives {module} a value that is no number ({error})") from error
            check_number("alpha", number)
            return number

    return alpha


def _packed(config: Mapping[str, Any]) -> Callable[[str], float | None]:
    """diffusers packs the configuration of each network under its name: ``transformer.alpha``, ``unet.r``, …

    ``save_lora_adapter``, which saves one network, writes them without a name in front.
    """
    parts: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        network, dot, field = key.rpartition(".")
        parts.setdefault(network + dot, {})[field] = value
    networks = {
        network: _configured(part, DIFFUSERS)
        for network, part in sorted(parts.items(), key=lambda item: -len(item[0]))
        if "alpha" in part or "lora_alpha" in part
    }

    def alpha(module: str) -> float | None:
        network = next((network for network in networks if module.startswith(network)), None)
        return None if network is None else networks[network](module.removeprefix(network).removeprefix(WRAPPER))

    return alpha


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
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """Metadata has numbers as text; "Dynamic" and "None" are none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
