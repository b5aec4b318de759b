"""Weights that are W₁∘W₂ from the start: ranks, first values, layers, and the way back to plain ones."""

from __future__ import annotations

import copy
from math import prod, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from loha_core.fedpara import FedParaConv, FedParaLayer, FedParaLinear, dense, factorize, plan
from loha_core.fedpara.ranks import least_rank, most_rank, parameter_count, rank_of

from .pairwise import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {
    "fedpara": {},
    "flat": {"tucker": False},
    "pfedpara": {"personal": True},
    "flat pfedpara": {"personal": True, "tucker": False},
    "tanh": {"activation": "tanh"},
}


def half(layer: FedParaLayer, which: str) -> torch.Tensor:
    """M₁ or M₂ from the paper, by einsum; nothing of loha_core."""
    a, b = getattr(layer, f"w{which}_a"), getattr(layer, f"w{which}_b")
    if hasattr(layer, "t1"):
        return torch.einsum("pq...,po,qi->oi...", getattr(layer, f"t{which}"), a, b)
    return torch.einsum("or,ri->oi", a, b).reshape(layer.weight_shape)


def paper(layer: FedParaLayer) -> torch.Tensor:
    """W as the paper writes it."""
    first, second = half(layer, "1"), half(layer, "2")
    if layer.activation == "tanh":
        return first.tanh() * second.tanh()
    return first * (second + 1) if layer.personal else first * second


def net() -> nn.Module:
    """(n, 3, 8, 8) -> (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


# --- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "tucker", "least", "most", "by_gamma"),
    [
        # √256; 65536 / (2·512). (1−γ)·16 + γ·64 is 20.8 and 40.
        ((256, 256), False, 16, 64, {0: 16, 0.1: 21, 0.5: 40, 1: 64}),
        # 2r·(512 + 9r) ≤ 589824 up to r = 154, with 585816; 155 has 591170. 29.8 at 0.1.
        ((256, 256, 3, 3), True, 16, 154, {0: 16, 0.1: 30, 1: 154}),
        # The kernel flattened: √256 of 256 × 2304; 589824 / (2·2560) = 115.2.
        ((256, 256, 3, 3), False, 16, 115, {0: 16, 0.1: 26, 1: 115}),
        # √3 -> 2; 2·6·(67 + 54) = 1452 ≤ 1728 < 2·7·(67 + 63) = 1820.
        ((64, 3, 3, 3), True, 2, 6, {0: 2, 0.1: 2, 0.5: 4, 1: 6}),
        # One input, nine positions: r² kernels at most, √9; 2·2·(17 + 18) = 140 ≤ 144, at rank 2.
        ((16, 1, 3, 3), True, 3, 2, {0: 0, 0.1: 0, 1: 0}),
        ((64, 1, 7, 7), True, 7, 5, {0: 0, 1: 0}),
        # 2r·(40 + 49r) ≤ 12544 up to 10. √8, since ⌈49 / 8⌉ is less.
        ((32, 8, 7, 7), True, 3, 10, {0: 3, 1: 10}),
        # √10 -> 4; 640 / 148 = 4.3: one rank only.
        ((10, 64), False, 4, 4, {0: 4, 0.3: 4, 1: 4}),
        # √1; 2·(1 + 64) > 64: nothing is saved.
        ((1, 64), False, 1, 0, {0: 0, 0.5: 0, 1: 0}),
        # √8 -> 3, but 2·2·16 = 64 is all that there is: at rank 2 W cannot have full rank.
        ((8, 8), False, 3, 2, {0: 0, 1: 0}),
    ],
)
def test_ranks_by_hand(shape, tucker, least, most, by_gamma):
    assert (least_rank(shape, tucker), most_rank(shape, tucker)) == (least, most)
    assert {gamma: rank_of(gamma, shape, tucker) for gamma in by_gamma} == by_gamma


def is_full(shape: tuple[int, ...], tucker: bool, r: int) -> bool:
    """Whether each unfolding can have full rank: r² by outputs and by inputs, and of these products by positions."""
    out, inner, kernel = shape[0], shape[1], prod(shape[2:])
    if not tucker:
        return r**2 >= min(out, inner * kernel)
    by_position = min(r**2, out) * min(r**2, inner)
    return r**2 >= min(out, inner) and by_position >= min(kernel, out * inner)


sizes = st.integers(1, 700)


@given(sizes, sizes, st.lists(st.integers(1, 7), max_size=3), st.booleans(), st.floats(0, 1))
def test_ranks_are_the_least_and_the_most(out, inner, kernel, tucker, gamma):
    shape, tucker = (out, inner, *kernel), tucker and bool(kernel)
    least, most = least_rank(shape, tucker), most_rank(shape, tucker)
    assert [is_full(shape, tucker, r) for r in (least - 1, least)] == [False, True]
    assert parameter_count(shape, most, tucker) <= prod(shape) < parameter_count(shape, most + 1, tucker)
    rank = rank_of(gamma, shape, tucker)
    assert least <= rank <= most if least <= most else rank == 0


@given(
    st.integers(1, 24), st.integers(1, 24), st.lists(st.integers(1, 3), max_size=3), st.booleans(), st.integers(1, 4)
)
def test_layers_have_as_many_numbers_as_the_formula_says(out, inner, kernel, tucker, rank):
    tucker = tucker and bool(kernel)
    kind = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][len(kernel)]
    plain = kind(inner, out, *([tuple(kernel)] if kernel else []), dtype=torch.float64)
    layer = (FedParaConv if kernel else FedParaLinear)(plain, rank, tucker=tucker)
    assert sum(p.numel() for p in layer.parameters()) == parameter_count((out, inner, *kernel), rank, tucker) + out
    torch.testing.assert_close(layer.weight, paper(layer))
    torch.testing.assert_close(layer.dense().weight, layer.weight, rtol=0, atol=0)


# The table of VGG16's sizes in the paper's supplement, in millions, its last three linear layers left as they are.
PAPER = {0.1: 1.55, 0.2: 2.33, 0.3: 3.31, 0.4: 4.45, 0.5: 5.79, 0.6: 7.33, 0.7: 9.01, 0.8: 10.90, 0.9: 12.92}


def vgg16() -> nn.Module:
    """Of 15.25 million parameters: the one for 32×32 pictures of 10 classes, with group norms."""
    widths = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    layers: list[nn.Module] = []
    for inner, out in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(inner, out, 3, padding=1), nn.GroupNorm(32, out)]
    head = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    return nn.Sequential(*layers, nn.Flatten(), nn.Sequential(head))


def test_vgg16_has_the_papers_sizes():
    with torch.device("meta"):
        model = vgg16()
    plans = {gamma: plan(model, gamma, skip=["27"]) for gamma in PAPER}
    print("\nVGG16, γ: parameters (the paper's)")
    for gamma, found in plans.items():
        print(f"{gamma}: {found.after / 1e6:.3f} M ({PAPER[gamma]} M)")
    assert round(plans[0.1].before / 1e6, 2) == 15.25
    assert max(abs(found.after / 1e6 - PAPER[gamma]) for gamma, found in plans.items()) < 0.011
    # The paper's table 1: the layers that its examples are about, at rank 16.
    assert parameter_count((256, 256), 16, False) == 16_384
    assert parameter_count((256, 256, 3, 3), 16, False) == 81_920
    assert parameter_count((256, 256, 3, 3), 16, True) == 20_992


@pytest.mark.parametrize(("out", "inner"), [(16, 16), (9, 16), (25, 12), (10, 30), (16, 1), (2, 20)])
def test_random_factors_reach_full_rank_at_the_least_rank_and_not_below(out, inner):
    torch.manual_seed(0)
    for kernel in ((), (3, 3)):
        least = least_rank((out, inner, *kernel), bool(kernel))
        kind = nn.Conv2d if kernel else nn.Linear
        plain = kind(inner, out, *([kernel] if kernel else []), dtype=torch.float64)
        make = FedParaConv if kernel else FedParaLinear
        for rank in {least, max(1, least - 1)}:
            weight = make(plain, rank, tucker=bool(kernel)).weight.detach()
            short, unfolded = min(out, inner), [weight.flatten(1), weight.transpose(0, 1).flatten(1)]
            unfolded = [(matrix, rank**2, short) for matrix in unfolded]
            by_position = min(rank**2, out) * min(rank**2, inner)
            if kernel:
                unfolded.append((weight.flatten(2).flatten(0, 1), by_position, min(9, out * inner)))
            for matrix, bound, _ in unfolded:
                assert int(torch.linalg.matrix_rank(matrix)) == min(bound, *matrix.shape)
            assert all(bound >= full for _, bound, full in unfolded) == (rank >= least)


# --- first values ----------------------------------------------------------------------------------------------------


@pairwise(
    form=list(FORMS), fan=["in", "out"],
    plain=[lambda: nn.Linear(60, 90), lambda: nn.Conv2d(24, 40, 3), lambda: nn.Conv1d(64, 96, 5, groups=2)],
)  # fmt: skip
def test_the_variance_is_hes(form, fan, plain):
    torch.manual_seed(0)
    plain = plain()
    settings = {"tucker": True, **FORMS[form]}
    settings["tucker"] = settings["tucker"] and plain.weight.dim() > 2
    make = FedParaConv if plain.weight.dim() > 2 else FedParaLinear
    layer = make(plain, 8, fan=fan, **settings)
    found, mean = [], []
    for _ in range(40 if layer.activation else 100):
        layer.reset_parameters()
        found.append(layer.weight.detach().square().mean())
        mean.append(layer.weight.detach().mean())
    out, inner, *kernel = plain.weight.shape
    expected = 2 / (prod([inner, *kernel]) if fan == "in" else out // getattr(plain, "groups", 1) * prod(kernel))
    assert torch.stack(found).mean().item() == pytest.approx(expected, rel=0.05)
    assert abs(torch.stack(mean).mean().item()) < 0.05 * sqrt(expected)


def test_the_bias_stays_and_the_seed_decides():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = net()
        bias = model[0].bias
        factorize(model)
        assert model[0].bias is bias
        models.append(model)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_reset_parameters_draws_anew_on_a_model_made_without_values():
    with torch.device("meta"):
        model = factorize(net(), activation="tanh")
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, FedParaLayer):
            module.reset_parameters()
            assert module.weight.square().mean().item() == pytest.approx(2 / prod(module.weight_shape[1:]), rel=0.8)


# --- layers ----------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    lambda kind, n: kind(8, 12, 3),
    lambda kind, n: kind(8, 12, (3, 2, 3)[:n], (2, 1, 2)[:n], (1, 0, 2)[:n], (1, 2, 1)[:n], bias=False),
    lambda kind, n: kind(8, 12, 3, padding="same", dilation=2, groups=4),
    lambda kind, n: kind(8, 12, (2, 3, 2)[:n], padding="same"),
    lambda kind, n: kind(8, 12, 3, padding=1, padding_mode="circular", groups=2),
    lambda kind, n: kind(8, 12, 3, padding=2, padding_mode="replicate", stride=2),
    lambda kind, n: kind(8, 12, 3, padding=1, padding_mode="reflect" if n < 3 else "replicate"),
    lambda kind, n: kind(8, 12, 1),
]


@pairwise(geometry=GEOMETRIES, axes=[1, 2, 3], form=list(FORMS), batch=[(), (1,), (2,)])
def test_convolutions_equal_plain_ones_of_the_papers_weight(geometry, axes, form, batch):
    torch.manual_seed(0)
    plain = geometry([nn.Conv1d, nn.Conv2d, nn.Conv3d][axes - 1], axes).double()
    model = factorize(nn.Sequential(copy.deepcopy(plain)), rank=1, **FORMS[form])
    layer = model[0]
    assert isinstance(layer, FedParaConv), "rank 1 saves parameters everywhere here"
    x = torch.randn(*batch, 8, *(7, 6, 5)[:axes], dtype=torch.float64)
    y = layer(x)
    plain.weight = nn.Parameter(paper(layer).detach())
    torch.testing.assert_close(y, plain(x))
    before = {name: getattr(layer, name) for name in plain.__constants__ if hasattr(plain, name)}
    assert before == {name: getattr(plain, name) for name in before}
    back = dense(model)[0]
    assert type(back) is type(plain) and str(back) == str(plain)
    torch.testing.assert_close(back(x), y)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_equal_plain_ones(form, bias):
    torch.manual_seed(0)
    plain = nn.Linear(12, 9, bias=bias, dtype=torch.float64)
    layer = factorize(copy.deepcopy(plain), rank=2, **FORMS[form])
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, paper(layer), layer.bias))
    weight = layer.weight.detach()
    back = dense(layer)
    assert type(back) is nn.Linear and torch.equal(back.weight, weight) and back.weight.requires_grad
    torch.testing.assert_close(back(x), y)


@pairwise(
    form=list(FORMS),
    plain=[
        lambda: nn.Linear(5, 6), lambda: nn.Linear(5, 6, bias=False), lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2),
        lambda: nn.Conv1d(3, 4, 2, padding=1, padding_mode="circular"),
    ],
)  # fmt: skip
def test_gradients(form, plain):
    torch.manual_seed(0)
    plain = plain().double()
    settings = {"tucker": True, **FORMS[form]}
    settings["tucker"] = settings["tucker"] and plain.weight.dim() > 2
    layer = (FedParaConv if plain.weight.dim() > 2 else FedParaLinear)(plain, 2, **settings)
    x = {2: torch.randn(3, 5), 3: torch.randn(2, 3, 5), 4: torch.randn(2, 4, 4, 5)}[plain.weight.dim()]
    x = x.double().requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert gradcheck(run, (x, *values))
    assert all(p.abs().max() > 0 for p in torch.autograd.grad(run(x, *values).square().sum(), values))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(form, kind):
    plain = nn.Linear(96, 96) if kind == "linear" else nn.Conv2d(32, 32, 3)
    layer = factorize(plain, rank=3, **FORMS[form])
    x = torch.randn(2, 96) if kind == "linear" else torch.randn(1, 32, 4, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert max(kept) < prod(layer.weight_shape) / 4
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
