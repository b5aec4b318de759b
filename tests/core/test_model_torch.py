"""LoHaModel and the rest of torch: autocast, checkpointing, compile, meta device, copies, two processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.model import LoHaModel

from .processes import PATIENCE, ended_well

pytestmark = pytest.mark.usefixtures("one_thread")


def net(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(256, 32), nn.SiLU(), nn.Linear(32, 4)
    ).to(dtype)


def adapted(base: nn.Module | None = None, **config) -> LoHaModel:
    torch.manual_seed(1)
    values = {"r": 2, "alpha": 2, "target_modules": ["0", "3", "5"], "init_weights": False} | config
    return LoHaModel(base or net(), LoHaConfig(**values))


X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def gradients(model: nn.Module, x: torch.Tensor = X, run=None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run = model if run is None else run
    run(x).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys() and wanted
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_effective_conv2d": True}])
def test_bf16_autocast(config):
    model = adapted(**config)
    exact, wanted = model(X), gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
        found = gradients(model)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.02 * exact.norm()
    assert all(g.dtype == torch.float32 for g in found.values())
    near(found, wanted, 0.05)


def test_a_bf16_model_with_float32_factors():
    model = adapted(net(torch.bfloat16))
    wide = copy.deepcopy(model).float()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    near(gradients(model, X.bfloat16()), gradients(wide), 0.05)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = adapted()
    wanted = gradients(model)
    x = X.clone().requires_grad_()
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    near(found, wanted, 1e-6)


def test_gradient_checkpointing_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=32,
    )  # fmt: skip
    model = LoHaModel(transformers.LlamaForCausalLM(config), LoHaConfig(r=2, init_weights=False))
    ids = torch.randint(0, 32, (1, 6))
    wanted = gradients(model, ids, lambda ids: model(ids).logits)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    near(gradients(model.train(), ids, lambda ids: model(ids).logits), wanted, 1e-5)


def test_torch_compile_in_one_graph():
    model = adapted()
    wanted = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    near(gradients(model, X, compiled), wanted, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), model(X))


def test_meta_device_then_a_file(tmp_path):
    saved = adapted()
    saved.save_pretrained(tmp_path)
    empty = LoHaModel(net(), saved.peft_config["default"], low_cpu_mem_usage=True)
    assert {p.device.type for p in empty.parameters() if p.requires_grad} == {"meta"}
    with torch.device("meta"):
        whole = LoHaModel(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(target_modules=["0"]))
    assert {p.device.type for p in whole.parameters()} == {"meta"}
    empty.load_adapter(tmp_path, "loaded")
    empty.delete_adapter("default")
    empty.set_adapter("loaded")
    torch.testing.assert_close(empty(X), saved(X))


def test_meta_parameters_are_filled_by_load_state_dict():
    saved = adapted()
    empty = LoHaModel(net(), saved.peft_config["default"], low_cpu_mem_usage=True)
    empty.load_state_dict(saved.state_dict(), assign=True)
    torch.testing.assert_close(empty(X), saved(X))


def test_copies_and_state_dicts():
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model[5].hada_w1_a["default"].zero_()
    assert not torch.allclose(twin(X), model(X))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), model(X))
    assert "model.5.hada_w1_a.default" in model.state_dict()


def test_moving_a_merged_model_keeps_the_way_back():
    model = adapted()
    before = model.model[3].weight.clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(model.model[3].weight, before.double())


def test_training_learns():
    """Ten steps of AdamW lower the loss, and the base stays as it was."""
    model = adapted(init_weights=True)
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    y, losses = torch.randn(6, 4), []
    for _ in range(30):
        loss = (model(X) - y).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in base.items())


DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.model import LoHaModel

dist.init_process_group("gloo")
rank, world, out = dist.get_rank(), dist.get_world_size(), sys.argv[1]
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.SiLU(), nn.Linear(16, 4))
config = LoHaConfig(r=2, target_modules=["0", "2", "4"], use_effective_conv2d=True)
model = DistributedDataParallel(LoHaModel(net, config))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
data = torch.Generator().manual_seed(1)
for _ in range(5):
    x, y = torch.randn(8, 3, 4, 4, generator=data), torch.randn(8, 4, generator=data)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    optimizer.zero_grad()
    (model(x[mine]) - y[mine]).square().mean().backward()
    optimizer.step()
if rank == 0:
    torch.save({n: p.detach() for n, p in model.module.named_parameters() if p.requires_grad}, out)
dist.barrier()
dist.destroy_process_group()
"""


def launched(script: Path, processes: int, *arguments: Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launch, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP)
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        found = launched(script, processes, out)
        assert ended_well(found) and out.exists(), found.stderr
        results.append(torch.load(out, weights_only=True))
    one, two = results
    assert len(one) == 14
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("end", "well"),
    [
        ("print('terminate called without an active exception', file=sys.stderr, flush=True); os.abort()", True),
        ("os.abort()", False),
        ("raise RuntimeError('terminate called without an active exception')", False),
        ("sys.exit(1)", False),
    ],
)
def test_an_abort_at_the_end_is_told_from_a_failure(tmp_path, end, well):
    script = tmp_path / "end.py"
    script.write_text(f"import os, sys\nif os.environ['RANK'] == '1':\n    {end}\n")
    found = launched(script, 2)
    assert found.returncode and ended_well(found) == well, found.stderr
