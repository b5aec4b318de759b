"""`python -m demo.screenshots`: pictures for help pages, README and template browser, from ComfyUI's real page.

A real ComfyUI runs the example workflows in a real Chromium, on the demo's checkpoint and LoHas. The first run trains
the LoHas; another one changes little. `python -m demo.screenshots merge stack` takes these scenes alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

from . import comfyui, digits
from .browser import chromium
from .prepare import LOHA, train_lohas, write_files
from .train_loha import KNOWN_FOLDER, folder
from .workflows import EXAMPLES, filled

HELP = comfyui.REPOSITORY / "web" / "docs" / "images"
MARGIN = 14
THUMBNAIL, TILE_GAP = 512, 12
"""A side of the template browser's pictures: squares are shown largest."""
BACKGROUND = (30, 30, 32)
SETTINGS = {
    "Comfy.VueNodes.Enabled": False,
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
READY = "!!(window.app?.graph && app.extensionManager?.setting && LiteGraph.registered_node_types?.LoHaTrainer)"

LOST = ".loha-frame:has(.loha-error-bar):visible"
"""What a node says of its error: text and bars."""

Box = tuple[int, int, int, int]  # left, top, width, height of a node below its title

# Nodes are found by class or title.
SET = """values => {
  for (const [name, changes] of Object.entries(values)) {
    const node = app.graph._nodes.find(n => n.type === name || n.title === name);
    for (const [name, value] of Object.entries(changes)) {
      const widget = node.widgets.find(w => w.name === name);
      widget.value = value;
      widget.callback?.(value);
    }
  }
}"""
# What is not in the picture is out of sight, and so are links to it.
ARRANGE = """boxes => {
  const shown = new Set();
  for (const node of app.graph._nodes) node.pos = [9000, 9000];
  for (const [name, [x, y, width, height]] of Object.entries(boxes)) {
    const node = app.graph._nodes.find(n => n.type === name || n.title === name);
    node.pos = [x, y];
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
    shown.add(node.id);
  }
  app.canvas.renderLink = function (...drawn) {
    const link = drawn[3];
    if (shown.has(link?.origin_id) && shown.has(link.target_id)) LGraphCanvas.prototype.renderLink.apply(this, drawn);
  };
  app.canvas.deselectAll();
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [150, 230];
  app.canvas.setDirty(true, true);
}"""
# Where they are on the page, titles included.
BOUNDS = """names => names.map(name => {
  const { pos: [x, y], size: [width, height] } = app.graph._nodes.find(n => n.type === name || n.title === name);
  const canvas = app.canvas.canvas.getBoundingClientRect(), [dx, dy] = app.canvas.ds.offset;
  const title = LiteGraph.NODE_TITLE_HEIGHT;
  return { x: canvas.left + dx + x, y: canvas.top + dy + y - title, width, height: height + title };
})"""
# The demo's pictures have 32 pixels a side, and LiteGraph does not enlarge.
ENLARGE = """times => {
  const save = app.graph._nodes.find(n => n.type === "SaveImage"), scale = LiteGraph.createNode("ImageScaleBy");
  app.graph.add(scale);
  scale.widgets.find(w => w.name === "upscale_method").value = "nearest-exact";
  scale.widgets.find(w => w.name === "scale_by").value = times;
  save.getInputNode(0).connect(0, scale, 0);
  scale.connect(0, save, 0);
}"""


class Stage:
    """ComfyUI's page with one workflow on it."""

    def __init__(self, page: Page, server: comfyui.Server) -> None:
        self.page, self.server = page, server

    def open(self, workflow: str, **values: dict[str, Any]) -> None:
        """Load an example workflow, with other values for nodes of these classes."""
        self.page.evaluate("w => app.loadGraphData(w)", filled(EXAMPLES / f"{workflow}.json"))
        self.set(**values)

    def set(self, **values: dict[str, Any]) -> None:
        self.page.evaluate(SET, values)

    def run(self, *nodes: str) -> None:
        """All of the workflow, or what these nodes need."""
        self.queue(*nodes)
        self.finish()

    def queue(self, *nodes: str) -> None:
        """Returns when the server has taken it."""
        ids = "names => names.map(name => String(app.graph._nodes.find(n => n.type === name).id))"
        self.page.evaluate(f"names => app.queuePrompt(0, 1, names.length ? ({ids})(names) : undefined)", list(nodes))

    def finish(self) -> None:
        """Wait for the end of what was queued."""
        while any(self.server.get("/queue").values()):
            self.page.wait_for_timeout(200)
        *_, entry = self.server.get("/history").values()
        if entry["status"]["status_str"] != "success":
            raise comfyui.ComfyUIError(f"the workflow failed: {entry['status']['messages'][-1]}")
        self.page.wait_for_timeout(1000)  # for pictures to arrive

    def results(self) -> list[Image.Image]:
        """The pictures that the workflow's last node has made."""
        *_, entry = self.server.get("/history").values()
        last = str(self.page.evaluate("app.graph._nodes.find(n => /^(Save|Preview)Image$/.test(n.type)).id"))
        entry["outputs"] = {last: entry["outputs"][last]}
        return [Image.fromarray(picture) for picture in self.server.images(entry)]

    def shoot(self, boxes: dict[str, Box], *more: Locator) -> Image.Image:
        """Nodes by class, laid out as told, and what else lies over them."""
        self.page.evaluate(ARRANGE, boxes)
        self.page.mouse.move(5, 5)
        self.page.wait_for_timeout(600)
        found = self.page.evaluate(BOUNDS, list(boxes)) + [locator.bounding_box() for locator in more]
        left, top = (min(box[side] for box in found) - MARGIN for side in ("x", "y"))
        width = max(box["x"] + box["width"] for box in found) + MARGIN - left
        height = max(box["y"] + box["height"] for box in found) + MARGIN - top
        data = self.page.screenshot(clip={"x": left, "y": top, "width": width, "height": height})
        return Image.open(BytesIO(data)).convert("RGB")

    def element(self, selector: str) -> Image.Image:
        return Image.open(BytesIO(self.page.locator(selector).first.screenshot())).convert("RGB")

    def picture_on(self, node: str) -> Image.Image:
        """The first picture that a node of this class shows."""
        address = self.page.evaluate(f"app.graph._nodes.find(n => n.type === '{node}').imgs[0].src")
        return Image.open(BytesIO(self.server.get_bytes(address.removeprefix(self.server.address)))).convert("RGB")


# --- scenes -------------------------------------------------------------------------------------


def loader(stage: Stage) -> None:
    stage.open("01 Load a LoHa", LoHaLoader={"strength_model": 0.8})
    stage.run()
    show(stage.shoot({"LoHaLoader": (0, 0, 360, 0), "PreviewAny": (0, 380, 360, 90)}), "LoHaLoader")
    enlarged(stage.results()[0], 128).save(stage.server.path("models", "loras", LOHA).with_suffix(".png"))

    stage.page.evaluate(ENLARGE, 8)
    layout: dict[str, Box] = {
        "LoHaLoader": (0, 0, 340, 0),
        "CLIPTextEncode": (390, 0, 260, 0),
        "PreviewAny": (390, 170, 260, 92),
        "KSampler": (700, 0, 260, 262),
        "SaveImage": (0, 390, 960, 300),
    }
    frames, columns = [], []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        stage.set(LoHaLoader={"strength_model": strength})
        stage.run()
        frames.append(stage.shoot(layout))
        columns.append(stage.results())
    film(frames, HELP / "strength.webp")
    rows = [strip(pictures) for pictures in zip(*columns, strict=True)]
    thumbnail("01 Load a LoHa", stage.element(".loha-strength"), *rows)


def apply(stage: Stage) -> None:
    stage.open("02 Look inside a LoHa", LoHaApply={"strength_model": 0.8})
    stage.run()
    show(stage.shoot({"LoHaLoadAdapter": (0, 0, 330, 0), "LoHaApply": (390, 0, 330, 0)}), "LoHaLoadAdapter")
    show(stage.shoot({"LoHaApply": (0, 0, 360, 0), "PreviewAny": (0, 320, 360, 90)}), "LoHaApply")
    show(stage.shoot({"LoHaInfo": (0, 0, 460, 420)}), "LoHaInfo")
    thumbnail(
        "02 Look inside a LoHa", stage.element("pre.loha-info"), stage.picture_on("LoHaInfo"), strip(stage.results())
    )


def blocks(stage: Stage) -> None:
    bars = {"family": "SD1.5", "vector": "IN00-IN03=0.4, IN04-IN08=0.7, M=0, OUT06-OUT11=1.3", "rules": "attn2.*: 0.5"}
    curve = {"keyframes": "0: 0.2, 0.35: 1.2, 0.7: 0.8, 1: 0.3", "end_percent": 0.9}
    stage.open("04 Blocks and schedule", LoHaBlockStrength=bars, LoHaSchedule=curve)
    # After a run, the pictures below would show the same again.
    show(stage.shoot({"LoHaBlockStrength": (0, 0, 440, 0)}), "LoHaBlockStrength")
    equaliser = stage.element(".loha-equaliser")
    show(stage.shoot({"LoHaSchedule": (0, 0, 440, 0)}), "LoHaSchedule")
    thumbnail("04 Blocks and schedule", equaliser, stage.element(".loha-schedule .loha-plot"))


def dataset(stage: Stage) -> None:
    few = {
        "What to learn": (folder(digits.TARGET), ("0000", "0001", "0002", "0003")),
        "What to keep in memory": (KNOWN_FOLDER, ("0040", "0080")),
    }
    for name, numbers in few.values():
        for file in (number + suffix for number in numbers for suffix in (".png", ".txt")):
            shutil.copy(stage.server.path("input", name, file), stage.server.path("input", f"{name}_few", file))
    stage.open(
        "10 Train a LoHa with every setting", **{title: {"folder": f"{name}_few"} for title, (name, _) in few.items()}
    )
    stage.run("LoHaDataset")
    show(stage.shoot({"LoHaDataset": (0, 0, 560, 650)}), "LoHaDataset")


def train(stage: Stage) -> None:
    shutil.rmtree(stage.server.base / "output" / "loha", ignore_errors=True)
    previews = {"preview_every": 30, "preview_prompt": digits.prompt(digits.TARGET)}
    saved = {"filename": "digits/seven", "overwrite": True}
    stage.open(
        "10 Train a LoHa with every setting", LoHaTrainer={"name": "seven", "resume": False} | previews, LoHaSave=saved
    )
    boxes: dict[str, Box] = {"LoHaTrainer": (0, 0, 420, 0)}
    stage.shoot(boxes)
    stage.queue()
    # Until it begins, the node shows its last run, which is over.
    told = "/^(\\d+) of .* left$/.exec(document.querySelector('.loha-monitor .loha-count').textContent)?.[1] >= 110"
    stage.page.wait_for_function(told, timeout=300_000)
    show(stage.shoot(boxes), "LoHaTrainer")
    show(stage.element(".loha-monitor"), "training")
    curve = stage.element(".loha-monitor .loha-plot")
    stage.finish()
    show(stage.shoot({"LoHaNetwork": (0, 0, 400, 530)}), "LoHaNetwork")
    show(stage.shoot({"LoHaOptimizer": (0, 0, 360, 0)}), "LoHaOptimizer")
    show(stage.shoot({"LoHaObjective": (0, 0, 360, 0)}), "LoHaObjective")
    thumbnail("10 Train a LoHa with every setting", curve, strip(stage.results()))


def extract(stage: Stage) -> None:
    stage.open("12 Extract, resize, convert")
    stage.run()
    for node in ("LoHaExtract", "LoHaConvert", "LoHaResize"):
        show(stage.shoot({node: (0, 0, 440, 640)}), node)
    thumbnail("12 Extract, resize, convert", stage.element(LOST), strip(stage.results()))


def merge(stage: Stage) -> None:
    stage.open("11 Merge two LoHas")
    stage.run()
    show(stage.shoot({"LoHaMerge": (0, 0, 440, 880)}), "LoHaMerge")
    lost = stage.element(LOST)
    show(lost, "merging")
    thumbnail("11 Merge two LoHas", lost, strip(stage.results()))
    show(stage.shoot({"LoHaSave": (0, 0, 360, 280)}), "LoHaSave")


def stack(stage: Stage) -> None:
    names = (LOHA, "loha_demo_three.safetensors", "loha_demo_merged.safetensors")
    rows = [
        {"on": on, "name": name, "strength_model": strength}
        for name, strength, on in zip(names, (0.9, 0.35, 1), (True, True, False), strict=True)
    ]
    stage.open("03 Stack several LoHas", LoHaStack={"rows": json.dumps(rows)})
    stage.run()
    box: dict[str, Box] = {"LoHaStack": (0, 0, 420, 0)}
    stage.shoot(box)
    thumbnail("03 Stack several LoHas", stage.element(".loha-stack"), strip(stage.results()))
    stage.page.get_by_role("button", name="About loha_demo_seven").click()
    show(stage.shoot(box, stage.page.get_by_role("dialog")), "LoHaStack")
    stage.page.keyboard.press("Escape")


def grid(stage: Stage) -> None:
    stage.open("05 Compare strengths in a grid")
    stage.run()
    picture: Box = (390, 0, 640, 560)
    show(stage.shoot({"LoHaGrid": (0, 0, 340, 0), "LoHaGridImage": picture}), "LoHaGrid")
    show(stage.shoot({"LoHaGridImage": (0, 0, 640, 560)}), "LoHaGridImage")
    thumbnail("05 Compare strengths in a grid", stage.picture_on("LoHaGridImage"))


def impact(stage: Stage) -> None:
    stage.open("08 See what matters in a LoHa", LoHaSave={"overwrite": True})
    stage.run()
    show(stage.shoot({"LoHaImpact": (0, 0, 600, 0)}), "LoHaImpact")
    thumbnail("08 See what matters in a LoHa", stage.picture_on("LoHaImpact"), strip(stage.results()))


def region(stage: Stage) -> None:
    stage.open("06 A LoHa in part of the picture")
    stage.run()
    show(stage.shoot({"LoHaRegion": (0, 0, 340, 0), "LoHaLoader": (390, 0, 340, 0)}), "LoHaRegion")
    thumbnail("06 A LoHa in part of the picture", *(wide(picture) for picture in stage.results()))


def hook(stage: Stage) -> None:
    stage.open("07 A LoHa for each prompt")
    stage.run()
    nodes: dict[str, Box] = {"LoHaLoadAdapter": (0, 0, 320, 0), "LoHaHook": (370, 0, 320, 0)}
    show(stage.shoot(nodes | {"SetClipHooks": (740, 0, 270, 110)}), "LoHaHook")
    thumbnail("07 A LoHa for each prompt", *(wide(picture) for picture in stage.results()))


def train_folder(stage: Stage) -> None:
    shutil.rmtree(stage.server.base / "output" / "loha", ignore_errors=True)
    stage.open("09 Train a LoHa on a folder")
    boxes: dict[str, Box] = {"LoHaTrainFolder": (0, 0, 420, 0)}
    stage.shoot(boxes)
    stage.queue()
    told = "/^(\\d+) of .* left$/.exec(document.querySelector('.loha-monitor .loha-count').textContent)?.[1] >= 110"
    stage.page.wait_for_function(told, timeout=300_000)
    show(stage.shoot(boxes), "LoHaTrainFolder")
    curve = stage.element(".loha-monitor .loha-plot")
    stage.finish()
    thumbnail("09 Train a LoHa on a folder", curve, strip(stage.results()))


def sliders(stage: Stage) -> None:
    stage.open("13 Train a slider from prompts", LoHaTrainer={"resume": False}, LoHaSave={"overwrite": True})
    node = stage.shoot({"LoHaSlider": (0, 0, 400, 600)})
    show(node, "LoHaSlider")
    stage.run()
    thumbnail("13 Train a slider from prompts", stage.results()[0], node)
    for workflow, name in (
        ("14 Train a slider from pairs of pictures", "LoHaPictureSlider"),
        ("15 Train and keep the class", "LoHaPreservation"),
    ):
        stage.open(workflow)
        picture = stage.shoot({name: (0, 0, 360, 0), "LoHaTrainer": (410, 0, 380, 0)})
        show(picture, name)
        thumbnail(workflow, picture)


SCENES = {
    scene.__name__: scene
    for scene in (
        loader, apply, blocks, dataset, train, extract, merge, stack, grid, impact, region, hook, train_folder, sliders,
    )
}  # fmt: skip


# --- pictures -----------------------------------------------------------------------------------


def show(picture: Image.Image, name: str) -> None:
    """Save a picture of the help pages."""
    picture.save(HELP / f"{name}.webp", quality=80, method=6)


def film(frames: Sequence[Image.Image], path: Path) -> None:
    """There and back again, the ends a little longer."""
    order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    durations = [1600 if place in (0, len(frames) - 1) else 700 for place in order]
    first, *rest = (frames[place] for place in order)
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0, quality=75, method=6)


def enlarged(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.NEAREST)


def strip(pictures: Sequence[Image.Image], side: int = 128, gap: int = 4) -> Image.Image:
    """Pictures side by side."""
    sheet = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), BACKGROUND)
    for place, picture in enumerate(pictures):
        sheet.paste(enlarged(picture, side), (place * (side + gap), 0))
    return sheet


def wide(picture: Image.Image, side: int = 128) -> Image.Image:
    """A picture of two digits, as large as others of one."""
    return picture.resize((picture.width * side // picture.height, side), Image.Resampling.NEAREST)


def thumbnail(workflow: str, *parts: Image.Image) -> None:
    """What there is to see of a workflow, one below the other on a square."""
    gaps = TILE_GAP * (len(parts) + 1)
    width = min(THUMBNAIL - 2 * TILE_GAP, int((THUMBNAIL - gaps) / sum(part.height / part.width for part in parts)))
    scaled = [part.resize((width, part.height * width // part.width), Image.Resampling.LANCZOS) for part in parts]
    sheet = Image.new("RGB", (THUMBNAIL, THUMBNAIL), BACKGROUND)
    top = (THUMBNAIL - sum(part.height for part in scaled) - gaps) // 2 + TILE_GAP
    for part in scaled:
        sheet.paste(part, ((THUMBNAIL - width) // 2, top))
        top += part.height + TILE_GAP
    sheet.save(EXAMPLES / f"{workflow}.jpg", quality=85, optimize=True)


# --- the whole ----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.screenshots", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenes", nargs="*", metavar="scene", help=f"of {', '.join(SCENES)}; all without")
    wanted = parser.parse_args().scenes or list(SCENES)
    if unknown := set(wanted) - SCENES.keys():
        parser.error(f"no scene {', '.join(sorted(unknown))}; there are {', '.join(SCENES)}")
    HELP.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave by the exits that stop the server
    try:
        server = comfyui.Server(comfyui.find(), base=comfyui.CACHE / "pictures")
        write_files(server)
        with server, sync_playwright() as playwright:
            train_lohas(server, *digits.HELD_BACK)
            page = chromium(playwright).new_page(viewport={"width": 1700, "height": 1400}, device_scale_factor=2)
            page.goto(server.address)
            page.wait_for_function(READY, timeout=60_000)
            for setting, value in SETTINGS.items():
                page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value])
            page.reload()
            page.wait_for_function(READY, timeout=60_000)
            page.wait_for_timeout(1000)
            page.keyboard.press("Escape")  # the template browser opens by itself on an empty profile
            for name, scene in SCENES.items():
                if name in wanted:
                    print(f"{name} …", flush=True)
                    scene(Stage(page, server))
    except comfyui.ComfyUIError as error:
        print(f"\nThe pictures cannot be taken: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
