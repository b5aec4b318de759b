"""ComfyUI's page in Chinese: our nodes say what `locales/zh` has, and inputs keep their names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from demo.comfyui import Server

from ..comfy.test_locales import WORDS, read
from .conftest import READY, empty, enter

SET = "([name, value]) => app.extensionManager.setting.set(name, value)"
TEXTS = """() => {
  const page = document.getElementById("vue-app").__vue_app__;
  window.texts = page._context.provides[page.__VUE_I18N_SYMBOL__].global;
}"""
# The front end 1.32.9 forgets the packs' texts as it loads a language (ComfyUI_frontend #7214); 1.34.9 does by itself
# what this does.
MERGE = """async () => {
  for (const [language, found] of Object.entries(await (await app.api.fetchApi("/i18n")).json()))
    texts.mergeLocaleMessage(language, found);
  await app.extensionManager.command.execute("Comfy.RefreshNodeDefinitions");
}"""
NODES = """types => {
  for (const [index, type] of types.entries()) {
    const node = LiteGraph.createNode(type);
    node.pos = [450 * (index % 6), 900 * Math.floor(index / 6)];
    app.graph.add(node);
  }
  app.canvas.setDirty(true, true);
  const labels = slots => Object.fromEntries(slots.map(slot => [slot.name, slot.label ?? slot.localized_name]));
  return app.graph._nodes.map(node => ({
    title: node.title,
    inputs: labels(node.inputs),
    widgets: labels(node.widgets ?? []),
    outputs: node.outputs.map(slot => slot.localized_name),
  }));
}"""


@pytest.fixture(scope="module")
def translated(opened: Page, server: Server, nodes_2: bool) -> Iterator[None]:
    opened.evaluate(TEXTS)
    opened.evaluate(SET, ["Comfy.Locale", "zh"])
    opened.wait_for_function("texts.locale.value === 'zh'")
    opened.evaluate(MERGE)
    yield
    opened.evaluate(SET, ["Comfy.Locale", "en"])
    enter(opened, server, nodes_2)


@pytest.fixture
def chinese(translated: None, page: Page) -> Page:
    return page


def test_the_page_is_chinese(chinese: Page, shoot):
    found = {path: text for path, text in read("zh").items() if not path.startswith(WORDS)}
    texts = {path.removeprefix("main."): text for path, text in found.items()}
    assert chinese.evaluate("paths => paths.map(path => texts.t(path))", list(texts)) == list(texts.values())

    types = sorted({path.split(".")[1] for path in texts if path.startswith("nodeDefs.")})
    for kind, node in zip(types, chinese.evaluate(NODES, types), strict=True):
        path = f"nodeDefs.{kind}"
        assert node["title"] == texts[f"{path}.display_name"]
        names = {p.split(".")[3] for p in texts if p.startswith(f"{path}.inputs.")}
        assert node["inputs"] == {name: texts[f"{path}.inputs.{name}.name"] for name in names}
        assert node["inputs"].items() >= {(n, label) for n, label in node["widgets"].items() if n in names}
        for index, label in enumerate(node["outputs"]):
            assert label == texts.get(f"{path}.outputs.{index}.name", label)
    shoot("chinese")


def test_our_widgets_are_chinese(chinese: Page, nodes_2: bool):
    """They read the words as the page begins."""
    chinese.reload()
    chinese.wait_for_function(READY, timeout=120_000)
    empty(chinese, nodes_2)
    chinese.evaluate(NODES, ["LoHaLoader", "LoHaStack", "LoHaTrainer"])
    words = read("zh")
    for word in ("model strength", "+ Add", "Add adapters to apply them together.", "Log", "Cancel"):
        expect(chinese.get_by_text(words[WORDS + word], exact=True).first).to_be_attached()
    chinese.get_by_role("button", name=words[WORDS + "+ Add"]).evaluate("button => button.click()")
    expect(chinese.get_by_role("dialog", name=words[WORDS + "Add adapters"])).to_be_visible()
