"""From a file's module names to a model's weights."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from loha_core import Adapter, Binding, LoHaError, LoHaFactors, Network, bind
from loha_core.naming.names import flat, split
from loha_core.naming.parts import swap_halves
from loha_core.naming.tables import FAMILIES

from . import families, samples

# A UNet and two text encoders as ComfyUI's key maps name them: several spellings for one weight.
PATHS = {
    "down_blocks.0.attentions.0.proj_in": ("input_blocks.1.1.proj_in.weight", (8, 8, 1, 1)),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": ("input_blocks.1.1.to_out.0.weight", (8, 8)),
    "mid_block.resnets.0.conv1": ("middle_block.0.in_layers.2.weight", (8, 4, 3, 5)),
    "time_embedding.linear_1": ("time_embed.0.weight", (12, 8)),
}
TEXT = "text_model.encoder.layers.0.mlp.fc1"


def unet() -> Network:
    targets = {}
    for path, (key, _) in PATHS.items():
        targets[f"lora_unet_{path.replace('.', '_')}"] = key
        targets[f"unet.{path}"] = key
        targets[f"diffusion_model.{key.removesuffix('.weight')}"] = key
    return Network(targets, dict(PATHS.values()))


def clip() -> Network:
    targets = {
        f"lora_te1_{TEXT.replace('.', '_')}": "clip_l.fc1.weight",
        f"lora_te2_{TEXT.replace('.', '_')}": "clip_g.fc1.weight",
        f"text_encoder.{TEXT}": "clip_l.fc1.weight",
    }
    return Network(targets, {"clip_l.fc1.weight": (8, 4), "clip_g.fc1.weight": (16, 8)})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "spelling",
    [
        "lora_unet_{flat}",
        "lora_transformer_{flat}",
        "lora_prior_unet_{flat}",
        "lycoris_{flat}",
        "unet.{path}",
        "transformer.{path}",
        "base_model.model.{path}",
        "base_model.model.unet.{path}",
        "unet.base_model.model.{path}",
        "{path}",
        "diffusion_model.{native}",
        "model.diffusion_model.{native}",
        "lora_unet_{flat_native}",
    ],
)
def test_every_spelling_finds_the_weight(path, spelling):
    key = PATHS[path][0]
    native = key.removesuffix(".weight")
    parts = {"path": path, "flat": path.replace(".", "_"), "native": native, "flat_native": native.replace(".", "_")}
    assert unet().find(spelling.format(**parts)) == key


@pytest.mark.parametrize("name", ["to_out", "to_out.0", "processor.to_out"])
def test_diffusers_older_names_of_attention(name):
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    assert unet().find(f"unet.{block}{name}") == "input_blocks.1.1.to_out.0.weight"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lora_te_{flat}", "clip_l.fc1.weight"),
        ("lora_te1_{flat}", "clip_l.fc1.weight"),
        ("lora_te2_{flat}", "clip_g.fc1.weight"),
        ("text_encoder.{path}", "clip_l.fc1.weight"),
        ("text_encoder_2.{path}", "clip_g.fc1.weight"),
        ("text_encoders.clip_l.transformer.{path}", "clip_l.fc1.weight"),
        ("text_encoders.clip_g.transformer.{path}", "clip_g.fc1.weight"),
        ("lora_te3_{flat}", None),
        ("lora_unet_{flat}", None),
        ("unet.{path}", None),
    ],
)
def test_text_encoders_are_told_apart(name, key):
    assert clip().find(name.format(path=TEXT, flat=TEXT.replace(".", "_"))) == key


def test_a_name_or_a_model_that_does_not_say_its_network():
    bare = Network({"a.b": "w"}, {"w": (4, 4)})
    assert {bare.find(name) for name in ("a.b", "unet.a.b", "lora_te_a_b", "lycoris_a_b")} == {"w"}
    both = Network({"text_encoder.a": "t", "unet.a": "u", "text_encoder.b": "t"}, {"t": (4, 4), "u": (4, 4)})
    assert (both.find("lycoris_a"), both.find("lycoris_b")) == ("u", "t")


@pytest.mark.parametrize("name", ["lora_unet_mid_block_resnets_0_conv2", "unet.mid_block", "", "lora_unet_", "."])
def test_no_weight_is_guessed(name):
    assert unet().find(name) is None


def test_two_weights_behind_one_name_are_neither():
    shortened = Network({"unet.a.to_out": "x", "unet.a.to_out.0": "y"}, {"x": (4, 4), "y": (4, 4)})
    assert shortened.find("lycoris_a_to_out_0") is None
    assert (shortened.find("unet.a.to_out"), shortened.find("lora_unet_a_to_out_0")) == ("x", None)
    flattened = Network({"a.b_c": "x", "a_b.c": "y", "a.b.c": "x"}, {"x": (4, 4), "y": (4, 4)})
    assert flattened.find("a_b_c") is None


def test_slices_of_a_fused_weight():
    """ComfyUI names q, k and v of a fused weight as (key, (axis, start, length))."""
    targets = {f"lora_unet_attn_to_{n}": ("qkv.weight", (0, 8 * i, 8)) for i, n in enumerate("qkv")}
    network = Network(targets, {"qkv.weight": (24, 6)})
    names = list(targets)
    assert network.find("unet.attn.to_k") == ("qkv.weight", (0, 8, 8))
    assert network.shape(network.find("unet.attn.to_k")) == (8, 6) and network.shape("qkv.weight") == (24, 6)
    layers = {name: samples.factors((8, 6), seed=i) for i, name in enumerate(names)}
    bound = bind(Adapter(layers), {"UNet": network})
    assert [target for _, target, _ in bound.layers["UNet"]] == list(targets.values()) and not bound.report.unmatched
    with pytest.raises(LoHaError, match=r"to_q.*\(24, 6\) for a weight of shape \(8, 6\)"):
        bind(Adapter({names[0]: samples.factors((24, 6))}), {"UNet": network})


@pytest.mark.parametrize("target", [("w",), ("w", None), ("w", None, abs)], ids=str)
def test_targets_that_slice_nothing(target):
    assert Network({"unet.a": target}, {"w": (3, 2)}).shape(target) == (3, 2)


def acting(bound: Binding, label: str = "UNet") -> dict[object, list[LoHaFactors]]:
    """weight -> the updates that act on it."""
    found = defaultdict(list)
    for _, target, factors in bound.layers[label]:
        found[target].append(factors)
    return found


def adapter(**layers) -> Adapter:
    return Adapter(layers, source="style.safetensors", notes=["odd"])


def test_bind_puts_each_layer_on_its_weight():
    layers = {
        "lora_unet_time_embedding_linear_1": samples.factors((12, 8)),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": samples.factors((16, 8)),
        "lora_unet_mid_block_resnets_0_conv1": samples.factors((8, 4, 3, 5), tucker=True),
    }
    bound = bind(adapter(**layers), {"UNet": unet(), "CLIP": clip()})
    assert acting(bound) == {
        "time_embed.0.weight": [layers["lora_unet_time_embedding_linear_1"]],
        "middle_block.0.in_layers.2.weight": [layers["lora_unet_mid_block_resnets_0_conv1"]],
    }
    assert acting(bound, "CLIP") == {"clip_g.fc1.weight": [layers["lora_te2_text_model_encoder_layers_0_mlp_fc1"]]}
    assert bound.report.matched == {
        "UNet": [n for n in layers if "unet" in n],
        "CLIP": [n for n in layers if "te2" in n],
    }
    text = bound.report.text()
    assert "style.safetensors" in text and "UNet: 2 layers" in text and "CLIP: 1 layers" in text and "note: odd" in text


def test_one_layer_under_two_names_is_applied_once():
    same = samples.factors((12, 8))
    names = ["lora_unet_time_embedding_linear_1", "unet.time_embedding.linear_1", "lycoris_time_embedding_linear_1"]
    copies = {names[0]: same, names[1]: same.to(), names[2]: samples.factors((12, 8), seed=1)}
    bound = bind(adapter(**copies), {"UNet": unet()})
    kept = [(names[0], "time_embed.0.weight", same), (names[2], "time_embed.0.weight", copies[names[2]])]
    assert bound.layers["UNet"] == kept
    assert any(names[1] in note and "once" in note for note in bound.report.notes)
    assert bound.report.matched["UNet"] == names and not bound.report.unmatched


@pytest.mark.parametrize(
    "change",
    [{"alpha": 3.0}, {"dtype": torch.float16}, {"rank": 3}, {"dora_axis": 0}],
    ids=str,
)
def test_layers_that_differ_at_all_are_both_applied(change):
    first, second = samples.factors((12, 8)), samples.factors((12, 8), **change)
    names = {"lora_unet_time_embedding_linear_1": first, "unet.time_embedding.linear_1": second}
    found = bind(adapter(**names), {"UNet": unet()}).layers["UNet"]
    assert [factors for _, _, factors in found] == [first, second]


MISFITS = {
    "another width": (
        "time_embedding_linear_1",
        samples.factors((12, 9)),
        r"\(12, 9\) for a weight of shape \(12, 8\)",
    ),
    "another length": ("time_embedding_linear_1", samples.factors((6, 8)), r"\(6, 8\)"),
    "as many elements": ("time_embedding_linear_1", samples.factors((8, 12)), r"\(8, 12\)"),
    "another kernel": ("mid_block_resnets_0_conv1", samples.factors((8, 4, 3, 3)), r"\(8, 36\)"),
    "a kernel turned round": (
        "mid_block_resnets_0_conv1",
        samples.factors((8, 4, 5, 3), tucker=True),
        r"\(8, 4, 5, 3\) for a weight of shape \(8, 4, 3, 5\)",
    ),
    "Tucker with other inputs": (
        "mid_block_resnets_0_conv1",
        samples.factors((8, 12, 5), tucker=True),
        r"\(8, 12, 5\)",
    ),
    "DoRA of neither axis": (
        "mid_block_resnets_0_conv1",
        samples.factors((8, 60), dora_axis=1),
        r"dora_scale \(1, 60\)",
    ),
}


@pytest.mark.parametrize(("path", "wrong", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_binds_nothing(path, wrong, message):
    layers = {"lora_unet_down_blocks_0_attentions_0_proj_in": samples.factors((8, 8)), f"lora_unet_{path}": wrong}
    with pytest.raises(LoHaError, match=message) as caught:
        bind(adapter(**layers), {"UNet": unet()})
    text = str(caught.value)
    assert "style.safetensors" in text and f"lora_unet_{path}" in text and "1 of 2" in text and "Nothing was" in text


def test_pefts_convolution_of_width_one_fits():
    """(r, r, k) for a kernel (k, 1): the same numbers."""
    network = Network({"unet.a": "w"}, {"w": (6, 4, 3, 1)})
    f = samples.factors((6, 4, 3), tucker=True)
    assert bind(Adapter({"unet.a": f}), {"UNet": network}).layers["UNet"] == [("unet.a", "w", f)]


REASONS = {
    "CLIP not connected": ("lora_te_text_model_x", ["CLIP"], ["UNet"], "belongs to the CLIP, and none is connected"),
    "UNet not connected": ("unet.x", ["UNet"], ["CLIP"], "belongs to the UNet, and none is connected"),
    "native text encoder": ("text_encoders.clip_l.transformer.x", ["CLIP"], ["UNet"], "belongs to the CLIP"),
    "in neither": ("lora_unet_x", [], ["UNet", "CLIP"], "no such layer in the UNet or CLIP"),
    "CLIP absent, UNet's key": ("lora_unet_x", ["CLIP"], ["UNet"], "no such layer in the UNet"),
}


@pytest.mark.parametrize(("name", "absent", "present", "message"), REASONS.values(), ids=REASONS)
def test_the_reason_for_what_found_no_weight(name, absent, present, message):
    networks = {label: {"UNet": unet, "CLIP": clip}[label]() for label in present}
    report = bind(adapter(**{name: samples.factors((4, 4))}), networks, absent).report
    assert message in report.unmatched[name] and not any(report.matched.values())
    assert name in report.text() and message in report.text()


def test_a_long_report_is_cut_where_asked():
    layers = {f"lora_unet_none_{i}": samples.factors((4, 4)) for i in range(9)}
    report = bind(adapter(**layers), {"UNet": unet()}).report
    assert "not applied: 9" in report.text(limit=2) and "… and 7 more" in report.text(limit=2)
    assert sum("lora_unet_none_" in line for line in report.text(limit=2).splitlines()) == 2
    assert sum("lora_unet_none_" in line for line in report.text().splitlines()) == 9


# --- families of the tables ------------------------------------------------------------------------------------------

SPELLED = {
    "kohya's of diffusers' model": lambda name: f"lora_unet_{flat(name)}",
    "SimpleTuner": lambda name: f"lycoris_{flat(name)}",
    "OneTrainer": lambda name: f"lora_transformer_{flat(name)}",
    "diffusers": lambda name: f"transformer.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "an old script's": lambda name: f"unet.base_model.model.{name}",
    "native prefix": lambda name: f"diffusion_model.{name}",
    "bare": lambda name: name,
}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_name_of_a_family_leads_to_its_weight_and_its_rows(family, prefix):
    weights = families.weights(family)
    shapes = {f"{prefix}{name}.weight": shape for name, shape in weights.items()}
    network = Network({f"diffusion_model.{name}": f"{prefix}{name}.weight" for name in weights}, shapes)
    for name, shape in weights.items():
        key = f"{prefix}{name}.weight"
        whole = family.weight(split(flat(name))[1])
        for part, span in (*whole.parts, *family.others(split(flat(name))[1])):
            if family.weight(split(flat(part))[1]) not in (None, whole):
                continue  # one side's name for this is the other's for something else: the original's counts
            rows = None if span is None or span.swapped else (0, *span.rows(*shape))
            wanted = key if rows in (None, (0, 0, shape[0])) else (key, rows)
            if span is not None and span.swapped:
                wanted = (key, None, swap_halves)
            for spelled in SPELLED.values():
                assert network.find(spelled(part)) == wanted, spelled(part)


def test_swapped_halves_are_put_right():
    shapes = {f"diffusion_model.{name}.weight": shape for name, shape in families.weights(FAMILIES["Flux"]).items()}
    factors = families.factors((16, 8), 2, 1.0, 0)
    bound = bind(Adapter({"transformer.norm_out.linear": factors}), {"MODEL": Network({}, shapes)})
    [(_, target, found)] = bound.layers["MODEL"]
    assert target == "diffusion_model.final_layer.adaLN_modulation.1.weight"
    assert torch.equal(found.delta(), factors.delta().roll(8, 0))


@pytest.mark.parametrize(
    ("key", "names"),
    [
        (
            "qwen3_4b.transformer.model.layers.3.self_attn.q_proj.weight",
            ["lora_te_layers_3_self_attn_q_proj", "lora_te1_model_layers_3_self_attn_q_proj",
             "text_encoder.model.layers.3.self_attn.q_proj", "text_encoder.layers.3.self_attn.q_proj"],
        ),
        (
            "t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q.weight",
            ["lora_te2_encoder_block_2_layer_0_SelfAttention_q", "lora_te3_encoder_block_2_layer_0_SelfAttention_q",
             "text_encoder_2.encoder.block.2.layer.0.SelfAttention.q"],
        ),
    ],
)  # fmt: skip
def test_text_encoders_of_any_number(key, names):
    clip = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    network = Network({"lora_te1_text_model_encoder_layers_0_mlp_fc1": clip}, {key: (4, 4), clip: (4, 4)})
    assert {network.find(name) for name in names} == {key}
    assert network.find("lora_te1_text_model_encoder_layers_0_mlp_fc1") == clip
    assert network.find("lora_te2_text_model_encoder_layers_0_mlp_fc1") is None  # another CLIP's
