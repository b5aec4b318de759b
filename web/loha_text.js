// What a node says about its result, on the node.
import { app } from "../../scripts/app.js";
import { el } from "./dom.mjs";
import { display, onOutput } from "./host.mjs";
import { weights } from "./merge.mjs";
import { t } from "./words.mjs";

const LINE = 17, BARS = 96; // pixels

/** @type {Record<string, number>} node -> lines that are shown at least */
const LINES = { LoHaInfo: 11, LoHaMerge: 6, LoHaResize: 6, LoHaConvert: 6, LoHaExtract: 6, LoHaNetwork: 3, LoHaSave: 3, LoHaTrainFolder: 2 };

// They also say how much of each layer is lost.
const LOSING = ["LoHaMerge", "LoHaResize", "LoHaConvert", "LoHaExtract"];

/** @type {Record<string, string>} node -> what there is to see after a run */
const HINTS = {
  LoHaInfo: "Run the workflow to see what is in the adapter.",
  LoHaNetwork: "Run the workflow to see how many layers this means.",
  LoHaSave: "Run the workflow to see where the file lies.",
  LoHaTrainFolder: "Run the workflow to see where the file lies.",
};

app.registerExtension({
  name: "LoHa.Text",
  nodeCreated(node) {
    const lines = LINES[node.comfyClass];
    if (!lines) return;

    const losing = LOSING.includes(node.comfyClass);
    const height = lines * LINE + 13 + (losing ? BARS : 0);
    const hint = HINTS[node.comfyClass] ?? "Run the workflow to see what is lost.";
    const text = el("pre.loha-info", { textContent: t(hint) });
    const view = el("div", {}, text);
    display(node, "summary", view, height);
    const bars = losing && import("./errors.mjs").then(({ errorBars }) => {
      const made = errorBars();
      view.append(made.element);
      return made;
    });
    if (node.comfyClass === "LoHaInfo") import("./about.mjs").then(({ tellOfFile }) => tellOfFile(node, text, t(hint)));
    if (node.comfyClass === "LoHaMerge") weights(node);
    // Room for the picture below, where there is one.
    const [width, least] = lines > 3 ? [400, 320] : [320, 0];
    node.setSize([Math.max(node.size[0], width), node.computeSize()[1] + least]);

    onOutput(node, ({ text: said, layers }) => {
      if (said) {
        text.dataset.ran = "";
        text.textContent = [].concat(said).join("\n");
      }
      if (layers && bars) bars.then(({ show }) => show(layers));
    });
  },
});
