"""The example workflows with what the demo puts in: its checkpoint and LoHas, its prompt, its small pictures.

As they ship, they name no file: on anybody's page they open with the first of their own.
"""

import json
from pathlib import Path
from typing import Any

from . import comfyui, digits

EXAMPLES = comfyui.REPOSITORY / "example_workflows"
LOADER = EXAMPLES / "01 Load a LoHa.json"
GRID = EXAMPLES / "05 Compare strengths in a grid.json"
IMPACT = EXAMPLES / "08 See what matters in a LoHa.json"
TRAIN_FOLDER = EXAMPLES / "09 Train a LoHa on a folder.json"
TRAIN = EXAMPLES / "10 Train a LoHa with every setting.json"
MERGE = EXAMPLES / "11 Merge two LoHas.json"
SLIDER = EXAMPLES / "13 Train a slider from prompts.json"

CHECKPOINT = "loha_demo_digits.safetensors"
LOHA = f"loha_demo_{digits.WORDS[digits.TARGET]}.safetensors"
OTHER = "loha_demo_three.safetensors"
PROMPT = digits.prompt(digits.TARGET)
SIDE = 32
ENLARGED = 8

Values = dict[str, dict[str, Any]]
# By class or title of the nodes; a title's values come last.
EVERYWHERE: Values = {
    "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT},
    "LoHaLoader": {"lora_name": LOHA},
    "LoHaLoadAdapter": {"lora_name": LOHA},
    "Prompt": {"text": PROMPT},
    "EmptyLatentImage": {"width": SIDE, "height": SIDE, "batch_size": 4},
    "KSampler": {"cfg": 2.0},
}
WIDE: Values = {
    "EmptyLatentImage": {"width": 2 * SIDE},
    "Nothing, of the picture's size": {"width": 2 * SIDE, "height": SIDE},
    "Half of the picture": {"width": SIDE, "height": SIDE},
}
ROWS = [{"on": True, "name": LOHA, "strength_model": strength} for strength in (0.6, 0.4)]
OWN: dict[str, Values] = {
    "03 Stack several LoHas": {"LoHaStack": {"rows": json.dumps(ROWS), "text": "on white paper"}},
    "04 Blocks and schedule": {"LoHaBlockStrength": {"vector": "IN00-IN01=0.8, OUT=1, BASE=1"}},
    "05 Compare strengths in a grid": {"LoHaGridImage": {"size": 96}},
    "06 A LoHa in part of the picture": WIDE,
    "07 A LoHa for each prompt": WIDE
    | {
        "Prompt: left": {"text": PROMPT},
        "Prompt: right": {"text": digits.prompt(3)},
        "The other LoHa": {"lora_name": OTHER},
    },
    "08 See what matters in a LoHa": {
        "LoHaImpact": {"cfg": 2.0},
        "LoHaSave": {"filename": "loha_demo_seven_pruned"},
    },
    "09 Train a LoHa on a folder": {
        "LoHaTrainFolder": {
            "folder": "loha_demo_seven",
            "trigger_word": PROMPT,
            "name": "loha_demo_folder",
            "steps": 150,
            "rank": 8,
            "learning_rate": 0.003,
        }
    },
    "10 Train a LoHa with every setting": {
        "What to learn": {"folder": "loha_demo_seven"},
        "What to keep in memory": {"folder": "loha_demo_known"},
        "LoHaDataset": {"resolution": 0, "repeats": 3},
        "LoHaOptimizer": {"learning_rate": 0.003, "warmup_steps": 15},
        "LoHaTrainer": {
            "name": "loha_demo_seven",
            "steps": 150,
            "batch_size": 32,
            "mixed_precision": "fp32",
            "save_every": 50,
        },
        "LoHaSave": {"filename": "loha_demo_seven", "trigger_words": PROMPT},
    },
    "11 Merge two LoHas": {
        "Prompt": {"text": digits.prompt(3)},
        "The other LoHa": {"lora_name": OTHER},
        "LoHaSave": {"filename": "loha_demo_merged"},
    },
    "13 Train a slider from prompts": {
        "LoHaSlider": {
            "positive": digits.prompt(2),
            "negative": digits.prompt(6),
            "target": "",
            "guidance": 2.0,
            "denoising_steps": 8,
        },
        "LoHaOptimizer": {"learning_rate": 0.003, "warmup_steps": 15},
        "LoHaTrainer": {
            "name": "loha_demo_slider",
            "steps": 80,
            "batch_size": 8,
            "mixed_precision": "fp32",
            "gradient_checkpointing": False,
            "save_every": 0,
        },
        "LoHaSave": {"filename": "loha_demo_slider"},
        "LoHaGridImage": {"size": 96},
        "Prompt": {"text": ""},
        "KSampler": {"cfg": 1.0},
    },
    "14 Train a slider from pairs of pictures": {
        "Strength 1": {"folder": "loha_demo_pairs_seven"},
        "Strength -1": {"folder": "loha_demo_pairs_three"},
        "LoHaDataset": {"resolution": 0},
    },
    "15 Train and keep the class": {
        "What to learn": {"folder": "loha_demo_seven"},
        "LoHaDataset": {"resolution": 0, "trigger_word": PROMPT},
        "LoHaPreservation": {"trigger_word": "seven", "class_word": "two, four"},
        "LoHaTrainer": {"name": "loha_demo_kept", "steps": 150, "batch_size": 16, "mixed_precision": "fp32"},
        "LoHaSave": {"filename": "loha_demo_kept", "trigger_words": PROMPT},
    },
}

# An app is one of the others with the inputs that it shows.
OWN["Train LoHa on my pictures.app"] = OWN[TRAIN_FOLDER.stem]
OWN["Compare strengths.app"] = OWN[GRID.stem]


def filled(path: Path, *, enlarged: bool = False) -> comfyui.Json:
    """An example workflow with the demo's values, as the front end saves it; ``enlarged`` shows large pictures."""
    workflow = json.loads(path.read_text("utf-8"))
    for node in workflow["nodes"]:
        node["mode"] = 0  # what is muted waits for files of one's own
        for name in (node["type"], node.get("title", "")):
            for values in (EVERYWHERE, OWN.get(path.stem, {})):
                for widget, value in values.get(name, {}).items():
                    _set(node, widget, value)
    if enlarged:
        _enlarge(workflow)
    return workflow


def job(server: comfyui.Server, path: Path, settings: Values | None = None) -> comfyui.Json:
    """An example workflow in API format with the demo's values, and with ``settings`` by class of node."""
    prompt = comfyui.to_api(filled(path), server.object_info())
    for node in prompt.values():
        node["inputs"] |= (settings or {}).get(node["class_type"], {})
    return prompt


def _set(node: comfyui.Json, name: str, value: Any) -> None:
    """A widget's value, or the next one of a node that has been saved without."""
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    if "seed" in names and node["type"] == "KSampler":
        names.insert(names.index("seed") + 1, "control_after_generate")
    values = node.setdefault("widgets_values", [])
    place = names.index(name)
    assert place <= len(values), f"{node['type']}: {name} before those above it"
    values[place : place + 1] = [value]


def _enlarge(workflow: comfyui.Json) -> None:
    """A nearest-neighbour ×8 before what is saved: a picture of 32 pixels is a speck on the page."""
    [save] = [node for node in workflow["nodes"] if node["type"] in ("SaveImage", "PreviewImage")]
    node_id, link_id = workflow["last_node_id"] + 1, workflow["last_link_id"] + 1
    [link] = [link for link in workflow["links"] if link[3] == save["id"]]
    x, y = save["pos"]
    scale = {
        "id": node_id,
        "type": "ImageScaleBy",
        "pos": [x, y],
        "size": [save["size"][0], 82],
        "flags": {},
        "order": save["order"],
        "mode": 0,
        "inputs": [
            {"name": "image", "type": "IMAGE", "link": link[0]},
            {
                "name": "upscale_method",
                "type": "COMBO",
                "widget": {"name": "upscale_method"},
                "link": None,
            },
            {"name": "scale_by", "type": "FLOAT", "widget": {"name": "scale_by"}, "link": None},
        ],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [link_id]}],
        "properties": {"Node name for S&R": "ImageScaleBy"},
        "widgets_values": ["nearest-exact", float(ENLARGED)],
    }
    link[3:5] = [node_id, 0]
    save["inputs"][0]["link"] = link_id
    save["pos"] = [x, y + 200]
    save["order"] += 1
    workflow["nodes"].append(scale)
    workflow["links"].append([link_id, node_id, 0, save["id"], 0, "IMAGE"])
    workflow |= {"last_node_id": node_id, "last_link_id": link_id}
