"""A model with FedPara layers in the place of plain ones, and what of it travels."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..errors import LoHaError, check_choice
from .init import DEFAULT_FAN, Fan
from .layers import Activation, FedParaConv, FedParaLayer, FedParaLinear
from .plan import CONVOLUTIONS, plan


def factorize(
    model: nn.Module,
    gamma: float = 0.1,
    *,
    rank: int | None = None,
    tucker: bool = True,
    personal: bool = False,
    activation: Activation | None = None,
    fan: Fan = DEFAULT_FAN,
    skip: Collection[str] = (),
) -> nn.Module:
    """Replace the weights of nn.Linear and nn.Conv1d, 2d and 3d by W = W₁∘W₂ with new values, in place.

    Biases and all other modules stay as they are. So does a layer whose factors would have more numbers than its
    weight, or, by gamma, no rank between r_min and r_max; `plan` shows which, before or after. The values come from
    torch's generator: ``torch.manual_seed`` gives the server and every client the same model.

    Args:
        gamma: r = (1 − γ)·r_min + γ·r_max for each layer, from 0 (the least rank at which W can have full rank) to 1
            (the most that still saves parameters).
        rank: the same for all layers, instead of gamma.
        tucker: factors of kernels of more than one element have Tucker cores (proposition 3); else the kernel is
            flattened (proposition 1).
        personal: pFedPara, W = W₁∘(W₂ + 1): W₁ is global, W₂ stays with a client.
        activation: "tanh" for W = tanh(W₁)∘tanh(W₂), or None.
        fan: of He's variance at the start, "in" or "out".
        skip: names of modules to leave as they are with all that is in them, or ends of names, as ``"head"``.

    Returns:
        The model; or, where the model itself is such a layer, the new layer.

    Raises:
        LoHaError: values that make no sense, no layer to factorize, or one that cannot be: a parametrized, tied,
            quantised, frozen or lazy weight, hooks, or a class of its own. Nothing is changed then.
    """
    if activation is not None:
        check_choice("activation", activation, ("tanh",))
        if personal:
            raise LoHaError("pFedPara's weights are W₁∘(W₂ + 1), without an activation; choose one of the two")
    check_choice("fan", fan, ("in", "out"))
    new: dict[int, nn.Module] = {}
    planned = plan(model, gamma, rank=rank, tucker=tucker, skip=skip)
    for layer in planned.layers:
        if layer.rank:
            plain = model.get_submodule(layer.name)
            kind = FedParaConv if isinstance(plain, CONVOLUTIONS) else FedParaLinear
            made = kind(plain, layer.rank, tucker=layer.tucker, personal=personal, activation=activation, fan=fan)
            new[id(plain)] = made.train(plain.training)
    if not new:
        raise LoHaError(
            f"none of {len(planned.layers)} linear layers and convolutions has fewer numbers as factors; "
            "the model is too small, rank is too large, or skip names them all"
        )
    return _replaced(model, new)


def dense(model: nn.Module) -> nn.Module:
    """The inverse of `factorize`, in place: plain layers whose weights are the products, exactly.

    Returns:
        The model; or, where the model itself is a FedPara layer, the plain one.

    Raises:
        LoHaError: there is no FedPara layer.
    """
    return _replaced(model, {id(layer): layer.dense() for _, layer in fedpara_layers(model)})


def global_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What travels, by its name in ``state_dict()``: all but `local_parameters`. The tensors are the model's own.

    Buffers that are saved and floating point (the running statistics of norms) belong to it; counters do not.
    """
    local = local_parameters(model)
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if name not in local and t.is_floating_point()}


def local_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What stays with a client: W₂'s factors in pFedPara's layers, by name. The tensors are the model's own."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(layer, name)
        for prefix, layer in model.named_modules()
        if isinstance(layer, FedParaLayer)
        for name in layer.local_names
    }


def fedpara_layers(model: nn.Module) -> list[tuple[str, FedParaLayer]]:
    """FedPara layers by name.

    Raises:
        LoHaError: there is none.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FedParaLayer)]
    if not layers:
        raise LoHaError("the model has no FedPara layer; factorize it first")
    return layers


def _replaced(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Everywhere in the tree, since a module may be at several places in it."""
    for module in list(model.modules()):
        for child, old in module._modules.items():
            if id(old) in new:
                setattr(module, child, new[id(old)])
    return new.get(id(model), model)
