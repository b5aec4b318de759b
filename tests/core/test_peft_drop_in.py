"""`loha_core.peft`: PEFT's own LoHa on our layers. PEFT's suite itself: `python -m tests.peers.peft_suite PATH`."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="what it is about: pip install .[peers]")
import loha_core.peft as drop_in  # noqa: E402
from loha_core.algebra import tucker  # noqa: E402

from .processes import PATIENCE  # noqa: E402

MODES = ("peft", "ours")


@pytest.fixture(autouse=True)
def switched_off():
    yield
    drop_in.disable()


def mode(name: str):
    return drop_in.enabled() if name == "ours" else nullcontext()


class Net(nn.Module):
    """Every kind of layer that PEFT's LoHa knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2, dilation=2, padding=2)
        self.line = nn.Conv1d(8, 6, 3, padding="same")
        self.point = nn.Conv1d(6, 6, 1)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.grouped(torch.tanh(self.conv(x)))
        return self.linear(self.point(torch.tanh(self.line(x.flatten(2)))).mT)


LAYERS = ["conv", "grouped", "line", "point", "linear"]
if peft.__version__ < "0.20":  # whose parameters of grouped convolutions have a wrong shape
    LAYERS.remove("grouped")


def wrapped(name: str, model: nn.Module, adapter: str = "default", **settings):
    config = peft.LoHaConfig(**({"r": 3, "alpha": 5, "target_modules": LAYERS, "init_weights": False} | settings))
    with mode(name):
        torch.manual_seed(1)
        return peft.get_peft_model(copy.deepcopy(model), config, adapter)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def losses(model: nn.Module, x: torch.Tensor, steps: int = 6) -> list[float]:
    torch.manual_seed(2)
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-2)
    found = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank_dropout": 0.3},
        {"module_dropout": 0.4},
        {"rank_dropout": 0.2, "module_dropout": 0.2, "init_weights": True},
        {"rank_pattern": {"linear": 2, "conv": 4}, "alpha_pattern": {"line": 1}},
    ],
    ids=str,
)
def test_it_trains_as_pefts(net, x, settings):
    """The same parameters, drawn and dropped in the same order, and the same losses."""
    models = {name: wrapped(name, net, **settings) for name in MODES}
    theirs, ours = (dict(models[name].named_parameters()) for name in MODES)
    assert list(theirs) == list(ours) and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert losses(models["ours"], x) == pytest.approx(losses(models["peft"], x), rel=1e-5)


def test_layers_are_ours_and_pefts(net):
    model = wrapped("ours", net).base_model.model
    kinds = {name: type(getattr(model, name)) for name in LAYERS}
    expected = {name: drop_in.Conv2d for name in ("conv", "grouped")} | {"linear": drop_in.Linear}
    assert kinds == {name: expected.get(name, drop_in.Conv1d) for name in LAYERS}
    assert isinstance(model.linear, peft.tuners.loha.Linear) and isinstance(model.conv, peft.tuners.loha.LoHaLayer)
    assert repr(model.linear).startswith("loha.Linear")


def test_switching_it_on_and_off(net):
    def kind(model):
        return type(model.base_model.model.linear)

    before = wrapped("peft", net)
    drop_in.enable()
    drop_in.enable()
    with drop_in.enabled():
        pass
    during = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(target_modules=["linear"]))
    drop_in.disable()
    after = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(target_modules=["linear"]))
    theirs = peft.tuners.loha.layer.Linear
    assert [kind(model) for model in (before, during, after)] == [theirs, drop_in.Linear, theirs]
    with pytest.raises(RuntimeError), drop_in.enabled():
        raise RuntimeError
    assert kind(wrapped("peft", net)) is theirs


@pytest.mark.parametrize(("writer", "reader"), [("peft", "ours"), ("ours", "peft")])
def test_files_are_pefts(net, x, tmp_path, writer, reader):
    model = wrapped(writer, net, use_effective_conv2d=True).eval()
    model.save_pretrained(tmp_path)
    with mode(reader):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).eval()
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("effective", [False, True])
def test_merging_and_unmerging(net, x, effective):
    model = wrapped("ours", net, use_effective_conv2d=effective).eval()
    expected, base = model(x), net(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_tucker_gradients_are_right(net, x):
    """PEFT's are not: for the outer factors it contracts with the other half's core (DESIGN §11)."""
    errors = {}
    for name in MODES:
        layer = wrapped(name, net, use_effective_conv2d=True).base_model.model.conv
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
        parameters = {key: getattr(layer, key)["default"] for key in names}
        layer(x).square().sum().backward()
        exact = {key: parameter.detach().double().requires_grad_() for key, parameter in parameters.items()}
        a1, b1, a2, b2, t1, t2 = exact.values()
        weight = layer.base_layer.weight.double() + tucker(t1, a1, b1) * tucker(t2, a2, b2) * layer.scaling["default"]
        bias = layer.base_layer.bias.double()
        nn.functional.conv2d(x.double(), weight, bias, padding=1).square().sum().backward()
        errors[name] = max(
            float((parameters[key].grad - exact[key].grad).norm() / exact[key].grad.norm()) for key in names
        )
    assert errors["ours"] < 1e-5 < 0.1 < errors["peft"]


def dense(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The base layer with ΔW in its weight."""
    base = copy.deepcopy(layer.get_base_layer())
    base.weight.data += layer.get_delta_weight("default").detach()
    return base(x)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(
    "base",
    [
        nn.Conv3d(4, 6, (3, 2, 1), groups=2, padding=1),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv1d(4, 6, 4, padding="same", dilation=3),
    ],
    ids=["Conv3d", "reflect", "same"],
)
def test_layers_that_peft_lacks_or_has_wrong(base, effective):
    with drop_in.enabled():
        config = peft.LoHaConfig(r=3, target_modules=["0"], init_weights=False, use_effective_conv2d=effective)
        model = peft.get_peft_model(nn.Sequential(base), config).eval()
    x = torch.randn(2, 4, *[7] * (base.weight.dim() - 2))
    torch.testing.assert_close(model(x), dense(model.base_model.model[0], x), rtol=1e-4, atol=1e-5)
    assert model.base_model.model[0].hada_w1_a["default"].requires_grad


def test_gpt2s_linear_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    base = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).view(2, 6)
    with drop_in.enabled():
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LoHaConfig(task_type="CAUSAL_LM", init_weights=False)
        ).eval()
        found = model(ids).logits
        assert not torch.allclose(found, base(ids).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, found)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert type(layer) is drop_in.TransformersConv1D
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, found, rtol=1e-4, atol=1e-5)


def test_mixed_with_a_lora_and_several_adapters(net, x):
    outputs = {}
    for name in MODES:
        with mode(name):
            torch.manual_seed(4)
            settings = {"target_modules": ["linear", "conv"], "init_weights": False}
            model = peft.PeftMixedModel(copy.deepcopy(net), peft.LoHaConfig(**settings), "a")
            model.add_adapter("b", peft.LoraConfig(target_modules=["linear"], init_lora_weights=False))
            model.add_adapter("c", peft.LoHaConfig(r=2, **settings))
            model.set_adapter(["a", "b", "c"])
            outputs[name] = model.eval()(x)
    torch.testing.assert_close(outputs["ours"], outputs["peft"], rtol=1e-4, atol=1e-5)


def test_conversion_to_lora():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 16))
    converted = {}
    for name in MODES:
        model = wrapped(name, base, target_modules=["0", "1"])
        converted[name] = peft.convert_to_lora(model, rank=4)[1]
    assert converted["peft"].keys() == converted["ours"].keys()
    for key, tensor in converted["peft"].items():
        torch.testing.assert_close(converted["ours"][key].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


def test_hooks_and_subclasses_of_the_base_are_heard(net, x):
    """A base layer that is watched, or is more than its class, is called rather than computed."""
    model = wrapped("ours", net).eval()
    layer = model.base_model.model.linear
    expected = model(x)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(net, x, dtype):
    outputs = [wrapped(name, net.to(dtype)).eval()(x.to(dtype)) for name in MODES]
    net.float()
    assert outputs[1].dtype == dtype
    torch.testing.assert_close(outputs[1].float(), outputs[0].float(), rtol=0.05, atol=0.05)


def test_in_one_graph():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    model = wrapped("ours", base, target_modules=["0", "2"]).eval()
    x = torch.randn(3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_diffusers_add_adapter():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    config = peft.LoHaConfig(r=2, target_modules=["to_q", "conv1"], init_weights=False)
    inputs = (torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 8))
    outputs = []
    for name in MODES:
        model = copy.deepcopy(unet)
        torch.manual_seed(5)
        with mode(name):
            model.add_adapter(config)
        outputs.append(model(*inputs).sample)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)


def test_without_peft_it_names_the_extra():
    code = "import sys; sys.modules['peft'] = None; import loha_core.peft"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert "LoHaError: PEFT 0.19 or later is not here" in run.stderr and "comfyui-loha[peft]" in run.stderr


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (7,)), (nn.Conv2d, (7, 7))])
def test_a_convolution_takes_a_single_picture_without_a_batch(kind, size, effective):
    base, x = nn.Sequential(kind(3, 4, 3, padding=1)), torch.randn(3, *size)
    settings = {"target_modules": ["0"], "use_effective_conv2d": effective}
    theirs, ours = (wrapped(name, base, **settings)(x) for name in MODES)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_when_every_row_is_dropped_the_update_is_zero():
    base, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    model = wrapped("ours", base, target_modules=["0"], rank_dropout=0.999)
    torch.testing.assert_close(model(x), base(x))
