"""A layer's weight, however it is kept: its logical shape, the values that act, and a place for a function on them.

The ways that are known: plain parameters in any floating dtype, which ComfyUI casts for each call; a weight beside
a scale (`scaled_fp8_ops`); ComfyUI's and comfy-kitchen's quantised tensors (fp8, nvfp4, mxfp8, int8, …); GGUF; and
bitsandbytes. Any other is refused with its class named.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ops
import comfy.utils
import torch
from torch import Tensor, nn

from loha_core import LoHaError

Function = Callable[[Tensor], Tensor]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PARAMETERS = ("weight", "bias")
_CASTERS = "forward_comfy_cast_weights"
# ComfyUI's layers that hand the very weight that acts, in the dtype of the computation, to their weight functions.
_PLAIN_CASTS = {
    vars(kind)[_CASTERS]
    for kind in vars(comfy.ops.disable_weight_init).values()
    if _CASTERS in getattr(kind, "__dict__", ())
}


# --- what a layer is -------------------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """W·x + b, whatever W is kept as: torch's and its descendants, and ComfyUI's quantised ones, which are neither."""
    if isinstance(module, nn.Linear):
        return True
    quantised = isinstance(module, comfy.ops.CastWeightBiasOp) and hasattr(module, _CASTERS)
    return quantised and hasattr(module, "in_features") and hasattr(module, "out_features")


def is_convolution(module: nn.Module) -> bool:
    """A convolution that does what its attributes say: its forward is torch's or ComfyUI's, not another class's."""
    known = type(module).forward.__module__ in ("torch.nn.modules.conv", comfy.ops.__name__)
    return isinstance(module, CONVOLUTIONS) and known


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of all that multiply by a weight, in the model's order."""
    for path, module in model.named_modules():
        if (is_linear(module) or is_convolution(module)) and getattr(module, "weight", None) is not None:
            yield path, module


def shape(module: nn.Module, parameter: str = "weight") -> tuple[int, ...]:
    """The logical shape, not that of what is stored."""
    m: Any = module
    if parameter == "weight" and is_linear(module):
        return (m.out_features, m.in_features)
    if parameter == "weight" and isinstance(module, CONVOLUTIONS):
        return (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
    tensor = getattr(module, parameter)
    return tuple(getattr(tensor, "tensor_shape", tensor.shape))  # GGUF's


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Key -> logical shape of all parameters and buffers; shared ones under each of their names."""
    result = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                result[f"{path}.{name}" if path else name] = shape(module, name)
    return result


def place(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """(module, parameter) of a weight's key."""
    path, _, parameter = key.rpartition(".")
    return comfy.utils.get_attr(model, path) if path else model, parameter


def kernel(module: nn.Module) -> int:
    """Elements of a convolution's kernel; 1 for linear layers."""
    return torch.Size(getattr(module, "kernel_size", ())).numel()


# --- what it multiplies by -------------------------------------------------------------------------------------------


def is_castable(module: nn.Module, parameter: str = "weight") -> bool:
    """Whether weight functions are given what acts, as they are by ComfyUI's plain layers."""
    caster = getattr(type(module), _CASTERS, None)
    return caster in _PLAIN_CASTS and parameter in _PARAMETERS and _is_plain(getattr(module, parameter))


def acts_as_stored(module: nn.Module) -> bool:
    """Whether the stored weight is what acts: not packed, no scale beside it, in a dtype that has arithmetic."""
    weight: Any = module.weight
    castable = is_castable(module) or type(module).__module__.startswith("torch.nn.")
    return castable and _is_plain(weight) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _is_plain(tensor: Tensor | None) -> bool:
    """Values as torch keeps them."""
    return tensor is not None and type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()


def why_not_dense(module: nn.Module, parameter: str = "weight") -> str | None:
    """Why a weight's values cannot be had, or None."""
    tensor = getattr(module, parameter, None)
    if _reader(module, tensor) is not None:
        return None
    stored = "no tensor" if tensor is None else f"a {type(tensor).__name__} of {tensor.dtype}, {tuple(tensor.shape)}"
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return f"a {kind} keeps its {parameter} as {stored}, in a way not known here"


def dense(
    module: nn.Module,
    parameter: str = "weight",
    *,
    device: torch.device | str | None = None,
    stored: Tensor | None = None,
    patched: bool = True,
) -> Tensor:
    """What the layer multiplies by, as a new float32 tensor of the logical shape.

    Args:
        stored: in place of what the layer holds, such as a patcher's backup of it.
        patched: with what ComfyUI merges into the weight as it is used (low VRAM, GGUF), else as it was loaded.

    Raises:
        LoHaError: it is kept in a way that is not understood; names the class.
    """
    tensor = getattr(module, parameter) if stored is None else stored
    read = _reader(module, tensor)
    if read is None:
        raise LoHaError(f"{why_not_dense(module, parameter)}; load this model unquantised, or in another format")
    device = tensor.device if device is None else torch.device(device)
    weight = read(tensor, device, patched).to(torch.float32)
    if patched:
        # As the layer itself does: on the values before their scale.
        for function in _pending(module, parameter):
            weight = function(weight)
            if _is_quantised(weight):
                weight = _dequantised(weight, device, patched)
    convert = getattr(module, f"convert_{parameter}", None)
    if convert is not None and not _is_quantised(tensor):
        weight = convert(weight, inplace=True)
    expected = shape(module, parameter)
    if weight.shape != expected:
        raise LoHaError(f"a {type(module).__name__}'s {parameter} is {tuple(weight.shape)}; expected {expected}")
    return weight


def _pending(module: nn.Module, parameter: str) -> list[Function]:
    """What ComfyUI's low and dynamic VRAM apply to a weight when it is used."""
    lowvram = getattr(module, f"{parameter}_lowvram_function", None)
    return [*([lowvram] if lowvram is not None else []), *getattr(module, f"{parameter}_function", ())]


Reader = Callable[[Tensor, torch.device, bool], Tensor]


def _reader(module: nn.Module, tensor: Tensor | None) -> Reader | None:
    """How to read a stored tensor: (tensor, device, patched) -> a copy of its values."""
    if tensor is None or tensor.device.type == "meta":
        return None
    if _is_quantised(tensor):
        return _dequantised
    if _is_gguf(module, tensor):
        return lambda stored, device, patched: _from_gguf(module, stored, device, patched)
    if getattr(tensor, "quant_state", None) is not None and "bitsandbytes" in sys.modules:
        return _from_bitsandbytes
    if _is_plain(tensor):
        return lambda stored, device, _: stored.detach().to(device, torch.float32, copy=True)
    return None


def is_packed(module: nn.Module) -> bool:
    """Whether the weight is ComfyUI's quantised tensor or GGUF's: not values as torch keeps them."""
    tensor: Any = module.weight
    return _is_quantised(tensor) or _is_gguf(module, tensor)


def _is_gguf(module: nn.Module, tensor: Tensor | None) -> bool:
    """city96's: packed bytes, and a layer that unpacks them."""
    return hasattr(tensor, "tensor_type") and hasattr(module, "get_weight")


def _is_quantised(tensor: Tensor | None) -> bool:
    """ComfyUI's QuantizedTensor, or that of comfy-kitchen, from which newer ComfyUI has it."""
    return hasattr(tensor, "_qdata")


def _dequantised(stored: Any, device: torch.device, _: bool) -> Tensor:
    """In float32 rather than in the dtype that it was quantised from."""
    moved = stored.detach().to(device)
    if hasattr(moved, "_params"):
        params = dataclasses.replace(moved._params, orig_dtype=torch.float32)
        return type(moved)(moved._qdata, moved._layout_cls, params).dequantize()  # type: ignore[no-any-return]
    params = {**moved._layout_params, "orig_dtype": torch.float32}
    return type(moved)(moved._qdata, moved._layout_type, params).dequantize()  # type: ignore[no-any-return]


def _from_gguf(module: Any, stored: Any, device: torch.device, patched: bool) -> Tensor:
    moved = stored.to(device, copy=True)
    if not patched:
        moved.patches = []
    values: Tensor = module.get_weight(moved, torch.float32)
    return torch.Tensor(values) if hasattr(values, "tensor_type") else values


def _from_bitsandbytes(stored: Any, device: torch.device, _: bool) -> Tensor:
    functional = sys.modules["bitsandbytes"].functional
    data, state = stored.data, stored.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # CPUs with bfloat16 products: packed anew at the first forward
        state, scales = copy.copy(state), state.absmax.T.float().flatten()
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
    values: Tensor = functional.dequantize_4bit(data, state)
    return values.to(device, torch.float32)


def why_not_merged(module: nn.Module, parameter: str) -> str | None:
    """Why ComfyUI cannot write an update into a stored weight, or None."""
    tensor = getattr(module, parameter, None)
    writes = _is_plain(tensor) or (_is_quantised(tensor) and hasattr(module, f"set_{parameter}"))
    if writes or _is_gguf(module, tensor):  # merged as it is unpacked
        return None
    if why := why_not_dense(module, parameter):
        return why
    return f"the packed {parameter} of a {type(module).__name__} cannot be written"


# --- acting on it ----------------------------------------------------------------------------------------------------


def add_function(module: nn.Module, parameter: str, function: Function) -> Callable[[], None]:
    """Let ``function`` act on what a castable layer multiplies by, whoever casts it; returns what removes it.

    What a function is given may be ComfyUI's resident weight itself (dynamic VRAM): it must not write to it.
    """
    name = f"{parameter}_function"
    setattr(module, name, [*getattr(module, name), function])

    def remove() -> None:
        setattr(module, name, [other for other in getattr(module, name) if other is not function])

    return remove


@contextmanager
def adapted(module: nn.Module, functions: Mapping[str, Function]) -> Iterator[None]:
    """While this lasts, parameter -> function act on what a castable layer multiplies by."""
    removals = [add_function(module, parameter, function) for parameter, function in functions.items()]
    try:
        yield
    finally:
        for remove in removals:
            remove()
