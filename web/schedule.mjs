// Schedule: the curve over the progress of sampling, with keyframes to add, drag and remove.
import { parseFrames, strengthAt, writeFrames } from "./curve.mjs";
import { el, onDrag } from "./dom.mjs";
import { after, committed, valueOf } from "./host.mjs";
import { FINE, STEP, clamp, snap, text } from "./number.mjs";
import { t } from "./words.mjs";

/** @typedef {import("./curve.mjs").Frame} Frame */

const SAMPLES = 200;
const STEP_X = 0.01, FINE_X = 0.001;
const SVG = "http://www.w3.org/2000/svg";

/**
 * Fill a widget.
 *
 * @param {any} node
 * @param {import("./host.mjs").Hosted<string>} hosted
 * @param {HTMLElement} element
 * @returns {(value: string) => void} to show a value from outside
 */
export function fill(node, hosted, element) {
  /** @type {Frame[]} */
  let frames = [];
  let low = 0, high = 1.5; // of the plot; they stay while a keyframe is dragged
  /** @type {Map<Frame, HTMLElement>} */
  const handles = new Map();

  const line = document.createElementNS(SVG, "path");
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", "0 0 100 100");
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.append(line);
  const axis = [0, 1].map((value) => el("div.loha-level", {}, el("span", { textContent: String(value) })));
  const shades = [el("div.loha-shade"), el("div.loha-shade")];
  const plot = el("div.loha-plot", { title: t("Press to add a keyframe, drag it; double-click or Delete removes it. Shift: fine.") }, ...axis, drawing, ...shades);
  const scale = el("div.loha-scale", {}, ...["0 %", "25 %", "50 %", "75 %", "100 %"].map((label) => el("span", { textContent: label })));
  const area = el("textarea.loha-text", { rows: 2, spellcheck: false, "aria-label": t("keyframes"), placeholder: "0: 0, 0.5: 1, 1: 0.3", oninput: typed, onchange: committed });
  const error = el("div.loha-error", { role: "status" });
  element.classList.add("loha-schedule");
  element.append(plot, scale, area, error);
  // The server's words, where there are some, in place of ours.
  node.lohaSays = (/** @type {string} */ text) => (error.textContent = error.title = text);

  function load(value) {
    if (area.value !== value) area.value = value;
    const found = parseFrames(value);
    error.textContent = found ? "" : t("expected progress: strength pairs, such as 0: 0, 0.5: 1");
    if (found) frames = found;
    rescale();
    draw();
  }
  function typed() {
    hosted.set(area.value);
    load(area.value);
  }
  /** The frames have been changed here. */
  function write() {
    frames.sort((a, b) => a.x - b.x);
    area.value = writeFrames(frames, hosted.get());
    error.textContent = "";
    hosted.set(area.value);
    draw();
  }
  function rescale() {
    const values = frames.map((frame) => frame.y);
    low = Math.floor(Math.min(0, ...values) * 2) / 2;
    high = Math.max(1.5, Math.ceil(Math.max(0, ...values) * 2) / 2);
  }
  const toY = (value) => 100 - ((value - low) / (high - low)) * 100;

  function draw() {
    const interpolation = valueOf(node, "interpolation") ?? "linear";
    const start = Number(valueOf(node, "start_percent") ?? 0), end = Number(valueOf(node, "end_percent") ?? 1);
    // A jump needs both of its sides.
    const places = [...Array(SAMPLES + 1).keys()].map((i) => i / SAMPLES).concat(frames.flatMap(({ x }) => [Math.max(0, x - 1e-6), x]));
    const points = places.sort((a, b) => a - b).map((x) => `${(x * 100).toFixed(3)} ${toY(strengthAt(frames, interpolation, x)).toFixed(2)}`);
    line.setAttribute("d", `M${points.join("L")}`);
    axis.forEach((level, value) => (level.style.top = `${toY(value)}%`));
    Object.assign(shades[0].style, { left: "0", width: `${clamp(start, 0, 1) * 100}%` });
    Object.assign(shades[1].style, { left: `${clamp(end, 0, 1) * 100}%`, right: "0" });

    for (const [frame, handle] of handles) if (!frames.includes(frame)) (handle.remove(), handles.delete(frame));
    for (const frame of frames) {
      const handle = handles.get(frame) ?? newHandle(frame);
      Object.assign(handle.style, { left: `${frame.x * 100}%`, top: `${clamp(toY(frame.y), 0, 100)}%` });
      handle.title = `${text(frame.x * 100)} %: ${text(frame.y)}`;
      handle.setAttribute("aria-label", t("keyframe at {percent} %", { percent: text(frame.x * 100) }));
      handle.setAttribute("aria-valuenow", text(frame.y));
    }
  }

  function newHandle(frame) {
    const handle = el("div.loha-keyframe", { role: "slider", tabIndex: 0, "aria-valuemin": "-20", "aria-valuemax": "20", onkeydown: (event) => key(event, frame) });
    handles.set(frame, handle);
    plot.append(handle);
    return handle;
  }

  /** A change is complete: the plot fits again, and the tab key goes through the keyframes in order. */
  function settle() {
    rescale();
    draw();
    const ordered = frames.map((frame) => handles.get(frame));
    // Not without need: an element that moves gets no click.
    if ([...plot.querySelectorAll(".loha-keyframe")].some((handle, index) => handle !== ordered[index])) {
      const focused = document.activeElement;
      plot.append(...ordered);
      if (plot.contains(focused)) focused.focus();
    }
    committed();
  }

  function key(event, frame) {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key] ?? [0, 0];
    const at = frames.indexOf(frame);
    if (event.key === "Delete" || event.key === "Backspace") {
      frames.splice(at, 1);
      write();
      handles.get(frames[Math.min(at, frames.length - 1)])?.focus();
    } else if (event.key === "Insert" || event.key === "Enter") {
      const next = { x: (frame.x + (frames[at + 1]?.x ?? 1)) / 2, y: frame.y };
      frames.push(next);
      write();
      handles.get(next)?.focus();
    } else if (dx || dy) {
      frame.x = clamp(snap(frame.x + dx * (event.shiftKey ? FINE_X : STEP_X), FINE_X), 0, 1);
      frame.y = clamp(snap(frame.y + dy * (event.shiftKey ? FINE : STEP), FINE));
      write();
    } else return;
    event.preventDefault();
    settle();
  }

  let added = 0; // when; the second press of the double-click that added a keyframe must not remove it
  onDrag(plot, (event) => {
    const box = plot.getBoundingClientRect();
    const at = (e) => ({
      x: clamp(snap((e.clientX - box.left) / box.width, e.shiftKey ? FINE_X : STEP_X), 0, 1),
      y: clamp(snap(high - ((e.clientY - box.top) / box.height) * (high - low), e.shiftKey ? FINE : STEP)),
    });
    let frame = frames.find((found) => handles.get(found) === event.target);
    if (!frame) {
      frame = at(event);
      frames.push(frame);
      added = event.timeStamp;
      write();
    }
    event.preventDefault(); // the focus goes to the keyframe
    handles.get(frame)?.focus();
    return {
      move(e) {
        Object.assign(frame, at(e));
        write();
      },
      end: settle,
    };
  });
  plot.addEventListener("dblclick", (event) => {
    const frame = frames.find((found) => handles.get(found) === document.activeElement);
    if (!frame || event.timeStamp - added < 600) return;
    frames.splice(frames.indexOf(frame), 1);
    write();
    settle();
  });

  for (const other of ["interpolation", "start_percent", "end_percent"]) {
    after(node.widgets.find((widget) => widget.name === other), "callback", draw);
  }
  after(node, "onConfigure", draw);
  load(hosted.get());
  return load;
}
