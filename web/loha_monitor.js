// How training goes, on the node that trains.
import { app } from "../../scripts/app.js";
import { el, isolate } from "./dom.mjs";

const HEIGHT = 250;

app.registerExtension({
  name: "LoHa.Monitor",
  nodeCreated(node) {
    if (node.comfyClass !== "LoHaTrainer") return;
    const view = el("div.loha-monitor");
    const frame = el("div.loha-frame", {}, view);
    view.classList.add("loha");
    frame.style.minHeight = `${HEIGHT}px`;
    isolate(frame);
    const widget = node.addDOMWidget("monitor", "loha_monitor", frame, { serialize: false, getMinHeight: () => HEIGHT });
    widget.serialize = false; // in a saved workflow either
    node.setSize([Math.max(node.size[0], 380), node.computeSize()[1] + 220]); // room for the curve's picture below
    import("./monitor.mjs").then(({ monitor }) => monitor(node, view));
  },
});
