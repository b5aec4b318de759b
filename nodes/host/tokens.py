"""Where a model's layers have the cells of the picture: which stream a layer sees, and where its tokens lie.

Known by the class of the diffusion model: a layer of a class, or a class, that is not here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from loha_core import LoHaError

from .regions import Region
from .updates import SamplingCall


class Stream(Enum):
    """What the tokens that a layer sees are."""

    IMAGE = "the picture's"
    PLACELESS = "text, the time or another thing without a place"
    TEXT_IMAGE = "text, then the picture's"
    IMAGE_TEXT = "the picture's, then text"


@dataclass(frozen=True)
class Layout:
    """Of one model.

    Attributes:
        name: of the model's class.
        streams: (regular expression of a layer's whole path, what it sees), the first that fits.
        patch: how many frames, rows and columns of the latents are a token; None for a U-Net, which halves again and
            again.
        more_text: tokens that the model puts in front of the text.
        multiple: of which the numbers of text and of image tokens are made, by padding after them.
        any_text: how much text there is beside the picture cannot be known before.
        references: names of ``apply_model``'s inputs whose tokens follow the picture's.
        refused: names of inputs that put tokens elsewhere.
    """

    name: str
    streams: tuple[tuple[str, Stream], ...]
    patch: tuple[int, int, int] | None
    more_text: int = 0
    multiple: int = 1
    any_text: bool = False
    references: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()

    def stream(self, path: str) -> Stream:
        """What the layer at ``path`` in the diffusion model sees.

        Raises:
            LoHaError: it is not known.
        """
        for pattern, stream in self.streams:
            if re.fullmatch(pattern, path):
                return stream
        raise LoHaError(
            f"{path}: what this layer of a {self.name} sees is not known, so a region cannot act on it; {_LESS}"
        )

    def gain(
        self,
        path: str,
        stream: Stream,
        region: Region,
        call: SamplingCall,
        shape: tuple[int, ...],
        device: torch.device,
        *,
        channels_first: bool,
    ) -> Tensor:
        """What multiplies an update of a layer's output of this shape; broadcasts to it, float32.

        Raises:
            LoHaError: the output's tokens are not those of the latents that are sampled.
        """
        layout = (self.name, self.patch, self.more_text, self.multiple)
        asked = (call.shape, call.chunks, call.context, call.inputs, call.whole)
        key = (layout, stream, asked, shape, channels_first, device)
        if key not in region.kept:
            made = self._gain(path, stream, region, call, shape, channels_first)
            if len(made) > 1:
                made = made.repeat(call.chunks, *[1] * (made.dim() - 1))
            region.keep(key, made.to(device))
        return region.kept[key]

    def _gain(
        self,
        path: str,
        stream: Stream,
        region: Region,
        call: SamplingCall,
        shape: tuple[int, ...],
        channels_first: bool,
    ) -> Tensor:
        self._check(call)
        frames, latent = _frames_of(call.shape), (call.shape[-2], call.shape[-1])
        if channels_first:
            return self._on_grid(path, region, latent, shape)
        if len(shape) == 2:
            raise LoHaError(f"{path}: its output is {shape}, which has no tokens; {_LESS}")
        if self.patch is None:
            return self._on_level(path, region, latent, shape)
        cells = region.cells(latent, [self.patch[1:]])
        frames = -(-frames // self.patch[0])
        grid = (frames, *cells.shape[1:])
        if shape[1:-1] == grid:
            return cells[:, None].expand(-1, frames, -1, -1)[..., None]
        image = cells.flatten(1).repeat(1, frames)
        return _placed(self._row(path, stream, region, call, image, shape), shape)

    def _check(self, call: SamplingCall) -> None:
        if not call.shape:
            raise LoHaError(f"a layer with a region runs outside of a call of the diffusion model by ComfyUI; {_LESS}")
        if call.whole and call.whole[2:] != call.shape[2:]:
            raise LoHaError(
                f"the sampler's latents are {call.whole}, but the model is called with {call.shape}: an area of a "
                f"conditioning, a tile or a context window, for which a region has no mask; {_LESS}"
            )
        if found := sorted(self.refused & call.inputs):
            raise LoHaError(f"with {', '.join(found)} the tokens of a {self.name} lie elsewhere; {_LESS}")

    def _on_grid(self, path: str, region: Region, latent: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        """(n, 1, h, w) or, of videos, (n, 1, 1, h, w)."""
        for cells in self._grids(region, latent):
            if tuple(cells.shape[1:]) == shape[-2:]:
                return cells.reshape(len(cells), *[1] * (len(shape) - 3), *cells.shape[1:])
        raise LoHaError(
            f"{path}: its output is {shape}, which is no grid of latents of {latent} in a {self.name}; {_LESS}"
        )

    def _on_level(self, path: str, region: Region, latent: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
        for cells in self._grids(region, latent):
            if shape[1] == prod(cells.shape[1:]):
                return cells.flatten(1)[..., None] if len(shape) == 3 else _placed(cells.flatten(1), shape)
        raise LoHaError(f"{path}: its {shape[1]} tokens are no grid of latents of {latent} in a {self.name}; {_LESS}")

    def _grids(self, region: Region, latent: tuple[int, int]) -> list[Tensor]:
        if self.patch is not None:
            return [region.cells(latent, [self.patch[1:]])]
        grids = [region.cells(latent, [])]
        while max(grids[-1].shape[1:]) > 1:
            grids.append(region.cells(latent, [(2, 2)] * len(grids)))
        return grids

    def _row(
        self, path: str, stream: Stream, region: Region, call: SamplingCall, image: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        """(n, tokens): of the whole sequence."""
        n, count = image.shape
        placeless = torch.tensor([region.placeless_gain(picture) for picture in range(n)])[:, None]
        padded = -(-count // self.multiple) * self.multiple
        parts = [image, placeless.expand(n, padded - count)]
        total = padded
        found = shape[1]
        if stream is Stream.TEXT_IMAGE:
            text = -(-call.context // self.multiple) * self.multiple + self.more_text
            text = max(0, found - padded) if self.any_text else text
            parts, total = [placeless.expand(n, text), *parts], text + padded
        if len(shape) == 4 and shape[2] in (total, count):
            found = shape[2]
        if stream is Stream.IMAGE and found == count:
            return image
        more = found - total
        if more > 0 and stream is Stream.IMAGE_TEXT and self.any_text:
            parts.append(placeless.expand(n, more))
        elif more > 0 and self.references & call.inputs:
            parts.append(torch.zeros(n, more))
        elif more != 0:
            raise LoHaError(
                f"{path}: {found} tokens where a {self.name} has {total} for latents of {call.shape[2:]}: something "
                f"adds tokens or merges them; {_LESS}"
            )
        return torch.cat(parts, dim=1)


_LESS = "give the LoHa node no region here"


def _frames_of(latents: tuple[int, ...]) -> int:
    return latents[2] if len(latents) == 5 else 1


def _placed(row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, tokens) so that it broadcasts to an output: (b, tokens, …), or (b, heads, tokens, …)."""
    if shape[1] == row.shape[1] and not (len(shape) == 4 and shape[2] == row.shape[1]):
        return row.reshape(*row.shape, *[1] * (len(shape) - 2))
    if len(shape) == 4 and shape[2] == row.shape[1] != shape[1]:
        return row.reshape(len(row), 1, -1, 1)
    raise LoHaError(f"which axis of an output of {shape} are its {row.shape[1]} tokens cannot be told; {_LESS}")


# --- the models ------------------------------------------------------------------------------------------------------

_I, _P, _TI, _IT = Stream.IMAGE, Stream.PLACELESS, Stream.TEXT_IMAGE, Stream.IMAGE_TEXT

_FLUX = (
    (r"(time_in|vector_in|guidance_in|txt_in|distilled_guidance_layer)(\..*)?", _P),
    (r".*(_mod|modulation|modulation_img|modulation_txt)\b.*", _P),
    (r"double_blocks\.\d+\.txt_.*", _P),
    (r"img_in|double_blocks\.\d+\.img_.*|final_layer\.linear", _I),
    (r"single_blocks\.\d+\..*", _TI),
)
_MMDIT = (
    (r"(t_embedder|y_embedder|context_embedder|context_processor)(\..*)?|.*\.(adaLN_modulation|context_block)\..*", _P),
    (r"x_embedder\.proj|joint_blocks\.\d+\.x_block\..*|final_layer\.linear", _I),
)
_QWEN = (
    (r"time_text_embed\..*|txt_norm|txt_in|norm_out\.linear|.*\.(img_mod|txt_mod|txt_mlp)\..*", _P),
    (r".*\.attn\.(add_[qkv]_proj|norm_added_[qk]|to_add_out)", _P),
    (r"img_in|proj_out|transformer_blocks\.\d+\.(img_mlp\..*|attn\.(to_[qkv]|norm_[qk]|to_out\.0))", _I),
)
_WAN = (
    (r"(time_embedding|time_projection|text_embedding|img_emb|ref_conv)(\..*)?", _P),
    (r"blocks\.\d+\.cross_attn\.(k|v|k_img|v_img|norm_k|norm_k_img)", _P),
    (r"patch_embedding|head\.head|blocks\.\d+\.(self_attn\..*|cross_attn\.(q|o|norm_q)|ffn\..*|norm3)", _I),
)
_HUNYUAN = (
    (r"(time_in|time_r_in|vector_in|guidance_in|txt_in|byt5_in|vision_in|cond_type_embedding)(\..*)?", _P),
    (r".*(_mod|modulation)\b.*", _P),
    (r"double_blocks\.\d+\.txt_.*", _P),
    (r"img_in\.proj|double_blocks\.\d+\.img_.*|final_layer\.linear", _I),
    (r"single_blocks\.\d+\..*", _TI),
)
_LUMINA = (
    (r"(cap_embedder|context_refiner|t_embedder|time_text_embed|clip_text_pooled_proj)(\..*)?", _P),
    (r".*\.adaLN_modulation\..*", _P),
    (r"x_embedder|noise_refiner\.\d+\..*", _I),
    (r"layers\.\d+\..*|final_layer\.linear", _TI),
)
_AURA = (
    (r"(cond_seq_linear|t_embedder|modF)(\..*)?|.*\.(modC|modX|modCX|mlpC)\..*", _P),
    (r"double_layers\.\d+\.attn\.(w1.|k_norm1|q_norm1)", _P),
    (r"init_x_linear|final_linear|double_layers\.\d+\.(mlpX\..*|attn\.(w2.|k_norm2|q_norm2))", _I),
    (r"single_layers\.\d+\.(attn|mlp)\..*", _TI),
)
_PIXART = (
    (r"(t_embedder|t_block|csize_embedder|ar_embedder|y_embedder)(\..*)?|blocks\.\d+\.cross_attn\.kv_linear", _P),
    (r"x_embedder\.proj|final_layer\.linear|blocks\.\d+\.(attn\.(qkv|proj)|mlp\..*|cross_attn\.(q_linear|proj))", _I),
)
_LTXV = (
    (r"(adaln_single|caption_projection)(\..*)?|transformer_blocks\.\d+\.attn2\.(to_k|to_v|k_norm)", _P),
    (r"patchify_proj|proj_out|transformer_blocks\.\d+\.(attn1\..*|attn2\.(to_q|q_norm|to_out\.0)|ff\..*)", _I),
)
_COSMOS = (
    (r"(t_embedder|t_embedding_norm|llm_adapter)(\..*)?|.*\.?adaln_modulation\w*\..*", _P),
    (r"blocks\.\d+\.cross_attn\.(k_proj|v_proj|k_norm|v_norm)", _P),
    (
        r"x_embedder\.proj\.1|final_layer\.linear|blocks\.\d+\.(self_attn\..*|mlp\..*|cross_attn\.(q_proj|q_norm|output_proj))",
        _I,
    ),
)
_UNET = (
    (r"(time_embed|label_emb)\..*|.*\.emb_layers\..*|.*\.attn2\.(to_k|to_v)", _P),
    (r"(?!.*time_)(input_blocks|middle_block|output_blocks|out)\..*", _I),
)


def _square(model: Any) -> tuple[int, int, int]:
    return (1, model.patch_size, model.patch_size)


def _last_three(model: Any) -> tuple[int, int, int]:
    return tuple([1, *model.patch_size][-3:])  # type: ignore[return-value]


def _flux(name: str, m: Any) -> Layout:
    return Layout(name, _FLUX, _square(m), references=frozenset({"ref_latents"}))


def _hunyuan(name: str, m: Any) -> Layout:
    streams: tuple[tuple[str, Stream], ...] = _HUNYUAN
    if getattr(m.double_blocks[0], "flipped_img_txt", False):  # until ComfyUI turned them round
        streams = tuple((path, _IT if stream is _TI else stream) for path, stream in _HUNYUAN)
    return Layout(name, streams, _last_three(m), any_text=True, refused=frozenset({"ref_latent"}))


_KNOWN: dict[str, Callable[[str, Any], Layout]] = {
    "modules.diffusionmodules.openaimodel.UNetModel": lambda name, m: Layout(name, _UNET, None),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": lambda name, m: Layout(name, _MMDIT, _square(m)),
    "flux.model.Flux": _flux,
    "chroma.model.Chroma": _flux,
    "qwen_image.model.QwenImageTransformer2DModel": lambda name, m: Layout(
        name, _QWEN, _square(m), references=frozenset({"ref_latents"})
    ),
    "wan.model.WanModel": lambda name, m: Layout(
        name, _WAN, _last_three(m), refused=frozenset({"reference_latent", "time_dim_concat"})
    ),
    "hunyuan_video.model.HunyuanVideo": _hunyuan,
    "lumina.model.NextDiT": lambda name, m: Layout(
        name, _LUMINA, _square(m), multiple=m.pad_tokens_multiple or 1,
        refused=frozenset({"ref_latents", "ref_contexts", "siglip_feats"}),
    ),
    "aura.mmdit.MMDiT": lambda name, m: Layout(name, _AURA, _square(m), more_text=m.register_tokens.shape[1]),
    "pixart.pixartms.PixArtMS": lambda name, m: Layout(name, _PIXART, _square(m)),
    "lightricks.model.LTXVModel": lambda name, m: Layout(name, _LTXV, (1, 1, 1)),
    "cosmos.predict2.MiniTrainDIT": lambda name, m: Layout(
        name, _COSMOS, (m.patch_temporal, m.patch_spatial, m.patch_spatial)
    ),
    "anima.model.Anima": lambda name, m: Layout(name, _COSMOS, (m.patch_temporal, m.patch_spatial, m.patch_spatial)),
}  # fmt: skip


def layout_of(model: nn.Module) -> Layout:
    """Where the tokens of a ComfyUI model lie.

    Raises:
        LoHaError: its diffusion model's class is not known.
    """
    network = getattr(model, "diffusion_model", None)
    if network is None:
        raise LoHaError(f"a {type(model).__name__} has no diffusion model, so no region can act on it")
    network = getattr(network, "_orig_mod", network)  # torch.compile's
    kind = type(network)
    known = _KNOWN.get(f"{kind.__module__}.{kind.__name__}".removeprefix("comfy.ldm."))
    if known is None:
        raise LoHaError(
            f"a region cannot act on a {kind.__module__}.{kind.__name__}: where its tokens lie in the picture is not "
            "known here; remove the region from the LoHa node"
        )
    return known(kind.__name__, network)


def count_seeing(model: nn.Module, keys: Iterable[str]) -> int:
    """How many of these weights of a ComfyUI model are of layers that see the picture.

    Raises:
        LoHaError: as `layout_of` and `Layout.stream`.
    """
    layout = layout_of(model)
    streams = [layout.stream(path_of(key.rpartition(".")[0])) for key in keys]
    return sum(stream is not Stream.PLACELESS for stream in streams)


def path_of(path: str) -> str:
    """A layer's path within the diffusion model."""
    return path.removeprefix("diffusion_model.").removeprefix("_orig_mod.")
