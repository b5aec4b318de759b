"""The training loop: each knob does what it says, and what is frozen stays as it is to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

from loha_core import LoHaError
from loha_core.training.attach import attached
from loha_core.training.config import TrainingConfig
from loha_core.training.events import PreviewDue, Saved, Stepped, Stopped
from loha_core.training.objectives import Objective
from loha_core.training.optimizers import SOURCES, OptimizerConfig
from loha_core.training.randomness import fork_rng
from loha_core.training.trainer import ADAPTER, MAX_LOSS_SCALE, Trainer, clip_delta_norm_
from loha_core.tuner.config import LoHaConfig
from loha_core.tuner.layer import LoHaLayer
from loha_core.tuner.model import LoHaModel

from . import oracle
from .test_optimizers import installed
from .training_script import Denoiser, Task

pytestmark = pytest.mark.usefixtures("one_thread")
DROPPING = LoHaConfig(r=2, alpha=2, init_weights="lycoris", rank_dropout=0.4)


def values(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def equal(a: Trainer, b: Trainer) -> bool:
    return all(map(torch.equal, values(a), values(b)))


def watch(config: TrainingConfig, optimizer: OptimizerConfig | None = None, task: Task | None = None, **rest):
    """(trainer, its events) of a whole run."""
    events: list = []
    return (task or Task()).run(config, optimizer, callbacks=[events.append], **rest), events


def norm_of(factors) -> float:
    """‖ΔW‖ in float64."""
    named = {f"m.hada_{name}": t for name, t in factors.tensors().items()}
    return float((oracle.update(named, "m", factors.alpha) ** 2).sum() ** 0.5)


# --- how long, how much -----------------------------------------------------------------------------


def test_steps_losses_and_events():
    trainer, events = watch(TrainingConfig(steps=5))
    assert [type(e) for e in events] == [Stepped] * 5
    assert [(e.step, e.steps, e.loss) for e in events] == [(i + 1, 5, trainer.losses[i]) for i in range(5)]
    assert trainer.step == len(trainer.losses) == 5


def test_it_learns():
    losses = Task(batch_size=8).run(TrainingConfig(steps=60), OptimizerConfig(lr=0.02)).losses
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_step_is_adamws_on_the_gradient_of_the_loss():
    """Ours against torch's own optimizer in a loop of five lines."""
    trainer, _ = watch(TrainingConfig(steps=4, max_grad_norm=0.0), OptimizerConfig(lr=0.01, weight_decay=0.1))
    task = Task()
    parameters = task.trainer(TrainingConfig()).parameters
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, fused=True)
    with attached(task.layers):
        for number in range(4):
            optimizer.zero_grad()
            loss = task.loss(task.batch(number))
            loss.backward()
            optimizer.step()
            assert float(loss.detach()) == trainer.losses[number]
    assert all(map(torch.equal, values(trainer), parameters))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_bigger_batch(parts):
    config, whole = TrainingConfig(steps=3), Task(batch_size=8)

    def part(number: int):
        step, place = divmod(number, parts)
        size = 8 // parts
        return whole.batch(step, range(place * size, (place + 1) * size))

    big = whole.run(config)
    accumulated = Task().run(replace(config, gradient_accumulation_steps=parts), batches=part)
    torch.testing.assert_close(values(accumulated), values(big), rtol=1e-4, atol=1e-6)
    assert accumulated.losses == pytest.approx(big.losses, rel=1e-5)
    ignored = Task().run(config, batches=part)
    assert not torch.allclose(ignored.parameters[0], big.parameters[0], rtol=1e-3)


def test_the_seed_decides_what_is_dropped():
    first, same, other = (
        Task(config=DROPPING).run(TrainingConfig(steps=3, seed=seed)) for seed in (0, 0, 1)
    )  # the data is of another seed
    assert equal(first, same) and not equal(first, other)
    task = Task(config=DROPPING)
    for layer in task.layers:
        layer.training = False  # as in a model that was sampled with
    assert equal(first, task.run(TrainingConfig(steps=3)))
    assert not any(layer.training for layer in task.layers)


def test_chance_outside_is_neither_used_nor_moved():
    torch.manual_seed(11)
    task = Task(config=DROPPING)
    before = torch.get_rng_state()
    one = task.run(TrainingConfig(steps=3))
    assert torch.equal(before, torch.get_rng_state())
    task = Task(config=DROPPING)
    torch.manual_seed(12)

    def restless(event):
        torch.rand(5)

    assert equal(one, task.run(TrainingConfig(steps=3), callbacks=[restless]))


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_batch_draws_does_not_reach_dropout(cached):
    def batches(number: int):
        if not cached:
            torch.rand(3)  # as a text encoder might the first time it sees a caption
        return task.batch(number)

    task = Task(config=DROPPING)
    assert equal(task.run(TrainingConfig(steps=2), batches=batches), Task(config=DROPPING).run(TrainingConfig(steps=2)))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_the_losss_and_factors_stay_float32(precision, dtype):
    seen = set()
    task = Task()
    task.model.leave.register_forward_hook(lambda module, args, y: seen.add(y.dtype))

    def batches(number: int):
        assert not torch.is_autocast_enabled("cpu")
        return task.batch(number)

    trainer = task.run(TrainingConfig(steps=3, mixed_precision=precision), batches=batches)
    full = Task().run(TrainingConfig(steps=3))
    assert seen == {dtype} and {p.dtype for p in trainer.parameters} == {torch.float32}
    assert trainer.losses != full.losses and trainer.losses == pytest.approx(full.losses, rel=0.02)


def scaled(factor: float) -> Task:
    """A task whose loss is so many times as large."""
    task = Task()
    own = task.loss
    task.loss = lambda batch: own(batch) * factor
    return task


def test_small_gradients_survive_fp16():
    """Those of a layer's output are 1e-9 here, and fp16 begins at 6e-8; the loss is scaled, the learning isn't."""
    norms = {}
    for precision in ("no", "fp16"):
        _, (event,) = watch(TrainingConfig(steps=1, mixed_precision=precision), task=scaled(1e-6))
        norms[precision] = event.norm
    assert norms["fp16"] == pytest.approx(norms["no"], rel=0.02) and norms["no"] > 0


def test_an_overflow_in_fp16_halves_the_scale_and_takes_the_step_again(monkeypatch):
    config = TrainingConfig(steps=4, mixed_precision="fp16", max_grad_norm=0.0)
    trainer, events = watch(config, task=scaled(10))
    full, _ = watch(replace(config, mixed_precision="no"), task=scaled(10))
    assert len(events) == 4 and 1 <= trainer._loss_scale < MAX_LOSS_SCALE
    assert trainer.losses == pytest.approx(full.losses, rel=0.02)
    assert watch(config, task=scaled(1e-6))[0]._loss_scale == MAX_LOSS_SCALE
    monkeypatch.setattr("loha_core.training.trainer.LOSS_SCALE_GROWTH_INTERVAL", 3)
    assert watch(config, task=scaled(10))[0]._loss_scale == 2 * trainer._loss_scale


def test_max_grad_norm():
    for limit in (0.0, 0.01):
        trainer, (event,) = watch(TrainingConfig(steps=1, max_grad_norm=limit))
        left = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainer.parameters))
        assert event.norm > 0.05  # before clipping
        assert left == pytest.approx(limit or event.norm, rel=1e-4)


# --- what is kept and shown -------------------------------------------------------------------------


def test_ema_is_what_is_saved_and_shown_and_averages_the_raw_factors():
    task, raw, shown = Task(), [], []

    def look(event):
        if isinstance(event, Stepped):
            raw.append([p.detach().double() for p in trainer.parameters])
        if isinstance(event, PreviewDue):
            shown.append([p.detach().clone() for p in trainer.parameters])

    trainer = task.trainer(TrainingConfig(steps=30, ema_decay=0.7, preview_every=30), callbacks=[look])
    average = [p.detach().double() for p in trainer.parameters]
    with attached(task.layers):
        trainer.run()
    for step, parameters in enumerate(raw):
        decay = min(0.7, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, parameters, strict=True)]
    torch.testing.assert_close([p.double() for p in shown[0]], average, rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(p, a) for p, a in zip(trainer.parameters, shown[0], strict=True))
    assert not any(torch.isclose(r, a).all() for r, a in zip(raw[-1], average, strict=True))
    first = next(iter(trainer.factors()["model"].values()))
    assert torch.equal(first.w1_a, shown[0][0])
    # Averaging is not training on: without it the raw factors are the same.
    assert equal(trainer, Task().run(TrainingConfig(steps=30)))


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, alpha=2, init_weights=False),
        LoHaConfig(r=2, alpha=2, init_weights=False, use_effective_conv2d=True),
        LoHaConfig(r=2, alpha=2, init_weights=False, use_scalar=True),
        LoHaConfig(r=2, alpha=2, init_weights=False, use_dora=True),
    ],
    ids=["flat", "tucker", "scalar", "dora"],
)
def test_max_norm_is_a_bound(config):
    most, optimizer = 0.002, OptimizerConfig(lr=0.05)
    free, _ = watch(TrainingConfig(steps=4), optimizer, Task(config=config))
    norms = {n: norm_of(f) for layers in free.factors().values() for n, f in layers.items()}
    assert all(n > most for n in norms.values())
    bound, _ = watch(TrainingConfig(steps=4, max_norm=most), optimizer, Task(config=config))
    norms = {n: norm_of(f) for layers in bound.factors().values() for n, f in layers.items()}
    assert all(0 < n <= most for n in norms.values()) and max(norms.values()) > 0.999 * most


@pytest.mark.parametrize("size", [(6, 5), (64, 48)])
def test_limiting_a_norm_keeps_the_direction_and_leaves_what_is_within(size):
    """Small and large layers take different ways to the norm."""
    torch.manual_seed(0)
    layer = Task().networks["text"]["text"].__class__(nn.Linear(size[1], size[0]))
    layer.update_layer(ADAPTER, 2, 3, LoHaConfig(init_weights=False))
    before = layer.factors(ADAPTER).delta().clone()
    norm = norm_of(layer.factors(ADAPTER))
    clip_delta_norm_(layer, norm * 1.01)
    assert torch.equal(layer.factors(ADAPTER).delta(), before)
    for most in (norm / 2, norm / 1000, 1e-12):
        clip_delta_norm_(layer, most)
        assert norm_of(layer.factors(ADAPTER)) <= most
        torch.testing.assert_close(layer.factors(ADAPTER).delta() / most, before / norm, rtol=1e-4, atol=1e-5)


def test_what_explodes_is_not_made_small_in_silence():
    layer = Task().networks["text"]["text"]
    for broken in (1e30, math.nan, math.inf):
        trained = [p.fill_(broken) for p in map(torch.Tensor.detach, layer.parameters())]
        clip_delta_norm_(layer, 1.0)
        assert all(torch.equal(p, torch.full_like(p, broken)) or p.isnan().all() for p in trained)


@pytest.mark.skipif(not installed("schedule-free"), reason="needs the extra schedule-free")
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_bound_holds_for_averages_too(ema):
    """An average of factors can be longer than each of them; what is saved is within the bound all the same."""
    config = TrainingConfig(steps=12, max_norm=0.02, ema_decay=ema)
    for name in ("adamw", "schedule-free"):
        trainer = Task().run(config, OptimizerConfig(name, lr=0.3))
        assert all(norm_of(f) <= 0.02 for layers in trainer.factors().values() for f in layers.values())


def test_save_every_and_preview_every(tmp_path):
    _, events = watch(TrainingConfig(steps=7, save_every=2, preview_every=3), folder=tmp_path)
    assert [e.step for e in events if isinstance(e, Saved)] == [2, 4, 6, 7]
    assert [e.step for e in events if isinstance(e, PreviewDue)] == [3, 6]
    _, events = watch(TrainingConfig(steps=3, save_every=0, preview_every=0), folder=tmp_path / "b")
    assert [e.step for e in events if not isinstance(e, Stepped)] == [3]
    assert all(e.path.is_file() for e in events if isinstance(e, Saved))
    _, events = watch(TrainingConfig(steps=3, save_every=1))  # nowhere
    assert all(isinstance(e, Stepped) for e in events)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("name", SOURCES)
def test_a_preview_shows_what_would_be_saved_and_leaves_no_trace(name, ema):
    if not installed(name):
        pytest.skip(f"needs the extra {SOURCES[name].extra}")
    optimizer = OptimizerConfig(name, lr=1.0 if name == "prodigy" else 0.02)
    task, shown = Task(config=DROPPING), []

    def look(event):
        if isinstance(event, PreviewDue):
            inside = trainer.factors()["model"]  # a preview within a preview
            for layer_name, layer in task.networks["model"].items():
                assert not layer.training
                assert all(
                    map(torch.equal, layer.factors(ADAPTER).tensors().values(), inside[layer_name].tensors().values())
                )
            shown.append(inside)

    trainer = task.trainer(TrainingConfig(steps=4, ema_decay=ema, preview_every=1), optimizer, callbacks=[look])
    with attached(task.layers):
        trainer.run()
    blind = Task(config=DROPPING).run(TrainingConfig(steps=4, ema_decay=ema), optimizer)
    assert equal(trainer, blind) and trainer.losses == blind.losses
    for layer_name, factors in trainer.factors()["model"].items():
        assert all(map(torch.equal, factors.tensors().values(), shown[-1][layer_name].tensors().values()))
    raw = next(iter(task.networks["model"].values())).factors(ADAPTER)
    assert torch.equal(raw.w1_a, next(iter(shown[-1].values())).w1_a) == (ema == 0 and name != "schedule-free")


def test_factors_are_copies():
    trainer = Task().run(TrainingConfig(steps=1))
    factors = trainer.factors()
    assert list(factors) == ["model", "text"] and list(factors["text"]) == ["text"]
    before = factors["text"]["text"].w1_a.clone()
    for p in trainer.parameters:
        p.data.add_(1)
    assert torch.equal(before, factors["text"]["text"].w1_a)


# --- learning rates and the objective reach the run --------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "restarts"])
def test_the_schedule_reaches_the_optimizer(schedule):
    optimizer = OptimizerConfig(lr=0.02, lr_text=0.01, schedule=schedule, warmup_steps=2, cycles=2, lr_end=0.1)
    found = []
    task = Task()
    trainer = task.trainer(
        TrainingConfig(steps=8), optimizer, callbacks=[lambda e: found.append([g["lr"] for g in groups])]
    )
    groups = trainer.optimizer.param_groups
    with attached(task.layers):
        trainer.run()
    factors = [optimizer.factor(step, 8) for step in range(8)]
    assert list(chain(*found)) == pytest.approx([rate * f for f in factors for rate in (0.02, 0.01)])
    _, events = watch(TrainingConfig(steps=8), optimizer)
    assert [e.lr for e in events] == pytest.approx([0.02 * f for f in factors])


def moved(optimizer: OptimizerConfig) -> dict[str, float]:
    """How far each network's factors get in one step of AdamW, whose first step is the learning rate."""
    task = Task()
    trained = {
        label: [p.detach() for m in layers.values() for p in m.parameters()] for label, layers in task.networks.items()
    }
    before = {label: [p.clone() for p in parameters] for label, parameters in trained.items()}
    task.run(TrainingConfig(steps=1), optimizer)
    return {
        label: max(float((p - b).abs().max()) for p, b in zip(trained[label], before[label], strict=True))
        for label in trained
    }


def test_each_network_moves_at_its_rate():
    assert moved(OptimizerConfig(lr=0.01)) == pytest.approx({"model": 0.01, "text": 0.01}, rel=0.01)
    assert moved(OptimizerConfig(lr=0.01, lr_text=0.002)) == pytest.approx({"model": 0.01, "text": 0.002}, rel=0.01)
    assert moved(OptimizerConfig(lr=0.01, lr_text=0.0)) == pytest.approx({"model": 0.01, "text": 0.0}, rel=0.01)
    assert moved(OptimizerConfig(lr=0.01, lora_plus=8.0)) == pytest.approx({"model": 0.08, "text": 0.08}, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": "logit-normal"},
        {"timesteps": "shifted"},
        {"loss_type": "huber"},
        {"loss_type": "l1"},
        {"min_snr_gamma": 1.0},
        {"debiased": True},
        {"noise_offset": 0.5},
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())),
)
def test_the_objective_reaches_the_run(changes):
    plain, other = (Task(objective=o).run(TrainingConfig(steps=2)) for o in (Objective(), Objective(**changes)))
    assert plain.losses != other.losses and not equal(plain, other)


# --- what is frozen ---------------------------------------------------------------------------------


class Frozen:
    """A model as it is; `same` says whether it still is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._look()

    def _look(self):
        modules = {n: (id(m), sorted(vars(m)), m.training) for n, m in self.model.named_modules()}
        parameters = {n: (id(p), p.requires_grad, p.grad is None) for n, p in self.model.named_parameters()}
        return modules, parameters, {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def same(self) -> bool:
        (modules, parameters, tensors), (*now, values) = self.before, self._look()
        return [modules, parameters] == now and all(torch.equal(values[n], t) for n, t in tensors.items())


def test_training_leaves_the_base_as_it_was():
    task = Task(config=DROPPING)
    task.model.blocks[0].train(False)
    frozen, training = Frozen(task.model), [layer.training for layer in task.layers]
    trainer = task.run(TrainingConfig(steps=3, ema_decay=0.9, max_norm=1, preview_every=1, mixed_precision="bf16"))
    assert frozen.same() and training == [layer.training for layer in task.layers]
    assert not equal(trainer, Task(config=DROPPING).trainer(TrainingConfig()))
    # A weight that asks for gradients is not trained either.
    task = Task()
    task.model.requires_grad_(True)
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    torch.testing.assert_close(values(task.run(TrainingConfig(steps=3))), values(Task().run(TrainingConfig(steps=3))))
    assert all(torch.equal(before[n], t) for n, t in task.model.state_dict().items())


@pytest.mark.parametrize("kind", [Stepped, PreviewDue, Saved])
def test_so_does_a_cancel(tmp_path, kind):
    task = Task()
    frozen, training = Frozen(task.model), [layer.training for layer in task.layers]

    def cancel(event):
        if isinstance(event, kind) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        task.run(
            TrainingConfig(steps=5, preview_every=2, save_every=2, ema_decay=0.5), folder=tmp_path, callbacks=[cancel]
        )
    assert frozen.same() and training == [layer.training for layer in task.layers]


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_so_does_an_error_amid_a_step(where):
    task, seen = Task(), []
    frozen = Frozen(task.model)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("backward")

    def batches(number: int):
        seen.append(number)
        return task.batch(number)

    def loss(batch):
        if where == "forward" and len(seen) == 3:
            raise ArithmeticError("forward")
        return Broken.apply(task.loss(batch)) if where == "backward" and len(seen) == 3 else task.loss(batch)

    def step():
        raise ArithmeticError("optimizer")

    events: list = []
    trainer = Trainer(task.networks, batches, loss, TrainingConfig(steps=5), callbacks=[events.append])
    if where == "optimizer":
        trainer.optimizer.step = step
    with attached(task.layers), pytest.raises(ArithmeticError, match=where) as caught:
        trainer.run()
    assert frozen.same()
    assert events[-1] == Stopped(trainer.step, caught.value) and trainer.step == (0 if where == "optimizer" else 2)


def test_layers_in_a_loha_model():
    torch.manual_seed(0)
    model = LoHaModel(Denoiser(), LoHaConfig(r=2, target_modules=["conv", "linear"], init_weights="lycoris")).eval()
    layers = {"model": dict(model.loha_layers())}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "hada_" not in n}
    task = Task()

    def loss(batch):
        noisy, caption, target, gain, snr = batch
        return task.objective.loss(model(noisy, caption), target, gain, snr)

    trainer = Trainer(layers, task.batch, loss, TrainingConfig(steps=10), OptimizerConfig(lr=0.02), init="lycoris")
    trainer.run()
    assert len(trainer.factors()["model"]) == 4
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert not any(m.training for m in model.modules())
    assert all(isinstance(layer, LoHaLayer) and layer.hada_w2_a[ADAPTER].any() for layer in layers["model"].values())


# --- what is refused --------------------------------------------------------------------------------


def test_a_loss_that_no_layer_has_a_part_in():
    task = Task()
    with pytest.raises(LoHaError, match="does not depend on any trained layer"):
        task.trainer(TrainingConfig(steps=1)).run()  # not attached


def test_a_batch_in_which_every_layer_is_dropped_is_no_error():
    task = Task(config=LoHaConfig(r=2, init_weights="lycoris", module_dropout=0.9))
    trainer = task.run(TrainingConfig(steps=12))
    assert trainer.step == 12 and not equal(trainer, task.__class__(config=task.config).trainer(TrainingConfig()))


def test_adapters_that_are_not_active():
    task = Task()
    for layer in task.layers:
        layer.set_adapter([])
    with pytest.raises(LoHaError, match="nothing to train"):
        task.trainer(TrainingConfig())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number from 1"),
        ({"steps": math.nan}, "steps is nan"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"preview_every": -1}, "preview_every is -1"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_decay": math.nan}, "ema_decay is nan"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; expected one of no, fp16, bf16"),
    ],
)
def test_values_out_of_range(settings, says):
    with pytest.raises(LoHaError, match=says):
        TrainingConfig(**settings)


# --- randomness outside -------------------------------------------------------------------------


class Device:
    """Stands in for what torch knows of a device's generators, on a machine that has no such device."""

    def __init__(self, monkeypatch, kind: str) -> None:
        self.seeds, where = [7, 8], getattr(torch, kind)
        each = "" if kind == "mps" else "_all"
        monkeypatch.setattr(torch.backends.mps if kind == "mps" else where, "is_available", lambda: True)
        monkeypatch.setattr(where, "_is_in_bad_fork", lambda: False)
        monkeypatch.setattr(where, f"manual_seed{each}", lambda seed: setattr(self, "seeds", [seed, seed]))
        monkeypatch.setattr(where, f"get_rng_state{each}", lambda: list(self.seeds))
        monkeypatch.setattr(where, f"set_rng_state{each}", lambda seeds: setattr(self, "seeds", seeds))


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_seeds_are_not_seen_outside_on_any_device(monkeypatch, kind):
    device, before = Device(monkeypatch, kind), torch.get_rng_state()
    with pytest.raises(KeyError), fork_rng():
        torch.manual_seed(3)
        torch.rand(2)
        assert device.seeds == [3, 3]
        raise KeyError
    assert device.seeds == [7, 8] and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_run_leaves_each_devices_randomness_as_it_was(monkeypatch, kind):
    task = Task(config=DROPPING)
    device, before = Device(monkeypatch, kind), torch.get_rng_state()
    task.run(TrainingConfig(steps=2))
    assert device.seeds == [7, 8] and torch.equal(torch.get_rng_state(), before)
