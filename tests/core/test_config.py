"""LoHaConfig: what it accepts, what it refuses, and its file."""

from __future__ import annotations

import json

import pytest

from loha_core import LoHaError
from loha_core.naming.patterns import get_pattern_key
from loha_core.tuner.config import LoHaConfig


def test_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    theirs = peft.LoHaConfig().to_dict()
    del theirs["peft_version"]
    ours = LoHaConfig().to_dict()
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
        ({"task_type": "POETRY"}, "task_type is 'POETRY'"),
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
    values |= {"peft_version": "9.9", "from_the_future": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    again = LoHaConfig.from_pretrained(tmp_path, inference_mode=True)
    assert again.extra == {"peft_version": "9.9", "from_the_future": [1]} and again.inference_mode
    assert again.to_dict() == values | {"inference_mode": True}


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(LoHaError, match="adapter_config.json: not readable"):
        LoHaConfig.from_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text("[]")
    with pytest.raises(LoHaError, match="expected a JSON object, found list"):
        LoHaConfig.from_pretrained(tmp_path)
    file.write_text('{"r": -3}')
    with pytest.raises(LoHaError, match="adapter_config.json: r is -3"):
        LoHaConfig.from_pretrained(file)
    with pytest.raises(LoHaError, match="expected a folder"):
        LoHaConfig().save_pretrained(file)


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
