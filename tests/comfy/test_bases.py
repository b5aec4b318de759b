"""The contract with every way that ComfyUI and others hold a weight: right to the base's own rounding, or refused.

`pytest tests/comfy/test_bases.py` prints the matrix: for each cell the error as a share of what the adapter does;
beside that the base's own rounding, which is all that may be added to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.ops
import pytest
import torch
from torch import Tensor

from loha_core import LoHaConfig, LoHaError, LoHaFactors
from loha_core.training.attach import attached
from loha_core.training.trainer import ADAPTER

from . import bases

OUT, IN, RANK = 96, 128, 3
TOLERANCE = 0.01  # of the adapter's effect, beyond the base's rounding


def random_loha(out: int = OUT, inner: int = IN, dora: int | None = None) -> LoHaFactors:
    """One that changes a weight of std 0.05 by about as much."""
    a, b = torch.randn(2, out, RANK) * 0.3, torch.randn(2, RANK, inner) * 0.3
    magnitude = None
    if dora is not None:  # near the norms of a weight of std 0.05, as training leaves it
        length = (out, inner)[1 - dora] ** 0.5 * 0.05
        magnitude = length * (torch.rand([n if d == dora else 1 for d, n in enumerate((out, inner))]) * 0.4 + 0.8)
    return LoHaFactors(a[0], b[0], a[1], b[1], RANK * 0.4, dora_scale=magnitude)


def delta(f: LoHaFactors) -> Tensor:
    a1, b1, a2, b2 = (t.double() for t in (f.w1_a, f.w1_b, f.w2_a, f.w2_b))
    return f.alpha / RANK * (a1 @ b1) * (a2 @ b2)


def adapted(weight: Tensor, f: LoHaFactors, strength: float) -> Tensor:
    """W + s·ΔW, or with DoRA W + s·(W' − W), in float64."""
    if f.dora_scale is None:
        return weight + strength * delta(f)
    turned = weight + delta(f)
    axis = 1 if f.dora_scale.shape[0] == weight.shape[0] and f.dora_scale.shape[1] == 1 else 0
    turned = f.dora_scale.double() * turned / turned.norm(dim=axis, keepdim=True)
    return weight + strength * (turned - weight)


def swapped(weight: Tensor) -> Tensor:
    """As ComfyUI reorders adaLN's outputs."""
    shift, scale = weight.chunk(2, dim=0)
    return torch.cat([scale, shift], dim=0)


@dataclass
class Case:
    """Updates of one layer, and what they make of its weight and bias."""

    patches: list[tuple[Any, Any]]  # (target, LoHaFactors or ComfyUI's adapter)
    reference: Callable[[Tensor, float], Tensor]
    bias: Callable[[Tensor, float], Tensor] = lambda bias, strength: bias


KEY = "layer.weight"


def case(name: str) -> Case:
    torch.manual_seed(len(name))
    match name:
        case "LoHa":
            f = random_loha()
            return Case([(KEY, f)], lambda w, s: adapted(w, f, s))
        case "rows":
            f = random_loha(32)
            return Case([((KEY, (0, 32, 32)), f)], lambda w, s: torch.cat([w[:32], adapted(w[32:64], f, s), w[64:]]))
        case "columns":
            f = random_loha(OUT, 64)
            return Case(
                [((KEY, (1, 16, 64)), f)],
                lambda w, s: torch.cat([w[:, :16], adapted(w[:, 16:80], f, s), w[:, 80:]], dim=1),
            )
        case "reordered":
            f = random_loha()
            return Case([((KEY, None, swapped), f)], lambda w, s: w + s * swapped(delta(f)))
        case "DoRA out" | "DoRA in":
            f = random_loha(dora=int(name == "DoRA in"))
            return Case([(KEY, f)], lambda w, s: adapted(w, f, s))
        case "DoRA rows" | "DoRA in of rows":
            f = random_loha(32, dora=int("in" in name))
            return Case([((KEY, (0, 32, 32)), f)], lambda w, s: torch.cat([w[:32], adapted(w[32:64], f, s), w[64:]]))
        case "stack":
            f, g, h = random_loha(), random_loha(dora=0), random_loha()
            return Case([(KEY, f), (KEY, g), (KEY, h)], lambda w, s: adapted(adapted(adapted(w, f, s), g, s), h, s))
        case "LoRA":
            up, down = torch.randn(OUT, 4) * 0.1, torch.randn(4, IN) * 0.15
            native = comfy.lora.load_lora({"x.lora_up.weight": up, "x.lora_down.weight": down}, {"x": KEY})[KEY]
            return Case([(KEY, native)], lambda w, s: w + s * (up.double() @ down.double()))
        case "bias":
            f, difference = random_loha(), torch.randn(OUT)
            [(target, native)] = comfy.lora.load_lora({"x.diff_b": difference}, {"x": KEY}).items()
            return Case([(target, native), (KEY, f)], lambda w, s: adapted(w, f, s), lambda b, s: b + s * difference)
    raise KeyError(name)


CASES = (
    *("LoHa", "rows", "columns", "reordered", "DoRA out", "DoRA in", "DoRA rows", "DoRA in of rows"),
    *("stack", "LoRA", "bias"),
)
WAYS = ("live", "live W+ΔW", "merge")


def refused(base: str, way: str) -> str | None:
    """What the refusal of cells that cannot be names."""
    return "Linear4bit" if (base, way) == ("NF4", "merge") else None


@pytest.fixture(scope="module")
def table(request):
    """{base: {column: cell}}, printed at the end."""
    found: dict[str, dict[str, str]] = {}
    yield found
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    lines = ["", f"{'':<24}" + "".join(f"{base:>20}" for base in found)]
    lines += [f"{c:<24}" + "".join(f"{row.get(c, ''):>20}" for row in found.values()) for c in columns]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


def base_of(name: str) -> tuple[bases.Base, Tensor, Tensor]:
    torch.manual_seed(1)
    weight, bias = torch.randn(OUT, IN) * 0.05, torch.randn(OUT) * 0.1
    return bases.BASES[name](weight, bias), weight, bias


def storage(layer: torch.nn.Module) -> list[Tensor]:
    return [getattr(p, "_qdata", p.data).as_subclass(Tensor).clone() for p in layer.parameters()]


@dataclass
class Host:
    """The modules under test."""

    live: Any
    injection: Any
    acting: Any
    patches: Any
    weights: Any


@pytest.fixture
def host(live, injection, acting, patches, weights):
    return Host(live, injection, acting, patches, weights)


def patches_for(host: Host, chosen: Case) -> list[Any]:
    return [
        host.patches.Patch(t, host.patches.LoHaPatch.from_factors(u) if isinstance(u, LoHaFactors) else u, 1.0)
        for t, u in chosen.patches
    ]


def check(host: Host, monkeypatch: pytest.MonkeyPatch, base_name: str, name: str, way: str) -> tuple[float, float]:
    """One cell: (error, the base's rounding), as shares of the effect and of the weight. Raises AssertionError."""
    base, weight, bias = base_of(base_name)
    torch.manual_seed(2)
    patcher, x, chosen = bases.patcher_for(base), torch.randn(2, 20, IN), case(name)
    monkeypatch.setattr(host.acting, "cheaper_to_add", lambda *_: way == "live")
    before, held = storage(base.layer), base.held.double()
    with torch.no_grad():
        plain = patcher.model(x).double()
    exact_plain = x.double() @ held.T + bias.double()
    exact = x.double() @ chosen.reference(held, 0.7).T + chosen.bias(bias.double(), 0.7)
    effect = exact - exact_plain
    lost = float((held - weight).norm() / weight.norm())
    rounding = (plain - exact_plain).norm()  # of a product in the base's format
    # What DoRA multiplies is rounded anew; a merged sum is rounded as the base was.
    allowed = TOLERANCE * effect.norm() + (1.6 * rounding if "DoRA" in name or name == "stack" else 0)
    if way == "merge":
        # ComfyUI 0.33 rounds stochastically: the error of nvfp4 is 1.8 times that of the nearest value.
        allowed = allowed + rounding + (2.0 if base_name == "nvfp4" else 1.5) * lost * exact.norm()
    apply = host.patches.merge if way == "merge" else host.live.apply_live
    alive = apply(patcher, patches_for(host, chosen), 0.7)
    resident = bases.as_resident(monkeypatch) if base_name == "resident" else nullcontext()
    alive.patch_model()
    try:
        with torch.no_grad(), resident:
            outputs = [alive.model(x).double() for _ in range(3)]
    finally:
        alive.unpatch_model()
    error = max(((y - plain) - effect).norm() for y in outputs)
    assert error <= allowed, (
        f"{error / effect.norm():.3f} of the effect is wrong, {allowed / effect.norm():.3f} allowed"
    )
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert all(map(torch.equal, storage(base.layer), before)), "the base is not what it was"
    with torch.no_grad():
        assert torch.equal(patcher.model(x).double(), plain)
    assert "forward" not in vars(base.layer)
    return float(error / effect.norm()), lost


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("base_name", bases.BASES)
def test_matrix(host, monkeypatch, table, base_name, name):
    """Every kind of update, merged and live either way: what it does to the product, against float64."""
    for way in WAYS:
        row, column = table.setdefault(base_name, {"rounding": ""}), f"{name}, {way}"
        if why := refused(base_name, way):
            with pytest.raises(LoHaError, match=why):
                check(host, monkeypatch, base_name, name, way)
            row[column] = "refused"
            continue
        error, lost = check(host, monkeypatch, base_name, name, way)
        row["rounding"], row[column] = f"{lost:.1e}", f"{error:.1e}"


def in_place(weight, acting, key):
    for update, strength in acting:
        weight.add_(update.factors(weight.device).delta(), alpha=strength)
    return weight


BROKEN = {
    "a weight function that writes to its argument": ("resident", "LoHa", "live W+ΔW"),
    "a scale that is dropped": ("scaled fp8", "DoRA out", "live"),
    "a forward that is not reached": ("int8", "LoHa", "live"),
    "a weight that is cast before its scale": ("scaled fp8", "LoHa", "live W+ΔW"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_matrix_detects(host, monkeypatch, how):
    base_name, name, way = BROKEN[how]
    if base_name not in bases.BASES:
        base_name = "fp8"
    with monkeypatch.context() as broken:
        match how:
            case "a weight function that writes to its argument":
                broken.setattr(host.acting, "updated", in_place)
            case "a scale that is dropped":
                read = host.weights.dense
                broken.setattr(host.weights, "dense", lambda *args, **kwargs: read(*args, **kwargs) * 100)
            case "a forward that is not reached":
                broken.setattr(host.acting.forwards, "push", lambda *_, **__: None)
            case "a weight that is cast before its scale":
                broken.setattr(host.weights, "is_castable", lambda *_: True)
        with pytest.raises(AssertionError, match="wrong|not what it was"):
            check(host, broken, base_name, name, way)
    check(host, monkeypatch, base_name, name, way)


@pytest.mark.parametrize("base_name", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["LoHa", "rows", "DoRA out", "DoRA in", "stack"])
def test_the_products_of_the_format_go_on(host, base_name, name):
    """Live adds beside a quantised layer's own product instead of turning it off."""
    base, _, _ = base_of(base_name)
    patcher, x = bases.patcher_for(base), torch.randn(2, 20, IN)
    with torch.no_grad():
        patcher.model(x)
        assert len(base.products) == 1
        alive = host.live.apply_live(patcher, patches_for(host, case(name)), 0.7)
        alive.patch_model()
        alive.model(x)  # DoRA looks at the weight once
        base.products.clear()
        alive.model(x)
        alive.unpatch_model()
    assert len(base.products) == 1


@pytest.mark.parametrize("dora", [False, "output", "input"])
@pytest.mark.parametrize("base_name", bases.BASES)
def test_training(pack, table, base_name, dora):
    """Factors' gradients, DoRA's first magnitudes and the input's gradient, against autograd on the held weight."""
    layers = sys.modules[f"{pack.__name__}.nodes.host.layers"]
    base, _, bias = base_of(base_name)
    before, held = storage(base.layer), base.held.double()
    layer = layers.layer_class(base.layer)(base.layer)
    layer._active = [ADAPTER]
    layer.update_layer(ADAPTER, 4, 4.0, LoHaConfig(r=4, alpha=4, init_weights=False, use_dora=dora))
    trained = {name: p for name, p in layer.named_parameters() if "base_layer" not in name}
    x = torch.randn(2, 20, IN, requires_grad=True)
    target = torch.randn(2, 20, OUT)
    frozen = sys.modules[f"{pack.__name__}.nodes.host.frozen"]
    with attached([layer]), frozen.weights_made_twice([base.layer], [layer]):
        y = base.layer(x)
        (y * target).sum().backward()
    exact = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    parts = [exact[f"hada_{part}.{ADAPTER}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b")]
    weight = held + (parts[0] @ parts[1]) * (parts[2] @ parts[3])
    if dora:
        axis = 0 if dora == "input" else 1
        magnitude = exact[f"dora_scale.{ADAPTER}"]
        torch.testing.assert_close(magnitude.detach().flatten(), held.norm(dim=axis), rtol=1e-4, atol=0)
        weight = magnitude * weight / weight.norm(dim=axis, keepdim=True)
    wide = x.detach().double().requires_grad_()
    exact_plain = wide.detach() @ held.T + bias.double()
    exact_y = wide @ weight.T + bias.double()
    (exact_y * target.double()).sum().backward()
    errors = {name: relative(trained[name].grad, exact[name].grad) for name in exact}
    effect = (exact_y - exact_plain).norm()
    error = (y.double() - exact_y).norm()
    # Also where the layer, when sampling, would round its input to the format of its weight.
    assert error < 1e-3 * effect
    assert max(errors.values()) < 1e-3, errors
    assert relative(x.grad, wide.grad) < 1e-3
    table.setdefault(base_name, {})[f"training{f', DoRA {dora}' if dora else ''}"] = f"{max(errors.values()):.1e}"
    assert all(map(torch.equal, storage(base.layer), before)) and "forward" not in vars(base.layer)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", ["live", "merge"])
@pytest.mark.parametrize("base_name", bases.BASES)
def test_what_extraction_reads(host, pack, table, base_name, way):
    """The weight as it would run, adapters in, whichever way they are; loaded or not."""
    extract = sys.modules[f"{pack.__name__}.nodes.graph.extract"]
    base, _, _ = base_of(base_name)
    held, chosen = base.held.double(), case("stack")
    patcher = bases.patcher_for(base)
    if refused(base_name, way):
        return
    adapted = (host.patches.merge if way == "merge" else host.live.apply_live)(patcher, patches_for(host, chosen), 0.7)
    for loaded in (False, True):
        if loaded:
            adapted.patch_model()
        read = [extract.patched_weight(p, KEY).double() for p in (patcher, adapted)]
        near = 1e-3 if base_name.startswith("GGUF") else 1e-6  # the pack unpacks in half precision
        assert relative(read[0], held) < near or (loaded and way == "merge" and not base_name.startswith("GGUF"))
        assert relative(read[1] - held, chosen.reference(held, 0.7) - held) < max(near, 1e-4)
    adapted.unpatch_model()
    table.setdefault(base_name, {})[f"extraction, {way}"] = f"{relative(read[1], chosen.reference(held, 0.7)):.1e}"


@pytest.mark.parametrize("base_name", bases.BASES)
def test_saving_is_refused_and_sampling_is_not(host, base_name):
    """GGUF's patcher always forces patching: that is no save."""
    base, _, _ = base_of(base_name)
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 0.7)
    for one in (alive, alive.clone(), alive.clone().clone()):
        one.partially_load(bases.CPU, 1e12)
        assert host.injection.LiveAdapters.injected[one.model].live is host.injection.live_of(one)
        with pytest.raises(LoHaError, match="Set mode to merge"):
            one.partially_load(bases.CPU, 1e12, force_patch_weights=True)
        with pytest.raises(LoHaError, match="Set mode to merge"):
            one.model_state_dict_for_saving()
        assert len(host.live.patches_of(one, KEY)) == 1
        one.detach()
        assert "forward" not in vars(base.layer)


@pytest.mark.skipif(not bases.bitsandbytes.functional.has_avx512bf16(), reason="a CPU without bfloat16 products")
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_as_a_cpu_packs_it_anew(weights, nested):
    layer = bases.bitsandbytes.nn.Linear4bit(
        IN, OUT, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested
    )
    layer.load_state_dict({"weight": torch.randn(OUT, IN) * 0.05, "bias": torch.zeros(OUT)})
    layer = layer.to(bases.CPU).requires_grad_(False).eval()
    before, x = weights.dense(layer), torch.randn(9, IN)
    with torch.no_grad():
        layer(x)
        y = layer(x)
        after = weights.dense(layer)
        assert layer.weight.quant_state.packing_format_for_cpu and torch.equal(layer(x), y)
    assert relative(after, before.double()) < 0.004  # of its scales, now in bfloat16
    assert relative(y, x.double() @ after.double().T) < 0.004


def test_unknown_packed_weights_are_refused_by_name(host, patches):
    """A packed weight of an unknown kind: a plain LoHa is right, other updates are refused before anything changes."""

    class Packed(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.float().view(OUT, IN) / 16, self.bias)

    layer = Packed(IN, OUT)
    layer.weight = torch.nn.Parameter(torch.randint(-9, 9, (OUT * IN // 4, 4), dtype=torch.int8), requires_grad=False)
    patcher, x = bases.patcher_for(bases.Base(layer, layer.weight)), torch.randn(3, IN)
    with torch.no_grad():
        plain = patcher.model(x)
        alive = host.live.apply_live(patcher, patches_for(host, case("LoHa")), 0.7)
        alive.patch_model()
        y = alive.model(x)
        alive.unpatch_model()
    [(_, f)] = case("LoHa").patches
    assert relative((y - plain).double(), x.double() @ (0.7 * delta(f)).T) < 1e-4
    for name in ("DoRA out", "LoRA", "stack"):
        with pytest.raises(LoHaError, match="Packed.*torch.int8"):
            host.live.apply_live(patcher, patches_for(host, case(name)), 0.7)
    with pytest.raises(LoHaError, match="Packed"):
        host.patches.merge(patcher, patches_for(host, case("LoHa")), 0.7)
    assert "forward" not in vars(layer)


def test_expert_banks_and_other_modules_are_refused_by_name(host):
    """ComfyUI 0.33's bank of experts reads its weight by itself: nothing that acts in a forward would ever run."""

    class MoEExperts(torch.nn.Module, comfy.ops.CastWeightBiasOp):
        def __init__(self):
            super().__init__()
            self.num_experts, self.in_features, self.out_features = 4, IN, OUT
            self.weight = torch.nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
            self.bias = None

        def expert_linear(self, x, i):
            return x

    for layer in (MoEExperts(), torch.nn.Bilinear(IN, 1, OUT)):
        patcher = bases.patcher_for(bases.Base(layer, torch.zeros(1)))
        with pytest.raises(LoHaError, match=type(layer).__name__):
            host.live.apply_live(patcher, patches_for(host, case("LoHa")), 0.7)
