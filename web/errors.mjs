// What a merge loses, layer by layer: a bar each.
import { el } from "./dom.mjs";
import { t } from "./words.mjs";

// The scale never ends below this, so that rounding doesn't look like a loss.
const LEAST = 0.01;

/**
 * @typedef {[name: string, block: string, error: number, rank: number]} Layer error: relative to the layer's update
 * @returns {{element: HTMLElement, show: (layers: Layer[]) => void}}
 */
export function errorBars() {
  /** @type {Layer[]} */
  let layers = [], shown = [];
  let at = -1, sorted = false;
  const status = el("span.loha-count");
  const plot = el("div.loha-plot", {
    tabIndex: 0, role: "slider", "aria-label": t("relative error by layer"), "aria-valuemin": "0",
    title: t("Point at a bar, or use the arrow keys"),
    onpointermove: ({ clientX }) => {
      const { left, width } = plot.getBoundingClientRect();
      choose(Math.floor(((clientX - left) / width) * shown.length));
    },
    onpointerleave: () => choose(-1),
    onkeydown(event) {
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: shown.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      choose(Math.max(0, to));
    },
  });
  const sort = el("button.loha-button", {
    type: "button", textContent: t("Sort"), title: t("Largest first"), "aria-pressed": "false",
    onclick() {
      sorted = !sorted;
      sort.setAttribute("aria-pressed", String(sorted));
      draw();
    },
  });

  function choose(index) {
    plot.children[at]?.classList.remove("current");
    at = Math.min(index, shown.length - 1);
    plot.children[at]?.classList.add("current");
    const [name, , error, rank] = shown[at] ?? [];
    const largest = Math.max(0, ...layers.map((layer) => layer[2]));
    status.textContent = name
      ? t("{error}, rank {rank}: {name}", { error: percent(error), rank, name })
      : t("{number} layers, at most {error} lost", { number: layers.length, error: percent(largest) });
    status.title = name ?? "";
    plot.setAttribute("aria-valuemax", String(shown.length - 1));
    plot.setAttribute("aria-valuenow", String(at));
    plot.setAttribute("aria-valuetext", status.textContent);
  }

  function draw() {
    shown = sorted ? layers.toSorted((a, b) => b[2] - a[2]) : layers;
    const top = Math.max(LEAST, ...layers.map((layer) => layer[2]));
    plot.replaceChildren(...shown.map(([, block, error], i) => {
      const bar = el("div.loha-error-bar", {}, el("i"));
      bar.firstChild.style.height = `${(100 * error) / top}%`;
      bar.classList.toggle("first", !sorted && i > 0 && block !== shown[i - 1][1]);
      return bar;
    }));
    choose(-1);
  }

  const element = el("div.loha-errors", { hidden: true }, el("div.loha-row", {}, status, sort), plot);
  return {
    element,
    show(found) {
      layers = found;
      element.hidden = !layers.length;
      draw();
    },
  };
}

const percent = (/** @type {number} */ share) => `${Number((100 * share).toPrecision(3))} %`;
