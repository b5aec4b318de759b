"""Where in the picture an adapter acts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.regions import PLACELESS, Region, feathered
from .inputs import number, one_of, schema
from .types import LOHA_REGION


def region_input() -> Any:
    """For every node that applies adapters."""
    return LOHA_REGION.Input(
        "region", optional=True, tooltip="Where in the picture the adapter acts, from LoHa Region; needs live."
    )


class LoHaRegion(io.ComfyNode):
    """MASK -> LOHA_REGION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaRegion",
            display_name="LoHa Region",
            category="LoHa",
            description="Lets an adapter act in a masked area of the picture only, in the same pass of the model.",
            search_aliases=["lora mask", "regional lora", "lora region", "attention couple"],
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip="White is where the adapter acts, grey where it acts partly. Of the whole picture, in any "
                    "size of the same proportions; one for all pictures of a batch, or one for each.",
                ),
                number(
                    "feather", 0, "Edges fade over this many of the mask's pixels, as many within as without.", 0, 8192
                ),
                one_of(
                    "text_layers",
                    PLACELESS,
                    "What layers do that see text or the time alone, such as the keys and values of cross-attention, "
                    "and text encoders: they act on the whole picture. off: not at all, so that outside of the mask "
                    "least changes. share: at the masked share of the area. full: as without a mask.",
                ),
            ],
            outputs=[
                LOHA_REGION.Output(
                    display_name="region", tooltip="For the region input of Load LoHa, Apply LoHa or LoHa Stack."
                )
            ],
        )

    @classmethod
    def execute(cls, mask: Any, feather: int, text_layers: str) -> io.NodeOutput:
        region = Region(mask, text_layers)  # checks it
        return io.NodeOutput(Region(feathered(region.masks, feather), text_layers) if feather else region)
