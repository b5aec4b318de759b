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
  const begins = (at) => !/[a-z0-9]/.test(low[at - 1] ?? " ");
  let score = 0, at = -1;
  for (const letter of typed.toLowerCase().replace(/\s+/g, "")) {
    const places = [...low].flatMap((found, place) => (found === letter && place > at ? [place] : []));
    if (!places.length) return undefined;
    // On from where the last letter was, else at the beginning of a word, else the first.
    const next = places[0] === at + 1 ? places[0] : (places.find(begins) ?? places[0]);
    score += (next === at + 1 ? 2 : 0) + (begins(next) ? 3 : 0) - (next - at) * 0.02;
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
    .map((name) => [fit(typed, name), name])
    .filter(([score]) => score !== undefined)
    .sort((a, b) => Number(b[0]) - Number(a[0]))
    .map(([, name]) => name);
}
