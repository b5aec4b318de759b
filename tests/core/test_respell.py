"""Names of every family, there and back: fused layers cut, parts joined, and the updates what they were."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loha_core import Adapter, Compression, LoHaError, load_adapter, merge, save_adapter, to_lora
from loha_core.adapter import module_names, split_layers
from loha_core.cli import main
from loha_core.factors import LoRAFactors
from loha_core.naming.names import flat, path_of
from loha_core.naming.parts import cut, joined, swapped
from loha_core.naming.readers import unread
from loha_core.naming.recognise import families_of
from loha_core.naming.respell import like, respelled
from loha_core.naming.tables import FAMILIES
from loha_core.transform.lowrank import product

from . import families
from .pairwise import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

STYLES = {
    "kohya": r"lora_unet_\w+(-\d)?\w*",
    "native": r"diffusion_model\.[\w.-]+",
    "diffusers": r"transformer\.[\w.-]+",
}
# No other family has it, in either spelling.
FLUX_ALONE = "lora_unet_double_blocks_0_img_mod_lin"
EVERY = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """By the original's weight, from layers on either side: put together here by the table's spans."""
    family = families_of(path_of(name) for name in module_names(adapter))[0]
    side = family.side([path_of(name) for name in module_names(adapter)])
    shapes = families.weights(family)
    found = {}
    for name, layer in split_layers(adapter)[0].items():
        weight, span = family.place(path_of(name), side)
        u, v = product(layer)
        whole = found.setdefault(weight, torch.zeros(shapes[weight], dtype=torch.float64))
        if span is None:
            whole += (u @ v).double()
        elif span.swapped:
            whole += torch.cat((u @ v).double().chunk(2)[::-1])
        else:
            start, length = span.rows(*shapes[weight])
            whole[start : start + length] += (u @ v).double()
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], times: float = 1.0) -> None:
    assert sorted(found) == sorted(wanted)
    for name, delta in wanted.items():
        assert (found[name] - times * delta).norm() <= 1e-6 * times * delta.norm(), name


@EVERY
@pytest.mark.parametrize("style", STYLES)
def test_every_style_says_the_same(family, style):
    adapter = families.native(family)
    found = respelled(adapter, style)
    assert all(re.fullmatch(STYLES[style], name) for name in found.layers)
    assert_same(deltas(found), deltas(adapter))
    if style == "diffusers":
        assert len(found.layers) == len({(row.diffusers, n) for row in family.rows for n in _numbers(row.native)})


def _numbers(name: str) -> range:
    return range(2 if "N" in name.split(".") else 1)


@EVERY
def test_there_and_back_is_the_file_itself(family):
    """What was cut from one layer becomes that layer again, bit for bit and at its rank."""
    adapter = families.native(family)
    back = respelled(respelled(adapter, "diffusers"), "kohya")
    assert sorted(back.layers) == sorted(adapter.layers)
    for name, layer in adapter.layers.items():
        again = back.layers[name]
        assert again.alpha == layer.alpha
        assert all(torch.equal(again.tensors()[part], tensor) for part, tensor in layer.tensors().items()), name


@EVERY
def test_parts_that_were_trained_apart_are_joined(family):
    whole = respelled(families.native(family), "diffusers")
    apart = {
        name: families.factors(layer.shape, 2, 1.0 + n % 3, 100 + n)
        for n, (name, layer) in enumerate(whole.layers.items())
    }
    adapter = Adapter(apart, source="apart")
    made = respelled(adapter, "native")
    assert_same(deltas(made), deltas(adapter))
    counts = {name: len(family.weight(path_of(name)).parts) for name in made.layers}
    assert {name: layer.rank for name, layer in made.layers.items()} == {n: 2 * count for n, count in counts.items()}
    if max(counts.values()) > 1:
        assert any("joined" in note for note in made.notes)
    lora = to_lora(adapter).adapter
    assert_same(deltas(respelled(lora, "native")), deltas(adapter))


@pairwise(family=list(FAMILIES), first=list(STYLES), second=list(STYLES))
def test_two_spellings_of_one_adapter_merge_to_twice_the_adapter(family, first, second):
    """Row 3 of issue 14."""
    adapter = families.native(FAMILIES[family])
    one = respelled(adapter, first)
    made, report = merge([one, respelled(adapter, second)])
    assert sorted(made.layers) == sorted(one.layers)
    assert_same(deltas(made), deltas(adapter), 2.0)
    assert report.error < 1e-6


def test_flux_and_its_parts_trained_apart():
    """Both kinds of file, with layers that only one of them has; the ranks are said."""
    fused = families.native(FAMILIES["Flux"], seed=1)
    parts = respelled(families.native(FAMILIES["Flux"], seed=300), "diffusers")
    del fused.layers["lora_unet_single_blocks_1_linear1"], parts.layers["transformer.transformer_blocks.0.attn.to_k"]
    for pair in ([fused, parts], [parts, fused]):
        made, report = merge(pair, [0.5, -2.0])
        found, wanted = deltas(made), {}
        for adapter, weight in zip(pair, (0.5, -2.0), strict=True):
            for name, delta in deltas(adapter).items():
                wanted[name] = wanted.get(name, 0) + weight * delta
        assert_same(found, wanted)
        assert any("cut into their parts" in note or "joined" in note for note in report.notes)
    loras = merge([fused, parts], 1.0, Compression(kind="lora", rank=4)).adapter
    assert {type(layer) for layer in split_layers(loras)[0].values()} == {LoRAFactors}


def test_sd3s_last_block_is_swapped_and_others_are_not():
    """The modulation of the last block's context: scale and shift in the other order."""
    names = [f"lora_unet_joint_blocks_{n}_context_block_adaLN_modulation_1" for n in (0, 23)]
    inner, last, qkv = (families.factors((rows, 8), 2, 1.0, rows) for rows in (48, 16, 24))
    adapter = Adapter({names[0]: inner, names[1]: last, "lora_unet_joint_blocks_0_x_block_attn_qkv": qkv})
    found = respelled(adapter, "diffusers").layers
    assert torch.equal(found["transformer.transformer_blocks.0.norm1_context.linear"].delta(), inner.delta())
    changed = found["transformer.transformer_blocks.23.norm1_context.linear"].delta()
    assert torch.equal(changed, last.delta().roll(8, 0)) and not torch.equal(changed, last.delta())


def test_a_part_that_only_others_have():
    """Some write queries, keys and values of Flux' single blocks as one, beside the rest of the fused weight."""
    layer = families.factors((24, 8), 2, 1.0, 0)
    adapter = Adapter({"diffusion_model.single_blocks.0.linear1_qkv": layer, FLUX_ALONE: layer})
    found = respelled(adapter, "diffusers").layers
    lead = "transformer.single_transformer_blocks.0.attn.to_"
    assert torch.equal(torch.cat([found[f"{lead}{part}"].delta() for part in "qkv"]), layer.delta())
    whole = respelled(adapter, "native").layers["diffusion_model.single_blocks.0.linear1"].delta()
    assert torch.equal(whole[:24], layer.delta()) and whole.shape == (56, 8) and not whole[24:].any()


def test_parts_that_are_there_twice_count_once_if_they_are_the_same():
    lead = "single_transformer_blocks.0.attn.to_q"
    layer, other = (families.factors((8, 8), 2, 1.0, seed) for seed in (0, 1))
    names = [f"transformer.{lead}", f"lycoris_{flat(lead)}"]
    found = respelled(Adapter(dict.fromkeys([*names, FLUX_ALONE], layer)), "native")
    assert torch.equal(found.layers["diffusion_model.single_blocks.0.linear1"].delta()[:8], layer.delta())
    shared = replace(other, w1_b=layer.w1_b, w2_b=layer.w2_b)
    for twin in (other, shared):
        with pytest.raises(LoHaError, match="two names"):
            respelled(Adapter({names[0]: layer, names[1]: twin, FLUX_ALONE: layer}), "native")


def test_a_lora_in_pefts_names():
    """Its layers' names come without PEFT's wrapper, in which the file has them."""
    loras = to_lora(respelled(families.native(FAMILIES["Flux"]), "diffusers")).adapter
    keys = {f"base_model.model.{key.removeprefix('transformer.')}": t for key, t in loras.extras.items()}
    found = respelled(Adapter({}, keys), "native")
    assert all(name.startswith("diffusion_model.") for name in split_layers(found)[0])
    assert_same(deltas(found), deltas(families.native(FAMILIES["Flux"])))


def test_dora_of_parts():
    """Magnitudes along the outputs go with their rows; along the inputs they are of the whole, and it is refused."""
    name, part = "lora_unet_single_blocks_0_linear1", "transformer.single_transformer_blocks.0.attn.to_v"
    base = families.factors((56, 8), 2, 1.0, 0)
    others = {FLUX_ALONE: families.factors((8, 8), 2, 1.0, 1)}
    rows = replace(base, dora_scale=torch.rand(56, 1))
    there = respelled(Adapter({name: rows} | others), "diffusers")
    found = {n: layer.dora_scale for n, layer in there.layers.items() if layer.dora_scale is not None}
    assert len(found) == 4 and torch.equal(torch.cat(list(found.values())), rows.dora_scale)
    back = respelled(there, "kohya").layers[name]
    assert torch.equal(back.dora_scale, rows.dora_scale)
    columns = replace(base, dora_scale=torch.rand(1, 8))
    with pytest.raises(LoHaError, match=rf"f\.st: {name}: DoRA along the inputs"):
        respelled(Adapter({name: columns} | others, source="f.st"), "diffusers")
    del there.layers[part]
    with pytest.raises(LoHaError, match="only along the outputs and where every part has it"):
        respelled(there, "kohya")


def test_other_kinds_of_a_fused_weight_are_refused_by_name():
    adapter = Adapter(
        {"lora_unet_double_blocks_0_img_attn_proj": families.factors((8, 8), 2, 1.0, 0)},
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": torch.ones(2, 2),
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": torch.ones(12, 4),
        },
        source="mixed.safetensors",
    )
    with pytest.raises(LoHaError, match=r"mixed\.safetensors: lora_unet_double_blocks_0_img_attn_qkv\.lokr_w1 is of"):
        respelled(adapter, "diffusers")


def test_what_is_known_twice_counts_once_or_is_refused():
    layer, other = (families.factors((8, 8), 2, 1.0, seed) for seed in (0, 1))
    names = ["lora_unet_single_transformer_blocks_0_proj_out", "transformer.single_transformer_blocks.0.proj_out"]
    flux = {FLUX_ALONE: other}
    assert len(respelled(Adapter(dict.fromkeys(names, layer) | flux), "native").layers) == 2
    with pytest.raises(LoHaError, match="two names"):
        respelled(Adapter({names[0]: layer, names[1]: other} | flux), "native")


def test_names_that_mean_different_weights_are_refused():
    """Of attention alone nobody can say whose it is."""
    adapter = Adapter(
        {"transformer.transformer_blocks.0.attn.to_q": families.factors((8, 8), 2, 1.0, 0)}, source="a.st"
    )
    with pytest.raises(LoHaError, match=r"a\.st: its names are those of Flux and .*SD3.*keep the names"):
        respelled(adapter, "native")


def test_like_leaves_what_speaks_alike():
    adapter = families.native(FAMILIES["Flux"])
    assert like(adapter, adapter.layers) is adapter
    assert like(adapter, ["some.other.model"]) is adapter
    assert like(adapter, respelled(adapter, "diffusers").layers).layers.keys() != adapter.layers.keys()


@pytest.mark.parametrize("rank", [1, 3])
def test_parts_by_themselves(rank):
    layer = families.factors((12, 6), rank, 2.0, 0)
    delta = layer.delta()
    assert torch.equal(cut("x", layer, 3, 5).delta(), delta[3:8])
    assert torch.equal(swapped(layer).delta(), delta.roll(6, 0))
    tall = families.factors((18, 6), rank, 2.0, 0)
    assert swapped(tall) is tall
    with pytest.raises(LoHaError, match="rows 8 to 14"):
        cut("x", layer, 8, 6)
    pieces = [(0, families.factors((4, 6), rank, 2.0, 1)), (7, families.factors((5, 6), 2, -1.0, 2))]
    whole = joined("x", pieces, 12).delta()
    for start, piece in pieces:
        torch.testing.assert_close(whole[start : start + piece.shape[0]], piece.delta(), rtol=1e-6, atol=1e-6)
    assert not whole[4:7].any()


def test_names_are_flat_for_kohya():
    assert set(respelled(families.native(FAMILIES["Flux"]), "kohya").layers) == {
        f"lora_unet_{flat(name)}" for name in families.weights(FAMILIES["Flux"])
    }


def test_the_page_of_all_names_is_what_the_tables_say():
    page = Path(__file__).parents[2] / "docs" / "formats.md"
    spec = importlib.util.spec_from_file_location("formats_page", page.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert page.read_text(encoding="utf-8") == module.page(), "write it again: PYTHONPATH=. python docs/formats.py"


@pytest.mark.parametrize(
    ("spelling", "said"),
    [
        ("lora_unet_double_blocks_0_img_mod_lin", None),
        ("diffusion_model.double_blocks.0.img_mod.lin", "kohya's scripts may not find 1 of 1"),
        ("transformer.single_transformer_blocks.0.norm.linear", "kohya's scripts may not find 1 of 1"),
        ("lycoris_blocks_0_ffn_net_0_proj", "ComfyUI's own loader and kohya's scripts may not find 1 of 1"),
        ("lora_unet_mid_block_attentions_0_proj_in", None),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", None),
        ("a.model.of.my.own", None),
    ],
)
def test_who_may_not_find_it(spelling, said):
    assert (unread([spelling]) or "None").startswith(str(said))


def test_pefts_style_is_its_folder(tmp_path):
    adapter = families.native(FAMILIES["Wan"])
    save_adapter(adapter, tmp_path / "in.safetensors")
    assert main(["convert", str(tmp_path / "in.safetensors"), "--names", "peft", "-o", str(tmp_path / "a")]) == 0
    save_adapter(adapter, tmp_path / "b", names="peft")
    for name in "ab":
        assert (tmp_path / name / "transformer" / "adapter_config.json").is_file()
        found = load_adapter(tmp_path / name)
        assert "transformer.blocks.0.attn1.to_q" in found.layers
        assert_same(deltas(found), deltas(adapter))
