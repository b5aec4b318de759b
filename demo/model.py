"""The demo's checkpoint: a Stable Diffusion 1.5 in ComfyUI's eyes, cut down to one level.

- UNet: SD1.5's 320 channels and 768-wide text context, one resolution, 18.4M parameters.
- Text encoder: CLIP-L at full size with its real tokenizer. Its weights are random but fixed:
  what the UNet needs is that each prompt has an embedding of its own, and a random transformer
  gives it that.
- VAE: a TAESD whose weights are written down here rather than learned. It encodes a 32×32
  picture as the 4×4×4 latents that `to_latents` makes of an 8×8 digit, and back, exactly.

Importing this module needs ComfyUI on the path: see `demo.comfyui.importable`.
"""

from collections.abc import Sequence
from pathlib import Path

import comfy.ops
import comfy.sd
import numpy as np
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1],
    "num_res_blocks": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": -1,  # a middle block of one residual block, no attention
    "transformer_depth_output": [0, 1],
    "num_heads": 8,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
PICTURE = 32
"""Width and height of the pictures, in pixels."""

# Latents are centred and scaled so that the data has mean 0 and standard deviation 1 in the
# model's space, which is ComfyUI's latent space times SD1.5's factor.
PIXEL_MEAN, PIXEL_STD = 0.30, 0.375
SD15_FACTOR = 0.18215

StateDict = dict[str, Tensor]


def to_latents(pictures: Tensor) -> Tensor:
    """Digits (n, 8, 8) in [0, 1] -> the model's latents (n, 4, 4, 4), one channel per pixel of a 2×2 cell."""
    return F.pixel_unshuffle((pictures[:, None] - PIXEL_MEAN) / PIXEL_STD, 2)


def alphas_cumprod() -> Tensor:
    """SD1.5's noise schedule ᾱ: (1000,) float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


# --- UNet ---------------------------------------------------------------------------------------


def new_unet(seed: int = 0) -> UNetModel:
    """ComfyUI's own UNet with `UNET`'s settings, freshly initialised: zero at the end of each
    residual branch and fan-in scaled elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    unet = UNetModel(**UNET, operations=comfy.ops.disable_weight_init)
    zero = ("out_layers.3.weight", "proj_out.weight", "out.2.weight")
    for name, parameter in unet.named_parameters():
        with torch.no_grad():
            if name.endswith(zero) or name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:  # scale of a norm
                parameter.fill_(1)
            else:
                std = parameter[0].numel() ** -0.5
                parameter.normal_(0, std, generator=generator)
    return unet


def save_int8(weights: StateDict, path: Path) -> None:
    """Store weights as int8 with one float32 scale per output channel; vectors stay float16."""
    packed: StateDict = {}
    for name, weight in weights.items():
        if weight.ndim < 2:
            packed[name] = weight.half().contiguous()
            continue
        scale = weight.float().flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
        rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
        packed[name] = (weight / rows).round().to(torch.int8).contiguous()
        packed[f"{name}.scale"] = scale
    save_file(packed, path)


def load_int8(path: Path) -> StateDict:
    """The float32 weights of a file that `save_int8` wrote."""
    packed = load_file(path)
    weights: StateDict = {}
    for name, weight in packed.items():
        if weight.dtype == torch.int8:
            scale = packed[f"{name}.scale"]
            weights[name] = weight.float() * scale.reshape(-1, *[1] * (weight.ndim - 1))
        elif not name.endswith(".scale"):
            weights[name] = weight.float()
    return weights


# --- text encoder -------------------------------------------------------------------------------


def clip_state_dict(seed: int = 1) -> StateDict:
    """Fixed random weights for CLIP-L's text model, float16.

    At CLIP's own scales of initialisation the embeddings of two of our prompts point the same way
    (cosine 0.87 at the digit's token). Larger token embeddings and smaller residual branches let
    each token keep its own direction (0.23).

    numpy's legacy generator is used because its stream is frozen for good: the UNet that ships
    with the demo was trained on exactly these embeddings.
    """
    width, layers = 768, 12
    random = np.random.RandomState(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.from_numpy((random.standard_normal(shape) * std).astype(np.float16))

    def linear(name: str, out: int, inner: int, std: float) -> None:
        weights[f"{name}.weight"] = normal(out, inner, std=std)
        weights[f"{name}.bias"] = torch.zeros(out, dtype=torch.float16)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = torch.ones(width, dtype=torch.float16)
        weights[f"{name}.bias"] = torch.zeros(width, dtype=torch.float16)

    weights: StateDict = {
        "text_model.embeddings.token_embedding.weight": normal(49408, width, std=0.2),
        "text_model.embeddings.position_embedding.weight": normal(77, width, std=0.01),
    }
    residual = 0.3 * (2 * layers * width) ** -0.5
    for layer in range(layers):
        block = f"text_model.encoder.layers.{layer}"
        norm(f"{block}.layer_norm1")
        norm(f"{block}.layer_norm2")
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear(f"{block}.self_attn.{projection}", width, width, width**-0.5)
        linear(f"{block}.self_attn.out_proj", width, width, residual)
        linear(f"{block}.mlp.fc1", 4 * width, width, (2 * width) ** -0.5)
        linear(f"{block}.mlp.fc2", width, 4 * width, residual)
    norm("text_model.final_layer_norm")
    return weights


@torch.inference_mode()
def encode_prompts(prompts: Sequence[str]) -> Tensor:
    """What ComfyUI's CLIPTextEncode gives for each prompt: (n, 77, 768) float32."""
    clip = comfy.sd.load_text_encoder_state_dicts([clip_state_dict()], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)
    conditionings = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in prompts]
    return torch.cat([conditioning[0][0].float() for conditioning in conditionings]).clone()


# --- VAE ----------------------------------------------------------------------------------------


def vae_state_dict() -> StateDict:
    """Weights that make ComfyUI's TAESD an exact space-to-depth and its inverse.

    Decoding must know whether a pixel is the left or the right one of its cell, which a
    convolution cannot see. It can see the border, where the padding is zero: a wave
    p(x) = 1 - p(x - 1) that starts there gives every pixel its parity after as many
    convolutions as the row is long. At 8×8 the decoder has nine to spend, so pictures may be
    up to 40 pixels wide.
    """
    weights: StateDict = {}

    def conv(name: str, out: int = 64, inner: int = 64, bias: bool = True) -> tuple[Tensor, Tensor]:
        weights[f"{name}.weight"] = torch.zeros(out, inner, 3, 3)
        offset = torch.zeros(out)
        if bias:
            weights[f"{name}.bias"] = offset
        return weights[f"{name}.weight"], offset

    def blocks(part: str, *indices: int) -> None:
        """Residual blocks that add nothing, hence pass on what is not negative."""
        for index in indices:
            for layer in (0, 2, 4):
                conv(f"{part}.{index}.conv.{layer}")

    cells = [(dy, dx) for dy in (0, 1) for dx in (0, 1)]
    linear_range = 0.05  # the decoder starts with 3·tanh(x/3): stay where it is the identity
    weights["vae_scale"] = torch.tensor(linear_range * SD15_FACTOR * PIXEL_STD)
    weights["vae_shift"] = torch.tensor(0.0)

    # Encoder: average 4×4 pixels to one, then give each of the 2×2 in a cell its channel.
    part = "taesd_encoder"
    blocks(part, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
    conv(f"{part}.0", inner=3)[0][0, :, 1, 1] = 1 / 3
    for index in (2, 6):
        conv(f"{part}.{index}", bias=False)[0][0, 0, 1:, 1:] = 1 / 4
    split, _ = conv(f"{part}.10", bias=False)
    last, offset = conv(f"{part}.14", out=4)
    for channel, (dy, dx) in enumerate(cells):
        split[channel, 0, 1 + dy, 1 + dx] = 1
        last[channel, channel, 1, 1] = linear_range
        offset[channel] = -linear_range * PIXEL_MEAN

    # Decoder. Channels 0-3: the cell's pixels; 4-7: what of them exceeds 1; 8: the constant 1;
    # 9, 10: parity of the column and the row (1 where even); 11, 12: their old values; 13: result.
    part = "taesd_decoder"
    one, column, row, old_column, old_row, result = 8, 9, 10, 11, 12, 13
    blocks(part, 3, 4, 5, 14, 15, 18)
    first, offset = conv(f"{part}.1", inner=4)
    for channel in range(4):
        for shift in (0, 1):
            first[channel + 4 * shift, channel, 1, 1] = 1 / linear_range
            offset[channel + 4 * shift] = PIXEL_MEAN - shift
    offset[one] = 1

    start, _ = conv(f"{part}.7", bias=False)  # after the first doubling: 8×8
    for channel in range(4):
        start[channel, channel, 1, 1] = 1
        start[channel, channel + 4, 1, 1] = -1  # clamp to [0, 1]
    for channel in (one, column, row):
        start[channel, one, 1, 1] = 1

    for index in (8, 9, 10):
        for layer in (0, 2, 4):
            wave, _ = conv(f"{part}.{index}.conv.{layer}")
            wave[column, one, 1, 1] = wave[row, one, 1, 1] = 1
            wave[column, column, 1, 0] = wave[row, row, 0, 1] = -1
            if layer == 4:  # the block adds its input again: take it off
                wave[column, old_column, 1, 1] = wave[row, old_row, 1, 1] = -1
            else:
                wave[one, one, 1, 1] = 1
                wave[old_column, old_column if layer else column, 1, 1] = 1
                wave[old_row, old_row if layer else row, 1, 1] = 1

    keep, _ = conv(f"{part}.12", bias=False)  # 16×16
    for channel in (0, 1, 2, 3, column, row):
        keep[channel, channel, 1, 1] = 1
    gate, offset = conv(f"{part}.13.conv.0")
    total, _ = conv(f"{part}.13.conv.2")
    for channel, (dy, dx) in enumerate(cells):
        # pixel + [row matches] + [column matches] - 2, then ReLU: the pixel where both match, else 0.
        gate[channel, channel, 1, 1] = 1
        gate[channel, row, 1, 1], gate[channel, column, 1, 1] = 1 - 2 * dy, 1 - 2 * dx
        offset[channel] = dy + dx - 2
        total[result, channel, 1, 1] = 1
    conv(f"{part}.13.conv.4")[0][result, result, 1, 1] = 1

    conv(f"{part}.17", bias=False)[0][0, result, 1, 1] = 1  # 32×32
    conv(f"{part}.19", out=3)[0][:, 0, 1, 1] = 1
    return weights


# --- checkpoint ---------------------------------------------------------------------------------


def save_checkpoint(unet: StateDict, path: Path, metadata: dict[str, str]) -> None:
    """Write the file that CheckpointLoaderSimple opens: UNet, text encoder and VAE."""
    parts = {
        "model.diffusion_model.": unet,
        "cond_stage_model.transformer.": clip_state_dict(),
        "first_stage_model.": vae_state_dict(),
    }
    tensors = {prefix + name: weight for prefix, part in parts.items() for name, weight in part.items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"modelspec.title": "Handwritten digits"} | metadata)
    temporary.replace(path)
