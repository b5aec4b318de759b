"""What PEFT's users run, with `loha_core.peft.enable()` and without: the same losses."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for module in ("peft", "transformers", "diffusers", "accelerate"):
    pytest.importorskip(module, reason="what it is about: pip install .[peers]")
import accelerate  # noqa: E402
import diffusers  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
from peft.utils.hotswap import hotswap_adapter  # noqa: E402

import loha_core.peft as drop_in  # noqa: E402

from .processes import ended_well  # noqa: E402
from .test_model_torch import launched  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
# One sentence, so that every batch shows what was learned from the last.
IDS = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(0)).expand(8, 12)


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    yield
    drop_in.disable()


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def on_llama(**settings: Any) -> peft.PeftModel:
    defaults = {"r": 4, "alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    base = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoHaConfig(**(defaults | settings)))


def train(model: nn.Module, loss_of: Any) -> list[float]:
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def language_loss(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


# Programs: (the model, its losses)


def trainer(folder: Path) -> tuple[nn.Module, list[float]]:
    """transformers' Trainer, to the end; and from its checkpoint half way, bit for bit."""

    def made() -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=STEPS, save_steps=STEPS // 2, logging_steps=1, learning_rate=1e-2, use_cpu=True,
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        examples = [{"input_ids": ids, "labels": ids} for ids in IDS]
        model = on_llama(rank_dropout=0.1, module_dropout=0.1)
        return transformers.Trainer(model, arguments, train_dataset=examples)

    def losses(of: transformers.Trainer) -> list[float]:
        return [entry["loss"] for entry in of.state.log_history if "loss" in entry]

    whole, resumed = made(), made()
    whole.train()
    checkpoint = folder / f"checkpoint-{STEPS // 2}"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == STEPS and losses(resumed) == losses(whole)
    state, again = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)
    return whole.model, losses(whole)


def diffusers_add_adapter(folder: Path) -> tuple[nn.Module, list[float]]:
    """And into a second U-Net by PEFT's state dict."""
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
    models = unet(), unet()
    torch.manual_seed(1)
    for model in models:
        model.requires_grad_(False)
        model.add_adapter(config, "pictures")
    latents, timesteps, captions = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 900]), torch.randn(4, 5, 8)

    def predicted(model: nn.Module) -> torch.Tensor:
        return model(latents, timesteps, captions).sample

    found = train(models[0], lambda model: (predicted(model) - latents).square().mean())
    state = peft.get_peft_model_state_dict(models[0], adapter_name="pictures")
    peft.set_peft_model_state_dict(models[1], state, adapter_name="pictures")
    assert torch.equal(predicted(models[1]), predicted(models[0]))
    models[0].disable_adapters()
    assert torch.equal(predicted(models[0]), predicted(unet()))
    return models[0], found


def mixed_with_lora(folder: Path) -> tuple[nn.Module, list[float]]:
    base = llama()
    torch.manual_seed(1)
    model = peft.PeftMixedModel(base, peft.LoHaConfig(target_modules=["q_proj", "down_proj"]), "loha")
    model.add_adapter("lora", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["loha", "lora"])
    return model, train(model, language_loss)


def accelerated(folder: Path) -> tuple[nn.Module, list[float]]:
    """Half, saved by Accelerate; the other half in a second model that loads it."""
    batches = torch.utils.data.DataLoader(IDS, batch_size=2)
    found: list[float] = []
    for half in range(2):
        accelerator = accelerate.Accelerator(cpu=True)
        model = on_llama()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, batches)
        if half:
            accelerator.load_state(str(folder))
        for ids in loader:
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        if not half:
            accelerator.save_state(str(folder))
    assert found[len(batches)] < found[0]
    return accelerator.unwrap_model(model), found


@pytest.mark.parametrize("program", [trainer, diffusers_add_adapter, mixed_with_lora, accelerated])
def test_losses_are_pefts(program, tmp_path):
    _, theirs = program(tmp_path / "without")
    drop_in.enable()
    model, ours = program(tmp_path / "with")
    assert are_ours(model) and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-6)


def are_ours(model: nn.Module) -> bool:
    kinds = {type(m) for m in model.modules() if isinstance(m, peft.tuners.loha.LoHaLayer)}
    return bool(kinds) and {kind.__module__ for kind in kinds} == {drop_in.__name__}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_training_step_in_one_graph(backend):
    """PEFT's layers in eval mode: in training they branch on a random number, which no graph holds."""
    found = {}
    for name in ("peft", "ours"):
        torch.compiler.reset()
        if name == "ours":
            drop_in.enable()
        model = on_llama().train(name == "ours")
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        found[name] = train(model, lambda model, compiled=compiled: language_loss(compiled))
        assert are_ours(model) == (name == "ours")
        model.eval()
        with torch.no_grad():
            logits = compiled(input_ids=IDS).logits
            torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert found["ours"] == pytest.approx(found["peft"], rel=1e-6)
    drop_in.disable()
    assert found["ours"] == pytest.approx(train(on_llama(), language_loss), rel=1e-6)


DDP = """
import json, sys, torch, torch.distributed as dist, transformers
from torch.nn.parallel import DistributedDataParallel
import loha_core.peft
from tests.core.test_peft_examples import IDS, STEPS, are_ours, on_llama, train

dist.init_process_group("gloo")
rank, world, out, is_ours = dist.get_rank(), dist.get_world_size(), sys.argv[1], sys.argv[2] == "ours"
torch.set_num_threads(1)
if is_ours:
    loha_core.peft.enable()
model = DistributedDataParallel(on_llama())
assert are_ours(model) == is_ours
ids = IDS[rank * len(IDS) // world : (rank + 1) * len(IDS) // world]
losses = torch.tensor(train(model, lambda model: model(input_ids=ids, labels=ids).loss), dtype=torch.float64)
dist.all_reduce(losses)
if rank == 0:
    with open(out, "w") as file:
        json.dump((losses / world).tolist(), file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    """The mean of their losses is that of one process with the whole batch, and PEFT's."""
    script = tmp_path / "train.py"
    script.write_text(DDP)
    losses = {}
    for name in ("peft", "ours"):
        out = tmp_path / f"{name}.json"
        found = launched(script, 2, out, name)
        assert out.exists() and ended_well(found), found.stderr
        losses[name] = json.loads(out.read_text())
    assert losses["ours"] == pytest.approx(losses["peft"], rel=1e-6)
    assert losses["peft"] == pytest.approx(train(on_llama(), language_loss), rel=1e-5)


@pytest.mark.parametrize("name", ["peft", "ours"])
def test_hotswap_is_for_loras_and_changes_nothing(name, tmp_path):
    """PEFT swaps LoRAs alone, and says so."""
    if name == "ours":
        drop_in.enable()
    on_llama(init_weights=False).save_pretrained(tmp_path)
    model = on_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="only supports"):
        hotswap_adapter(model, tmp_path, "default")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
