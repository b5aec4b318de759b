"""Side by side with peft, in one process: same seed, same weights, same results."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.model import LoHaModel, get_peft_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")


pytestmark = pytest.mark.usefixtures("one_thread")


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=32,
        )
    )  # fmt: skip


def bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32)
    )


def vit():
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
    )


def clip():
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip


def ours_and_theirs(model: nn.Module, **config) -> tuple[LoHaModel, nn.Module]:
    """The same model, adapted by both from the same seed."""
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    ours = get_peft_model(model, LoHaConfig(**config))
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, peft.LoHaConfig(**config)).base_model
    return ours, theirs


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """PEFT has Conv1d's core as (r, r, k, 1)."""
    return {name: tuple(p.shape) for name, p in trained(model).items()}


SELECTIONS = [
    (llama, {}),
    (llama, {"target_modules": "all-linear"}),
    (llama, {"target_modules": ["q_proj", "mlp.up_proj", "lm_head"], "exclude_modules": ["layers.1.mlp.up_proj"]}),
    (llama, {"target_modules": r".*\.[12]\..*(q|v)_proj", "exclude_modules": r".*2.*q_proj"}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    (llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3}}),
    (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    (bert, {}),
    (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    (bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    (bert, {"rank_pattern": {r"layer\.[01]\..*query": 2, "^bert.encoder.layer.2.attention.self.query": 5}}),
    (bert, {"layers_to_transform": [1, 2], "layers_pattern": ["layer"]}),
    (t5, {}),
    (t5, {"target_modules": "all-linear"}),
    (t5, {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}),
    (vit, {"target_modules": "all-linear"}),
    (vit, {"target_modules": ["projection", "classifier"], "rank_pattern": {"classifier": 2}}),
    (vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    (clip, {"target_modules": ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]}),
    (clip, {"target_modules": "all-linear"}),
    (unet, {"target_modules": ["proj_in", "to_k", "to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1"]}),
    (unet, {"target_modules": ["conv1", "conv2", "proj_in", "conv_shortcut"], "use_effective_conv2d": True}),
    (unet, {"target_modules": r".*down_blocks.*conv\d", "rank_pattern": {"conv1": 2}}),
    (unet, {"target_modules": "all-linear"}),
]


@pytest.mark.parametrize(("build", "config"), SELECTIONS)
def test_the_same_modules_ranks_and_first_values(build, config):
    ours, theirs = ours_and_theirs(build(), r=4, alpha=8, **config)
    assert shapes(ours) == shapes(theirs)
    for name, parameter in trained(theirs).items():
        assert torch.equal(trained(ours)[name], parameter), name
    layers = dict(ours.loha_layers())
    for name, module in theirs.model.named_modules():
        if hasattr(module, "hada_w1_a"):
            assert layers[name].scaling["default"] == module.scaling["default"]
    assert ours.targeted_module_names == theirs.targeted_module_names


def test_the_table_of_architectures_is_pefts():
    ours, theirs = LoHaModel.target_module_mapping, peft.tuners.loha.LoHaModel.target_module_mapping
    assert {k: set(v) if isinstance(v, list) else v for k, v in ours.items()} == {
        k: set(v) if isinstance(v, (list, set)) else v for k, v in theirs.items()
    }


@pytest.mark.parametrize("alpha_pattern", [{}, {"q_proj": 1, r"layers\.0\.self_attn\.v_proj": 3.0}])
def test_a_llama_computes_and_learns_the_same(alpha_pattern):
    config = {"target_modules": "all-linear", "alpha_pattern": alpha_pattern, "init_weights": False}
    ours, theirs = ours_and_theirs(llama(), r=4, alpha=8, **config)
    ids = torch.randint(0, 32, (2, 9))
    losses = [model(ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    compare_gradients(ours, theirs)


@pytest.mark.parametrize("effective", [False, True])
def test_a_unet_computes_the_same(effective):
    targets = ["conv1", "conv2", "conv", "to_q", "to_v", "proj_in", "ff.net.2"]
    ours, theirs = ours_and_theirs(
        unet(), r=2, alpha=4, target_modules=targets, use_effective_conv2d=effective, init_weights=False
    )
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([5]), torch.randn(2, 3, 16)
    y = [model(x, t, c).sample for model in (ours, theirs)]
    torch.testing.assert_close(*y, rtol=1e-5, atol=1e-5)
    for sample in y:
        sample.square().mean().backward()
    # PEFT's gradients of Tucker's w1_a and w2_a are wrong, and what lies below them still agrees.
    compare_gradients(ours, theirs, skip=("_a",) if effective else ())


def compare_gradients(ours, theirs, skip=()):
    theirs_by_name = trained(theirs)
    for name, parameter in trained(ours).items():
        if not name.split(".")[-2].endswith(skip or ("!",)):
            wanted = theirs_by_name[name].grad
            assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9, name


LAYERS = [
    (lambda: nn.Linear(7, 5), (3, 7)),
    (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (2, 4, 9)),
    (lambda: nn.Conv1d(4, 6, 1), (2, 4, 9)),
    (lambda: nn.Conv2d(4, 6, 3), (2, 4, 6, 6)),
    (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 4, 6, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 6)),
    (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 6, 6)),
    (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 6, 6)),
]


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_layers_outputs_and_gradients(layer, effective):
    """Ours against float64 autograd in every case; and against PEFT, but for its wrong Tucker gradients."""
    build, size = LAYERS[layer]
    base = build()
    ours, theirs = ours_and_theirs(
        nn.Sequential(base), r=3, alpha=6, target_modules=["0"], use_effective_conv2d=effective, init_weights=False
    )
    inputs = [torch.randn(size).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [model(x) for model, x in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(g)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)

    exact = float64_gradients(base, ours, inputs[0].detach(), g)
    errors = {}
    for name, parameter in trained(ours).items():
        wanted = exact[name]
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm(), name
        found = trained(theirs)[name].grad.reshape(wanted.shape)
        errors[name.split(".")[-2]] = float((found - wanted).norm() / wanted.norm())
    if not any("hada_t1" in name for name in exact):
        assert max(errors.values()) <= 1e-5
    else:
        print(f"{type(base).__name__}: PEFT's Tucker gradients are off by", {k: f"{v:.2g}" for k, v in errors.items()})


def float64_gradients(base, model, x, g):
    """Plain autograd, in float64, through ΔW written out by einsum."""
    values = {n: p.detach().double().requires_grad_() for n, p in trained(model).items()}
    part = {n.split(".")[-2].removeprefix("hada_"): p for n, p in values.items()}
    if "t1" in part:
        m1, m2 = (torch.einsum("pq...,po,qi->oi...", part[f"t{h}"], part[f"w{h}_a"], part[f"w{h}_b"]) for h in (1, 2))
    else:
        m1, m2 = part["w1_a"] @ part["w1_b"], part["w2_a"] @ part["w2_b"]
    weight = base.weight.detach().double() + (m1 * m2).reshape(base.weight.shape) * 2
    if isinstance(base, nn.Linear):
        y = F.linear(x.double(), weight)
    else:
        conv = F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d
        y = conv(x.double(), weight, None, base.stride, base.padding, base.dilation, base.groups)
    y.backward(g.double())
    return {name: value.grad.float() for name, value in values.items()}


@pytest.mark.parametrize("rank_dropout", [0.0, 0.4])
def test_dropout_draws_as_peft_does(rank_dropout):
    """Rank dropout: the same seed drops the same rows, rescaled alike."""
    ours, theirs = ours_and_theirs(
        nn.Sequential(nn.Linear(6, 32)), r=2, alpha=2, target_modules=["0"], init_weights=False,
        rank_dropout=rank_dropout,
    )  # fmt: skip
    x = torch.randn(4, 6)
    torch.manual_seed(5)
    torch.rand(1)  # PEFT draws for module dropout even where there is none
    y = ours.train()(x)
    torch.manual_seed(5)
    torch.testing.assert_close(y, theirs.train()(x))


def test_counts_are_pefts(capsys):
    ours, _ = ours_and_theirs(llama(), r=4, alpha=8, target_modules="all-linear")
    ours.print_trainable_parameters()
    printed = capsys.readouterr().out
    peft.get_peft_model(llama(), peft.LoHaConfig(r=4, target_modules="all-linear")).print_trainable_parameters()
    assert printed == capsys.readouterr().out


def test_gpt2s_conv1d_which_peft_refuses():
    model = gpt2().eval()
    base = copy.deepcopy(model)
    ours = LoHaModel(model, LoHaConfig(r=2, init_weights=False))
    assert {name.split(".")[-1] for name, _ in ours.loha_layers()} == {"c_attn"}
    ids = torch.randint(0, 32, (1, 5))
    y = ours(ids).logits
    assert not torch.allclose(y, base(ids).logits)
    torch.testing.assert_close(ours.merge_and_unload()(ids).logits, y)
