// The pack's own widgets for inputs that ComfyUI would show as plain fields. The values stay plain: numbers and strings.
import { app } from "../../scripts/app.js";
import { blocksWidget } from "./blocks.mjs";
import { refreshAdapters } from "./adapters.mjs";
import { fileWidget } from "./file.mjs";
import { scheduleWidget } from "./schedule.mjs";
import { settings } from "./settings.mjs";
import { stackWidget } from "./stack.mjs";
import { strengthWidget } from "./strength.mjs";

const WIDGETS = {
  LOHA_FILE: fileWidget,
  LOHA_STRENGTH: strengthWidget,
  LOHA_ROWS: stackWidget,
  LOHA_VECTOR: blocksWidget,
  LOHA_KEYFRAMES: scheduleWidget,
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

/** A primitive node that is connected offers ComfyUI's own field, by what it asks the input's widget for. */
function plain({ type, widget }, places = {}) {
  if (!(widget?.name in places)) return;
  for (const key of Object.getOwnPropertySymbols(widget)) {
    const [, options] = widget[key]?.() ?? [];
    if (options) widget[key] = () => [type, { ...options, type, widgetType: undefined }];
  }
}

app.registerExtension({
  name: "LoHa.Widgets",
  settings,
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
    node.lohaCreated?.();
    for (const input of node.inputs ?? []) plain(input, PLACES[node.comfyClass]);
  },
  refreshComboInNodes: refreshAdapters,
});
