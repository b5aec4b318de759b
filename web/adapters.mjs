// Which adapters the server has, what is in one, and finding one by a few letters.
import { api } from "../../scripts/api.js";

/** @type {Promise<Set<string>> | undefined} */
let names;

/** The names of all adapters, asked once until `refreshNames`. */
export function adapterNames() {
  names ??= ask("adapters").then((answer) => new Set(answer.names));
  names.catch(() => (names = undefined)); // the next one asks again
  return names;
}

/** After "R" in the page; those who show names are told by an event. */
export function refreshNames() {
  names = undefined;
  window.dispatchEvent(new Event("loha-adapters"));
}

/**
 * GET one of our routes.
 *
 * @param {string} path
 * @param {Record<string, string>} [query]
 * @returns {Promise<any>}
 * @throws {Error} with the server's reason
 */
export async function ask(path, query = {}) {
  const response = await api.fetchApi(`/loha/${path}?${new URLSearchParams(query)}`);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
  return answer;
}

export const pictureOf = (/** @type {string} */ name) => api.apiURL(`/loha/preview?${new URLSearchParams({ name })}`);

/** "a/b/c.safetensors" -> ["a/b", "c"]; Windows' servers write "\". */
export function split(/** @type {string} */ name) {
  const at = Math.max(name.lastIndexOf("/"), name.lastIndexOf("\\"));
  return [name.slice(0, Math.max(at, 0)), name.slice(at + 1).replace(/\.(safetensors|sft)$/i, "")];
}

/**
 * How well letters typed in order fit a name; more is better, undefined is not at all. Runs of letters and the
 * beginnings of words count more, late starts and long names less.
 *
 * @param {string} typed
 * @param {string} name
 * @returns {number | undefined}
 */
export function fit(typed, name) {
  const low = name.toLowerCase();
  let score = 0, at = -1, run = 0;
  for (const letter of typed.toLowerCase().replace(/\s+/g, "")) {
    // Prefer to go on where the last letter was, then the beginning of a word, then anywhere.
    let next = low[at + 1] === letter ? at + 1 : -1;
    for (let i = at + 1; next < 0 && i < low.length; i++) if (low[i] === letter && /[^a-z0-9]/.test(low[i - 1] ?? " ")) next = i;
    if (next < 0 || low.indexOf(letter, at + 1) < 0) next = low.indexOf(letter, at + 1);
    if (next < 0) return undefined;
    run = next === at + 1 ? run + 1 : 1;
    score += run * 2 + (/[^a-z0-9]/.test(low[next - 1] ?? " ") ? 3 : 0) - (next - at) * 0.02;
    at = next;
  }
  return score - name.length * 0.01;
}

/**
 * @param {Iterable<string>} all
 * @param {string} typed
 * @param {string} folder only in here and below; "" is everywhere
 * @returns {string[]} best first; as they come if nothing is typed
 */
export function find(all, typed, folder) {
  const inside = [...all].filter((name) => !folder || split(name)[0] === folder || /^[\\/]/.test(name.slice(folder.length)) && name.startsWith(folder));
  if (!typed.trim()) return inside;
  return inside
    .map((name) => /** @type {const} */ ([fit(typed, name), name]))
    .filter(([score]) => score !== undefined)
    .sort((a, b) => Number(b[0]) - Number(a[0]))
    .map(([, name]) => name);
}
