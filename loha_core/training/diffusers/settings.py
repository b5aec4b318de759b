"""The file that ``loha train`` takes: TOML tables to settings. Unknown tables and keys are errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import LoHaError, about, check_choice, check_number
from ...tuner.config import LoHaConfig
from ..config import TrainingConfig
from ..data.captions import Captions
from ..data.pictures import Sizes
from ..objectives import Objective
from ..optimizers import OptimizerConfig

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["lycoris", "peft"]


@dataclass(frozen=True)
class ModelSettings:
    """``[model]``

    Attributes:
        path: a diffusers folder, with model_index.json.
        component: another folder for the UNet or transformer alone, such as a fine-tuned one; "" takes the pipeline's.
        dtype: of the frozen weights.
    """

    path: str = ""
    component: str = ""
    dtype: Dtype = "fp32"

    def __post_init__(self) -> None:
        _check_given("path", self.path)
        check_choice("dtype", self.dtype, get_args(Dtype))


@dataclass(frozen=True)
class DataSettings:
    """``[data]``, beside `Sizes` and `Captions`; see `read_folder`, too.

    Attributes:
        folder: pictures with captions beside them.
        masks: a folder with a mask for each picture; "" has none.
        flip: mirror a picture half of the time.
        repeats: how often each picture is seen in an epoch, times what its folder's name says.
        regularisation, regularisation_weight: a folder for prior preservation, and its factor in the loss.
    """

    folder: str = ""
    masks: str = ""
    flip: bool = False
    repeats: int = 1
    regularisation: str = ""
    regularisation_weight: float = 1.0

    def __post_init__(self) -> None:
        _check_given("folder", self.folder)
        check_number("repeats", self.repeats, minimum=1, integer=True)


@dataclass(frozen=True)
class RunSettings:
    """``[training]``, beside `TrainingConfig` and `Objective`.

    Attributes:
        epochs: in place of steps; 0 is off.
        batch_size: pictures in a batch, of all processes together.
        text_encoders: train these, too.
        gradient_checkpointing: less memory for more time.
    """

    epochs: int = 0
    batch_size: int = 1
    text_encoders: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, minimum=0, integer=True)
        check_number("batch_size", self.batch_size, minimum=1, integer=True)


@dataclass(frozen=True)
class OutputSettings:
    """``[output]``

    Attributes:
        folder: for the adapters, the state of the run and its losses.
        name: of the adapter's file.
        format: "lycoris" (one file) or "peft" (a folder).
        dtype: of the saved factors.
        resume: go on if the folder has a run's state; otherwise begin, and write over it.
    """

    folder: str = ""
    name: str = "loha"
    format: Format = "lycoris"
    dtype: Dtype = "fp32"
    resume: bool = True

    def __post_init__(self) -> None:
        _check_given("folder", self.folder)
        check_choice("format", self.format, get_args(Format))
        check_choice("dtype", self.dtype, get_args(Dtype))
        if not re.fullmatch(r"\w[\w .()+-]*", self.name):
            raise LoHaError(f"name is {self.name!r}; expected a file's name without its folder and ending")


@dataclass(frozen=True)
class Settings:
    """All tables of the file.

    Attributes:
        root: the file's folder, which paths in it start from.
        objective: None if the file says nothing about it: the default of the model's family.
    """

    root: Path
    model: ModelSettings
    data: DataSettings
    sizes: Sizes
    captions: Captions
    network: LoHaConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    objective: Objective | None
    run: RunSettings
    output: OutputSettings


# Table -> field of `Settings` -> the dataclass that has some of its keys; [network] has `LoHaConfig`'s.
TABLES: dict[str, dict[str, type[Any]]] = {
    "model": {"model": ModelSettings},
    "data": {"data": DataSettings, "sizes": Sizes, "captions": Captions},
    "optimizer": {"optimizer": OptimizerConfig},
    "training": {"training": TrainingConfig, "objective": Objective, "run": RunSettings},
    "output": {"output": OutputSettings},
}


def read_settings(path: Path) -> Settings:
    """Read and check a configuration.

    Raises:
        LoHaError: not readable, not TOML, a table or a key that is unknown (names the nearest), a value of another
            type or out of its range, or one that must be given and is not.
    """
    with about(path):
        tables = _toml(path)
        _refuse_unknown("table", tables, ["network", *TABLES])
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise LoHaError(f"{name} is a value; expected a table [{name}]")
        parts: dict[str, Any] = {"network": _network(tables.get("network", {}))}
        for name, kinds in TABLES.items():
            with about(f"[{name}]"):
                parts |= _parts(kinds, tables.get(name, {}))
        if not tables.get("training", {}).keys() & _fields(Objective).keys():
            parts["objective"] = None
        settings = Settings(root=path.parent, **parts)
        if settings.output.format == "peft" and settings.network.use_dora:
            raise LoHaError("[output] format is 'peft', which cannot hold the DoRA of [network]; choose 'lycoris'")
        return settings


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise LoHaError("reading TOML needs tomli on Python 3.10: pip install 'comfyui-loha[train]'") from None
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise LoHaError(f"cannot be read as TOML ({error})") from None


def _refuse_unknown(what: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
            raise LoHaError(f"unknown {what} {name!r}; {hint}")


def _fields(kind: type[Any]) -> dict[str, Field[Any]]:
    return {each.name: each for each in fields(kind) if each.name != "preview_every"}  # a command shows no previews


def _parts(kinds: Mapping[str, type[Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses of a table's values, whose types are those of the defaults."""
    known = {name: described for kind in kinds.values() for name, described in _fields(kind).items()}
    _refuse_unknown("key", values, known)
    for name, value in values.items():
        _check_type(name, value, known[name].default)
    return {
        part: kind(**{name: value for name, value in values.items() if name in _fields(kind)})
        for part, kind in kinds.items()
    }


def _check_given(name: str, value: str) -> None:
    if not value:
        raise LoHaError(f"{name} is missing: say where it is")


def _check_type(name: str, value: Any, default: Any) -> None:
    if default is MISSING or default is None:
        return  # the class itself checks it
    expected: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        raise LoHaError(f"{name} is {value!r}; expected {names[type(default)]}")


def _network(values: Mapping[str, Any]) -> LoHaConfig:
    known = [each.name for each in fields(LoHaConfig) if each.name not in ("extra", "peft_type")] + ["lora_alpha"]
    with about("[network]"):
        _refuse_unknown("key", values, known)
        return LoHaConfig(**{"init_weights": "lycoris"} | dict(values))
