"""A language model learns one sentence: the default targets of its architecture, saved and loaded again."""

from __future__ import annotations

import tempfile

import torch
from models import arguments, llama, train

from loha_core import LoHaConfig, LoHaModel, get_peft_model

args = arguments(__doc__)
torch.manual_seed(0)
base = llama(args.model)

config = LoHaConfig(
    r=8,
    alpha=16,
    target_modules=["q_proj", "v_proj"],
    rank_dropout=0.0,
    module_dropout=0.0,
    init_weights=True,
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

ids = torch.randint(0, model.config.vocab_size, (4, 32))
train(model, lambda: model(input_ids=ids, labels=ids).loss, args.steps)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    trained = model.eval()(ids).logits
    again = LoHaModel.from_pretrained(model.unload(), folder).eval()
    print("loaded again, logits differ by", float((again(ids).logits - trained).abs().max().detach()))
merged = again.merge_and_unload()
print("merged, logits differ by", float((merged(ids).logits - trained).abs().max().detach()))
