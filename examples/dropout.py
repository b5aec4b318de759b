"""Rank dropout drops output rows of an update, module dropout a layer's whole update; in training only."""

from __future__ import annotations

import torch
from models import arguments, llama, train

from loha_core import LoHaConfig, LoHaModel

args = arguments(__doc__)
torch.manual_seed(0)

config = LoHaConfig(
    r=8,
    alpha=16,
    target_modules="all-linear",
    rank_dropout=0.1,
    module_dropout=0.1,
)
model = LoHaModel(llama(args.model), config, "default")
model.print_trainable_parameters()

ids = torch.randint(0, model.config.vocab_size, (4, 32))
model.train()
train(model, lambda: model(input_ids=ids, labels=ids).loss, args.steps)
first, second = (model(ids).logits for _ in range(2))
print("in training, two passes differ by", float((first - second).abs().max().detach()))
model.eval()
first, second = (model(ids).logits for _ in range(2))
print("in use, two passes differ by", float((first - second).abs().max().detach()))
