"""LoHa adapters (Low-rank Hadamard product; FedPara, arXiv 2108.06098) for PyTorch.

>>> adapter = load_adapter("style.safetensors")                            # doctest: +SKIP
>>> adapter.layers["lora_unet_mid_block_attentions_0_proj_in"].delta()     # doctest: +SKIP
"""

from .adapter import Adapter
from .apply import add_delta_, plan
from .bind import Binding, Network, Report, bind
from .describe import describe
from .errors import LoHaError
from .factors import KhatriRao, LoHaFactors
from .formats import load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Binding",
    "KhatriRao",
    "LoHaError",
    "LoHaFactors",
    "Network",
    "Report",
    "add_delta_",
    "bind",
    "describe",
    "load_adapter",
    "plan",
    "save_adapter",
]
