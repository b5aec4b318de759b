// The training monitor: the loss of a node's last run, from the server's buffer. Events say that there is more.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { el } from "./dom.mjs";
import { cancelJob } from "./job.mjs";
import { t } from "./words.mjs";

const SMOOTHING = 0.95;
const PICTURES = 6;
// After these there may be more to show.
const EVENTS = ["loha.training", "reconnected", "execution_start", "execution_success", "execution_error", "execution_interrupted"];
const PATIENCE = 2000; // ms without an event, after which the server is asked: a page that was reloaded may get none

/**
 * @param {any} node that trains
 * @param {HTMLElement} view to fill
 */
export function monitor(node, view) {
  let run, losses = [], previous = [];
  let preparing = "", passed = ""; // ids of prompts: one whose run has not begun, and one that takes this node's as it is
  let held, asking = false, again = false, removed = false, drawing, timer, log = false, range;
  const toggle = (label, title, then) =>
    el("button.loha-button", {
      type: "button", textContent: label, title, "aria-pressed": "false",
      onclick({ currentTarget }) {
        const on = currentTarget.getAttribute("aria-pressed") !== "true";
        currentTarget.setAttribute("aria-pressed", String(on));
        then(on);
        draw();
      },
    });
  const canvas = el("canvas", { role: "img" });
  const status = el("span.loha-count", { textContent: t("Run the workflow to see the loss.") });
  const pictures = el("div.loha-row.loha-previews");
  const cancel = el("button.loha-button", {
    type: "button", textContent: t("Cancel"), title: t("End the run; its state is kept"), disabled: true,
    onclick: () => cancelJob(preparing || run?.prompt || ""),
  });
  view.append(
    el("div.loha-row", {}, status,
      toggle(t("Log"), t("Logarithmic scale"), (on) => (log = on)),
      toggle(t("Fix"), t("Keep the loss axis as it is"), (on) => (held = on ? range : undefined)),
      cancel),
    el("div.loha-plot", {}, canvas), pictures);

  async function ask() {
    again = asking;
    if (asking) return;
    asking = true;
    clearTimeout(timer);
    try {
      const root = app.rootGraph ?? app.graph;
      const query = new URLSearchParams({
        workflow: root?.id ?? "",
        node: `${!node.graph || node.graph === root ? "" : ":"}${node.id}`, // a subgraph's nodes run as place:id
        run: run?.id ?? "",
        since: String(losses.length),
      });
      const answer = await (await api.fetchApi(`/loha/training?${query}`)).json();
      const found = answer.runs.at(-1);
      preparing = answer.preparing === passed ? "" : answer.preparing;
      if (found) {
        const same = found.id === run?.id;
        losses = same ? losses.concat(found.losses) : found.losses;
        if (!same) previous = found.previous;
        run = found;
        show();
      } else if (run?.state === "running") {
        run.state = "ComfyUI was restarted";
        show();
      } else show();
    } catch {
      // ComfyUI is away: what was there stays to be seen.
    }
    asking = false;
    if (removed) return;
    if (again) ask();
    else if (preparing || run?.state === "running") timer = setTimeout(ask, PATIENCE);
  }

  function show() {
    const running = run?.state === "running";
    const left = running ? run.seconds_left : null;
    const held_out = run?.validation ?? [];
    const last = held_out.at(-1)?.[1];
    const best = held_out.length ? lowest(held_out) : null;
    const parts = run && !preparing
      ? [
          t("{step} of {steps}", run),
          run.loss != null && t("loss {loss}", { loss: run.loss.toPrecision(3) }),
          best && t("validation {loss}, lowest {best} at step {step}", { loss: last.toPrecision(3), best: best[1].toPrecision(3), step: best[0] }),
          running && run.lr != null && t("lr {rate}", { rate: run.lr.toPrecision(2) }),
          left != null ? t("{time} left", { time: clock(left) }) : t(run.state),
        ]
      : [preparing ? t("preparing…") : t("Run the workflow to see the loss.")];
    // What is over says so, and when it was.
    const when = run?.began && new Date(1000 * run.began).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    if (run && !running && !preparing) parts.unshift(when ? t("last run ({name}, {when})", { name: run.name, when }) : t("last run"));
    status.textContent = parts.filter(Boolean).join(" · ");
    status.title = status.textContent;
    cancel.disabled = !running && !preparing;
    view.toggleAttribute("data-over", !running);
    const previews = preparing ? [] : (run?.previews ?? []);
    const all = previews.flatMap(([step, files]) => files.map((filename) => [step, filename]));
    const wanted = all.slice(-Math.max(PICTURES, previews.at(-1)?.[1].length ?? 0)).map(([step, filename]) => {
      const query = new URLSearchParams({ filename, type: "output", subfolder: `loha/${run.name}`, of: run.id });
      return [step, api.apiURL(`/view?${query}`)];
    });
    if (pictures.dataset.shown !== String(wanted)) {
      pictures.dataset.shown = String(wanted);
      pictures.replaceChildren(...wanted.map(([step, src]) => el("img", { src, alt: t("Step {step}", { step }), title: t("Step {step}", { step }) })));
    }
    draw();
  }

  function draw() {
    drawing ??= requestAnimationFrame(() => {
      drawing = undefined;
      // Until a new run begins, the last one is the run before.
      const validation = run?.validation ?? [];
      const curves = preparing ? { losses: [], previous: losses, validation: [] } : { losses, previous, validation };
      range = paint(canvas, { ...curves, steps: run?.steps ?? 1, log, held });
    });
  }

  const pass = ({ detail }) => {
    const own = String(node.id);
    if (detail.nodes?.some((id) => String(id) === own || String(id).endsWith(`:${own}`))) passed = detail.prompt_id;
    ask();
  };
  for (const event of EVENTS) api.addEventListener(event, ask);
  api.addEventListener("execution_cached", pass);
  const sized = new ResizeObserver(draw);
  sized.observe(canvas);
  const onRemoved = node.onRemoved;
  node.onRemoved = function () {
    onRemoved?.apply(this, arguments);
    for (const event of EVENTS) api.removeEventListener(event, ask);
    api.removeEventListener("execution_cached", pass);
    sized.disconnect();
    removed = true;
    clearTimeout(timer);
  };
  // A node that is being loaded gets its id after this.
  setTimeout(ask);
}

const clock = (seconds) =>
  seconds < 90
    ? t("{time} s", { time: Math.round(seconds) })
    : seconds < 5400
      ? t("{time} min", { time: Math.round(seconds / 60) })
      : t("{time} h", { time: (seconds / 3600).toFixed(1) });

/** The first [step, loss] of the lowest loss. */
const lowest = (pairs) => pairs.reduce((least, pair) => (pair[1] < least[1] ? pair : least));

/** An exponential average that is right from the first value on. */
function smoothed(values) {
  let sum = 0, weight = 0;
  return values.map((value) => {
    sum = SMOOTHING * sum + (1 - SMOOTHING) * value;
    weight = SMOOTHING * weight + (1 - SMOOTHING);
    return sum / weight;
  });
}

/** Draws the curves; returns the axis' range. */
function paint(canvas, { losses, previous, validation, steps, log, held }) {
  const scale = devicePixelRatio;
  const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale)));
  const height = (canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale)));
  const pen = canvas.getContext("2d");
  const values = losses.concat(previous, validation.map(([, loss]) => loss)).filter((value) => value > 0);
  if (!values.length) return held;
  let low = Infinity, high = 0;
  for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
  const range = held ?? [low, high];
  const [from, to] = log ? range.map(Math.log) : [0, range[1]];
  const y = (value) => height - 4 - (((log ? Math.log(Math.max(value, 1e-12)) : value) - from) / (to - from || 1)) * (height - 8);
  const length = Math.max(steps, losses.length, previous.length, 2) - 1;
  const style = getComputedStyle(canvas);
  const color = (name) => style.getPropertyValue(name).trim();

  // A pixel's column gets one stroke, from its least to its greatest value, however many steps fall on it.
  const curve = (numbers, stroke, alpha, thick) => {
    pen.strokeStyle = stroke;
    pen.globalAlpha = alpha;
    pen.lineWidth = thick * scale;
    pen.beginPath();
    for (let i = 0; i < numbers.length; ) {
      const x = Math.round((i / length) * (width - 1));
      let [least, most] = [numbers[i], numbers[i]];
      for (i++; i < numbers.length && Math.round((i / length) * (width - 1)) === x; i++) {
        least = Math.min(least, numbers[i]);
        most = Math.max(most, numbers[i]);
      }
      pen.lineTo(x, y(most));
      pen.lineTo(x, y(least));
    }
    pen.stroke();
  };
  const muted = color("--descrip-text") || "#999", accent = color("--accent") || "#4a9eff";
  curve(smoothed(previous), muted, 0.6, 1);
  curve(losses, accent, 0.35, 1);
  curve(smoothed(losses), accent, 1, 2);
  pen.globalAlpha = 1;
  if (validation.length) {
    const x = (step) => ((step - 1) / length) * (width - 1);
    const dot = ([step, loss], radius) => {
      pen.beginPath();
      pen.arc(x(step), y(loss), radius * scale, 0, 2 * Math.PI);
      pen.fill();
    };
    pen.strokeStyle = pen.fillStyle = color("--loha-validation") || "#f0a64a";
    pen.lineWidth = 1.5 * scale;
    pen.beginPath();
    for (const [step, loss] of validation) pen.lineTo(x(step), y(loss));
    pen.stroke();
    for (const pair of validation) dot(pair, 1.5);
    dot(lowest(validation), 4);
  }
  pen.fillStyle = muted;
  pen.font = `${10 * scale}px system-ui, sans-serif`;
  const ends = [log ? range[0].toPrecision(3) : "0", range[1].toPrecision(3)];
  pen.fillText(ends[1], 4 * scale, 11 * scale);
  pen.fillText(ends[0], 4 * scale, height - 4 * scale);
  const behind = previous.length ? t(", {number} of the run before", { number: previous.length }) : "";
  const axis = t("axis from {low} to {high}", { low: ends[0], high: ends[1] });
  const second = validation.length ? t(", validated {number} times", { number: validation.length }) : "";
  canvas.setAttribute("aria-label", `${t("Loss of {number} steps", { number: losses.length })}${behind}${second}; ${axis}`);
  return range;
}
