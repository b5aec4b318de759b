"""Live strength: the same outputs as merged weights, and no weight is touched."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.ops
import pytest
import torch
from safetensors.torch import load_file, save_file

from loha_core import LoHaError, LoHaFactors, load_adapter

from ..core.pairwise import rows
from . import reduced
from .test_patching import loaded

FAMILIES, FILES = ("sd15", "sdxl"), ("kohya", "kohya-dora", "peft")
# For what does not depend on the file's spelling: with DoRA and without.
BOTH_FAMILIES = pytest.mark.parametrize(
    ("models", "adapter"), list(zip(FAMILIES, FILES[1:], strict=True)), indirect=True
)


def families_and_files(axis, values):
    """Each of them with each of an independent axis."""
    table = rows(FAMILIES, FILES, values)
    return pytest.mark.parametrize(("models", "adapter", axis), table, indirect=["models", "adapter"])


@pytest.fixture(scope="module", params=FAMILIES)
def models(request):
    return reduced.build(request.param)


@pytest.fixture(scope="module")
def adapter(request, models, tmp_path_factory):
    """Every layer of the family: flat and Tucker; once with DoRA along either axis in every third layer."""
    dialect, _, dora = request.param.partition("-")
    path, _ = reduced.write(models, dialect, tmp_path_factory.mktemp("adapters"))
    if dora:
        tensors, shapes = load_file(path), {}
        for (label, key), shape in reduced.layers(models).items():
            shapes[reduced.SPELLINGS[dialect](reduced.diffusers_names(models)[label, key], key, models)] = shape
        for n, (module, shape) in enumerate(shapes.items()):
            if n % 3 < 2:
                tensors[f"{module}.dora_scale"] = (
                    torch.rand([s if d == n % 3 else 1 for d, s in enumerate(shape)]) + 0.5
                )
        save_file(tensors, path)
    return load_adapter(path)


def run(model, sigma: float = 3.0, size: int = 8, load: bool = True) -> torch.Tensor:
    """One call of the diffusion model, as samplers make it, with the patcher's wrappers."""
    if load:
        comfy.model_management.load_models_gpu([model])
    base = model.model
    torch.manual_seed(5)
    config = base.model_config.unet_config
    x = torch.randn(2, 4, size, size)
    context = torch.randn(2, 77, config["context_dim"])
    extra = {"y": torch.randn(2, config["adm_in_channels"])} if config["adm_in_channels"] else {}
    options = {"wrappers": model.wrappers}
    with torch.inference_mode():
        return base.apply_model(x, torch.full((2,), sigma), c_crossattn=context, transformer_options=options, **extra)


def encode(clip) -> torch.Tensor:
    with torch.inference_mode():
        clip.load_model()
        width = {"sd15": ("l",), "sdxl": ("l", "g")}
        kinds = width["sdxl"] if hasattr(clip.cond_stage_model, "clip_g") else width["sd15"]
        tokens = {k: [[(7, 1.0)] * 77] for k in kinds}
        return clip.cond_stage_model.encode_token_weights(tokens)[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).norm() / wanted.norm()) < 2e-5


@families_and_files("size", (8, 32))
def test_live_is_what_merged_is(modes, live, models, adapter, size):
    comfy.model_management.unload_all_models()
    before = models.weights()
    plain, plain_text = run(models.model, size=size), encode(models.clip)
    merged, merged_clip, _ = modes.apply(models.model, models.clip, adapter, 0.7, -0.4, mode="merge")
    wanted, wanted_text = run(merged, size=size), encode(merged_clip)
    alive, alive_clip, report = modes.apply(models.model, models.clip, adapter, 0.7, -0.4, mode="live")
    assert "mode: live" in report.text()
    found, found_text = run(alive, size=size), encode(alive_clip)
    assert close(found, wanted) and close(found_text, wanted_text)
    assert not close(found, plain) and not close(found_text, plain_text)
    comfy.model_management.unload_all_models()
    after = models.weights()
    assert all(torch.equal(before[place], after[place]) for place in before)
    assert close(run(models.model, size=size), plain) and close(encode(models.clip), plain_text)


@BOTH_FAMILIES
def test_a_new_strength_touches_no_weight(modes, models, adapter):
    first, _, _ = modes.apply(models.model, None, adapter, 0.5, 1.0, mode="live")
    run(first)
    storage = {n: (p.data_ptr(), p._version) for n, p in models.model.model.named_parameters()}
    identity = models.model.model.current_weight_patches_uuid
    second, _, _ = modes.apply(models.model, None, adapter, 0.9, 1.0, mode="live")
    del first
    run(second)
    assert {n: (p.data_ptr(), p._version) for n, p in models.model.model.named_parameters()} == storage
    assert models.model.model.current_weight_patches_uuid == identity


@BOTH_FAMILIES
def test_live_adapters_stack(modes, models, adapter):
    merged = models.model
    alive = models.model
    for strength in (0.5, -0.3, 0.2):
        merged, _, _ = modes.apply(merged, None, adapter, strength, 1.0, mode="merge")
        alive, _, _ = modes.apply(alive, None, adapter, strength, 1.0, mode="live")
    assert close(run(alive), run(merged))


def test_live_on_top_of_merged_and_the_other_way_round(modes, models, tmp_path):
    adapter = load_adapter(reduced.write(models, "kohya", tmp_path)[0])
    wanted, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="merge")
    wanted, _, _ = modes.apply(wanted, None, adapter, -0.2, 1.0, mode="merge")
    one, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="merge")
    one, _, _ = modes.apply(one, None, adapter, -0.2, 1.0, mode="live")
    other, _, _ = modes.apply(models.model, None, adapter, 0.7, 1.0, mode="live")
    other, _, _ = modes.apply(other, None, adapter, -0.2, 1.0, mode="merge")
    picture = run(wanted)
    assert close(run(one), picture) and close(run(other), picture)


@BOTH_FAMILIES
def test_every_clone_dies_in_peace(modes, live, models, adapter):
    """Whatever the order in which clones are loaded and collected, the base model ends as it began."""
    plain = run(models.model)
    alive, _, _ = modes.apply(models.model, None, adapter, 1.0, 1.0, mode="live")
    changed = run(alive)
    again = alive.clone()  # of an injected patcher
    more, _, _ = modes.apply(again, None, adapter, 0.5, 1.0, mode="merge")  # add_patches ejects and injects
    assert close(run(alive), changed)
    more_out = run(more)
    assert not close(more_out, changed)
    assert close(run(again), changed) and close(run(more), more_out)
    del again, more
    gc.collect()
    assert close(run(alive), changed)
    run(alive)
    del alive
    gc.collect()  # it was injected when it died
    assert close(run(models.model), plain)
    assert not any("forward" in vars(m) for m in models.model.model.modules())


@BOTH_FAMILIES
def test_schedule(modes, models, adapter):
    """Each call of the model has the strength of its moment: a merged reference for each of two moments."""
    schedule = lambda percent: 1.0 if percent < 0.5 else 0.25  # noqa: E731
    alive, _, _ = modes.apply(models.model, None, adapter, 0.8, 1.0, mode="auto", schedule=schedule)
    sampling = models.model.model.model_sampling
    for percent in (0.2, 0.8):
        sigma = float(sampling.percent_to_sigma(percent))
        merged, _, _ = modes.apply(models.model, None, adapter, 0.8 * schedule(percent), 1.0, mode="merge")
        assert close(run(alive, sigma), run(merged, sigma))
    with pytest.raises(LoHaError, match="choose live or auto"):
        modes.apply(models.model, None, adapter, 0.8, 1.0, mode="merge", schedule=schedule)


@families_and_files("mode", ("merge", "live"))
def test_blocks(modes, models, adapter, mode):
    """A multiplier for each weight; 0 leaves it out."""
    chosen = lambda key, name: {"input": 0.5, "middle": 0.0}.get(key.split(".")[1].partition("_")[0], 1.0)  # noqa: E731
    model, _, _ = modes.apply(models.model, None, adapter, 0.8, 1.0, mode=mode, blocks=chosen)
    comfy.model_management.unload_all_models()
    before = models.weights()
    exact, _, _ = modes.apply(models.model, None, adapter, 0.8, 1.0, mode="merge")
    half, _, _ = modes.apply(models.model, None, adapter, 0.4, 1.0, mode="merge")
    reference = {}
    for patcher in (exact, half):
        with loaded(patcher):
            reference[patcher is half] = models.weights()
    mixed = {
        key: {0.0: before, 0.5: reference[True], 1.0: reference[False]}[chosen(key, "")]["MODEL", key]
        for label, key in before
        if label == "MODEL" and key.startswith("diffusion_model.")
    }
    found = run(model)
    comfy.model_management.unload_all_models()
    state = {k: v.clone() for k, v in models.model.model.state_dict().items()}
    models.model.model.load_state_dict(mixed, strict=False)
    try:
        wanted = run(models.model)
    finally:
        models.model.model.load_state_dict(state)
    assert close(found, wanted)


@BOTH_FAMILIES
def test_merging_models_takes_live_adapters_along(modes, models, adapter):
    """ComfyUI's ModelMerge nodes read weights and patches from get_key_patches."""
    alive, _, _ = modes.apply(models.model, None, adapter, 0.6, 1.0, mode="live")
    merged, _, _ = modes.apply(models.model, None, adapter, 0.6, 1.0, mode="merge")
    results = []
    for second in (alive, merged):
        mixed = models.model.clone()
        for key, patch in second.get_key_patches("diffusion_model.").items():
            mixed.add_patches({key: patch}, 0.5, 0.5)
        results.append(run(mixed))
    assert close(*results)
    scheduled, _, _ = modes.apply(models.model, None, adapter, 0.6, 1.0, schedule=lambda percent: 1.0)
    with pytest.raises(LoHaError, match="schedule"):
        scheduled.clone().get_key_patches("diffusion_model.")


@BOTH_FAMILIES
def test_saving_refuses(modes, models, adapter):
    alive, clip, _ = modes.apply(models.model, models.clip, adapter, 0.6, 0.6, mode="live")
    for patcher in (alive.clone(), clip.clone().patcher):
        with pytest.raises(LoHaError, match="Set mode to merge"):
            comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
        comfy.model_management.unload_all_models()
    run(alive)
    with pytest.raises(LoHaError, match="Set mode to merge"):  # loaded already
        comfy.model_management.load_models_gpu([alive], force_patch_weights=True)
    comfy.model_management.unload_all_models()


# --- single layers: what the two families lack --------------------------------------------------


class Holder(torch.nn.Module):
    """The least that ComfyUI's ModelPatcher takes for a model."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer, self.device = layer, torch.device("cpu")

    def forward(self, x):
        return self.layer(x)


CONVOLUTIONS = {
    "conv1d": (comfy.ops.disable_weight_init.Conv1d, (12,), dict(stride=2, padding=1)),
    "conv2d groups": (comfy.ops.disable_weight_init.Conv2d, (9, 7), dict(groups=2, padding=1, dilation=2)),
    "conv3d": (comfy.ops.disable_weight_init.Conv3d, (5, 6, 4), dict(stride=(1, 2, 1), padding="same" and 1)),
    "plain torch": (torch.nn.Conv2d, (8, 8), dict(padding="same")),
    "even kernel": (torch.nn.Conv2d, (8, 8), dict(kernel_size=4, padding="same")),
    "circular": (torch.nn.Conv2d, (8, 8), dict(padding=1, padding_mode="circular")),
}


def patcher_for(layer):
    import comfy.model_patcher

    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
        p.requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(Holder(layer), load_device=cpu, offload_device=cpu)


def factors(shape, tucker):
    tensors = reduced.random_layer(shape, 2, "kohya")
    if tucker:
        tensors = {"alpha": torch.tensor(1.0)}
        for half in "12":
            tensors |= {f"hada_t{half}": torch.randn(2, 2, *shape[2:])}
            tensors |= {f"hada_w{half}_a": torch.randn(2, shape[0]), f"hada_w{half}_b": torch.randn(2, shape[1])}
    return LoHaFactors(**{k.removeprefix("hada_"): v for k, v in tensors.items()})


@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "Tucker"])
@pytest.mark.parametrize("adds", [True, False], ids=["U(Vx)", "W+ΔW"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(live, acting, patches, monkeypatch, kind, tucker, adds):
    cls, size, options = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    layer = cls(8, 6, **{"kernel_size": 3, **options})
    patcher = patcher_for(layer)
    f = factors(tuple(layer.weight.shape), tucker)
    monkeypatch.setattr(acting, "cheaper_to_add", lambda *_: adds)
    patch = patches.Patch("layer.weight", patches.LoHaPatch.from_factors(f), 1.0)
    alive = live.apply_live(patcher, [patch], 0.7)
    x = torch.randn(2, 8, *size)
    with torch.no_grad():
        expected = torch.nn.Module.__call__(layer, x)
        weight = layer.weight.clone()
        layer.weight.add_(0.7 * f.delta().reshape(weight.shape))
        expected = layer(x)
        layer.weight.copy_(weight)
        alive.patch_model()
        assert close(patcher.model(x), expected)
        alive.unpatch_model()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adds", [True, False], ids=["U(Vx)", "W+ΔW"])
def test_weights_that_comfyui_casts(live, acting, patches, monkeypatch, adds, weight_dtype, capsys):
    """An fp8 base: live's error against float64 is below merge's, which has to round the sum to fp8 again."""
    torch.manual_seed(0)
    layer = comfy.ops.manual_cast.Linear(64, 48)
    patcher = patcher_for(layer)
    layer.weight.data = layer.weight.data.to(weight_dtype)
    f = factors((48, 64), False)
    patch = patches.Patch("layer.weight", patches.LoHaPatch.from_factors(f), 1.0)
    x = torch.randn(16, 64)
    exact = x.double() @ (layer.weight.double() + 0.7 * f.delta(torch.float64)).T + layer.bias.double()
    monkeypatch.setattr(acting, "cheaper_to_add", lambda *_: adds)
    errors = {}
    for name, apply in (("live", live.apply_live), ("merge", patches.merge)):
        patched = apply(patcher, [patch], 0.7)
        patched.patch_model()
        with torch.no_grad():
            errors[name] = float((patcher.model(x).double() - exact).norm() / exact.norm())
        patched.unpatch_model()
    with capsys.disabled():
        print(f"\n    {weight_dtype} base: error of live {errors['live']:.1e}, of merge {errors['merge']:.1e}", end="")
    assert errors["live"] < errors["merge"]


@pytest.mark.parametrize("kind", ["LoHa", "DoRA", "LoRA", "bias"])
@pytest.mark.parametrize("adds", [True, False], ids=["U(Vx)", "W+ΔW"])
def test_a_layer_whose_forward_asks_no_weight_functions(live, acting, patches, monkeypatch, kind, adds):
    """A class of another pack: what acts is what merging would give, by whatever way is left."""
    import comfy.lora

    class OfAPack(comfy.ops.disable_weight_init.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    torch.manual_seed(0)
    monkeypatch.setattr(acting, "cheaper_to_add", lambda *_: adds)
    patcher = patcher_for(OfAPack(8, 6))
    f, x = factors((6, 8), False), torch.randn(4, 8)
    native = {
        "LoRA": {"x.lora_up.weight": torch.randn(6, 2), "x.lora_down.weight": torch.randn(2, 8)},
        "bias": {"x.diff_b": torch.randn(6)},
    }
    if kind in native:
        [(target, update)] = comfy.lora.load_lora(native[kind], {"x": "layer.weight"}).items()
    else:
        magnitude = torch.rand(6, 1) if kind == "DoRA" else None
        dora = LoHaFactors(f.w1_a, f.w1_b, f.w2_a, f.w2_b, f.alpha, dora_scale=magnitude)
        target, update = "layer.weight", patches.LoHaPatch.from_factors(dora)
    patch = patches.Patch(target, update, 1.0)
    with torch.no_grad():
        plain = patcher.model(x)
        merged = patches.merge(patcher, [patch], 0.7)
        merged.patch_model()
        expected = patcher.model(x)
        merged.unpatch_model()
        alive = live.apply_live(patcher, [patch], 0.7)
        alive.patch_model()
        for _ in range(2):
            assert close(patcher.model(x), expected) and not close(expected, plain)
        alive.unpatch_model()
        assert torch.equal(patcher.model(x), plain)


def test_slices_and_other_adapters_live(live, patches):
    """A slice of a fused weight, and ComfyUI's own LoRA, through the same door."""
    import comfy.lora

    torch.manual_seed(0)
    layer = comfy.ops.disable_weight_init.Linear(8, 24)
    patcher = patcher_for(layer)
    f, x = factors((8, 8), False), torch.randn(4, 8)
    lora = comfy.lora.load_lora(
        {"x.lora_up.weight": torch.randn(24, 2), "x.lora_down.weight": torch.randn(2, 8)}, {"x": "layer.weight"}
    )["layer.weight"]
    both = [
        patches.Patch(("layer.weight", (0, 8, 8)), patches.LoHaPatch.from_factors(f), 1.0),
        patches.Patch("layer.weight", lora, 1.0),
    ]
    with torch.no_grad():
        merged = patches.merge(patcher, both, 0.7)
        merged.patch_model()
        expected = patcher.model(x)
        merged.unpatch_model()
        alive = live.apply_live(patcher, both, 0.7)
        alive.patch_model()
        assert close(patcher.model(x), expected)
        alive.unpatch_model()
