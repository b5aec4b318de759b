// Stack: rows of adapters. The node's value is one string, the rows as JSON.
import { allAdapters, split } from "./adapters.mjs";
import { el, onDrag } from "./dom.mjs";
import { after, committed, host } from "./host.mjs";
import { clamp, numberField, parse } from "./number.mjs";
import { t } from "./words.mjs";

// Loaded when it is first needed.
const chooser = () => import("./chooser.mjs");

const ROW = 28, HEAD = 32, LEAST_ROWS = 1, MOST_ROWS = 8;

/**
 * @typedef {object} Row
 * @property {boolean} on
 * @property {string} name
 * @property {number} strength_model
 * @property {number} [strength_clip] the model's counts if it is missing
 */

/**
 * @param {any} node
 * @param {string} name
 * @param {any} spec
 */
export function stackWidget(node, name, spec) {
  /** @type {Row[]} */
  let rows = [];
  let two = false; // a strength for each network
  let problem = "";
  /** @type {Set<string> | undefined} */
  let known;

  const all = toggle(t("all on or off"), () => {
    const on = !rows.every((row) => row.on);
    for (const row of rows) row.on = on;
    changed();
  });
  const count = el("span.loha-count");
  const both = button("M|C", t("A strength for the model and another for the text encoders"), () => {
    two = !two;
    for (const row of rows) {
      if (two) row.strength_clip ??= row.strength_model;
      else delete row.strength_clip;
    }
    changed();
  });
  const add = button(t("+ Add"), t("Add adapters"), async () => {
    (await chooser()).chooseAdapters(add, {
      several: true,
      chosen(names) {
        for (const name of names) rows.push({ on: true, name, strength_model: 1, ...(two ? { strength_clip: 1 } : {}) });
        changed();
        list.scrollTop = list.scrollHeight;
      },
    });
  });
  const list = el("div.loha-rows.loha-scrolls", { role: "list" });
  const element = el("div.loha-stack", {}, el("div.loha-row", {}, all, count, both, add), list);

  const hosted = host(node, name, element, {
    value: spec[1]?.default ?? "[]",
    read: (found) => (typeof found === "string" ? found : JSON.stringify(found ?? [])),
    height: () => HEAD + ROW * clamp(rows.length, LEAST_ROWS, MOST_ROWS),
    grows: true,
    show: load,
  });

  const store = () => hosted.set(JSON.stringify(rows));
  /** After a change other than that of a strength, which its field shows by itself. */
  const changed = (focused = -1) => {
    store();
    draw(focused);
    hosted.fit(true);
    committed();
  };

  function load(value) {
    const found = understand(value);
    problem = found ? "" : t("not a list of rows; adding one replaces it");
    rows = found ?? [];
    if (rows.length) two = rows.some((row) => row.strength_clip !== undefined);
    draw();
    hosted.fit(false);
  }

  /** @param {number} focused row that gets the focus; that of the focused one if it is negative */
  function draw(focused = -1) {
    const active = list.contains(document.activeElement) ? document.activeElement : null;
    const at = focused < 0 ? [...list.children].findIndex((row) => row.contains(active)) : focused;
    list.replaceChildren(...rows.map(drawRow));
    if (!rows.length) list.append(el("div.loha-empty", { textContent: problem || t("Add adapters to apply them together.") }));
    const part = active?.dataset.part;
    if (part) list.children[Math.min(at, rows.length - 1)]?.querySelector(`[data-part=${part}]`)?.focus();

    const on = rows.filter((row) => row.on).length;
    all.setAttribute("aria-checked", on && on < rows.length ? "mixed" : String(on > 0));
    all.disabled = !rows.length;
    count.textContent = rows.length ? t("{on} of {all} on", { on, all: rows.length }) : "";
    both.setAttribute("aria-pressed", String(two));
    mark();
  }

  function drawRow(row, index) {
    const [folder, stem] = split(row.name);
    const strength = (key, label) => {
      const set = (value) => {
        row[key] = value;
        store();
      };
      const field = numberField(t("{label} of {name}", { label, name: stem }), set, committed);
      field.show(row[key] ?? row.strength_model);
      return field.element;
    };
    const move = (event) => {
      const to = index + ({ ArrowUp: -1, ArrowDown: 1 }[event.key] ?? NaN);
      if (!(to >= 0 && to < rows.length)) return;
      event.preventDefault();
      rows.splice(to, 0, ...rows.splice(index, 1));
      changed(to);
    };
    const replace = async () =>
      (await chooser()).chooseAdapters(title, { current: row.name, chosen: ([chosen]) => ((row.name = chosen), changed()) });
    const on = toggle(t("{name} on", { name: stem }), () => ((row.on = !row.on), changed()));
    on.setAttribute("aria-checked", String(row.on));
    const remove = () => (rows.splice(index, 1), changed());
    const title = button(stem, row.name, replace, "name");
    if (folder) title.append(el("small", { textContent: folder }));
    const line = el(
      "div.loha-row.loha-stack-row",
      { role: "listitem" },
      el("button.loha-icon.loha-grip", { type: "button", title: t("Drag to reorder, or ↑ ↓"), "aria-label": t("reorder {name}", { name: stem }), onkeydown: move, "data-part": "grip" }, el("i.pi.pi-ellipsis-v")),
      on,
      title,
      strength("strength_model", two ? t("model strength") : t("strength")),
      ...(two ? [strength("strength_clip", t("clip strength"))] : []),
      icon("pi-info-circle", t("About {name}", { name: stem }), async ({ currentTarget }) => (await chooser()).showInfo(currentTarget, row.name), "info"),
      icon("pi-times", t("Remove {name}", { name: stem }), remove, "remove"),
    );
    line.classList.toggle("off", !row.on);
    return line;
  }

  /** Adapters that the server does not have. */
  function mark() {
    for (const [index, row] of rows.entries()) {
      const missing = Boolean(known && !known.has(row.name));
      list.children[index].classList.toggle("missing", missing);
      const title = list.children[index].querySelector("[data-part=name]");
      title.title = missing ? t("{name}: not in models/loras. Click to choose another.", { name: row.name }) : row.name;
    }
  }

  // The list has the capture: a row that moves in the page would lose it.
  onDrag(list, (event) => {
    const line = event.target.closest(".loha-grip")?.closest(".loha-stack-row");
    if (!line) return undefined;
    let at = [...list.children].indexOf(line);
    const from = at;
    line.classList.add("dragged");
    return {
      move(e) {
        const box = list.getBoundingClientRect();
        const y = (e.clientY - box.top) * (list.offsetHeight / box.height);
        list.scrollTop += y < ROW / 2 ? -8 : y > list.offsetHeight - ROW / 2 ? 8 : 0;
        const to = clamp(Math.floor((y + list.scrollTop) / ROW), 0, rows.length - 1);
        if (to === at) return;
        rows.splice(to, 0, ...rows.splice(at, 1));
        list.insertBefore(line, list.children[to > at ? to + 1 : to] ?? null);
        at = to;
      },
      end() {
        line.classList.remove("dragged");
        if (at !== from) changed();
      },
    };
  });

  const learn = () => allAdapters().then(({ names }) => ((known = names), mark()), () => {});
  window.addEventListener("loha-adapters", learn);
  after(node, "onRemoved", () => window.removeEventListener("loha-adapters", learn));
  learn();
  load(hosted.get());
  return { widget: hosted.widget, minWidth: 340 };
}

/**
 * The rows that a value stands for; undefined if it is not a list of rows. The server says what is wrong with it.
 *
 * @param {string} value
 * @returns {Row[] | undefined}
 */
export function understand(value) {
  try {
    const found = JSON.parse(value || "[]");
    if (!Array.isArray(found) || !found.every((row) => typeof row?.name === "string")) return undefined;
    return found.map(({ on, name, strength_model, strength_clip }) => ({
      on: on !== false,
      name,
      strength_model: parse(strength_model) ?? 1,
      ...(strength_clip === undefined ? {} : { strength_clip: parse(strength_clip) ?? 1 }),
    }));
  } catch {
    return undefined;
  }
}

/** Not a checkbox: ComfyUI leaves Ctrl+Z to whatever input has the focus. */
function toggle(/** @type {string} */ label, /** @type {() => void} */ onclick) {
  return el("button.loha-switch", { type: "button", role: "switch", title: label, "aria-label": label, onclick, "data-part": "on" });
}

function button(/** @type {string} */ label, /** @type {string} */ title, /** @type {() => void} */ onclick, part = "") {
  return el("button.loha-button", { type: "button", title, onclick, "data-part": part }, el("span", { textContent: label }));
}

function icon(/** @type {string} */ name, /** @type {string} */ title, /** @type {(event: any) => void} */ onclick, part = "") {
  return el("button.loha-icon", { type: "button", title, "aria-label": title, onclick, "data-part": part }, el(`i.pi.${name}`));
}
