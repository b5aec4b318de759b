"""Training inside ComfyUI: every model family, its own objective, and a base model that does not notice."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from safetensors.torch import load_file
from torch import nn

from loha_core import LoHaError, load_adapter
from loha_core.naming.names import flat

from . import training as t
from .test_patching import loaded
from .training import page  # noqa: F401

pytestmark = pytest.mark.usefixtures("page")


@pytest.fixture(scope="module", params=t.FAMILIES)
def family(request):
    return t.models(request.param)


@pytest.fixture(scope="module")
def sd15():
    return t.models("sd15")


@pytest.fixture
def loras(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    return folder


# --- every family -------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_the_base_does_not_notice(family):
    before = t.held_out(family)
    with t.untouched(family):
        adapter = t.train(family, steps=8)
    assert len(adapter.layers) > 10
    assert t.held_out(family, adapter) < 0.97 * before


def test_what_is_saved_does_the_same_in_the_native_loader(family, loras):
    """Ours by name and by file; the native one's where nothing is DoRA."""
    adapter = t.train(family, text=family.clip is not None, steps=2)
    save = t.node("graph.save").LoHaSave
    [name] = save.execute(adapter, "some/new", "LyCORIS (one file)", "fp32").result
    read = load_adapter(loras / name)
    clip = family.clip
    native, native_clip = comfy.sd.load_lora_for_models(family.model, clip, load_file(loras / name), 0.8, 0.6)
    patched = []
    for model, text in [
        (native, native_clip),
        *(t.node("host.modes").apply(family.model, clip, a, 0.8, 0.6, mode="merge")[:2] for a in (read, adapter)),
    ]:
        with loaded(*([model] if text is None else [model, text.patcher])):
            patched.append(family.weights())
    base = family.weights()
    theirs, mine, direct = patched
    changed = [place for place in base if not torch.equal(base[place], mine[place])]
    # What comes after the layer that SDXL and SD2 take the text from learns nothing.
    assert len(changed) == sum(float(f.norm()) > 0 for f in adapter.layers.values()) > 0.9 * len(adapter.layers)
    for place in base:
        assert torch.equal(mine[place], direct[place]), place
        update = (mine[place] - base[place]).norm()
        assert (mine[place] - theirs[place]).norm() <= 1e-4 * update, place


def test_recomputing_blocks_gives_the_same(family):
    """Gradient checkpointing: each block runs twice, and nothing else differs."""
    adapters, calls = [], []
    for again in (False, True):
        counted = []
        blocks = t.node("host.training").inner_blocks(family.model.model.diffusion_model)
        kind = next(
            type(b).__name__ for b in blocks if "Transformer" in type(b).__name__ or "Block" in type(b).__name__
        )
        part = next(p for b in blocks if type(b).__name__ == kind for p in b.modules() if not list(p.children()))
        hook = part.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        adapters.append(t.train(family, steps=2, gradient_checkpointing=again, name=f"again {again}"))
        hook.remove()
        calls.append(len(counted))
    assert calls[1] == 2 * calls[0] > 0
    # Sums in another order, and Adam's first steps make much of little.
    assert t.distance(*adapters) < 0.01


def test_an_attention_without_a_backward_is_for_sampling_only(family):
    """Sage's and int8's kernels cut the gradient off from queries, keys and what comes before."""
    inference_only, asked = family.model.clone(), []

    def cut(attention, *args, **kwargs):
        asked.append(1)
        return attention(*args, **kwargs).detach()

    inference_only.model_options["transformer_options"]["optimized_attention_override"] = cut
    adapters = [t.train(family, steps=2, model=model, name="run") for model in (inference_only, family.model)]
    assert not asked and t.same(*adapters)


def test_gradients_are_those_of_the_loss(family):
    """Against the difference quotient: a model that changes its activations in place is easily wrong here."""
    job = t.job(family, steps=1)
    layers = t.node("host.layers").build(family.model, "MODEL", job.values["network"])
    d = t.diffusion(family)
    batch = d.batch(0)
    factors = [p for layer in layers.values() for p in layer.parameters_of("default")]
    torch.manual_seed(0)
    for p in factors:
        p.data.normal_(0, 0.3)
    blocks = t.node("host.training").inner_blocks(family.model.model.diffusion_model)
    with network_acts(layers), t.node("host.autograd").in_place_allowed(blocks, recomputed=False):
        d.loss(batch).backward()
        gradients = [p.grad for p in factors]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        step = 2e-3
        losses = []
        for sign in (1, -1):
            for p, g in zip(factors, gradients, strict=True):
                p.data.add_(g / norm, alpha=sign * step if sign == 1 else -2 * step)
            losses.append(float(d.loss(batch).detach()))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(norm), rel=0.02)


def network_acts(layers):
    from loha_core.training.attach import attached

    return attached(layers.values())


# --- the objective ------------------------------------------------------------------------------


def by_hand(family, d, batch, gamma=0.0):
    """The loss in float64 from what the diffusion model puts out, by the papers' formulas."""
    outputs = []
    hook = family.model.model.diffusion_model.register_forward_hook(lambda m, i, o: outputs.append(o.double()))
    with torch.no_grad():
        found = float(d.loss(batch))
    hook.remove()
    output = torch.cat(outputs)
    clean, noisy, sigma = batch.clean.double(), batch.noisy.double(), batch.sigma.double().view(-1, 1, 1, 1)
    if family.family in ("sd3", "flux"):
        noise = (noisy - (1 - sigma) * clean) / sigma
        target, snr, gain = noise - clean, ((1 - sigma) / sigma) ** 2, sigma
    else:
        noise, snr = (noisy - clean) / sigma, 1 / sigma**2
        if family.family == "sd2v":
            alpha, share = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
            target, gain = alpha * noise - share * clean, share
        else:
            target, gain = noise, sigma
    assert 0.8 < float(noise.std()) < 1.2
    weight = snr.clamp(max=gamma) * gain**2 if gamma else torch.ones_like(snr)
    errors = (weight * (output - target) ** 2).flatten(1).mean(1) * batch.sample_weight.double()
    return found, float(errors.mean())


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_textbooks(family, gamma):
    d = t.diffusion(family, t.data(family, 4), batch_size=4, min_snr_gamma=gamma)
    for number in range(3):
        found, wanted = by_hand(family, d, d.batch(number), gamma)
        assert found == pytest.approx(wanted, rel=2e-4)


def test_batches_follow_from_their_number(family):
    d, other = t.diffusion(family), t.diffusion(family)
    first = d.batch(7)
    d.batch(3)
    again, elsewhere, next_one = d.batch(7), other.batch(7), t.diffusion(family, seed=1).batch(7)
    for field in ("clean", "noisy", "sigma"):
        assert torch.equal(getattr(first, field), getattr(again, field))
        assert torch.equal(getattr(first, field), getattr(elsewhere, field))
    assert not torch.equal(first.noisy, next_one.noisy) and not torch.equal(first.noisy, d.batch(8).noisy)


def single(batch, i):
    part = slice(i, i + 1)
    tensors = {name: getattr(batch, name)[part] for name in ("clean", "noisy", "sigma", "sample_weight")}
    return replace(batch, samples=batch.samples[part], mask=None if batch.mask is None else batch.mask[part], **tensors)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_each_sample_has_its_own_conditioning_of_any_length(name):
    """The batch's loss is the mean of its samples', each alone; an averaged conditioning would give another."""
    m = t.models(name)
    if m.clip is None:
        given = [{"conditioning": t.conditioning(tokens, seed=tokens)} for tokens in (16, 24)]
    else:
        given = [{"caption": "a cat"}, {"caption": ", ".join(["a very long story of a house"] * 14)}]
        lengths = [m.clip.encode_from_tokens(m.clip.tokenize(g["caption"])).shape[1] for g in given]
        assert lengths == [77, 154]
    channels = m.model.model.latent_format.latent_channels
    items = [t.Item(torch.randn(channels, 8, 8), **g) for g in given]
    d = t.diffusion(m, t.dataset(m, items))
    batch = d.batch(0)
    with torch.no_grad():
        together = d.loss(batch)
        alone = torch.stack([d.loss(single(batch, i)) for i in range(2)])
        swapped = [replace(a, conditioning=b.conditioning, caption=b.caption) for a, b in
                   zip(batch.samples, batch.samples[::-1], strict=True)]  # fmt: skip
        other = torch.stack([d.loss(single(replace(batch, samples=swapped), i)) for i in range(2)])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=1e-6)
    assert (other - alone).abs().min() > 1e-4 * alone.abs().max()


def test_masks_and_weights_count(sd15):
    """What is masked away has no part in the loss, nor has an item of weight 0."""
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    d = t.diffusion(sd15, t.data(sd15, mask=mask))
    batch = d.batch(0)
    with torch.no_grad():
        masked = d.loss(batch)
        left, right = batch.clean.clone(), batch.clean.clone()
        left[..., :4] += 1  # another target there
        right[..., 4:] += 1
        assert d.loss(replace(batch, clean=left)) != masked
        torch.testing.assert_close(d.loss(replace(batch, clean=right)), masked)
        light = t.diffusion(sd15, t.data(sd15, weight=0.25))
        plain = t.diffusion(sd15)
        torch.testing.assert_close(light.loss(light.batch(0)), 0.25 * plain.loss(plain.batch(0)))


# --- Cancel, errors, how weights are kept -------------------------------------------------------


class Acting(t.Dataset):
    """Does something when the n-th sample is drawn."""

    def at(self, number, action):
        self.number, self.action, self.drawn = number, action, 0
        return self

    def draw(self, index, generator):
        self.drawn += 1
        if self.drawn == self.number:
            self.action()
        return super().draw(index, generator)


def acting(m, number, action):
    plain = t.data(m)
    return Acting(plain.items, plain.captions, plain._encode).at(number, action)


def test_cancel_keeps_the_state_and_resuming_ends_as_if_nothing_had_been(family, tmp_path):
    whole = t.train(family, steps=3, name="whole")
    cancelling = acting(family, 4, comfy.model_management.interrupt_current_processing)  # amid the second step
    with t.untouched(family), pytest.raises(InterruptProcessingException):
        t.train(family, cancelling, steps=3, name="cut")
    [kept] = (tmp_path / "loha" / "cut").glob("step_*.safetensors")
    assert kept.stem in ("step_000001", "step_000002")
    job = t.job(family, steps=3, name="cut", resume=True)
    with t.untouched(family), torch.inference_mode(False):
        resumed = job.run()
    assert t.same(resumed, whole) and len(job.losses) == 3
    assert t.same(load_adapter(tmp_path / "loha" / "cut" / "cut.safetensors"), whole)


def test_an_error_amid_a_step_leaves_no_trace(family):
    def fail():
        raise RuntimeError("the disk is gone")

    with t.untouched(family), pytest.raises(RuntimeError, match="the disk is gone"):
        t.train(family, acting(family, 3, fail), text=family.clip is not None, steps=5)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_weights_that_were_loaded_in_inference_mode(name):
    with torch.inference_mode():
        m = t.models(name)
        assert next(m.model.model.parameters()).is_inference()
        before = m.weights()
        adapter = t.train(m, text=m.clip is not None)
        after = m.weights()
    assert t.moved(adapter) > 0 and all(torch.equal(before[k], after[k]) for k in before)
    assert t.same(adapter, t.train(t.models(name), text=m.clip is not None, name="plain"))


def test_weights_that_are_tied_stay_so():
    with torch.inference_mode():
        embedding, head, other = nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        head.weight = embedding.weight
        head.again = embedding.weight  # a second name within one module
        other.bias = head.bias
        table = torch.ones(3)
        for module in (embedding, head, other):
            module.register_buffer("table", table)
    before = head.weight.clone()
    with (
        torch.inference_mode(False),
        t.node("host.autograd").trainable_weights(nn.ModuleList([embedding, head]), other),
    ):
        assert not any(p.is_inference() for m in (embedding, head, other) for p in (*m.parameters(), *m.buffers()))
    assert embedding.weight is head.weight is head.again and torch.equal(head.weight, before)
    assert head.bias is other.bias and embedding.table is head.table is other.table
    assert other.weight is not head.weight


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_seed_is_not_seen_outside_on_any_device(kind, monkeypatch):
    """torch.manual_seed sets those of all devices; here they are played, there being none."""
    device, each = getattr(torch, kind), "" if kind == "mps" else "_all"
    seeds = [7]
    monkeypatch.setattr(torch.backends.mps if kind == "mps" else device, "is_available", lambda: True)
    monkeypatch.setattr(device, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(device, f"manual_seed{each}", seeds.append)
    monkeypatch.setattr(device, f"get_rng_state{each}", lambda: seeds[-1])
    monkeypatch.setattr(device, f"set_rng_state{each}", seeds.append)
    with t.node("host.training")._seeded(3):
        assert seeds[-1] == 3
    assert seeds[-1] == 7


@pytest.mark.parametrize("dora", ["off", "output"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_weights_that_are_kept_in_less(name, dtype, dora):
    """Close to what the same weights give in float32."""
    m, wide = t.models(name, dtype), t.models(name, dtype)
    for module in wide.modules().values():
        module.float()
    with t.untouched(m):
        adapter = t.train(m, network={"dora": dora}, name="less")
    exact = t.train(wide, network={"dora": dora}, name="wide")
    assert t.moved(adapter) == pytest.approx(t.moved(exact), rel=0.02)


def test_a_model_that_does_not_fit_into_memory(sd15, monkeypatch):
    """ComfyUI then keeps some weights elsewhere and casts them on each call."""
    with t.untouched(sd15):
        wanted = t.train(sd15, name="fits")
        load = comfy.model_management.load_models_gpu

        def partly(patchers, *args, **kwargs):
            load(patchers, *args, **kwargs)
            for patcher in (p for p in patchers if p.model is sd15.model.model):
                patcher.unpatch_model()
                patcher.load(patcher.load_device, lowvram_model_memory=4_000_000)
                assert 0 < patcher.model.model_loaded_weight_memory < patcher.model_size()

        monkeypatch.setattr(comfy.model_management, "load_models_gpu", partly)
        found = t.train(sd15, name="partly")
        monkeypatch.undo()
        comfy.model_management.unload_all_models()
        sd15.model.detach()
    assert t.distance(found, wanted) < 0.01


@pytest.mark.parametrize("mode", ["merge", "live"])
def test_a_model_that_has_a_loha_already(sd15, mode):
    """What is trained comes on top: the loss that training saw is that of both together."""
    with t.untouched(sd15):
        first = t.train(sd15, steps=4, name="first")
        model = t.node("host.modes").apply(sd15.model, None, first, 1.0, 1.0, mode=mode)[0]
        job = t.job(sd15, model=model, name=f"on {mode}")
        with torch.inference_mode(False):
            second = job.run()
        plain = t.job(sd15, name="plain")
        with torch.inference_mode(False):
            plain.run()
        with torch.no_grad():
            d = t.diffusion(sd15, patcher=model)
            before = float(d.loss(d.batch(0)))
        comfy.model_management.unload_all_models()
        sd15.model.detach()
        del d, model, job
    assert t.moved(second) > 0
    assert before != plain.losses[0]


class Blank:
    """A VAE; what it shows is not looked at here."""

    def decode(self, latent):
        return torch.zeros(1, 8, 8, 3)


@pytest.mark.parametrize("mode", [None, "merge", "live"])
def test_previews_change_nothing(mode):
    """ComfyUI loads, ejects and injects for them as it likes."""
    m = t.models("flux" if mode else "sd3")
    with t.untouched(m):
        first = t.train(m, steps=2, name="first")
        model = t.node("host.modes").apply(m.model, None, first, 1.0, 1.0, mode=mode)[0] if mode else m.model
        settings = {"model": model, "text": m.clip is not None, "steps": 3}
        plain = t.train(m, name="plain", **settings)
        shown = t.train(m, name="shown", preview_every=1, preview_steps=2, vae=Blank(), **settings)
        comfy.model_management.unload_all_models()
        m.model.detach()
    assert t.same(plain, shown)


@pytest.mark.parametrize("what", ["a schedule", "a region", "a strength for each picture"])
def test_a_loha_without_one_strength_upstream_is_refused(sd15, what):
    first = t.train(sd15, steps=1)
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    more = {"schedule": lambda percent: 1.0} if what == "a schedule" else {}
    more |= {"region": t.node("host.regions").Region(mask)} if what == "a region" else {}
    strength = (1.0, 0.5) if what == "a strength for each picture" else 1.0
    model = t.node("host.modes").apply(sd15.model, None, first, strength, 1.0, mode="live", **more)[0]
    with pytest.raises(LoHaError, match=what):
        t.train(sd15, model=model, name="on " + what)


# --- text encoders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_text_encoders_are_trained_when_connected(name):
    m = t.models(name)
    leads = {"sd15": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"], "sd3": ["lora_te1_", "lora_te2_"]}[name]
    with t.untouched(m):
        trained = t.train(m, text=True, name="with")
        without = t.train(m, name="without")
    text = {n: f for n, f in trained.layers.items() if n.startswith("lora_te")}
    assert all(n.startswith(tuple(leads)) for n in text)
    for lead in leads:
        moved = [float(f.norm()) for n, f in text.items() if n.startswith(lead)]
        assert moved and max(moved) > 0
    assert not any(n.startswith("lora_te") for n in without.layers)
    assert {n for n in trained.layers if n not in text} == set(without.layers)
    assert all(flat(n) == n for n in trained.layers)
