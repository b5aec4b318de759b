"""Which parts of an adapter matter: measured on pictures, beside what the numbers of the file say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from comfy_api.latest import io, ui
from torch import Tensor

from loha_core import Adapter
from loha_core.blocks import BlockStrength, Layout, block_of_key
from loha_core.errors import check_number
from loha_core.naming.layouts import BASE
from loha_core.naming.names import kind_of

from ..host.impact import Knockouts, LayerNorm, Sampling, layer_norms, pruned, relative
from ..host.pictures import Latent
from ..page import charts
from .inputs import choice, number, one_of, schema
from .types import LOHA, LOHA_BLOCKS

BLOCKS, KINDS, BOTH = "blocks", "kinds of layers", "kinds in each block"
GROUPINGS = {BLOCKS: (True, False), KINDS: (False, True), BOTH: (True, True)}


@dataclass(frozen=True)
class Part:
    """Layers of an adapter that are switched off together.

    Attributes:
        norm: ‖ΔW‖/‖W‖.
        impact: what pictures lose without it, see `Knockouts`.
    """

    label: str
    layers: Sequence[LayerNorm]
    norm: float
    impact: float
    kept: bool


class LoHaImpact(io.ComfyNode):
    """MODEL, LOHA and what KSampler takes -> a ranking of blocks, and the LOHA without the least of them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaImpact",
            display_name="LoHa Impact",
            category="LoHa",
            description="Finds out which blocks of an adapter matter, by pictures with one of them switched off, and "
            "gives block strengths and an adapter without the others.",
            search_aliases=["block impact", "prune lora", "lora block weight"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, without this adapter; it is not changed."),
                LOHA.Input("loha", tooltip="The adapter to look into; it is not changed."),
                io.Conditioning.Input("positive", tooltip="A prompt that calls up what the adapter has learnt."),
                io.Conditioning.Input("negative", tooltip="As for KSampler."),
                io.Latent.Input("latent", tooltip="The size of the pictures; the first of a batch is taken."),
                one_of(
                    "parts",
                    GROUPINGS,
                    "What is switched off at a time: a block of the model; a kind of layer in all blocks, such as "
                    "attention; or a kind in one block, which takes several times as long.",
                ),
                number(
                    "keep", 0.5, "The share of the parts that is kept: the most important ones.", 0.01, 1, step=0.01
                ),
                number("strength", 1.0, "Of the adapter, on the model.", -20, 20, step=0.01),
                number("seeds", 4, "How many seeds to measure on: more are slower, and surer.", 1, 64),
                number("first_seed", 0, "The first of them; the others follow it.", 0, 0xFFFFFFFFFFFFFFFF - 64),
                number("steps", 12, "Sampling steps. Fewer than for a picture will do.", 1, 1000),
                number("cfg", 5.0, "Guidance, as for KSampler.", 0, 100, step=0.1),
                one_of("sampler_name", comfy.samplers.KSampler.SAMPLERS, "As for KSampler.", default="euler"),
                one_of("scheduler", comfy.samplers.KSampler.SCHEDULERS, "As for KSampler.", default="normal"),
            ],
            outputs=[
                LOHA_BLOCKS.Output(
                    display_name="blocks", tooltip="The parts that are kept at 1, the others at 0: for Apply LoHa."
                ),
                LOHA.Output(display_name="loha", tooltip="The adapter without the other parts: for Save LoHa."),
                io.String.Output(display_name="text", tooltip="The ranking, and what to type to have the same."),
                io.Image.Output(display_name="image", tooltip="The ranking as the node shows it."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        loha: Adapter,
        positive: Any,
        negative: Any,
        latent: Latent,
        parts: str,
        keep: float,
        strength: float,
        seeds: int,
        first_seed: int,
        **settings: Any,
    ) -> io.NodeOutput:
        check_number("keep", keep, above=0, maximum=1)
        sampling = Sampling(positive, negative, latent, **settings)
        knockouts = Knockouts(model, loha, strength, sampling, range(first_seed, first_seed + seeds))
        ranked = ranking(layer_norms(model, loha), knockouts, parts, keep)
        typed = written(ranked, parts)
        vector, rules = ("", typed) if GROUPINGS[parts][1] else (typed, "")
        blocks = BlockStrength.parse(list(model.model.state_dict()), vector, rules)
        [lost] = knockouts.impacts([lambda key: blocks(key) == 0])
        smaller = pruned(loha, [layer for part in ranked for layer in part.layers], blocks, parts=parts, keep=keep)
        text, image = report(loha, ranked, lost, typed), chart(loha, ranked, lost)
        rows = [(part.label, part.impact, part.norm, part.kept) for part in ranked]
        shown = {"text": (text,), "parts": rows, **ui.PreviewImage(image, cls=cls).as_dict()}
        return io.NodeOutput(blocks, smaller, text, image, ui=shown)


def ranking(layers: Sequence[LayerNorm], knockouts: Knockouts, parts: str, keep: float) -> list[Part]:
    """The parts that the layers make, those first that pictures lose most without.

    What lies in no block stays with the blocks that are kept, as in every preset.
    """
    by_block, by_kind = choice("parts", parts, GROUPINGS)
    keys = list(knockouts.model.model.state_dict())
    layout = Layout.of_keys(keys) if by_block else None
    groups: dict[str, list[LayerNorm]] = defaultdict(list)
    for layer in layers:
        block = block_of_key(layer.key, layout)
        lead = [f"{block[0]}{block[1]:02d}" if block else BASE] if by_block else []
        groups[" ".join([*lead, *([kind_of(layer.key.removesuffix(".weight"))] if by_kind else [])])].append(layer)
    label_of = {layer.key: label for label, members in groups.items() for layer in members}
    impacts = knockouts.impacts([lambda key, label=label: label_of.get(key) == label for label in groups])  # type: ignore[misc]
    ordered = sorted(zip(groups, impacts, strict=True), key=lambda pair: -pair[1])
    choosable = [label for label, _ in ordered if label != BASE]
    kept = {*choosable[: max(1, round(keep * len(choosable)))], BASE}
    return [Part(label, groups[label], relative(groups[label]), impact, label in kept) for label, impact in ordered]


def written(ranked: Sequence[Part], parts: str) -> str:
    """What to type in LoHa Block Strength to switch off the parts that are not kept: its vector, or its rules."""
    off = [part for part in ranked if not part.kept]
    if GROUPINGS[parts][1]:
        return "\n".join(f"^{re.escape(layer.key)}$: 0" for part in off for layer in part.layers)
    return ", ".join(f"{part.label}=0" for part in sorted(off, key=lambda part: part.label))


def report(adapter: Adapter, ranked: Sequence[Part], lost: float, typed: str) -> str:
    """The ranking as text."""
    norms = sorted((part.norm for part in ranked), reverse=True)
    width = max(len(part.label) for part in ranked)
    lines = [
        f"{adapter.source}: {len(ranked)} parts; impact 1 is as much as without the adapter",
        f"{'':3} {'':{width}} impact  by norm  ‖ΔW‖/‖W‖  kinds of layers",
    ]
    for place, part in enumerate(ranked, 1):
        kinds: dict[str, list[LayerNorm]] = defaultdict(list)
        for layer in part.layers:
            kinds[kind_of(layer.key.removesuffix(".weight"))].append(layer)
        of_kinds = ", ".join(f"{kind} {relative(members):.3g}" for kind, members in kinds.items())
        row = f"{place:3} {part.label:{width}} {part.impact:6.3f}  {norms.index(part.norm) + 1:7}  {part.norm:9.4g}"
        lines.append(f"{row}  {of_kinds}{'' if part.kept else '  (off)'}")
    if unknown := sum(layer.update is None for part in ranked for layer in part.layers):
        lines.append(f"{unknown} layers are of a kind whose norm is not known; their impact is")
    off = sum(not part.kept for part in ranked)
    lines.append(f"{off} parts are off; together they change the picture by {lost:.3f}")
    if typed:
        lines += ["To type in LoHa Block Strength:", typed]
    return "\n".join(lines)


def chart(adapter: Adapter, ranked: Sequence[Part], lost: float) -> Tensor:
    """The ranking as a picture."""
    off = sum(not part.kept for part in ranked)
    return charts.ranking(
        f"What matters in {adapter.source}",
        f"{len(ranked) - off} parts kept, {off} off (grey): together they change the picture by {lost:.3f}",
        ["what pictures lose; 1: as much as in all", "size, relative to the weights"],
        [(part.label, (part.impact, part.norm), part.kept) for part in ranked],
    )
