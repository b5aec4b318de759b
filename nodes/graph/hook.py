"""An adapter for some conditionings only, by ComfyUI's hooks."""

from __future__ import annotations

from typing import Any

from comfy.hooks import HookGroup
from comfy_api.latest import io

from loha_core import Adapter

from ..host import hooks
from .inputs import schema
from .loader import strength_inputs
from .types import LOHA, LOHA_BLOCKS


class LoHaHook(io.ComfyNode):
    """LOHA -> HOOKS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaHook",
            display_name="LoHa Hook",
            category="LoHa",
            description="Lets an adapter act for the prompts it is hooked to: by mask, by timesteps, by keyframes. "
            "No weight is patched, so switching between prompts costs nothing.",
            search_aliases=["create hook lora", "hook lora", "regional lora", "lora by prompt", "scheduled lora"],
            inputs=[
                LOHA.Input("loha", tooltip="The adapter, from Load LoHa Adapter."),
                *strength_inputs(),
                LOHA_BLOCKS.Input("blocks", optional=True, tooltip="Multipliers per block, from LoHa Block Strength."),
                io.Hooks.Input(
                    "prev_hooks", optional=True, tooltip="Hooks that this one is added to, of this or any other kind."
                ),
            ],
            outputs=[
                io.Hooks.Output(
                    tooltip="For Cond Set Props, Set CLIP Hooks, Set Hook Keyframes and ComfyUI's other hook nodes."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        loha: Adapter,
        strength_model: float,
        strength_clip: float,
        blocks: Any = None,
        prev_hooks: HookGroup | None = None,
    ) -> io.NodeOutput:
        group = hooks.create(loha, strength_model, strength_clip, blocks)
        return io.NodeOutput((prev_hooks or HookGroup()).clone_and_combine(group))
