"""Optimizers by name, their groups and learning rates."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from loha_core import LoHaError
from loha_core.training.optimizers import SOURCES, OptimizerConfig, parameter_groups
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layers import LoHaLinear


def installed(name: str) -> bool:
    try:
        SOURCES[name].load()
    except ImportError:
        return False
    return True


@pytest.fixture(params=SOURCES)
def name(request) -> str:
    if not installed(request.param):
        pytest.skip(f"needs the extra {SOURCES[request.param].extra}")
    return request.param


def layer(**config) -> LoHaLinear:
    found = LoHaLinear(nn.Linear(5, 6).requires_grad_(False))
    found.update_layer("default", 2, 2, LoHaConfig(**config))
    found.set_adapter("default")
    return found


def minimum(name: str, steps: int = 60, **settings) -> float:
    """Where ‖p − 3‖² gets to from p = 1, as a distance."""
    p = nn.Parameter(torch.ones(70, 70))  # bitsandbytes keeps small tensors in 32 bits
    rate = 1.0 if name == "prodigy" else 0.1
    optimizer = OptimizerConfig(name, **{"lr": rate} | settings).build(
        [{"params": [p], "lr": settings.get("lr", rate)}]
    )
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (p - 3).square().sum().backward()
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return float((p.detach() - 3).abs().mean())


def test_each_optimizer_goes_down(name):
    steps = {"prodigy": 150, "adafactor": 100, "schedule-free": 120}.get(name, 60)
    assert minimum(name, steps) < 0.5


def test_weight_decay_reaches_each_optimizer(name):
    assert minimum(name, 20, weight_decay=0.5) != minimum(name, 20)


def test_options_reach_each_optimizer(name):
    options = {"adafactor": {"beta2_decay": -0.3}, "prodigy": {"d0": 1e-3}}.get(name, {"betas": [0.5, 0.6]})
    assert minimum(name, 40, options=options) != minimum(name, 40)


def test_adamw_can_be_told_how_it_walks_the_parameters():
    """torch takes one of fused and foreach; ours is left out where the user has chosen."""
    assert minimum("adamw", options={"foreach": True}) < 0.5
    assert minimum("adamw", options={"fused": False}) < 0.5


def test_options_that_an_optimizer_does_not_have(name):
    with pytest.raises(LoHaError, match=f"{name} does not take these options.*momentun"):
        minimum(name, options={"momentun": 1})


def test_options_out_of_range(name):
    if name == "schedule-free":
        pytest.skip("it checks none")
    options = {"adafactor": {"d": 0.0}}.get(name, {"betas": [1.5, 0.9]})
    with pytest.raises(LoHaError, match=f"{name} does not take these options"):
        minimum(name, options=options)


PACKAGES = {
    "adamw8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedule-free": "schedulefree",
    "lion": "lion_pytorch",
}


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.extra])
def test_a_missing_extra_is_named(name, monkeypatch):
    source, package = SOURCES[name], PACKAGES[name]
    for found in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, found)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(LoHaError, match=rf"{name} needs a library.*pip install 'comfyui-loha\[{source.extra}\]'"):
        OptimizerConfig(name).build([{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}])


# --- groups ---------------------------------------------------------------------------------------


def rates(networks: dict[str, nn.Module], config: OptimizerConfig, init: bool | str = True) -> dict[str, float]:
    """Learning rate by parameter's name, "model.hada_w1_a.default" and so on."""
    groups = parameter_groups({label: {"layer": m} for label, m in networks.items()}, config, init)
    by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_id)
    named = {f"{label}.{n}": p for label, m in networks.items() for n, p in m.named_parameters()}
    return {n: by_id[id(p)] for n, p in named.items() if id(p) in by_id}


def test_text_encoders_have_a_rate_of_their_own():
    networks = {"model": layer(), "text": layer()}
    found = rates(networks, OptimizerConfig(lr=0.5, lr_text=0.125))
    assert {n.partition(".")[0]: rate for n, rate in found.items()} == {"model": 0.5, "text": 0.125}
    assert len(found) == 8
    assert set(rates(networks, OptimizerConfig(lr=0.5)).values()) == {0.5}
    found = rates(networks, OptimizerConfig(lr=0.5, lr_text=0.0))
    assert {rate for n, rate in found.items() if n.startswith("text")} == {0.0}


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        ({}, "hada_w2_b"),
        ({"use_effective_conv2d": True}, "hada_w2_b"),
        ({"init_weights": "lycoris"}, "hada_w2_a"),
        ({"use_scalar": True}, "scalar"),
        ({"init_weights": "lycoris", "use_scalar": True}, "scalar"),
        ({"use_dora": True}, "hada_w2_b"),
    ],
)
def test_lora_plus_is_for_what_begins_at_zero(config, zero):
    found = layer(**config)
    zeros = {n for n, p in found.named_parameters() if p.requires_grad and not p.any()}
    assert zeros == {f"{zero}.default"}
    by_name = rates({"model": found}, OptimizerConfig(lr=0.5, lora_plus=16.0), config.get("init_weights", True))
    assert {n for n, rate in by_name.items() if rate == 8.0} == {f"model.{zero}.default"}
    assert {rate for n, rate in by_name.items() if zero not in n} == {0.5}


def test_balanced_factors_learn_at_a_loras_rate():
    found = rates({"model": layer(use_dora=True)}, OptimizerConfig(lr=0.5), "balanced")
    assert {n.split(".")[1]: rate for n, rate in found.items()} == {
        "hada_w1_a": 1.5, "hada_w1_b": 1.5, "hada_w2_a": 1.5, "hada_w2_b": 1.5, "dora_scale": 0.5
    }  # fmt: skip
    assert set(rates({"model": layer(use_dora=True)}, OptimizerConfig("prodigy", lr=1.0), "balanced").values()) == {1.0}
    begun = layer(init_weights="balanced")
    assert {n for n, p in begun.named_parameters() if p.requires_grad and not p.any()} == {"hada_w2_a.default"}
    found = rates({"model": begun}, OptimizerConfig(lr=0.5, lora_plus=16.0), "balanced")
    assert {n.split(".")[1]: rate for n, rate in found.items()} == {
        "hada_w1_a": 1.5, "hada_w1_b": 1.5, "hada_w2_a": 24.0, "hada_w2_b": 1.5
    }  # fmt: skip


def test_learning_rates_by_pattern():
    networks = {"model": {"blocks.0.attn2.to_k": layer(), "blocks.0.ff": layer(), "blocks.1.ff": layer()},
                "text": {"text.ff": layer()}}  # fmt: skip
    config = OptimizerConfig(
        lr=0.5, lr_text=0.25, lora_plus=2.0, lr_pattern={r"attn\d\.to_k": 0.5, "0.ff": 0.0, "ff": 4.0}
    )
    groups = parameter_groups(networks, config)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(group["lr"] == group["base_lr"] for group in groups) and len(rate) == 16
    for path, expected in {"blocks.0.attn2.to_k": 0.25, "blocks.0.ff": 0.0, "blocks.1.ff": 2.0, "text.ff": 1.0}.items():
        found = (networks["model"] | networks["text"])[path]
        rates = {name: rate[id(p)] for name, p in found.named_parameters() if id(p) in rate}
        assert rates.pop("hada_w2_b.default") == 2 * expected and set(rates.values()) == {expected}


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ({"attn1": 2.0}, "lr_pattern: 'attn1' matches no layer; expected the end of a path, such as a.ff"),
        ({"ff": 2.0, "a.ff": 3.0}, "'a.ff' matches only layers that a pattern before it matches"),
    ],
)
def test_a_pattern_that_has_no_effect_is_refused(patterns, says):
    with pytest.raises(LoHaError, match=says):
        parameter_groups({"model": {"a.ff": layer()}}, OptimizerConfig(lr_pattern=patterns))


def test_the_base_is_never_trained():
    found = layer()
    found.base_layer.requires_grad_(True)
    assert not any("base_layer" in n for n in rates({"model": found}, OptimizerConfig()))


def test_nothing_to_train():
    with pytest.raises(LoHaError, match="nothing to train"):
        parameter_groups({"model": {"": layer(inference_mode=True).requires_grad_(False)}}, OptimizerConfig())


@pytest.mark.skipif(not installed("prodigy"), reason="needs the extra prodigy")
def test_prodigy_has_one_rate():
    config = OptimizerConfig("prodigy", lr=1.0, lora_plus=4.0)
    with pytest.raises(LoHaError, match="prodigy has one learning rate.*lora_plus"):
        config.build(parameter_groups({"model": {"": layer()}}, config))


# --- learning rates over the run ------------------------------------------------------------------


def curve(steps: int = 100, **settings) -> list[float]:
    config = OptimizerConfig(**settings)
    return [config.factor(step, steps) for step in range(steps)]


def test_constant():
    assert curve() == [1.0] * 100


def test_linear():
    assert curve(schedule="linear", lr_end=0.2) == pytest.approx([1 - 0.8 * i / 100 for i in range(100)])


def test_cosine():
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(100)]
    assert curve(schedule="cosine", lr_end=0.1) == pytest.approx(expected)


def test_restarts_are_cosines_one_after_the_other():
    assert curve(schedule="restarts", cycles=4) == pytest.approx(curve(25, schedule="cosine") * 4)
    assert curve(schedule="restarts", cycles=1) == curve(schedule="cosine")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "restarts"])
def test_warm_up_rises_to_the_rate_and_the_curve_follows(schedule):
    found = curve(110, schedule=schedule, warmup_steps=10, cycles=2)
    assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert found[10:] == pytest.approx(curve(100, schedule=schedule, cycles=2))


@given(
    st.sampled_from(["constant", "linear", "cosine", "restarts"]),
    st.integers(1, 200),
    st.integers(0, 250),
    st.integers(1, 7),
    st.floats(0, 1),
)
def test_every_rate_is_between_zero_and_the_full_one(schedule, steps, warmup, cycles, lr_end):
    found = curve(steps, schedule=schedule, warmup_steps=warmup, cycles=cycles, lr_end=lr_end)
    assert all(0 < f <= 1 for f in found)
    assert OptimizerConfig(schedule=schedule, lr_end=lr_end).factor(steps, steps) == pytest.approx(
        {"constant": 1.0, "restarts": 1.0}.get(schedule, lr_end)
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "sgd"}, "no optimizer 'sgd'; there are adamw"),
        ({"schedule": "exponential"}, "schedule is 'exponential'"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr_text": math.inf}, "lr_text is inf"),
        ({"lora_plus": -1}, "lora_plus is -1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"lr_end": math.nan}, "lr_end is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_steps": 2.5}, "warmup_steps is 2.5"),
        ({"cycles": 0}, "cycles is 0"),
    ],
)
def test_values_out_of_range(settings, says):
    with pytest.raises(LoHaError, match=says):
        OptimizerConfig(**settings)
