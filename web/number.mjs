// A strength as a field: typed, dragged sideways, or stepped by the arrow keys.
import { el, onDrag } from "./dom.mjs";
import { t } from "./words.mjs";

export const STEP = 0.05, FINE = 0.01;
// What the nodes take.
export const MIN = -20, MAX = 20;

/** @param {number} value */
export const text = (value) => String(Number(value.toFixed(4)));

/** @param {number} value @param {number} step @returns {number} the nearest multiple, without 0.30000000000000004 */
export const snap = (value, step) => Number((Math.round(value / step) * step).toFixed(4));

/** @param {number} value */
export const clamp = (value, low = MIN, high = MAX) => Math.min(high, Math.max(low, value));

/**
 * @param {any} found
 * @returns {number | undefined}
 */
export function parse(found) {
  if (typeof found === "string") found = found.trim().replace(",", ".") || NaN;
  const value = found === null || typeof found === "boolean" ? NaN : Number(found);
  return Number.isFinite(value) ? value : undefined;
}

/**
 * The value that a key leads to; undefined if it is none of ours.
 *
 * @param {KeyboardEvent} event
 * @param {number} value
 */
export function stepped(event, value) {
  const up = { ArrowUp: 1, ArrowRight: 1, PageUp: 10, ArrowDown: -1, ArrowLeft: -1, PageDown: -10 }[event.key];
  if (up === undefined) return undefined;
  const step = event.shiftKey ? FINE : STEP;
  return clamp(snap(value + up * step, step));
}

/**
 * @param {string} label for screen readers and as a tooltip
 * @param {(value: number) => void} change while it changes
 * @param {() => void} done
 * @returns {{element: HTMLInputElement, show(value: number): void}}
 */
export function numberField(label, change, done) {
  let value = 1;
  const element = el("input.loha-number", {
    type: "text",
    inputMode: "decimal",
    role: "spinbutton",
    "aria-label": label,
    title: t("{label}: drag sideways (Shift: fine), click to type, double-click for 1", { label }),
  });
  const show = (next) => {
    value = next;
    if (document.activeElement !== element) element.value = text(value);
    element.setAttribute("aria-valuenow", text(value));
  };
  const put = (next) => {
    if (next !== value) change(next);
    show(next);
    element.value = text(next);
  };
  const leave = () => {
    const typed = parse(element.value);
    const changed = typed !== undefined && clamp(typed) !== value;
    put(typed === undefined ? value : clamp(typed));
    if (changed) done();
  };

  onDrag(element, (event) => {
    if (document.activeElement === element) return undefined; // a click into the text being typed
    event.preventDefault(); // no focus before it is known to be a click
    let x = event.clientX, raw = value, moved = 0;
    return {
      move(e) {
        moved += Math.abs(e.clientX - x);
        raw += (e.clientX - x) * (e.shiftKey ? 0.002 : 0.01);
        x = e.clientX;
        if (moved > 3) put(clamp(snap(raw, e.shiftKey ? FINE : STEP)));
      },
      end() {
        if (moved > 3) return done();
        element.focus();
        element.select();
      },
    };
  });
  element.addEventListener("dblclick", () => {
    put(1);
    element.blur();
    done();
  });
  element.addEventListener("blur", leave);
  element.addEventListener("keydown", (event) => {
    const up = event.key === "ArrowUp" || event.key === "ArrowDown" ? stepped(event, parse(element.value) ?? value) : undefined;
    if (up !== undefined) {
      event.preventDefault();
      put(up);
      done();
    } else if (event.key === "Enter") element.blur();
    else if (event.key === "Escape") {
      element.value = text(value);
      element.blur();
    }
  });
  show(value);
  return { element, show };
}
