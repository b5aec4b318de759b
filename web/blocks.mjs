// Block equaliser: a bar per block. What the vector means only the server knows; this draws its answer and writes text.
import { ask } from "./adapters.mjs";
import { el, onDrag } from "./dom.mjs";
import { after, committed, linkInto, valueOf } from "./host.mjs";
import { clamp, snap, stepped, text, FINE, STEP } from "./number.mjs";
import { t } from "./words.mjs";

// Loaded when a model is connected.
const model = () => import("./model.mjs");

const LOW = -1, HIGH = 2;

/**
 * @typedef {object} Bars as GET /loha/blocks answers
 * @property {string | null} family
 * @property {Record<string, number>} values block -> multiplier
 * @property {Record<string, number> | null} start the same for the preset alone; null where numbers replace it
 * @property {string[] | null} listed what each number of the vector stands for
 */

/** "IN04" -> "IN"; "OUT03-05" and "BASE" stand for themselves. */
const partOf = (/** @type {string} */ label) => /^(\D+)\d+$/.exec(label)?.[1] ?? label;
const numberOf = (/** @type {string} */ label) => label.slice(partOf(label).length);

/**
 * Fill a widget.
 *
 * @param {any} node
 * @param {import("./host.mjs").Hosted<string>} hosted
 * @param {HTMLElement} element
 * @param {string} placeholder
 * @returns {(value: string) => void} to show a value from outside
 */
export function fill(node, hosted, element, placeholder) {
  /** @type {Bars} */
  let bars = { family: null, values: {}, start: null, listed: null };
  const followed = new WeakSet(); // loaders' widgets

  const title = el("span.loha-count");
  const presets = el("button.loha-button", {
    type: "button",
    textContent: t("Presets"),
    title: t("Save, load, and share"),
    async onclick() {
      const { openPresets } = await import("./presets.mjs"); // rarely needed
      openPresets(presets, node, { vector: hosted.get(), numbers: () => numbers(), apply: (text) => put(text) });
    },
  });
  const plot = el("div.loha-bars");
  const groups = el("div.loha-groups");
  const area = el("textarea.loha-text", {
    rows: 2,
    spellcheck: false,
    placeholder,
    "aria-label": t("vector"),
    oninput: () => put(area.value, false),
    onchange: committed,
  });
  const error = el("div.loha-error", { role: "status" });
  element.classList.add("loha-equaliser");
  element.append(el("div.loha-row", {}, title, presets), plot, groups, area, error);

  /** A new vector, from wherever: the server tells what it means. */
  function put(value, write = true) {
    hosted.set(value);
    if (write && area.value !== value) area.value = value;
    query();
  }

  /** The layout of the model that is connected; whenever another is chosen, it is asked for again. */
  async function connected() {
    if (!linkInto(node, (input) => input.name === "model")) return "auto";
    const { layoutOf, modelOf } = await model();
    const found = modelOf(node);
    for (const widget of found?.node.widgets ?? []) {
      if (!followed.has(widget)) after(widget, "callback", query);
      followed.add(widget);
    }
    return found ? layoutOf(found) : "auto";
  }

  let asking = false, again = false, asked = "", wrong = "", said = "";
  const tell = () => (error.textContent = error.title = wrong || said);
  node.lohaSays = (/** @type {string} */ text) => ((said = text), tell());
  async function query() {
    again = asking;
    if (asking) return;
    asking = true;
    const chosen = valueOf(node, "family") ?? "auto";
    const family = chosen === "auto" ? await connected() : chosen;
    const wanted = { family, preset: valueOf(node, "preset") ?? "ALL", vector: hosted.get() };
    const key = JSON.stringify(wanted);
    if (key !== asked) {
      const answer = await ask("blocks", wanted).catch((reason) => ({ error: reason.message }));
      if (wanted.vector === hosted.get()) {
        asked = key;
        wrong = answer.error ?? "";
        tell();
        if (!answer.error) bars = answer;
        if (!dragging) draw();
      }
    }
    asking = false;
    if (again) query();
  }

  let dragging = false;
  /** Bars by label, kept while the labels stay the same so that focus and presses last. */
  let drawn = "";
  function draw() {
    const labels = Object.keys(bars.values);
    title.textContent = bars.family ?? t("parts of any model");
    title.title = bars.family ? "" : t("For a bar per block choose the family, or connect the model.");
    if (labels.join() !== drawn) {
      drawn = labels.join();
      plot.replaceChildren(...labels.map(drawBar));
      const parts = [...new Set(labels.map(partOf))];
      groups.replaceChildren(...parts.map((part) => drawGroup(part, labels.filter((label) => partOf(label) === part))));
      element.style.setProperty("--zero", `${(-LOW / (HIGH - LOW)) * 100}%`);
      element.style.setProperty("--one", `${((1 - LOW) / (HIGH - LOW)) * 100}%`);
    }
    labels.forEach((label, index) => showBar(plot.children[index], bars.values[label]));
  }

  function showBar(bar, value) {
    const [from, to] = [Math.min(0, value), Math.max(0, value)].map((v) => ((clamp(v, LOW, HIGH) - LOW) / (HIGH - LOW)) * 100);
    const fill = bar.firstElementChild;
    Object.assign(fill.style, { bottom: `${from}%`, height: `${Math.max(to - from, 1)}%` });
    fill.classList.toggle("negative", value < 0);
    bar.classList.toggle("beyond", value < LOW || value > HIGH);
    bar.setAttribute("aria-valuenow", text(value));
    bar.title = `${bar.getAttribute("aria-label")}: ${text(value)}`;
  }

  /** A press or key on a bar or group changes the values of its labels. */
  function control(handle, labels, jumps) {
    onDrag(handle, (event) => {
      const box = plot.getBoundingClientRect();
      const unit = (HIGH - LOW) / box.height;
      const before = labels.map((label) => bars.values[label]);
      let y = event.clientY, moved = 0;
      const jump = jumps && !event.shiftKey ? HIGH - (y - box.top) * unit - before[0] : 0;
      const change = (e) =>
        assign(labels, before.map((value) => clamp(snap(value + jump + moved, e.shiftKey ? FINE : STEP), LOW, HIGH)));
      handle.focus();
      dragging = true;
      if (jumps && !event.shiftKey) change(event);
      return {
        move(e) {
          moved += (y - e.clientY) * unit * (e.shiftKey ? 0.2 : 1);
          y = e.clientY;
          change(e);
        },
        end() {
          dragging = false;
          draw(); // the last answer may tell more than the drag has shown
          committed();
        },
      };
    });
    handle.addEventListener("dblclick", () => {
      assign(labels, labels.map(() => 1));
      committed();
    });
    handle.addEventListener("keydown", (event) => {
      const beside = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
      const to = { Home: 0, End: 1 }[event.key];
      const next = labels.map((label) => to ?? stepped(event, bars.values[label]));
      if (beside) handle[beside]?.focus();
      else if (next[0] === undefined) return;
      else {
        assign(labels, next);
        committed();
      }
      event.preventDefault();
    });
  }

  function drawBar(label, index) {
    const bar = el("div.loha-bar", { role: "slider", tabIndex: index ? -1 : 0, "aria-label": label, "aria-valuemin": LOW, "aria-valuemax": HIGH, "aria-orientation": "vertical" }, el("div.loha-fill"));
    if (index && partOf(label) !== partOf(Object.keys(bars.values)[index - 1])) bar.classList.add("first");
    control(bar, [label], true);
    return bar;
  }

  function drawGroup(part, labels) {
    const handle = el("button.loha-button", { type: "button", textContent: part, title: t("All of {part}: drag up or down, double-click for 1", { part }), "aria-label": t("all of {part}", { part }), style: `flex:${part === "BASE" ? 3 : labels.length} 0 0` });
    control(handle, labels, false);
    return handle;
  }

  /** Show new values at once, and write the vector that means them. */
  function assign(labels, values) {
    const all = Object.keys(bars.values);
    labels.forEach((label, index) => {
      bars.values[label] = values[index];
      showBar(plot.children[all.indexOf(label)], values[index]);
    });
    put(bars.listed ? numbers(labels) : named());
  }

  /** The bars as numbers: those that the vector lists if that is enough for what has changed, else of all blocks. */
  function numbers(changed = Object.keys(bars.values)) {
    const listed = bars.listed && changed.every((label) => bars.listed?.includes(label)) ? bars.listed : Object.keys(bars.values);
    return listed.map((label) => text(bars.values[label])).join(",");
  }

  /** The bars by name, as far as they differ from the preset: "OUT=0.5, IN04-IN08=0". */
  function named() {
    const { values, start } = bars;
    const written = [];
    const labels = Object.keys(values);
    for (let first = 0; first < labels.length; ) {
      const part = partOf(labels[first]);
      const end = (fits) => {
        let last = first;
        while (last + 1 < labels.length && partOf(labels[last + 1]) === part && fits(labels[last + 1])) last++;
        return last;
      };
      const value = values[labels[first]];
      const last = end((label) => values[label] === value);
      const whole = (first === 0 || partOf(labels[first - 1]) !== part) && last === end(() => true);
      const differs = labels.slice(first, last + 1).some((label) => values[label] !== start?.[label]);
      const range = first === last ? labels[first] : `${labels[first]}-${part}${numberOf(labels[last])}`;
      if (differs) written.push(`${whole ? part : range}=${text(value)}`);
      first = last + 1;
    }
    return written.join(", ");
  }

  const later = () => setTimeout(query); // when the nodes and links of a graph that is loaded are there
  after(node, "onConfigure", later);
  after(node, "onConnectionsChange", later);
  for (const other of ["preset", "family"]) {
    after(node.widgets.find((widget) => widget.name === other), "callback", query);
  }
  // A run is of the model that is connected now; what runs of other nodes have left for this one's id is not.
  const onExecuted = node.onExecuted;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    const layout = output?.layout?.[0];
    if (layout) model().then(({ learn }) => (learn(node, layout), query()));
  };
  put(hosted.get());
  return put;
}
