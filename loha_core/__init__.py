"""LoHa adapters (Low-rank Hadamard product; FedPara, arXiv 2108.06098) for PyTorch.

>>> adapter = load_adapter("style.safetensors")                            # doctest: +SKIP
>>> adapter.layers["lora_unet_mid_block_attentions_0_proj_in"].delta()     # doctest: +SKIP
"""

from .adapter import Adapter
from .bind import Binding, Network, Report, bind
from .errors import LoHaError
from .factors import KhatriRao, LoHaFactors
from .formats import load_adapter, save_adapter
from .formats.describe import describe
from .models.bake import apply_to_checkpoint
from .models.extract import extract
from .ops.apply import add_delta_, plan
from .ops.functional import loha_conv, loha_delta, loha_linear
from .transform.convert import (
    bake_blocks,
    change_alpha,
    from_lora,
    resize,
    respell,
    to_dtype,
    to_lora,
    to_lycoris,
    to_peft,
)
from .transform.merge import Made, merge
from .transform.report import ErrorReport, LayerError
from .tuner.config import LoHaConfig
from .tuner.layers import LoHaConv1d, LoHaConv2d, LoHaConv3d, LoHaLayer, LoHaLinear
from .tuner.lora import Lora
from .tuner.model import LoHaModel, get_peft_model

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Binding",
    "ErrorReport",
    "KhatriRao",
    "LayerError",
    "LoHaConfig",
    "LoHaConv1d",
    "LoHaConv2d",
    "LoHaConv3d",
    "LoHaError",
    "LoHaFactors",
    "LoHaLayer",
    "LoHaLinear",
    "LoHaModel",
    "Lora",
    "Made",
    "Network",
    "Report",
    "add_delta_",
    "apply_to_checkpoint",
    "bake_blocks",
    "bind",
    "change_alpha",
    "describe",
    "extract",
    "from_lora",
    "get_peft_model",
    "load_adapter",
    "loha_conv",
    "loha_delta",
    "loha_linear",
    "merge",
    "plan",
    "resize",
    "respell",
    "save_adapter",
    "to_dtype",
    "to_lora",
    "to_lycoris",
    "to_peft",
]
