// Merge LoHas: of the further adapters, a weight is shown where one is connected. All weights are saved and sent.
import { after, linkInto } from "./host.mjs";

const FURTHER = [3, 4, 5, 6];

/** @param {any} node LoHa Merge */
export function weights(node) {
  const connected = (/** @type {string} */ name) => Boolean(linkInto(node, (input) => input.name === name));

  function show() {
    const changed = (node.widgets ?? []).filter((/** @type {any} */ widget) => {
      const slot = FURTHER.find((number) => widget.name === `weight_${number}`);
      const hidden = !connected(`loha_${slot}`) && !connected(widget.name);
      if (!slot || Boolean(widget.options.hidden) === hidden) return false;
      widget.hidden = hidden; // LiteGraph, and Nodes 2.0 from 1.58.1 on
      widget.options.hidden = hidden; // Nodes 2.0 before
      return true;
    });
    if (!changed.length) return;
    // Nodes 2.0 looks again as the list changes; that of 1.32.9, whose widgets have no ids, only at a node that is new.
    node.widgets.push(node.widgets.pop());
    if (!node.graph) return;
    if (LiteGraph.vueNodesMode && !("widgetId" in changed[0])) node.graph.onNodeAdded?.(node);
    node.expandToFitContent?.();
    node.setDirtyCanvas?.(true, true);
  }
  after(node, "onConfigure", show);
  after(node, "onConnectionsChange", show);
  show();
}
