"""The nodes in a real server: lists, runs, and errors that a user sees."""

from __future__ import annotations

import io
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from demo.comfyui import ComfyUIError, Server

from . import reduced

NODES = ("LoHaLoader", "LoHaLoadAdapter", "LoHaApply", "LoHaInfo")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    """A good file and a PEFT folder in the server's loras folder."""
    folder = server.path("models", "loras", "good.safetensors").parent
    models = reduced.build("sd15")
    path, _ = reduced.write(models, "kohya", folder)
    path.rename(folder / "good.safetensors")
    reduced.write(models, "peft", folder)
    return folder


def info(name: str) -> dict:
    """A workflow that loads an adapter and looks into it; needs no checkpoint."""
    return {
        "1": {"class_type": "LoHaLoadAdapter", "inputs": {"lora_name": name, "legacy_tucker": False}},
        "2": {"class_type": "LoHaInfo", "inputs": {"loha": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }


def refresh(server: Server) -> list[str]:
    return server.object_info("LoHaLoader")["input"]["required"]["lora_name"][1]["options"]


def test_every_node_is_there_with_tooltips_and_help(server, loras):
    for node in NODES:
        description = server.object_info(node)
        assert description["category"] == "LoHa" and description["description"]
        for section in ("required", "optional"):
            for name, spec in description["input"].get(section, {}).items():
                assert spec[1].get("tooltip"), f"{node}.{name}"
        assert all(description["output_tooltips"]), node
        assert (REPOSITORY / "web" / "docs" / f"{node}.md").read_text().startswith("# ")
        assert server.get_bytes(f"/extensions/ComfyUI-LoHa/docs/{node}.md").startswith(b"# ")
    strength = server.object_info("LoHaLoader")["input"]["required"]["strength_model"]
    assert strength[1]["display"] == "slider" and strength[1]["min"] < 0


def test_the_list_has_files_and_peft_folders(server, loras):
    (loras / "style").mkdir(exist_ok=True)
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 1)}, loras / "style" / "deep.safetensors")
    (loras / "old.pt").write_bytes(b"PK")
    options = refresh(server)
    assert {"good.safetensors", "peft", os.path.join("style", "deep.safetensors")} <= set(options)
    assert not any(option.startswith("peft/") or option.endswith(".pt") for option in options)


@pytest.mark.parametrize("name", ["good.safetensors", "peft"])
def test_info_shows_text_and_picture(server, loras, name):
    refresh(server)
    entry = server.queue(info(name))
    shown = entry["outputs"]["2"]
    assert "LoHa layers   150" in shown["text"][0] and f"file          {name}" in shown["text"][0]
    assert entry["outputs"]["3"]["text"][0] == shown["text"][0]
    [picture] = server.images({"outputs": {"2": shown}})
    assert picture.shape[0] > 100 and picture.std() > 10


def bad_files(folder: Path) -> dict[str, str]:
    """Bad inputs by file name -> what the error must say."""
    good = (folder / "good.safetensors").read_bytes()
    tensors = {k: v for k, v in reduced.random_layer((8, 8), 2, "kohya").items()}
    unet = "lora_unet_mid_block_attentions_0_proj_in"

    def save(name: str, **changed) -> None:
        merged = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file({f"{unet}.{k}": v for k, v in merged.items()}, folder / name)

    pickle = io.BytesIO()
    with zipfile.ZipFile(pickle, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    (folder / "truncated.safetensors").write_bytes(good[: len(good) // 2])
    (folder / "terabytes.safetensors").write_bytes((1 << 42).to_bytes(8, "little") + b'{"x": 1}')
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "pickle.safetensors").write_bytes(pickle.getvalue())
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    save("wrong_shape.safetensors", hada_w1_b=torch.ones(3, 8))
    save("missing.safetensors", hada_w2_a=None)
    save("nan.safetensors", hada_w1_a=torch.full((8, 2), torch.nan))
    outside = folder.parents[2] / "outside.safetensors"
    outside.write_bytes(good)
    (folder / "link.safetensors").unlink(missing_ok=True)
    (folder / "link.safetensors").symlink_to(outside)
    return {
        "truncated.safetensors": "may be truncated",
        "terabytes.safetensors": "4398046511104",
        "empty.safetensors": "the file is empty",
        "pickle.safetensors": "a pickle renamed",
        "wrong_shape.safetensors": f"{unet}: w1_a (8, 2) and w1_b (3, 8) share no rank",
        "missing.safetensors": f"{unet}: hada_w2_a missing",
        "nan.safetensors": f"{unet}.hada_w1_a: 16 of 16 values are NaN",
        "link.safetensors": "a link out of ComfyUI's model folders",
    }


def test_bad_input_gives_an_error_to_act_on_and_the_server_goes_on(server, loras):
    wanted = bad_files(loras)
    options = refresh(server)
    assert "folder.safetensors" not in options
    for name, message in wanted.items():
        assert name in options
        with pytest.raises(ComfyUIError) as raised:
            server.queue(info(name))
        assert message in str(raised.value) and name in str(raised.value)
        assert "LoHaLoadAdapter" in str(raised.value)
    assert server.queue(info("good.safetensors"))["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    "name", ["../../outside.safetensors", "/etc/passwd", "good.safetensors\0.safetensors", "nowhere.safetensors", ""]
)
def test_names_that_lead_elsewhere_are_refused(server, loras, name):
    with pytest.raises(ComfyUIError, match="no such adapter|not in list|no adapter is chosen"):
        server.queue(info(name))


def test_a_changed_file_is_read_again(server, loras):
    models = reduced.build("sd15")
    path, _ = reduced.write(models, "kohya", loras, rank=2)
    path.rename(loras / "changing.safetensors")
    refresh(server)
    first = server.queue(info("changing.safetensors"))["outputs"]["2"]["text"][0]
    path, _ = reduced.write(models, "kohya", loras, rank=4)
    path.rename(loras / "changing.safetensors")
    second = server.queue(info("changing.safetensors"))["outputs"]["2"]["text"][0]
    assert "rank          2 ×150" in first and "rank          4 ×150" in second


def test_what_a_node_has_shown_is_told_again_after_a_run_of_another(server, loras):
    """As to a page that was reloaded, when a part of its workflow runs."""
    if "has_intermediate_output" not in server.object_info("LoHaInfo"):
        pytest.skip("this ComfyUI tells only of the nodes that run")
    prompt = info("good.safetensors") | {"4": {"class_type": "PreviewAny", "inputs": {"source": "x"}}}
    first = server.queue(prompt)["outputs"]["2"]
    prompt["4"]["inputs"]["source"] = "y"
    prompt_id = server.post("/prompt", {"prompt": prompt, "partial_execution_targets": ["4"]})["prompt_id"]
    while not (entry := server.get(f"/history/{prompt_id}").get(prompt_id)):
        time.sleep(0.05)
    assert entry["outputs"]["2"] == first
