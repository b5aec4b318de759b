"""`loha train` with blocks that wait on the CPU, and with a base in 4 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from loha_core import LoHaConfig, LoHaError
from loha_core.training.attach import blocks_of, recomputing
from loha_core.training.diffusers import run
from loha_core.training.diffusers.pipeline import Diffusion
from loha_core.training.diffusers.placement import place, to_nf4_

from . import pipelines
from .test_training_run import models, plain, project, same, write  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_swapped_blocks_learn_the_same_bits(write, family, capsys, tmp_path):  # noqa: F811
    deeper(tmp_path, family)
    training = {"gradient_checkpointing": True}
    wanted = run.train(write(family, training=training, output={"folder": "whole"}))
    found = run.train(write(family, training=training | {"blocks_to_swap": 2}, output={"folder": "swapped"}))
    assert same(found, wanted)
    assert "at most 2 blocks of them" in capsys.readouterr().err
    # Where blocks wait is no other run.
    again = run.train(write(family, training=training | {"blocks_to_swap": 1, "steps": 3}, output={"folder": "whole"}))
    assert again == wanted


def deeper(root, family) -> None:
    """Blocks enough to let some wait."""
    pipe = pipelines.build(family)
    depth = {"num_layers": 3, "num_single_layers": 2} if family == "flux" else {"num_layers": 5}
    torch.manual_seed(0)
    pipe.transformer = type(pipe.transformer).from_config({**pipe.transformer.config, **depth}).eval()
    pipe.save_pretrained(root / "model")


@pytest.mark.parametrize("family", ["sd15"])
def test_more_than_a_model_has(write, family):  # noqa: F811
    training = {"gradient_checkpointing": True, "blocks_to_swap": 9}
    with pytest.raises(LoHaError, match="blocks_to_swap is 9; this model has 4 blocks, so 0 to 2"):
        run.train(write(family, training=training))


def test_what_cannot_be_set(write):  # noqa: F811
    with pytest.raises(LoHaError, match="blocks_to_swap needs gradient_checkpointing = true"):
        run.train(write(training={"blocks_to_swap": 1}))
    with pytest.raises(LoHaError, match="quantisation is 'int3'; expected"):
        run.train(write(model={"quantisation": "int3"}))


# --- four bits ----------------------------------------------------------------------------------


def gradient(pipe, quantised: bool, dense=None, recomputed: bool = False) -> tuple[torch.Tensor, Diffusion]:
    diffusion = Diffusion(pipe, CPU)
    if quantised:
        to_nf4_(diffusion.model, CPU, torch.float32)
    if dense is not None:
        dense(diffusion.model)
    torch.manual_seed(0)
    layers = diffusion.networks(LoHaConfig(r=2, alpha=2, init_weights=False), False)["model"]
    place(
        diffusion.model,
        layers.values(),
        dataclasses.make_dataclass("Accelerator", ["device", "distributed_type"])(CPU, "NO"),
    )
    blocks = blocks_of(diffusion.model)
    channels = diffusion.pipe.vae.config.latent_channels
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))
    conditionings = [diffusion.encode(text) for text in ("a cat", "a dog")]
    with recomputing(blocks if recomputed else ()):
        diffusion.output(x, torch.tensor([100.0, 700.0]), conditionings).square().mean().backward()
    parts = [p.grad.double().flatten() for layer in layers.values() for p in layer.parameters_of("default")]
    return torch.cat(parts), diffusion


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_gradients_on_nf4_are_those_of_the_values_that_it_holds(family, recomputed):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    found, packed = gradient(pipelines.build(family), True, recomputed=recomputed)
    layers = {n: m for n, m in packed.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert layers and all(m.weight.dtype == torch.uint8 for m in layers.values())

    def dequantised(model: nn.Module) -> None:
        for name, layer in layers.items():
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            model.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(weight)

    exact, _ = gradient(pipelines.build(family), False, dequantised)
    assert len(found) == len(exact)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    original, _ = gradient(pipelines.build(family), False)
    assert 1e-3 * original.norm() < (found - original).norm() < 0.5 * original.norm()


def test_a_run_in_four_bits(write):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    assert run.train(write("flux", model={"quantisation": "nf4"})).is_file()
    with pytest.raises(LoHaError, match="blocks_to_swap cannot move what .* quantisation packs"):
        run.train(
            write("flux", model={"quantisation": "nf4"}, training={"gradient_checkpointing": True, "blocks_to_swap": 1})
        )
    with pytest.raises(LoHaError, match="use_dora needs the weights' own norms"):
        run.train(write("flux", model={"quantisation": "nf4"}, network={"use_dora": True}, output={"folder": "dora"}))
