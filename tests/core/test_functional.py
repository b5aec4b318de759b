"""The functional forms against float64 einsum and autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from loha_core import LoHaError, LoHaFactors
from loha_core.ops.functional import loha_conv, loha_delta, loha_linear

from .pairwise import pairwise

STRATEGIES = ["khatri-rao", "rebuild"]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def rand(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def factors(tensors, alpha: float = 3.0, dora: torch.Tensor | None = None) -> LoHaFactors:
    w1_a, w1_b, w2_a, w2_b, *t = tensors
    return LoHaFactors(w1_a, w1_b, w2_a, w2_b, alpha, *t, dora_scale=dora)


def flat(out: int, inner: int, rank: int = 2) -> list[torch.Tensor]:
    return [rand(out, rank), rand(rank, inner), rand(out, rank), rand(rank, inner)]


def tucker(out: int, inner: int, kernel: tuple[int, ...], rank: int = 2) -> list[torch.Tensor]:
    half = [rand(rank, out), rand(rank, inner)]
    return [*half, rand(rank, out), rand(rank, inner), rand(rank, rank, *kernel), rand(rank, rank, *kernel)]


def delta(tensors, alpha: float = 3.0) -> torch.Tensor:
    """Written from the paper, by einsum; nothing of loha_core."""
    a1, b1, a2, b2, *t = tensors
    if not t:
        return torch.einsum("or,ri,oq,qi->oi", a1, b1, a2, b2) * alpha / b1.shape[0]
    m1 = torch.einsum("pq...,po,qi->oi...", t[0], a1, b1)
    m2 = torch.einsum("pq...,po,qi->oi...", t[1], a2, b2)
    return m1 * m2 * alpha / b1.shape[0]


def dora(weight: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    norm = weight.pow(2).sum([d for d in range(weight.dim()) if d != axis], keepdim=True).sqrt()
    return magnitude.reshape(norm.shape) * weight / norm


@pytest.mark.parametrize("kind", ["flat", "tucker"])
def test_delta_equals_einsum_and_passes_gradcheck(kind):
    tensors = flat(5, 6) if kind == "flat" else tucker(5, 3, (2, 3))
    torch.testing.assert_close(loha_delta(factors(tensors), 0.5), 0.5 * delta(tensors))
    assert gradcheck(lambda *t: loha_delta(factors(t)), tensors)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("with_weight", [True, False])
def test_linear(strategy, with_weight):
    x, tensors, weight, bias = rand(2, 3, 5), flat(4, 5), rand(4, 5, grad=False), rand(4, grad=False)
    base = {"weight": weight, "bias": bias} if with_weight else {}
    y = loha_linear(x, factors(tensors), strategy=strategy, **base)
    expected = F.linear(x, delta(tensors)) + (F.linear(x, weight, bias) if with_weight else 0)
    torch.testing.assert_close(y, expected)
    assert gradcheck(lambda x, *t: loha_linear(x, factors(t), strategy=strategy, **base), (x, *tensors))


@pairwise(
    way=list(product(STRATEGIES, ["flat", "tucker"])),
    conv=[
        ((3,), {"stride": 2, "padding": 1}),
        ((3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
        ((1, 1), {}),
        ((2, 1, 2), {"padding": (0, 1, 0)}),
    ],
    with_weight=[True, False],
)
def test_conv(way, conv, with_weight):
    (strategy, kind), (kernel, options) = way, conv
    groups, inner, out = options.get("groups", 1), 2, 4
    size = torch.Size(kernel).numel()
    tensors = flat(out, inner * size) if kind == "flat" else tucker(out, inner, kernel)
    x = rand(2, inner * groups, *[4, 5, 3][: len(kernel)])
    weight, bias = rand(out, inner, *kernel, grad=False), rand(out, grad=False)
    base = {"weight": weight, "bias": bias} if with_weight else {"kernel_size": kernel}

    def run(x, *t):
        return loha_conv(x, factors(t), strategy=strategy, **options, **base)

    conv = CONV[len(kernel)]
    expected = conv(x, delta(tensors).view(weight.shape), **options)
    if with_weight:
        expected = expected + conv(x, weight, bias, **options)
    torch.testing.assert_close(run(x, *tensors), expected)
    assert gradcheck(run, (x, *tensors), fast_mode=len(kernel) > 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_linear_differentiates_through_the_norm(axis):
    x, tensors, weight = rand(3, 5), flat(4, 5), rand(4, 5, grad=False)
    magnitude = rand(4, 1) if axis == 0 else rand(1, 5)
    y = loha_linear(x, factors(tensors, dora=magnitude), weight=weight)
    torch.testing.assert_close(y, F.linear(x, dora(weight + delta(tensors), magnitude, axis)))
    assert gradcheck(lambda x, m, *t: loha_linear(x, factors(t, dora=m), weight=weight), (x, magnitude, *tensors))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["flat", "tucker"])
def test_dora_conv(axis, kind):
    x, weight = rand(2, 3, 4, 4), rand(5, 3, 2, 2, grad=False)
    tensors = flat(5, 12) if kind == "flat" else tucker(5, 3, (2, 2))
    magnitude = rand(5, 1, 1, 1) if axis == 0 else rand(1, 3, 1, 1)

    def run(x, m, *t):
        return loha_conv(x, factors(t, dora=m), weight=weight, padding=1)

    merged = dora(weight + delta(tensors).view(weight.shape), magnitude, axis)
    torch.testing.assert_close(run(x, magnitude, *tensors), F.conv2d(x, merged, padding=1))
    assert gradcheck(run, (x, magnitude, *tensors), fast_mode=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_base_in_training_gets_its_gradient_too(strategy):
    x, tensors, weight, bias = rand(3, 5), flat(4, 5), rand(4, 5), rand(4)
    assert gradcheck(
        lambda x, w, b, *t: loha_linear(x, factors(t), weight=w, bias=b, strategy=strategy), (x, weight, bias, *tensors)
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("base", [True, False])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(strategy, base):
    out, inner, rank = 256, 192, 4
    weight = torch.randn(out, inner)
    tensors = [t.float().detach().requires_grad_() for t in flat(out, inner, rank)]
    x = torch.randn(8, inner, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loha_linear(x, factors(tensors), weight=weight if base else None, strategy=strategy)
    ours = [t for t in kept if t is not weight]
    assert max(t.numel() for t in ours) < out * inner / 8


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_small_updates(strategy, dtype):
    """ΔW below W's rounding still reaches the output: it is applied beside W, not added to it."""
    torch.manual_seed(0)
    tensors = [t.detach().float() * 0.05 for t in flat(32, 48)]
    x, weight = torch.randn(64, 48).to(dtype), torch.zeros(32, 48)
    weight[:, 0] = 64.0
    x[:, 0] = 0  # W's large column sees nothing: what comes out is the update alone
    y = loha_linear(x, factors(tensors), weight=weight.to(dtype), strategy=strategy)
    expected = F.linear(x.double(), weight.double() + delta([t.double() for t in tensors]))
    error = (y.double() - expected).norm() / expected.norm()
    assert y.dtype == dtype and error < 0.02


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_autocast(strategy):
    tensors = [t.detach().float().requires_grad_() for t in flat(8, 6)]
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(8, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = loha_linear(x, factors(tensors), weight=weight, strategy=strategy)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    exact = torch.autograd.grad(F.linear(x, weight + delta(tensors)).sum(), [x, *tensors])
    for got, wanted in zip([x, *tensors], exact, strict=True):
        assert (got.grad - wanted).norm() / wanted.norm() < 0.02


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WAYS = [
    (kind, strategy, weight)
    for kind in ("linear", "conv", "tucker")
    for strategy in (*STRATEGIES, "dora")
    for weight in ("frozen", "trained", None)
    if (strategy, weight) != ("dora", None)
]


@pairwise(way=WAYS, of_x=DTYPES, one=DTYPES, other=DTYPES, of_weight=DTYPES, of_rest=DTYPES)
def test_each_tensor_may_have_its_own_dtype(way, of_x, one, other, of_weight, of_rest):
    kind, strategy, with_weight = way
    torch.manual_seed(0)
    kernel = () if kind == "linear" else (3, 2)
    tensors = tucker(8, 6, kernel) if kind == "tucker" else flat(8, 6 * torch.Size(kernel).numel())
    own = [one, other, other, one, one, other]
    tensors = [t.detach().to(d).requires_grad_() for t, d in zip(tensors, own, strict=False)]
    x = rand(5, 6, *[4, 4][: len(kernel)]).detach().to(of_x).requires_grad_()
    learns = with_weight == "trained"
    weight = rand(8, 6, *kernel).detach().to(of_weight).requires_grad_(learns) if with_weight else None
    bias = rand(8).detach().to(of_rest).requires_grad_(learns) if with_weight else None
    magnitude = rand(8, 1).detach().to(of_rest).requires_grad_() if strategy == "dora" else None

    def run(x, weight, bias, magnitude, tensors, strategy):
        f = factors(tensors, dora=magnitude)
        if kind == "linear":
            return loha_linear(x, f, weight=weight, bias=bias, strategy=strategy)
        return loha_conv(x, f, weight=weight, bias=bias, kernel_size=kernel, strategy=strategy)

    y = run(x, weight, bias, magnitude, tensors, "rebuild" if strategy == "dora" else strategy)
    assert y.dtype == of_x
    there = [t for t in (x, weight, bias, magnitude, *tensors) if t is not None]
    asked = [t for t in there if t.requires_grad]
    g = torch.randn(y.shape).to(of_x)
    found = torch.autograd.grad(y, asked, g)
    wide = {id(t): t.detach().double().requires_grad_() for t in there}
    x64, w64, b64, m64, *t64 = (wide.get(id(t)) for t in (x, weight, bias, magnitude, *tensors))
    # With a weight that learns, DoRA treats the norm's weight as a constant.
    expected = run(x64, w64 if learns or w64 is None else w64.detach(), b64, m64, t64, "rebuild")
    wanted = torch.autograd.grad(expected, [wide[id(t)] for t in asked], g.double())
    for name, got, exact, dtype in zip(
        ["y", *range(len(asked))], [y, *found], [expected, *wanted], [of_x, *(t.dtype for t in asked)], strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() <= 32 * max(torch.finfo(d).eps for d in (of_x, dtype)) * exact.norm(), name


@pairwise(w1_a=DTYPES, w1_b=DTYPES, w2_a=DTYPES, w2_b=DTYPES)
def test_delta_of_mixed_factors_is_in_the_dtype_that_holds_them_all(w1_a, w1_b, w2_a, w2_b):
    tensors = [t.detach().to(d).requires_grad_() for t, d in zip(flat(5, 6), (w1_a, w1_b, w2_a, w2_b), strict=True)]
    y = loha_delta(factors(tensors))
    torch.testing.assert_close(y.double(), delta([t.double() for t in tensors]), rtol=1e-2, atol=1e-2)
    assert y.dtype == sum(torch.zeros((), dtype=t.dtype) for t in tensors).dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), tensors)] == [t.dtype for t in tensors]


def test_what_does_not_fit_is_named():
    f = factors(flat(4, 5))
    with pytest.raises(LoHaError, match="5 input channels"):
        loha_linear(rand(2, 6), f)
    with pytest.raises(LoHaError, match="weight is \\(4, 6\\)"):
        loha_linear(rand(2, 5), f, weight=rand(4, 6))
    with pytest.raises(LoHaError, match="expected 'auto'"):
        loha_linear(rand(2, 5), f, strategy="fast")  # type: ignore[arg-type]
    with pytest.raises(LoHaError, match="pass weight"):
        loha_linear(rand(2, 5), factors(flat(4, 5), dora=rand(4, 1)))
    with pytest.raises(LoHaError, match="kernel"):
        loha_conv(rand(1, 5, 3, 3), factors(flat(4, 45)))
    with pytest.raises(LoHaError, match="does not fit"):
        loha_delta(f, shape=(4, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layer", ["matrix", "tokens", "pointwise", "convolution", "tucker", "delta", "tucker delta"])
@pytest.mark.parametrize("with_base", [True, False])
def test_what_comes_next_may_write_into_the_result(layer, strategy, dtype, with_base):
    """`nn.ReLU(inplace=True)` after an adapted layer: autograd forbids it where a Function gives out a view."""
    torch.manual_seed(0)
    kernel = {"pointwise": (1, 1), "convolution": (3, 3), "tucker": (3, 3), "tucker delta": (3, 3)}.get(layer, ())
    tensors = tucker(6, 4, kernel) if "tucker" in layer else flat(6, 4 * torch.Size(kernel).numel())
    adapter = factors([t.detach().float().requires_grad_() for t in tensors])
    weight = torch.randn(6, 4, *kernel, dtype=dtype) if with_base else None
    x = torch.randn(*{"matrix": (5, 4), "tokens": (1, 5, 4)}.get(layer, (1, 4, 5, 5)), dtype=dtype)

    def run() -> torch.Tensor:
        if "delta" in layer:
            return loha_delta(adapter)
        if not kernel:
            return loha_linear(x, adapter, weight=weight, strategy=strategy)
        return loha_conv(x, adapter, weight=weight, kernel_size=kernel, strategy=strategy)

    plain, written = run().relu().float(), torch.relu_(run()).float()
    torch.testing.assert_close(written, plain)
    grads = [torch.autograd.grad(y.sum(), adapter.w1_a, retain_graph=True)[0] for y in (plain, written)]
    torch.testing.assert_close(*grads)
