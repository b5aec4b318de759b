"""Training beside lycoris-lora, and in several processes beside one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from loha_core.training import state as checkpoint
from loha_core.training.config import TrainingConfig
from loha_core.training.optimizers import OptimizerConfig
from loha_core.training.state import LOSSES, STATE
from loha_core.tuner.config import LoHaConfig

from .processes import PATIENCE, ended_well
from .training_script import SHARED, Denoiser, Task

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
ADAMW = OptimizerConfig(lr=0.02, weight_decay=0.01)


def lycoris_losses(task: Task, steps: int, **options) -> list[float]:
    """Losses of LyCORIS' own layers on the same model, in a plain loop with the same data and optimizer."""
    loha = pytest.importorskip("lycoris.modules.loha", reason="a peer to measure against: pip install .[peers]")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    torch.manual_seed(task.seed)
    model = Denoiser().requires_grad_(False)
    model.load_state_dict(task.model.state_dict())
    torch.manual_seed(task.seed)  # the same seed gives the same factors
    names = [name for layers in task.networks.values() for name in layers]
    layers = nn.ModuleList(
        loha.LohaModule(name.replace(".", "_"), model.get_submodule(name), lora_dim=2, alpha=3, **options)
        for name in names
    )
    for layer in layers:
        layer.apply_to()
    parameters = [p for p in layers.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ADAMW.lr, weight_decay=ADAMW.weight_decay)
    losses = []
    for number in range(steps):
        noisy, caption, target, gain, snr = task.batch(number)
        loss = task.objective.loss(model(noisy, caption), target, gain, snr)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"use_effective_conv2d": True}, {"use_tucker": True}),
        ({"use_scalar": True}, {"use_scalar": True}),
        ({"use_rslora": True}, {"rs_lora": True}),
        ({"use_dora": True}, {"weight_decompose": True}),
    ],
    ids=["flat", "tucker", "scalar", "rslora", "dora"],
)
def test_ten_steps_equal_lycoris(ours, theirs):
    config = LoHaConfig(r=2, alpha=3, init_weights="lycoris", **ours)
    expected = lycoris_losses(Task(config=config), 10, **theirs)
    found = Task(config=config).run(TrainingConfig(steps=10), ADAMW).losses
    print("lycoris", *(f"{loss:.7f}" for loss in expected), sep="\t")
    print("ours   ", *(f"{loss:.7f}" for loss in found), sep="\t")
    assert found == pytest.approx(expected, rel=1e-4)
    frozen = Task(config=config).run(TrainingConfig(steps=10), OptimizerConfig(lr=0.0)).losses
    assert abs(frozen[-1] - expected[-1]) > 0.01 * expected[-1]  # it has learnt something by then


def test_two_processes_are_one_with_the_doubled_batch_and_go_on(tmp_path):
    pytest.importorskip("accelerate", reason="a peer: pip install .[peers]")
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    script = f"--dynamo_backend no --main_process_port 0 -m tests.core.training_script share {tmp_path / 'two'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *f"{launch} {script}".split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    print(done.stdout)
    assert ended_well(done) and "2 processes, DistributedType.MULTI_CPU" in done.stdout, done.stderr
    one = Task(batch_size=4).run(SHARED, folder=tmp_path / "one")
    found, expected = (checkpoint.load(tmp_path / place / STATE) for place in ("two", "one"))
    assert found["step"] == expected["step"] == SHARED.steps
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["average"], expected["average"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=0)
    furthest = max(float((a - b).abs().max()) for a, b in zip(found["parameters"], expected["parameters"], strict=True))
    print(f"furthest from one process: {furthest:.1e}")
    # Half of the batch is another run: the processes did share.
    half = Task(batch_size=2).run(SHARED)
    assert not torch.allclose(half.parameters[0], one.parameters[0], atol=1e-3)
    assert (tmp_path / "two" / LOSSES).read_text().count("\n") == SHARED.steps + 1
