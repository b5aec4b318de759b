"""Multipliers per block and layer: which weight is in which block, and what a user may write."""

from __future__ import annotations

import doctest
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loha_core import LoHaError, blocks
from loha_core.blocks import FAMILIES, LAYOUTS, PRESETS, BlockStrength, Layout, block_of_key
from loha_core.naming import layouts
from loha_core.naming.families import Family, Size
from loha_core.naming.tables import FAMILIES as TABLES

UNET = "diffusion_model."
KEYS = {
    f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": ("IN", 4),
    f"{UNET}input_blocks.0.0.weight": ("IN", 0),
    f"{UNET}middle_block.1.transformer_blocks.0.ff.net.2.weight": ("M", 1),
    f"{UNET}output_blocks.11.0.out_layers.3.weight": ("OUT", 11),
    f"{UNET}time_embed.0.weight": None,
    f"{UNET}label_emb.0.0.weight": None,
    f"{UNET}out.2.weight": None,
    f"{UNET}joint_blocks.5.context_block.attn.qkv.weight": ("J", 5),
    f"{UNET}double_blocks.3.img_attn.qkv.weight": ("D", 3),
    f"{UNET}single_blocks.37.linear1.weight": ("S", 37),
    f"{UNET}txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight": None,
    f"{UNET}final_layer.adaLN_modulation.1.weight": None,
    f"{UNET}blocks.7.self_attn.q.weight": ("blocks", 7),
    f"{UNET}blocks.block7.blocks.0.block.attn.to_q.0.weight": ("blocks", 7),
    f"{UNET}transformer_blocks.59.attn.to_q.weight": ("transformer_blocks", 59),
    f"{UNET}transformer.layers.3.self_attn.to_qkv.weight": ("layers", 3),
    f"{UNET}double_stream_blocks.1.block.attn1.to_q.weight": ("double_stream_blocks", 1),
    "clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight": None,
    "t5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q.weight": None,
}


LISTS = {"IN": "input_blocks", "M": "middle_block", "OUT": "output_blocks", "J": "joint_blocks"}
LISTS |= {"D": "double_blocks", "S": "single_blocks"}
SIZES = [(family, size) for family in TABLES.values() for size in family.sizes]
every_size = pytest.mark.parametrize(("family", "size"), SIZES, ids=[f"{f.name}, {s.name}" for f, s in SIZES])


def key(label: str, layout: Layout | None = None) -> str:
    """A weight of the block that a label such as IN04 or BASE names."""
    part = label.rstrip("0123456789")
    lists = LISTS | ({part: module for module, part in layout.lists.items()} if layout else {})
    number = label[len(part) :]
    return f"{UNET}{lists.get(part, part)}.{int(number)}.x.weight" if number else f"{UNET}time_embed.0.weight"


def keys_of(family: Family, counts: tuple[int, ...]) -> list[str]:
    """The keys of a model of the family with so many blocks, and of norms, which no table has."""
    found = []
    for row in family.rows:
        lists = zip(family.blocks, counts, strict=True)
        count = next((n for (_, module), n in lists if row.native.startswith(f"{module}.")), 1)
        found += [row.native.replace(".N.", f".{n}.", 1).replace(".N.", ".0.") for n in range(count)]
    norms = [f"{name.rpartition('.')[0]}.norm{n}" for name in found for n in range(2)]
    return [f"{UNET}{name}.weight" for name in dict.fromkeys(found + norms)]


def parts_of(family: Family, counts: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((label, count) for (label, _), count in zip(family.blocks, counts, strict=True) if count)


def test_examples():
    assert doctest.testmod(blocks).failed == doctest.testmod(layouts).failed == 0


@pytest.mark.parametrize("weight", KEYS)
def test_the_block_of_a_weight(weight):
    assert block_of_key(weight) == KEYS[weight]


@pytest.mark.parametrize("family", ["SD1.5", "SDXL", "SD3", "SD3.5 large", "Flux"])
def test_a_model_is_recognised_by_its_blocks(family):
    layout = LAYOUTS[family]
    assert Layout.of_keys([key(label) for label in layout.labels()] + [key("BASE")]) == layout


@every_size
def test_a_model_is_recognised_by_its_weights(family, size):
    layout = Layout.of_keys(keys_of(family, size.blocks))
    alike = [s.name for s in family.sizes if s.blocks == size.blocks]
    name = alike[0] if len(alike) == 1 or alike[0] == "SD3" else family.name
    assert layout == Layout(name, parts_of(family, size.blocks))
    # With other counts, as reduced models and pruned ones have, it is still of the family.
    fewer = tuple(min(count, n + 1) for n, count in enumerate(size.blocks))
    assert Layout.of_keys(keys_of(family, fewer)) == Layout(family.name, parts_of(family, fewer))


@every_size
def test_each_weight_of_a_model_is_in_the_block_that_the_table_says(family, size):
    layout = Layout(family.name, parts_of(family, size.blocks))
    strength = BlockStrength((), (), layout)
    for label, module in ((label, module) for label, module in family.blocks if label in dict(layout.parts)):
        assert block_of_key(f"{UNET}{module}.1.x.weight", layout) == (label, 1)
    assert block_of_key(f"{UNET}head.x.weight", layout) is None and strength(f"{UNET}head.x.weight") == 1


@every_size
def test_parts_go_by_their_label_and_by_their_list_in_any_case(family, size):
    layout = Layout(family.name, parts_of(family, size.blocks))
    for part, count in layout.parts:
        module = dict(family.blocks)[part].replace(".", "_")
        for word in (part, part.lower(), module, module.upper()):
            for text, last in ((f"{word}=0.5", count - 1), (f"ALL=1, {word}00=0.5", 0)):
                strength = BlockStrength.parse(layout, text)
                found = [n for n in range(count) if strength(key(f"{part}{n:02d}", layout)) == 0.5]
                assert found == list(range(last + 1)), text
            with pytest.raises(LoHaError, match=f"no block {word}{count:02d}; {family.name} has"):
                BlockStrength.parse(layout, f"{word}{count:02d}=1")


def test_lists_that_no_table_speaks_of_follow_the_family_s_own():
    keys = keys_of(TABLES["Flux"], (19, 38)) + [f"{UNET}extra_blocks.{n}.proj.weight" for n in range(3)]
    layout = Layout.of_keys(keys)
    assert layout == Layout("Flux", (("D", 19), ("S", 38), ("extra_blocks", 3)))
    assert BlockStrength.parse(keys, "extra_blocks01=0.5")(f"{UNET}extra_blocks.1.proj.weight") == 0.5


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> Family:
    """A family with a list that does not call itself blocks or layers, in two sizes."""
    table = """
    refiner.N.attn.to_q   refiner.N.attn.qkv  0:i
    blocks.N.attn.to_q    layers.N.attn.qkv   0:i
    """
    sizes = (Size("Refined small", (2, 6)), Size("Refined large", (2, 10)))
    family = Family("Refined", table, blocks=(("R", "refiner"), ("L", "layers")), sizes=sizes)
    monkeypatch.setitem(TABLES, "Refined", family)
    return family


def test_vectors_that_know_only_of_the_main_list(refined):
    layout = Layout("Refined", (("R", 2), ("L", 6)))
    assert sorted(map(len, layout.vectors())) == [6, 7, 8, 9]
    strength = BlockStrength.parse(layout, "0.1,2,3,4,5,6,7")
    found = [strength(key(label, layout)) for label in ("BASE", "R00", "R01", "L00", "L05")]
    assert found == [0.1, 0.1, 0.1, 2, 7]  # to them a refiner is BASE
    strength = BlockStrength.parse(layout, "1,2,3,4,5,6,7,8")
    assert [strength(key(label, layout)) for label in ("BASE", "R00", "R01", "L00", "L05")] == [1, 1, 2, 3, 8]


def test_other_models_have_blocks_of_their_own():
    keys = [f"{UNET}blocks.{n}.attn.weight" for n in range(30)] + [f"{UNET}head.weight"]
    strength = BlockStrength.parse(keys, "ALL=0, blocks10-blocks19=0.5")
    assert [strength(k) for k in keys[8:12]] == [0, 0, 0.5, 0.5]
    assert len(strength.table()) == 31
    assert BlockStrength.parse(keys, ",".join(["1"] * 30 + ["0"])).table()["blocks29"] == 0
    with pytest.raises(LoHaError, match="no numbered blocks"):
        Layout.of_keys(["diffusion_model.head.weight"])


# --- vectors ----------------------------------------------------------------------------------

VECTORS = {
    ("SD1.5", 17): "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    ("SD1.5", 26): " ".join(["BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12))]),
    ("SDXL", 12): "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    ("SDXL", 20): " ".join(["BASE", *(f"IN{n:02d}" for n in range(9)), "M00", *(f"OUT{n:02d}" for n in range(9))]),
    ("SD3", 25): " ".join(["BASE", *(f"J{n:02d}" for n in range(24))]),
    ("SD3.5 large", 39): " ".join(["BASE", *(f"J{n:02d}" for n in range(38))]),
    ("Flux", 58): " ".join(["BASE", *(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38))]),
    ("Flux", 57): " ".join([*(f"D{n:02d}" for n in range(19)), *(f"S{n:02d}" for n in range(38))]),
}


@pytest.mark.parametrize(("family", "length"), VECTORS)
def test_each_number_of_a_vector_is_for_its_block(family, length):
    labels = VECTORS[family, length].split()
    values = [n / 100 for n in range(length)]
    strength = BlockStrength.parse(family, ",".join(map(str, values)))
    assert [strength(key(label)) for label in labels] == values


def check_vector(family: str, labels: tuple[str, ...], values: list[float]) -> None:
    strength = BlockStrength.parse(family, ", ".join(map(repr, values)))
    assert [strength(key(label, LAYOUTS[family])) for label in labels] == values
    assert set(strength.table()) == {"BASE", *LAYOUTS[family].labels()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_that_an_error_names_is_taken(family):
    for labels in LAYOUTS[family].vectors():
        check_vector(family, labels, [n / 7 - 5 for n in range(len(labels))])


@given(family=st.sampled_from(FAMILIES), data=st.data())
def test_any_numbers_are_taken(family, data):
    labels = data.draw(st.sampled_from(LAYOUTS[family].vectors()))
    check_vector(family, labels, data.draw(st.lists(st.floats(-5, 5), min_size=len(labels), max_size=len(labels))))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_with_and_without_base(family):
    layout = LAYOUTS[family]
    lengths = [len(labels) for labels in layout.vectors()]
    assert len(set(lengths)) == len(lengths)
    values = [n / 100 for n in range(len(layout.labels()) + 1)]
    table = BlockStrength.parse(family, ",".join(map(str, values))).table()
    assert list(table) == ["BASE", *layout.labels()] and list(table.values()) == values
    if "input_blocks" not in layout.lists:  # there as many numbers have long meant something else
        table = BlockStrength.parse(family, ",".join(map(str, values[1:]))).table()
        assert list(table.values()) == [1, *values[1:]]


def test_the_help_names_every_family_with_its_blocks_and_vectors():
    text = (Path(__file__).resolve().parents[2] / "web" / "docs" / "LoHaBlockStrength.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    told = {(family, *row[1:]) for row in rows if len(row) == 3 for family in row[0].split(", ")}
    lengths = {family: ", ".join(map(str, sorted(map(len, LAYOUTS[family].vectors())))) for family in FAMILIES}
    assert {(family, str(LAYOUTS[family]), lengths[family]) for family in FAMILIES} <= told


def test_what_a_vector_leaves_out_goes_with_its_neighbour():
    seventeen = "BASE:0,.1,.2,.4,.5,.7,.8,0.9,1.3,1.4,1.5,1.6,1.7,1.8,1.9,1.10,1.11"
    strength = BlockStrength.parse("SD1.5", seventeen)
    expected = {"IN00": 0.1, "IN03": 0.2, "IN06": 0.5, "IN11": 0.8, "M02": 0.9, "OUT00": 1.3, "OUT11": 1.11, "BASE": 0}
    assert {label: strength(key(label)) for label in expected} == expected
    # Flux vectors for the double blocks alone: as elsewhere, the last number goes on.
    front = BlockStrength.parse("Flux", ",".join(["1"] * 6 + ["0"] * 12))
    assert front(key("D04")) == 1 and front(key("D18")) == front(key("S20")) == 0
    assert BlockStrength.parse("Flux", ",".join(["0.5"] * 19))(key("BASE")) == 1


def test_a_vector_tells_the_family_where_its_length_is_one_of_a_kind():
    for (family, length), labels in VECTORS.items():
        text = ",".join(["0.5"] * length)
        if length == 20:
            with pytest.raises(LoHaError, match="may mean SDXL or Flux: choose the family, or connect the model"):
                BlockStrength.parse(None, text)
        else:
            strength = BlockStrength.parse(None, text)
            assert strength.layout == LAYOUTS[family], labels


@pytest.mark.parametrize(
    ("family", "vector", "message"),
    [
        ("SD1.5", "1,2,3", r"the vector has 3 numbers; known lengths are SD1.5: 17, 26, 27, 28\. Or name the blocks"),
        ("Flux", "1", r"has 1 number; known lengths are Flux: 18, 19, 20, 55, 57, 58"),
        (
            None,
            "1,1",
            r"SD1.5: 17, 26, 27, 28; SDXL: 12, 20, 21, 22; SD3: 24, 25; SD3.5 large: 38, 39; Flux: 18.*other",
        ),
        ("SDXL", "1,1,1,x,1,1,1,1,1,1,1,1", "value 4 of the vector: expected a number such as 0.5, found 'x'"),
        ("SDXL", "1,1,R,1", "value 3 of the vector.*letters A, B, R and U .* replaced by numbers"),
        ("SDXL", "1 1,1", "separate values by commas"),
        ("SDXL", "nan,1", "value 1 of the vector: expected a number"),
        ("SDXL", "1,,1", "value 2 of the vector: expected a number such as 0.5, found ''"),
        ("SDXL", "OUT09=1", "no block OUT09; SDXL has IN00…IN08, M00…M02, OUT00…OUT08"),
        ("SDXL", "D=1", "no block D; SDXL has IN00"),
        (None, "INN04=1", "no block INN04; connect the model to name blocks of its own"),
        ("SDXL", "IN04=much", "IN04: expected a number such as 0.5, found 'much'"),
        ("SDXL", "IN04=1, OUT03", "expected 'block=number' such as IN04=0.5 .*, found 'OUT03'"),
        ("SDXL", "IN05-IN04=1", "IN05-IN04: a range goes up within one part"),
        ("SDXL", "IN05-OUT05=1", "IN05-OUT05: a range goes up within one part"),
        ("SDXL", "BASE01=1", "no block BASE01"),
        ("SD9", "", r"no model family 'SD9'; there are SD1\.5"),
    ],
)
def test_errors_in_a_vector(family, vector, message):
    with pytest.raises(LoHaError, match=message):
        BlockStrength.parse(family, vector)


# --- names, presets, rules --------------------------------------------------------------------


def test_named_settings_start_from_the_preset_and_the_last_counts():
    strength = BlockStrength.parse("SDXL", "OUT03-05=0.5\nOUT04=2, base=0.1", preset="OUTALL")
    found = [strength(key(label)) for label in ("IN04", "M01", "OUT02", "OUT03", "OUT04", "BASE")]
    assert found == [0, 0, 1, 0.5, 2, 0.1]
    assert BlockStrength.parse("SDXL", "mid=0.3")(key("M02")) == 0.3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(family, preset):
    parts = {"INALL": "IN", "MIDALL": "M", "OUTALL": "OUT", "DOUBLE": "D", "SINGLE": "S"}
    if preset in parts and parts[preset] not in dict(LAYOUTS[family].parts):
        with pytest.raises(LoHaError, match=f"preset {preset}: no block .*; {family} has"):
            BlockStrength.parse(family, preset=preset)
        return
    table = BlockStrength.parse(family, preset=preset).table()
    on = {label for label, value in table.items() if value == 1}
    if preset in parts:
        assert on == {"BASE", *(label for label in table if label.rstrip("0123456789") == parts[preset])}
    elif preset in ("ALL", "NONE"):
        assert on == ({*table} if preset == "ALL" else set())
    else:
        labels = LAYOUTS[family].labels()
        n = ["EARLY", "MIDDLE", "LATE"].index(preset)
        assert on == {"BASE", *labels[round(n * len(labels) / 3) : round((n + 1) * len(labels) / 3)]}


def test_thirds_of_a_model_of_no_family_and_as_names():
    keys = [f"{UNET}{part}.{n}.x.weight" for part, count in (("a_blocks", 2), ("b_blocks", 4)) for n in range(count)]
    values = list(BlockStrength.parse(keys, "LATE=0.25, early=0.5").table().values())
    assert values == [1, 0.5, 0.5, 1, 1, 0.25, 0.25]
    assert list(BlockStrength.parse(keys[:1], preset="LATE").table().values()) == [1, 0]
    with pytest.raises(LoHaError, match="preset LATE: which blocks LATE means, the model tells: choose the family"):
        BlockStrength.parse(None, preset="LATE")
    with pytest.raises(LoHaError, match="no block LATE01"):
        BlockStrength.parse("Flux", "LATE01=1")


def test_presets_mean_what_the_known_vectors_do():
    known = {
        "SD1.5": {"INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0", "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1"},
        "SDXL": {"MIDALL": "1,0,0,0,0,1,0,0,0,0,0,0", "NONE": "0,0,0,0,0,0,0,0,0,0,0,0"},
    }
    for family, vectors in known.items():
        for preset, vector in vectors.items():
            named, numbers = BlockStrength.parse(family, preset=preset), BlockStrength.parse(family, vector)
            assert named.table() == numbers.table()
    with pytest.raises(LoHaError, match="no preset 'OUT'; there are ALL, NONE"):
        BlockStrength.parse("SDXL", preset="OUT")


def test_rules_multiply_the_block_and_the_last_that_matches_counts():
    rules = "# comment\n\nattn2.*: 0.5\nattn2.to_k: 0.2\n(?:ff|mlp)_net: 3\n"
    strength = BlockStrength.parse("SD1.5", "IN04=0.1", rules)
    block = f"{UNET}input_blocks.{{}}.1.transformer_blocks.0."
    assert strength(block.format(5) + "attn2.to_q.weight") == 0.5
    assert strength(block.format(5) + "attn2.to_k.weight") == 0.2
    assert strength(block.format(4) + "attn2.to_k.weight") == pytest.approx(0.02)
    assert strength(block.format(5) + "attn1.to_k.weight") == 1
    # The file's name of a layer counts as the model's does.
    name = "lora_unet_input_blocks_5_1_transformer_blocks_0_ff_net_0_proj"
    assert strength(block.format(5) + "ff.net.0.proj.weight", name) == 3
    assert strength("clip_l.transformer.text_model.encoder.layers.3.mlp.fc1.weight", "lora_te_layers_3_mlp_fc1") == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("attn2: 1\n(attn: 0.3", r"rule in line 2: '\(attn' is not a regular expression: missing \)"),
        ("attn2", "rule in line 1: expected 'expression: number' such as 'attn2.*: 0.3', found 'attn2'"),
        (": 0.3", "rule in line 1: expected 'expression: number'"),
        ("attn2: strong", "rule in line 1: expected a number such as 0.5, found 'strong'"),
        ("attn2: inf", "rule in line 1: expected a number"),
        ("a{99999999999}: 1", r"rule in line 1: 'a\{9+\}' is not a regular expression"),
        ("x" * 20_001 + ": 1", "rule in line 1: 'x+…' has 20001 letters; at most 20000"),
        ("(a+)+b: 1", r"rule in line 1: '\(a\+\)\+b' may take very long"),
        (".*.*.*.*b: 1", "rule in line 1: .* may take very long to match; use fewer repetitions"),
        (".*.*.*.*z: 1", "rule in line 1: .* may take very long"),
        ("a?" * 12 + "a*z: 1", "may take very long"),
        ("a?" * 20 + "b: 1", "may take very long"),
        ("(a|ab)" * 20 + "b: 1", "may take very long"),
    ],
)
def test_errors_in_rules(rules, message):
    with pytest.raises(LoHaError, match=message):
        BlockStrength.parse("SD1.5", "", rules)


@pytest.mark.parametrize("rule", [".*.*z", "a?a?a?a*z", "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)z"])
def test_no_rule_takes_long(rule):
    strength = BlockStrength.parse("SD1.5", "", rule + ": 1")
    started = time.process_time()  # of this process alone, whatever else the machine does
    strength(f"{UNET}input_blocks.4." + "a" * 60, "a" * 800)
    assert time.process_time() - started < 1


@given(vector=st.text(alphabet="INOUT01=,-.:R \n", max_size=40), rules=st.text(alphabet="ab(*:.1\n# ", max_size=40))
def test_anything_else_is_a_clear_error(vector, rules):
    for model in (None, "SDXL"):
        try:
            strength = BlockStrength.parse(model, vector, rules)
        except LoHaError as error:
            assert str(error)
        else:
            assert isinstance(strength(key("IN04"), "x"), float)


def test_nothing_set_is_one_everywhere_and_values_compare():
    assert all(BlockStrength()(weight) == 1 for weight in KEYS)
    assert BlockStrength.parse("SDXL", "IN=0.5", "a: 1") == BlockStrength.parse("SDXL", "in=.5", "a:1.0")
    assert hash(BlockStrength.parse("SDXL", "IN=0.5", "a: 1"))


def test_a_table_without_a_model_speaks_of_parts():
    table = BlockStrength.parse(None, "OUT03-05=0.5, M01=2", preset="OUTALL").table()
    assert table == {"BASE": 1, "IN": 0, "M": 0, "OUT": 1, "J": 0, "D": 0, "S": 0, "OUT03-05": 0.5, "M01": 2}
