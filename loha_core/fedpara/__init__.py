"""FedPara (arXiv 2108.06098): a model whose weights themselves are W = W₁∘W₂, with no frozen base beneath.

>>> from torch import nn
>>> net = factorize(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), skip=["2"])
>>> net[0]
FedParaLinear(in_features=256, out_features=256, rank=21)
>>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in dense(net).parameters())
(24330, 68362)
"""

from .correction import JacobianCorrection
from .layers import FedParaConv, FedParaLayer, FedParaLinear
from .model import dense, factorize, global_parameters, local_parameters
from .plan import Plan, plan

__all__ = [
    "FedParaConv", "FedParaLayer", "FedParaLinear", "JacobianCorrection", "Plan", "dense", "factorize",
    "global_parameters", "local_parameters", "plan",
]  # fmt: skip
