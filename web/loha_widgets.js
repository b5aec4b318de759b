// The pack's own widgets for inputs that ComfyUI would show as plain fields. The values stay plain: numbers and strings.
import { app } from "../../scripts/app.js";
import { blocksWidget } from "./blocks.mjs";
import { refreshNames } from "./adapters.mjs";
import { scheduleWidget } from "./schedule.mjs";
import { stackWidget } from "./stack.mjs";
import { strengthWidget } from "./strength.mjs";

const WIDGETS = {
  LOHA_STRENGTH: strengthWidget,
  LOHA_ROWS: stackWidget,
  LOHA_VECTOR: blocksWidget,
  LOHA_KEYFRAMES: scheduleWidget,
};

/** @type {Record<string, Record<string, keyof typeof WIDGETS>>} node -> input -> widget */
const PLACES = {
  LoHaLoader: { strength_model: "LOHA_STRENGTH", strength_clip: "LOHA_STRENGTH" },
  LoHaApply: { strength_model: "LOHA_STRENGTH", strength_clip: "LOHA_STRENGTH" },
  LoHaStack: { rows: "LOHA_ROWS" },
  LoHaBlockStrength: { vector: "LOHA_VECTOR" },
  LoHaSchedule: { keyframes: "LOHA_KEYFRAMES" },
};

app.registerExtension({
  name: "LoHa.Widgets",
  getCustomWidgets: () => WIDGETS,
  // Each time that ComfyUI reads the definitions, as for R or another language.
  beforeRegisterNodeDef(type, def) {
    for (const [name, widgetType] of Object.entries(PLACES[def.name] ?? {})) {
      const spec = def.input?.required?.[name];
      // The input keeps its type, so that links and the API see what they always saw.
      if (spec) spec[1] = { ...spec[1], widgetType };
    }
  },
  nodeCreated: (node) => node.lohaCreated?.(),
  refreshComboInNodes: refreshNames,
});
