// Block settings by name, kept with the user's other data in ComfyUI, and vectors to share.
import { api } from "../../scripts/api.js";
import { copyText } from "./clipboard.mjs";
import { el, openDialog } from "./dom.mjs";
import { committed, setValue, valueOf } from "./host.mjs";
import { t } from "./words.mjs";

const FILE = "loha_block_presets.json";

/** @typedef {{preset: string, family: string, vector: string}} Saved */

/** @returns {Promise<Record<string, Saved>>} */
async function read() {
  const response = await api.getUserData(FILE);
  if (response.status === 404) return {};
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return response.json();
}

/**
 * @param {HTMLElement} anchor
 * @param {any} node
 * @param {{vector: string, numbers(): string, apply(vector: string): void}} equaliser
 */
export async function openPresets(anchor, node, equaliser) {
  const list = el("div.loha-choices.loha-scrolls");
  const error = el("div.loha-error", { role: "status" });
  const name = el("input.loha-filter", { type: "text", placeholder: t("Name for the present setting"), "aria-label": t("name") });
  const save = el("button.loha-button", { type: "submit", textContent: t("Save") });
  const copy = el("button.loha-button", {
    type: "button",
    textContent: t("Copy as numbers"),
    title: t("One number per block, as block-weight tools write them; paste it into a vector"),
    async onclick() {
      await copyText(equaliser.numbers());
      copy.classList.add("copied");
    },
  });
  const form = el("form.loha-row", { onsubmit: store }, name, save);
  const dialog = openDialog(t("Block presets"), anchor, list, form, el("footer", {}, copy), error);

  const attempt = async (action) => {
    try {
      await action();
      error.textContent = "";
    } catch (reason) {
      error.textContent = String(reason.message);
    }
  };
  /** Read, change, write: another tab may have saved one, too. */
  const change = (edit) =>
    attempt(async () => {
      const saved = await read();
      edit(saved);
      await api.storeUserData(FILE, saved);
      show(saved);
    });
  function store(event) {
    event.preventDefault();
    const key = name.value.trim();
    if (!key) return;
    const now = { preset: valueOf(node, "preset"), family: valueOf(node, "family"), vector: equaliser.vector };
    change((saved) => (saved[key] = now));
    name.value = "";
  }
  function show(saved) {
    const names = Object.keys(saved).sort();
    list.replaceChildren(...names.map((key) => el("div.loha-row", {}, choice(key, saved[key]), removal(key))));
    if (!names.length) list.append(el("small", { textContent: t("none saved yet") }));
  }
  const choice = (key, { preset, family, vector }) =>
    el("button.loha-button.loha-wide", {
      type: "button",
      textContent: key,
      title: `${preset} ${family} ${vector}`,
      onclick() {
        setValue(node, "preset", preset);
        setValue(node, "family", family);
        equaliser.apply(String(vector ?? ""));
        dialog.close();
        committed();
      },
    });
  const removal = (key) =>
    el("button.loha-icon", { type: "button", title: t("Remove {name}", { name: key }), "aria-label": t("remove {name}", { name: key }), onclick: () => change((saved) => delete saved[key]) }, el("i.pi.pi-times"));

  // Enter alone keeps the setting; what is typed replaces the name. Before the list comes: what was typed meanwhile stays.
  name.value = (equaliser.vector.trim() || String(valueOf(node, "preset") ?? "")).slice(0, 60);
  name.focus();
  name.select();
  await attempt(async () => show(await read()));
}
