"""An adapter in a part of the picture: on ComfyUI's real models of every family, on every way to keep a weight.

`pytest tests/comfy/test_regions.py -s` prints what changes outside and inside of half a mask, in what each model makes.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import comfy.lora
import comfy.sample
import folder_paths
import pytest
import torch
from torch import Tensor

from loha_core import Adapter, LoHaError, load_adapter

from . import bases, reduced, test_bases
from .conftest import _module
from .regions import CASES, Case, adapter_for, call, family
from .test_bases import IN
from .test_families import NEWER, VERSION

regions, tokens, varying = (_module(f"host.{name}") for name in ("regions", "tokens", "varying"))
UNETS = [name for name in CASES if name.startswith("SD1") or name == "SDXL"]
DITS = [name for name in CASES if name not in UNETS]


@pytest.fixture
def case(request) -> Case:
    if VERSION < NEWER.get(request.param, ()):
        pytest.skip(f"this ComfyUI is older than {request.param}")
    return CASES[request.param]


def each(names):
    return pytest.mark.parametrize("case", names, indirect=True, ids=str)


def left(latent: tuple[int, ...], scale: int = 8) -> Tensor:
    """A mask of the picture's left half, (1, height, width)."""
    height, width = latent[-2:]
    mask = torch.zeros(1, height * scale, width * scale)
    mask[..., : width // 2 * scale] = 1
    return mask


def size(change: Tensor, full: Tensor) -> float:
    return float(change.norm() / full.norm())


@pytest.fixture(scope="module")
def table(request):
    found: dict[str, str] = {}
    yield found
    lines = ["", f"{'change of the output, of the full one':<40}{'outside':>10}{'inside':>10}"]
    lines += [f"{name:<40}{cell}" for name, cell in found.items()]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


@each(CASES)
def test_nowhere_everywhere_and_half(modes, regions, case, request, table):
    """No adapter, the adapter, and less outside than inside, whatever attention and norms carry over."""
    name, patcher = request.node.callspec.params["case"], case.build()
    adapter = adapter_for(patcher)
    plain, mask = call(patcher, case), left(case.latent)

    def run(region: Any) -> Tensor:
        alive, _, report = modes.apply(patcher, None, adapter, 1.0, 1.0, mode="live", region=region)
        assert region is None or any(note.startswith("region: ") for note in report.notes)
        return call(alive, case)

    full = run(None)
    assert 0.02 < size(full - plain, plain) < 1
    assert torch.equal(run(regions.Region(torch.zeros_like(mask))), plain)
    assert torch.equal(run(regions.Region(torch.ones_like(mask))), full)
    middle = case.latent[-1] // 2 // 2 * 2
    for option in ("off", "share", "full"):
        change = run(regions.Region(mask, option)) - plain
        parts = (slice(middle, None), slice(None, middle))
        outside, inside = (size(change[..., part], (full - plain)[..., part]) for part in parts)
        table[f"{name}, text layers {option}"] = f"{outside:>10.1%}{inside:>10.1%}"
        if name not in UNETS:
            assert outside < {"off": 0.35, "share": 0.6, "full": 1.0}[option] and inside > 0.6
    assert torch.equal(call(patcher, case), plain)


def _attention(q, k, v, heads, *args, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """Each token attends to itself alone; of another sequence it sees nothing."""
    out = v if v.shape == q.shape else torch.zeros_like(q)
    return out.transpose(1, 2).flatten(2) if skip_reshape and not skip_output_reshape else out


@contextmanager
def without_mixing(monkeypatch):
    """No attention and no group norm: what a token becomes depends on itself, and in a U-Net on its neighbours."""
    with monkeypatch.context() as changed:
        for module in [m for name, m in sys.modules.items() if name.startswith("comfy.ldm.")]:
            for name in ("optimized_attention", "optimized_attention_masked"):
                if hasattr(module, name):
                    changed.setattr(module, name, _attention)
        changed.setattr(torch.nn.functional, "group_norm", lambda x, *args, **kwargs: x)
        yield


def check_places(modes, regions, monkeypatch, case: Case, margin: int) -> None:
    """Inside is the adapter and outside none, where nothing mixes; with another mask for each of two pictures."""
    patcher = case.build()
    adapter = adapter_for(patcher)
    mask = left(case.latent)
    with without_mixing(monkeypatch):
        plain = call(patcher, case)
        full = call(modes.apply(patcher, None, adapter, 1.0, 1.0, mode="live")[0], case)
        runs = {}
        for name, masks in {"halves": torch.cat([mask, 1 - mask]), "nowhere": mask * 0}.items():
            # What sees no place acts in full in all runs, the modulation for instance.
            region = regions.Region(masks, "full")
            runs[name] = call(modes.apply(patcher, None, adapter, 1.0, 1.0, region=region)[0], case)
    middle = case.latent[-1] // 2
    halves = (slice(None, middle - margin), slice(middle + margin, None))
    for row in range(len(plain)):
        inside, outside = halves if row % 2 == 0 else halves[::-1]
        found, nowhere = runs["halves"][row], runs["nowhere"][row]
        torch.testing.assert_close(found[..., inside], full[row][..., inside], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[..., outside], nowhere[..., outside], rtol=1e-4, atol=1e-4)
        assert size((full[row] - nowhere)[..., inside], plain[row][..., inside]) > 0.01


@each(DITS)
def test_every_token_lies_where_its_cell_is(modes, regions, monkeypatch, case):
    check_places(modes, regions, monkeypatch, case, margin=2)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_cell_of_a_unet(modes, regions, monkeypatch, name):
    """As far from the mask's edge as its convolutions do not see."""
    context, more = {"sd15": (64, CASES["SD1.5"].more), "sdxl": (128, CASES["SDXL"].more)}[name]
    case = Case(lambda: reduced.build(name, narrow=True).model, (4, 6, 301), context, more, text=77)
    check_places(modes, regions, monkeypatch, case, margin=110)


# --- reference tokens, and what is refused ---------------------------------------------------------------------------


@each(["Flux", "Flux.2", "Qwen-Image"])
def test_pictures_to_look_at_have_no_region(modes, regions, monkeypatch, case):
    """Their tokens follow the picture's; where nothing mixes they change nothing."""
    patcher = case.build()
    adapter, region = adapter_for(patcher), regions.Region(left(case.latent))
    alive = modes.apply(patcher, None, adapter, 1.0, 1.0, region=region)[0]
    looked_at = [torch.randn(4, *case.latent[:-2], 4, 6), torch.randn(4, *case.latent[:-2], 8, 4)]
    with without_mixing(monkeypatch):
        without = call(alive, case)
        torch.testing.assert_close(call(alive, case, ref_latents=looked_at), without, rtol=1e-4, atol=1e-5)
    assert call(alive, case, ref_latents=looked_at).isfinite().all()


@each(["Wan"])
def test_tokens_in_front_are_refused(modes, regions, case):
    patcher = case.build()
    alive = modes.apply(patcher, None, adapter_for(patcher), 1.0, 1.0, region=regions.Region(left(case.latent)))[0]
    with pytest.raises(LoHaError, match="with reference_latent the tokens of a WanModel lie elsewhere"):
        call(alive, case, reference_latent=torch.randn(4, 16, 16, 24))
    with pytest.raises(LoHaError, match="48 tokens|96 tokens|144 tokens|tokens of a WanModel lie elsewhere"):
        call(alive, case, time_dim_concat=torch.randn(4, 16, 1, 16, 24))


@pytest.mark.parametrize("name", ["HiDream", "Stable Cascade C"])
def test_models_that_are_not_known_are_refused_by_name(modes, regions, name):
    patcher = family(name)()
    kind = type(patcher.model.diffusion_model).__name__
    region = regions.Region(torch.eye(2))
    with pytest.raises(LoHaError, match=f"a region cannot act on a .*{kind}"):
        modes.apply(patcher, None, adapter_for(patcher), 1.0, 1.0, region=region)


@each(["SD1.5"])
def test_what_cannot_be_is_refused(modes, regions, case, monkeypatch):
    patcher = case.build()
    adapter, mask = adapter_for(patcher), left(case.latent)
    apply = lambda masks: modes.apply(patcher, None, adapter, 1.0, 1.0, region=regions.Region(masks))[0]  # noqa: E731
    with pytest.raises(LoHaError, match="merged weights act on all of the picture"):
        modes.apply(patcher, None, adapter, 1.0, 1.0, mode="merge", region=regions.Region(mask))
    with pytest.raises(LoHaError, match="3 strengths or masks, one per picture, but a batch of 2"):
        call(apply(mask.repeat(3, 1, 1)), case)
    with pytest.raises(LoHaError, match="128×128 .*latents of 24×16 are sampled, of other proportions"):
        call(apply(mask[:, :, :128]), case)
    with pytest.raises(LoHaError, match="2 pictures meet some for 3"):
        modes.apply(patcher, None, adapter, (1.0, 0.5, 0.2), 1.0, region=regions.Region(mask.repeat(2, 1, 1)))
    with pytest.raises(LoHaError, match="expected finite values"):
        regions.Region(torch.full((1, 4, 4), torch.nan))
    with pytest.raises(LoHaError, match="a region has no single strength"):
        apply(mask).clone().get_key_patches("diffusion_model.")
    unet = patcher.model.diffusion_model
    merges = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q
    # As nodes that merge tokens do.
    merging = merges.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, : inputs[0].shape[1] // 3],))
    with pytest.raises(LoHaError, match="attn1.to_q: its 128 tokens are no grid of latents of \\(16, 24\\)"):
        call(apply(mask), case)
    merging.remove()


def sampled(patcher, case: Case, positive: list | None = None, steps: int = 2) -> Tensor:
    latent = torch.zeros(2, *case.latent)
    text = torch.randn(1, case.text, case.context, generator=torch.Generator().manual_seed(1))
    noise = comfy.sample.prepare_noise(latent, 3)
    positive = positive or [[text, {}]]
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher,
            noise,
            steps,
            3.0,
            "euler",
            "normal",
            positive,
            [[text * 0.5, {}]],
            latent,
            disable_pbar=True,
            seed=1,
        )


@each(["SD1.5"])
def test_in_a_sampler(modes, regions, case):
    """CFG, a mask of ones and of zeros; areas, tiles and context windows are refused by name."""
    patcher = case.build()
    adapter, mask = adapter_for(patcher), left(case.latent)
    alive = {
        name: modes.apply(patcher, None, adapter, 1.0, 1.0, mode="live", region=region)[0]
        for name, region in {
            "none": None,
            "ones": regions.Region(mask * 0 + 1),
            "zeros": regions.Region(mask * 0),
            "left": regions.Region(mask),
        }.items()
    }
    pictures = {name: sampled(each, case) for name, each in alive.items()} | {"plain": sampled(patcher, case)}
    assert torch.equal(pictures["ones"], pictures["none"]) and torch.equal(pictures["zeros"], pictures["plain"])
    assert not torch.equal(pictures["left"], pictures["none"])
    area = [[torch.randn(1, case.text, case.context), {"area": (8, 12, 0, 0), "strength": 1.0}]]
    with pytest.raises(LoHaError, match="an area of a conditioning, a tile or a context window"):
        sampled(alive["left"], case, area)
    sampled(alive["none"], case, area)
    tiled = alive["left"].clone()
    tiled.set_model_unet_function_wrapper(
        lambda f, p: torch.cat([f(x, p["timestep"], **p["c"]) for x in p["input"].chunk(2, 3)], 3)
    )
    with pytest.raises(LoHaError, match="a tile"):
        sampled(tiled, case)


# --- batches, several regions, and other kinds of updates ------------------------------------------------------------


@each(["SD1.5", "Flux"])
def test_strengths_and_masks_for_each_picture(modes, regions, case):
    """Equal to pictures made one by one."""
    patcher = case.build()
    adapter = adapter_for(patcher)
    masks = torch.cat([left(case.latent), 1 - left(case.latent)])
    found = call(modes.apply(patcher, None, adapter, (0.4, 1.0), 1.0, region=regions.Region(masks, "share"))[0], case)
    for picture, strength in enumerate((0.4, 1.0)):
        region = regions.Region(masks[picture], "share")
        alone = call(modes.apply(patcher, None, adapter, strength, 1.0, region=region)[0], case)
        torch.testing.assert_close(found[picture::2], alone[picture::2], rtol=1e-4, atol=1e-5)
    assert size(found[0::2] - alone[0::2], found[0::2]) > 1e-3


@each(["Flux", "Wan"])
def test_two_adapters_in_two_regions(modes, regions, monkeypatch, case):
    """Each acts in its own half as if the other were not there, with one that acts everywhere beneath."""
    patcher = case.build()
    first, second, third = (adapter_for(patcher, scale) for scale in (0.3, -0.3, 0.1))
    base = modes.apply(patcher, None, third, 1.0, 1.0, mode="live")[0]
    mask = left(case.latent)
    with without_mixing(monkeypatch):
        both, halves = base, []
        for adapter, where in ((first, mask), (second, 1 - mask)):
            both = modes.apply(both, None, adapter, 1.0, 1.0, region=regions.Region(where))[0]
            halves.append(call(modes.apply(base, None, adapter, 1.0, 1.0, region=regions.Region(where))[0], case))
        found = call(both, case)
    middle = case.latent[-1] // 2
    for half, part in zip(halves, (slice(None, middle), slice(middle, None)), strict=True):
        torch.testing.assert_close(found[..., part], half[..., part], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base_name", bases.BASES)
@pytest.mark.parametrize("name", test_bases.CASES)
def test_on_every_base(pack, acting, patches, varying, tokens, regions, monkeypatch, base_name, name):
    """A strength for each picture and a half mask, of every kind of update: right beside the base's own rounding."""
    updates = sys.modules[f"{pack.__name__}.nodes.host.updates"]
    base, _, bias = test_bases.base_of(base_name)
    torch.manual_seed(2)
    x, chosen, held = torch.randn(2, 20, IN), test_bases.case(name), base.held.double()
    before = test_bases.storage(base.layer)
    layout = tokens.Layout("Test", ((".*", tokens.Stream.IMAGE),), (1, 1, 1))
    mask = torch.zeros(4, 5)
    mask[:2] = 1  # the first ten tokens
    for adds in (True, False):
        monkeypatch.setattr(acting, "cheaper_to_add", lambda *_, adds=adds: adds)
        for strengths, region in (((0.3, 0.7), None), (0.7, regions.Region(mask)), ((0.3, 0.7), regions.Region(mask))):
            asked = updates.SamplingCall()
            asked.shape, asked.chunks = (2, 4, 4, 5), 1
            live: dict[str, list[Any]] = {}
            for target, update in chosen.patches:
                update = (
                    update if not isinstance(update, test_bases.LoHaFactors) else patches.LoHaPatch.from_factors(update)
                )
                patch = patches.Patch(target, update, 1.0)
                parameter = patches.weight_key(target).rpartition(".")[2]
                live.setdefault(parameter, []).append(updates.LiveUpdate(patch, strengths, call=asked, region=region))
            layer = varying.VaryingLayer(base.layer, "layer", live, layout)
            with torch.no_grad():
                plain = base.layer(x).double()
                layer.start()
                found = base.layer(x).double()
                layer.stop()
                exact_plain = x.double() @ held.T + bias.double()
                exact = torch.stack([
                    x[p].double() @ chosen.reference(held, s).T + chosen.bias(bias.double(), s)
                    for p, s in enumerate(strengths if isinstance(strengths, tuple) else (strengths,) * 2)
                ])  # fmt: skip
                if region is not None:
                    exact[:, 10:] = exact_plain[:, 10:]
                    # Formats that scale the input by its largest value round each part of a batch by itself.
                    if not isinstance(strengths, tuple):
                        assert torch.equal(found[:, 10:], plain[:, 10:])
                effect = exact - exact_plain
                rounding = (plain - exact_plain).norm()  # of a product in the base's format, anew for each part of x
                error = ((found - plain) - effect).norm()
                assert error <= test_bases.TOLERANCE * effect.norm() + 2.0 * rounding, (strengths, region, adds)
    assert all(map(torch.equal, test_bases.storage(base.layer), before)) and "forward" not in vars(base.layer)


def test_norms_and_convolutions_told_how_to_pad(pack, patches, varying, tokens, regions):
    """By y₀ + m∘(y₁ − y₀)."""
    import comfy.ops

    updates = sys.modules[f"{pack.__name__}.nodes.host.updates"]
    torch.manual_seed(0)
    asked = updates.SamplingCall()
    asked.shape = (2, 4, 6, 8)
    mask = torch.zeros(6, 8)
    mask[:, :4] = 1
    layout = tokens.Layout("Test", ((".*", tokens.Stream.IMAGE),), None)
    for layer in (comfy.ops.disable_weight_init.GroupNorm(2, 4), comfy.ops.disable_weight_init.LayerNorm(4)):
        layer.requires_grad_(False).eval()
        for p in layer.parameters():  # these layers leave them as the memory was
            torch.nn.init.normal_(p)
        difference, x = torch.randn(4), torch.randn(2, 4, 6, 8)
        x = x if isinstance(layer, torch.nn.GroupNorm) else x.flatten(2).transpose(1, 2).contiguous()
        [(target, native)] = comfy.lora.load_lora({"x.w_norm": difference}, {"x": "layer.weight"}).items()
        update = updates.LiveUpdate(patches.Patch(target, native, 1.0), 0.5, call=asked, region=regions.Region(mask))
        plain = layer(x)
        acting = varying.VaryingLayer(layer, "layer", {"weight": [update]}, layout)
        acting.start()
        found = layer(x)
        acting.stop()
        layer.weight.add_(0.5 * difference)
        full = layer(x)
        grid = [t if t.dim() == 4 else t.transpose(1, 2).unflatten(2, (6, 8)) for t in (found, full, plain)]
        assert torch.equal(grid[0][..., 4:], grid[2][..., 4:])
        torch.testing.assert_close(grid[0][..., :4], grid[1][..., :4])
        assert not torch.equal(found, plain)


# --- the node --------------------------------------------------------------------------------------------------------


def test_feathering(regions):
    mask = torch.zeros(2, 8, 20)
    mask[0, :, 10:] = 1
    mask[1, 4:] = 1
    assert torch.equal(regions.feathered(mask, 0), mask)
    soft = regions.feathered(mask, 4)
    expected = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    torch.testing.assert_close(soft[0, 3, 7:13], expected)
    torch.testing.assert_close(soft[1, 1:7, 5], expected)
    for value in (0.0, 1.0):
        whole = torch.full((1, 5, 7), value)
        torch.testing.assert_close(regions.feathered(whole, 100), whole)
    with pytest.raises(LoHaError, match="feather is -1"):
        regions.feathered(mask, -1)


def test_the_node_and_what_it_connects_to(pack: ModuleType, regions):
    graph = lambda name: sys.modules[f"{pack.__name__}.nodes.graph.{name}"]  # noqa: E731
    node = graph("region").LoHaRegion
    [region] = node.execute(mask=torch.ones(6, 8), feather=0, text_layers="share").args
    assert region.is_everywhere and region.text_gain == 1.0
    mask = torch.zeros(1, 6, 8)
    mask[..., :2] = 1
    assert [node.execute(mask, 2, o).args[0].text_gain for o in regions.PLACELESS] == pytest.approx(
        [0, 0.25, 1], abs=0.01
    )
    with pytest.raises(LoHaError, match="cannot hold a region"):
        graph("stack").LoHaStack.execute("[]", region=region)


@pytest.mark.parametrize("kind", ["LoHaLoader", "LoHaApply"])
def test_nodes_that_apply_take_a_region(pack: ModuleType, modes, regions, tmp_path, monkeypatch, kind):
    models = reduced.build("sd15", narrow=True)
    path, _ = reduced.write(models, "kohya", tmp_path)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    what = {"lora_name": path.name} if kind == "LoHaLoader" else {"loha": load_adapter(path)}
    region = regions.Region(left((4, 8, 8)))
    node = getattr(sys.modules[f"{pack.__name__}.nodes.graph.loader"], kind)
    given = {"model": models.model, "strength_model": 8.0, "strength_clip": 0.0}
    model, _, report, *_ = node.execute(**given, **what, region=region).args
    wanted, _, _ = modes.apply(models.model, None, load_adapter(path), 8.0, 0.0, region=region)
    case = Case(lambda: models.model, (4, 8, 8), models.model.model.model_config.unet_config["context_dim"])
    assert torch.equal(call(model, case), call(wanted, case)) and "region: 50% of the picture" in report
    assert not torch.equal(call(model, case), call(models.model, case))
    with pytest.raises(LoHaError, match="merge"):
        node.execute(**given, **what, region=region, mode="merge")


def test_text_encoders_act_by_the_share(modes, regions, tmp_path):
    models = reduced.build("sd15")
    path, _ = reduced.write(models, "kohya-ldm", tmp_path)
    adapter: Adapter = load_adapter(path)
    mask = torch.zeros(6, 8)
    mask[:, :2] = 1
    injection = sys.modules[modes.__name__.replace("modes", "injection")]
    for option, expected in {"share": 0.2, "full": 0.8, "off": None}.items():
        _, clip, _ = modes.apply(models.model, models.clip, adapter, 1.0, 0.8, region=regions.Region(mask, option))
        live = injection.live_of(clip.patcher)
        assert (live and live.updates[0].strength) == (expected and pytest.approx(expected))
