"""The file that ``loha train`` takes: TOML tables to settings. Unknown tables and keys are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ...errors import LoHaError, about, check_choice, check_known, check_number
from ...formats.toml import read_toml
from ...tuner.config import LoHaConfig
from ..config import TrainingConfig
from ..data.captions import Captions
from ..data.pictures import Sizes
from ..losses.preservation import Preservation
from ..losses.slider import texts
from ..objectives import Objective
from ..optimizers import OptimizerConfig
from .sliders import SliderSettings

Dtype = Literal["fp32", "bf16", "fp16"]
Format = Literal["lycoris", "peft"]
Quantisation = Literal["", "nf4"]


@dataclass(frozen=True)
class ModelSettings:
    """``[model]``

    Attributes:
        path: a diffusers folder, with model_index.json.
        component: another folder for the UNet or transformer alone, such as a fine-tuned one; "" takes the pipeline's.
        dtype: of the frozen weights.
        quantisation: "nf4" keeps the linear layers in the trained model's blocks in 4 bits, by bitsandbytes.
        stage: which is trained of a pipeline that has a model for "high-noise" and one for "low-noise" (Wan 2.2).
    """

    path: str = ""
    component: str = ""
    dtype: Dtype = "fp32"
    stage: str = ""
    quantisation: Quantisation = ""

    def __post_init__(self) -> None:
        _check_given("path", self.path)
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("quantisation", self.quantisation, get_args(Quantisation))


@dataclass(frozen=True)
class DataSettings:
    """``[data]``, beside `Sizes` and `Captions`; see `read_folder`, too.

    Attributes:
        folder: pictures with captions beside them; "" for a slider that is learned from prompts alone.
        masks: a folder with a mask for each picture; "" has none.
        flip: mirror a picture half of the time.
        repeats: how often each picture is seen in an epoch, times what its folder's name says.
        regularisation, regularisation_weight: a folder for prior preservation, and its factor in the loss.
        validation: a folder of pictures that are not trained on; their loss says when to stop.
        validation_share: in place of such a folder, this share of the pictures; 0 is off.
    """

    folder: str = ""
    masks: str = ""
    flip: bool = False
    repeats: int = 1
    regularisation: str = ""
    regularisation_weight: float = 1.0
    validation: str = ""
    validation_share: float = 0.0

    def __post_init__(self) -> None:
        check_number("repeats", self.repeats, minimum=1, integer=True)
        check_number("validation_share", self.validation_share, minimum=0, below=1)
        if self.validation and self.validation_share:
            raise LoHaError("validation and validation_share are two ways to hold pictures back; choose one")


@dataclass(frozen=True)
class RunSettings:
    """``[training]``, beside `TrainingConfig` and `Objective`.

    Attributes:
        epochs: in place of steps; 0 is off.
        batch_size: pictures in a batch, of all processes together.
        text_encoders: train these, too.
        gradient_checkpointing: less memory for more time.
        blocks_to_swap: so many blocks fewer on the device: they wait on the CPU and come one ahead.
    """

    epochs: int = 0
    batch_size: int = 1
    text_encoders: bool = False
    gradient_checkpointing: bool = False
    blocks_to_swap: int = 0

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, minimum=0, integer=True)
        check_number("batch_size", self.batch_size, minimum=1, integer=True)
        check_number("blocks_to_swap", self.blocks_to_swap, minimum=0, integer=True)
        if self.blocks_to_swap and not self.gradient_checkpointing:
            raise LoHaError("blocks_to_swap needs gradient_checkpointing = true: else each block is kept where it ran")


@dataclass(frozen=True)
class OutputSettings:
    """``[output]``

    Attributes:
        folder: for the adapters, the state of the run and its losses.
        name: of the adapter's file.
        format: "lycoris" (one file) or "peft" (a folder).
        dtype: of the saved factors.
        resume: go on if the folder has a run's state; otherwise begin, and write over it.
        tensorboard: write its files, too, into a folder ``tensorboard`` inside.
    """

    folder: str = ""
    name: str = "loha"
    format: Format = "lycoris"
    dtype: Dtype = "fp32"
    resume: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _check_given("folder", self.folder)
        check_choice("format", self.format, get_args(Format))
        check_choice("dtype", self.dtype, get_args(Dtype))
        if not re.fullmatch(r"\w[\w .()+-]*", self.name):
            raise LoHaError(f"name is {self.name!r}; expected a file's name without its folder and ending")


@dataclass(frozen=True)
class PreviewSettings:
    """``[preview]``

    Attributes:
        prompts: a picture for each, from the same noise every time.
        every: in steps.
        steps, cfg, seed: of sampling.

    Raises:
        LoHaError: no prompt, or a value out of its range.
    """

    prompts: str | Sequence[str] = field(default_factory=tuple)
    every: int = 100
    steps: int = 20
    cfg: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", texts("prompts", self.prompts))
        if not self.prompts:
            raise LoHaError("prompts is empty; expected what previews show, or leave the table out")
        check_number("every", self.every, minimum=1, integer=True)
        check_number("steps", self.steps, minimum=1, integer=True)
        check_number("cfg", self.cfg, minimum=0)
        check_number("seed", self.seed, minimum=0, integer=True)


@dataclass(frozen=True)
class Settings:
    """All tables of the file.

    Attributes:
        root: the file's folder, which paths in it start from.
        objective: None if the file says nothing about it: the default of the model's family.
        slider, preservation, preview: None where there is no such table.
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
    slider: SliderSettings | None = None
    preservation: Preservation | None = None
    preview: PreviewSettings | None = None


# Table -> field of `Settings` -> the dataclass that has some of its keys; [network] has `LoHaConfig`'s.
TABLES: dict[str, dict[str, type[Any]]] = {
    "model": {"model": ModelSettings},
    "data": {"data": DataSettings, "sizes": Sizes, "captions": Captions},
    "optimizer": {"optimizer": OptimizerConfig},
    "training": {"training": TrainingConfig, "objective": Objective, "run": RunSettings},
    "output": {"output": OutputSettings},
}
# Tables that may be left out, with what they are for.
OPTIONAL: dict[str, type[Any]] = {"slider": SliderSettings, "preservation": Preservation, "preview": PreviewSettings}


def read_settings(path: Path) -> Settings:
    """Read and check a configuration.

    Raises:
        LoHaError: not readable, not TOML, a table or a key that is unknown (names the nearest), a value of another
            type or out of its range, or one that must be given and is not.
    """
    with about(path):
        tables = read_toml(path)
        check_known("table", tables, ["network", *TABLES, *OPTIONAL])
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise LoHaError(f"{name} is a value; expected a table [{name}]")
        parts: dict[str, Any] = {"network": _network(tables.get("network", {}))}
        for name, kinds in TABLES.items():
            with about(f"[{name}]"):
                parts |= _parts(kinds, tables.get(name, {}))
        for name in OPTIONAL.keys() & tables.keys():
            with about(f"[{name}]"):
                parts |= _parts({name: OPTIONAL[name]}, tables[name])
        _check_pictures(parts["data"], parts.get("slider"))
        if not tables.get("training", {}).keys() & _fields(Objective).keys():
            parts["objective"] = None
        settings = Settings(root=path.parent, **parts)
        if settings.model.quantisation and settings.network.use_dora:
            raise LoHaError("[network] use_dora needs the weights' own norms, and [model] quantisation packs them; "
                            "leave one of them out")  # fmt: skip
        if settings.model.quantisation and settings.run.blocks_to_swap:
            raise LoHaError("[training] blocks_to_swap cannot move what [model] quantisation packs; leave one out")
        if settings.output.format == "peft" and settings.network.use_dora:
            raise LoHaError("[output] format is 'peft', which cannot hold the DoRA of [network]; choose 'lycoris'")
        return settings


def _check_pictures(data: DataSettings, slider: SliderSettings | None) -> None:
    with about("[data]"):
        if slider is None or slider.low:
            _check_given("folder", data.folder)
        for name in ("regularisation", "validation", "validation_share"):
            if slider is not None and getattr(data, name):
                raise LoHaError(f"{name} has no part in a slider; leave it out")
        if not data.folder and data.masks:
            raise LoHaError("masks are given and no folder; say where their pictures are")


def _fields(kind: type[Any]) -> dict[str, Field[Any]]:
    elsewhere = ("preview_every", "preservation")  # a command shows no previews, and the other is a table
    return {each.name: each for each in fields(kind) if each.name not in elsewhere}


def _parts(kinds: Mapping[str, type[Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Dataclasses of a table's values, whose types are those of the defaults."""
    known = {name: described for kind in kinds.values() for name, described in _fields(kind).items()}
    check_known("key", values, known)
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
        check_known("key", values, known)
        return LoHaConfig(**{"init_weights": "balanced"} | dict(values))
