"""Small training runs in this process, as the nodes make them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.supported_models
import folder_paths
import pytest
import torch
from torch import Tensor

from loha_core import Adapter
from loha_core.training.data.batches import BatchSampler
from loha_core.training.data.dataset import Dataset, Item
from loha_core.training.objectives import Objective

from . import reduced
from .conftest import load_pack

FAMILIES = ("sd15", "sdxl", "sd2v", "sd3", "flux")
CAPTIONS = ("a small red house", "two cats", "snow, trees", "an old man reads")


def node(name: str) -> Any:
    """One of the pack's modules under nodes/."""
    return sys.modules[f"{load_pack().__name__}.nodes.{name}"]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What is sent to the page; and an output folder."""
    sent: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(node("page.monitor"), "tell", lambda event, data: sent.append((event, data)))
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield sent
    folder_paths.set_output_directory(before)
    comfy.model_management.interrupt_current_processing(False)


def models(family: str, dtype: torch.dtype = torch.float32) -> reduced.Models:
    """Reduced models in which a prompt, and each layer, makes a difference that one can measure."""
    m = reduced.build(family, dtype, narrow=True)
    for module in m.modules().values():
        for part in module.modules():
            if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
                part.weight.data.add_(1.0)
    return m


def conditioning(tokens: int = 16, seed: int = 0) -> list[Any]:
    """A prompt as Flux's text encoders would give it."""
    rng = torch.Generator().manual_seed(seed)
    text, pooled = torch.randn(1, tokens, 4096, generator=rng), torch.randn(1, 768, generator=rng)
    return [[text, {"pooled_output": pooled, "guidance": 3.5}]]


def data(m: reduced.Models, count: int = 2, size: int = 8, **of_each: Any) -> Dataset:
    """``count`` latents with captions, or with conditioning where there are no text encoders."""
    channels = m.model.model.latent_format.latent_channels
    items = []
    for i in range(count):
        latent = torch.randn(channels, size, size, generator=torch.Generator().manual_seed(i))
        given = {"conditioning": conditioning(seed=i)} if m.clip is None else {"caption": CAPTIONS[i % len(CAPTIONS)]}
        items.append(Item(latent, **(given | of_each)))
    return dataset(m, items)


def dataset(m: reduced.Models, items: list[Item]) -> Any:
    return node("graph.dataset").ClipDataset(items, node("graph.dataset").Captions(), m.clip)


class Job:
    """A run as the node Train LoHa makes it, but for the LoHa on the model at the end."""

    losses: list[float]

    def __init__(self, folder: Path, resume: bool, workflow: str, values: dict[str, Any]) -> None:
        self.trainer, self.folder, self.resume, self.workflow = node("graph.trainer"), folder, resume, workflow
        self.values = values

    def run(self) -> Adapter:
        run, preview = self.trainer.training_run(folder=self.folder, **self.values)
        watch = partial(self.trainer.Watcher, run, preview, self.workflow)
        adapter, self.losses = run.run(watch, resume=self.resume)
        return adapter


def job(
    m: reduced.Models,
    of: Dataset | None = None,
    *,
    text: bool = False,
    network: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    name: str = "run",
    resume: bool = False,
    workflow: str = "",
    **values: Any,
) -> Job:
    """A run that is short unless ``values`` say otherwise."""
    short = {"model": m.model, "steps": 3, "batch_size": 2, "mixed_precision": "fp32", "save_every": 0}
    nodes = {
        "network": node("graph.network").LoHaNetwork.execute(**{"rank": 4, "conv_rank": 2, **(network or {})}),
        "optimizer": node("graph.optimizer").LoHaOptimizer.execute(
            **{"learning_rate": 0.01, "schedule": "constant", **(optimizer or {})}
        ),
        "objective": node("graph.optimizer").LoHaObjective.execute(**(objective or {})),
    }
    inputs = {name: output.args[0] for name, output in nodes.items()}
    inputs |= {"clip": m.clip if text else None, "dataset": of or data(m)}
    return Job(node("graph.trainer").run_folder(name, resume), resume, workflow, {**inputs, **short, **values})


def train(m: reduced.Models, *args: Any, **values: Any) -> Adapter:
    with torch.inference_mode(False):
        return job(m, *args, **values).run()


def diffusion(
    m: reduced.Models,
    of: Dataset | None = None,
    *,
    batch_size: int = 2,
    seed: int = 0,
    patcher: Any = None,
    **kwargs: Any,
) -> Any:
    patcher = patcher or m.model
    comfy.model_management.load_models_gpu([patcher])
    return node("host.diffusion").Diffusion(patcher, BatchSampler(of or data(m), Objective(**kwargs), batch_size, seed))


def held_out(m: reduced.Models, adapter: Adapter | None = None, of: Dataset | None = None) -> float:
    """The mean loss over batches that no run here gets to, with an adapter or without."""
    patcher = m.model if adapter is None else node("host.modes").apply(m.model, None, adapter, 1.0, 1.0, mode="live")[0]
    d = diffusion(m, of, patcher=patcher)
    with torch.no_grad():
        return sum(float(d.loss(d.batch(1000 + i))) for i in range(8)) / 8


def same(one: Adapter, other: Adapter) -> bool:
    """Bit for bit."""
    a, b = ({n: f.tensors() for n, f in x.layers.items()} for x in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


def distance(one: Adapter, other: Adapter) -> float:
    """Between all updates, relative to their size."""
    pairs = [(f.delta(), other.layers[name].delta()) for name, f in one.layers.items()]
    parts = [torch.stack([(a - b).norm() for a, b in pairs]), torch.stack([b.norm() for _, b in pairs])]
    return float(parts[0].norm() / parts[1].norm())


def moved(adapter: Adapter) -> float:
    """The norm of all updates together."""
    return float(torch.stack([torch.tensor(float(f.norm())) for f in adapter.layers.values()]).norm())


@contextmanager
def untouched(m: reduced.Models) -> Iterator[None]:
    """Fails unless all weights, names, flags and forwards are afterwards what they were."""

    def flags() -> dict[Any, Any]:
        of = {}
        for label, module in m.modules().items():
            for path, part in module.named_modules():
                of[label, path] = (part.training, "forward" in vars(part), type(part))
            of |= {(label, n): p.requires_grad for n, p in module.named_parameters()}
        return of

    weights: dict[Any, Tensor] = m.weights()
    before = flags()
    yield
    after = m.weights()
    assert list(after) == list(weights)
    assert [k for k in weights if not torch.equal(weights[k], after[k])] == []
    assert flags() == before
