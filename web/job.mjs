// Ending a job, and no other.
import { api } from "../../scripts/api.js";

/**
 * Cancel a job by the id of its prompt, as this ComfyUI can: by name, else whatever runs.
 *
 * @param {string} prompt "" where it is not known
 */
export async function cancelJob(prompt) {
  // ComfyUI 0.33 and later; a job that is over stays over.
  const named = prompt && (await api.fetchApi(`/jobs/${encodeURIComponent(prompt)}/cancel`, { method: "POST" }).catch(() => undefined));
  if (named && named.ok) return;
  await api.interrupt(prompt || null);
}
