"""A model small enough to train in a moment, and runs of it: for tests, and for processes that tests start.

Nothing is random but by (seed, number of the batch, place in it).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loha_core.training.attach import attached
from loha_core.training.config import TrainingConfig
from loha_core.training.objectives import PREDICTIONS, Objective
from loha_core.training.optimizers import OptimizerConfig
from loha_core.training.randomness import generator
from loha_core.training.trainer import ADAPTER, Trainer
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaConv2d, LoHaLayer, LoHaLinear

Batch = tuple[Tensor, ...]  # noisy, caption, target, gain, snr


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(torch.nn.functional.silu(x))
        return x + self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Denoiser(nn.Module):
    """(n, 3, h, w) and a caption (n, 5) -> (n, 3, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(5, 8)
        self.enter, self.leave = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, caption: Tensor) -> Tensor:
        x = self.enter(x) + self.text(caption)[:, :, None, None]
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def wrap(module: nn.Module, config: LoHaConfig) -> LoHaLayer:
    layer = (LoHaLinear if isinstance(module, nn.Linear) else LoHaConv2d)(module)
    layer.update_layer(ADAPTER, None, None, config)
    layer.set_adapter(ADAPTER)
    return layer


@dataclass
class Task:
    """What a run needs besides settings."""

    seed: int = 0
    batch_size: int = 4
    objective: Objective = field(default_factory=Objective)
    config: LoHaConfig = field(default_factory=lambda: LoHaConfig(r=2, alpha=2, init_weights="lycoris"))

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = Denoiser().requires_grad_(False)
        torch.manual_seed(self.seed)
        names = [n for n, m in self.model.blocks.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        blocks = {f"blocks.{n}": wrap(self.model.blocks.get_submodule(n), self.config) for n in names}
        self.networks = {"model": blocks, "text": {"text": wrap(self.model.text, self.config)}}

    @property
    def layers(self) -> list[LoHaLayer]:
        return [layer for layers in self.networks.values() for layer in layers.values()]

    def batch(self, number: int, places: Iterable[int] | None = None) -> Batch:
        """Batch ``number``, or only those places in it that are one process's share."""
        rngs = [generator(self.seed, "draw", number, place) for place in places or range(self.batch_size)]
        drawn = [
            (
                self.objective.time(g),
                torch.randn(3, 6, 6, generator=g).tanh(),
                torch.randn(5, generator=g),
                self.objective.noise((3, 6, 6), g),
            )
            for g in rngs
        ]
        x0, caption, noise = (torch.stack([row[i] for row in drawn]) for i in (1, 2, 3))
        sigma = torch.tensor([row[0] for row in drawn])
        alpha = (1 - sigma.square()).sqrt()
        a, s = (t.reshape(-1, 1, 1, 1) for t in (alpha, sigma))
        kind = PREDICTIONS["epsilon"]
        return a * x0 + s * noise, caption, kind.target(x0, noise, a, s), kind.gain(alpha, sigma), (alpha / sigma) ** 2

    def loss(self, batch: Batch) -> Tensor:
        noisy, caption, target, gain, snr = batch
        return self.objective.loss(self.model(noisy, caption), target, gain, snr)

    def trainer(
        self, config: TrainingConfig, optimizer: OptimizerConfig | None = None, batches: Any = None, **rest: Any
    ) -> Trainer:
        optimizer = optimizer or OptimizerConfig(lr=0.01)
        return Trainer(self.networks, batches or self.batch, self.loss, config, optimizer, init="lycoris", **rest)

    def run(self, *args: Any, **rest: Any) -> Trainer:
        """A whole run, gone on with if it was begun."""
        trainer = self.trainer(*args, **rest)
        with attached(self.layers):
            trainer.resume()
            trainer.run()
        return trainer


# --- a run that is killed -------------------------------------------------------------------------

KILLED = TrainingConfig(steps=50, save_every=1, ema_decay=0.9, gradient_accumulation_steps=2)


def killed(folder: Path) -> Trainer:
    """The run that is killed and goes on."""
    dropping = LoHaConfig(r=2, alpha=2, init_weights="lycoris", rank_dropout=0.3, module_dropout=0.2)
    return Task(config=dropping).run(KILLED, folder=folder)


def kill_often(root: Path, kills: int) -> None:
    """Runs in folders of ``root``, each in processes that are killed until one of them gets to the end.

    Half of the kills come at any moment, half as soon as a file is seen that is being written. This process has torch
    imported and has never used it, so that its children need no time to start and inherit no threads.
    """
    import torch._dynamo  # noqa: F401  (what the first optimizer imports, which takes a second)

    rng, done, amid = random.Random(0), 0, 0
    while done < kills:
        folder = root / f"run{done}"
        folder.mkdir()
        ended = False
        while not ended:
            left = _writing(folder)
            child = os.fork()
            if child == 0:
                killed(folder)
                os._exit(0)
            if done < kills:
                time.sleep(rng.uniform(0.01, 0.3))
                while done % 2 and _alive(child) and not _writing(folder) - left:
                    pass
                time.sleep(rng.uniform(0, 0.001))
                os.kill(child, signal.SIGKILL)  # a child that has ended waits to be asked how
            status = os.waitpid(child, 0)[1]
            assert status in (0, signal.SIGKILL), status
            ended = status == 0
            if not ended:
                done += 1
                amid += bool(_writing(folder) - left)
    runs = len(list(root.iterdir()))
    print(f"{done} kills, {amid} of them amid a save, in {runs} runs of {KILLED.steps} steps")


def _writing(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if name.endswith(".tmp")}


def _alive(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


# --- a run that is shared out among processes -----------------------------------------------------

SHARED = TrainingConfig(
    steps=6, gradient_accumulation_steps=2, max_grad_norm=0.5, max_norm=0.5, ema_decay=0.5, save_every=3
)


def share(folder: Path) -> None:
    """As many processes as Accelerate started: half of a run, then the whole of it, then one with dropout."""
    from accelerate import Accelerator

    accelerator, asked = Accelerator(cpu=True), list[int]()

    def mine(task: Task) -> Any:
        """Each process is asked for the same batch, and takes its share."""
        size = task.batch_size // accelerator.num_processes
        first = accelerator.process_index * size

        def batch(number: int) -> Batch:
            asked.append(number)
            return task.batch(number, range(first, first + size))

        return batch

    task = Task(batch_size=4)
    half = TrainingConfig(**(vars(SHARED) | {"steps": 4}))
    task.run(half, folder=folder, batches=mine(task), accelerator=accelerator)
    accelerator.wait_for_everyone()
    task = Task(batch_size=4)
    run = task.run(SHARED, folder=folder, batches=mine(task), accelerator=accelerator)
    assert accelerator.num_processes == 2 and asked == list(range(SHARED.steps * SHARED.gradient_accumulation_steps))
    for parameter in run.parameters:
        every = accelerator.gather(parameter.detach()[None])
        assert torch.equal(every[0], every[1])  # the processes have not drifted apart
    # Layers that a batch leaves out in one process only.
    dropping = Task(config=LoHaConfig(r=2, init_weights="lycoris", module_dropout=0.6))
    run = dropping.run(SHARED, batches=mine(dropping), accelerator=accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes, {accelerator.distributed_type}, {len(run.losses)} losses")
    accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, place = sys.argv[1], Path(sys.argv[2])
    if command == "kill":
        kill_often(place, int(sys.argv[3]))
    else:
        share(place)
