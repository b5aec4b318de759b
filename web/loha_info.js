// Shows LoHaInfo's text on the node.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "LoHa.Info",
  nodeCreated(node) {
    if (node.comfyClass !== "LoHaInfo") return;

    const text = document.createElement("pre");
    text.className = "loha-info";
    text.textContent = "Run the workflow to see what is in the adapter.";
    Object.assign(text.style, {
      margin: "0",
      minHeight: "200px", // Nodes 2.0 sizes a widget by its CSS
      padding: "6px",
      overflow: "auto",
      boxSizing: "border-box",
      whiteSpace: "pre-wrap",
      userSelect: "text",
      font: "12px/1.4 monospace",
      color: "var(--input-text)",
      background: "var(--comfy-input-bg)",
    });
    // Selecting text must not drag the node.
    for (const event of ["pointerdown", "pointermove", "pointerup", "mousedown"]) {
      text.addEventListener(event, (e) => e.stopPropagation());
    }
    node.addDOMWidget("summary", "loha_text", text, { serialize: false, getMinHeight: () => 200 });
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 520)]); // room for the picture below

    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) text.textContent = [].concat(output.text).join("\n");
    };
  },
});
