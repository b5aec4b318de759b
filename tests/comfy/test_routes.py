"""The routes that the widgets read: what they answer, and that nothing else can be made of them."""

from __future__ import annotations

import http.client
import json
import sys
import urllib.parse
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from demo.comfyui import Server
from loha_core import load_adapter
from loha_core.blocks import LAYOUTS, BlockStrength, Layout

from . import reduced

ROUTES = ("adapters", "info", "preview", "blocks", "layout", "problem", "training")
MARKUP = "<script>window.hacked = 1</script>"


def call(
    server: Server, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request as it is written, without a client's tidying up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ask(server: Server, route: str, **query: str) -> tuple[int, dict]:
    status, _, body = call(server, f"/loha/{route}?{urllib.parse.urlencode(query)}")
    return status, json.loads(body)


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    """A kohya file with metadata and a picture, a PEFT folder, and what must not be told of."""
    folder = server.path("models", "loras", "routes", "x").parent
    models = reduced.build("sd15")
    path, _ = reduced.write(models, "kohya", folder, 4)
    path.rename(folder / "good.safetensors")
    reduced.write(models, "peft", folder)
    factors = {f"lora_unet_mid_block_x.hada_{name}": torch.ones(8, 8) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    words = {
        "modelspec.trigger_phrase": f"cat, {MARKUP}",
        "modelspec.architecture": MARKUP,
        "modelspec.title": "x" * 999,
    }
    save_file(factors, folder / "said.safetensors", words)
    (folder / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "notes.txt").write_text("private")
    Image.new("RGB", (8, 6)).save(folder / "good.png")
    Image.new("RGB", (8, 6)).save(folder / "said.preview.webp")

    outside = server.path("outside", "secret.safetensors")
    save_file(factors, outside)
    Image.new("RGB", (8, 6)).save(outside.with_suffix(".png"))
    for name, target in (("link.safetensors", outside), ("broken.png", outside.with_suffix(".png"))):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    (folder / "notes.png").mkdir(exist_ok=True)
    server.object_info("LoHaStack")
    return folder


def test_the_list_is_that_of_the_nodes(server, loras):
    status, answer = ask(server, "adapters")
    options = server.object_info("LoHaLoader")["input"]["required"]["lora_name"][1]["options"]
    assert status == 200 and answer["names"] == options and "routes/good.safetensors" in options


def test_the_list_says_which_have_a_picture(server, loras):
    pictured = {name for name in ask(server, "adapters")[1]["pictured"] if name.startswith("routes")}
    # A link out of the folders is listed and refused, as for adapters themselves.
    assert pictured == {"routes/good.safetensors", "routes/said.safetensors", "routes/broken.safetensors"}
    assert ask(server, "preview", name="routes/broken.safetensors")[0] == 400


def test_the_layout_of_a_model_that_is_not_loaded(server, pack):
    """As the loaded model says it, from the header alone: no tensor of these files could be read."""
    folder = server.path("models", "checkpoints", "x").parent
    spell = sys.modules[f"{pack.__name__}.nodes.page.blocks"].spell
    for family in ("sd15", "sdxl", "sd3", "flux"):
        keys = list(reduced.build(family).model.model.state_dict())
        file = folder / f"layout_{family}.safetensors"
        save_file({f"model.{key}": torch.zeros(0) for key in keys if key.startswith("diffusion_model.")}, file)
        status, answer = ask(server, "layout", folder="checkpoints", name=file.name)
        assert status == 200 and answer == {"layout": spell(Layout.of_keys(keys))}
        bare = server.path("models", "diffusion_models", file.name)
        save_file({key.removeprefix("diffusion_model."): torch.zeros(0) for key in keys}, bare)
        assert ask(server, "layout", folder="diffusion_models", name=file.name)[1] == answer
    (folder / "layout_broken.safetensors").write_bytes(b"{")
    assert ask(server, "layout", folder="checkpoints", name="layout_broken.safetensors") == (200, {"layout": ""})


@pytest.mark.parametrize(
    ("folder", "name"),
    [("checkpoints", "../loras/x.safetensors"), ("checkpoints", "a\0b"), ("loras", "a"), ("", ""), ("input", "..")],
)
def test_layouts_are_of_models_only(server, folder, name):
    status, answer = ask(server, "layout", folder=folder, name=name)
    assert status == 400 and "no such model" in answer["error"]


def test_info_of_a_file_and_of_a_folder(server, loras):
    for name, dialect in (("routes/good.safetensors", "lycoris"), ("routes/peft", "peft")):
        status, answer = ask(server, "info", name=name)
        facts = answer["facts"]
        assert status == 200 and facts["dialect"] == dialect and facts["layers"] == "150"
        assert facts["base model"] == "SD 1.x" and facts["rank"].isdecimal() and "size" in facts
        assert answer["picture"] == (name == "routes/good.safetensors")


def test_info_reads_no_factor(pack, loras, monkeypatch):
    """Shapes stay on the meta device; only single numbers are read."""
    routes = sys.modules[f"{pack.__name__}.nodes.page.routes"]
    adapters = []

    def load(*args, **kwargs):
        adapters.append(load_adapter(*args, **kwargs))
        return adapters[-1]

    monkeypatch.setattr(routes, "load_adapter", load)
    path = loras / "good.safetensors"
    facts = routes._info_of.__wrapped__("good", path, "")["facts"]
    (adapter,) = adapters
    assert all(tensor.is_meta for layer in adapter.layers.values() for tensor in layer.tensors().values())
    assert facts["dtype"] == "float32" and facts["size"] == f"{path.stat().st_size / 2**20:.1f} MB"


def test_what_a_file_says_is_data(server, loras):
    status, headers, body = call(server, "/loha/info?name=routes/said.safetensors")
    answer = json.loads(body)
    assert status == 200 and answer["words"] == ["cat", MARKUP] and answer["facts"]["base model"] == MARKUP
    assert len(answer["facts"]["title"]) == 200
    assert headers["Content-Type"].startswith("application/json") and headers["X-Content-Type-Options"] == "nosniff"


def test_pictures(server, loras):
    for name, kind in (("good.safetensors", "image/png"), ("said.safetensors", "image/webp")):
        status, headers, body = call(server, f"/loha/preview?name=routes/{name}")
        assert status == 200 and headers["Content-Type"] == kind and body
    assert ask(server, "preview", name="routes/peft") == (400, {"error": "no picture lies beside this adapter"})


def test_blocks_are_those_of_the_library(server):
    for family, layout in LAYOUTS.items():
        for vector in ("", "BASE=0.5"):
            status, answer = ask(server, "blocks", family=family, preset="NONE", vector=vector)
            assert status == 200 and answer["family"] == family and answer["listed"] is None
            assert answer["values"] == BlockStrength.parse(family, vector, preset="NONE").table()
            assert list(answer["values"]) == ["BASE", *layout.labels()]
        for labels in layout.vectors():
            vector = ",".join(str(number) for number in range(len(labels)))
            answer = ask(server, "blocks", family=family, vector=vector)[1]
            assert tuple(answer["listed"]) == labels and answer["start"] is None
            assert all(answer["values"][label] == number for number, label in enumerate(labels))
    assert ask(server, "blocks", family="auto", vector="OUT=0.5")[1]["values"]["OUT"] == 0.5
    assert list(ask(server, "blocks", family="blocks:2,layers:1")[1]["values"]) == [
        "BASE",
        "blocks00",
        "blocks01",
        "layers00",
    ]
    small = ask(server, "blocks", family="Flux/D:1,S:2,extra_blocks:1", preset="LATE")[1]
    assert small["family"] == "Flux"
    assert small["values"] == {"BASE": 1, "D00": 0, "S00": 0, "S01": 0, "extra_blocks00": 1}


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"family": "SD9"}, "no model family 'SD9'"),
        ({"preset": "<b>"}, "no preset"),
        ({"vector": "1,2"}, "the vector has 2 numbers"),
        ({"vector": "IN99=1", "family": "SD1.5"}, "no block IN99"),
        ({"family": "blocks:999999999"}, "no model family"),
        ({"family": "nothing:3"}, "no model family"),
        ({"family": "Nothing/D:3"}, "no model family"),
        ({"family": "Flux/"}, "no model family"),
        ({"family": "Flux/Flux/D:3"}, "no model family"),
        ({"family": "blocks:x"}, "no model family"),
    ],
)
def test_blocks_say_what_is_wrong(server, query, message):
    status, answer = ask(server, "blocks", **query)
    assert status == 400 and message in answer["error"]


NAMES = [
    "",
    ".",
    "..",
    "../outside/secret.safetensors",
    "routes/../../../outside/secret.safetensors",
    "/etc/passwd",
    "routes/link.safetensors",
    "routes/notes.txt",
    "routes/broken.safetensors",
    "routes",
    "nowhere.safetensors",
    "good\0.safetensors",
    "routes/good.safetensors\0.png",
    "..\\outside\\secret.safetensors",
    "C:\\windows\\win.ini",
    "x" * 5000,
    "\ud83d".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("route", ["info", "preview"])
def test_names_that_lead_elsewhere_are_refused(server, loras, route, name):
    status, _, body = call(server, f"/loha/{route}?{urllib.parse.urlencode({'name': name})}")
    assert 400 <= status < 500
    assert str(server.base).encode() not in body and b"root:" not in body and b"private" not in body


@pytest.mark.parametrize("raw", ["%00", "%2e%2e%2foutside%2fsecret.safetensors", "..%5coutside", "%ff%fe", "%"])
def test_odd_spellings_are_refused(server, loras, raw):
    assert 400 <= call(server, f"/loha/info?name={raw}")[0] < 500
    assert 400 <= call(server, f"/loha/preview/{raw}")[0] < 500


def state(server: Server) -> tuple:
    """All files, folders and links around the server's folder, and what it has run or is asked to."""
    there = {}
    for path in server.base.parent.rglob("*"):
        if path.name != "comfyui.log":
            found = path.lstat()
            there[path] = found.st_mode if path.is_dir() else (found.st_mode, found.st_size, found.st_mtime_ns)
    runs = [(run["id"], run["step"], run["state"]) for run in server.get("/loha/training")["runs"]]
    return there, runs, server.get("/queue"), list(server.get("/history"))


@pytest.mark.parametrize("prefix", ["/loha", "/api/loha"])
@pytest.mark.parametrize("route", ROUTES)
def test_nothing_but_reading(server, loras, route, prefix):
    before = state(server)
    path = f"{prefix}/{route}?name=routes/good.safetensors"
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert call(server, path, method, b"{}")[0] == 405
    assert call(server, path, "POST", b"x" * 5_000_000, **{"Content-Type": "text/plain"})[0] == 405
    assert call(server, path, "POST", b"\xff\0<", **{"Content-Type": "application/json"})[0] == 405
    assert call(server, path, "POST", b"{}", Origin="http://evil.example")[0] == 403
    assert call(server, path, Origin="http://evil.example")[0] == 403
    status = call(server, path)[0]
    assert status == (400 if route in ("layout", "problem") else 200)  # no model, no node of that name
    assert call(server, path, "GET", b"{" * 100_000, **{"Content-Type": "application/json"})[0] == status  # not read
    assert state(server) == before
    assert call(server, "/system_stats")[0] == 200


GOOD = "routes/good.safetensors"
PIECES = (
    *(
        "..",
        ".",
        "/",
        "//",
        "\\",
        "\0",
        "\n",
        "%2e%2e",
        "~",
        "C:",
        "$HOME",
        "file://",
        "<b>",
        "999999999",
        "-1",
        "=",
        ",",
    ),
    *("routes", "outside", "secret", "good", "said", "link", "broken", "notes", "peft", ".safetensors", ".png"),
)
ODD = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=8).map("".join)
NAME = st.just(GOOD) | ODD | st.builds("{}{}{}".format, ODD, st.just(GOOD), ODD)
OTHERS = ("family", "preset", "vector", "workflow", "node", "run", "since")
QUERY = st.fixed_dictionaries({"name": NAME}, optional=dict.fromkeys(OTHERS, ODD))
METHODS = st.sampled_from(("GET", "GET", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"))
KINDS = st.sampled_from(("application/json", "multipart/form-data", "application/x-www-form-urlencoded", "text/plain"))


def test_whatever_is_asked_changes_nothing_and_leads_nowhere(server, loras):
    roots = (server.base / "models" / "loras").resolve()
    before = state(server)

    @settings(max_examples=500, deadline=None)
    @given(st.sampled_from(ROUTES), QUERY, st.just("") | ODD, METHODS, KINDS, st.binary(max_size=50))
    def ask_anything(route, query, tail, method, kind, body):
        path = f"/loha/{route}{urllib.parse.quote(tail)}?{urllib.parse.urlencode(query)}"
        status, _, answer = call(server, path, method, body, **{"Content-Type": kind})
        assert 400 <= status < 500 or (status == 200 and method in ("GET", "HEAD"))
        assert str(server.base).encode() not in answer and b"private" not in answer
        if status == 200 and route in ("info", "preview"):
            assert (roots / query["name"]).resolve().is_relative_to(roots)

    ask_anything()
    assert state(server) == before


def test_why_a_run_would_fail(server: Server):
    def said(**inputs: object) -> str:
        status, answer = ask(server, "problem", node="LoHaSchedule", inputs=json.dumps(inputs))
        assert status == 200
        return answer["problem"]

    assert said() == said(keyframes="0: 1", interpolation="linear") == ""
    assert "keyframe 'half: 1'" in said(keyframes="half: 1")
    assert "keyframe '5'" in said(keyframes=5)  # ComfyUI makes a text of it, too
    for inputs in ("", "[]", "{", "[" * 100_000):
        status, body = ask(server, "problem", node="LoHaSchedule", inputs=inputs[:1000])
        assert status == 400 and "expected an object" in body["error"]
    status, body = ask(server, "problem", node="KSampler", inputs="{}")
    assert status == 400 and "LoHaSchedule" in body["error"]
