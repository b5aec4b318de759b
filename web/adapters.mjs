// Which adapters the server has, and what is in one.
import { api } from "../../scripts/api.js";

/**
 * @typedef {object} Adapters
 * @property {Set<string>} names as the nodes' inputs have them
 * @property {Set<string>} pictured those with a picture beside them
 */

/** @type {Promise<Adapters> | undefined} */
let adapters;

/** All adapters, asked once until `refreshAdapters`. */
export function allAdapters() {
  adapters ??= ask("adapters").then(({ names, pictured }) => ({ names: new Set(names), pictured: new Set(pictured) }));
  adapters.catch(() => (adapters = undefined)); // the next one asks again
  return adapters;
}

/** After "R" in the page; those who show names are told by an event. */
export function refreshAdapters() {
  adapters = undefined;
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
