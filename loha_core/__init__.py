"""LoHa adapters (Low-rank Hadamard product; FedPara, arXiv 2108.06098) for PyTorch.

>>> adapter = load_adapter("style.safetensors")                            # doctest: +SKIP
>>> adapter.layers["lora_unet_mid_block_attentions_0_proj_in"].delta()     # doctest: +SKIP
"""

from .adapter import Adapter
from .apply import add_delta_, plan
from .bind import Binding, Network, Report, bind
from .config import LoHaConfig
from .describe import describe
from .errors import LoHaError
from .factors import KhatriRao, LoHaFactors
from .formats import load_adapter, save_adapter
from .functional import loha_conv, loha_delta, loha_linear
from .layers import LoHaConv1d, LoHaConv2d, LoHaConv3d, LoHaLayer, LoHaLinear
from .lora import Lora
from .model import LoHaModel, get_peft_model

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Binding",
    "KhatriRao",
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
    "Network",
    "Report",
    "add_delta_",
    "bind",
    "describe",
    "get_peft_model",
    "load_adapter",
    "loha_conv",
    "loha_delta",
    "loha_linear",
    "plan",
    "save_adapter",
]
