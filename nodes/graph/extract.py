"""What fine-tuning did to a model, as a LoHa."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.lora
from comfy_api.latest import io
from torch import Tensor

from loha_core.models.checkpoint import Checkpoint
from loha_core.models.extract import extract
from loha_core.naming.patterns import checked

from ..host import live, weights
from ..host.layers import names_in_files
from .inputs import choice, number, one_of, problems
from .results import KINDS, kind_input, result_schema, shown


class Patched(Checkpoint):
    """A model's and its text encoders' weights as ComfyUI would run them: merged and live adapters in."""

    def __init__(self, path: str, model: Any, clip: Any) -> None:
        self.path = path
        self.places: dict[str, tuple[Any, str]] = {}
        self.names: dict[str, str] = {}
        patchers = [("", model)] if clip is None else [("", model), ("text_encoders.", clip.patcher)]
        for lead, patcher in patchers:
            keys = [key for key in weights.shapes(patcher.model) if lead or key.startswith("diffusion_model.")]
            self.places |= {lead + key: (patcher, key) for key in keys}
            names = names_in_files(patcher.model, bool(lead))
            self.names |= {name: lead + key for key, name in names.items() if lead + key in self.places}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            key: weights.shape(*weights.place(patcher.model, model_key))
            for key, (patcher, model_key) in self.places.items()
        }

    def modules(self) -> dict[str, str]:
        """Layers by the names that files call them."""
        shapes = self.shapes()
        return {name: key for name, key in self.names.items() if len(shapes[key]) >= 2}

    def __getitem__(self, key: str) -> Tensor:
        return patched_weight(*self.places[key])


def patched_weight(patcher: Any, key: str) -> Tensor:
    """A weight as it would run, in float32 on the CPU, whether or not the model is loaded now."""
    backup = patcher.hook_backup.get(key) or patcher.backup.get(key)
    stored = None if backup is None else backup[0]
    weight = weights.dense(*weights.place(patcher.model, key), device="cpu", stored=stored, patched=False)
    patches = [*patcher.patches.get(key, ()), *live.patches_of(patcher, key)]
    return comfy.lora.calculate_weight(patches, weight, key) if patches else weight


class LoHaExtract(io.ComfyNode):
    """Two MODELs (and CLIPs) -> the LOHA that leads from one to the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return result_schema(
            "LoHaExtract",
            "Extract LoHa",
            "Makes a LoHa of the difference of two models: what fine-tuning, or merging, did to one.",
            [
                io.Model.Input("base", tooltip="The model that the other one was made from."),
                io.Model.Input("tuned", tooltip="The model whose difference is wanted; adapters on it count."),
                number("rank", 8, "Rank of the LoHa.", 1, 1024),
                number(
                    "conv_rank",
                    8,
                    "Rank for convolutions with a kernel larger than 1; 0 leaves them out.",
                    maximum=1024,
                ),
                one_of(
                    "method",
                    ("fit", "svd"),
                    "fit: a LoHa with both halves free. svd: the best approximation of that matrix rank.",
                ),
                kind_input(),
                io.Clip.Input("base_clip", optional=True, tooltip="Text encoders of the base; with tuned_clip."),
                io.Clip.Input("tuned_clip", optional=True, tooltip="Text encoders whose difference is wanted."),
                io.String.Input(
                    "only",
                    default="",
                    optional=True,
                    placeholder="attn",
                    tooltip="A regular expression; layers whose name does not contain it are left out.",
                ),
            ],
            "The difference, for Apply LoHa or Save LoHa.",
            aliases=["extract lora", "lora from checkpoint"],
        )

    @classmethod
    def validate_inputs(cls, only: str | None = None) -> bool | str:
        return problems(lambda: checked(only or "", anywhere=True))

    @classmethod
    def execute(
        cls,
        base: Any,
        tuned: Any,
        rank: int,
        conv_rank: int,
        method: Any,
        kind: str = "LoHa",
        base_clip: Any = None,
        tuned_clip: Any = None,
        only: str = "",
    ) -> io.NodeOutput:
        both = base_clip is not None and tuned_clip is not None
        models = (
            Patched("the base model", base, base_clip if both else None),
            Patched("the tuned model", tuned, tuned_clip if both else None),
        )
        transform = partial(
            extract,
            *models,
            rank=rank,
            conv_rank=conv_rank,
            method=method,
            kind=choice("kind", kind, KINDS),
            only=only or None,
        )
        return shown(cls, "Lost by extracting", transform)
