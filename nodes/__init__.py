"""The nodes, a file per family."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .dataset import LoHaDataset
from .info import LoHaInfo
from .loader import LoHaApply, LoHaLoadAdapter, LoHaLoader
from .stack import LoHaStack
from .strength import LoHaBlockStrength, LoHaSchedule


class LoHaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoHaLoader,
            LoHaLoadAdapter,
            LoHaApply,
            LoHaStack,
            LoHaBlockStrength,
            LoHaSchedule,
            LoHaInfo,
            LoHaDataset,
        ]
