"""LoHa adapters (Low-rank Hadamard product; FedPara, arXiv 2108.06098) for PyTorch.

>>> adapter = load_adapter("style.safetensors")                            # doctest: +SKIP
>>> adapter.layers["lora_unet_mid_block_attentions_0_proj_in"].delta()     # doctest: +SKIP
"""

from .adapter import Adapter
from .algebra import KhatriRao
from .bind import Binding, Network, Report, bind
from .errors import LoHaError
from .factors import LoHaFactors
from .formats import load_adapter, save_adapter
from .formats.describe import describe
from .models.bake import apply_to_checkpoint
from .models.extract import extract
from .ops.apply import add_delta_, plan
from .ops.functional import loha_conv, loha_delta, loha_linear
from .transform.compress import Compression
from .transform.convert import (
    bake_blocks,
    change_alpha,
    convert,
    from_lora,
    resize,
    respell,
    to_dtype,
    to_lora,
    to_lycoris,
    to_peft,
)
from .transform.merge import merge
from .transform.report import ErrorReport, LayerError, Result
from .transform.sparse import Sparse
from .tuner.config import LoHaConfig, TaskType
from .tuner.layers import LoHaConv1d, LoHaConv2d, LoHaConv3d, LoHaLayer, LoHaLinear
from .tuner.model import LoHaModel, get_peft_model
from .tuner.state.tensors import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

__version__ = "0.1.0"

__all__ = [
    # values
    "Adapter", "KhatriRao", "LoHaError", "LoHaFactors",
    # files
    "describe", "load_adapter", "save_adapter",
    # an adapter on a model's weights
    "Binding", "Network", "Report", "add_delta_", "bind", "loha_conv", "loha_delta", "loha_linear", "plan",
    # adapters to adapter
    "Compression", "ErrorReport", "LayerError", "Result", "Sparse", "bake_blocks", "change_alpha", "convert",
    "from_lora", "merge", "resize", "respell", "to_dtype", "to_lora", "to_lycoris", "to_peft",
    # whole checkpoints
    "apply_to_checkpoint", "extract",
    # PEFT's API
    "LoHaConfig", "LoHaConv1d", "LoHaConv2d", "LoHaConv3d", "LoHaLayer", "LoHaLinear", "LoHaModel", "TaskType",
    "get_base_model_state_dict", "get_peft_model", "get_peft_model_state_dict", "set_base_model_state_dict",
    "set_peft_model_state_dict",
]  # fmt: skip
