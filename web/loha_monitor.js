// How training goes, on the node that trains.
import { app } from "../../scripts/app.js";
import { el } from "./dom.mjs";
import { display } from "./host.mjs";

const HEIGHT = 250;

app.registerExtension({
  name: "LoHa.Monitor",
  nodeCreated(node) {
    if (node.comfyClass !== "LoHaTrainer") return;
    const view = el("div.loha-monitor");
    display(node, "monitor", view, HEIGHT);
    node.setSize([Math.max(node.size[0], 380), node.computeSize()[1] + 220]); // room for the curve's picture below
    import("./monitor.mjs").then(({ monitor }) => monitor(node, view));
  },
});
