"""Random factors, layers and files that the tests share. Every value comes from a seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loha_core import LoHaFactors

WIDTH, CONTEXT = 32, 768


def parts(
    shape: tuple[int, ...],
    rank: int = 2,
    *,
    tucker: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    alpha: float | None = 1.0,
    dora_axis: int | None = None,
) -> dict[str, Tensor]:
    """The tensors of one module for a weight (o, i, *k), named as in a LyCORIS file."""
    random = torch.Generator().manual_seed(seed)
    out, inner, *kernel = shape
    flat = torch.Size([inner, *kernel]).numel()
    found: dict[str, Tensor] = {}
    for h in (1, 2):
        sizes = {"a": (rank, out), "b": (rank, inner)} if tucker else {"a": (out, rank), "b": (rank, flat)}
        for side, size in sizes.items():
            found[f"hada_w{h}_{side}"] = torch.randn(size, generator=random).to(dtype)
        if tucker:
            found[f"hada_t{h}"] = torch.randn(rank, rank, *kernel, generator=random).to(dtype)
    if dora_axis is not None:
        size = [n if d == dora_axis else 1 for d, n in enumerate(shape)]
        found["dora_scale"] = (torch.rand(size, generator=random) + 0.5).to(dtype)
    if alpha is not None:
        found["alpha"] = torch.tensor(alpha, dtype=dtype)
    return found


def factors(shape: tuple[int, ...], rank: int = 2, **options) -> LoHaFactors:
    """The same as the value type."""
    found = {key.removeprefix("hada_"): tensor for key, tensor in parts(shape, rank, **options).items()}
    return LoHaFactors(**{"alpha": rank, **found})


def module(name: str, shape: tuple[int, ...], rank: int = 2, **options) -> dict[str, Tensor]:
    """The same under a module's name."""
    return {f"{name}.{key}": tensor for key, tensor in parts(shape, rank, **options).items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, dict(metadata or {}))
    return path


def write_peft(folder: Path, tensors: Mapping[str, Tensor], **config) -> Path:
    """A PEFT folder; ``config`` completes adapter_config.json."""
    write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 2} | config))
    return folder


def _at(prefix: str, separator: str = "_", **options) -> dict[str, Tensor]:
    """A projection, a cross-attention key and a convolution of a small UNet, in one spelling."""
    block = "down_blocks.0.attentions.0."
    layers = {
        f"{block}proj_in": (WIDTH, WIDTH),
        f"{block}transformer_blocks.0.attn2.to_k": (WIDTH, CONTEXT),
        "down_blocks.0.resnets.0.conv1": (WIDTH, WIDTH, 3, 3),
    }
    return {
        key: tensor
        for seed, (name, shape) in enumerate(layers.items())
        for key, tensor in module(prefix + name.replace(".", separator), shape, seed=seed, **options).items()
    }


def _text(prefix: str, separator: str = "_", seed: int = 7, **options) -> dict[str, Tensor]:
    name = "text_model.encoder.layers.0.self_attn.q_proj".replace(".", separator)
    return module(prefix + name, (WIDTH, WIDTH), seed=seed, **options)


def _four_dimensional(tensors: dict[str, Tensor], kernel: tuple[int, ...] = (3, 3)) -> dict[str, Tensor]:
    """Convolutions as OneTrainer writes them: w*_a (o, r, 1, 1), w*_b (r, i, *k)."""
    found = {}
    for key, tensor in tensors.items():
        if "conv" in key and key.endswith("_a"):
            tensor = tensor.reshape(*tensor.shape, *(1 for _ in kernel))
        elif "conv" in key and key.endswith("_b"):
            tensor = tensor.reshape(tensor.shape[0], -1, *kernel)
        found[key] = tensor
    return found


def dialects() -> dict[str, tuple[str, dict[str, Tensor], int]]:
    """case -> (dialect, a file's tensors, how many of its tensors are no LoHa)."""
    zeros = torch.zeros
    lora = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(WIDTH, 2),
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, WIDTH),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0),
    }
    lokr = {
        "lora_unet_mid_block_attentions_0_proj_out.lokr_w1": torch.ones(4, 4),
        "lora_unet_mid_block_attentions_0_proj_out.lokr_w2": torch.ones(8, 8),
        "lora_unet_mid_block_attentions_0_proj_out.alpha": torch.tensor(1.0),
    }
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    scalar = {"lora_unet_down_blocks_0_attentions_0_proj_in.scalar": torch.tensor(0.5)}
    onetrainer = _at("lora_transformer_") | {"bundle_emb.cat.clip_l": torch.ones(2, WIDTH)}
    no_alpha = {key: tensor for key, tensor in _at("lora_unet_").items() if not key.endswith(".alpha")}
    native = _at("diffusion_model.", ".") | {
        "diffusion_model.time_embed.0.diff": zeros(WIDTH, WIDTH),
        "diffusion_model.time_embed.0.diff_b": zeros(WIDTH),
    }
    return {
        "kohya SD1.5": ("lycoris", _at("lora_unet_") | _text("lora_te_"), 0),
        "kohya SDXL": ("lycoris", _at("lora_unet_") | _text("lora_te1_") | _text("lora_te2_", seed=8), 0),
        "kohya fp16": ("lycoris", _at("lora_unet_", dtype=torch.float16), 0),
        "kohya bf16": ("lycoris", _at("lora_unet_", dtype=torch.bfloat16), 0),
        "kohya DoRA, outputs": ("lycoris", _at("lora_unet_", dora_axis=0), 0),
        "kohya DoRA, inputs": ("lycoris", _at("lora_unet_", dora_axis=1), 0),
        "kohya without alpha": ("lycoris", no_alpha, 0),
        "kohya with scalar": ("lycoris", _at("lora_unet_") | scalar, 0),
        "kohya Tucker": ("lycoris", module("lora_unet_conv_in", (WIDTH, 4, 3, 3), tucker=True), 0),
        "kohya Tucker 3-D": ("lycoris", module("lora_unet_conv_in", (6, 4, 3, 2, 1), tucker=True), 0),
        "kohya with LoRA, LoKr, norms": (
            "lycoris",
            _at("lora_unet_") | lora | lokr | {f"{norm}.w_norm": zeros(WIDTH), f"{norm}.b_norm": zeros(WIDTH)},
            8,
        ),
        "standalone": ("lycoris-standalone", _at("lycoris_"), 0),
        "diffusers UNet": ("diffusers", _at("unet.", ".") | _text("text_encoder.", "."), 0),
        "diffusers DiT": ("diffusers", _at("transformer.", ".") | _text("text_encoder_2.", "."), 0),
        "diffusers bare": ("diffusers", _at("", "."), 0),
        "native": ("native", native, 2),
        "OneTrainer": ("onetrainer", onetrainer, 1),
        "OneTrainer 4-D": ("onetrainer", _four_dimensional(_at("lora_unet_")), 0),
        "OneTrainer 4-D, DiT": ("onetrainer", _four_dimensional(onetrainer), 1),
    }


DIALECTS = dialects()
WRAPPED = {f"base_model.model.{key}": tensor for key, tensor in _at("", ".", alpha=None).items()}
WRAPPED_TEXT = {f"base_model.model.{key}": tensor for key, tensor in _text("", ".", alpha=None).items()}
