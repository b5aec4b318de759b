"""Many clients' updates as one: against their mean, in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loha_core import Adapter, LoHaConfig, LoHaError, LoHaFactors, LoHaModel, get_peft_model_state_dict
from loha_core.factors import LoRAFactors
from loha_core.federated import aggregate

from .processes import PATIENCE

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR, CONV = "lora_unet_proj_in", "lora_unet_conv_in"


def flat(out: int, inner: int, rank: int, alpha: float | None = None) -> LoHaFactors:
    a1, a2 = torch.randn(2, out, rank, dtype=torch.float64)
    b1, b2 = torch.randn(2, rank, inner, dtype=torch.float64)
    return LoHaFactors(a1, b1, a2, b2, rank if alpha is None else alpha)


def tucker(out: int, inner: int, rank: int, kernel: tuple[int, ...] = (3, 3)) -> LoHaFactors:
    (a1, a2), (b1, b2) = (torch.randn(2, rank, n, dtype=torch.float64) for n in (out, inner))
    t1, t2 = torch.randn(2, rank, rank, *kernel, dtype=torch.float64)
    return LoHaFactors(a1, b1, a2, b2, rank, t1, t2)


def clients(ranks: list[int]) -> list[Adapter]:
    torch.manual_seed(0)
    return [Adapter({LINEAR: flat(40, 30, rank), CONV: tucker(24, 8, rank)}) for rank in ranks]


def mean(adapters: list[Adapter], weights: list[float], name: str) -> torch.Tensor:
    """Σ n_k·ΔW_k / Σ n_k, as a matrix."""
    updates = [adapter.layers[name].delta(torch.float64).flatten(1) for adapter in adapters]
    return sum(w * u for w, u in zip(weights, updates, strict=True)) / sum(weights)


def error(found: Adapter, adapters: list[Adapter], weights: list[float]) -> float:
    exact = {name: mean(adapters, weights, name) for name in adapters[0].layers}
    lost = sum((found.layers[n].delta(torch.float64).flatten(1) - u).square().sum() for n, u in exact.items())
    return float((lost / sum(u.square().sum() for u in exact.values())).sqrt())


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[2, 2, 2], [1, 2, 3], [2]])
def test_exact_is_the_mean_of_the_updates_whatever_the_clients_ranks(ranks):
    adapters, weights = clients(ranks), [10.0, 30, 5][: len(ranks)]
    found, report = aggregate(adapters, weights, "exact")
    for name in (LINEAR, CONV):
        torch.testing.assert_close(
            found.layers[name].delta(torch.float64).flatten(1), mean(adapters, weights, name), rtol=1e-9, atol=1e-9
        )
    assert report.error == 0
    if len(ranks) > 1:
        assert found.layers[LINEAR].rank == sum(rank**2 for rank in ranks)  # below min(40, 30)


@given(
    st.integers(1, 12), st.integers(1, 12),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 100)), min_size=1, max_size=4).filter(
        lambda each: any(weight for _, weight in each)
    ),
)  # fmt: skip
def test_exact_for_any_shapes_ranks_and_weights(out, inner, each):
    torch.manual_seed(0)
    adapters = [Adapter({LINEAR: flat(out, inner, rank)}) for rank, _ in each]
    weights = [weight for _, weight in each]
    found = aggregate(adapters, weights, "exact").adapter
    torch.testing.assert_close(
        found.layers[LINEAR].delta(torch.float64), mean(adapters, weights, LINEAR), rtol=1e-9, atol=1e-9
    )
    assert found.layers[LINEAR].rank <= max(sum(rank**2 for rank, _ in each), min(out, inner))


@pytest.mark.parametrize("resize", ["svd", "fit"])
def test_it_is_resized_to_the_rounds_rank_and_says_what_that_loses(resize):
    adapters, weights = clients([2, 3, 2]), [1.0, 2, 3]
    found, report = aggregate(adapters, weights, "exact", rank=4, resize=resize)
    assert {layer.rank for layer in found.layers.values()} == {4}
    assert 0.05 < report.error < 0.9
    assert report.error == pytest.approx(error(found, adapters, weights), rel=1e-5)
    # No matrix of that rank is nearer than svd's; a true LoHa of that rank is.
    best = error(aggregate(adapters, weights, "exact", rank=4).adapter, adapters, weights)
    tails = [torch.linalg.svdvals(mean(adapters, weights, name))[4:] for name in (LINEAR, CONV)]
    size = sum(mean(adapters, weights, name).square().sum() for name in (LINEAR, CONV))
    assert best == pytest.approx(float((sum(t.square().sum() for t in tails) / size).sqrt()), rel=1e-6)
    assert report.error < best if resize == "fit" else report.error == pytest.approx(best)


def perturbed(layer: LoHaFactors, by: float) -> LoHaFactors:
    return replace(layer, **{name: t + by * torch.randn_like(t) for name, t in layer.tensors().items()})


@pytest.mark.parametrize("by", [0.03, 0.3])
def test_near_moves_the_mean_of_the_factors_to_the_mean_of_the_updates(by):
    """As far as the rank allows, and without another scale of the factors."""
    (start,), weights = clients([2]), [10.0, 30, 5]
    adapters = [Adapter({name: perturbed(f, by) for name, f in start.layers.items()}) for _ in weights]
    found, report = aggregate(adapters, weights, "exact", resize="near", start=start)
    mixed = aggregate(adapters, weights, "factors").adapter
    assert report.error == pytest.approx(error(found, adapters, weights), rel=1e-6)
    assert report.error < 0.8 * error(mixed, adapters, weights)
    for name in (LINEAR, CONV):
        new, old, begun = (a.layers[name] for a in (found, mixed, start))
        assert (new.rank, new.alpha, new.dtype) == (begun.rank, begun.alpha, begun.dtype)
        # The least change: no factor has been scaled at another's cost.
        for part, tensor in new.tensors().items():
            assert float((tensor - old.tensors()[part]).norm() / tensor.norm()) < by


def test_near_finds_the_update_of_one_client_again_from_factors_of_another_size():
    (start,) = clients([2])
    client = Adapter({n: replace(f, w1_a=f.w1_a * 4, w2_b=f.w2_b / 4) for n, f in start.layers.items()})
    found, report = aggregate([client], [1.0], "exact", resize="near", start=start)
    assert report.error < 1e-7
    for name in (LINEAR, CONV):
        torch.testing.assert_close(found.layers[name].delta(), start.layers[name].delta())


def test_near_takes_clients_of_other_ranks_and_scales():
    (start,) = clients([3])
    adapters = [
        Adapter({n: replace(perturbed(f, 0.1), alpha=6.0) for n, f in start.layers.items()}),
        *(Adapter({LINEAR: flat(40, 30, r), CONV: tucker(24, 8, r)}) for r in (1, 4)),
    ]
    found, report = aggregate(adapters, [8.0, 1, 1], "exact", resize="near", start=start)
    assert {f.rank for f in found.layers.values()} == {3}
    assert report.error == pytest.approx(error(found, adapters, [8.0, 1, 1]), rel=1e-6)
    assert report.error < 0.4


def trained(rank: int) -> LoHaModel:
    model = LoHaModel(nn.Sequential(nn.Linear(16, 16)), LoHaConfig(r=rank, alpha=rank, target_modules=["0"]))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model


def test_clients_go_on_from_it_in_the_next_round():
    """Rank and scale are those of the configuration, so that its factors are a client's start."""
    torch.manual_seed(0)
    models = [trained(3) for _ in range(3)]
    found = aggregate([model.to_adapter() for model in models], [1, 1, 2], rank=3).adapter
    (layer,) = found.layers.values()
    assert (layer.rank, layer.alpha) == (3, 3)
    client = models[0].model[0]
    start = {f"hada_{part}": t for part, t in layer.tensors().items()}
    client.load_state_dict({f"{k}.default": t for k, t in start.items()}, strict=False)
    torch.testing.assert_close(client.get_delta_weight("default"), layer.delta())


def test_states_by_key_are_taken_too():
    torch.manual_seed(0)
    models = [trained(2) for _ in range(2)]
    by_state = aggregate([get_peft_model_state_dict(model) for model in models], [1, 3]).adapter
    by_adapter = aggregate([model.to_adapter() for model in models], [1, 3]).adapter
    (a,), (b,) = by_state.layers.values(), by_adapter.layers.values()
    torch.testing.assert_close(a.delta(), b.delta())


# --- factors ---------------------------------------------------------------------------------------------------------


def test_factors_is_fedavg_of_each_factor():
    adapters, weights = clients([2, 2, 2]), [10.0, 30, 5]
    found, report = aggregate(adapters, weights, "factors")
    for name in (LINEAR, CONV):
        for part, tensor in found.layers[name].tensors().items():
            each = [adapter.layers[name].tensors()[part] for adapter in adapters]
            expected = sum(w * t for w, t in zip(weights, each, strict=True)) / 45
            torch.testing.assert_close(tensor, expected)
        assert found.layers[name].alpha == adapters[0].layers[name].alpha
    # It is not the mean of the updates, and the report says by how much.
    assert report.error > 0.3
    assert report.error == pytest.approx(error(found, adapters, weights), rel=1e-6)


def test_one_client_or_equal_clients_have_no_error_in_either_way():
    adapters = clients([2]) * 3
    for each in (adapters[:1], adapters):
        for method in ("factors", "exact"):
            found, report = aggregate(each, [2.0] * len(each), method)
            assert error(found, each, [1.0] * len(each)) < 1e-7
            assert report.error < 1e-7


def test_tensors_beside_the_layers_are_averaged():
    first, second = clients([2, 2])
    first.extras, second.extras = ({"lora_unet_norm.diff": torch.full((4,), value)} for value in (1.0, 4.0))
    for method in ("factors", "exact"):
        found = aggregate([first, second], [2, 1], method).adapter
        torch.testing.assert_close(found.extras["lora_unet_norm.diff"], torch.full((4,), 2.0))


def test_dtypes_stay_and_sums_are_wide():
    first, second = clients([2, 2])
    low = [replace(a, layers={n: f.to(dtype=torch.float16) for n, f in a.layers.items()}) for a in (first, second)]
    found = aggregate(low, [1, 2], "factors").adapter
    assert {f.dtype for f in found.layers.values()} == {torch.float16}
    exact = aggregate(low, [1, 2], "exact").adapter.layers[LINEAR]
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.delta(torch.float64), mean(low, [1, 2], LINEAR), rtol=1e-5, atol=1e-5)


def test_what_is_given_stays_as_it_was():
    adapters = clients([2, 2])
    before = [{n: {k: t.clone() for k, t in f.tensors().items()} for n, f in a.layers.items()} for a in adapters]
    for method in ("factors", "exact"):
        aggregate(adapters, [1, 2], method)
    for adapter, old in zip(adapters, before, strict=True):
        assert all(torch.equal(adapter.layers[n].tensors()[k], t) for n, f in old.items() for k, t in f.items())


# --- what is refused -------------------------------------------------------------------------------------------------


def spoiled(index: int = 1, **changes) -> list[Adapter]:
    adapters = clients([2, 2, 2])
    adapters[index].layers[LINEAR] = replace(adapters[index].layers[LINEAR], **changes)
    return adapters


@pytest.mark.parametrize("method", ["factors", "exact"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_client_and_key(method, value):
    bad = torch.randn(40, 2, dtype=torch.float64)
    bad[0, 1] = value
    with pytest.raises(LoHaError, match=rf"^client 1: {LINEAR}.w1_a: 1 of 80 values are NaN or infinite"):
        aggregate(spoiled(w1_a=bad), [1, 1, 1], method)


@pytest.mark.parametrize("method", ["factors", "exact"])
def test_dora_is_refused_by_name(method):
    with pytest.raises(LoHaError, match=rf"^client 1: {LINEAR} is DoRA"):
        aggregate(spoiled(dora_scale=torch.ones(40, 1, dtype=torch.float64)), [1, 1, 1], method)
    start = spoiled(dora_scale=torch.ones(40, 1, dtype=torch.float64))[1]
    with pytest.raises(LoHaError, match=rf"^start: {LINEAR} is DoRA"):
        aggregate(clients([2, 2]), [1, 1], resize="near", start=start)
    lora = {f"lora_unet_x.{k}": t for k, t in LoRAFactors(torch.ones(4, 1), torch.ones(1, 4), 1).tensors().items()}
    adapters = clients([2, 2])
    for adapter in adapters:
        adapter.extras |= lora | {"lora_unet_x.dora_scale": torch.ones(4, 1)}
    with pytest.raises(LoHaError, match="^client 0: lora_unet_x is DoRA"):
        aggregate(adapters, [1, 1], method)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        (lambda: clients([2, 3]), rf"client 1: {LINEAR}.w1_a is \(40, 3\), and \(40, 2\) in client 0.*'exact'"),
        (lambda: spoiled(alpha=9.0), rf"client 1: {LINEAR} has alpha 9, and 2 in client 0"),
        (lambda: [*clients([2, 2]), Adapter({LINEAR: flat(40, 30, 2)})], rf"client 2: {CONV}.w1_a is not there"),
        (lambda: [clients([2])[0], replace(clients([2])[0], source="b.safetensors", layers={LINEAR: flat(40, 30, 1)})],
         r"client 1 \(b.safetensors\): "),
    ],
)  # fmt: skip
def test_factors_that_are_not_alike_are_refused_and_exact_takes_them(adapters, words):
    each = adapters()
    with pytest.raises(LoHaError, match=words):
        aggregate(each, [1] * len(each), "factors")
    found = aggregate(each, [1] * len(each), "exact").adapter
    torch.testing.assert_close(found.layers[LINEAR].delta(torch.float64), mean(each, [1] * len(each), LINEAR))


@pytest.mark.parametrize(
    ("weights", "settings", "words"),
    [
        ([1], {}, "2 clients and 1 weights"),
        ([1, -1], {}, "client 1: its weight is -1"),
        ([1, float("nan")], {}, "client 1: its weight is nan"),
        ([0, 0], {}, "all weights are 0"),
        ([1, 1], {"method": "mean"}, "method is 'mean'"),
        ([1, 1], {"resize": "qr"}, "resize is 'qr'"),
        ([1, 1], {"method": "factors", "rank": 2}, "leave rank out"),
        ([1, 1], {"rank": 0}, "rank is 0"),
        ([1, 1], {"resize": "near"}, "'near' needs start"),
        ([1, 1], {"start": Adapter({LINEAR: flat(40, 30, 2)})}, "nothing else does"),
        ([1, 1], {"resize": "near", "start": Adapter({LINEAR: flat(40, 30, 2)})}, f"start: {CONV}: is a LoHa layer of"),
        (
            [1, 1],
            {"resize": "near", "start": Adapter({LINEAR: flat(40, 30, 2, alpha=0.0), CONV: tucker(24, 8, 2)})},
            f"start: {LINEAR}: has alpha 0",
        ),
        (
            [1, 1],
            {"resize": "near", "start": Adapter({LINEAR: flat(40, 30, 2), CONV: flat(24, 72, 2)})},
            rf"start: {CONV}: is \(24, 8, 3, 3\) with a core, and \(24, 72\) without a core in the start",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(weights, settings, words):
    with pytest.raises(LoHaError, match=words):
        aggregate(clients([2, 2]), weights, **settings)


def test_no_client_and_different_shapes_are_refused():
    with pytest.raises(LoHaError, match="0 clients"):
        aggregate([], [])
    with pytest.raises(LoHaError, match="client 1: has no layer"):
        aggregate([*clients([2]), Adapter({})], [1, 1])
    with pytest.raises(LoHaError, match="client 1: lora_unet_proj_in has shape"):
        aggregate([*clients([2]), Adapter({LINEAR: flat(20, 30, 2)})], [1, 1])
    with pytest.raises(LoHaError, match="client 0: w: .*missing"):
        aggregate([{"w.hada_w1_a": torch.ones(2, 1)}], [1])


def test_the_package_needs_no_flower():
    code = "import sys, loha_core.federated, loha_core.fedpara; print({'flwr', 'ray', 'grpc'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert run.stdout.strip() == "set()"
