"""`loha train` for `accelerate launch --use_fsdp`, and processes without a GPU.

Accelerate shards on GPUs only; told that it may, it shards on CPUs. What it then does is its own and torch's FSDP.
"""

from __future__ import annotations

import sys
from typing import Any

import accelerate
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from loha_core.cli import main
from loha_core.training.diffusers import run


class Accelerator(accelerate.Accelerator):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment says
        self.state.distributed_type = DistributedType.FSDP


class OutputWriter(run.OutputWriter):
    """Says at the end how much of the model this process holds."""

    def __call__(self, event: Any) -> None:
        super().__call__(event)
        model = self.trainer._loss.__self__.diffusion.model  # type: ignore[attr-defined]
        if isinstance(event, run.Saved):
            sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
            here, whole = sum(p.to_local().numel() for p in sharded), sum(p.numel() for p in sharded)
            assert {p for p in model.parameters() if not isinstance(p, DTensor)} <= set(self.trainer.parameters)
            self.say(f"holds {here} of {whole} frozen numbers")


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerate.Accelerator, run.OutputWriter = Accelerator, OutputWriter
    sys.exit(main(sys.argv[1:]))
