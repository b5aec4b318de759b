"""Ranks and alphas by layer: names or regular expressions, the first that matches counts."""

from __future__ import annotations

import torch
from models import arguments, bert, train

from loha_core import LoHaConfig, LoHaModel

args = arguments(__doc__)
torch.manual_seed(0)

config = LoHaConfig(
    r=8,
    alpha=8,
    target_modules=["query", "value"],
    rank_pattern={
        "^encoder.layer.0.attention.self.query": 16,
        r"layer\.[12]\..*value": 4,
    },
    alpha_pattern={
        "^encoder.layer.0.attention.self.query": 32,
    },
)
model = LoHaModel(bert(args.model), config, "default")
model.print_trainable_parameters()
for name, layer in model.loha_layers():
    print(f"{name}: r={layer.r['default']} alpha={layer.alpha['default']}")

ids, wanted = torch.randint(0, 100, (4, 16)), torch.randn(4, 16, model.config.hidden_size)
train(model, lambda: (model(ids).last_hidden_state - wanted).square().mean(), args.steps)
