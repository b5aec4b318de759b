"""Adapters written into a checkpoint's weights, tensor by tensor, without ComfyUI."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path

from torch import Tensor

from ..adapter import DIFFERENCES, Adapter, split_key, split_layers
from ..bind import Network, Report, Target, bind, weight_key
from ..blocks import BlockStrength
from ..errors import LoHaError, about, check_number
from ..factors import LoHaFactors
from ..formats import metadata
from ..formats.container import SUFFIXES, check_finite
from ..naming.parts import as_loha
from ..naming.recognise import diffusion_paths
from ..naming.respell import like
from ..ops.apply import add_delta_
from ..transform.merge import block_strength
from ..transform.report import Progress
from .keys import network, part_of
from .tensor_file import Change, TensorFile


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

    To a quantised weight (see `quantised`) the update is added in float32; it is stored in the format that it had, with
    new scales and rounded once. A note of the report says how many were.

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
    file, out = TensorFile(checkpoint), Path(out)
    each = list(strengths) if isinstance(strengths, Sequence) else [strengths] * len(adapters)
    if not adapters or len(adapters) != len(each):
        raise LoHaError(f"{len(adapters)} adapters and {len(each)} strengths; give one strength for each adapter")
    for adapter, strength in zip(adapters, each, strict=True):
        with about(adapter.source):
            check_number("strength", strength)
    try:
        _check_output(file.path, adapters, out, overwrite)
    except OSError as error:
        raise LoHaError(f"{out}: cannot be checked ({error})") from error
    by_adapter = [blocks] * len(adapters) if blocks is None or isinstance(blocks, BlockStrength) else list(blocks)
    plan, reports = _Plan(file), []
    for adapter, strength, block in zip(adapters, each, by_adapter, strict=True):
        reports.append(plan.add(adapter, strength, block))
        if not any(reports[-1].matched.values()):
            raise LoHaError(f"nothing in this adapter fits {file.path}:\n{reports[-1].text(limit=5)}")
    if dry_run:
        return reports
    entry = metadata.history_entry(adapters, "bake", checkpoint=file.path.name, strengths=each)
    kept = {k: v for k, v in file.metadata.items() if not metadata.is_hash(k)}
    kept[metadata.HISTORY] = json.dumps([*metadata.history(file.metadata), entry], ensure_ascii=False)
    plan.carry_out(out, kept, progress)
    return reports


def _check_output(checkpoint: Path, adapters: Sequence[Adapter], out: Path, overwrite: bool) -> None:
    """Refuse a file that may not be written, or has no room."""
    if out.suffix.lower() not in SUFFIXES:
        raise LoHaError(f"{out}: a checkpoint is one file; give a name that ends in {' or '.join(SUFFIXES)}")
    if out.exists() and os.path.samefile(out, checkpoint):
        raise LoHaError(f"{out}: is the checkpoint itself, which is never changed; choose another name")
    if any(a.source and out.exists() and Path(a.source).exists() and os.path.samefile(out, a.source) for a in adapters):
        raise LoHaError(f"{out}: is one of the adapters, which are never changed; choose another name")
    if out.exists() and not overwrite:
        raise LoHaError(f"{out}: exists already; choose another name, or allow overwriting (--force)")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    needed, free = checkpoint.stat().st_size, shutil.disk_usage(folder).free
    if needed > free:
        raise LoHaError(f"{out}: needs {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left; make room")


class _Plan:
    """What adapters do to which of a checkpoint's weights."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.shapes = file.shapes()
        self.layers = network(self.shapes)
        self.diffusion_modules = [key.removesuffix(".weight") for key in diffusion_paths(self.shapes)]
        self.changes: dict[str, list[Change]] = defaultdict(list)

    def add(self, adapter: Adapter, strength: float, blocks: BlockStrength | None) -> Report:
        """Find the weights that an adapter changes.

        Raises:
            LoHaError: shapes that do not fit, or a weight that cannot be read.
        """
        adapter = like(adapter, self.diffusion_modules, joining=False)
        layers, tensors = split_layers(adapter)
        multiplier = block_strength(blocks, adapter)
        for name in layers:
            if (target := self.layers.find(name)) is not None:
                self.file.check(weight_key(target))
        changes: dict[str, list[Change]] = defaultdict(list)
        lohas = replace(adapter, layers={name: as_loha(layer) for name, layer in layers.items()}, extras={})
        binding = bind(lohas, {"checkpoint": self.layers})
        for name, target, factors in binding.layers["checkpoint"]:
            # At strength 0 a weight stays as it is, rather than being rounded again.
            if layer_strength := strength * multiplier(name):
                changes[weight_key(target)].append(partial(_add, target, factors, layer_strength))
        for key, tensor in tensors.items():
            module, suffix = split_key(key) or ("", "")
            weight = self._changed_by(module, suffix)
            if weight is None:
                binding.report.unmatched[key] = "not a kind that can be baked, or no such layer"
                continue
            self.file.check(weight)
            if tuple(tensor.shape) != self.shapes[weight]:
                raise LoHaError(f"{adapter.source}: {key} is {tuple(tensor.shape)}; {weight} is {self.shapes[weight]}")
            if layer_strength := strength * multiplier(module):
                changes[weight].append(partial(_add_difference, tensor, layer_strength))
            binding.report.matched["checkpoint"].append(key)
        for key, steps in changes.items():
            self.changes[key] += steps
        if formats := self.file.formats.summary(changes):
            binding.report.notes.append(f"weights re-quantised in their own format: {formats}")
        return binding.report

    @cached_property
    def with_norms(self) -> Network:
        return network(self.shapes, min_axes=1)

    def _changed_by(self, module: str, suffix: str) -> str | None:
        """The weight or bias that a ``.diff``, ``.diff_b``, ``.w_norm`` or ``.b_norm`` belongs to."""
        target = self.with_norms.find(module) if suffix in DIFFERENCES else None
        if not isinstance(target, str):
            return None
        key = target.removesuffix("weight") + ("bias" if suffix in ("diff_b", "b_norm") else "weight")
        return key if key in self.shapes else None

    def carry_out(self, out: Path, metadata: dict[str, str], progress: Progress | None) -> None:
        """Write the changed copy.

        Raises:
            LoHaError: values that are not finite, or a file that cannot be written; ``out`` is then as it was.
        """
        done = count()

        def apply(key: str, steps: Sequence[Change], weight: Tensor) -> None:
            if progress is not None:
                progress(next(done), len(self.changes), key)
            for step in steps:
                step(weight)
            check_finite(weight, f"{self.file.path}: {key}")

        changes = {key: partial(apply, key, steps) for key, steps in self.changes.items()}
        self.file.rewrite(out, changes, metadata)
        if progress is not None:
            progress(len(changes), len(changes), "")


def _add(target: Target, factors: LoHaFactors, strength: float, weight: Tensor) -> None:
    add_delta_(part_of(weight, target), factors, strength)


def _add_difference(difference: Tensor, strength: float, weight: Tensor) -> None:
    weight.copy_(weight.float() + strength * difference.float())
