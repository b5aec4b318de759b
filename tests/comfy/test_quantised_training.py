"""Training on a frozen base that is kept in few bits, or waits on the CPU: gradients, layers, and what is kept.

`pytest tests/comfy/test_quantised_training.py -s` prints the table: a reduced Flux with all the linear layers of its
blocks held so; the gradients of all factors together against the fp32 model of the very values that are held, and
against the fp32 model that they were quantised from; beside them the weights' own rounding.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from torch import Tensor, nn

from loha_core import LoHaError, load_adapter
from loha_core.training.attach import attached, recomputing
from loha_core.training.swap import Swap

from . import bases, reduced
from . import test_quantised_files as files
from . import training as t
from .test_quantised_files import weights_of_a_unet  # noqa: F401
from .test_quantised_models import HELD, hold
from .training import page  # noqa: F401

pytestmark = pytest.mark.usefixtures("page")


def held_as(name: str) -> reduced.Models:
    """A Flux whose blocks' linear layers are held so."""
    m = t.models("flux")
    _, patcher = hold(m.model.model.diffusion_model, name)
    return replace(m, model=patcher(m.model.model, bases.CPU, bases.CPU))


def dequantised(held: reduced.Models) -> reduced.Models:
    """The fp32 model of what another one holds."""
    m = t.models("flux")
    for path, layer in m.model.model.diffusion_model.named_modules():
        if isinstance(layer, nn.Linear):
            other = held.model.model.diffusion_model.get_submodule(path)
            layer.weight.data.copy_(t.node("host.weights").dense(other))
    return m


class Step:
    """One forward and backward of a run's first batch, with factors that do something."""

    def __init__(
        self, m: reduced.Models, of: Any = None, *, dora: bool = False, recomputed: bool = False, preset: str = "all"
    ) -> None:
        comfy.model_management.load_models_gpu([m.model])
        config = t.node("graph.network").network_config(
            rank=4, conv_rank=0, preset=preset, dora="output" if dora else "off"
        )
        torch.manual_seed(0)
        self.layers = t.node("host.layers").build(m.model, "MODEL", config)
        for layer in self.layers.values():
            for name in layer.adapter_layer_names[:4]:
                getattr(layer, name)["default"].data.normal_(0, 0.3)
        d, inner = t.diffusion(m, of), m.model.model
        blocks = t.node("host.training").inner_blocks(inner.diffusion_model)
        with (
            t.node("host.autograd").trainable_weights(inner),
            attached(self.layers.values()),
            t.node("host.frozen").weights_made_twice([inner], self.layers.values()),
            t.node("host.autograd").in_place_allowed(blocks, recomputed=recomputed),
            recomputing(blocks if recomputed else ()),
        ):
            d.loss(d.batch(0)).backward()
        parameters = [p for layer in self.layers.values() for p in layer.parameters_of("default")]
        self.gradient = torch.cat([p.grad.double().flatten() for p in parameters])


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def fp32() -> dict[bool, Step]:
    return {dora: Step(t.models("flux"), dora=dora) for dora in (False, True)}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("name", HELD)
def test_gradients_of_a_whole_model(fp32, name, dora, capsys):
    held = held_as(name)
    plain, original = dequantised(held), t.models("flux").model.model.diffusion_model
    exact = Step(plain, dora=dora)
    pairs = [
        (layer.weight.data, original.get_submodule(path).weight.data)
        for path, layer in plain.model.model.diffusion_model.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in path
    ]
    rounding = relative(*(torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2)))
    errors = []
    for recomputed in (False, True):
        found = Step(held, dora=dora, recomputed=recomputed)
        assert found.layers.keys() == exact.layers.keys() == fp32[dora].layers.keys()
        errors.append(relative(found.gradient, exact.gradient))
    from_fp32 = relative(found.gradient, fp32[dora].gradient)
    linear = [m for m in original.modules() if isinstance(m, nn.Linear)]
    assert len(found.layers) == len(linear)
    with capsys.disabled():
        print(
            f"\n    {name:<12}{'DoRA' if dora else '':<6}{len(linear)} layers; gradients from the held values' "
            f"{max(errors):.1e}, from fp32's {from_fp32:.1e}; weights' rounding {rounding:.1e}", end="",
        )  # fmt: skip
    assert max(errors) < 5e-6
    # Two products of rounded weights follow each other wherever there are two layers: some times the rounding of one.
    assert from_fp32 < 4 * rounding


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
@pytest.mark.parametrize("name", ["plain", "cast bf16", *HELD])
@pytest.mark.parametrize("preset", ["attention", "all"])
def test_no_copy_of_a_weight_is_kept(monkeypatch, name, dora, preset):
    """Of layers that are trained and of those that are not; or a packed model would be in memory whole and wide."""
    held = held_as(name)
    inner = held.model.model.diffusion_model
    own = {storage(p) for p in inner.parameters() if type(p) in (Tensor, nn.Parameter)}
    shapes = {t.node("host.weights").shape(layer) for _, layer in t.node("host.weights").layers(inner)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = []

    def pack(tensor: Tensor) -> Any:
        if tuple(tensor.shape) in shapes and not tensor.requires_grad and storage(tensor) not in own:
            kept.append(tuple(tensor.shape))
        return tensor.detach(), tensor._version

    monkeypatch.setattr(t.node("host.autograd"), "_pack", pack)
    step = Step(held, dora=dora, preset=preset)
    assert step.gradient.norm() > 0
    # A matrix of activations may have a weight's shape by chance: only those that nothing trains are counted.
    assert [shape for shape in kept if min(shape) >= 128] == []


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_that_test_would_see_a_copy(monkeypatch):
    monkeypatch.setattr(t.node("host.frozen"), "_is_product", lambda base: False)
    with pytest.raises(AssertionError):
        test_no_copy_of_a_weight_is_kept(monkeypatch, "cast bf16", False, "attention")


@pytest.mark.skipif(bases.IS_NEW, reason="0.33 has one way for files and for --fast")
@pytest.mark.parametrize("kind", ["mixed precision", "--fast"])
def test_products_that_round_their_input_to_fp8_have_gradients(kind):
    """With a scale for its input a layer multiplies in fp8, and that product has no backward."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64) * 0.05, torch.randn(48), torch.randn(2, 5, 64)
    if kind == "mixed precision":
        base = bases.mixed_fp8(weight, bias)
        base.layer.input_scale = nn.Parameter(torch.tensor(0.01), requires_grad=False)
    else:
        base = bases.fp8_ops(weight, bias)
    below = nn.Linear(64, 64).requires_grad_(True)
    with t.node("host.frozen").weights_made_twice([base.layer], []):
        y = base.layer(below(x))
        y.sum().backward()
    exact = nn.functional.linear(below(x), base.held, bias)
    torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(below.weight.grad, base.held.sum(0)[:, None] * x.sum((0, 1)), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(base.layer(x), nn.functional.linear(x, base.held, bias)), "it does not round its input"


# --- real files in real loaders, and the node ---------------------------------------------------


@pytest.mark.parametrize("form", files.FORMS)
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "DoRA"])
def test_a_file_trains_as_its_values_do(weights_of_a_unet, form, dora, tmp_path, capsys):  # noqa: F811
    with torch.inference_mode():  # as a graph loads
        patcher, held = files.quantised(weights_of_a_unet, form, tmp_path)
        reference = comfy.sd.load_diffusion_model_state_dict(
            {f"model.diffusion_model.{key}": value for key, value in held.items()},
            model_options={"dtype": torch.float32},
        )
    items = [t.Item(torch.randn(4, 8, 8), conditioning=[[torch.randn(1, 77, 768), {}]]) for _ in range(2)]
    # Biases, and weights that the file has no scale for, ComfyUI 0.3.75 rounds to fp8 as it loads them.
    for path, layer in t.node("host.weights").layers(patcher.model):
        for name, parameter in reference.model.get_submodule(path).named_parameters(recurse=False):
            with torch.inference_mode():
                parameter.data.copy_(t.node("host.weights").dense(layer, name))
    steps = []
    for model in (reference, patcher):
        m = reduced.Models("sd15", model, None)
        of = t.dataset(m, items)
        with torch.inference_mode(False):
            steps.append(Step(m, of, dora=dora))
    exact, found = steps
    assert found.layers.keys() == exact.layers.keys() and len(found.layers) > 30
    error = relative(found.gradient, exact.gradient)
    with capsys.disabled():
        print(f"\n    {form:<16}{'DoRA' if dora else '':<6}{len(found.layers)} layers, gradients {error:.1e}", end="")
    assert error < 1e-3
    first = t.job(m, of, network={"dora": "output" if dora else "off"}, steps=4, name="file")
    adapter = first.run()
    assert t.moved(adapter) > 0 and all(map(math.isfinite, first.losses))
    comfy.model_management.unload_all_models()


# --- block swap ---------------------------------------------------------------------------------


@pytest.fixture
def swaps(monkeypatch) -> list[Swap]:
    made: list[Swap] = []
    real = Swap.__init__

    def init(swap, *args):
        real(swap, *args)
        made.append(swap)

    monkeypatch.setattr(Swap, "__init__", init)
    return made


def stored_values(m: reduced.Models) -> list[Tensor]:
    return [getattr(p, "_qdata", p.data).as_subclass(Tensor).clone() for p in m.model.model.parameters()]


@pytest.mark.parametrize("name", ["plain", "cast bf16", *(name for name in HELD if name != "NF4")])
def test_swapped_blocks_learn_the_same_bits(swaps, name):
    held = held_as(name)
    unswapped = t.train(held, steps=2, gradient_checkpointing=True, name="unswapped")
    own = stored_values(held)
    for count in (1, 2):
        found = t.train(held, steps=2, gradient_checkpointing=True, blocks_to_swap=count, name=f"swapped {count}")
        assert t.same(found, unswapped)
        [swap] = swaps
        c = swap.counts
        assert c.at_once == 2 and c.waits == 1 and c.ahead >= 2 * 2 * 2 - 1 and not swap.copies
        sizes = [sum(map(t.node("host.placement").stored_bytes, block.parameters())) for block in swap.blocks]
        assert c.bytes_waiting - c.bytes_at_once >= sum(sorted(sizes)[:count])
        assert all(map(torch.equal, stored_values(held), own))
        assert not any("forward" in vars(part) for part in held.model.model.modules())
        swaps.clear()
        comfy.model_management.unload_all_models()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("mode", [None, "merge", "live"])
def test_swap_in_other_families_and_upon_a_loha(modes, swaps, family, mode):
    m = t.models(family)
    if mode is not None:
        model, _, _ = modes.apply(m.model, None, t.train(m, steps=1, name="first"), 1.0, 1.0, mode=mode)
        m = replace(m, model=model)
    wanted = t.train(m, steps=2, gradient_checkpointing=True, name="unswapped")
    comfy.model_management.unload_all_models()
    found = t.train(m, steps=2, gradient_checkpointing=True, blocks_to_swap=5, name="swapped")
    assert swaps[0].counts.at_once == 2 and swaps[0].counts.ahead > swaps[0].counts.waits
    # What ComfyUI merged into weights that then wait, it merges into them anew at each use, in another order of sums.
    assert t.same(found, wanted) if mode is None else t.distance(found, wanted) < 1e-3
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("mode", [None, "merge", "live"])
def test_swap_as_a_graph_runs_it(modes, weights_of_a_unet, mode, tmp_path):  # noqa: F811
    """ComfyUI's real loaders, in inference mode; afterwards ComfyUI can still move the model."""
    form = files.FORMS[0]
    made = []
    for count in (0, 6):
        with torch.inference_mode():
            model, _ = files.quantised(weights_of_a_unet, form, tmp_path)
            m = reduced.Models("sd15", model, None)
            if mode is not None:
                first = reduced.write(m, "kohya-ldm", tmp_path)[0]
                model, _, _ = modes.apply(model, None, load_adapter(first), 0.5, 1.0, mode=mode)
            if count:
                files.output(model)  # else it is loaded to be trained, as it often is
            items = [t.Item(torch.zeros(4, 8, 8), conditioning=[[torch.ones(1, 77, 768), {}]])]
            m = reduced.Models("sd15", model, None)
            job = t.job(
                m, t.dataset(m, items), gradient_checkpointing=True, blocks_to_swap=count, name=f"graph {count}"
            )
            with torch.inference_mode(False):
                made.append(job.run())
            comfy.model_management.unload_all_models()
    assert t.moved(made[0]) > 0
    assert t.distance(made[1], made[0]) < (0.05 if mode == "merge" else 1e-6)


def test_previews_and_cancels_amid_a_swap(swaps):
    m = t.models("flux")
    own, placed = list(map(id, m.model.model.parameters())), []

    class Watch:
        def __init__(self, trainer, patcher):
            self.patcher = patcher

        def __call__(self, event):
            if type(event).__name__ == "PreviewDue":
                assert not swaps[0].copies and not swaps[0].order
                comfy.model_management.load_models_gpu([self.patcher])  # as sampling does
                placed.append(event.step)
            if type(event).__name__ == "Stepped" and event.step == 3:
                assert swaps[0].order
                raise InterruptProcessingException

    job = t.job(m, steps=4, preview_every=1, vae=object(), gradient_checkpointing=True, blocks_to_swap=2)
    run, _ = job.trainer.training_run(folder=job.folder, **job.values)
    with torch.inference_mode(False), pytest.raises(InterruptProcessingException):
        run.run(Watch, resume=False)
    assert placed == [1, 2] and not swaps[0].copies
    assert list(map(id, m.model.model.parameters())) == own
    assert not any("forward" in vars(part) for part in m.model.model.modules())
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"blocks_to_swap": 1}, "gradient_checkpointing off.*switch gradient_checkpointing on"),
        ({"blocks_to_swap": 3, "gradient_checkpointing": True}, "this model has 4 blocks, so choose 0 to 2"),
    ],
)
def test_swaps_that_cannot_be(values, says):
    with pytest.raises(LoHaError, match=says):
        t.train(t.models("flux"), **values)


def test_nf4_cannot_be_swapped():
    with pytest.raises(LoHaError, match="bitsandbytes"):
        t.train(held_as("NF4"), gradient_checkpointing=True, blocks_to_swap=1)


def test_the_node_says_what_memory_it_took(monkeypatch):
    held = held_as("GGUF Q8_0")
    monkeypatch.setattr(t.node("graph.trainer").LoHaTrainer, "hidden", None, raising=False)
    values = t.job(held, gradient_checkpointing=True, blocks_to_swap=2).values
    output = t.node("graph.trainer").LoHaTrainer.execute(name="told", **values)
    [text] = output.ui.as_dict()["text"]
    layers = [m for m in held.model.model.modules() if hasattr(getattr(m, "weight", None), "tensor_type")]
    packed = sum(m.weight.untyped_storage().nbytes() for m in layers)
    factors = sum(f.nbytes for x in output.args[0].layers.values() for f in x.tensors().values())
    size = t.node("host.placement")._size
    assert f"frozen weights on cpu: {size(packed)} as gguf q8_0" in text
    assert f"factors {size(factors)}, their gradients as much" in text and "block swap:" in text
    assert "at most" not in text.splitlines()[-1]  # no figure for what nothing measured
