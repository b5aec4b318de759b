"""Which modules of a model a configuration means, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import LoHaError
from .config import LoHaConfig, numbered, within

# Default targets -> the architectures (transformers' model_type) that have them.
_DEFAULTS: dict[tuple[str, ...] | str, str] = {
    ("q_proj", "v_proj"): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm "
    "gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
}

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    architecture: targets if isinstance(targets, str) else list(targets)
    for targets, architectures in _DEFAULTS.items()
    for architecture in architectures.split()
}

ALL_LINEAR = "all-linear"
_CLASSIFIER_HEADS = ("score", "classifier")
# Task -> heads that such a model gets anew, so that training them is part of the task.
UNTRAINED_HEADS = {"SEQ_CLS": _CLASSIFIER_HEADS, "TOKEN_CLS": _CLASSIFIER_HEADS, "QUESTION_ANS": ("qa_outputs",)}


def model_type(model: nn.Module) -> str | None:
    """What the model calls its architecture, as transformers does; None if it doesn't."""
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)


def default_targets(model: nn.Module) -> list[str] | str:
    """Raises LoHaError for an architecture that the table does not have."""
    architecture = model_type(model)
    if architecture not in DEFAULT_TARGETS:
        known = f"the architecture {architecture!r} has" if architecture else "a model without config.model_type has"
        raise LoHaError(f"{known} no default targets; pass target_modules (names, a pattern or 'all-linear')")
    return DEFAULT_TARGETS[architecture]


def all_linear(model: nn.Module, config: LoHaConfig) -> list[str]:
    """Every linear layer but the head, and but those whose weights nn.MultiheadAttention reads."""
    unused = [_head(model, config.task_type)]
    unused += [module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return [n for n, m in modules(model) if _is_linear(m) and not any(m is other for other in unused)]


def _head(model: nn.Module, task: str | None) -> Any:
    """The output embeddings, or a sequence classifier's head."""
    try:
        # diffusers' models have no such method, and some of transformers' refuse it.
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if head is None and task == "SEQ_CLS":
        head = next((h for name in _CLASSIFIER_HEADS if (h := getattr(model, name, None)) is not None), None)
    return head


def _is_linear(module: nn.Module) -> bool:
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) or is_transformers_conv1d(base)


def is_transformers_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out). Told by its name, since transformers is not imported here."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and not isinstance(module, nn.Conv1d)


def is_excluded(config: LoHaConfig, name: str) -> bool:
    """By exclude_modules, or because modules_to_save trains it whole."""
    if config.exclude_modules and _matches(config.exclude_modules, name):
        return True
    return any(within(saved).match(name) for saved in config.modules_to_save or ())


def is_target(config: LoHaConfig, name: str) -> bool:
    """Whether a configuration, whose target_modules are resolved, means the module ``name``."""
    targets = config.target_modules or []
    if is_excluded(config, name):
        return False
    if isinstance(targets, str) or name in targets:
        return _matches(targets, name)
    return _matches(targets, name) and _is_chosen_layer(config, name)


def _matches(targets: str | Iterable[str], name: str) -> bool:
    """A string is a regular expression for the whole name; a list has whole names or ends of them."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in targets)


def _is_chosen_layer(config: LoHaConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    if patterns := config.layers_pattern or []:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        match = next((match for pattern in patterns if (match := numbered(pattern).match(name))), None)
    else:
        # The first number in the path is the layer's; a later one may be an expert's.
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", name)
    if match is None:
        return False
    index = int(match["index"])
    return index in layers if isinstance(layers, list) else index == layers


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named modules, without the insides of adapters that are there already."""
    named = list(model.named_modules())
    inside = tuple(f"{n}." for n, m in named if hasattr(m, "hada_w1_a") or hasattr(m, "modules_to_save"))
    return [(n, m) for n, m in named if n and not n.startswith(inside)]


def select(model: nn.Module, config: LoHaConfig) -> list[str]:
    """Names of the modules to adapt, in the model's order. Resolves ``config.target_modules`` in place.

    Raises:
        LoHaError: nothing matches; says what was looked for.
    """
    if config.target_modules is None:
        config.target_modules = default_targets(model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = all_linear(model, config)
    names = [name for name, _ in modules(model) if is_target(config, name)]
    if not names:
        limits = {
            key: value
            for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
            if (value := getattr(config, key)) is not None
        }
        within = f" within {limits}" if limits else ""
        some = ", ".join([n for n, m in model.named_modules() if n and not list(m.children())][:6])
        raise LoHaError(f"target_modules {config.target_modules!r} match nothing{within}. The model has {some}, …")
    return names
