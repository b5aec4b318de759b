"""The nodes, a file per family."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .graph.dataset import LoHaDataset
from .graph.extract import LoHaExtract
from .graph.grid import LoHaGrid, LoHaGridImage
from .graph.hook import LoHaHook
from .graph.impact import LoHaImpact
from .graph.info import LoHaInfo
from .graph.loader import LoHaApply, LoHaLoadAdapter, LoHaLoader
from .graph.merge import LoHaConvert, LoHaMerge, LoHaResize
from .graph.network import LoHaNetwork
from .graph.optimizer import LoHaObjective, LoHaOptimizer
from .graph.preservation import LoHaPreservation
from .graph.region import LoHaRegion
from .graph.save import LoHaSave
from .graph.slider import LoHaPictureSlider, LoHaSlider
from .graph.stack import LoHaStack
from .graph.strength import LoHaBlockStrength, LoHaSchedule
from .graph.train_folder import LoHaTrainFolder
from .graph.trainer import LoHaTrainer
from .page import routes


class LoHaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [
            LoHaLoader,
            LoHaLoadAdapter,
            LoHaApply,
            LoHaStack,
            LoHaBlockStrength,
            LoHaSchedule,
            LoHaRegion,
            LoHaHook,
            LoHaInfo,
            LoHaGrid,
            LoHaGridImage,
            LoHaImpact,
            LoHaDataset,
            LoHaNetwork,
            LoHaOptimizer,
            LoHaObjective,
            LoHaPreservation,
            LoHaSlider,
            LoHaPictureSlider,
            LoHaTrainer,
            LoHaTrainFolder,
            LoHaSave,
            LoHaMerge,
            LoHaResize,
            LoHaConvert,
            LoHaExtract,
        ]
        routes.register(nodes)
        return nodes
