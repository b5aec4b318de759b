"""Training's nodes: each input does something, what is wrong is said early, and the whole in a real server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path

import aiohttp
import pytest
import torch
from safetensors import safe_open

from demo import comfyui, digits, prepare, train_loha, workflows
from demo.comfyui import ComfyUIError
from loha_core import LoHaError, load_adapter
from loha_core.training.data.dataset import Item

from . import training as t
from .training import page  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sd15():
    return t.models("sd15")


@pytest.fixture(scope="module")
def flux():
    """The quickest of the families, for what has to run."""
    return t.models("flux")


# --- LoHa Network -------------------------------------------------------------------------------


def built(m, text=False, **network):
    """Name -> layer that is trained, for a configuration."""
    config = t.node("graph.network").network_config(**{"rank": 4, "conv_rank": 2, **network})
    patcher, label = (m.clip.patcher, "CLIP") if text else (m.model, "MODEL")
    torch.manual_seed(0)
    return t.node("host.layers").build(patcher, label, config)


def ranks(layers, kernel):
    return {layer.r["default"] for layer in layers.values() if is_large(layer) == kernel}


def is_large(layer):
    return torch.Size(layer.weight_shape[2:]).numel() > 1


def test_ranks_and_alphas(sd15):
    layers = built(sd15, rank=4, alpha=2.0, conv_rank=3, conv_alpha=6.0)
    assert ranks(layers, False) == {4} and ranks(layers, True) == {3}
    assert {x.scaling["default"] for x in layers.values()} == {0.5, 2.0}
    assert {x.scaling["default"] for x in built(sd15, alpha=2.0, rank_stabilized=True, conv_rank=0).values()} == {1.0}
    assert not any(is_large(x) for x in built(sd15, conv_rank=0).values())


def test_which_layers(sd15):
    blocks, everything = built(sd15), built(sd15, preset="all")
    assert set(blocks) < set(everything)
    assert not any("time_emb" in name for name in blocks) and "lora_unet_time_embedding_linear_1" in everything
    attention, feed_forward = built(sd15, preset="attention"), built(sd15, preset="attention and feed-forward")
    assert set(attention) < set(feed_forward) < set(everything)
    assert all("attn" in name or "attention" in name for name in attention)
    only = built(sd15, layers=r"attn2\.to_[kv]$")
    assert only and all(re.search(r"attn2_to_[kv]$", name) for name in only)
    assert set(built(sd15, layers="attn2", exclude="to_q")) == {
        n for n in built(sd15, layers="attn2") if "to_q" not in n
    }


def test_patterns(sd15):
    layers = built(sd15, rank=4, conv_rank=2, patterns="to_q: 6\nattn2.to_k: 3, 9\nin_layers.2: 4, 1")
    for name, layer in layers.items():
        rank, alpha = layer.r["default"], layer.alpha["default"]
        if name.endswith("attn2_to_k"):
            assert (rank, alpha) == (3, 9.0)
        elif name.endswith("to_q"):
            assert (rank, alpha) == (6, 8.0)
        elif name.endswith("_conv1"):  # diffusers' name of in_layers.2; the pattern says what the others' rank is
            assert (rank, alpha) == (4, 1.0)
        else:
            assert (rank, alpha) == ((2, 8.0) if is_large(layer) else (4, 8.0))


@pytest.mark.parametrize(
    ("line", "rank", "alpha", "factor"),
    [
        ("img_attn.qkv: 6", 6, 8.0, 1.0),
        ("img_attn.qkv: 6, 3", 6, 3.0, 1.0),
        ("img_attn.qkv: rank 6, alpha 3, lr 0.5", 6, 3.0, 0.5),
        ("img_attn.qkv: lr 0.5", 4, 8.0, 0.5),
        (r"img_\w+\.qkv: alpha 2.5,lr 0", 4, 2.5, 0.0),
        ("img_attn.qkv: 6, lr 2", 6, 8.0, 2.0),
    ],
)
def test_a_pattern_s_rank_alpha_and_learning_rate(page, flux, monkeypatch, line, rank, alpha, factor):  # noqa: F811
    built_layers, groups = {}, []
    trainer = t.node("host.training").Trainer
    init = trainer.__init__

    def kept(self, networks, *args, **rest):
        init(self, networks, *args, **rest)
        built_layers.update(networks["model"])
        groups.extend(self.optimizer.param_groups)

    monkeypatch.setattr(trainer, "__init__", kept)
    t.train(flux, steps=1, network={"patterns": line}, optimizer={"learning_rate": 0.01}, name="pattern")
    rates = {id(p): group["base_lr"] for group in groups for p in group["params"]}
    matching = {name: layer for name, layer in built_layers.items() if name.endswith("img_attn_qkv")}
    assert 0 < len(matching) < len(built_layers)
    usual = next(rates[id(one.hada_w2_a["default"])] for name, one in built_layers.items() if name not in matching)
    for name, layer in built_layers.items():
        found = layer.r["default"], layer.alpha["default"], rates[id(layer.hada_w2_a["default"])] / usual
        assert found == ((rank, alpha, factor) if name in matching else (4, 8.0, 1.0))


def test_kinds_of_factors(sd15):
    plain, tucker = built(sd15), built(sd15, effective_conv=True)
    assert not any(len(x.hada_t1) for x in plain.values())
    assert all(bool(len(x.hada_t1)) == is_large(x) for x in tucker.values())
    for dora, axis in (("output", 0), ("input", 1)):
        for layer in built(sd15, dora=dora).values():
            assert layer.dora_scale["default"].numel() == layer.weight_shape[axis]
    assert not any(len(x.dora_scale) or len(x.scalar) for x in plain.values())
    assert all(not x.scalar["default"].any() for x in built(sd15, scalar=True).values())
    zero = lambda layers: {p for p in ("w1_a", "w1_b", "w2_a", "w2_b")  # noqa: E731
                           if not any(getattr(x, f"hada_{p}")["default"].any() for x in layers.values())}  # fmt: skip
    assert zero(built(sd15, init="lycoris")) != zero(built(sd15, init="peft"))


def test_what_the_node_says_is_what_is_trained(sd15, flux):
    for m in (sd15, flux):
        for network in (
            {},
            {"effective_conv": True, "dora": "output"},
            {"layers": "attn", "scalar": True, "dora": "input"},
        ):
            config = t.node("graph.network").network_config(**{"rank": 4, **network})
            text = t.node("host.layers").count(config, m.model, m.clip)
            for line in text.splitlines():
                layers = built(m, text=line.startswith("CLIP"), **{"conv_rank": 8, **network})
                count = sum(p.numel() for x in layers.values() for p in x.parameters_of("default"))
                assert f"{len(layers)} layers" in line and f"{count / 1e6:.2f} M parameters" in line


@pytest.mark.parametrize("knob", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}, {"alpha": 2.0}, {"init": "peft"},
                                  {"scalar": True}, {"dora": "output"}, {"dora": "input"}])  # fmt: skip
def test_knobs_that_act_in_the_run(page, flux, knob):  # noqa: F811
    plain = t.train(flux, name="plain")
    other = t.train(flux, network=knob, name="other")
    assert t.moved(other) > 0 and t.distance(other, plain) > 0.01
    assert all((f.dora_scale is not None) == ("dora" in knob) for f in other.layers.values())


def test_the_node_counts_for_what_is_connected(sd15):
    node = t.node("graph.network").LoHaNetwork
    lines = lambda **connected: node.execute(**connected).args[1].splitlines()  # noqa: E731
    assert [line[:5] for line in lines(model=sd15.model, clip=sd15.clip)] == ["MODEL", "CLIP:"]
    assert lines(model=sd15.model) + lines(clip=sd15.clip) == lines(model=sd15.model, clip=sd15.clip)
    assert "connect a model" in lines()[0]


# --- LoHa Optimizer -----------------------------------------------------------------------------


FALLING = {"schedule": "linear", "learning_rate": 0.01}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        (FALLING, [1, 0.75, 0.5, 0.25]),
        (FALLING | {"end_factor": 0.6}, [1, 0.9, 0.8, 0.7]),
        (FALLING | {"warmup_steps": 2}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"schedule": "cosine"}, [1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "restarts", "cycles": 2}, [1, 0.5, 1, 0.5]),
    ],
)
def test_learning_rates_of_a_run(page, flux, settings, rates):  # noqa: F811
    t.train(flux, steps=4, optimizer=settings)
    [run] = t.node("page.monitor").runs.values()
    # Balanced factors, the default, learn three times as fast as the optimizer says.
    assert run.rates == pytest.approx([3 * 0.01 * rate for rate in rates], rel=1e-5)


@pytest.mark.parametrize("setting", [{"name": "adafactor"}, {"learning_rate": 0.02}, {"weight_decay": 10.0},
                                     {"lora_plus": 4.0}, {"max_grad_norm": 1e-3}, {"ema_decay": 0.9},
                                     {"max_norm": 1e-4}, {"options": '{"eps": 1.0}'}])  # fmt: skip
def test_each_optimizer_setting_acts(page, flux, setting):  # noqa: F811
    # Adam itself evens out the gradients' size, unless its epsilon is large against them.
    common = {"max_grad_norm": 0.0, "options": '{"eps": 0.01}'} if "name" not in setting else {"options": ""}
    plain = t.train(flux, optimizer=common, name="plain")
    other = t.train(flux, optimizer=common | setting, name="other")
    assert t.distance(other, plain) > 0.01
    if "max_norm" in setting:
        assert max(float(f.norm()) for f in other.layers.values()) <= 1e-4


def test_text_encoders_have_a_learning_rate_of_their_own(page, sd15):  # noqa: F811
    def moved(rate):
        adapter = t.train(sd15, text=True, optimizer={"text_learning_rate": rate}, name=f"text {rate}")
        return sum(float(f.norm()) for n, f in adapter.layers.items() if n.startswith("lora_te"))

    assert moved(1e-6) < 0.01 * moved(1e-2)


# --- LoHa Objective -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plain", "setting"),
    [
        ({}, {"timesteps": "logit-normal"}),
        ({"timesteps": "logit-normal"}, {"logit_mean": 1.0}),
        ({"timesteps": "logit-normal"}, {"logit_std": 0.3}),
        ({}, {"timesteps": "shifted"}),
        ({"timesteps": "shifted"}, {"shift": 1.5}),
        ({}, {"loss_type": "l1"}),
        ({}, {"loss_type": "huber"}),
        ({"loss_type": "huber"}, {"huber_delta": 1.0}),
        ({}, {"min_snr_gamma": 5.0}),
        ({}, {"debiased": True}),
        ({}, {"noise_offset": 0.3}),
        ({}, {"timesteps": "heavy-tail"}),
        ({"timesteps": "heavy-tail"}, {"mode_scale": -0.5}),
        ({}, {"timesteps": "beta"}),
        ({"timesteps": "beta"}, {"beta_a": 0.5}),
        ({"timesteps": "beta"}, {"beta_b": 0.5}),
        ({}, {"min_timestep": 0.5}),
        ({}, {"max_timestep": 0.5}),
        ({}, {"resolution_shift": True}),
    ],
)
def test_each_objective_setting_acts(page, flux, plain, setting):  # noqa: F811
    jobs = [t.job(flux, steps=1, objective=objective) for objective in (plain, plain | setting)]
    for job in jobs:
        job.run()
    assert jobs[0].losses != jobs[1].losses


# --- Train LoHa ---------------------------------------------------------------------------------


def test_the_node(page, flux, tmp_path, monkeypatch):  # noqa: F811
    """What it puts out: the adapter, the model with it, and the losses."""
    monkeypatch.setattr("folder_paths.temp_directory", str(tmp_path))
    job = t.job(flux, name="node", gradient_checkpointing=True)
    with torch.inference_mode():
        adapter, model, clip, losses, curve = (
            t.node("graph.trainer").LoHaTrainer.execute(name="node", resume=False, **job.values).args
        )
    assert clip is None and len(losses["loss"]) == 3 and curve.shape[-1] == 3
    assert t.distance(adapter, t.train(flux, name="kept", gradient_checkpointing=False)) < 0.01
    assert not t.same(adapter, t.train(flux, name="other data", dataset=t.data(flux, size=6)))
    applied = t.node("host.modes").apply(flux.model, None, adapter, 1.0, 1.0)[0]
    assert model.patches.keys() == applied.patches.keys() and len(model.get_injections("loha") or ()) == len(
        applied.get_injections("loha") or ()
    )


class Recorder:
    """A VAE that keeps the latents that it is given."""

    def __init__(self):
        self.latents = []

    def decode(self, latent):
        self.latents.append(latent.clone())
        return torch.zeros(1, 8, 8, 3)


@pytest.mark.parametrize("setting", [{"preview_cfg": 7.0}, {"preview_steps": 3}, {"preview_prompt": ""}])
def test_each_preview_setting_acts(page, flux, setting):  # noqa: F811
    plain, other = Recorder(), Recorder()
    previews = {"preview_every": 2, "preview_prompt": "a house", "preview_steps": 2, "preview_cfg": 1.0}
    t.train(flux, **previews, vae=plain, name="plain")
    t.train(flux, **previews | setting, vae=other, name="other")
    assert len(plain.latents) == len(other.latents) == 1
    assert not torch.allclose(plain.latents[0], other.latents[0], atol=1e-3)


def test_the_seed_is_of_everything(page, flux):  # noqa: F811
    torch.manual_seed(1)
    one = t.train(flux, training_seed=3, network={"rank_dropout": 0.3}, name="one")
    torch.manual_seed(2)
    state = torch.get_rng_state()
    two = t.train(flux, training_seed=3, network={"rank_dropout": 0.3}, name="two")
    assert torch.equal(torch.get_rng_state(), state)
    assert t.same(one, two)
    assert not t.same(one, t.train(flux, training_seed=4, network={"rank_dropout": 0.3}, name="three"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(page, flux, precision):  # noqa: F811
    exact, other = t.train(flux, name="fp32"), t.train(flux, mixed_precision=precision, name=precision)
    assert 0 < t.distance(other, exact) < 0.5
    assert all(x.dtype == torch.float32 for f in other.layers.values() for x in f.tensors().values())


def test_how_long_and_how_much_at_once(page, flux):  # noqa: F811
    data = t.data(flux, 4)

    def losses(**values):
        job = t.job(flux, data, name=f"{values}"[1:-1].replace("'", "").replace(":", "").replace(",", ""), **values)
        job.run()
        return job.losses

    assert len(losses(steps=2)) == 2
    assert len(losses(epochs=2, batch_size=2)) == 4 and len(losses(epochs=1, batch_size=1)) == 4
    assert len(losses(epochs=1, batch_size=1, gradient_accumulation_steps=2)) == 2
    singly = losses(steps=1, batch_size=1, gradient_accumulation_steps=1)
    both = losses(steps=1, batch_size=1, gradient_accumulation_steps=2)
    d = t.diffusion(flux, data, batch_size=1)
    with torch.no_grad():
        expected = [float(d.loss(d.batch(i))) for i in range(2)]
    assert singly[0] == pytest.approx(expected[0], rel=1e-5)
    assert both[0] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_files_events_and_the_curve(page, flux, tmp_path):  # noqa: F811
    adapter = t.train(flux, steps=5, save_every=2, name="files")
    folder = tmp_path / "loha" / "files"
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [
        "files.safetensors", "state.safetensors", "step_000002.safetensors", "step_000004.safetensors"
    ]  # fmt: skip
    assert t.same(load_adapter(folder / "files.safetensors"), adapter)
    assert not t.same(load_adapter(folder / "step_000002.safetensors"), adapter)
    assert len((folder / "loss.csv").read_text().splitlines()) == 6
    assert {event for event, _ in page} == {"loha.training"}
    assert page[-1][1]["state"] == "done" and page[-1][1]["step"] == page[-1][1]["steps"] == 5
    assert adapter.metadata["ss_steps"] == "5" and adapter.metadata["ss_network_module"] == "lycoris.kohya"


def test_a_new_run_gets_a_new_folder_and_resume_the_latest(page, flux, tmp_path):  # noqa: F811
    first = t.train(flux, name="mine")
    t.train(flux, name="mine", training_seed=5)
    assert sorted(p.name for p in (tmp_path / "loha").iterdir()) == ["mine", "mine-2"]
    longer = t.job(flux, name="mine", training_seed=5, resume=True, steps=5)
    longer.run()
    assert longer.folder.name == "mine-2" and len(longer.losses) == 5
    assert t.same(load_adapter(tmp_path / "loha" / "mine" / "mine.safetensors"), first)
    with pytest.raises(LoHaError, match="other settings.*batch size"):
        t.train(flux, name="mine", training_seed=5, resume=True, batch_size=1)
    other = t.models("flux")
    next(p for p in other.model.model.diffusion_model.parameters() if p.dim() == 1).data.add_(0.1)
    with pytest.raises(LoHaError, match="other settings: base model"):
        t.train(other, name="mine", training_seed=5, resume=True)
    assert t.same(t.train(t.models("flux"), name="mine", training_seed=5, resume=True), longer.run())


def test_starting_from_a_loha(page, flux):  # noqa: F811
    first = t.train(flux, steps=6, name="first")
    before = t.moved(first)
    small = {"optimizer": {"learning_rate": 1e-6}}
    second = t.train(flux, loha=first, steps=1, name="second", **small)
    assert t.moved(first) == before
    assert 0 < t.distance(second, first) < 1e-3
    assert t.held_out(flux, second) == pytest.approx(t.held_out(flux, first), rel=1e-3)


def test_a_loha_to_start_from_must_fit(page, sd15, flux):  # noqa: F811
    first = t.train(flux, steps=1, name="first")
    with pytest.raises(LoHaError, match="nothing in .*fits|none of its"):
        t.train(sd15, loha=first, name="other model")
    with pytest.raises(LoHaError, match="leaves out"):
        t.train(flux, loha=first, network={"layers": "single_blocks"}, name="fewer layers")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\\b", "../x", "x\0y", ".hidden", "ends.", "n" * 101])
def test_names_are_no_paths(page, flux, name):  # noqa: F811
    with pytest.raises(LoHaError, match="letters, digits"):
        t.job(flux, name=name)


# --- what is wrong is said before any work --------------------------------------------------------


def other_channels(m):
    return t.dataset(m, [Item(torch.randn(4, 8, 8), conditioning=t.conditioning())])


WRONG = {
    "latents of another model": (lambda m: t.train(m, other_channels(m)), "have 4 channels; this model's have 16"),
    "no such layer": (lambda m: t.train(m, network={"layers": "img_atn"}), "img_attn"),
    "an expression that is none": (lambda m: t.train(m, network={"layers": "(attn"}), "is not a regular expression"),
    "a pattern that is none": (
        lambda m: t.train(m, network={"patterns": "attn"}),
        "expected 'pattern: rank 16, alpha 8, lr 0.5'",
    ),
    "a pattern of no number": (lambda m: t.train(m, network={"patterns": "qkv: rank many"}), "'qkv: rank many'"),
    "a pattern of an unknown value": (lambda m: t.train(m, network={"patterns": "qkv: width 3"}), "'qkv: width 3'"),
    "a pattern that matches nothing": (lambda m: t.train(m, network={"patterns": "attn9: lr 2"}), "'attn9' matches no"),
    "a rank's that matches nothing": (lambda m: t.train(m, network={"patterns": "attn9: 4"}), "'attn9' matches no"),
    "preservation without masks": (
        lambda m: t.train(m, objective={"masked_preservation": 1.0}),
        "no picture has a mask",
    ),
    "an explosion": (lambda m: t.train(m, steps=9, optimizer={"learning_rate": 1e30}), "Lower the learning rate"),
    "a preview without a VAE": (lambda m: t.train(m, preview_every=1), "needs the vae input"),
    "options that are no JSON": (lambda m: t.train(m, optimizer={"options": "betas"}), "expected JSON"),
    "options that it does not have": (lambda m: t.train(m, optimizer={"options": '{"beta": 1}'}), "these options"),
    "two weightings": (lambda m: t.train(m, objective={"debiased": True, "min_snr_gamma": 5.0}), "choose one"),
    "no steps": (lambda m: t.train(m, steps=0), "steps is 0"),
    "no batch": (lambda m: t.train(m, batch_size=0), "batch_size is 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_input_is_said_and_leaves_no_trace(page, flux, wrong):  # noqa: F811
    run, message = WRONG[wrong]
    with t.untouched(flux), pytest.raises(LoHaError, match=re.escape(message)):
        run(flux)


def test_an_optimizer_that_is_not_installed(page, flux, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", None)
    with t.untouched(flux), pytest.raises(LoHaError, match=r"pip install 'comfyui-loha\[lion\]'"):
        t.train(flux, optimizer={"name": "lion"})


def test_an_explosion_keeps_the_last_good_state(page, flux, tmp_path):  # noqa: F811
    with pytest.raises(LoHaError, match="Lower the learning rate"):
        t.train(flux, steps=9, save_every=1, optimizer={"learning_rate": 1e30}, name="exploding")
    for path in (tmp_path / "loha" / "exploding").glob("step_*.safetensors"):
        assert all(torch.isfinite(x).all() for f in load_adapter(path).layers.values() for x in f.tensors().values())


# --- Save LoHa ------------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "loras").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    return lambda *a, **k: tmp_path / "loras" / t.node("graph.save").LoHaSave.execute(*a, **k).result[0]


def test_saving(page, flux, save):  # noqa: F811
    one, two = t.train(flux, steps=1, name="one"), t.train(flux, steps=2, name="two")
    lycoris = "LyCORIS (one file)"
    first = save(one, "a", lycoris, "fp32", trigger_words="sks", metadata='{"modelspec.author": "me", "n": 1}')
    assert save(two, "a.safetensors", lycoris, "fp32").name == "a_2.safetensors"
    assert t.same(load_adapter(first), one)
    assert (
        load_adapter(first).metadata.items()
        >= {"modelspec.trigger_phrase": "sks", "modelspec.author": "me", "n": "1"}.items()
    )
    assert save(two, "a", lycoris, "fp32", overwrite=True) == first and t.same(load_adapter(first), two)
    for dtype, kind in (("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32"), ("as it is", "F32")):
        with safe_open(save(one, f"deep/{dtype}", lycoris, dtype), "pt") as file:
            assert {file.get_slice(k).get_dtype() for k in file.keys() if "hada" in k} == {kind}
    folder = save(one, "peft", "PEFT (a folder)", "fp32")
    read = t.node("host.modes").apply(flux.model, None, load_adapter(folder), 1.0, 1.0)[2]
    assert folder.is_dir() and not read.unmatched and len(read.matched["MODEL"]) == len(one.layers)
    assert t.moved(load_adapter(folder)) == pytest.approx(t.moved(one), rel=1e-5)
    assert save(one, "peft", "PEFT (a folder)", "fp32").name == "peft_2"


@pytest.mark.parametrize(
    "name", ["", " ", "../x", "a/../../x", "..", "/etc/x", "\\x", "C:\\x", "a\0b", "a*b", "link/x"]
)
def test_saving_nowhere_else(page, flux, save, tmp_path, name):  # noqa: F811
    (tmp_path / "outside").mkdir()
    (tmp_path / "loras" / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    with pytest.raises(LoHaError, match="filename is"):
        save(t.train(flux, steps=1), name, "LyCORIS (one file)", "fp32")
    assert [p.name for p in (tmp_path / "loras").iterdir()] == ["link"] and not any((tmp_path / "outside").iterdir())


def test_metadata_that_is_no_json(page, flux, save):  # noqa: F811
    with pytest.raises(LoHaError, match="expected JSON"):
        save(t.train(flux, steps=1), "x", "LyCORIS (one file)", "fp32", metadata="author: me")


# --- the real server ------------------------------------------------------------------------------

NODES = ("LoHaNetwork", "LoHaOptimizer", "LoHaObjective", "LoHaTrainer", "LoHaSave", "LoHaDataset")


@pytest.mark.parametrize("node", NODES)
def test_nodes_have_tooltips_and_help(server, node):
    description = server.object_info(node)
    assert description["category"] in ("LoHa", "LoHa/train") and description["description"]
    text = (REPOSITORY / "web" / "docs" / f"{node}.md").read_text()
    for section in ("required", "optional"):
        for name, spec in description["input"].get(section, {}).items():
            assert spec[1].get("tooltip"), f"{node}.{name}"
            assert f"**{name}**" in text, name
    assert all(description["output_tooltips"])
    assert server.get_bytes(f"/extensions/ComfyUI-LoHa/docs/{node}.md").startswith(b"# ")


@pytest.fixture(scope="module")
def workflow(server):
    """The training workflow in API format, on few pictures: node class -> the inputs to change; and the whole."""
    prepare.write_files(server)
    for name in (train_loha.folder(digits.TARGET), train_loha.KNOWN_FOLDER):
        for path in sorted(server.path("input", name, "").iterdir())[8:]:
            path.unlink()
    prompt = comfyui.to_api(workflows.filled(workflows.TRAIN), server.object_info())

    def make(**changes):
        job = json.loads(json.dumps(prompt))
        for node in job.values():
            node["inputs"] |= changes.get(node["class_type"], {})
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = 2
        return job

    return make


def outputs(job, entry, kind):
    [number] = [number for number, node in job.items() if node["class_type"] == kind]
    return entry["outputs"][number]


async def watched(server, job, at_step=None):
    """Queue a workflow and listen at the websocket; POST /interrupt once training has come to a step."""
    events = []
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.address}/ws?clientId=loha") as socket:
        async with session.post(f"{server.address}/prompt", json={"prompt": job, "client_id": "loha"}) as answer:
            prompt_id = (await answer.json())["prompt_id"]
        async for message in socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            if kind == "loha.training":
                events.append((time.monotonic(), data))
                if at_step is not None and data["step"] >= at_step and data["state"] == "running":
                    async with session.post(f"{server.address}/interrupt", json={}):
                        at_step = None
                    events.append((time.monotonic(), {"state": "asked"}))
            if kind in ("execution_success", "execution_error", "execution_interrupted"):
                return prompt_id, kind, events
    raise AssertionError("the websocket closed")


def test_the_workflow_trains_shows_and_saves(server, workflow):
    settings = {"steps": 4, "batch_size": 4, "save_every": 2, "name": "short", "resume": False}
    preview = {"preview_every": 2, "preview_steps": 2, "preview_prompt": "a handwritten seven", "vae": ["1", 2]}
    job = workflow(LoHaTrainer=settings | preview, LoHaSave={"filename": "short"})
    [trainer] = [number for number, node in job.items() if node["class_type"] == "LoHaTrainer"]
    job["curve"] = {"class_type": "PreviewImage", "inputs": {"images": [trainer, 4]}}
    prompt_id, how, events = asyncio.run(watched(server, job))
    assert how == "execution_success"
    while not (entry := server.get(f"/history/{prompt_id}").get(prompt_id)):  # written after the event
        time.sleep(0.05)
    curve = server.images({"outputs": {"": entry["outputs"]["curve"]}})
    assert curve.shape[1] > 100 and curve.std() > 10
    assert outputs(job, entry, "LoHaSave")["text"] == ["saved as short.safetensors"]
    assert re.search(r"MODEL: \d+ layers", outputs(job, entry, "LoHaNetwork")["text"][0])
    assert events[-1][1]["state"] == "done"
    assert events[-1][1]["previews"] == [[step, [f"preview_{step:06d}.png"]] for step in (2, 4)]
    assert {d["node"] for _, d in events} == {number for number, n in job.items() if n["class_type"] == "LoHaTrainer"}
    node, run = events[-1][1]["node"], events[-1][1]["id"]
    [whole] = server.get(f"/loha/training?workflow=any&node={node}")["runs"]
    [rest] = server.get(f"/loha/training?node={node}&run={run}&since=3")["runs"]
    assert len(whole["losses"]) == 4 and whole["id"] == run and rest["losses"] == whole["losses"][3:]
    folder = server.path("output", "loha", "short", "x").parent
    assert {p.name for p in folder.iterdir()} >= {
        "preview_000002.png", "preview_000004.png", "short.safetensors", "step_000002.safetensors", "loss.csv"
    }  # fmt: skip
    saved = load_adapter(server.path("models", "loras", "short.safetensors"))
    assert saved.layers and saved.metadata["modelspec.trigger_phrase"] == "a handwritten seven"


def test_cancel_ends_within_a_step_and_resuming_finishes(server, workflow):
    def job():
        run = {"steps": 12, "batch_size": 4, "save_every": 0, "name": "cancelled", "resume": True}
        return workflow(LoHaTrainer=run, LoHaSave={"filename": "cancelled", "overwrite": True})

    _, how, events = asyncio.run(watched(server, job(), at_step=2))
    assert how == "execution_interrupted"
    [asked] = [at for at, data in events if data["state"] == "asked"]
    running = [data["step"] for at, data in events if data["state"] == "running" and at < asked]
    [(ended, last)] = [(at, data) for at, data in events if data["state"] == "cancelled"]
    assert last["step"] <= running[-1] + 2  # events come four times a second, so one step may have gone unseen
    assert ended - asked < 60  # seconds, should the steps be slow
    state = server.path("output", "loha", "cancelled", "state.safetensors")
    assert state.is_file() and not server.path("output", "loha", "cancelled", "cancelled.safetensors").exists()
    _, how, events = asyncio.run(watched(server, job()))
    assert how == "execution_success"
    assert events[0][1]["step"] > last["step"] and events[-1][1]["step"] == 12
    assert len((state.parent / "loss.csv").read_text().splitlines()) == 13
    assert load_adapter(server.path("models", "loras", "cancelled.safetensors")).layers


def test_the_server_says_what_is_wrong_and_goes_on(server, workflow):
    def refused(**changes):
        """What ComfyUI says of a node before a run; it runs the others."""
        answer = server.post("/prompt", {"prompt": workflow(**changes)})
        while answer["prompt_id"] not in server.get(f"/history/{answer['prompt_id']}"):
            time.sleep(0.05)
        return {error["class_type"]: json.dumps(error["errors"]) for error in answer["node_errors"].values()}

    assert "letters, digits" in refused(LoHaTrainer={"name": "../out", "steps": 1})["LoHaTrainer"]
    with pytest.raises(ComfyUIError, match=r"LoHaNetwork.*no layer's name contains 'atn2'.*attn2"):
        server.queue(workflow(LoHaNetwork={"layers": "atn2"}))
    run = {"steps": 1, "batch_size": 1, "name": "tiny"}
    assert "filename is" in refused(LoHaTrainer=run, LoHaSave={"filename": "../tiny"})["LoHaSave"]
