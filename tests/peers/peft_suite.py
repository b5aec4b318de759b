"""PEFT's own tests of LoHa, run on PEFT's classes and on ours.

    .venv-peers/bin/python -m tests.peers.peft_suite PATH          # of a checkout of PEFT, which is not changed

PATH's tests run against the PEFT that is installed: as it is, with `loha_core.peft.enable()`, and stand-alone, that is
with `loha_core.LoHaModel` in the place of PEFT's classes, behind names alone (`_stand_alone`). Models that they take
from the Hugging Face Hub are replaced by tiny random ones of the same names, so nothing is downloaded. The decoder
tests, whose lists have no LoHa, get one. Printed are the counts, and each test whose outcome differs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import os
import re
import subprocess
import sys
import tempfile
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

FILES = (
    "custom_models mixed tuners_utils config stablediffusion vision_models torch_compile decoder_models low_level_api"
)
MODES = ("peft", "enabled", "stand-alone")
_MODE = "LOHA_PEFT_SUITE"

# --- in the process that runs the tests: a plugin of pytest ----------------------------------------------------------


def pytest_configure(config: Any) -> None:
    _without_datasets()
    if os.environ.get(_MODE) == "enabled":
        import loha_core.peft

        loha_core.peft.enable()
    if os.environ.get(_MODE) == "stand-alone":
        _stand_alone()


def pytest_sessionstart(session: Any) -> None:
    """PEFT's helper goes online for the first use of a model, and tries again and again."""
    helpers = importlib.import_module("tests.testing_utils")
    helpers.hub_online_once = lambda *_, **__: nullcontext()


def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> None:
    """The decoder tests' list of configurations has no LoHa; it is read when a class is collected."""
    configs = getattr(collector.module, "ALL_CONFIGS", None)
    if collector.module.__name__.endswith("test_decoder_models") and configs is not None:
        from peft import LoHaConfig

        if not any(kind is LoHaConfig for kind, _ in configs):
            configs.append((LoHaConfig, {"task_type": "CAUSAL_LM", "target_modules": None}))


def _without_datasets() -> None:
    """PEFT's helpers import `datasets` for one picture."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        import numpy as np
        from PIL import Image

        pixels = np.random.RandomState(0).randint(0, 256, (480, 640, 3), dtype=np.uint8)
        module: Any = types.ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        module.__version__ = "0"
        module.load_dataset = lambda name, *_, **__: {"test": {"image": [Image.fromarray(pixels)]}}
        sys.modules["datasets"] = module


# --- loha_core without PEFT, under PEFT's names -----------------------------------------------------------------------


def _stand_alone() -> None:
    """PEFT's names for our classes and functions. What is not about LoHa stays PEFT's."""
    import peft
    import peft.utils
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file
    from torch import nn

    import loha_core
    from loha_core.tuner.saved_modules import SavedModule

    theirs = {name: getattr(peft, name) for name in ("get_peft_model", "PeftModel", "inject_adapter_in_model")}

    class PeftModel(nn.Module):
        """PEFT puts a model around its LoHaModel, which parameters' names tell; ours is both."""

        def __init__(self, model: loha_core.LoHaModel) -> None:
            super().__init__()
            self.base_model = model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name == "base_model":
                    raise
                return getattr(self.base_model, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, model: nn.Module, path: Any, *args: Any, **kwargs: Any) -> Any:
            if peft.PeftConfig.from_json_file(os.path.join(path, "adapter_config.json"))["peft_type"] != "LOHA":
                return theirs["PeftModel"].from_pretrained(model, path, *args, **kwargs)
            return cls(loha_core.LoHaModel.from_pretrained(model, path, *args, **kwargs))

    def get_peft_model(model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(peft_config, loha_core.LoHaConfig):
            return theirs["get_peft_model"](model, peft_config, *args, **kwargs)
        return PeftModel(loha_core.get_peft_model(model, peft_config, *args, **kwargs))

    def inject_adapter_in_model(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not isinstance(peft_config, loha_core.LoHaConfig):
            return theirs["inject_adapter_in_model"](peft_config, model, *args, **kwargs)
        return loha_core.LoHaModel(model, peft_config, *args, **kwargs).model

    def convert_to_lora(model: Any, *args: Any, **kwargs: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_as_lora(folder, *args, **kwargs)
            return peft.LoraConfig.from_pretrained(folder), load_file(Path(folder) / "adapter_model.safetensors")

    ours = {
        "LoHaConfig": loha_core.LoHaConfig,
        "PeftModel": PeftModel,
        "PeftMixedModel": PeftModel,
        "get_peft_model": get_peft_model,
        "inject_adapter_in_model": inject_adapter_in_model,
        "convert_to_lora": convert_to_lora,
    }
    # These act on models of both kinds: LoRAs made from LoHas are PEFT's.
    for name in (
        "get_peft_model_state_dict", "set_peft_model_state_dict", "get_base_model_state_dict",
        "set_base_model_state_dict",
    ):  # fmt: skip
        if hasattr(peft, name):
            ours[name] = _by_model(loha_core.LoHaModel, getattr(loha_core, name), getattr(peft, name))
    for name, value in ours.items():
        setattr(peft, name, value)
    PEFT_TYPE_TO_CONFIG_MAPPING["LOHA"] = loha_core.LoHaConfig
    BaseTunerLayer.register(loha_core.LoHaLayer)
    peft.utils.AuxiliaryTrainingWrapper = peft.utils.ModulesToSaveWrapper = SavedModule
    # PEFT's private names for what is public here.
    loha_core.LoHaLayer._all_available_adapter_names = lambda self: self.adapters
    SavedModule._adapters = property(lambda self: self.adapters)


def _by_model(kind: type, ours: Any, theirs: Any) -> Any:
    def either(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(module, kind) for module in model.modules()):
            return theirs(model, *args, **kwargs)
        kwargs.pop("unwrap_compiled", None)
        return ours(model, *args, **kwargs)

    return either


# --- models of the hub's names ---------------------------------------------------------------------------------------


def make_hub(cache: Path) -> None:
    """Tiny random models in a cache of huggingface_hub, under the names that the tests ask for."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
    llama = small | {"intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 256}
    gpt = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 256}
    opt = small | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256}
    gemma = llama | {"head_dim": 8}
    models: dict[str, Any] = {
        "peft-internal-testing/tiny-random-OPTForCausalLM": t.OPTForCausalLM(t.OPTConfig(**opt)),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        "hf-internal-testing/tiny-random-gpt2": t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": t.GPTJForCausalLM(t.GPTJConfig(**gpt, rotary_dim=4)),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "hf-internal-testing/tiny-random-MistralForCausalLM": t.MistralForCausalLM(t.MistralConfig(**llama)),
        "peft-internal-testing/tiny-dummy-qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**llama)),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": t.Gemma3ForCausalLM(t.Gemma3TextConfig(**gemma)),
        "peft-internal-testing/opt-125m": t.OPTForCausalLM(t.OPTConfig(**opt)),
        "peft-internal-testing/tiny-random-ResNetForImageClassification": t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
        "hf-internal-testing/tiny-sd-pipe": _pipeline(),
    }
    for name, model in models.items():
        model.save_pretrained(_snapshot(cache, name))
    t.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(
        _snapshot(cache, "peft-internal-testing/tiny-random-ResNetForImageClassification")
    )


def _snapshot(cache: Path, name: str) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def _pipeline() -> Any:
    import diffusers
    import transformers as t

    folder = Path(tempfile.mkdtemp())
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = t.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    tokenizer.save_pretrained(folder)
    text = t.CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=32, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        text_encoder=t.CLIPTextModel(text), tokenizer=tokenizer, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


# --- the command -----------------------------------------------------------------------------------------------------


def run(path: Path, mode: str, hub: Path, extra: list[str]) -> dict[str, str]:
    """Test -> "passed", "failed", "skipped" or "error"."""
    environment = os.environ | {
        _MODE: mode,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    files = [str(file) for name in FILES.split() if (file := path / "tests" / f"test_{name}.py").is_file()]
    command = [
        sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(path), "-p", Path(__file__).stem,
        "-p", "no:cacheprovider", "-k", "loha or LoHa", "-rA", "--tb=no", "-q", *extra, *files,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)
    rows = re.findall(r"^(PASSED|FAILED|ERROR) (\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if not rows or done.returncode not in (0, 1):  # 1: some failed; others: it did not come to its end
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return {test: outcome.lower() for outcome, test in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkout of PEFT")
    parser.add_argument("--mode", choices=MODES, action="append", help="one of the ways to run them; all by default")
    parser.add_argument("extra", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_hub(Path(folder))
        outcomes = {
            mode: run(options.path.resolve(), mode, Path(folder), options.extra) for mode in options.mode or MODES
        }
    for mode, tests in outcomes.items():
        passed = sum(outcome == "passed" for outcome in tests.values())
        print(f"{mode:12} {passed:5} passed, {len(tests) - passed:4} not")
    for test in sorted(set().union(*outcomes.values())):
        found = [tests.get(test, "absent") for tests in outcomes.values()]
        if len(set(found)) > 1:
            print(" -> ".join(found), test)


if __name__ == "__main__":
    main()
