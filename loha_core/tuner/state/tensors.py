"""A model's adapters as state dicts, and its base's.

`LoHaModel.state_dict()` holds what is not the base's: adapters, modules that are saved whole, and what else trains. So
a checkpoint that a trainer makes of it is the adapter, whatever weights the base ties. `load_state_dict` misses nothing
of the base, and loads it where it is there. A module around the model (FSDP, DistributedDataParallel) has all of it in
its own state, as torch wants it. The base's: `get_base_model_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...adapter import WRAPPER
from ...errors import LoHaError
from ...formats import peft
from ..layer import LoHaLayer

_PARAMETERS = "|".join((*LoHaLayer.adapter_layer_names, *LoHaLayer.extra_parameter_names))
# A parameter of an adapter, or a tensor of a module that it saves whole.
_KEY = re.compile(
    rf"(?P<module>.*)\.(?:(?P<parameter>{_PARAMETERS})\.(?P<of>[^.]+)|modules_to_save\.(?P<by>[^.]+)\.(?P<rest>.+))"
)
# What other libraries put around a model, and what ours is called in it.
_AROUND = re.compile(r"\A(?:(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model)\.)*model\.")
_HIDDEN = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # in names, but not in state dicts
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:base_layer|original_module)\.")  # what we put between the base's names


class LoadResult(NamedTuple):
    """What did not fit: of the adapter, and of what was loaded."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def without_base(model: nn.Module, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Of the model's whole state, what is not the base's."""
    trained = {
        prefix + _HIDDEN.sub("", name) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return {key: value for key, value in state.items() if key in trained or _KEY.fullmatch(key)}


def of_adapters(keys: Iterable[str]) -> list[str]:
    """Those of a model's keys that are an adapter's."""
    return [key for key in keys if _KEY.fullmatch(key)]


# PEFT's functions


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names and in PEFT's shapes, as they are, and with those of modules_to_save.

    Args:
        model: a `LoHaModel`, or one that is wrapped (DistributedDataParallel, FSDP, torch.compile).
        state_dict: the model's, where somebody else has gathered it.
    """
    _adapted(model)._check_known([adapter_name])
    found: dict[str, Tensor] = {}
    for key, tensor in (model.state_dict() if state_dict is None else state_dict).items():
        if (match := _KEY.fullmatch(key)) and _is_of(match, adapter_name):
            name = f"{WRAPPER}{_peft_name(match)}"
            found[name] = peft.unsqueeze_conv1d(name, tensor)
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Fill an adapter that is there with what `get_peft_model_state_dict` gave, and say what did not fit.

    Args:
        low_cpu_mem_usage: the tensors themselves become the parameters, as those on the meta device need it.
    """
    adapted = _adapted(model)
    adapted._check_known([adapter_name])
    state = adapted.state_dict()
    own = {_peft_name(m): key for key in state if (m := _KEY.fullmatch(key)) and _is_of(m, adapter_name)}
    given = {key.removeprefix(WRAPPER): tensor for key, tensor in peft_model_state_dict.items()}
    # A Conv1d's core has an axis more there.
    fitting = {own[n]: t.squeeze(3) if t.dim() > state[own[n]].dim() else t for n, t in given.items() if n in own}
    adapted.load_state_dict(fitting, strict=False, assign=low_cpu_mem_usage)
    return LoadResult(
        [f"{WRAPPER}{name}" for name in own if name not in given],
        [f"{WRAPPER}{name}" for name in given if name not in own],
    )


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors under the names that they have without adapters."""
    state = _adapted(model).model.state_dict()
    return {_INSIDE.sub("", key): tensor for key, tensor in state.items() if not _KEY.fullmatch(key)}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """The inverse of `get_base_model_state_dict`.

    Raises:
        LoHaError: with ``strict``, keys that are missing or not known; nothing is loaded then.
    """
    base = _adapted(model).model
    own = {_INSIDE.sub("", key): key for key in base.state_dict() if not _KEY.fullmatch(key)}
    result = LoadResult([k for k in own if k not in state_dict], [k for k in state_dict if k not in own])
    if strict and any(result):
        raise LoHaError(f"the base model's state misses {result.missing_keys}, and has no {result.unexpected_keys}")
    base.load_state_dict({own[key]: tensor for key, tensor in state_dict.items() if key in own}, strict=False)
    return result


def _adapted(model: nn.Module) -> Any:
    found = next((module for module in model.modules() if hasattr(type(module), "loha_layers")), None)
    if found is None:
        raise LoHaError(f"{type(model).__name__} has no LoHaModel in it")
    return found


def _is_of(match: re.Match[str], adapter_name: str) -> bool:
    return adapter_name in (match["of"], match["by"])


def _peft_name(match: re.Match[str]) -> str:
    """Key of a model of ours -> name in PEFT's files, without their prefix."""
    return f"{_AROUND.sub('', match['module'], count=1)}.{match['parameter'] or match['rest']}"
