"""A model with LoHa adapters in it: PEFT's LoHaModel, by name and by behaviour."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter import Adapter
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..transform import lowrank
from ..transform.compress import EXACT, Compression
from ..transform.convert import to_lora
from ..transform.report import Result
from . import inject, save_and_load, targets
from .config import LoHaConfig
from .layers import LoHaLayer
from .saved_modules import SavedModule

# Methods of Hugging Face's models that would act on the wrapped model and leave the adapter out.
_OF_THE_BASE_ALONE = frozenset("push_to_hub enable_adapters disable_adapters set_adapters load_lora_adapter".split())


class LoHaModel(nn.Module):
    """Puts LoHa layers into a model, in place, and freezes everything else.

    >>> config = LoHaConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])   # doctest: +SKIP
    >>> model = LoHaModel(model, config)                                               # doctest: +SKIP
    >>> model.print_trainable_parameters()                                             # doctest: +SKIP

    What is not found here is looked up in the wrapped model. Beyond PEFT's API: `add_weighted_adapter` (exact),
    `convert_to_lora`, `to_adapter`, and `load_adapter` for files in any dialect.

    Args:
        model: any module; it is changed.
        config: one configuration. Kept as a copy whose target_modules are resolved.
        low_cpu_mem_usage: make the adapter's parameters on the meta device, to be filled from a file.

    Attributes:
        peft_config: by adapter name.
        targeted_module_names: the adapted modules.

    Raises:
        LoHaError: nothing matches, or a module of a kind that cannot be adapted is named. The model is as it was then.
    """

    prefix = "hada_"
    tuner_layer_cls = LoHaLayer
    layers_mapping = inject.LAYERS
    target_module_mapping = targets.DEFAULT_TARGETS

    def __init__(
        self, model: nn.Module, config: LoHaConfig, adapter_name: str = "default", low_cpu_mem_usage: bool = False
    ) -> None:
        super().__init__()
        self._begin(model, [adapter_name])
        self._add_by_config(adapter_name, config, low_cpu_mem_usage)

    def _begin(self, model: nn.Module, active: list[str]) -> None:
        self.model = model
        self.peft_config: dict[str, LoHaConfig] = {}
        self.targeted_module_names: list[str] = []
        self._active = active
        self._disabled = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__") or name in _OF_THE_BASE_ALONE:
                raise
            return getattr(self.model, name)

    @property
    def base_model(self) -> LoHaModel:
        """What holds the adapters, as PEFT's models have it."""
        return self

    # Layers

    def loha_layers(self) -> Iterator[tuple[str, LoHaLayer]]:
        """(module name in the wrapped model, layer)."""
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, LoHaLayer))

    def _saved_modules(self) -> Iterator[tuple[str, SavedModule]]:
        return ((name, m) for name, m in self.model.named_modules() if isinstance(m, SavedModule))

    def _switches(self) -> list[LoHaLayer | SavedModule]:
        return [*(layer for _, layer in self.loha_layers()), *(module for _, module in self._saved_modules())]

    # Adding

    def add_adapter(self, adapter_name: str, config: LoHaConfig, low_cpu_mem_usage: bool = False) -> None:
        """One more adapter. It is not active until `set_adapter` says so."""
        self._add_by_config(adapter_name, config, low_cpu_mem_usage)

    def _add_by_config(self, adapter_name: str, config: LoHaConfig, low_cpu_mem_usage: bool) -> None:
        config = copy.deepcopy(config)
        names = targets.select(self.model, config)
        inject.warn_unmatched_patterns(config, names)

        def adding(name: str) -> inject.Add:
            rank, alpha = config.resolved(name)
            return lambda layer: layer.update_layer(adapter_name, rank, alpha, config)

        self._inject(adapter_name, config, {name: adding(name) for name in names}, low_cpu_mem_usage)

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

    # Which adapters count

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name, or the names where there are several."""
        return self._active[0] if len(self._active) == 1 else self.active_adapters

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise LoHaError(f"no adapter {', '.join(unknown)}; there are {', '.join(self.peft_config) or 'none'}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapter or adapters, whose updates add up; they train unless ``inference_mode``."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_known(names)
        for name, module in self._saved_modules():
            if len(sharing := [each for each in names if each in module.modules_to_save]) > 1:
                raise LoHaError(f"{', '.join(sharing)} each have a copy of {name} (modules_to_save); activate one")
        if any(layer.merged for _, layer in self.loha_layers()):
            warnings.warn("adapters are merged; they are unmerged before others are set", stacklevel=2)
            self.unmerge_adapter()
        for switch in self._switches():
            switch.set_adapter(names, inference_mode)
        self._active = names

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first that is left becomes active."""
        self._check_known([adapter_name])
        if any(adapter_name in layer.merged_adapters for _, layer in self.loha_layers()):
            raise LoHaError(f"{adapter_name} is merged; unmerge it before deleting it")
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
        self._disabled = not enabled

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, for a while. Merged adapters are taken out and stay out."""
        trained = [(p, p.requires_grad) for p in self.parameters()]
        was_disabled = self._disabled
        self._enable(False)
        try:
            yield
        finally:
            self._enable(not was_disabled)
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

    # Arithmetic

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, rank: int | None = None
    ) -> None:
        """A new adapter that is Σ weight·adapter: exactly, at rank Σ r², or the nearest of a lower ``rank``.

        Raises:
            LoHaError: an unknown adapter, numbers of weights that differ, or DoRA, which has no exact sum.
        """
        self._check_known(adapters)
        if len(adapters) != len(weights) or not adapters:
            raise LoHaError(f"{len(adapters)} adapters and {len(weights)} weights; expected as many, and at least one")
        by_name = dict(zip(adapters, weights, strict=True))
        sums: dict[str, LoHaFactors] = {}
        for name, layer in self.loha_layers():
            names = [adapter for adapter in by_name if adapter in layer.hada_w1_a]
            if names:
                total = lowrank.exact_sum([layer.factors(n) for n in names], [by_name[n] for n in names])
                if rank is not None and rank < total.rank:
                    total = LoHaFactors.from_product(*lowrank.truncate(total.w1_a, total.w1_b, rank)[:2])
                sums[name] = total
        config = copy.deepcopy(self.peft_config[adapters[0]])
        self._add_by_factors(adapter_name, config.describing(sums), sums)

    def convert_to_lora(
        self, adapter_name: str = "default", rank: int | None = None, energy: float | None = None
    ) -> Result:
        """The adapter as a LoRA: exact at rank r², or truncated to a rank or to a share of each update's energy.

        ``save_adapter(…, format="peft")`` writes it as PEFT's LoRA.

        Raises:
            LoHaError: a grouped convolution, for which PEFT's LoRA means another update.
        """
        adapter = self.to_adapter(adapter_name)
        layers = {name: layer for name, layer in self.loha_layers() if name in adapter.layers}
        for name, layer in layers.items():
            if (geometry := layer._geometry()) is not None and geometry.groups > 1:
                raise LoHaError(f"{name}: PEFT's LoRA has no grouped convolution like this one")
        form = EXACT if rank is None and energy is None else Compression("svd", rank, energy)
        return to_lora(adapter, form, shapes={name: layer.weight_shape for name, layer in layers.items()})

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all)."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    # Files

    def to_adapter(self, adapter_name: str = "default") -> Adapter:
        """The adapter as a value, under the wrapped model's module names, to be saved in any format."""
        self._check_known([adapter_name])
        return save_and_load.to_adapter(self.loha_layers(), self._saved_modules(), adapter_name)

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: Sequence[str] | None = None, is_main_process: bool = True
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder itself, others into folders of their name.

        Raises:
            LoHaError: an adapter with DoRA, which PEFT's format cannot hold: save ``to_adapter()`` as "lycoris".
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        for name in names if is_main_process else ():
            folder = Path(save_directory) / ("" if name == "default" else name)
            save_and_load.save(self.to_adapter(name), self.peft_config[name], folder)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoHaConfig | None = None,
    ) -> LoHaModel:
        """A model with the adapter of a file or folder: PEFT's, LyCORIS', or any other dialect that is known.

        Args:
            model: any module; it is changed.
            is_trainable: go on training it; otherwise it is frozen, and the model in eval mode.
            config: takes the place of the folder's own, for dropout and the like; what is in the file decides
                which modules are adapted, and at which rank.

        Raises:
            LoHaError: not readable, made for another model, or nothing in it fits this one.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._begin(model, [adapter_name])
        self.load_adapter(path, adapter_name, is_trainable, config)
        return self

    def load_adapter(
        self,
        path: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        config: LoHaConfig | None = None,
    ) -> None:
        """One more adapter, from a file or folder; see `from_pretrained`. What does not fit is warned of."""
        loaded = save_and_load.read(self.model, Path(path), config)
        loaded.config.inference_mode = not is_trainable
        self._add_by_factors(adapter_name, loaded.config.describing(loaded.layers), loaded.layers)
        for name, module in self._saved_modules():
            if state := loaded.saved.get(name):
                module.modules_to_save[adapter_name].load_state_dict(state)
        if not is_trainable:
            self.eval()


def get_peft_model(model: nn.Module, peft_config: LoHaConfig, adapter_name: str = "default") -> LoHaModel:
    """PEFT's function of this name, for LoHa: a classifier's untrained head is trained and saved along."""
    heads = targets.UNTRAINED_HEADS.get(peft_config.task_type or "", ())
    missing = [name for name in heads if hasattr(model, name) and name not in (peft_config.modules_to_save or ())]
    if missing:
        peft_config = copy.deepcopy(peft_config)
        peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), *missing]
    return LoHaModel(model, peft_config, adapter_name)
