// How training goes, on the node that trains.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el } from "./dom.mjs";
import { display } from "./host.mjs";

const HEIGHT = 250;

api.addEventListener("loha.training", () => {}); // ComfyUI warns of events that nobody listens to

app.registerExtension({
  name: "LoHa.Monitor",
  nodeCreated(node) {
    if (!["LoHaTrainer", "LoHaTrainFolder"].includes(node.comfyClass)) return;
    const view = el("div.loha-monitor");
    display(node, "monitor", view, HEIGHT);
    node.setSize([Math.max(node.size[0], 380), node.computeSize()[1]]);
    import("./monitor.mjs").then(({ monitor }) => monitor(node, view));
  },
});
