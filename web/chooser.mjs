// Choosing adapters out of many, and reading what is in one.
import { app } from "../../scripts/app.js";
import { allAdapters, ask, pictureOf, refreshAdapters, split } from "./adapters.mjs";
import { copyText } from "./clipboard.mjs";
import { el, openDialog } from "./dom.mjs";
import { entryOf, foldersOf, isIn, search } from "./search.mjs";
import { FAVOURITES, RECENT } from "./settings.mjs";
import { t } from "./words.mjs";

// More rows than this nobody reads; typing narrows them down.
const MOST = 100;
const MOST_RECENT = 12;
// Where a folder may be chosen; no folder's name begins so.
const ONLY = { favourites: "/favourites", recent: "/recent" };

/** Names that the user's settings keep. */
const kept = (/** @type {string} */ setting) => /** @type {string[]} */ ([...(app.extensionManager.setting.get(setting) ?? [])]);
const keep = (/** @type {string} */ setting, /** @type {string[]} */ names) => app.extensionManager.setting.set(setting, names);

/**
 * @param {HTMLElement} anchor
 * @param {object} how
 * @param {boolean} [how.several]
 * @param {string} [how.current] the one that is chosen now
 * @param {string} [how.typed] the beginning of what to look for
 * @param {(names: string[]) => void} how.chosen called once, if something was chosen
 */
export function chooseAdapters(anchor, { several = false, current = "", typed = "", chosen }) {
  /** @type {Set<string>} */
  const ticked = new Set();
  /** @type {{names: Set<string>, pictured: Set<string>} | undefined} */
  let all;
  /** @type {import("./search.mjs").Entry[]} */
  let entries = [];
  const favourites = new Set(kept(FAVOURITES));
  const recent = kept(RECENT);
  let at = 0;
  /** @type {string[]} */
  let shown = [];

  const filter = el("input.loha-filter", {
    type: "search",
    value: typed,
    placeholder: t("Words in any order…"),
    "aria-label": t("filter"),
    role: "combobox",
    "aria-controls": "loha-choices",
    "aria-expanded": "true",
    oninput: () => fill(),
  });
  const folder = el("select.loha-folder", { "aria-label": t("folder"), title: t("folder"), onchange: () => fill() });
  const list = el("div.loha-choices.loha-many.loha-scrolls", { id: "loha-choices", role: "listbox", "aria-multiselectable": String(several) });
  const add = el("button.loha-button", { type: "button", onclick: () => finish([...ticked]) });
  const dialog = openDialog(
    several ? t("Add adapters") : t("Choose an adapter"),
    anchor,
    el("div.loha-row", {}, filter, folder),
    list,
    ...(several ? [el("footer", {}, el("small", { textContent: t("Enter adds one; tick to add several") }), add)] : []),
  );

  const finish = (/** @type {string[]} */ found) => {
    dialog.close();
    if (!found.length) return;
    keep(RECENT, [...new Set([...found, ...recent])].slice(0, MOST_RECENT));
    chosen(found);
  };
  const tick = (/** @type {string} */ name) => {
    if (!several) return finish([name]);
    if (!ticked.delete(name)) ticked.add(name);
    const row = list.children[shown.indexOf(name)];
    row.setAttribute("aria-selected", String(ticked.has(name)));
    row.querySelector("input").checked = ticked.has(name);
    point(shown.indexOf(name));
    filter.focus();
  };

  /** The server's answer: the folders, and the names: first what is chosen, then what the user knows. */
  function know(found) {
    all = found;
    const first = new Set([current, ...recent, ...favourites].filter((name) => all.names.has(name)));
    entries = [...first, ...[...all.names].filter((name) => !first.has(name))].map(entryOf);
    const option = (value, textContent) => el("option", { value, textContent });
    const before = folder.value;
    folder.replaceChildren(
      option("", t("all folders")),
      option(ONLY.favourites, `★ ${t("favourites")}`),
      option(ONLY.recent, t("recently used")),
      ...foldersOf(all.names).map((name) => option(name, name)),
    );
    folder.value = before;
    if (folder.selectedIndex < 0) folder.value = "";
    list.classList.toggle("pictured", all.pictured.size > 0);
    fill();
  }

  function within(/** @type {string} */ name) {
    if (folder.value === ONLY.favourites) return favourites.has(name);
    if (folder.value === ONLY.recent) return recent.includes(name);
    return !folder.value || isIn(name, folder.value);
  }

  function fill() {
    const found = search(entries.filter(({ name }) => within(name)), filter.value);
    shown = found.slice(0, MOST);
    list.replaceChildren(...shown.map(drawRow));
    if (found.length > MOST) list.append(el("small", { textContent: t("… and {number} more: type to narrow them down", { number: found.length - MOST }) }));
    if (!found.length) list.append(el("small", { textContent: !all ? "…" : all.names.size ? t("nothing fits") : t("no adapter in models/loras") }));
    list.scrollTop = 0;
    // Where nothing is typed, Enter keeps what is chosen.
    point(filter.value ? 0 : Math.max(0, shown.indexOf(current)));
  }

  function drawRow(/** @type {string} */ name, /** @type {number} */ index) {
    const [inside, stem] = split(name);
    const has = all?.pictured.has(name);
    return el(
      "div.loha-choice",
      {
        id: `loha-choice-${index}`,
        role: "option",
        title: name,
        "aria-label": `${stem} ${inside}`.trimEnd(),
        "aria-selected": String(several ? ticked.has(name) : name === current),
        onclick(event) {
          event.preventDefault(); // the box follows the set, not the click
          tick(name);
        },
      },
      ...(several ? [el("input", { type: "checkbox", checked: ticked.has(name), tabIndex: -1 })] : []),
      ...(all?.pictured.size ? [has ? el("img", { src: pictureOf(name), alt: "", loading: "lazy", decoding: "async" }) : el("i.loha-no-picture")] : []),
      el("span", { textContent: stem }),
      el("small", { textContent: inside }),
      star(name, stem),
      icon("pi-info-circle", t("About {name}", { name: stem }), ({ currentTarget }) => showInfo(currentTarget, name)),
    );
  }

  function star(/** @type {string} */ name, /** @type {string} */ stem) {
    const button = icon("pi-star", t("{name} is a favourite", { name: stem }), () => {
      if (!favourites.delete(name)) favourites.add(name);
      keep(FAVOURITES, [...favourites]);
      mark();
    });
    const mark = () => {
      button.setAttribute("aria-pressed", String(favourites.has(name)));
      button.firstElementChild.className = `pi ${favourites.has(name) ? "pi-star-fill" : "pi-star"}`;
    };
    mark();
    return button;
  }

  /** The row that Enter takes. */
  function point(/** @type {number} */ next) {
    list.children[at]?.classList.remove("current");
    at = Math.max(0, Math.min(next, shown.length - 1));
    const row = shown.length ? list.children[at] : undefined;
    row?.classList.add("current");
    row?.scrollIntoView({ block: "nearest" });
    filter.setAttribute("aria-activedescendant", row?.id ?? "");
    add.textContent = ticked.size ? t("Add {number}", { number: ticked.size }) : t("Add");
    add.disabled = !ticked.size;
  }

  filter.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (step) {
      event.preventDefault();
      point(at + step);
    } else if (event.key === "Enter" && shown.length) {
      event.preventDefault();
      finish(ticked.size ? [...ticked] : [shown[at]]);
    } else if (event.key === " " && several && event.ctrlKey && shown.length) {
      event.preventDefault();
      tick(shown[at]);
    }
  });
  fill();
  filter.focus();
  filter.setSelectionRange(typed.length, typed.length);

  const learn = () => allAdapters().then(know, () => {});
  learn().then(() => {
    // What was saved since: the list is drawn anew only if there is something.
    const before = all;
    refreshAdapters();
    return allAdapters().then((found) => {
      const same = before && before.names.size === found.names.size && [...found.names].every((name) => before.names.has(name));
      if (!same && dialog.open) know(found);
    }, () => {});
  });
}

function icon(/** @type {string} */ name, /** @type {string} */ title, /** @type {(event: any) => void} */ then) {
  return el("button.loha-icon", {
    type: "button", title, "aria-label": title, tabIndex: -1,
    onclick(event) {
      event.stopPropagation(); // not the row's
      then(event);
    },
  }, el(`i.pi.${name}`));
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
