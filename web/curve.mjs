// Keyframes and the curve through them; the same rules as loha_core.schedule, which has the last word.

/** @typedef {{x: number, y: number}} Frame progress 0…1 -> strength */

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/**
 * @param {string} text "0: 0, 50%: 1" or lines
 * @returns {Frame[] | undefined} by progress; undefined if it cannot be understood
 */
export function parseFrames(text) {
  const entries = text
    .split("\n")
    .filter((line) => !line.trimStart().startsWith("#"))
    .flatMap((line) => line.split(/[,;]/))
    .map((entry) => entry.trim())
    .filter(Boolean);
  const frames = [];
  for (const entry of entries) {
    const [place, value, ...rest] = entry.split(":").map((half) => half.trim());
    const percent = place.endsWith("%");
    const digits = percent ? place.slice(0, -1).trim() : place;
    if (rest.length || !NUMBER.test(digits) || !NUMBER.test(value ?? "")) return undefined;
    const frame = { x: Number(digits) / (percent ? 100 : 1), y: Number(value) };
    if (!(frame.x >= 0 && frame.x <= 1) || !Number.isFinite(frame.y)) return undefined;
    frames.push(frame);
  }
  return frames.sort((a, b) => a.x - b.x);
}

const short = (/** @type {number} */ value) => String(Number(value.toFixed(4)));

/**
 * @param {Frame[]} frames
 * @param {string} before the text until now; its lines of comments stay
 */
export function writeFrames(frames, before) {
  const comments = before.split("\n").filter((line) => line.trimStart().startsWith("#"));
  const pairs = [...frames].sort((a, b) => a.x - b.x).map(({ x, y }) => `${short(x)}: ${short(y)}`);
  return [...comments, pairs.join(", ")].join("\n");
}

/**
 * The strength at a progress.
 *
 * @param {Frame[]} frames by progress
 * @param {string} interpolation "linear", "smooth" or "step"
 * @param {number} x
 */
export function strengthAt(frames, interpolation, x) {
  if (!frames.length) return 1;
  const after = frames.findIndex((frame) => frame.x > x);
  if (after === 0) return frames[0].y;
  if (after < 0) return frames[frames.length - 1].y;
  const [a, b] = [frames[after - 1], frames[after]];
  if (interpolation === "step") return a.y;
  let share = (x - a.x) / (b.x - a.x);
  if (interpolation === "smooth") share = share * share * (3 - 2 * share);
  return a.y * (1 - share) + b.y * share;
}
