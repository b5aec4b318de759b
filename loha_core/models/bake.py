"""Adapters written into a checkpoint's weights, tensor by tensor, without ComfyUI."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from torch import Tensor

from ..adapter import DIFFERENCES, Adapter, split, split_other
from ..bind import Network, Report, Target, bind, weight_key
from ..blocks import BlockStrength
from ..errors import LoHaError
from ..factors import LoHaFactors, LoRAFactors
from ..formats import metadata as provenance
from ..formats.container import SUFFIXES, check_finite
from ..naming.recognise import diffusion_paths
from ..naming.respell import like
from ..ops.apply import add_delta_
from ..transform.merge import Progress, block_strength
from .tensor_file import Change, Weights, network, part_of


def apply_to_checkpoint(
    checkpoint: str | Path,
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | float,
    out: str | Path,
    *,
    blocks: BlockStrength | Sequence[BlockStrength | None] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Bake adapters into a copy of a checkpoint: W + Σ strength·ΔW in each weight's own dtype; DoRA as it is trained.

    A quantised weight (see `quantised`) is changed as what it means, in float32, and stored in its own format again,
    with new scales and rounded once; a note of the report says how many were.

    One tensor is in memory at a time. Names of every family in `naming`, of diffusers' files and of bare model
    files are understood. LoRA layers and ``.diff`` tensors of mixed files are applied, too.

    Args:
        checkpoint: a .safetensors file. It is only read.
        adapters: applied in this order, which matters for DoRA.
        strengths: one for each adapter, or one for all.
        out: the new file.
        blocks: multipliers of the strengths by block and by pattern.
        overwrite: whether ``out`` may exist.
        dry_run: check everything and report, but write nothing.
        progress: called before each changed tensor with (done, total, key).

    Returns:
        for each adapter what was applied and what was not.

    Raises:
        LoHaError: shapes that do not fit (another base model), nothing that fits, a weight in a format that is not
            known, ``out`` is the input or exists, values that are not finite, a disk that is full. ``out`` is then
            as it was.
    """
    weights, out = Weights(checkpoint), Path(out)
    each = list(strengths) if isinstance(strengths, Sequence) else [strengths] * len(adapters)
    _check(weights, adapters, each, out, overwrite)
    by_adapter = [blocks] * len(adapters) if blocks is None or isinstance(blocks, BlockStrength) else list(blocks)
    known = network(weights.shapes())
    modules = [key.removesuffix(".weight") for key in diffusion_paths(known.shapes)]
    adapters = [like(adapter, modules, joining=False) for adapter in adapters]
    changes: dict[str, list[Change]] = defaultdict(list)
    reports = []
    for adapter, strength, block in zip(adapters, each, by_adapter, strict=True):
        reports.append(_planned(adapter, strength, block, weights, known, changes))
        if not any(reports[-1].matched.values()):
            raise LoHaError(f"nothing in this adapter fits {weights.path}:\n{reports[-1].text(limit=5)}")
    if dry_run:
        return reports
    history = provenance.entry(adapters, "bake", checkpoint=weights.path.name, strengths=each)
    metadata = {k: v for k, v in weights.metadata.items() if not provenance.is_hash(k)}
    metadata[provenance.HISTORY] = json.dumps([*provenance.history(weights.metadata), history], ensure_ascii=False)
    ready = {key: partial(_changed, f"{weights.path}: {key}", steps) for key, steps in changes.items()}
    done = count()

    def change(key: str) -> Change | None:
        if key in ready and progress is not None:
            progress(next(done), len(ready), key)
        return ready.get(key)

    weights.rewritten(out, change, metadata)
    if progress is not None:
        progress(len(ready), len(ready), "")
    return reports


def _check(
    weights: Weights, adapters: Sequence[Adapter], strengths: Sequence[float], out: Path, overwrite: bool
) -> None:
    if not adapters or len(adapters) != len(strengths):
        raise LoHaError(f"{len(adapters)} adapters and {len(strengths)} strengths; give one strength for each adapter")
    for adapter, strength in zip(adapters, strengths, strict=True):
        if not isinstance(strength, (int, float)) or not math.isfinite(strength):
            raise LoHaError(f"{adapter.source}: its strength is {strength!r}; expected a finite number")
    if out.suffix.lower() not in SUFFIXES:
        raise LoHaError(f"{out}: a checkpoint is one file; give a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists() and os.path.samefile(out, weights.path):
        raise LoHaError(f"{out}: is the checkpoint itself, which is never changed; choose another name")
    if any(a.source and out.exists() and Path(a.source).exists() and os.path.samefile(out, a.source) for a in adapters):
        raise LoHaError(f"{out}: is one of the adapters, which are never changed; choose another name")
    if out.exists() and not overwrite:
        raise LoHaError(f"{out}: exists already; choose another name, or allow overwriting (--force)")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, free = weights.path.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise LoHaError(f"{out}: needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left; make room")


def _planned(
    adapter: Adapter,
    strength: float,
    blocks: BlockStrength | None,
    weights: Weights,
    known: Network,
    changes: dict[str, list[Change]],
) -> Report:
    """Find what this adapter does to which weight, and add it to ``changes``."""
    layers, rest = split(adapter)
    multiplier = block_strength(blocks, adapter)
    for name in layers:
        if (found := known.find(name)) is not None:
            weights.survey.check(weights.path, weight_key(found))
    acting: dict[str, list[Change]] = defaultdict(list)
    whole = replace(adapter, layers={name: _as_loha(layer) for name, layer in layers.items()}, extras={})
    binding = bind(whole, {"checkpoint": known})
    for name, target, factors in binding.layers["checkpoint"]:
        if own := strength * multiplier(name):  # none at all leaves the weight as it is, and is no reason to round it
            acting[weight_key(target)].append(partial(_add, target, factors, own))
    for key, tensor in rest.items():
        module, suffix = split_other(key) or ("", "")
        found = _difference_target(known.shapes, module, suffix)
        if found is not None:
            weights.survey.check(weights.path, found)
        if found is None:
            binding.report.unmatched[key] = "not a kind that can be baked, or no such layer"
        elif tuple(tensor.shape) != known.shapes[found]:
            raise LoHaError(f"{adapter.source}: {key} is {tuple(tensor.shape)}; {found} is {known.shapes[found]}")
        else:
            if own := strength * multiplier(module):
                acting[found].append(partial(_add_difference, tensor, own))
            binding.report.matched["checkpoint"].append(key)
    for key, steps in acting.items():
        changes[key] += steps
    if formats := weights.survey.formats(acting):
        binding.report.notes.append(f"weights re-quantised in their own format: {formats}")
    return binding.report


def _as_loha(layer: LoHaFactors | LoRAFactors) -> LoHaFactors:
    if isinstance(layer, LoHaFactors):
        return layer
    return replace(LoHaFactors.from_product(*layer.product()), dora_scale=layer.dora_scale)


def _difference_target(shapes: dict[str, tuple[int, ...]], module: str, suffix: str) -> str | None:
    """The weight or bias that a ``.diff``, ``.diff_b``, ``.w_norm`` or ``.b_norm`` belongs to."""
    if suffix not in DIFFERENCES:
        return None
    target = network(shapes, least_axes=1).find(module)  # norms, too
    if not isinstance(target, str):
        return None
    key = target.removesuffix("weight") + ("bias" if suffix in ("diff_b", "b_norm") else "weight")
    return key if key in shapes else None


def _add(target: Target, factors: LoHaFactors, strength: float, weight: Tensor) -> None:
    add_delta_(part_of(weight, target), factors, strength)


def _add_difference(difference: Tensor, strength: float, weight: Tensor) -> None:
    weight.copy_(weight.float() + strength * difference.float())


def _changed(what: str, steps: Sequence[Change], weight: Tensor) -> None:
    """All changes of one weight, in their order."""
    for step in steps:
        step(weight)
    check_finite(weight, what)
