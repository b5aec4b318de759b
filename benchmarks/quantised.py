"""What a live LoHa costs on a layer whose weight is quantised.

    PYTHONPATH=. python -m benchmarks.quantised [--width 3072] [--tokens 4096] [--rank 8] [--repeats 7] [--only fp8]

One linear layer, width × width, held in each of the ways that tests/comfy/test_bases.py knows, as it is used in
sampling: alone, with a live LoHa, with a live DoRA, and with ComfyUI's own LoHa as a weight function, which is how
low VRAM applies it. In turns in one process, medians, and the products in the weight's own format that ran for each.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import platform
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from demo import comfyui

comfyui.importable()

import comfy.lora  # noqa: E402
import comfy.model_patcher  # noqa: E402
from comfy.weight_adapter import LoHaAdapter  # noqa: E402

from loha_core import LoHaFactors  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
KEY = "layer.weight"


def module(name: str, path: Path, **options: Any) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 3072), ("tokens", 4096), ("rank", 8), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", nargs="*", help="ways to hold a weight, by name; all by default")
    options = parser.parse_args()
    pack = module("ComfyUI-LoHa", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    asyncio.run(pack.comfy_entrypoint())
    bases = module("bases", ROOT / "tests" / "comfy" / "bases.py")
    live, patches = (sys.modules[f"ComfyUI-LoHa.nodes.host.{name}"] for name in ("live", "patches"))

    torch.manual_seed(0)
    n, r = options.width, options.rank
    weight, bias, x = torch.randn(n, n) * 0.02, torch.zeros(n), torch.randn(1, options.tokens, n)
    a, b = torch.randn(2, n, r) * 0.1, torch.randn(2, r, n) * 0.1
    print(f"{n} x {n}, {options.tokens} tokens, rank {r}, float32 inputs, {torch.get_num_threads()} threads, "
          f"{platform.processor() or platform.machine()}, torch {torch.__version__}")  # fmt: skip
    print(f"{'':<20}{'alone':>9}{'LoHa':>16}{'DoRA':>16}{'ComfyUI, weight function':>28}   products in the format")
    for name in bases.BASES:
        if name in ("plain", "torch's own", "resident") or (options.only and name not in options.only):
            continue
        base = bases.BASES[name](weight, bias)
        patcher = bases.patcher_for(base)
        ways = {"alone": patcher}
        for way, magnitude in (("LoHa", None), ("DoRA", weight.norm(dim=1, keepdim=True))):
            f = LoHaFactors(a[0], b[0], a[1], b[1], float(r), dora_scale=magnitude)
            ways[way] = live.apply_live(patcher, [patches.Patch(KEY, patches.LoHaPatch.from_factors(f), 1.0)], 1.0)
        native = LoHaAdapter(set(), (a[0], b[0], float(r), a[1], b[1], None, None, None))
        seconds: dict[str, list[float]] = {way: [] for way in (*ways, "native")}
        products = {}
        for _ in range(options.repeats + 1):
            for way in seconds:
                functions = getattr(base.layer, "weight_function", None)
                if way == "native" and functions is None:
                    continue
                if way == "native":
                    patch = (1.0, native, 1.0, None, None)
                    base.layer.weight_function = [lambda w, p=patch: comfy.lora.calculate_weight([p], w.clone(), KEY)]
                else:
                    ways[way].patch_model()
                with torch.inference_mode():
                    base.layer(x[:, :8])  # DoRA looks at the weight once
                    base.products.clear()
                    started = time.perf_counter()
                    base.layer(x)
                seconds[way].append(time.perf_counter() - started)
                products[way] = len(base.products)
                if way == "native":
                    base.layer.weight_function = functions
                else:
                    ways[way].unpatch_model()
        found = {way: statistics.median(each[1:]) for way, each in seconds.items() if each}
        alone = found["alone"]
        cells = [f"{found[way]:9.3f} {found[way] / alone:5.2f}x" for way in ("LoHa", "DoRA")]
        other = f"{found['native']:9.3f} {found['native'] / alone:5.2f}x" if "native" in found else "takes none"
        ran = ", ".join(f"{way} {count}" for way, count in products.items() if base.products or count)
        print(f"{name:<20}{alone:9.3f}{cells[0]:>16}{cells[1]:>16}{other:>28}   {ran}", flush=True)


if __name__ == "__main__":
    main()
