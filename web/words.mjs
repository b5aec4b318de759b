// The widgets' words in the page's language: locales/<language>/main.json has them by what they are in English.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let words = {};

app.registerExtension({
  name: "LoHa.Words",
  // ComfyUI waits for this before there are nodes.
  async init() {
    const language = app.extensionManager?.setting?.get("Comfy.Locale");
    if (!language || language === "en") return;
    const all = await api.fetchApi("/i18n").then((answer) => answer.json(), () => ({}));
    words = all[language]?.loha ?? {};
  },
});

/**
 * @param {string} english with places such as {name}
 * @param {Record<string, string | number>} [values] for these places
 */
export const t = (english, values = {}) => (words[english] ?? english).replace(/\{(\w+)\}/g, (place, name) => String(values[name] ?? place));
