"""Ways that a linear layer of ComfyUI holds its weight: the real classes where they can be had, doubles else.

A double behaves as the real one was seen to (ComfyUI 0.33.0, city96's ComfyUI-GGUF); where the ComfyUI under test is
new enough, or GGUF_PACK names the pack's folder, the real one takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy_kitchen.tensor as kitchen
import gguf
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CPU = torch.device("cpu")
IS_NEW = hasattr(comfy.quant_ops, "TensorWiseINT8Layout")  # ComfyUI with comfy-kitchen's tensors


@dataclass
class Base:
    """A layer, and what it multiplies by as its own format says, read without the code under test."""

    layer: nn.Module
    held: Tensor  # (o, i) float32
    patcher: type = comfy.model_patcher.ModelPatcher
    products: list[str] = field(default_factory=list)  # a line for each product in the base's own format


class Holder(nn.Module):
    """The least that ComfyUI's ModelPatcher takes for a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.device = layer, CPU

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def patcher_for(base: Base) -> Any:
    return base.patcher(Holder(base.layer), load_device=CPU, offload_device=CPU)


def _filled(layer: Any, weight: Tensor, bias: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.eval()  # type: ignore[no-any-return]


# --- what ComfyUI casts


def plain(weight: Tensor, bias: Tensor) -> Base:
    return Base(_filled(comfy.ops.disable_weight_init.Linear(*weight.shape[::-1]), weight, bias), weight.clone())


def torchs(weight: Tensor, bias: Tensor) -> Base:
    return Base(_filled(nn.Linear(*weight.shape[::-1]), weight, bias), weight.clone())


def cast(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Base]:
    def make(weight: Tensor, bias: Tensor) -> Base:
        layer = _filled(comfy.ops.manual_cast.Linear(*weight.shape[::-1]), weight, bias, dtype)
        return Base(layer, weight.to(dtype).float())

    return make


def fp8_ops(weight: Tensor, bias: Tensor) -> Base:
    """--fast: a product in fp8, for which a weight function's result would be rounded to fp8."""
    layer = _filled(comfy.ops.fp8_ops.Linear(*weight.shape[::-1]), weight, bias, torch.float8_e4m3fn)
    return Base(layer, weight.to(torch.float8_e4m3fn).float())


def scaled_fp8(weight: Tensor, bias: Tensor) -> Base:
    """0.3.75: an fp8 weight and a factor beside it."""
    scale = weight.abs().max() / 448
    layer = comfy.ops.scaled_fp8_ops().Linear(*weight.shape[::-1])
    _filled(layer, weight / scale, bias, torch.float8_e4m3fn)
    layer.scale_weight = nn.Parameter(scale.clone(), requires_grad=False)
    return Base(layer, layer.weight.float() * scale)


def resident(weight: Tensor, bias: Tensor) -> Base:
    """Dynamic VRAM: weight functions get the very tensor that stays on the GPU, call after call. See `as_resident`."""
    return plain(weight, bias)


@contextmanager
def as_resident(monkeypatch: Any) -> Iterator[None]:
    """ComfyUI's cast hands out what it has, as 0.33 does with pages that are in VRAM already."""

    def cast_bias_weight(s: Any, input: Any = None, *args: Any, offloadable: bool = False, **kwargs: Any) -> Any:
        weight, bias = s.weight.data, None if s.bias is None else s.bias.data
        for function in s.weight_function:
            weight = function(weight)
        for function in s.bias_function:
            bias = function(bias)
        more = (None, None, None) if IS_NEW else None
        return (weight, bias, more) if offloadable else (weight, bias)

    with monkeypatch.context() as patched:
        patched.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
        yield


# --- ComfyUI's quantised tensors

_LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
}


_EMULATED = {"mxfp8", "nvfp4"}  # no CPU has a product in these: ComfyUI dequantises


def quantised(form: str) -> Callable[[Tensor, Tensor], Base]:
    """`mixed_precision_ops.Linear` of ComfyUI 0.33, or a double of it around comfy-kitchen's own tensors."""

    def make(weight: Tensor, bias: Tensor) -> Base:
        out, inner = weight.shape
        if IS_NEW:
            layout = comfy.quant_ops.QUANT_ALGOS[form]["comfy_tensor_layout"]
            tensor = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **_options(form))
            conf = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
            ops = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=_EMULATED)
            layer = ops.Linear(inner, out)
            layer.load_state_dict({**tensor.state_dict("weight"), "bias": bias, "comfy_quant": conf}, strict=False)
        else:
            layer = QuantisedLinear(inner, out, form)
            layer.weight = nn.Parameter(
                kitchen.QuantizedTensor.from_float(weight, _LAYOUTS[form], **_options(form)), requires_grad=False
            )
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        held = layer.weight.dequantize().float()
        return _counted(Base(layer.eval(), held))

    return make


def _options(form: str) -> dict[str, Any]:
    return {"scale": "recalculate"} if IS_NEW and form.startswith("float8") else {}


def _counted(base: Base) -> Base:
    """Note the layer's products whose weight is still quantised. By its class, so that its own forward stays free."""
    real, kind = F.linear, type(base.layer)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if hasattr(weight, "_qdata"):
            base.products.append(type(x).__name__)
        return real(x, weight, bias)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        F.linear = linear
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            F.linear = real

    base.layer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return base


class QuantisedLinear(nn.Module, comfy.ops.CastWeightBiasOp):
    """As 0.33's: no nn.Linear; quantises its input and multiplies in the format, unless a weight function is there."""

    comfy_cast_weights = True

    def __init__(self, in_features: int, out_features: int, form: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.dequantize().to(x.dtype), self.bias.to(x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
        return F.linear(x, weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_function or self.bias_function or self.form in _EMULATED:
            return self.forward_comfy_cast_weights(x)
        if x.requires_grad:
            return _QuantisedProduct.apply(x, self.weight, self.bias)  # type: ignore[no-any-return]
        flat = kitchen.QuantizedTensor.from_float(x.flatten(0, -2), _LAYOUTS[self.form], **_options(self.form))
        return F.linear(flat, self.weight, self.bias).view(*x.shape[:-1], -1)

    def convert_weight(self, weight: Any, inplace: bool = False, **_: Any) -> Tensor:
        return weight.dequantize() if hasattr(weight, "_qdata") else weight  # type: ignore[no-any-return]

    def set_weight(
        self, weight: Tensor, inplace_update: bool = False, seed: Any = None, return_weight: bool = False
    ) -> Any:
        packed = kitchen.QuantizedTensor.from_float(weight.float(), _LAYOUTS[self.form], **_options(self.form))
        if return_weight:
            return packed
        self.weight = nn.Parameter(packed, requires_grad=False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **kwargs: Any) -> Any:
        found = {} if destination is None else destination
        found[f"{prefix}bias"] = self.bias
        found |= {f"{prefix}{name}": t for name, t in self.weight.state_dict("weight").items()}
        found[f"{prefix}comfy_quant"] = torch.tensor(list(self.form.encode()), dtype=torch.uint8)
        return found


class _QuantisedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g @ ctx.weight.dequantize(), None, None


def mixed_fp8(weight: Tensor, bias: Tensor) -> Base:
    """0.3.75's own mixed precision."""
    conf = {"layer": {"format": "float8_e4m3fn"}}
    scale = weight.abs().max() / 448
    layer = comfy.ops.mixed_precision_ops(conf, torch.float32, full_precision_mm=False).Linear(*weight.shape[::-1])
    stored = (weight / scale).to(torch.float8_e4m3fn)
    holder = nn.Module()
    holder.layer = layer
    holder.load_state_dict({"layer.weight": stored, "layer.weight_scale": scale, "layer.bias": bias}, strict=False)
    return Base(layer.eval(), stored.float() * scale)


# --- other packs


def _gguf_pack() -> Any:
    """city96's modules: real, from the folder that GGUF_PACK names, or None."""
    folder = os.environ.get("GGUF_PACK")
    if not folder:
        return None
    if "gguf_pack" not in sys.modules:
        import nodes  # ComfyUI's

        assert hasattr(nodes, "NODE_CLASS_MAPPINGS")
        init = Path(folder) / "__init__.py"
        spec = importlib.util.spec_from_file_location("gguf_pack", init, submodule_search_locations=[folder])
        assert spec is not None and spec.loader is not None
        sys.modules["gguf_pack"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["gguf_pack"])
    return sys.modules["gguf_pack"]


class GGMLTensor(Tensor):
    """Packed bytes that know the shape that they stand for."""

    tensor_type: Any
    tensor_shape: torch.Size
    patches: list[Any]

    @staticmethod
    def of(data: Tensor, kind: Any, shape: Any) -> GGMLTensor:
        made = data.as_subclass(GGMLTensor)
        made.tensor_type, made.tensor_shape, made.patches = kind, torch.Size(shape), []
        return made

    def to(self, *args: Any, **kwargs: Any) -> GGMLTensor:
        moved = super().to(*args, **kwargs)
        return _like(moved, self)

    def clone(self, *args: Any, **kwargs: Any) -> GGMLTensor:
        return self

    def detach(self) -> GGMLTensor:
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()


def _like(moved: Any, old: GGMLTensor) -> GGMLTensor:
    moved.tensor_type, moved.tensor_shape, moved.patches = old.tensor_type, old.tensor_shape, list(old.patches)
    return moved  # type: ignore[no-any-return]


class GGMLLinear(comfy.ops.manual_cast.Linear):
    """Unpacks for each call, merges the patches that hang on its tensor, and asks no weight functions."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features

    def get_weight(self, tensor: Any, dtype: torch.dtype) -> Tensor:
        values = gguf.quants.dequantize(tensor.as_subclass(Tensor).numpy(), tensor.tensor_type)
        weight = torch.from_numpy(values).to(dtype).reshape(tensor.tensor_shape)
        for patches, key in tensor.patches:
            weight = comfy.lora.calculate_weight(patches, weight, key)
        return weight

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_weight(self.weight, x.dtype), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = torch.zeros(self.weight.size(), device="meta")
        destination[f"{prefix}bias"] = torch.zeros(self.bias.size(), device="meta")


class GGMLPatcher(comfy.model_patcher.ModelPatcher):
    """Always merges, by hanging patches on tensors; sets the class of its clones last of all."""

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key not in self.patches:
            return None
        weight = comfy.utils.get_attr(self.model, key)
        if not hasattr(weight, "tensor_type"):
            return super().patch_weight_to_device(key, *args, **kwargs)
        moved = weight.to(CPU)
        moved.patches = [(self.patches[key], key)]
        comfy.utils.set_attr_param(self.model, key, moved)

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        if unpatch_weights:
            for parameter in self.model.parameters():
                if getattr(parameter, "patches", None):
                    parameter.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args: Any, force_patch_weights: bool = False, **kwargs: Any) -> Any:
        return super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.__class__
        self.__class__ = GGMLPatcher
        clone = super().clone(*args, **kwargs)
        clone.__class__ = GGMLPatcher
        self.__class__ = mine
        return clone


def gguf_of(kind: str) -> Callable[[Tensor, Tensor], Base]:
    def make(weight: Tensor, bias: Tensor) -> Base:
        quantisation = getattr(gguf.GGMLQuantizationType, kind)
        packed = gguf.quants.quantize(weight.numpy(), quantisation)
        held = torch.from_numpy(gguf.quants.dequantize(packed, quantisation).copy()).reshape(weight.shape)
        data = torch.from_numpy(packed)
        if pack := _gguf_pack():
            ops, nodes = sys.modules["gguf_pack.ops"], sys.modules["gguf_pack.nodes"]
            layer = ops.GGMLOps.Linear(*weight.shape[::-1])
            stored = ops.GGMLTensor(data, tensor_type=quantisation, tensor_shape=weight.shape)
            patcher = nodes.GGUFModelPatcher
            assert pack
        else:
            layer, patcher = GGMLLinear(*weight.shape[::-1]), GGMLPatcher
            stored = GGMLTensor.of(data, quantisation, weight.shape)
        layer.weight = nn.Parameter(stored, requires_grad=False)
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return Base(layer.eval(), held, patcher)

    return make


def nf4(weight: Tensor, bias: Tensor) -> Base:
    """bitsandbytes' own layer."""
    layer = bitsandbytes.nn.Linear4bit(*weight.shape[::-1], compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer = layer.to(CPU).requires_grad_(False).eval()
    layer.support_avx512bf16_for_cpu = False  # such CPUs pack the weight anew at its first forward, with other scales
    held = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return Base(layer, held)


BASES: dict[str, Callable[[Tensor, Tensor], Base]] = {
    "plain": plain,
    "torch's own": torchs,
    "cast bf16": cast(torch.bfloat16),
    "cast fp8": cast(torch.float8_e4m3fn),
    "resident": resident,
    "fp8_ops": fp8_ops,
    **({"scaled fp8": scaled_fp8} if hasattr(comfy.ops, "scaled_fp8_ops") else {}),
    **({} if IS_NEW else {"mixed fp8 (0.3.75)": mixed_fp8}),
    "fp8": quantised("float8_e4m3fn"),
    "nvfp4": quantised("nvfp4"),
    "mxfp8": quantised("mxfp8"),
    "int8": quantised("int8_tensorwise"),
    "GGUF Q8_0": gguf_of("Q8_0"),
    "GGUF Q4_0": gguf_of("Q4_0"),
    "GGUF BF16": gguf_of("BF16"),
    "GGUF F16": gguf_of("F16"),
    "NF4": nf4,
}
