// Which model a node's input leads to, before anything has run.
import { ask } from "./adapters.mjs";
import { keyOf, linkInto } from "./host.mjs";

// A loader's widget -> the folder of ComfyUI's that its name is from.
const FOLDERS = { ckpt_name: "checkpoints", unet_name: "diffusion_models" };
const MOST_STEPS = 100;

/** @type {Map<string, string>} a model -> its layout: as the file says, or the last run */
const layouts = new Map();

/**
 * @typedef {object} Model
 * @property {string} key tells it from others
 * @property {any} node its loader, or the last node that can be seen from here
 * @property {{folder: string, name: string}} [file]
 */

/**
 * The model that a node's `model` input leads to; undefined if nothing is connected.
 *
 * @param {any} node
 * @returns {Model | undefined}
 */
export function modelOf(node) {
  let at = node, by = (/** @type {any} */ input) => input.name === "model";
  for (let step = 0; step < MOST_STEPS; step++) {
    const link = linkInto(at, by);
    const from = link && at.graph.getNodeById(link.origin_id);
    if (!from) break; // the beginning, or a subgraph's own input
    at = from;
    const widget = at.widgets?.find(({ name, value }) => name in FOLDERS && typeof value === "string");
    if (widget) {
      const file = { folder: FOLDERS[widget.name], name: widget.value };
      return { key: JSON.stringify(file), node: at, file };
    }
    by = ({ type }) => type === "MODEL" || at.inputs.length === 1;
  }
  if (at === node) return undefined;
  return { key: JSON.stringify([keyOf(at), at.type, at.widgets?.map(({ value }) => value)]), node: at };
}

/** A run has told the layout of the model. */
export const learn = (/** @type {any} */ node, /** @type {string} */ layout) => {
  const model = modelOf(node);
  if (model) layouts.set(model.key, layout);
};

/**
 * The layout of a node's model as `/loha/blocks` takes it: "auto" where nothing tells.
 *
 * @param {Model} model
 */
export async function layoutOf({ key, file }) {
  if (!layouts.has(key) && file) {
    const { layout } = await ask("layout", file).catch(() => ({ layout: "" }));
    if (layout) layouts.set(key, layout);
  }
  return layouts.get(key) ?? "auto";
}
