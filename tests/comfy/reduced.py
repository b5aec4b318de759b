"""SD1.5, SDXL, SD2 (v), SD3 and Flux, small, and adapters for all layers of the first two in every dialect.

Reduced in depth and width only: block structure, context widths and names are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from torch import Tensor

# What newer ComfyUI asks for besides.
FLUX_MORE = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "disable_self_attentions": None,
    "num_classes": None,
    "adm_in_channels": None,
    "dtype": torch.float32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": (1, 1, 2),
    "model_channels": 64,
}
_TEXT = {"num_hidden_layers": 3, "vocab_size": 512, "intermediate_size": 96}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "sd15": (
        comfy.supported_models.SD15,
        {
            "context_dim": 768,
            "use_linear_in_transformer": False,
            "transformer_depth": [1, 1, 0],
            "transformer_depth_output": [1, 1, 1, 1, 0, 0],
            "transformer_depth_middle": 1,
        },
    ),
    "sdxl": (
        comfy.supported_models.SDXL,
        {
            "context_dim": 2048,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "transformer_depth": [0, 1, 1],
            "transformer_depth_output": [0, 0, 1, 1, 1, 1],
            "transformer_depth_middle": 1,
        },
    ),
}
# For training: one of each way to predict that the two above lack.
MORE: dict[str, tuple[type, dict[str, Any]]] = {
    "sd2v": (
        comfy.supported_models.SD20,
        _UNET
        | {
            "context_dim": 1024,
            "use_linear_in_transformer": True,
            "transformer_depth": [1, 0, 0],
            "transformer_depth_output": [1, 1, 0, 0, 0, 0],
            "transformer_depth_middle": 1,
        },
    ),
    "sd3": (
        comfy.supported_models.SD3,
        {
            "input_size": None,
            "in_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "pos_embed_max_size": None,
            "num_patches": None,
            "adm_in_channels": 128,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 128},
            },
            "dtype": torch.float32,
        },
    ),
    "flux": (
        comfy.supported_models.Flux,
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 128,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [16, 24, 24],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            **FLUX_MORE,
            "dtype": torch.float32,
        },
    ),
}
_NARROW = {
    "sd15": {"context_dim": 64},
    "sdxl": {"context_dim": 128, "adm_in_channels": 64 + 6 * 256},
    "sd2v": {"context_dim": 64},
}
_SAYS_V = "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # ComfyUI tells SD2's prediction by how it varies


@dataclass
class Models:
    family: str
    model: Any  # ModelPatcher
    clip: Any  # comfy.sd.CLIP; None for Flux, whose T5 comes in one size

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"MODEL": self.model.model} | ({"CLIP": self.clip.cond_stage_model} if self.clip is not None else {})

    def weights(self) -> dict[tuple[str, str], Tensor]:
        """(MODEL or CLIP, key) -> a copy of every tensor."""
        return {(label, k): v.clone() for label, m in self.modules().items() for k, v in m.state_dict().items()}


def build(family: str, dtype: torch.dtype = torch.float32, *, narrow: bool = False) -> Models:
    """Random weights from a fixed seed, stored as ``dtype``, computing in float32.

    Args:
        narrow: the diffusion model is as wide as its small text encoders, so that they work together.
    """
    torch.manual_seed(0)
    config_class, options = MORE.get(family) or (FAMILIES[family][0], _UNET | FAMILIES[family][1])
    config = config_class(options | (_NARROW.get(family, {}) if narrow else {}))
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    unet = config.get_model({_SAYS_V: torch.tensor([-1.0, 1.0])}, "")
    cpu = torch.device("cpu")
    clip = None if family == "flux" else _text_encoders(family, config)
    for module in (unet.diffusion_model, *([clip.cond_stage_model] if clip else [])):
        for parameter in module.parameters():
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(dtype if parameter.dim() > 1 else torch.float32)
            parameter.requires_grad_(False)
    return Models(family, comfy.model_patcher.ModelPatcher(unet, load_device=cpu, offload_device=cpu), clip)


def _text_encoders(family: str, config: Any) -> Any:
    text = {"hidden_size": 64, "num_attention_heads": 4, **_TEXT}
    found = ("text_encoders.clip_l", "text_encoders.clip_g") if family == "sd3" else ()
    says = {f"{name}.transformer.text_model.final_layer_norm.weight": torch.ones(1) for name in found}
    small = {f"clip_{size}_model_config": text for size in "lgh"}
    return comfy.sd.CLIP(config.clip_target(says), model_options={**small, "dtype": torch.float32})


def layers(models: Models) -> dict[tuple[str, str], tuple[int, ...]]:
    """(MODEL or CLIP, key) -> shape of each linear and convolution weight that a trainer would adapt."""
    found = {}
    for label, module in models.modules().items():
        for name, child in module.named_modules():
            if isinstance(child, (torch.nn.Linear, torch.nn.Conv2d)) and "text_projection" not in name:
                found[label, f"{name}.weight"] = tuple(child.weight.shape)
    return found


def diffusers_names(models: Models) -> dict[tuple[str, str], str]:
    """(MODEL or CLIP, key) -> the module's name in diffusers, with its network in front."""
    unet = comfy.utils.unet_to_diffusers(models.model.model.model_config.unet_config)
    named = {}
    for path, native in unet.items():
        if path.endswith(".weight"):
            named["MODEL", f"diffusion_model.{native}"] = "unet." + path.removesuffix(".weight")
    for label, key in layers(models):
        if label == "CLIP":
            encoder, _, path = key.removesuffix(".weight").partition(".transformer.")
            named[label, key] = {"clip_l": "text_encoder.", "clip_g": "text_encoder_2."}[encoder] + path
    return named


# --- how each dialect spells a module's name --------------------------------------------------


def _kohya(name: str, key: str, models: Models) -> str:
    te1 = "lora_te_" if models.family == "sd15" else "lora_te1_"
    for network, prefix in (("unet.", "lora_unet_"), ("text_encoder.", te1), ("text_encoder_2.", "lora_te2_")):
        if name.startswith(network):
            return prefix + name.removeprefix(network).replace(".", "_")
    raise AssertionError(name)


def _kohya_ldm(name: str, key: str, models: Models) -> str:
    if not name.startswith("unet."):
        return _kohya(name, key, models)
    return "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def _standalone(name: str, key: str, models: Models) -> str:
    # A standalone file adapts one network and doesn't say which; text encoders keep kohya's names.
    return (
        "lycoris_" + name.removeprefix("unet.").replace(".", "_")
        if name.startswith("unet.")
        else _kohya(name, key, models)
    )


def _native(name: str, key: str, models: Models) -> str:
    key = key.removesuffix(".weight")
    return key if key.startswith("diffusion_model.") else f"text_encoders.{key}"


SPELLINGS: dict[str, Callable[[str, str, Models], str]] = {
    "kohya": _kohya,
    "kohya-ldm": _kohya_ldm,
    "lycoris-standalone": _standalone,
    "diffusers": lambda name, key, models: name,
    "native": _native,
    "onetrainer": _kohya,
    "peft": lambda name, key, models: name,
}


def random_layer(shape: tuple[int, ...], rank: int, dialect: str, *, tucker: bool = False) -> dict[str, Tensor]:
    """LoHa tensors for one weight, in a dialect's layout; the update has about the weight's size."""
    out, inner, kernel = shape[0], shape[1], shape[2:]
    r = lambda *size: torch.randn(*size)  # noqa: E731
    tensors: dict[str, Tensor] = {"alpha": torch.tensor(0.5 * rank)}
    for half in ("1", "2"):
        if tucker and kernel:
            tensors[f"hada_t{half}"] = r(rank, rank, *kernel) * 0.3
            tensors[f"hada_w{half}_a"], tensors[f"hada_w{half}_b"] = r(rank, out) * 0.3, r(rank, inner) * 0.3
        elif dialect == "onetrainer" and kernel:
            tensors[f"hada_w{half}_a"] = r(out, rank, 1, 1) * 0.3
            tensors[f"hada_w{half}_b"] = r(rank, inner, *kernel) * 0.3
        else:
            columns = inner * int(torch.tensor(kernel).prod()) if kernel else inner
            tensors[f"hada_w{half}_a"], tensors[f"hada_w{half}_b"] = r(out, rank) * 0.3, r(rank, columns) * 0.3
    return tensors


def delta64(tensors: dict[str, Tensor], shape: tuple[int, ...], scale: float | None = None) -> Tensor:
    """scale·ΔW in float64, written independently of loha_core; (o, i, *k)."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    rank = t["hada_w1_b"].shape[0]
    halves = []
    for half in ("1", "2"):
        a, b = t[f"hada_w{half}_a"], t[f"hada_w{half}_b"]
        if f"hada_t{half}" in t:
            halves.append(torch.einsum("pqyx,po,qi->oiyx", t[f"hada_t{half}"], a, b))
        else:
            halves.append(torch.einsum("or,rn->on", a.flatten(1), b.flatten(1)).reshape(shape))
    factor = float(t["alpha"]) / rank if scale is None else scale
    return halves[0] * halves[1] * factor


def write(models: Models, dialect: str, folder: Path, rank: int = 3) -> tuple[Path, dict[tuple[str, str], Tensor]]:
    """A file (PEFT: folder) in ``dialect`` for every layer, and the float64 update of each weight."""
    import json

    from safetensors.torch import save_file

    torch.manual_seed(1)
    names, wanted = diffusers_names(models), {}
    parts: dict[str, dict[str, Tensor]] = {}
    for (label, key), shape in layers(models).items():
        tensors = random_layer(
            shape, rank, dialect, tucker=dialect == "kohya" and "resblocks" not in key and len(shape) == 4
        )
        wanted[label, key] = delta64(tensors, shape)
        module = SPELLINGS[dialect](names[label, key], key, models)
        part = ""
        if dialect == "peft":
            part, _, module = module.partition(".")
            module = "base_model.model." + module
            tensors.pop("alpha")
        parts.setdefault(part, {}).update({f"{module}.{name}": tensor for name, tensor in tensors.items()})
    if dialect != "peft":
        path = folder / f"{models.family}-{dialect}.safetensors"
        save_file(parts[""], path)
        return path, wanted
    for part, tensors in parts.items():
        (folder / "peft" / part).mkdir(parents=True)
        save_file(tensors, folder / "peft" / part / "adapter_model.safetensors")
        config = {"peft_type": "LOHA", "r": rank, "alpha": 0.5 * rank}
        (folder / "peft" / part / "adapter_config.json").write_text(json.dumps(config))
    return folder / "peft", wanted
