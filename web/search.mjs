// Finding one of thousands of names by what is typed.
import { split } from "./adapters.mjs";

/** @typedef {{name: string, low: string, stem: number}} Entry in lower case without its suffix; where the stem begins */

/** @returns {Entry} */
export function entryOf(/** @type {string} */ name) {
  const [folder, stem] = split(name);
  const low = name.slice(0, (folder && folder.length + 1) + stem.length).toLowerCase();
  return { name, low, stem: low.length - stem.length };
}

const isLetter = (/** @type {string | undefined} */ sign) => sign !== undefined && /[\p{L}\p{N}]/u.test(sign);
const begins = (/** @type {string} */ low, /** @type {number} */ at) => !isLetter(low[at - 1]);

/**
 * How well a term fits that a name contains: in the stem before in the folder, words' beginnings before their middles,
 * whole words before parts. 0 is not at all.
 */
function contained(/** @type {Entry} */ { low, stem }, /** @type {string} */ term) {
  let best = 0;
  for (let at = low.indexOf(term); at >= 0; at = low.indexOf(term, at + 1)) {
    const whole = !isLetter(low[at + term.length]);
    best = Math.max(best, 1 + (at >= stem ? 4 : 0) + (begins(low, at) ? 2 + Number(whole) : 0));
  }
  return best;
}

/** Whether a term is made of beginnings of a name's words, in order: "anv2" of "anna_v2". */
function abbreviates(/** @type {Entry} */ { low }, /** @type {string} */ term) {
  /** @type {number[]} */
  let ends = []; // where the letters so far may end
  for (const [number, letter] of [...term].entries()) {
    const first = number ? ends[0] : -1;
    const next = [];
    for (let at = low.indexOf(letter, first + 1); at >= 0; at = low.indexOf(letter, at + 1)) {
      if (begins(low, at) || ends.includes(at - 1)) next.push(at);
    }
    if (!next.length) return false;
    ends = next;
  }
  return true;
}

/**
 * Names in which all terms are, in any order; only where there are none, those that the terms abbreviate.
 *
 * @param {Entry[]} entries those that come first win between equals
 * @param {string} typed terms by spaces
 * @returns {string[]} best first; as they come if nothing is typed
 */
export function search(entries, typed) {
  const terms = typed.toLowerCase().split(/\s+/).filter(Boolean);
  if (!terms.length) return entries.map(({ name }) => name);
  /** @type {[number, Entry][]} */
  const found = [];
  for (const entry of entries) {
    let sum = 0;
    const every = terms.every((term) => {
      const score = contained(entry, term);
      sum += score;
      return score;
    });
    if (every) found.push([sum - (entry.low.length - entry.stem) * 0.01, entry]);
  }
  if (!found.length) return entries.filter((entry) => terms.every((term) => abbreviates(entry, term))).map(({ name }) => name);
  return found.sort(([a], [b]) => b - a).map(([, { name }]) => name);
}

/** All folders that names lie in, the parents too. */
export function foldersOf(/** @type {Iterable<string>} */ names) {
  const folders = new Set();
  for (const name of names) {
    for (let [at] = split(name); at && !folders.has(at); [at] = split(at)) folders.add(at);
  }
  return [...folders].sort();
}

/** Whether a name lies in a folder or below it. */
export const isIn = (/** @type {string} */ name, /** @type {string} */ folder) =>
  name.startsWith(folder) && /^[\\/]/.test(name.slice(folder.length));
