"""A strength for each picture of a batch: one run of the model is as many single runs."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch

from loha_core import LoHaError, load_adapter

from . import reduced

STRENGTHS = (-0.5, 0.0, 0.3, 0.3, 0.7, 1.0)


@pytest.fixture(scope="module", params=("sd15", "sdxl"))
def models(request):
    return reduced.build(request.param)


@pytest.fixture(scope="module", params=("plain", "DoRA", "others"))
def adapter(request, models, tmp_path_factory):
    """For every layer: LoHas, flat and Tucker; with DoRA along either axis; or also biases and norms."""
    path, _ = reduced.write(models, "kohya-ldm", tmp_path_factory.mktemp("adapters"))
    adapter = load_adapter(path)
    if request.param == "plain":
        return adapter
    from safetensors.torch import load_file, save_file

    tensors, shapes = load_file(path), dict(reduced.layers(models))
    for n, ((label, key), shape) in enumerate(shapes.items()):
        if label == "CLIP":
            continue
        module = reduced.SPELLINGS["kohya-ldm"]("unet.", key, models)
        if request.param == "DoRA":
            if n % 3 < 2:
                size = [s if d == n % 3 else 1 for d, s in enumerate(shape)]
                tensors[f"{module}.dora_scale"] = torch.rand(size) + 0.5
        elif n % 2 and key.replace(".weight", ".bias") in models.model.model.state_dict():
            tensors[f"{module}.diff_b"] = torch.randn(shape[0]) * 0.1
    if request.param == "others":
        state = models.model.model.state_dict()
        for key, weight in state.items():
            if weight.dim() == 1 and key.endswith("weight") and "norm" in key:
                module = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
                tensors[f"{module}.w_norm"] = torch.randn(weight.shape) * 0.1
    save_file(tensors, path)
    return load_adapter(path)


def run(model, pictures: list[int], chunks: int = 2, options: dict | None = None) -> torch.Tensor:
    """One call of the model for some pictures of a batch, with as many stacked conditionings; (chunks, pictures, …)."""
    comfy.model_management.load_models_gpu([model])
    config = model.model.model_config.unet_config
    rng = torch.Generator().manual_seed(5)
    x, context = (
        torch.randn(len(STRENGTHS), 4, 8, 12, generator=rng),
        torch.randn(2, 77, config["context_dim"], generator=rng),
    )
    extra = {}
    if config["adm_in_channels"]:
        y = torch.randn(2, config["adm_in_channels"], generator=rng)
        extra["y"] = y[:chunks].repeat_interleave(len(pictures), 0)
    options = {"wrappers": model.wrappers, "cond_or_uncond": list(range(chunks)), **(options or {})}
    rows = chunks * len(pictures)
    with torch.inference_mode():
        out = model.model.apply_model(
            x[pictures].repeat(chunks, 1, 1, 1),
            torch.full((rows,), 3.0),
            c_crossattn=context[:chunks].repeat_interleave(len(pictures), 0),
            transformer_options=options,
            **extra,
        )
    return out.unflatten(0, (chunks, len(pictures)))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_batch_is_as_many_single_runs(modes, models, adapter, chunks):
    everyone = list(range(len(STRENGTHS)))
    together, _, report = modes.apply(models.model, None, adapter, STRENGTHS, 1.0)
    assert "mode: live" in report.text()
    found = run(together, everyone, chunks)
    for picture, strength in enumerate(STRENGTHS):
        alone, _, _ = modes.apply(models.model, None, adapter, strength, 1.0, mode="live")
        assert error(found[:, [picture]], run(alone, [picture], chunks)) < 1e-5
    assert error(found[:, [0]], run(models.model, [0], chunks)) > 1e-3


def test_lists_stack(modes, models, adapter):
    """Two lists, one strength for all, and a list by block."""
    model, alone = models.model, [models.model] * len(STRENGTHS)
    block = lambda key, name: (1.0,) * 3 + (0.5,) * 3 if "input_blocks" in key else 1.0  # noqa: E731
    for strength, blocks in ((STRENGTHS, None), (0.4, None), (tuple(reversed(STRENGTHS)), block)):
        model, _, _ = modes.apply(model, None, adapter, strength, 1.0, mode="live", blocks=blocks)
        for picture in range(len(STRENGTHS)):
            each = strength[picture] if isinstance(strength, tuple) else strength
            single = lambda key, name: b[picture] if isinstance(b := blocks(key, name), tuple) else b  # noqa: B023, E731
            alone[picture], _, _ = modes.apply(
                alone[picture], None, adapter, each, 1.0, mode="live", blocks=blocks and single
            )
    found = run(model, list(range(len(STRENGTHS))))
    for picture in (0, 3, 5):
        assert error(found[:, [picture]], run(alone[picture], [picture])) < 1e-5


def test_what_cannot_be_is_refused(modes, models, adapter):
    alive, _, _ = modes.apply(models.model, None, adapter, (0.1, 0.2, 0.3), 1.0)
    with pytest.raises(LoHaError, match="3 strengths or masks, one per picture, but a batch of 4"):
        run(alive, [0, 1, 2, 3])
    with pytest.raises(LoHaError, match="set mode to live"):
        modes.apply(models.model, None, adapter, (0.1, 0.2), 1.0, mode="merge")
    with pytest.raises(LoHaError, match="for 2 pictures meet some for 3"):
        modes.apply(models.model, None, adapter, (0.1, 0.2), 1.0, blocks=lambda key, name: (1.0, 0.5, 0.0))
    with pytest.raises(LoHaError, match="empty list"):
        modes.apply(models.model, None, adapter, (), 1.0)
    with pytest.raises(LoHaError, match="a strength for each picture has no single strength"):
        alive.clone().get_key_patches("diffusion_model.")
    assert modes.apply(models.model, None, adapter, (0.0, 0.0), 1.0)[0] is models.model
