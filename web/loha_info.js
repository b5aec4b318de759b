// Shows LoHaInfo's text on the node.
import { app } from "../../scripts/app.js";
import { el, isolate } from "./dom.mjs";

app.registerExtension({
  name: "LoHa.Info",
  nodeCreated(node) {
    if (node.comfyClass !== "LoHaInfo") return;

    const text = el("pre.loha-info", { textContent: "Run the workflow to see what is in the adapter." });
    isolate(text); // selecting text must not drag the node
    node.addDOMWidget("summary", "loha_text", text, { serialize: false, getMinHeight: () => 200 });
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 520)]); // room for the picture below

    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) text.textContent = [].concat(output.text).join("\n");
    };
  },
});
