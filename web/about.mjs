// LoHa Info before a run: what the connected file says of itself.
import { ask } from "./adapters.mjs";
import { after, linkInto } from "./host.mjs";
import { t } from "./words.mjs";

/**
 * @param {any} node LoHa Info
 * @param {HTMLElement} text where it is written until a run has more to tell
 * @param {string} hint stands there without a file
 */
export function tellOfFile(node, text, hint) {
  const followed = new WeakSet(); // loaders' widgets
  let asked = "";

  async function tell() {
    const link = linkInto(node, () => true);
    const loader = link && node.graph.getNodeById(link.origin_id);
    const widget = loader?.comfyClass === "LoHaLoadAdapter" ? loader.widgets?.find((/** @type {any} */ { name }) => name === "lora_name") : undefined;
    if (widget && !followed.has(widget)) after(widget, "callback", tell);
    if (widget) followed.add(widget);
    const name = widget?.value ?? "";
    if (name === asked) return;
    asked = name;
    const about = name ? await ask("info", { name }).catch(() => undefined) : undefined;
    if (name !== asked || "ran" in text.dataset) return;
    const facts = Object.entries(about ? { file: about.name, ...about.facts } : {}).map(([label, value]) => `${t(label)}: ${value}`);
    if (about?.words.length) facts.push(`${t("trigger words")}: ${about.words.join(", ")}`);
    text.textContent = [...facts, ...(facts.length ? [""] : []), hint].join("\n");
  }
  const later = () => setTimeout(tell); // when the links of a graph that is loaded are there
  after(node, "onConfigure", later);
  after(node, "onConnectionsChange", later);
  later();
}
