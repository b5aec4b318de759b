// An element on a node, as the widget of an input or for show, in LiteGraph and in Nodes 2.0.
import { app } from "../../scripts/app.js";
import { isolate } from "./dom.mjs";
import { t } from "./words.mjs";

const MARGIN = 4;

/**
 * @template V
 * @typedef {object} Hosted
 * @property {any} widget ComfyUI's widget
 * @property {() => V} get
 * @property {(value: V) => void} set as by the user: ComfyUI is told, the element already shows it
 * @property {(byUser: boolean) => void} fit after the height may have changed
 */

/**
 * @template V
 * @param {any} node
 * @param {string} name of the input
 * @param {HTMLElement} element
 * @param {object} part
 * @param {V} part.value to begin with
 * @param {(value: any) => V} part.read what a saved workflow or another extension sets, brought to a value
 * @param {(value: V) => void} part.show the value has changed from outside
 * @param {() => number} part.height the least, in pixels
 * @param {boolean} [part.grows] takes what room the node has
 * @param {(label?: string) => void} [part.rename] a subgraph shows the widget under this name of its own, or none does
 * @param {{type: string, options: object}} [part.field] of ComfyUI's own fields, the one that can hold the value
 * @returns {Hosted<V>}
 */
export function host(node, name, element, { value, read, show, height, grows, rename, field = { type: "text", options: {} } }) {
  let current = value;
  const frame = document.createElement("div");
  frame.className = `loha-frame${grows ? " widget-expands" : ""}`;
  element.classList.add("loha");
  frame.append(element);
  // ComfyUI blurs a widget's element when something else is pressed; what has the focus lies in it.
  frame.blur = () => {
    const focused = document.activeElement;
    if (frame.contains(focused)) focused?.blur();
  };
  isolate(frame);
  passOn(node, frame);
  takeOver(node, name, frame);

  const widget = node.addDOMWidget(name, "loha", frame, {
    margin: MARGIN,
    selectOn: [],
    getMinHeight: () => height() + 2 * MARGIN,
    getMaxHeight: () => (grows ? undefined : height() + 2 * MARGIN),
    getValue: () => current,
    setValue(found) {
      const next = read(found);
      if (next === current) return;
      current = next;
      show(current);
    },
  });

  // Pages whose widgets have ids show nothing of ours as a subgraph's input, which is a field by type and options there.
  const asField = new Proxy(widget, { get: (target, key) => (key in field ? field[key] : target[key]) });
  const getWidgetFromSlot = node.getWidgetFromSlot;
  node.getWidgetFromSlot = function () {
    const found = getWidgetFromSlot.apply(this, arguments);
    return found === widget && "widgetId" in widget && !node.graph?.isRootGraph ? asField : found;
  };

  // ComfyUI would bring the node to the front, too; that numbers all nodes anew, and a redo after an undo is lost.
  frame.addEventListener("click", () => {
    if (!LiteGraph.vueNodesMode) app.canvas.selectNode(node);
  });

  const overridden = () => {
    const link = linkInto(node, (input) => input.widget?.name === name);
    // A subgraph's own input (-10) hands out this very widget; it stays usable there.
    const outer = link?.origin_id === -10 ? node.graph.inputs?.[link.origin_slot] : undefined;
    const linked = Boolean(link) && !outer;
    rename?.(outer?.label ?? outer?.name);
    frame.inert = linked;
    frame.toggleAttribute("data-overridden", linked);
    frame.dataset.says = t("set by the connected input");
  };
  after(node, "onConnectionsChange", overridden);
  after(node, "onConfigure", overridden);

  let before = height();
  if (!grows) frame.style.maxHeight = `${before}px`; // Nodes 2.0 shares a tall node's room among its widgets
  frame.style.minHeight = `${before}px`;
  return {
    widget,
    get: () => current,
    set(next) {
      if (next === current) return;
      current = next;
      widget.callback?.(next);
    },
    fit(byUser) {
      const grown = height() - before;
      before += grown;
      frame.style.minHeight = `${before}px`;
      if (LiteGraph.vueNodesMode) return; // goes by the style
      if (grown && byUser) node.setSize([node.size[0], node.size[1] + grown]);
      else if (grown > 0) node.expandToFitContent(); // a loaded node may have room already
      node.setDirtyCanvas?.(true, true);
    },
  };
}

/**
 * A part of a node that shows something: no input, and nothing that a workflow saves.
 *
 * @param {any} node
 * @param {string} name
 * @param {HTMLElement} element
 * @param {number} height the least, in pixels
 */
export function display(node, name, element, height) {
  const frame = document.createElement("div");
  frame.className = "loha-frame";
  frame.style.minHeight = `${height}px`; // Nodes 2.0 sizes a widget by its CSS
  element.classList.add("loha");
  frame.append(element);
  isolate(frame); // selecting text must not drag the node
  takeOver(node, name, frame);
  const options = { serialize: false, margin: MARGIN, getMinHeight: () => height + 2 * MARGIN };
  node.addDOMWidget(name, "loha_display", frame, options).serialize = false; // neither in prompts nor in workflows
}

/**
 * The link that ends in an input; later front ends warn of `input.link`.
 *
 * @param {any} node
 * @param {(input: any) => boolean} which
 */
export function linkInto(node, which) {
  const slot = node.graph ? (node.inputs ?? []).findIndex(which) : -1;
  return slot < 0 ? null : node.getInputLink(slot);
}

/** A node's key in `app.nodeOutputs`. */
export const keyOf = (/** @type {any} */ { id, graph }) => (graph.isRootGraph ? String(id) : `${graph.id}:${id}`);

/**
 * Undo, redo, and opening another workflow make nodes anew, with the ids of those that were there. Nodes 2.0 keeps what
 * it has drawn for an id, and puts a widget's element in only as it begins; so ours takes the place of the one before.
 */
function takeOver(/** @type {any} */ node, /** @type {string} */ name, /** @type {HTMLElement} */ frame) {
  after(node, "onAdded", () => {
    frame.dataset.of = `${keyOf(node)}:${name}`;
    if (!LiteGraph.vueNodesMode) return; // makes a place for each widget
    for (const other of document.querySelectorAll(".loha-frame")) {
      if (other !== frame && other.dataset.of === frame.dataset.of) other.replaceWith(frame);
    }
  });
}

/**
 * What runs of a node give: after each, and the last one's for a node that undo makes anew.
 *
 * @param {any} node
 * @param {(output: any) => void} then
 */
export function onOutput(node, then) {
  const onExecuted = node.onExecuted;
  node.onExecuted = function (output) {
    onExecuted?.apply(this, arguments);
    then(output ?? {});
  };
  after(node, "onAdded", () => {
    const output = app.nodeOutputs?.[keyOf(node)];
    if (output) then(output);
  });
}

/** Wheel and middle button over a widget mean the canvas, the right one the node; Nodes 2.0 passes them on itself. */
function passOn(/** @type {any} */ node, /** @type {HTMLElement} */ frame) {
  frame.addEventListener("contextmenu", (event) => {
    if (LiteGraph.vueNodesMode || event.target.closest?.("input, textarea")) return;
    event.preventDefault();
    app.canvas.constructor.active_canvas = app.canvas; // else only once the pointer has been on it; the menu needs it
    app.canvas.processSelect(node, event, true); // what the menu does, it does to the selected nodes
    const [canvasX, canvasY] = app.canvas.convertEventToCanvasOffset(event); // the menu asks which slot lies there
    app.canvas.processContextMenu(node, Object.assign(event, { canvasX, canvasY }));
  });
  frame.addEventListener("wheel", (event) => {
    const list = event.target.closest?.(".loha-scrolls, textarea");
    if (list && list.scrollHeight > list.clientHeight && !event.ctrlKey) return event.stopPropagation();
    if (LiteGraph.vueNodesMode) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const forward = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [type, process] of Object.entries(forward)) {
    frame.addEventListener(type, (event) => {
      const { button, buttons } = event;
      if ((button === 1 || buttons & 4) && !LiteGraph.vueNodesMode) app.canvas[process](event);
    });
  }
}

/**
 * Call `then` after a method of an object, whether or not it has one.
 *
 * @param {any} object
 * @param {string} method
 * @param {() => void} then
 */
export function after(object, method, then) {
  const first = object[method];
  object[method] = function () {
    const result = first?.apply(this, arguments);
    then();
    return result;
  };
}

/** Another widget's value. */
export const valueOf = (/** @type {any} */ node, /** @type {string} */ name) =>
  node.widgets?.find((widget) => widget.name === name)?.value;

/** Set another widget as its own controls do. */
export function setValue(/** @type {any} */ node, /** @type {string} */ name, /** @type {any} */ value) {
  const widget = node.widgets?.find((found) => found.name === name);
  if (!widget || widget.value === value) return;
  widget.value = value;
  widget.callback?.(value);
}

/** A change is complete: a step for undo. ComfyUI notices by itself when a mouse button goes up. */
export function committed() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  if (tracker?.captureCanvasState) tracker.captureCanvasState();
  else tracker?.checkState?.(); // as it was called
}
