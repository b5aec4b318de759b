"""LoHa layers around every kind of base layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from loha_core import LoHaError
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaConv1d, LoHaConv2d, LoHaConv3d, LoHaLayer, LoHaLinear

BASES = {
    "linear": (lambda: nn.Linear(5, 6), (3, 5), LoHaLinear),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7), LoHaConv1d),
    "conv1d-same": (lambda: nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 7), LoHaConv1d),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(1, 2)), (2, 4, 5, 5), LoHaConv2d),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3), LoHaConv2d),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), (1, 2, 4, 4), LoHaConv2d),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (1, 4, 4, 4), LoHaConv2d),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1, padding_mode="circular"), (1, 2, 3, 3, 3), LoHaConv3d),
}
KINDS = {
    "flat": {},
    "tucker": {"use_effective_conv2d": True},
    "dora": {"use_dora": True},
    "dora-input": {"use_dora": "input"},
    "tucker-dora": {"use_effective_conv2d": True, "use_dora": True},
    "scalar": {"use_scalar": True},
    "rslora": {"use_rslora": True},
}


def make(base: str, dtype=torch.float64, **config) -> tuple[LoHaLayer, torch.Tensor]:
    build, size, layer_class = BASES[base]
    layer = layer_class(build().to(dtype).requires_grad_(False))
    layer.update_layer("default", 2, 3.0, LoHaConfig(**{"init_weights": False} | config))
    layer.set_adapter("default")
    return layer, torch.randn(size, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(base, kind):
    layer, x = make(base, **KINDS[kind])
    before = layer.weight.clone()
    y = layer(x)
    assert not torch.allclose(y, layer.base_layer(x), atol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.base_layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_gradcheck(base, kind):
    layer, x = make(base, **KINDS[kind])
    parameters = dict(layer.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    assert not any(name.startswith("base_layer") for name in trained)

    def run(x, *values):
        return torch.func.functional_call(layer, parameters | dict(zip(trained, values, strict=True)), x)

    assert gradcheck(run, (x, *trained.values()), fast_mode=True)


def test_transformers_conv1d_is_a_transposed_linear_layer():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 5)
    linear = nn.Linear(5, 6)
    with torch.no_grad():
        conv1d.weight.copy_(linear.weight.T)
        conv1d.bias.copy_(linear.bias)
    torch.manual_seed(0)
    ours = LoHaLinear(conv1d)
    ours.update_layer("default", 2, 3.0, LoHaConfig(init_weights=False))
    torch.manual_seed(0)
    theirs = LoHaLinear(linear)
    theirs.update_layer("default", 2, 3.0, LoHaConfig(init_weights=False))
    for layer in (ours, theirs):
        layer.set_adapter("default")
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.merge()
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(conv1d.weight.T, linear.weight + theirs.get_delta_weight("default"))
    assert ours.get_delta_weight("default").shape == conv1d.weight.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["flat", "tucker", "dora"])
@pytest.mark.parametrize("base", ["linear", "conv2d"])
def test_merging_in_half_precision_is_within_half_an_ulp(base, kind, dtype):
    layer, _ = make(base, dtype=dtype, **KINDS[kind])
    wide = copy.deepcopy(layer).double()
    layer.merge()
    wide.merge()
    exact, found = wide.weight.detach(), layer.weight.detach()
    # The spacing of the storage dtype at each value; and float32's own rounding on top, 2^-13 or less of that.
    spacing = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(exact.abs())))
    spacing = spacing.clamp_min(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert float(((found.double() - exact).abs() / spacing).max()) <= 0.5 + 2e-3


def test_parameters_are_float32_beside_a_half_precision_base():
    layer, x = make("linear", dtype=torch.bfloat16)
    assert {p.dtype for n, p in layer.named_parameters() if "hada" in n} == {torch.float32}
    assert layer(x).dtype == torch.bfloat16


def test_safe_merge_refuses_what_is_not_finite():
    layer, _ = make("linear")
    before = layer.weight.clone()
    with torch.no_grad():
        layer.hada_w1_a["default"][0, 0] = float("nan")
    with pytest.raises(LoHaError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_several_adapters_add_up_and_merge_together():
    layer, x = make("linear")
    alone = layer(x)
    layer.update_layer("other", 3, 1.0, LoHaConfig(init_weights=False))
    torch.testing.assert_close(layer(x), alone)
    layer.set_adapter("other")
    other = layer(x)
    layer.set_adapter(["default", "other"])
    both = layer(x)
    torch.testing.assert_close(both, alone + other - layer.base_layer(x))
    layer.merge()
    assert layer.merged_adapters == ["default", "other"]
    torch.testing.assert_close(layer(x), both)
    layer.unmerge()
    layer.delete_adapter("other")
    torch.testing.assert_close(layer(x), alone)
    layer.delete_adapter("default")
    assert layer.adapters == [] and torch.equal(layer(x), layer.base_layer(x))


def test_several_dora_adapters_merge_to_what_they_compute():
    layer, x = make("linear", use_dora=True)
    layer.update_layer("other", 3, 1.0, LoHaConfig(init_weights=False, use_dora="input"))
    layer.set_adapter(["default", "other"])
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)


def test_only_active_adapters_train_and_switching_off_leaves_the_base():
    layer, x = make("linear")
    layer.update_layer("other", 2, 2.0, LoHaConfig())

    def training():
        return {n.split(".")[-1] for n, p in layer.named_parameters() if p.requires_grad}

    assert training() == {"default"}
    layer.set_adapter("other")
    assert training() == {"other"}
    layer.set_adapter("default", inference_mode=True)
    assert training() == set()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x)) and training() == set()
    layer.enable_adapters(True)
    assert training() == {"default"} and not torch.equal(layer(x), layer.base_layer(x))


def test_scales():
    layer, x = make("linear")
    base, full = layer.base_layer(x), layer(x)
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer(x), base + (full - base) / 2)
    layer.scale_layer(4.0)
    torch.testing.assert_close(layer(x), base + (full - base) * 2)
    layer.unscale_layer(4.0)
    torch.testing.assert_close(layer(x), base + (full - base) / 2)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x), full)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("base", ["linear", "conv2d"])
@pytest.mark.parametrize("tucker", [True, False])
def test_rank_dropout_drops_output_rows(rescaled, base, tucker):
    layer, x = make(base, rank_dropout=0.5, rank_dropout_scale=rescaled, use_effective_conv2d=tucker)
    update = layer.eval()(x) - layer.base_layer(x)
    layer.train()
    torch.manual_seed(0)
    kept = (torch.rand(6) > 0.5).double()
    assert 0 < kept.sum() < 6
    torch.manual_seed(0)
    dropped = layer(x) - layer.base_layer(x)
    factor = kept / kept.mean() if rescaled else kept
    torch.testing.assert_close(dropped, update * factor.reshape(-1, *[1] * (x.dim() - 2)))


def test_rank_dropout_of_everything_is_zero_and_not_nan():
    layer, x = make("linear", rank_dropout=0.999)
    assert torch.equal(layer.train()(x), layer.base_layer(x))


def test_module_dropout_drops_the_whole_update_as_often_as_it_says():
    layer, x = make("linear", module_dropout=0.25)
    layer.train()
    torch.manual_seed(0)
    dropped = sum(torch.equal(layer(x), layer.base_layer(x)) for _ in range(400))
    assert 70 < dropped < 130
    layer.eval()
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_inits():
    def parameters(**config):
        layer = LoHaConv2d(nn.Conv2d(64, 96, 3))
        layer.update_layer("default", 32, 32, LoHaConfig(use_effective_conv2d=True, **config))
        return {name.split(".")[0]: p for name, p in layer.named_parameters() if "base" not in name}, layer

    peft, layer = parameters()
    assert not peft["hada_w2_b"].any() and not layer.get_delta_weight("default").any()
    lycoris, layer = parameters(init_weights="lycoris")
    assert not lycoris["hada_w2_a"].any() and not layer.get_delta_weight("default").any()
    for name, std in {"hada_w1_a": 0.1, "hada_w1_b": 1, "hada_w2_b": 1, "hada_t1": 0.1, "hada_t2": 0.1}.items():
        assert abs(float(lycoris[name].std()) / std - 1) < 0.1 and abs(float(lycoris[name].mean())) < 0.1 * std
    for init in (True, "lycoris", "balanced"):
        scalar, layer = parameters(init_weights=init, use_scalar=True)
        assert float(scalar["scalar"]) == 0 and scalar["hada_w2_a"].any() and scalar["hada_w2_b"].any()
        assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize(("out", "inner", "kernel"), [(320, 768, 1), (64, 64, 3)])
def test_the_first_step_of_a_balanced_loha_is_as_long_as_a_loras(out, inner, kernel, tucker):
    """The oracle is PEFT's own LoRA of as many parameters, and Adam's first step: every element by its rate."""
    peft, rank, rate = pytest.importorskip("peft"), 8, 1e-3
    base = nn.Conv2d(inner, out, kernel) if kernel > 1 else nn.Linear(inner, out)
    torch.manual_seed(0)
    config = LoHaConfig(r=rank, alpha=rank, init_weights="balanced", use_effective_conv2d=tucker)
    layer = (LoHaConv2d if kernel > 1 else LoHaLinear)(base)
    layer.update_layer("default", rank, rank, config)
    assert not layer.get_delta_weight("default").any()
    factors = layer.factors("default")
    stds = {name: float(t.std()) for name, t in factors.tensors().items() if name != "w2_a"}
    sizes = {name: {"a": 0.5, "b": 2**0.5}.get(name[-1], 1.0) for name in stds}
    sigma = [std / sizes[name] for name, std in stds.items()]
    assert max(sigma) / min(sigma) < 1.1

    options = {"r": 2 * rank, "lora_alpha": 2 * rank, "target_modules": ["0"]}
    lora = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), peft.LoraConfig(**options)).base_model.model[0]
    steps = {}
    for name, parameter, delta in (
        ("ours", layer.hada_w2_a["default"], lambda: layer.get_delta_weight("default")),
        ("theirs", lora.lora_B["default"].weight, lambda: lora.get_delta_weight("default")),
    ):
        with torch.no_grad():
            parameter.add_(rate * torch.randn_like(parameter).sign())
            steps[name] = float(delta().square().mean().sqrt())
    assert steps["ours"] == pytest.approx(steps["theirs"], rel=0.1)


def test_hooks_and_subclasses_of_the_base_layer_are_respected():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for base in (Twice(5, 6), nn.Linear(5, 6)):
        layer = LoHaLinear(base)
        layer.update_layer("default", 2, 2.0, LoHaConfig(init_weights=False))
        layer.set_adapter("default")
        x = torch.randn(3, 5)
        if type(base) is nn.Linear:
            base.register_forward_hook(lambda module, args, y: 3 * y)
        torch.testing.assert_close(layer(x), base(x) + x @ layer.get_delta_weight("default").T)


def test_quantised_bases_stay_live_and_refuse_to_merge():
    class Packed(nn.Linear):
        """As bitsandbytes keeps a weight: bytes of another shape."""

        def __init__(self):
            super().__init__(5, 6, bias=False)
            self.real = self.weight.data
            self.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x @ self.real.T

    base = Packed()
    layer = LoHaLinear(base)
    layer.update_layer("default", 2, 2.0, LoHaConfig(init_weights=False))
    layer.set_adapter("default")
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.get_delta_weight("default").T)
    with pytest.raises(LoHaError, match="packed"):
        layer.merge()
    with pytest.raises(LoHaError, match="packed"):
        layer.update_layer("dora", 2, 2.0, LoHaConfig(use_dora=True))


def test_unbatched_convolution_input():
    layer, x = make("conv2d")
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("name", ["a.b", "keys", "training"])
def test_names_that_torch_cannot_hold_are_refused(name):
    layer, _ = make("linear")
    with pytest.raises(LoHaError, match="adapter's name"):
        layer.update_layer(name, 2, 2.0, LoHaConfig())
