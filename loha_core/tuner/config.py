"""What to adapt and how: PEFT's LoHaConfig, field by field, and a little beyond it."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import LoHaError, about, check_number
from ..factors import LoHaFactors
from ..formats import peft
from ..naming.patterns import checked, get_pattern_key, path_end

INITS = ("peft", "lycoris", "balanced")
PEFT_VERSION = "0.21.0"  # the release whose format is written
T = TypeVar("T")


class PeftType(str, Enum):
    """The kinds of adapter that a configuration can be of here."""

    LOHA = "LOHA"


class TaskType(str, Enum):
    """What a model is for. Classifiers' untrained heads are saved along (`get_peft_model`)."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# What PEFT's LoHa doesn't know; written only where it differs from the default.
_BEYOND_PEFT = ("rank_dropout_scale", "use_dora", "use_rslora", "use_scalar")


class UnknownArgument(LoHaError, TypeError):
    """What Python raises for an argument that a function does not have."""


def _arguments(cls: type[T]) -> type[T]:
    """Lets a dataclass take lora_alpha for alpha, and name unknown arguments in an error of ours."""
    init: Callable[..., None] = cls.__init__
    signature = inspect.signature(init)

    @wraps(init)
    def checked(self: T, *args: Any, lora_alpha: float | None = None, **values: Any) -> None:
        if unknown := [name for name in values if name not in signature.parameters]:
            known = ", ".join(list(signature.parameters)[1:])
            raise UnknownArgument(f"LoHaConfig has no field {', '.join(unknown)}; it has {known}")
        alpha = values.get("alpha", args[1] if len(args) > 1 else None)
        if None not in (alpha, lora_alpha) and alpha != lora_alpha:
            raise LoHaError(f"alpha is {alpha} and lora_alpha {lora_alpha}: two names of one number; give one")
        if lora_alpha is not None and len(args) < 2:
            values["alpha"] = lora_alpha
        init(self, *args, **values)

    other = inspect.Parameter("lora_alpha", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")
    checked.__signature__ = signature.replace(parameters=[*signature.parameters.values(), other])  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_arguments
@dataclass
class LoHaConfig:
    """Configuration of a `LoHaModel`.

    >>> config = LoHaConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    >>> config.alpha
    32

    Args:
        r: rank of each half; the update reaches rank r².
        alpha: numerator of the scale alpha / r. ``lora_alpha`` is accepted as another name for it.
        rank_dropout: probability to drop an output row of the update, in training.
        module_dropout: probability to drop a layer's whole update, in training.
        rank_dropout_scale: divide what rank dropout leaves by the share that it left, as PEFT does; LyCORIS' default
            is not to.
        use_effective_conv2d: Tucker factors for convolutions with a kernel above 1 (FedPara, prop. 3), over one, two
            or three axes.
        target_modules: names (matched whole or as the end of a path), a regular expression for the whole path,
            or "all-linear"; None takes the architecture's default.
        exclude_modules: names or a regular expression, as above.
        init_weights: True or "peft": Kaiming uniform and w2_b = 0, so that the update begins at zero; "lycoris":
            normal, std 0.1 and 1, and w2_a = 0; "balanced": normal, all about as large, and w2_a = 0, so that the first
            step moves the weight as far as a LoRA's of as many parameters (docs/recipes.md); False: as PEFT but
            random throughout, for tests.
        layers_to_transform: indices of the layers to adapt; needs ``target_modules`` to be a list.
        layers_pattern: name of the list of layers that those indices count, such as "layers" or "h".
        rank_pattern, alpha_pattern: name or regular expression of a path's end -> its rank or alpha; the first that
            matches counts.
        modules_to_save: names of modules to train and save whole.
        inference_mode: no parameter asks for gradients.
        use_dora: learn a magnitude along the output axis (True or "output") or the input axis ("input").
        use_rslora: scale alpha / √r.
        use_scalar: a learned factor of the update that begins at zero, as LyCORIS has it.
        peft_version: the release of PEFT that wrote a file; where none did, what is written is the release whose format
            it is.
        extra: fields of a configuration file that nobody here knows; kept and written back.

    Raises:
        LoHaError: a value that cannot be right; names the field.
    """

    is_prompt_learning: ClassVar[bool] = False  # PEFT's

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    inference_mode: bool = False
    task_type: TaskType | str | None = None
    revision: str | None = None
    base_model_name_or_path: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_type: PeftType = PeftType.LOHA
    peft_version: str | None = None
    rank_dropout_scale: bool = True
    use_dora: bool | str = False
    use_rslora: bool = False
    use_scalar: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._normalise()
        self._check()

    def _normalise(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(getattr(self, name), (tuple, range)):
                setattr(self, name, list(getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise LoHaError(f"{name} is {value!r}; expected pattern: number pairs")
            setattr(self, name, dict(value or {}))

    def _check(self) -> None:
        check_number("r", self.r, minimum=1, integer=True)
        check_number("alpha", self.alpha)
        for name in ("rank_dropout", "module_dropout"):
            check_number(name, getattr(self, name), minimum=0, below=1)
        for name in ("use_effective_conv2d", "inference_mode", "rank_dropout_scale", "use_rslora", "use_scalar"):
            if not isinstance(getattr(self, name), bool):
                raise LoHaError(f"{name} is {getattr(self, name)!r}; expected True or False")
        self._check_names()
        if not isinstance(self.init_weights, bool) and self.init_weights not in INITS:
            raise LoHaError(f"init_weights is {self.init_weights!r}; expected True, False or one of {INITS}")
        if not isinstance(self.use_dora, bool) and self.use_dora not in ("output", "input"):
            raise LoHaError(f"use_dora is {self.use_dora!r}; expected True, False, 'output' or 'input'")
        # Enums of other libraries are strings with a value.
        kind, task = (getattr(value, "value", value) for value in (self.peft_type, self.task_type))
        if kind != PeftType.LOHA:
            raise LoHaError(f"peft_type is {kind!r}; this is a configuration of LOHA")
        if task is not None and task not in list(TaskType):
            tasks = ", ".join(TaskType)
            raise LoHaError(f"Invalid task type: {task!r}. Must be one of the following task types: {tasks}.")
        self.peft_type, self.task_type = PeftType.LOHA, None if task is None else TaskType(task)
        self._check_layers()
        for name, is_rank in (("rank_pattern", True), ("alpha_pattern", False)):
            for pattern, number in getattr(self, name).items():
                with about(name):
                    path_end(pattern)
                check_number(f"{name}[{pattern!r}]", number, minimum=1 if is_rank else None, integer=is_rank)

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            entries = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(entry, str) for entry in entries):
                raise LoHaError(f"{name} is {value!r}; expected a list of names, or a string")
            with about(name):
                if name in ("layers_pattern", "modules_to_save"):
                    [(numbered if name == "layers_pattern" else within)(entry) for entry in entries]
                elif isinstance(value, str):  # lists of targets hold names
                    checked(value)
        if isinstance(self.modules_to_save, str):
            raise LoHaError(f"modules_to_save is the string {self.modules_to_save!r}; expected a list of names")

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, list) else [] if layers is None else [layers]:
            check_number("an index of layers_to_transform", index, minimum=0, integer=True)
        if self.layers_pattern and layers is None:
            raise LoHaError("layers_pattern says what layers_to_transform counts; give layers_to_transform too")
        if layers is not None and isinstance(self.target_modules, str):
            raise LoHaError("layers_to_transform needs target_modules to be a list; put the indices into the pattern")

    def resolved(self, module: str) -> tuple[int, float]:
        """(rank, alpha) of a module, by the first pattern that matches the end of its path."""
        rank = self.rank_pattern.get(get_pattern_key(self.rank_pattern, module), self.r)
        return rank, self.alpha_pattern.get(get_pattern_key(self.alpha_pattern, module), self.alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """What multiplies M₁∘M₂."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def describing(self, layers: Mapping[str, LoHaFactors]) -> LoHaConfig:
        """A copy whose targets, ranks and alphas are those of these layers."""
        config = copy.deepcopy(self)
        ranks, alphas = Counter(f.rank for f in layers.values()), Counter(f.alpha for f in layers.values())
        # Longest name first: the first pattern that matches the end of a name counts.
        ordered = sorted(layers, key=len, reverse=True)
        config.r, config.alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
        config.rank_pattern = {n: layers[n].rank for n in ordered} if len(ranks) > 1 else {}
        config.alpha_pattern = {n: layers[n].alpha for n in ordered} if len(alphas) > 1 else {}
        config.target_modules = sorted(layers)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.use_effective_conv2d = any(f.is_tucker for f in layers.values())
        config.use_dora = any(f.dora_scale is not None for f in layers.values())
        config.use_rslora = config.use_scalar = False  # factors have both in alpha and w1_a
        return config

    def to_dict(self) -> dict[str, Any]:
        """As `adapter_config.json` has it: PEFT's fields always, others where they are not the default."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        for name in _BEYOND_PEFT:
            if values[name] == type(self).__dataclass_fields__[name].default:
                del values[name]
        if isinstance(values["init_weights"], str):
            # How weights began is history once they are saved, and PEFT expects a bool.
            values["init_weights"] = True
        values["peft_version"] = self.peft_version or PEFT_VERSION
        return self.extra | {name: getattr(value, "value", value) for name, value in values.items()}

    @classmethod
    def of(cls, config: Any) -> LoHaConfig:
        """``config`` itself, or the same as PEFT's LoHaConfig says it.

        Raises:
            LoHaError: a configuration of another kind of adapter, or none at all.
        """
        if isinstance(config, cls):
            return config
        kind = getattr(config, "peft_type", None)
        if getattr(kind, "value", kind) != PeftType.LOHA or not hasattr(config, "to_dict"):
            raise LoHaError(
                f"{type(config).__name__} is no configuration of LoHa; expected a LoHaConfig, ours or PEFT's"
            )
        return cls.from_dict(config.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoHaConfig:
        """The inverse of `to_dict`; fields that are not known go to ``extra``."""
        known = {f.name for f in fields(cls)} - {"extra"} | {"lora_alpha"}
        mine = {name: value for name, value in values.items() if name in known}
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**mine, extra=extra)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if it is not there."""
        path = Path(save_directory)
        if os.path.isfile(path):
            raise LoHaError(f"{path} is a file; expected a folder")
        peft.write_folders({path: peft.Folder(self.to_dict())})

    @classmethod
    def from_pretrained(cls, path: str | Path, **changes: Any) -> LoHaConfig:
        """Read ``adapter_config.json`` from a folder, or the file itself; ``changes`` replace its values."""
        path = Path(path)
        file = path / peft.CONFIG_NAME if os.path.isdir(path) else path
        with about(file):
            values = peft.read_config(file)
            if "peft_type" not in values:
                raise UnknownArgument(
                    f"The {cls.__name__} config that is trying to be loaded is missing required keys: "
                    '{\'peft_type\'}. It is no adapter\'s; write "peft_type": "LOHA" into it if it is'
                )
            return cls.from_dict(values | changes)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """The fields of a configuration file, as they are there, but for what belonged to one run only."""
        values = peft.read_config(Path(path_json_file))
        return {name: value for name, value in values.items() if name != "runtime_config"}


def within(saved: str) -> re.Pattern[str]:
    """What matches the path of a module that modules_to_save means, or of one within it, as in PEFT."""
    return checked(rf"(^|.*\.){saved}($|\..*)")


def numbered(layers: str) -> re.Pattern[str]:
    """What matches a path with the list of layers that layers_pattern means; its group is the layer's index."""
    return checked(rf"(?:^|.*?\.){layers}\.(?P<index>\d+)\.")
