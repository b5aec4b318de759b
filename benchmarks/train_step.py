"""What a training step costs: our LoHa beside PEFT's and LyCORIS', and beside PEFT's LoRA.

    python benchmarks/train_step.py                     # the UNet, r = 4, 8, 16, 32, 64
    python benchmarks/train_step.py --model llama --ranks 8
    python benchmarks/train_step.py --device cuda --autocast bfloat16

All linear layers and convolutions are adapted; AdamW (fused); batch 1. The contestants take turns, step by step, in one
process, so that what else the machine does hits them alike; medians are printed, and the fastest step of each. Memory
is the peak resident size (on a GPU: the peak allocation) of a process of its own, less that of the frozen model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from loha_core import LoHaConfig, LoHaModel

# Labels. LoRA has half of LoHa's parameters at one rank, and as many at twice the rank.
FROZEN, OURS, PEFT, LYCORIS, BYPASS = "frozen", "ours", "peft LoHa", "lycoris LoHa", "lycoris LoHa bypass"
LORA, LORA_EQUAL = "peft LoRA", "peft LoRA 2r"
DROP_IN = "peft + loha_core"  # PEFT's LoHa after loha_core.peft.enable()
LOHAS, ALL = (PEFT, LYCORIS, BYPASS), (FROZEN, OURS, DROP_IN, PEFT, LYCORIS, BYPASS, LORA, LORA_EQUAL)


def unet() -> tuple[nn.Module, Callable[[nn.Module, bool], torch.Tensor]]:
    """107M parameters; 32×32 latents, 77 tokens of 768."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32, block_out_channels=(320, 640), layers_per_block=1, cross_attention_dim=768,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip

    def loss(model: nn.Module, with_input_grad: bool) -> torch.Tensor:
        device = next(model.parameters()).device
        x = torch.randn(1, 4, 32, 32, device=device, requires_grad=with_input_grad)
        condition = torch.randn(1, 77, 768, device=device)
        return model(x, torch.tensor([500], device=device), condition).sample.float().square().mean()

    return model, loss


def llama() -> tuple[nn.Module, Callable[[nn.Module, bool], torch.Tensor]]:
    """Hidden 1024, 4 layers, 512 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss(model: nn.Module, with_input_grad: bool) -> torch.Tensor:
        device = next(model.parameters()).device
        x = torch.randn(1, 512, 1024, device=device, requires_grad=with_input_grad)
        return model(inputs_embeds=x).logits.float().square().mean()

    return model, loss


MODELS = {"unet": unet, "llama": llama}


def targets(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n != "lm_head"]


def adapt(label: str, model: nn.Module, r: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """(the module to call, what it trains)."""
    names = targets(model)
    if label == FROZEN:
        model.requires_grad_(False)
    elif label == OURS:
        model = LoHaModel(model, LoHaConfig(r=r, alpha=r, target_modules=names))
    elif label in (LYCORIS, BYPASS):
        return lycoris(model, names, r, bypass=label == BYPASS)
    else:
        import peft

        import loha_core.peft

        if label in (PEFT, DROP_IN):
            with loha_core.peft.enabled() if label == DROP_IN else nullcontext():
                model = peft.LoHaModel(model, peft.LoHaConfig(r=r, alpha=r, target_modules=names), "default")
        else:
            rank = r if label == LORA else 2 * r
            model = peft.LoraModel(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), "default")
    return model, [p for p in model.parameters() if p.requires_grad]


def lycoris(model: nn.Module, names: list[str], r: int, bypass: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    from lycoris.modules.loha import LohaModule

    model.requires_grad_(False)
    modules = [
        LohaModule(name.replace(".", "_"), model.get_submodule(name), lora_dim=r, alpha=r, bypass_mode=bypass)
        for name in names
    ]
    for module in modules:
        module.apply_to()
    whole = nn.ModuleDict({"base": model, "adapters": nn.ModuleList(modules)})
    whole.forward = model.forward  # type: ignore[method-assign]
    return whole, [p for m in modules for p in m.parameters()]


class Contestant:
    """One way to train, and a step of it."""

    def __init__(self, label: str, options: argparse.Namespace, r: int) -> None:
        torch.manual_seed(0)
        model, self.loss = MODELS[options.model]()
        self.label, self.options = label, options
        self.model, trained = adapt(label, model.to(options.device), r)
        self.model.to(options.device)
        self.count = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step(self) -> float:
        """Seconds."""
        cuda = self.options.device == "cuda"
        dtype = getattr(torch, self.options.autocast) if self.options.autocast else None
        if cuda:
            torch.cuda.synchronize()
        clock = time.process_time if self.options.cpu_seconds else time.perf_counter
        start = clock()
        with torch.autocast(self.options.device, dtype=dtype) if dtype else nullcontext():
            loss = self.loss(self.model, self.label == FROZEN)
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return clock() - start


def times(options: argparse.Namespace, labels: list[str], r: int) -> dict[str, list[float]]:
    contestants = [Contestant(label, options, r) for label in labels]
    for contestant in contestants:
        contestant.step()
    gc.collect()
    found: dict[str, list[float]] = {label: [] for label in labels}
    for _ in range(options.repeats):
        for contestant in contestants:
            found[contestant.label].append(contestant.step())
    return found


def peak(options: argparse.Namespace, label: str, r: int) -> float:
    """Bytes, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", label, "--ranks", str(r), "--model", options.model]
    command += ["--threads", str(options.threads), "--device", options.device, "--autocast", options.autocast]
    # glibc keeps freed memory in arenas of its own otherwise, and the peak would be theirs.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return float(json.loads(done.stdout.splitlines()[-1]))


def print_peak(options: argparse.Namespace) -> None:
    contestant = Contestant(options.peak_of, options, options.ranks[0])
    contestant.step()
    gc.collect()
    with Watch() as watch:
        for _ in range(2):
            contestant.step()
    print(json.dumps(torch.cuda.max_memory_allocated() if options.device == "cuda" else watch.most))


class Watch(threading.Thread):
    """The most memory that this process had while it was watched; what building a model took doesn't count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.001):
            with open("/proc/self/statm", encoding="ascii") as file:
                self.most = max(self.most, int(file.read().split()[1]) * resource.getpagesize())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()


def products(options: argparse.Namespace, r: int) -> dict[str, float]:
    """FLOPs of the adapted layers' products in a step: what is left to gain, where all products run at one speed.

    Frozen: y and the input's gradient. Ours: these, and the cheaper of U and V (three products each with x and y) and
    rebuilding (ΔW's gradient, and its factors' products four times). PEFT: W and ΔW each on its own, and the rest.
    """
    model, loss = MODELS[options.model]()
    found = dict.fromkeys((FROZEN, OURS, PEFT), 0.0)

    def count(module: Any, args: Any, y: torch.Tensor) -> None:
        o = len(module.weight)
        n, i = y.numel() // o, module.weight.numel() // o
        found[FROZEN] += 4 * n * o * i
        found[OURS] += 4 * n * o * i + min(6 * n * r * r * (o + i), 2 * n * o * i + 16 * r * o * i)
        found[PEFT] += 10 * n * o * i + 16 * r * o * i

    for name in targets(model):
        model.get_submodule(name).register_forward_hook(count)
    with torch.no_grad():
        loss(model, False)
    return found


def report(options: argparse.Namespace, r: int) -> dict[str, Any]:
    labels = [label for label in ALL if label in options.only]
    seconds = times(options, labels, r)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    memory = {} if options.no_memory else {label: peak(options, label, r) for label in labels}
    unit = ", CPU seconds" if options.cpu_seconds else ""
    print(f"\n{options.model}, r={r}, {options.repeats} steps, {options.threads} threads, {options.device}{unit}")
    print(f"{'':<20} {'median':>8} {'fastest':>8} {'ours/it':>8}" + ("  above frozen   ours/it" if memory else ""))
    for label in labels:
        line = f"{label:<20} {medians[label]:7.3f}s {min(seconds[label]):7.3f}s {medians[OURS] / medians[label]:8.2f}"
        if memory and label != FROZEN:
            extra = {name: memory[name] - memory[FROZEN] for name in (OURS, label)}
            line += f"  {extra[label] / 1e6:9.0f} MB {extra[OURS] / extra[label]:8.2f}"
        print(line)
    # Steps that were taken in the same turn saw the same machine: their ratios are steadier than those of medians.
    paired = {label: paired_ratio(seconds[OURS], seconds[label]) for label in labels}
    print("paired ratios:", ", ".join(f"{label} {ratio:.2f}" for label, ratio in paired.items() if label != OURS))
    counted = products(options, r)
    ratios = ", ".join(f"{label} {counted[OURS] / counted[label]:.2f}" for label in (FROZEN, PEFT))
    print(f"products, counted: {counted[OURS] / 1e9:.0f} GFLOP, {ratios}")
    return {"r": r, "products": counted, "seconds": seconds, "median": medians, "paired": paired, "memory": memory}


def paired_ratio(one: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def judge(result: dict[str, Any]) -> None:
    """The promises of this project, and whether they hold here."""
    r, ratio, memory = result["r"], result["paired"], result["memory"]
    if r <= 8:
        limits = {PEFT: 0.5, LYCORIS: 0.5, BYPASS: 0.5, LORA: 1.05, FROZEN: 1.6}
    else:
        limits = {label: 1.0 for label in LOHAS}
    promises = [(f"step against {label}", ratio[label], limit) for label, limit in limits.items() if label in ratio]
    if DROP_IN in ratio:
        seconds = result["seconds"]
        promises.append((f"{DROP_IN} against ours", paired_ratio(seconds[DROP_IN], seconds[OURS]), 1.03))
        if PEFT in ratio and r <= 16:
            promises.append((f"{DROP_IN} against {PEFT}", paired_ratio(seconds[DROP_IN], seconds[PEFT]), 0.5))
    if memory and PEFT in memory and r <= 8:
        extra = (memory[OURS] - memory[FROZEN]) / (memory[PEFT] - memory[FROZEN])
        promises.append((f"memory against {PEFT}", extra, 0.4))
    for what, value, limit in promises:
        print(f"  {'holds' if value <= limit else 'FAILS'}  {what}: {value:.2f} ≤ {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="unet")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", default="", help="a dtype, such as bfloat16; by default none")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--cpu-seconds", action="store_true", help="count the processor's seconds: for a busy machine")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak(options)
        return
    results = []
    for r in options.ranks:
        results.append(report(options, r))
        judge(results[-1])
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
