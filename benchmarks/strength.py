"""What a change of strength costs, and what live sampling costs, on a full-size SD1.5.

    PYTHONPATH=. python -m benchmarks.strength [--ranks 4,8,16,32] [--size 64] [--repeats 3]

Random weights: an 860M-parameter UNet and CLIP-L in float32, a LoHa on all linear and convolution layers. All in one
process, in turns, medians. Two parts:

change: a new strength until the model is ready to sample, as ComfyUI does it (loader, then load_models_gpu); and how
much of that goes into ComfyUI's `calculate_weight`, which adds updates to weights, both ours and ComfyUI's.
sampling: seconds for one call of the UNet on a batch of two (prompt and negative prompt), beside the same call without
an adapter, and beside an update that is rebuilt at every call and convolved by itself, as a bypass does it today.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from demo import comfyui

comfyui.importable()

import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.weight_adapter import LoHaAdapter  # noqa: E402

from loha_core import Adapter, LoHaFactors  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "disable_self_attentions": None,
    "num_classes": None,
    "adm_in_channels": None,
    "dtype": torch.float32,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}


def load_pack() -> Any:
    """The pack's `nodes.host.modes`, from this folder, as ComfyUI loads custom nodes."""
    spec = importlib.util.spec_from_file_location(
        "ComfyUI-LoHa", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["ComfyUI-LoHa"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return sys.modules["ComfyUI-LoHa.nodes.host.modes"]


def build() -> tuple[Any, Any]:
    """ModelPatcher of the UNet, and CLIP; random weights of a sensible size."""
    torch.manual_seed(0)
    config = comfy.supported_models.SD15(UNET)
    config.set_inference_dtype(torch.float32, None)
    unet = config.get_model({}, "")
    clip = comfy.sd.CLIP(config.clip_target({}), model_options={"dtype": torch.float32})
    for module in (unet.diffusion_model, clip.cond_stage_model):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            fan_in = max(1, parameter[0].numel() if parameter.dim() > 1 else 1)
            parameter.data.normal_(std=fan_in**-0.5 if parameter.dim() > 1 else 0.02)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu), clip


def adapter_for(model: Any, clip: Any, rank: int) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """A LoHa on all linear and convolution layers: as ours, and as the tensors that ComfyUI's loader reads."""
    layers, tensors = {}, {}
    for module, prefix in ((model.model, ""), (clip.cond_stage_model, "text_encoders.")):
        for name, layer in module.named_modules():
            if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and "text_projection" not in name:
                out, columns = layer.weight.shape[0], layer.weight[0].numel()
                pairs = [torch.randn(s) * 0.05 for s in ((out, rank), (rank, columns)) * 2]
                layers[f"{prefix}{name}"] = LoHaFactors(*pairs, alpha=float(rank))
                for half, tensor in zip(("w1_a", "w1_b", "w2_a", "w2_b"), pairs, strict=True):
                    tensors[f"{prefix}{name}.hada_{half}"] = tensor
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(rank))
    return Adapter(layers, dialect="native", source="random"), tensors


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; the ways take turns."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            samples[name].append(seconds(work))
    return {name: statistics.median(values) for name, values in samples.items()}


@contextmanager
def adding() -> Iterator[list[float]]:
    """Seconds of each `calculate_weight` while this lasts."""
    calculate_weight, times = comfy.lora.calculate_weight, list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        weight = calculate_weight(*args, **kwargs)
        times.append(time.perf_counter() - started)
        return weight

    comfy.lora.calculate_weight = timed
    try:
        yield times
    finally:
        comfy.lora.calculate_weight = calculate_weight


def change(modes: Any, model: Any, clip: Any, rank: int, repeats: int) -> dict[str, float]:
    adapter, tensors = adapter_for(model, clip, rank)
    strengths = iter(s / 1000 for s in range(1, 10_000))
    held: dict[str, Any] = {}  # as ComfyUI's cache holds a node's outputs until the next run

    def load(name: str, patched_model: Any, patched_clip: Any) -> None:
        comfy.model_management.load_models_gpu([patched_clip.patcher])
        comfy.model_management.load_models_gpu([patched_model])
        held[name] = (patched_model, patched_clip)

    def native() -> None:
        s = next(strengths)
        load("native", *comfy.sd.load_lora_for_models(model, clip, tensors, s, s))

    def ours(mode: str) -> Callable[[], None]:
        def run() -> None:
            s = next(strengths)
            load(mode, *modes.apply(model, clip, adapter, s, s, mode=mode)[:2])

        return run

    result = {}
    # One mode after another, each from its own second run on: sliding one strength, not switching modes.
    for name, work in (("native", native), ("merge", ours("merge")), ("live", ours("live"))):
        if name == "live":
            written = {n: (p.data_ptr(), p._version) for n, p in model.model.named_parameters()}
            comfy.model_management.unload_all_models()
        work()
        if name == "live":
            written = {n: (p.data_ptr(), p._version) for n, p in model.model.named_parameters()}
        times = repeats if name != "live" else 5 * repeats
        with adding() as spent:
            result[name] = medians({name: work}, times)[name]
        result[f"{name}, adding"] = sum(spent) / times
        if name == "live":
            assert written == {n: (p.data_ptr(), p._version) for n, p in model.model.named_parameters()}
        held.clear()
        comfy.model_management.unload_all_models()
    return result


def sampling(modes: Any, model: Any, clip: Any, rank: int, size: int, repeats: int) -> dict[str, float]:
    adapter, _ = adapter_for(model, clip, rank)
    x, context = torch.randn(2, 4, size, size), torch.randn(2, 77, 768)

    def step(patcher: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                patcher.model.apply_model(x, torch.full((2,), 3.0), c_crossattn=context)

        return run

    alive = modes.apply(model, None, adapter, 0.5, 0.0, mode="live")[0]
    auto = modes.apply(model, None, adapter, 0.5, 0.0, mode="auto")
    samples: dict[str, list[float]] = {"plain": [], "live": [], "auto": [], "rebuild": []}
    for _ in range(repeats):
        for name, patcher in (("plain", model), ("live", alive), ("auto", auto[0])):
            comfy.model_management.load_models_gpu([patcher])
            samples[name].append(seconds(step(patcher)))
        comfy.model_management.load_models_gpu([model])
        removed = bypass(model, adapter, 0.5)
        samples["rebuild"].append(seconds(step(model)))
        for handle in removed:
            handle.remove()
    comfy.model_management.unload_all_models()
    result = {name: statistics.median(values) for name, values in samples.items()}
    return result | {"auto is live": float("mode: live" in auto[2].notes)}


def bypass(model: Any, adapter: Adapter, strength: float) -> list[Any]:
    """ΔW made anew at each call and applied beside the layer, as ComfyUI's bypass mode does (0.33 and before)."""
    handles = []
    for name, layer in model.model.named_modules():
        if (factors := adapter.layers.get(name)) is None:
            continue
        native = LoHaAdapter(set(), (*factors_tuple(factors), None, None, None))

        def hook(module: Any, inputs: Any, output: torch.Tensor, native: Any = native) -> torch.Tensor:
            update = native.calculate_weight(
                torch.zeros_like(module.weight), "", strength, 1.0, None, lambda a: a, torch.float32
            )
            if isinstance(module, torch.nn.Linear):
                return output + torch.nn.functional.linear(inputs[0], update)
            return output + torch.nn.functional.conv2d(inputs[0], update, None, module.stride, module.padding)

        handles.append(layer.register_forward_hook(hook))
    return handles


def factors_tuple(f: LoHaFactors) -> tuple[Any, ...]:
    return f.w1_a, f.w1_b, f.alpha, f.w2_a, f.w2_b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--size", type=int, default=64, help="latents are size × size")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["both", "change", "sampling"], default="both")
    options = parser.parse_args()
    ranks = [int(r) for r in options.ranks.split(",")]
    modes = load_pack()
    model, clip = build()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    if options.part != "sampling":
        print("\nA new strength until the model is ready, UNet and CLIP-L; live writes no weight")
        print("  rank     native       merge               live            adding: native        ours")
        for rank in ranks:
            c = change(modes, model, clip, rank, options.repeats)
            merge, live = (f"{c[n]:9.4g} s {c['native'] / c[n]:6.1f}×" for n in ("merge", "live"))
            native, ours = c["native, adding"], c["merge, adding"]
            print(
                f"  {rank:4d} {c['native']:8.2f} s {merge} {live} {native:12.2f} s {ours:9.2f} s {native / ours:6.1f}×",
                flush=True,
            )
    if options.part != "change":
        print(f"\nOne call of the UNet, batch 2, {options.size}×{options.size} latents, relative to no adapter:")
        print("  rank   no adapter      live      auto (chose)     rebuilt beside the layer")
        for rank in ranks:
            s = sampling(modes, model, clip, rank, options.size, options.repeats)
            chose = "live" if s["auto is live"] else "merge"
            cells = "".join(f"{s[n] / s['plain']:9.2f}×" for n in ("live", "auto"))
            print(
                f"  {rank:4d} {s['plain']:10.2f} s {cells} ({chose:5s}) {s['rebuild'] / s['plain']:9.2f}×", flush=True
            )


if __name__ == "__main__":
    main()
