"""The file that ``loha train`` takes: TOML tables to settings. What it does not know is an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ...errors import LoHaError
from ...tuner.config import LoHaConfig
from ..data.captions import Captions
from ..objectives import Objective
from ..optimizers import OptimizerConfig
from ..trainer import TrainingConfig

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]
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
    dtype: Precision = "fp32"

    def __post_init__(self) -> None:
        _check_choices("[model]", self, {"dtype": Precision}, "path")


@dataclass(frozen=True)
class DataSettings:
    """``[data]``: see `folder.read_folder`, `pictures.Sizes` and `captions.Captions`.

    Attributes:
        folder: pictures with captions beside them.
        masks: a folder with a mask for each picture; "" has none.
        resolution, step, aspect_buckets: sizes that are trained.
        flip: mirror a picture half of the time.
        repeats: how often each picture is seen in an epoch, times what its folder's name says.
        regularisation, regularisation_weight: a folder for prior preservation, and how much it counts.
        trigger, shuffle, keep_tokens, caption_dropout, tag_dropout: how captions vary.
    """

    folder: str = ""
    masks: str = ""
    resolution: int = 1024
    step: int = 64
    aspect_buckets: bool = True
    flip: bool = False
    repeats: int = 1
    regularisation: str = ""
    regularisation_weight: float = 1.0
    trigger: str = ""
    shuffle: bool = False
    keep_tokens: int = 0
    caption_dropout: float = 0.0
    tag_dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_choices("[data]", self, {}, "folder")
        if self.repeats < 1:
            raise LoHaError(f"[data] repeats is {self.repeats}; expected a whole number from 1")

    def captions(self) -> Captions:
        return Captions(self.trigger, self.shuffle, self.keep_tokens, self.caption_dropout, self.tag_dropout)


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
        if self.epochs < 0 or self.batch_size < 1:
            raise LoHaError("[training] epochs must be 0 or more, and batch_size 1 or more")


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
    dtype: Precision = "fp32"
    resume: bool = True

    def __post_init__(self) -> None:
        _check_choices("[output]", self, {"format": Format, "dtype": Precision}, "folder")
        if not re.fullmatch(r"\w[\w .()+-]*", self.name):
            raise LoHaError(f"[output] name is {self.name!r}; expected a file's name without its folder and ending")


@dataclass(frozen=True)
class Settings:
    """All tables of the file.

    Attributes:
        root: the file's folder, which paths in it start from.
        objective: None if the file says nothing about it: what is usual for the model.
    """

    root: Path
    model: ModelSettings
    data: DataSettings
    network: LoHaConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    objective: Objective | None
    run: RunSettings
    output: OutputSettings


def read_settings(path: Path) -> Settings:
    """Read and check a configuration.

    Raises:
        LoHaError: not readable, not TOML, a table or a key that is unknown (names the nearest), a value of another
            type or out of its range, or one that must be given and is not.
    """
    tables = _toml(path)
    known = ("model", "data", "network", "optimizer", "training", "output")
    _refuse_unknown(str(path), "table", tables, known)
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise LoHaError(f"{path}: {name} is a value; expected a table [{name}]")
    try:
        training = tables.pop("training", {})
        kinds: tuple[type, ...] = (TrainingConfig, Objective, RunSettings)
        keys = {kind: [each.name for each in fields(kind)] for kind in kinds}
        keys[TrainingConfig].remove("preview_every")  # there is nobody to look
        _refuse_unknown("[training]", "key", training, [name for found in keys.values() for name in found])
        parts = {kind: {key: training[key] for key in found if key in training} for kind, found in keys.items()}
        found = Settings(
            root=path.parent,
            model=_made(ModelSettings, tables.get("model", {}), "model"),
            data=_made(DataSettings, tables.get("data", {}), "data"),
            network=_network(tables.get("network", {})),
            optimizer=_made(OptimizerConfig, tables.get("optimizer", {}), "optimizer"),
            training=_made(TrainingConfig, parts[TrainingConfig], "training"),
            objective=_made(Objective, parts[Objective], "training") if parts[Objective] else None,
            run=_made(RunSettings, parts[RunSettings], "training"),
            output=_made(OutputSettings, tables.get("output", {}), "output"),
        )
        if found.output.format == "peft" and found.network.use_dora:
            raise LoHaError("[output] format is 'peft', which cannot hold the DoRA of [network]; choose 'lycoris'")
        return found
    except LoHaError as error:
        raise LoHaError(f"{path}: {error}") from None


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
        raise LoHaError(f"{path}: cannot be read as TOML ({error})") from None


def _refuse_unknown(where: str, what: str, found: Mapping[str, Any], known: Any) -> None:
    for name in found:
        if name not in known:
            near = get_close_matches(name, known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise LoHaError(f"{where}: unknown {what} {name!r}; {hint}")


def _made(kind: type[T], values: Mapping[str, Any], table: str) -> T:
    """A dataclass of a table's values, whose types are those of the defaults."""
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(f"[{table}]", "key", values, list(known))
    for name, value in values.items():
        _check_type(f"[{table}] {name}", value, known[name])
    try:
        return kind(**values)
    except TypeError as error:  # of a check that expects a number
        raise LoHaError(f"[{table}]: {error}") from None


def _check_choices(table: str, settings: Any, choices: Mapping[str, Any], needed: str) -> None:
    for name, kind in choices.items():
        if getattr(settings, name) not in get_args(kind):
            found, expected = getattr(settings, name), ", ".join(get_args(kind))
            raise LoHaError(f"{table} {name} is {found!r}; expected one of {expected}")
    if not getattr(settings, needed):
        raise LoHaError(f"{table} {needed} is missing: say where it is")


def _check_type(where: str, value: Any, described: Field[Any]) -> None:
    default = described.default
    if default is MISSING or default is None:
        return  # the class itself knows
    wanted: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        expected = names.get(type(default), type(default).__name__)
        raise LoHaError(f"{where} is {value!r}; expected {expected}")


def _network(values: Mapping[str, Any]) -> LoHaConfig:
    known = [each.name for each in fields(LoHaConfig) if each.name not in ("extra", "peft_type")] + ["lora_alpha"]
    _refuse_unknown("[network]", "key", values, known)
    return LoHaConfig(**{"init_weights": "lycoris"} | dict(values))
