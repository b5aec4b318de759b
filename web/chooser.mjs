// Choosing adapters out of many, and reading what is in one.
import { adapterNames, ask, find, pictureOf, split } from "./adapters.mjs";
import { copyText, el, openDialog } from "./dom.mjs";
import { t } from "./words.mjs";

// More rows than this nobody reads; typing narrows them down.
const MOST = 200;

/**
 * @param {HTMLElement} anchor
 * @param {boolean} several
 * @param {(names: string[]) => void} chosen called once, if something was chosen
 */
export async function chooseAdapters(anchor, several, chosen) {
  const names = await adapterNames().catch(() => new Set());
  /** @type {Set<string>} */
  const ticked = new Set();
  let at = 0;
  /** @type {string[]} */
  let shown = [];

  const filter = el("input.loha-filter", {
    type: "search",
    placeholder: t("Type a few letters…"),
    "aria-label": t("filter"),
    role: "combobox",
    "aria-controls": "loha-choices",
    "aria-expanded": "true",
    oninput: () => draw(0),
  });
  const folders = [...new Set([...names].map((name) => split(name)[0]))].filter(Boolean).sort();
  const folder = el("select.loha-folder", { "aria-label": t("folder"), title: t("folder"), onchange: () => draw(0) });
  folder.append(el("option", { value: "", textContent: t("all folders") }));
  for (const name of folders) folder.append(el("option", { value: name, textContent: name }));
  folder.hidden = !folders.length;
  const list = el("div.loha-choices.loha-scrolls", { id: "loha-choices", role: "listbox", "aria-multiselectable": String(several) });
  const add = el("button.loha-button", { type: "button", onclick: () => finish([...ticked]) });
  const dialog = openDialog(
    several ? t("Add adapters") : t("Choose an adapter"),
    anchor,
    el("div.loha-row", {}, filter, folder),
    list,
    ...(several ? [el("footer", {}, el("small", { textContent: t("Enter adds one; tick to add several") }), add)] : []),
  );

  const finish = (found) => {
    dialog.close();
    if (found.length) chosen(found);
  };
  const tick = (name) => {
    if (!several) return finish([name]);
    if (!ticked.delete(name)) ticked.add(name);
    draw(shown.indexOf(name));
    filter.focus();
  };
  const draw = (next) => {
    const found = find(names, filter.value, folder.value);
    shown = found.slice(0, MOST);
    at = Math.max(0, Math.min(next, shown.length - 1));
    const top = list.scrollTop;
    list.replaceChildren(
      ...shown.map((name, index) => {
        const [inside, stem] = split(name);
        const box = several ? [el("input", { type: "checkbox", checked: ticked.has(name), tabIndex: -1 })] : [];
        return el(
          "div.loha-choice",
          {
            id: `loha-choice-${index}`,
            role: "option",
            title: name,
            "aria-selected": String(several ? ticked.has(name) : index === at),
            onclick(event) {
              event.preventDefault(); // the box follows the set, not the click
              tick(name);
            },
          },
          ...box,
          el("span", { textContent: stem }),
          el("small", { textContent: inside }),
        );
      }),
    );
    if (found.length > MOST) list.append(el("small", { textContent: t("… and {number} more: type to narrow them down", { number: found.length - MOST }) }));
    if (!found.length) list.append(el("small", { textContent: names.size ? t("nothing fits") : t("no adapter in models/loras") }));
    list.scrollTop = top;
    const current = list.children[at];
    current?.classList.add("current");
    current?.scrollIntoView({ block: "nearest" });
    filter.setAttribute("aria-activedescendant", `loha-choice-${at}`);
    add.textContent = ticked.size ? t("Add {number}", { number: ticked.size }) : t("Add");
    add.disabled = !ticked.size;
  };
  filter.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (step) {
      event.preventDefault();
      draw(at + step);
    } else if (event.key === "Enter" && shown.length) {
      event.preventDefault();
      finish(ticked.size ? [...ticked] : [shown[at]]);
    } else if (event.key === " " && several && event.ctrlKey && shown.length) {
      event.preventDefault();
      tick(shown[at]);
    }
  });
  draw(0);
  filter.focus();
}

/**
 * What an adapter's file says of itself.
 *
 * @param {HTMLElement} anchor
 * @param {string} name
 */
export async function showInfo(anchor, name) {
  const body = el("div.loha-about.loha-scrolls", { textContent: "…" });
  openDialog(split(name)[1], anchor, body);
  let about;
  try {
    about = await ask("info", { name });
  } catch (error) {
    body.replaceChildren(el("p.loha-error", { textContent: String(error.message) }));
    return;
  }
  const facts = Object.entries({ file: about.name, ...about.facts }).flatMap(([label, value]) => [
    el("dt", { textContent: t(label) }),
    el("dd", { textContent: String(value) }),
  ]);
  body.replaceChildren(el("dl", {}, ...facts));
  if (about.words.length) {
    const words = about.words.map((word) => wordButton(word, word));
    const all = about.words.length > 1 ? [wordButton(t("copy all"), about.words.join(", "))] : [];
    body.append(el("p", { textContent: t("trigger words (click to copy)") }), el("div.loha-words", {}, ...words, ...all));
  }
  if (about.picture) body.prepend(el("img", { src: pictureOf(name), alt: "", loading: "lazy" }));
}

function wordButton(/** @type {string} */ label, /** @type {string} */ copied) {
  const button = el("button.loha-button", {
    type: "button",
    textContent: label,
    async onclick() {
      await copyText(copied);
      button.classList.add("copied");
      setTimeout(() => button.classList.remove("copied"), 900);
    },
  });
  return button;
}
