"""The nodes, a file per family."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import routes
from .dataset import LoHaDataset
from .extract import LoHaExtract
from .info import LoHaInfo
from .loader import LoHaApply, LoHaLoadAdapter, LoHaLoader
from .merge import LoHaConvert, LoHaMerge, LoHaResize
from .network import LoHaNetwork
from .optimizer import LoHaObjective, LoHaOptimizer
from .save import LoHaSave
from .stack import LoHaStack
from .strength import LoHaBlockStrength, LoHaSchedule
from .trainer import LoHaTrainer


class LoHaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        routes.register()
        return [
            LoHaLoader,
            LoHaLoadAdapter,
            LoHaApply,
            LoHaStack,
            LoHaBlockStrength,
            LoHaSchedule,
            LoHaInfo,
            LoHaDataset,
            LoHaNetwork,
            LoHaOptimizer,
            LoHaObjective,
            LoHaTrainer,
            LoHaSave,
            LoHaMerge,
            LoHaResize,
            LoHaConvert,
            LoHaExtract,
        ]
