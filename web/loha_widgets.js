// The pack's own widgets for inputs that ComfyUI would show as plain fields. The values stay plain: numbers and strings.
import { app } from "../../scripts/app.js";
import { refreshAdapters } from "./adapters.mjs";
import { fileWidget } from "./file.mjs";
import { host } from "./host.mjs";
import { settings } from "./settings.mjs";
import { stackWidget } from "./stack.mjs";
import { strengthWidget } from "./strength.mjs";

/** A widget for a text whose code is loaded with the first node that has it. */
const drawn = (/** @type {() => Promise<{fill: Function}>} */ load, /** @type {number} */ height) =>
  (/** @type {any} */ node, /** @type {string} */ name, /** @type {any} */ spec) => {
    /** @type {((value: string) => void) | undefined} */
    let show;
    const element = document.createElement("div");
    const hosted = host(node, name, element, {
      value: spec[1]?.default ?? "",
      read: (found) => String(found ?? ""),
      height: () => height,
      grows: true,
      show: (value) => show?.(value),
    });
    load().then(({ fill }) => (show = fill(node, hosted, element, spec[1]?.placeholder ?? "")));
    return { widget: hosted.widget, minWidth: 400 };
  };

const WIDGETS = {
  LOHA_FILE: fileWidget,
  LOHA_STRENGTH: strengthWidget,
  LOHA_ROWS: stackWidget,
  LOHA_VECTOR: drawn(() => import("./blocks.mjs"), 226),
  LOHA_KEYFRAMES: drawn(() => import("./schedule.mjs"), 220),
};

/** @type {Record<string, Record<string, keyof typeof WIDGETS>>} node -> input -> widget */
const PLACES = {
  LoHaLoader: { lora_name: "LOHA_FILE", strength_model: "LOHA_STRENGTH", strength_clip: "LOHA_STRENGTH" },
  LoHaLoadAdapter: { lora_name: "LOHA_FILE" },
  LoHaApply: { strength_model: "LOHA_STRENGTH", strength_clip: "LOHA_STRENGTH" },
  LoHaStack: { rows: "LOHA_ROWS" },
  LoHaBlockStrength: { vector: "LOHA_VECTOR" },
  LoHaSchedule: { keyframes: "LOHA_KEYFRAMES" },
};

/** Nodes of which the server tells before a run why it would fail. */
const CHECKED = [
  "LoHaLoader", "LoHaLoadAdapter", "LoHaStack", "LoHaBlockStrength", "LoHaSchedule", "LoHaGrid", "LoHaNetwork",
  "LoHaOptimizer", "LoHaObjective", "LoHaTrainer", "LoHaTrainFolder", "LoHaSave", "LoHaExtract",
];

/** A primitive node that is connected offers ComfyUI's own field, by what it asks the input's widget for. */
function plain({ type, widget }, places = {}) {
  if (!(widget?.name in places)) return;
  for (const key of Object.getOwnPropertySymbols(widget)) {
    const [, options] = widget[key]?.() ?? [];
    if (options) widget[key] = () => [type, { ...options, type, widgetType: undefined }];
  }
}

// How ComfyUI's node search compares nodes: by how the names fit what is typed (1 begins, 9 not at all), how often they
// are used, where in the name it is, how long the name is, and how like it all names and aliases are (0 is the same).
const NOT_AT_ALL = 9, BEHIND_NAMES = 6, THE_SAME = 0.2;

/** An alias that was typed comes behind names that have it, and before what is only like it. */
const byAlias = (/** @type {number} */ fits, /** @type {number} */ unlike) => (fits === NOT_AT_ALL && unlike < THE_SAME ? BEHIND_NAMES : fits);
const ranked = (/** @type {number[]} */ [fits, ...others]) => [byAlias(fits, others.at(-1)), 0, ...others];
/** All our names begin alike, and the shortest would come first: of those this one is what people look for. */
const first = (/** @type {number[]} */ [fits, ...others]) => [byAlias(fits, others.at(-1)), 0, 0, 0, 0];

const ours = (/** @type {any} */ def) => Boolean(def?.python_module?.endsWith("ComfyUI-LoHa"));

app.registerExtension({
  name: "LoHa.Widgets",
  settings,
  beforeRegisterVueAppNodeDefs(defs) {
    for (const def of defs) {
      if (ours(def)) def.postProcessSearchScores = def.name === "LoHaLoader" ? first : ranked;
    }
  },
  getCustomWidgets: () => WIDGETS,
  // Each time that ComfyUI reads the definitions, as for R or another language.
  beforeRegisterNodeDef(type, def) {
    for (const [name, widgetType] of Object.entries(PLACES[def.name] ?? {})) {
      const spec = def.input?.required?.[name];
      // The input keeps its type, so that links and the API see what they always saw.
      if (spec) spec[1] = { ...spec[1], widgetType };
    }
  },
  nodeCreated(node) {
    if (CHECKED.includes(node.comfyClass)) import("./problem.mjs").then(({ watch }) => watch(node));
    for (const input of node.inputs ?? []) {
      plain(input, PLACES[node.comfyClass]);
      // Later front ends put the server's English name before the one in the page's language.
      if (ours(node.constructor.nodeData) && !input.widget) input.label = undefined;
    }
  },
  refreshComboInNodes: refreshAdapters,
});
