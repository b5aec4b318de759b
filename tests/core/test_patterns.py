"""Regular expressions from files and users: the slow are refused, the field's are not."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError
from loha_core.naming.patterns import checked, get_pattern_key, path_end
from loha_core.tuner.targets import DEFAULT_TARGETS

SECONDS = 0.3  # 0.1 on an idle machine
NAMES = ["a" * 800, "." * 800, "ab" * 400, "a." * 400, "a" * 400 + "b" * 400, "a" * 266 + "." * 266 + "b" * 268]

HOSTILE = [
    "(a+)+b", "(a*)*b", "(a|a?)+b", "(a|aa)+b", "(?:a|b|ab)*c", "((a*)*)*b", "(a*?)*?b", "(a{2,}){2,}b", "(?i)(a+)+b",
    ".*a.*a.*a.*b", ".*a.*a.*b.*c", "(.*a){9}b", "[a-z]*" * 9 + "0", "a{0,400}" * 4 + "b", "a?" * 25 + "a" * 25,
    "(?:(?:a.*)?b.*)?c.*d.*e", "|".join(["a*" * 5] * 300), r"(a+)\1+b", r"(a)?(?(1)a|b)+c", "(?m)^a", "(?m:^a.*)*x",
    "(?im-s:^a)",
    "((((a){800}){800}){800}){800}", "((((){800}){800}){800}){800}", "(" * 60 + "a" + ")*" * 60, "x" * 30_000,
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:30])
def test_what_can_hang_is_refused_at_once(pattern):
    started = time.process_time()
    for check in (checked, lambda p: checked(p, anywhere=True), path_end):
        with pytest.raises(LoHaError, match=re.escape(repr(pattern[:20])[:-1])):
            check(pattern)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("pattern", ["(", "*", f"a{{{10**12}}}", "(" * 5000 + ")" * 5000, "[b-a]", "(?<=a+)b"])
def test_what_is_none_is_refused(pattern):
    with pytest.raises(LoHaError, match="is not a regular expression"):
        checked(pattern)


MODULES = [f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn{k}.to_{c}"
           for i, j, k, c in itertools.product(range(4), range(3), (1, 2), ("q", "k", "v", "out.0"))]  # fmt: skip
SINGLE = r".*(?<!single_)transformer_blocks\.[0-9]+\."
TARGETS = [
    *(pattern for pattern in DEFAULT_TARGETS.values() if isinstance(pattern, str)),
    rf"(.*x_embedder|{SINGLE}norm1\.linear|{SINGLE}attn\.to_k|.*single_transformer_blocks\.[0-9]+\.attn\.to_q)$",
    r"(?:.*\.)?(?:visual|vision)\.blocks\.\d+\.(?:attn|mlp)\.(?:qkv|proj|fc1|fc2)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*vision).*(q|k|v)_proj$",
]
ANYWHERE = [
    "", "^name", "to_q|to_k|to_v", "|".join(MODULES), f"(?:{'|'.join(MODULES)})", *(f"^{name}" for name in MODULES[:3]),
    r".*language_model\..*\.(q_proj|v_proj)", r"layers\.0\..*", r"model\.layers\.[0-9]+\.(self_attn|mlp)\..*",
    r".*blocks\.\d+\.layers\.\d+\.attn.*proj", r"bert.encoder.layer.([0-9]|1[0-1]).attention.self.(query|value)",
    r"(.*\.)?attn\d?\.to_(q|k)", "attn2.*", "(?:ff|mlp)_net", "down.*attn.*to_q",
    r"transformer_blocks\.(\d+)\.(norm1|ff)",
]  # fmt: skip


@pytest.mark.parametrize(
    "rule", [r"blocks[._]\d+[._].*attn.*(to_q|to_k)", "down.*attn2.*to_k.*weight", r"(up|down)_blocks\.\d+.*conv.*"]
)
def test_what_people_write_to_search_for_passes(rule):
    assert checked(rule, anywhere=True).search("x") is None


@pytest.mark.parametrize("pattern", [*TARGETS, *ANYWHERE], ids=lambda pattern: pattern[:40])
def test_the_fields_patterns_pass(pattern):
    assert checked(pattern).pattern == pattern
    if pattern in ANYWHERE:
        assert checked(pattern, anywhere=True) and path_end(pattern)


ATOMS = ".* a [ab] \\. a* [ab]* (a|ab) a? .+ b . (ab)* (a|b.) .*? a{1,5} (?:a|.b)? (?=a*b) ^ $".split()


@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=8), end=st.sampled_from(["x", "[xy]", "", "$"]))
def test_whatever_is_accepted_is_quick(atoms, end):
    pattern = "".join(atoms) + end
    for compile_one, use in (
        (checked, "fullmatch"),
        (lambda p: checked(p, anywhere=True), "search"),
        (path_end, "match"),
    ):
        try:
            match = getattr(compile_one(pattern), use)
        except LoHaError:
            continue
        for name in NAMES if use != "search" else [name[280:520] for name in NAMES]:
            started = time.process_time()
            match(name)
            assert time.process_time() - started < SECONDS, (pattern, use, name[:9])


@given(atoms=st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5), name=st.text(alphabet="ab.", max_size=12))
def test_a_check_changes_no_answer(atoms, name):
    pattern = "".join(atoms)
    try:
        search, end = checked(pattern, anywhere=True), path_end(pattern)
    except LoHaError:
        return
    assert bool(search.search(name)) == bool(re.search(pattern, name))
    assert bool(end.match(name)) == bool(re.match(rf"(.*\.)?({pattern})$", name))


def test_the_first_pattern_that_matches_a_paths_end_counts():
    assert get_pattern_key(["layers.0.q", "q"], "model.layers.0.q") == "layers.0.q"
    assert get_pattern_key(["q"], "a.seq") == "a.seq"
