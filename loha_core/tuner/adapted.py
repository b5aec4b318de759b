"""A model in whose tree LoHa layers lie: adding adapters, choosing among them, merging them."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LoHaError
from ..factors import LoHaFactors
from . import inject, targets
from .config import LoHaConfig
from .layers import LoHaLayer
from .saved_modules import SavedModule
from .state import tensors

# Methods of Hugging Face's models that would act on the wrapped model and leave the adapter out.
_OF_THE_BASE_ALONE = frozenset("enable_adapters disable_adapters set_adapters load_lora_adapter".split())


class _BoundForward:
    """A model's forward with the signature of its base's, in which trainers look for columns and labels."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._model.model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model.model(*args, **kwargs)


class _Forward:
    """`forward` of a class whose instances have a signature each."""

    def __get__(self, model: AdaptedModel | None, owner: type) -> Any:
        return _forward if model is None else _BoundForward(model)


def _forward(model: AdaptedModel, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
    """The base's forward. ``labels`` is named because transformers' Trainer looks for it in the class."""
    return model.model(*args, **kwargs if labels is None else kwargs | {"labels": labels})


class AdaptedModel(nn.Module):
    """What `LoHaModel` does with the layers; what that puts around it is files, arithmetic and PEFT's names."""

    model: nn.Module
    peft_config: dict[str, LoHaConfig]

    def _begin(self, model: nn.Module, active: list[str]) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.peft_config = {}
        self.targeted_module_names: list[str] = []
        self._active = active
        # transformers warns of the second name since it has the first.
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        if next((getattr(model, name) for name in names if hasattr(model, name)), False):
            self.prepare_model_for_gradient_checkpointing()

    forward: Any = _Forward()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__") or name in _OF_THE_BASE_ALONE:
                raise
            return getattr(self.model, name)

    @property
    def base_model(self) -> AdaptedModel:
        """What holds the adapters, as PEFT's models have it."""
        return self

    def get_base_model(self) -> nn.Module:
        """The wrapped model, with the layers in it."""
        return self.model

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The adapters, modules_to_save and what else trains; all of it, as torch does, where another module asks."""
        state = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return tensors.without_base(self, state, prefix) if destination is None else state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of `state_dict`; what is there of the base is loaded, too.

        Returns:
            missing_keys, of the adapters, and unexpected_keys.

        Raises:
            LoHaError: with ``strict``, keys that are missing or unexpected.
        """
        result: Any = super().load_state_dict(state_dict, strict=False, assign=assign)
        result.missing_keys[:] = tensors.of_adapters(result.missing_keys)
        if strict and any(result):
            raise LoHaError(f"the state misses {result.missing_keys} and has {result.unexpected_keys} in excess")
        return result

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module | None = None) -> None:
        """Let embeddings ask for gradients, without which reentrant checkpoints pass none on to the adapters.

        Args:
            model: PEFT has its callers pass the model again; it is this one in any case.
        """
        base: Any = self.model
        if hasattr(base, "enable_input_require_grads"):
            base.enable_input_require_grads()
        elif hasattr(base, "get_input_embeddings"):
            base.get_input_embeddings().register_forward_hook(_require_gradients)

    # Layers

    def loha_layers(self) -> Iterator[tuple[str, LoHaLayer]]:
        """(module name in the wrapped model, layer)."""
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, LoHaLayer))

    def _saved_modules(self) -> Iterator[tuple[str, SavedModule]]:
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, SavedModule))

    def _switches(self) -> list[LoHaLayer | SavedModule]:
        return [*(layer for _, layer in self.loha_layers()), *(module for _, module in self._saved_modules())]

    # Adding

    def add_adapter(
        self,
        adapter_name: str,
        config: LoHaConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """One more adapter. It is not active until `set_adapter` says so; see `LoHaModel` for the arguments."""
        config = copy.deepcopy(LoHaConfig.of(config))
        names = targets.select(self.model, config)
        inject.warn_unmatched_patterns(config, names)

        def adding(name: str) -> inject.Add:
            rank, alpha = config.resolved(name)
            return lambda layer: layer.update_layer(adapter_name, rank, alpha, config)

        self._inject(adapter_name, config, {name: adding(name) for name in names}, low_cpu_mem_usage)
        if not autocast_adapter_dtype:
            self._cast_adapter(adapter_name)

    def _add_by_factors(self, adapter_name: str, config: LoHaConfig, layers: dict[str, LoHaFactors]) -> None:
        def adding(factors: LoHaFactors) -> inject.Add:
            return lambda layer: layer.add_factors(adapter_name, factors, config)

        self._inject(adapter_name, config, {name: adding(f) for name, f in layers.items()}, False)

    def _inject(self, adapter_name: str, config: LoHaConfig, adding: dict[str, inject.Add], on_meta: bool) -> None:
        if adapter_name in self.peft_config:
            raise LoHaError(f"there is an adapter {adapter_name!r} already; choose another name or delete it first")
        # Everything that can be refused is refused here, before the model changes.
        try:
            new = inject.new_modules(self.model, adding, config, self._active, on_meta)
        except Exception:
            for _, layer in self.loha_layers():
                layer.forget(adapter_name)
            raise
        if not self.peft_config:
            self.model.requires_grad_(False)
        for name, module in new.items():
            inject.replace_module(self.model, name, module)
        for name, saved in self._saved_modules():
            if name.endswith(tuple(config.modules_to_save or ())):
                saved.add(adapter_name, config.inference_mode)
                saved.set_adapter(self.active_adapters, config.inference_mode)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        self.peft_config[adapter_name] = config
        self.targeted_module_names += [name for name in adding if name not in self.targeted_module_names]

    def _cast_adapter(self, adapter_name: str) -> None:
        """An adapter's parameters in their base layer's dtype, where that is one to compute in."""
        for _, layer in self.loha_layers():
            dtype = layer._placement().dtype
            for parameter in layer.parameters_of(adapter_name) if dtype in (torch.float16, torch.bfloat16) else ():
                parameter.data = parameter.data.to(dtype)

    # Which adapters count

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name, or the names where there are several."""
        return self._active[0] if len(self._active) == 1 else self.active_adapters

    @property
    def active_peft_config(self) -> LoHaConfig:
        """The configuration of the first active adapter."""
        if not self._active:
            raise LoHaError("no adapter is active; choose one with set_adapter")
        return self.peft_config[self._active[0]]

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            known = ", ".join(self.peft_config) or "none"
            raise LoHaError(f"Adapter {', '.join(unknown)} does not exist; there are {known}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter or adapters, whose updates add up; they train unless ``inference_mode``."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for name, module in self._saved_modules():
            if len(sharing := [each for each in names if each in module.modules_to_save]) > 1:
                raise LoHaError(
                    "Only one adapter can be set at a time for ModulesToSaveWrapper: "
                    f"{', '.join(sharing)} each have a copy of {name} (modules_to_save); activate one"
                )
        if any(layer.merged for _, layer in self.loha_layers()):
            warnings.warn("adapters are merged; they are unmerged before others are set", stacklevel=2)
            self.unmerge_adapter()
        for switch in self._switches():
            switch.set_adapter(names, inference_mode)
        self._active = names

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them, whether they are active or not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        for switch in self._switches():
            for name in names:
                for parameter in switch.parameters_of(name):
                    parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first that is left becomes active."""
        self._check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for _, layer in self.loha_layers()):
            raise LoHaError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        for module in self._switches():
            module.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self._active:
            left = [name for name in self._active if name != adapter_name] or list(self.peft_config)[:1]
            self.set_adapter(left)

    def enable_adapter_layers(self) -> None:
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        """The base model answers alone, until `enable_adapter_layers`."""
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        for module in self._switches():
            module.enable_adapters(enabled)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, for a while. Merged adapters are taken out and stay out."""
        trained = [(p, p.requires_grad) for p in self.parameters()]
        states = {module.disable_adapters for module in self._switches()}
        if len(states) > 1:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled; "
                "all are enabled afterwards",
                stacklevel=3,
            )
        self._enable(False)
        try:
            yield
        finally:
            self._enable(states != {True})
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    # Merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the active adapters, or those named, into the base weights; `unmerge_adapter` takes them out again."""
        self._merge(adapter_names, safe_merge, keep=True)

    def unmerge_adapter(self) -> None:
        """The base weights as they were, bit for bit."""
        for _, layer in self.loha_layers():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The wrapped model with the adapters in its weights and nothing of ours left in it.

        Args:
            progressbar: count the layers on stderr.
            safe_merge: look for NaN and infinity in all layers first; none is merged if there are any.
        """
        self._merge(adapter_names, safe_merge, keep=False, progressbar=progressbar)
        return self._unload(adapter_names or self.active_adapters)

    def unload(self) -> nn.Module:
        """The wrapped model as it was before."""
        if any(layer.merged for _, layer in self.loha_layers()):
            self.unmerge_adapter()
        return self._unload([])

    def _merge(self, names: list[str] | None, safe: bool, keep: bool, progressbar: bool = False) -> None:
        self._check_known(names or ())
        layers = list(self.loha_layers())
        inject.warn_tied(self.model, [layer for _, layer in layers])
        merged = set[str]().union(*(layer.merged_adapters for _, layer in layers))
        if keep and merged and merged >= set(self._active if names is None else names):
            warnings.warn("All adapters are already merged, nothing to do", stacklevel=3)
        for _, layer in layers if safe else ():
            layer.check_merge(names)
        for count, (_, layer) in enumerate(layers, 1):
            layer.merge(adapter_names=names, keep=keep)
            if progressbar:
                print(f"\rmerging {count}/{len(layers)}", end="" if count < len(layers) else "\n", file=sys.stderr)

    def _unload(self, kept: list[str]) -> nn.Module:
        for name, layer in list(self.loha_layers()):
            inject.replace_module(self.model, name, layer.base_layer)
        for name, module in list(self._saved_modules()):
            module.set_adapter(kept, inference_mode=True)
            inject.replace_module(self.model, name, module.current)
        self.peft_config, self.targeted_module_names = {}, []
        return self.model


def _require_gradients(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
