"""What acts on ComfyUI's models comes and goes with them, whoever else does."""

from __future__ import annotations

import gc
import logging

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch

from loha_core.training.attach import attached
from loha_core.tuner import forwards

from . import bases, training
from .test_bases import IN, KEY, OUT, base_of, case, delta, patches_for, relative
from .test_bases import host as host
from .training import page as page

X = torch.randn(3, IN)


def effect(name: str, strength: float) -> torch.Tensor:
    [(_, f)] = case(name).patches
    return X.double() @ (strength * delta(f)).T


def acts(patcher, plain: torch.Tensor, strength: float) -> bool:
    with torch.no_grad():
        found = (patcher.model(X) - plain).double()
    return relative(found, effect("LoHa", strength)) < 1e-3 if strength else bool((found == 0).all())


@pytest.fixture
def base():
    return base_of("plain")[0]


@pytest.fixture
def plain(base):
    with torch.no_grad():
        return base.layer(X)


def test_an_input_by_name(host, base, plain):
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    alive.patch_model()
    with torch.no_grad():
        assert torch.equal(base.layer(input=X), base.layer(X)) and not torch.equal(base.layer(X), plain)
    alive.unpatch_model()


def test_one_live_on_two_models(host, base, plain):
    """torch.compile's clone, hooks and several GPUs give a patcher's injections to a clone on another model."""
    other = base_of("plain")[0]
    first = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    second = first.clone()
    second.model = bases.patcher_for(other).model
    first.patch_model()
    second.patch_model()
    assert acts(first, plain, 1.0) and acts(second, plain, 1.0)
    first.unpatch_model()
    assert acts(first, plain, 0) and acts(second, plain, 1.0)
    first.patch_model()
    second.unpatch_model()
    assert acts(first, plain, 1.0) and acts(second, plain, 0)
    first.unpatch_model()
    assert "forward" not in vars(base.layer) and "forward" not in vars(other.layer)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("they_leave_first", [True, False])
def test_another_packs_injection(host, base, plain, ours_first, they_leave_first):
    """ComfyUI ejects in the order of injecting: whoever leaves last must not bring a dead forward back."""

    class Theirs:
        def inject(self, patcher):
            self.found, self.own = base.layer.forward, "forward" in vars(base.layer)
            base.layer.forward = lambda x: self.found(x) + 1

        def eject(self, patcher):
            if self.own:
                base.layer.forward = self.found
            else:
                del base.layer.forward

    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    [live], theirs = alive.get_injections("loha"), Theirs()
    order = [live, theirs] if ours_first else [theirs, live]
    for one in order:
        one.inject(alive)
    for _ in range(2):
        host.injection.renew(alive)  # as before sampling
        assert acts(alive, plain + 1, 1.0)
    for one in [theirs, live] if they_leave_first else [live, theirs]:
        one.eject(alive)
    assert acts(alive, plain, 0)


def test_a_model_is_told_before_sampling(host, base):
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    called = alive.clone().get_all_callbacks(comfy.model_patcher.CallbacksMP.ON_PRE_RUN)
    assert host.injection.renew in called


def test_functions_on_norms_reach_whoever_casts_them(host):
    """Newer models cast a norm's weight themselves, for one kernel with what follows, and never call the norm."""
    import comfy.lora

    layer = comfy.ops.manual_cast.LayerNorm(IN)
    layer.weight, layer.bias = (torch.nn.Parameter(torch.randn(IN), requires_grad=False) for _ in range(2))
    change = torch.randn(IN)
    [(target, native)] = comfy.lora.load_lora({"x.diff": change}, {"x": KEY}).items()
    patcher = bases.patcher_for(bases.Base(layer, layer.weight))
    alive = host.live.apply_live(patcher, [host.patches.Patch(target, native, 1.0)], 0.5)
    alive.patch_model()
    for _ in range(2):
        weight, _ = comfy.ops.cast_bias_weight(layer, X)[:2]
        torch.testing.assert_close(weight, layer.weight + 0.5 * change)
    with torch.no_grad():
        y = layer(X)
    alive.unpatch_model()
    assert not layer.weight_function
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(X, (IN,), weight, layer.bias))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def linear_input_act_of_033(linear, x, input_act):
    """ComfyUI 0.33: folds an activation into an INT8 layer's quantiser, unless something is trained."""
    if getattr(comfy.model_management, "in_training", False):
        return linear(gelu(x))
    return torch.nn.functional.linear(gelu(x), linear.weight.dequantize(), linear.bias)


def linear_input_act_of_036(linear, x, input_act, act_weight=None, act_eps=0.0, residual=None, residual_scale=None):
    """0.36: the sum after it, too."""
    out = linear_input_act_of_033(linear, x, input_act)
    return out if residual is None else torch.addcmul(residual, out, residual_scale)


FUSED = [(linear_input_act_of_033, False), (linear_input_act_of_036, False), (linear_input_act_of_036, True)]
if real := getattr(comfy.ops, "linear_input_act", None):
    FUSED.append((real, False))


@pytest.mark.parametrize(("fused", "residual"), FUSED)
def test_a_kernel_that_reads_a_weight_without_calling_its_layer(host, monkeypatch, fused, residual):
    base, _, _ = base_of("int8")
    monkeypatch.setattr(comfy.ops, "linear_input_act", fused, raising=False)
    more = {"residual": torch.ones(OUT), "residual_scale": torch.full((OUT,), 2.0)} if residual else {}

    def call():
        with torch.no_grad():
            return comfy.ops.linear_input_act(base.layer, X, "gelu_tanh", **more)

    before = call()
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    alive.patch_model()
    [(_, f)] = case("LoHa").patches
    effect = (2.0 if residual else 1.0) * gelu(X).double() @ delta(f).T
    assert relative((call() - before).double(), effect) < 0.1  # the product's rounding
    assert not getattr(comfy.model_management, "in_training", False)
    alive.unpatch_model()
    assert torch.equal(call(), before)


def test_graphs_of_other_adapters_are_forgotten(host, base):
    """ComfyUI 0.33 replays what it has captured of a text encoder's block, whatever acts in it now."""
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    for change in (alive.patch_model, alive.unpatch_model):
        alive.model._comfy_graph = {"graph": None}
        change()
        assert not hasattr(alive.model, "_comfy_graph")


def test_layers_that_never_ran_are_named(host, base, caplog):
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model, self.layer, self.device = torch.nn.Identity(), base.layer, bases.CPU
            self.other = base_of("plain")[0].layer

        def forward(self, x):
            return self.layer(x)

    patcher = comfy.model_patcher.ModelPatcher(Two(), load_device=bases.CPU, offload_device=bases.CPU)
    [patch] = patches_for(host, case("LoHa"))
    alive = host.live.apply_live(patcher, [patch, host.patches.Patch("other.weight", patch.update, 1.0)], 1.0)
    with caplog.at_level(logging.WARNING):
        alive.patch_model()
        alive.unpatch_model()
        assert not caplog.records  # nothing was sampled
        alive.patch_model()
        alive.model(X)
        alive.unpatch_model()
    assert "1 of 2 layers" in caplog.text and "other" in caplog.text


def test_training_leaves_dynamic_vram(host):
    """Autograd would keep weights in pages that are given to others: training takes a clone that stays resident."""
    resident = training.node("host.training").resident

    class Dynamic(comfy.model_patcher.ModelPatcher):
        delegate = True

        def is_dynamic(self):
            return True

        def clone(self, disable_dynamic=False):
            assert disable_dynamic
            if not self.delegate:
                raise RuntimeError("Cannot create non-dynamic delegate")
            return comfy.model_patcher.ModelPatcher(self.model, bases.CPU, bases.CPU)

    patcher = Dynamic(bases.Holder(base_of("plain")[0].layer), bases.CPU, bases.CPU)
    assert type(resident(patcher)) is comfy.model_patcher.ModelPatcher
    plain = bases.patcher_for(base_of("plain")[0])
    assert resident(plain) is not plain and resident(plain).model is plain.model
    Dynamic.delegate = False
    with pytest.raises(training.node("host.training").LoHaError, match="--disable-dynamic-vram"):
        resident(patcher)


@pytest.mark.parametrize("live_first", [True, False])
def test_a_training_layer_beneath_a_live_one_in_any_order(host, base, live_first):
    """A preview loads, injects and ejects in the middle of a run."""
    network = training.node("host.layers")
    layer = network.layer_class(base.layer)(base.layer)
    layer._active = [network.ADAPTER]
    layer.update_layer(network.ADAPTER, 4, 4.0, network.LoHaConfig(r=4, alpha=4, init_weights=False))
    alive = host.live.apply_live(bases.patcher_for(base), patches_for(host, case("LoHa")), 1.0)
    with torch.no_grad():
        plain = base.layer(X)
        trained = layer(X) - plain
        expected = plain + trained + effect("LoHa", 1.0).float()
        if live_first:
            alive.patch_model()
        with attached([layer]):
            for _ in range(2):
                torch.testing.assert_close(
                    base.layer(X), expected if live_first else plain + trained, atol=1e-4, rtol=1e-4
                )
                (alive.unpatch_model if live_first else alive.patch_model)()
                torch.testing.assert_close(
                    base.layer(X), plain + trained if live_first else expected, atol=1e-4, rtol=1e-4
                )
                (alive.patch_model if live_first else alive.unpatch_model)()
            if not live_first:
                alive.patch_model()  # and is still there at the end
        assert relative((base.layer(X) - plain).double(), effect("LoHa", 1.0)) < 1e-3
        alive.unpatch_model()
        assert torch.equal(base.layer(X), plain) and not forwards.has_links(base.layer)


def test_previews_of_text_encoders_that_carry_a_live_loha(modes, page, tmp_path):
    """Both swap the same layers' forwards; afterwards each is what it was, and the embedding, too."""
    from loha_core import load_adapter

    from . import reduced

    m = training.models("sd15")
    adapter = load_adapter(reduced.write(m, "kohya", tmp_path)[0])
    alive, clip, _ = modes.apply(m.model, m.clip, adapter, 0.3, 0.3, mode="live")

    def embedding():
        with torch.no_grad():
            return clip.encode_from_tokens(clip.tokenize("a red house"))

    class Vae:
        def decode(self, latent):
            embedding()  # somebody encodes in the middle of the run
            return torch.zeros(1, 8, 8, 3)

    before = embedding()
    carried = reduced.Models("sd15", alive, clip)
    training.train(carried, text=True, steps=4, preview_every=2, preview_steps=1, preview_prompt="a house", vae=Vae())
    assert torch.equal(embedding(), before)
    comfy.model_management.unload_all_models()
    gc.collect()
    assert not any(forwards.has_links(part) for module in m.modules().values() for part in module.modules())
