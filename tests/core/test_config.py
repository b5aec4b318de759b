"""LoHaConfig: what it accepts, what it refuses, and its file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle

import pytest

from loha_core import LoHaError
from loha_core.naming.patterns import get_pattern_key
from loha_core.tuner.config import PEFT_VERSION, LoHaConfig


def test_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    theirs = peft.LoHaConfig().to_dict()
    ours = LoHaConfig().to_dict() | {"peft_version": peft.__version__}
    assert ours == {k: getattr(v, "value", v) for k, v in theirs.items()}


def test_lora_alpha_is_alpha():
    assert LoHaConfig(r=8, lora_alpha=32).alpha == 32
    assert LoHaConfig(4, 16).alpha == 16
    with pytest.raises(LoHaError, match="two names of one number"):
        LoHaConfig(alpha=1, lora_alpha=2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "8"}, "alpha is '8'"),
        ({"rank_dropout": 1.0}, "rank_dropout is 1.0"),
        ({"module_dropout": -0.1}, "module_dropout is -0.1"),
        ({"use_effective_conv2d": "yes"}, "use_effective_conv2d is 'yes'"),
        ({"target_modules": "("}, "target_modules: .* is not a regular expression"),
        ({"target_modules": [1]}, r"target_modules is \[1\]"),
        ({"exclude_modules": "["}, "exclude_modules"),
        ({"modules_to_save": "head"}, "expected a list"),
        ({"init_weights": "kaiming"}, "init_weights is 'kaiming'"),
        ({"use_dora": "sideways"}, "use_dora is 'sideways'"),
        ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
        ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'. Must be one of"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"layers_pattern": "h"}, "give layers_to_transform"),
        ({"target_modules": "q", "layers_to_transform": 1}, "put the indices into the pattern"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\] is None"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: .* is not a regular expression"),
        ({"rank_pattern": {".*a.*a.*a.*b": 4}}, "rank_pattern: .* may take very long"),
        ({"target_modules": "(a+)+b"}, "target_modules: .* may take very long"),
        ({"exclude_modules": "(a+)+b"}, "exclude_modules: .* may take very long"),
        ({"modules_to_save": ["(a+)+b"]}, "modules_to_save: .* may take very long"),
        ({"layers_pattern": ["(a+)+b"], "layers_to_transform": 1}, "layers_pattern: .* may take very long"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"rnk": 4}, "no field rnk"),
    ],
)
def test_wrong_values_are_named(values, said):
    with pytest.raises(LoHaError, match=said):
        LoHaConfig(**values)


def test_file_round_trip_keeps_unknown_fields(tmp_path):
    config = LoHaConfig(r=4, lora_alpha=2.5, target_modules={"b", "a"}, rank_pattern={"a": 2}, use_rslora=True)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["target_modules"] == ["a", "b"] and values["use_rslora"] is True and "use_dora" not in values
    assert values["peft_version"] == PEFT_VERSION
    values |= {"peft_version": "9.9", "from_the_future": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    again = LoHaConfig.from_pretrained(tmp_path, inference_mode=True)
    assert again.extra == {"from_the_future": [1]} and again.peft_version == "9.9" and again.inference_mode
    assert again.to_dict() == values | {"inference_mode": True}


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(LoHaError, match="adapter_config.json: not readable"):
        LoHaConfig.from_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("[]")
    with pytest.raises(LoHaError, match="expected a JSON object, found list"):
        LoHaConfig.from_pretrained(tmp_path)
    file.write_text('{"peft_type": "LOHA", "r": -3}')
    with pytest.raises(LoHaError, match="adapter_config.json: r is -3"):
        LoHaConfig.from_pretrained(file)
    with pytest.raises(LoHaError, match="expected a folder"):
        LoHaConfig().save_pretrained(file)
    file.write_text('{"r": 3}')
    with pytest.raises(TypeError, match="missing required keys: {'peft_type'}") as raised:
        LoHaConfig.from_pretrained(file)
    assert isinstance(raised.value, LoHaError)


def test_the_signature_has_the_fields_and_their_defaults():
    parameters = inspect.signature(LoHaConfig).parameters
    assert list(parameters)[:2] == ["r", "alpha"] and parameters["lora_alpha"].default is None
    defaults = {name: p.default for name, p in parameters.items() if name != "lora_alpha"}
    config = LoHaConfig()
    fields = [f.name for f in dataclasses.fields(LoHaConfig)]
    assert list(defaults) == fields
    for name, default in defaults.items():
        factory = LoHaConfig.__dataclass_fields__[name].default_factory
        assert getattr(config, name) == (default if factory is dataclasses.MISSING else factory()), name
    assert LoHaConfig(4, 2.0, 0.5).rank_dropout == 0.5
    assert dataclasses.replace(LoHaConfig(lora_alpha=3), r=20).alpha == 3
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_signature_has_all_that_pefts_has():
    peft = pytest.importorskip("peft")
    theirs = inspect.signature(peft.LoHaConfig).parameters
    ours = inspect.signature(LoHaConfig).parameters
    assert set(theirs) <= set(ours)
    same = {name for name in theirs if theirs[name].default == ours[name].default}
    # Ours has them as their constructor leaves them.
    assert set(theirs) - same <= {"peft_type", "rank_pattern", "alpha_pattern"}


def test_pefts_own_configuration_is_taken():
    peft = pytest.importorskip("peft")
    theirs = peft.LoHaConfig(r=3, alpha=6, target_modules=["b", "a"], task_type="CAUSAL_LM", rank_pattern={"a": 2})
    ours = LoHaConfig.of(theirs)
    assert ours == LoHaConfig(
        3, 6, target_modules=["a", "b"], task_type="CAUSAL_LM", rank_pattern={"a": 2}, peft_version=theirs.peft_version
    )
    assert LoHaConfig.of(ours) is ours
    for other in (peft.LoraConfig(), peft.PromptTuningConfig(num_virtual_tokens=2), {"r": 4}, None):
        with pytest.raises(LoHaError, match=f"{type(other).__name__} is no configuration of LoHa"):
            LoHaConfig.of(other)


def test_a_file_as_it_is(tmp_path):
    LoHaConfig(r=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"runtime_config": {"ephemeral_gpu_offload": True}}))
    assert LoHaConfig.from_json_file(file) == LoHaConfig(r=3).to_dict()


def test_peft_reads_our_file(tmp_path):
    peft = pytest.importorskip("peft")
    LoHaConfig(r=3, alpha=6, target_modules=["q"], module_dropout=0.5, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, peft.LoHaConfig)
    assert (theirs.r, theirs.alpha, theirs.module_dropout, theirs.task_type) == (3, 6, 0.5, "CAUSAL_LM")


def test_the_first_pattern_that_matches_a_paths_end_counts():
    config = LoHaConfig(
        r=8, rank_pattern={r"layers\.0\..*": 2, "q_proj": 4}, alpha_pattern={"^model.layers.1.q_proj": 1}
    )
    assert config.resolved("model.layers.0.q_proj") == (2, 8)
    assert config.resolved("model.layers.1.q_proj") == (4, 1)
    assert config.resolved("model.layers.1.seq_proj") == (8, 8)
    assert get_pattern_key(["q"], "a.seq") == "a.seq"
