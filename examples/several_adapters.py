"""Two adapters in one model: switched, added up, summed into one exactly, and merged."""

from __future__ import annotations

import torch
from models import arguments, t5, train

from loha_core import LoHaConfig, LoHaModel

args = arguments(__doc__)
torch.manual_seed(0)

model = LoHaModel(t5(args.model), LoHaConfig(r=4, alpha=4, target_modules=["q", "v"]), "first")
model.add_adapter("second", LoHaConfig(r=8, alpha=16, target_modules=["q", "v", "wo"]))

source, target = torch.randint(1, 100, (2, 12)), torch.randint(1, 100, (2, 6))
for name in ("first", "second"):
    model.set_adapter(name)
    print(name, end=": ")
    model.print_trainable_parameters()
    train(model, lambda: model(input_ids=source, labels=target).loss, args.steps)

model.eval()


def distance(model: torch.nn.Module, wanted: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(input_ids=source, labels=target).logits - wanted).abs().max())


model.set_adapter(["first", "second"])
both = model(input_ids=source, labels=target).logits.detach()
with model.disable_adapter():
    print("without adapters, logits differ by", distance(model, both))

model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
model.set_adapter("sum")
print("as one LoHa, logits differ by", distance(model, both))

model.delete_adapter("first")
print("merged, logits differ by", distance(model.merge_and_unload(), both))
