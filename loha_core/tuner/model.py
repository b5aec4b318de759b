"""A model with LoHa adapters in it: PEFT's LoHaModel, by name and by behaviour."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..adapter import Adapter, split_layers
from ..errors import LoHaError
from ..factors import LoHaFactors
from ..formats import peft
from ..transform import lowrank
from ..transform.compress import EXACT, Compression
from ..transform.convert import to_lora
from ..transform.report import ErrorReport, Result
from . import inject, targets
from .adapted import AdaptedModel
from .config import LoHaConfig, PeftType, UnknownArgument
from .layers import LoHaLayer
from .state import card, files, status
from .state.tensors import LoadResult

# PEFT's arguments of loading that mean nothing to a file on this machine.
_OF_THE_HUB = frozenset("revision token use_auth_token cache_dir force_download local_files_only proxies".split())


class LoHaModel(AdaptedModel):
    """Puts LoHa layers into a model, in place, and freezes everything else.

    >>> config = LoHaConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])   # doctest: +SKIP
    >>> model = LoHaModel(model, config)                                               # doctest: +SKIP
    >>> model.print_trainable_parameters()                                             # doctest: +SKIP

    What is not found here is looked up in the wrapped model. Beyond PEFT's API: `add_weighted_adapter` (exact),
    `convert_to_lora`, `to_adapter`, and `load_adapter` for files in any dialect. `state_dict` holds the adapters alone
    (and what else trains), so that a trainer's checkpoints are small and the base's tied weights never in them.

    Args:
        model: any module; it is changed.
        config: one configuration, ours or PEFT's, or several by adapter name. Kept as a copy whose target_modules are
            resolved.
        adapter_name: of the one configuration; of several, which one is active.
        low_cpu_mem_usage: make the adapter's parameters on the meta device, to be filled from a file.
        autocast_adapter_dtype: parameters are float32; False: in the base's dtype, where that is half precision.

    Attributes:
        peft_config: by adapter name.
        targeted_module_names: the adapted modules.

    Raises:
        LoHaError: nothing matches, or a module of a kind that cannot be adapted is named. The model is as it was then.
    """

    prefix = "hada_"
    peft_type = PeftType.LOHA
    tuner_layer_cls = LoHaLayer
    layers_mapping = inject.LAYERS
    target_module_mapping = targets.DEFAULT_TARGETS

    def __init__(
        self,
        model: nn.Module,
        config: LoHaConfig | Mapping[str, LoHaConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        configs = config if isinstance(config, Mapping) else {adapter_name: config}
        if adapter_name not in configs:
            raise LoHaError(f"there are configurations for {', '.join(configs)}; adapter_name {adapter_name!r} is none")
        self._begin(model, [adapter_name])
        for name, each in configs.items():
            self.add_adapter(name, each, low_cpu_mem_usage, autocast_adapter_dtype)

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
        self, adapter_name: str = "default", rank: int | float | None = None, energy: float | None = None
    ) -> Result:
        """The adapter as a LoRA: exact at rank r², or truncated to a rank or to a share of each update's energy.

        `save_as_lora` writes it.

        Args:
            rank: a whole number, or, as in PEFT, a fraction: the ``energy``, that is the share of ‖ΔW‖² to keep.

        Raises:
            LoHaError: a grouped convolution, for which PEFT's LoRA means another update.
        """
        if isinstance(rank, float):
            if energy is not None:
                raise LoHaError(f"rank {rank} is a share of the energy, and energy is {energy}; give one")
            rank, energy = None, rank
        adapter = self.to_adapter(adapter_name)
        layers = {name: layer for name, layer in self.loha_layers() if name in adapter.layers}
        for name, layer in layers.items():
            if layer.is_grouped:
                raise LoHaError(f"{name}: PEFT's LoRA has no grouped convolution like this one")
        form = EXACT if rank is None and energy is None else Compression("svd", rank, energy)
        return to_lora(adapter, form, shapes={name: layer.weight_shape for name, layer in layers.items()})

    def save_as_lora(
        self,
        path: str | Path,
        adapter_name: str = "default",
        rank: int | float | None = None,
        energy: float | None = None,
    ) -> ErrorReport:
        """Write `convert_to_lora`'s result as PEFT's LoRA, into a folder that ``PeftModel.from_pretrained`` reads.

        Raises:
            LoHaError: as `convert_to_lora`, and DoRA, which is not written.
        """
        if not self.supports_lora_conversion(adapter_name):
            raise LoHaError(f"{adapter_name} has grouped convolutions or DoRA, which PEFT's LoRA of it would not have")
        lora, report = self.convert_to_lora(adapter_name, rank, energy)
        layers, _ = split_layers(lora)
        peft.write_folders({Path(path): peft.Folder(peft.config_of(layers), peft.tensors_of(layers))})
        return report

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` will do, and PEFT's format will hold the result."""
        layers = [layer for _, layer in self.loha_layers() if adapter_name in layer.adapters]
        return not any(layer.is_grouped or adapter_name in layer.dora_scale for layer in layers)

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all)."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of each adapted layer and each module that is saved whole, in the model's order."""
        modules = ((n, m) for n, m in self.named_modules() if isinstance(m, status.Adapted))
        return [status.of_layer(name, module) for name, module in modules]

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of all layers together; "irregular" where they differ."""
        counts = self.get_nb_trainable_parameters()
        return status.of_model(self.model, self, self.peft_config, counts, self.get_layer_status())

    # Files

    def to_adapter(self, adapter_name: str = "default", state_dict: Mapping[str, Tensor] | None = None) -> Adapter:
        """The adapter as a value, under the wrapped model's module names, to be saved in any format.

        Args:
            state_dict: the model's own, where a trainer has gathered it from several devices.
        """
        self._check_known([adapter_name])
        if state_dict is not None:
            return functional_call(
                _Reading(self), {f"model.{key}": t for key, t in state_dict.items()}, (adapter_name,)
            )
        return files.to_adapter(self.loha_layers(), self._saved_modules(), adapter_name)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        save_embedding_layers: bool | str = "auto",
        save_function: Any = None,
    ) -> None:
        """Write adapters as PEFT does: "default" into the folder itself, others into folders of their name.

        Args:
            is_main_process: False writes nothing: several processes share the folder.
            state_dict: the model's own, where a trainer has gathered it.
            save_function: Accelerate passes one. Files are written whole or not at all, and never by it.

        Raises:
            LoHaError: an adapter with DoRA, which PEFT's format cannot hold (save ``to_adapter()`` as "lycoris"), or
                pickled files or embedding layers are asked for.
        """
        if not safe_serialization:
            raise LoHaError(
                "safe_serialization=False would write a pickle, which runs code where it is read; leave it out"
            )
        if save_embedding_layers not in ("auto", False):
            raise LoHaError("embeddings are not saved by save_embedding_layers; name them in modules_to_save")
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self._check_known(names)
        for name in names if is_main_process else ():
            folder = Path(save_directory) / ("" if name == "default" else name)
            files.save(self.to_adapter(name, state_dict), self.peft_config[name], folder)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write README.md, unless there is one."""
        card.write(Path(output_dir), card.base_name(getattr(self.model, "config", None)))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Nothing here uses the network.

        Raises:
            LoHaError: says what to do.
        """
        raise LoHaError(
            "loha_core uploads nothing. save_pretrained(folder), then huggingface_hub.upload_folder(repo_id=…, "
            "folder_path=folder)"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoHaConfig | None = None,
        **options: Any,
    ) -> LoHaModel:
        """A model with the adapter of a file or folder: PEFT's, LyCORIS', or any other dialect that is known.

        Args:
            model: any module; it is changed.
            is_trainable: go on training it; otherwise it is frozen, and the model in eval mode.
            config: takes the place of the folder's own, for dropout and the like; what is in the file decides
                which modules are adapted, and at which rank. It becomes the adapter's, and is changed accordingly.
            options: see `load_adapter`.

        Raises:
            LoHaError: not readable, made for another model, or nothing in it fits this one.
        """
        self = cls.__new__(cls)
        self._begin(model, [adapter_name])
        self.load_adapter(path, adapter_name, is_trainable, config, **options)
        return self

    def load_adapter(
        self,
        path: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        config: LoHaConfig | None = None,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        torch_device: str | torch.device | None = None,
        device_map: Any = None,
        subfolder: str = "",
        **others: Any,
    ) -> LoadResult:
        """One more adapter, from a file or folder; see `from_pretrained`. What does not fit is warned of.

        Args:
            autocast_adapter_dtype: as `LoHaModel` has it.
            low_cpu_mem_usage, torch_device, device_map: PEFT's, and without effect: nothing is made that the file has
                not, and parameters go where their layers are.
            subfolder: of ``path``.

        Returns:
            missing_keys (what the configuration asks for and the file has not) and unexpected_keys, as PEFT's.

        Raises:
            LoHaError: as `from_pretrained`, and arguments that are about the Hub.
        """
        if unknown := [name for name in others if name not in _OF_THE_HUB]:
            raise UnknownArgument(f"load_adapter has no argument {', '.join(unknown)}")
        if others:
            raise LoHaError(f"{', '.join(others)}: nothing is downloaded here; give a file or folder on this machine")
        loaded = files.read(self.model, Path(path) / subfolder, config)
        loaded.config.inference_mode = not is_trainable
        self._add_by_factors(adapter_name, loaded.config, loaded.layers)
        for name, module in self._saved_modules():
            if state := loaded.saved.get(name):
                module.modules_to_save[adapter_name].load_state_dict(state)
        if not autocast_adapter_dtype:
            self._cast_adapter(adapter_name)
        if not is_trainable:
            self.eval()
        return LoadResult(loaded.missing, loaded.unexpected)


class _Reading(nn.Module):
    """Reads a model's adapter where `functional_call` puts other tensors in the place of its parameters."""

    def __init__(self, model: LoHaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, adapter_name: str) -> Adapter:
        return self.model.to_adapter(adapter_name)


def get_peft_model(
    model: nn.Module,
    peft_config: LoHaConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> LoHaModel:
    """PEFT's function of this name, for LoHa: a classifier's untrained head is trained and saved along.

    Args:
        mixed: PEFT's; a LoHaModel activates several adapters at once in any case, and all of them are LoHas.
        revision: of the base model, for the configuration.
    """
    peft_config = copy.deepcopy(LoHaConfig.of(peft_config))
    heads = targets.UNTRAINED_HEADS.get(peft_config.task_type or "", ())
    missing = [name for name in heads if hasattr(model, name) and name not in (peft_config.modules_to_save or ())]
    if missing:
        peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), *missing]
    if revision is not None:
        peft_config.revision = revision
    return LoHaModel(model, peft_config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
