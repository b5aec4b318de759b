"""Whole models of FedPara layers: what travels, what is refused, what torch does with them, and the correction."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as pruning

from loha_core import LoHaConfig, LoHaError, LoHaModel
from loha_core.fedpara import (
    FedParaConv,
    FedParaLayer,
    FedParaLinear,
    JacobianCorrection,
    dense,
    factorize,
    global_parameters,
    local_parameters,
    plan,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FORMS = {"fedpara": {}, "flat": {"tucker": False}, "pfedpara": {"personal": True}, "tanh": {"activation": "tanh"}}


def net() -> nn.Module:
    """(n, 3, 8, 8) -> (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def batch() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_the_plan_is_what_factorize_does():
    model = net()
    planned = plan(model, 0.3)
    assert planned.before == sum(p.numel() for p in model.parameters())
    assert factorize(model, 0.3) is model
    assert planned.after == sum(p.numel() for p in model.parameters())
    assert {each.name: each.rank for each in planned.layers} == {
        name: module.rank for name, module in model.named_modules() if isinstance(module, FedParaLayer)
    }
    lines = str(planned).splitlines()
    assert len(lines) == 5 and f"{planned.after:,}" in lines[-1]


def test_a_layer_too_small_to_save_anything_stays():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    last = model[1]
    factorize(model)
    assert isinstance(model[0], FedParaLinear) and model[1] is last
    assert "stays as it is" in str(plan(nn.Sequential(nn.Linear(64, 1), nn.Linear(64, 64))))


@pytest.mark.parametrize("skip", [["8"], ["3", "8"], ["inner"], ["outer.inner.0"]])
def test_skipped_layers_stay(skip):
    model = nn.ModuleDict({"outer": nn.ModuleDict({"inner": net()})}) if not skip[0].isdigit() else net()
    before = dict(model.named_modules())
    names = [n for n, m in before.items() if isinstance(m, (nn.Linear, nn.Conv2d))]
    skipped = {n for n in names for entry in skip if f".{entry}." in f".{n}."}
    if skipped == set(names):
        with pytest.raises(LoHaError, match="skip names them all"):
            factorize(model, skip=skip)
        return
    factorize(model, skip=skip)
    assert {n for n in names if model.get_submodule(n) is before[n]} == skipped != set()


def test_a_module_at_two_places_is_replaced_at_both():
    shared = nn.Linear(64, 64)
    model = factorize(nn.ModuleList([shared, nn.Sequential(shared)]))
    assert model[0] is model[1][0] and isinstance(model[0], FedParaLinear)
    dense(model)
    assert model[0] is model[1][0] and type(model[0]) is nn.Linear


@pytest.mark.parametrize("form", FORMS)
def test_dense_gives_back_the_same_kind_of_model(form):
    torch.manual_seed(0)
    plain = net()
    model = factorize(copy.deepcopy(plain), **FORMS[form]).double().eval()
    x = batch().double()
    y, weights = model(x), {n: m.weight for n, m in model.named_modules() if isinstance(m, FedParaLayer)}
    assert dense(model) is model and str(model) == str(plain)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    torch.testing.assert_close(model(x), y)
    assert {k: t.shape for k, t in model.state_dict().items()} == {k: t.shape for k, t in plain.state_dict().items()}
    with pytest.raises(LoHaError, match="no FedPara layer"):
        dense(model)


def test_a_transformer_learns_through_all_of_its_factors_and_runs_in_eval_too():
    torch.manual_seed(0)
    model = factorize(nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True))
    layers = [m for m in model.modules() if isinstance(m, FedParaLayer)]
    assert len(layers) == 3  # both linear layers, and attention's, whose weight is read and which is never called
    x = torch.randn(2, 5, 64)
    trained = model(x)
    trained.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for layer in layers for p in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained, rtol=1e-4, atol=1e-5)


# --- what travels ----------------------------------------------------------------------------------------------------


def test_pfedpara_keeps_the_second_half_and_everything_else_travels():
    model = factorize(net(), personal=True)
    shared, local = global_parameters(model), local_parameters(model)
    state = model.state_dict(keep_vars=True)
    counters = {key for key, t in state.items() if not t.is_floating_point()}
    assert counters == {"1.num_batches_tracked"}
    assert shared.keys() | local.keys() | counters == state.keys() and not shared.keys() & local.keys()
    assert set(local) == {f"{n}.{p}" for n in "0368" for p in ("w2_a", "w2_b")} | {"0.t2", "3.t2"}
    assert all(t is state[key] for key, t in (shared | local).items())
    assert "1.running_mean" in shared and "0.bias" in shared
    assert local_parameters(factorize(nn.Linear(64, 64), personal=True)).keys() == {"w2_a", "w2_b"}


def test_without_personal_layers_all_travels():
    for model in (factorize(net()), net()):
        assert local_parameters(model) == {}
        assert len(global_parameters(model)) == len(model.state_dict()) - 1


def test_clients_with_the_same_global_half_differ_by_their_own():
    torch.manual_seed(0)
    first, second = (factorize(net(), personal=True).eval() for _ in range(2))
    with torch.no_grad():
        for key, tensor in global_parameters(second).items():
            tensor.copy_(global_parameters(first)[key])
        x = batch()
        assert not torch.allclose(first(x), second(x))
        for model in (first, second):
            for tensor in local_parameters(model).values():
                tensor.zero_()
        assert torch.equal(first(x), second(x))  # W₁∘(0 + 1)
        torch.testing.assert_close(first[6].weight, first[6].w1_a @ first[6].w1_b)


# --- what torch does with it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_state_copies_and_pickles(form):
    model, other = (factorize(net(), **FORMS[form]).eval() for _ in range(2))
    x = batch()
    expected = model(x)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), expected)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone[8].w1_a.zero_()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("form", ["fedpara", "pfedpara", "tanh"])
def test_torch_compile_in_one_graph(form):
    torch.manual_seed(0)
    model = factorize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 10)), **FORMS[form])
    x = batch()
    expected = model(x)
    expected.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(form, dtype):
    torch.manual_seed(0)
    model = factorize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(576, 10)), **FORMS[form])
    x = batch()
    expected = model(x)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    half = copy.deepcopy(model).to(dtype)
    y = half(x.to(dtype))
    assert y.dtype == dtype and dense(half)[0].weight.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.08)


def test_it_learns_a_full_rank_weight_better_than_low_rank_of_as_many_parameters():
    """What FedPara is for: rank 16 in 256 numbers a side, where a product has rank 2r = 8."""
    torch.manual_seed(0)
    target = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    layer = FedParaLinear(nn.Linear(16, 16, bias=False, dtype=torch.float64), 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(800):
        optimizer.zero_grad()
        loss = (layer.weight - target).square().sum()
        loss.backward()
        optimizer.step()
    # All singular values of the target are 1: the best matrix of rank 8 is off by 8.
    assert loss.item() < 4


# --- what is refused -------------------------------------------------------------------------------------------------


def _parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model[6])


def _hooked(model: nn.Module) -> None:
    model[6].register_forward_hook(lambda *args: None)


def _another_forward(model: nn.Module) -> None:
    model[6].forward = lambda x: x


def _tied(model: nn.Module) -> None:
    model.append(nn.Linear(288, 64))
    model[9].weight = model[6].weight


def _pruned(model: nn.Module) -> None:
    pruning.identity(model[6], "weight")


def _frozen(model: nn.Module) -> None:
    model[6].weight.requires_grad_(False)


def _a_class_of_its_own(model: nn.Module) -> None:
    model[6] = type("Scaled", (nn.Linear,), {})(288, 64)


def _lazy(model: nn.Module) -> None:
    model[6] = nn.LazyLinear(64)


def _quantised(model: nn.Module) -> None:
    model[6] = type("Linear", (nn.Module,), {"weight": lambda self: None})()


def _packed(model: nn.Module) -> None:
    model[6].weight = nn.Parameter(torch.zeros(64, 144, dtype=torch.uint8), requires_grad=False)


def _a_subclass_of_parameter(model: nn.Module) -> None:
    model[6].weight = type("Packed", (nn.Parameter,), {})(torch.zeros(64, 288))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_parametrized, "parametrized"),
        (_pruned, "parametrized"),
        (_hooked, "hooks"),
        (_another_forward, "another forward"),
        (_tied, "tied"),
        (_frozen, "frozen"),
        (_a_class_of_its_own, "Scaled"),
        (_lazy, "lazy"),
        (_quantised, "Linear"),
        (_packed, "uint8"),
        (_a_subclass_of_parameter, "Packed"),
    ],
)
def test_layers_that_cannot_be_factorized_are_refused_by_name_and_nothing_changes(change, words):
    model = net()
    change(model)
    before = list(model.modules())
    with pytest.raises(LoHaError, match=rf"^6: .*{words}.*\(skip\)$"):
        factorize(model)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    # Left out by name, the rest is factorized.
    factorize(model, skip=["6", "9"] if change is _tied else ["6"])
    assert isinstance(model[3], FedParaConv)


def test_real_quantised_layers_are_refused():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    model = nn.Sequential(nn.Linear(64, 64), quantised.Linear(64, 64))
    with pytest.raises(LoHaError, match="^1: is a torch.ao.nn.quantized"):
        factorize(model)


def test_loha_and_fedpara_do_not_take_each_others_layers():
    with pytest.raises(LoHaError, match=r"base_layer: is frozen"):
        factorize(LoHaModel(nn.Sequential(nn.Linear(64, 64)), LoHaConfig(target_modules=["0"])))
    with pytest.raises(LoHaError, match="FedParaLinear"):
        LoHaModel(factorize(nn.Sequential(nn.Linear(64, 64))), LoHaConfig(target_modules=["0"]))
    with pytest.raises(LoHaError, match="none of 0"):
        factorize(factorize(nn.Sequential(nn.Linear(64, 64))))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 1000}, "rank is too large"),
        ({"fan": "average"}, "fan is 'average'"),
        ({"activation": "relu"}, "activation is 'relu'"),
        ({"activation": "tanh", "personal": True}, "choose one"),
        ({"skip": ["head"]}, "skip names head"),
        ({"skip": "8"}, "a list of names"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    model = net()
    before = str(model)
    with pytest.raises(LoHaError, match=words):
        factorize(model, **settings)
    assert str(model) == before


def test_a_model_without_layers_to_replace_is_refused():
    with pytest.raises(LoHaError, match="none of 0"):
        factorize(nn.Sequential(nn.ReLU()))
    with pytest.raises(LoHaError, match="too few inputs"):
        FedParaLinear(nn.Linear(2, 64), 1, activation="tanh")


# --- Jacobian correction ---------------------------------------------------------------------------------------------


def test_the_correction_is_the_papers():
    """Against every gradient taken by autograd from einsum, in float64."""
    torch.manual_seed(0)
    layer = FedParaLinear(nn.Linear(6, 5, dtype=torch.float64), 2)
    x, target, lr = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64), 0.3

    def of(a1, b1, a2, b2):
        return torch.einsum("or,ri,oq,qi->oi", a1, b1, a2, b2)

    factors = [p.detach().clone().requires_grad_() for p in layer.factors() if p is not None]
    weight = of(*factors)
    loss = (x @ weight.T + layer.bias.detach() - target).square().mean()
    of_weight, *of_factors = torch.autograd.grad(loss, [weight, *factors], retain_graph=True)
    moved = of(*(f - lr * g for f, g in zip(factors, of_factors, strict=True)))
    expected = 0.5 * (moved - (weight - lr * of_weight)).square().sum()

    with JacobianCorrection(layer) as correction:
        own = (layer(x) - target).square().mean()
        penalty = correction(own, lr)
    torch.testing.assert_close(own, loss)
    torch.testing.assert_close(penalty, expected)
    assert penalty > 1e-4
    expected.backward()
    penalty.backward()
    for name, factor in zip(("w1_a", "w1_b", "w2_a", "w2_b"), factors, strict=True):
        torch.testing.assert_close(getattr(layer, name).grad, factor.grad)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_learns_with_the_correction(form):
    torch.manual_seed(0)
    model = factorize(net(), **FORMS[form])
    x, y = batch(), torch.tensor([1, 2, 3, 4])
    plain = model(x).detach()
    with JacobianCorrection(model) as correction:
        model.eval()
        model.train()
        out = model(x)
        loss = nn.functional.cross_entropy(out, y)
        assert correction(loss, 0.0).item() < 1e-10  # without a step there is nothing to correct
        penalty = correction(loss, 0.1)
    torch.testing.assert_close(out, plain)
    (loss + 0.1 * penalty).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(m._weights is None for m in model.modules() if isinstance(m, FedParaLayer))
    assert len(copy.deepcopy(model).state_dict()) == len(model.state_dict())


def test_a_layer_that_runs_twice_and_a_frozen_factor_are_right():
    torch.manual_seed(0)
    layer = FedParaLinear(nn.Linear(6, 6, bias=False, dtype=torch.float64), 2)
    layer.w2_b.requires_grad_(False)
    x, lr = torch.randn(3, 6, dtype=torch.float64), 0.2
    with JacobianCorrection(layer) as correction:
        penalty = correction(layer(layer(x)).square().sum(), lr)
    weight = layer.weight.detach().requires_grad_()
    (step,) = torch.autograd.grad((x @ weight.T @ weight.T).square().sum(), weight)
    factors = [layer.w1_a, layer.w1_b, layer.w2_a]
    steps = torch.autograd.grad(layer(layer(x)).square().sum(), factors)
    a1, b1, a2 = (f - lr * g for f, g in zip(factors, steps, strict=True))
    torch.testing.assert_close(penalty, 0.5 * ((a1 @ b1) * (a2 @ layer.w2_b) - (weight - lr * step)).square().sum())


def test_a_correction_without_a_forward_is_refused():
    model = factorize(net())
    with JacobianCorrection(model) as correction, pytest.raises(LoHaError, match="run the model inside"):
        correction(torch.ones(()), 0.1)
    with pytest.raises(LoHaError, match="no FedPara layer"):
        JacobianCorrection(net())
