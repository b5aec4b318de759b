// Why a run would fail, as far as the server knows it before: in the widget's own words, or in a line on the node.
import { ask } from "./adapters.mjs";
import { el } from "./dom.mjs";
import { after, display, linkInto } from "./host.mjs";
import { t } from "./words.mjs";

const HEIGHT = 44, PATIENCE = 250; // pixels, milliseconds

/** @param {any} node that the server can check */
export function watch(node) {
  /** @type {any} */
  let line;
  let timer = 0, asked = "", removed = false;

  /** @param {string} text */
  function say(text) {
    if (node.lohaSays) return node.lohaSays(text);
    const at = node.widgets.findIndex((/** @type {any} */ widget) => widget.name === "problem");
    if (!text) {
      if (at >= 0) node.removeWidget ? node.removeWidget(node.widgets[at]) : (node.widgets[at].onRemove?.(), node.widgets.splice(at, 1));
      line = undefined;
    } else {
      if (at < 0) {
        line = el("div.loha-error.loha-problem.loha-scrolls", { role: "status" });
        display(node, "problem", line, HEIGHT);
        node.expandToFitContent?.();
      }
      line.textContent = line.title = text;
    }
    node.setDirtyCanvas?.(true, true);
  }

  async function check() {
    if (removed || !node.graph) return;
    /** @type {Record<string, any>} */
    const inputs = {};
    for (const { name, value, serialize } of node.widgets ?? []) {
      const linked = linkInto(node, (input) => input.widget?.name === name);
      if (!linked && serialize !== false && ["string", "number", "boolean"].includes(typeof value)) inputs[name] = value;
    }
    const query = { node: node.comfyClass, inputs: JSON.stringify(inputs) };
    if (query.inputs === asked) return;
    asked = query.inputs;
    const { problem } = await ask("problem", query).catch(() => ({ problem: "" })); // too long for a question: the run tells
    if (asked === query.inputs && !removed) say(problem);
  }
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(check, PATIENCE);
  };
  const again = () => ((asked = ""), later());
  for (const widget of node.widgets ?? []) after(widget, "callback", later);
  for (const event of ["onConfigure", "onConnectionsChange", "onWidgetChanged"]) after(node, event, later);
  window.addEventListener("loha-adapters", again);
  after(node, "onRemoved", () => {
    removed = true;
    window.removeEventListener("loha-adapters", again);
  });
  later();
}
