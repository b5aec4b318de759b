// An adapter's file: what is chosen, the chooser, and what is in it. The value is the name, as of a plain combo.
import { allAdapters, split } from "./adapters.mjs";
import { el } from "./dom.mjs";
import { after, committed, host } from "./host.mjs";
import { t } from "./words.mjs";

// Loaded when it is first needed, at the latest when something of ours has the focus or the pointer.
const chooser = () => import("./chooser.mjs");

/**
 * @param {any} node
 * @param {string} name
 * @param {any} spec
 */
export function fileWidget(node, name, spec) {
  /** @type {Set<string> | undefined} */
  let known;

  const label = el("small", { hidden: true });
  const stem = el("span");
  const folder = el("small");
  const pick = el("button.loha-button", {
    type: "button",
    onclick: () => open(),
    onkeydown(event) {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (by) {
        const names = [...(known ?? [])];
        const next = names[names.indexOf(hosted.get()) + by];
        if (next) put(next);
      } else if (event.key.length === 1 && (event.key !== " " || opening !== undefined) && !event.ctrlKey && !event.metaKey && !event.altKey) open(event.key);
      else return;
      event.preventDefault();
    },
  }, label, stem, folder, el("i.pi.pi-chevron-down"));
  const about = el("button.loha-icon", {
    type: "button",
    onclick: async () => (await chooser()).showInfo(about, hosted.get()),
  }, el("i.pi.pi-info-circle"));
  const element = el("div.loha-file", { onpointerenter: chooser, onfocusin: chooser }, pick, about);

  const hosted = host(node, name, element, {
    value: spec[1]?.default ?? spec[1]?.options?.[0] ?? "",
    read: (found) => String(found ?? ""),
    height: () => 26,
    show,
    rename(given = "") {
      label.textContent = given;
      label.hidden = !given;
    },
    field: { type: "combo", options: { get values() { return [...(known ?? [])]; } } },
  });

  /** @type {string | undefined} */
  let opening; // what is typed until the chooser is there
  async function open(typed = "") {
    if (opening !== undefined) return void (opening += typed);
    opening = typed;
    const { chooseAdapters } = await chooser();
    chooseAdapters(pick, { current: hosted.get(), typed: opening, chosen: ([found]) => put(found) });
    opening = undefined;
  }

  function put(/** @type {string} */ value) {
    hosted.set(value);
    show(value);
    committed();
  }

  function show(/** @type {string} */ value) {
    const [inside, own] = split(value);
    const missing = Boolean(known && !known.has(value));
    stem.textContent = own || (missing && !known.size ? t("no adapter in models/loras") : t("Choose an adapter"));
    folder.textContent = inside;
    element.classList.toggle("missing", missing && Boolean(value));
    pick.title = missing && value ? t("{name}: not in models/loras. Click to choose another.", { name: value }) : value;
    if (missing && !known.size) pick.title = t("Put adapters into ComfyUI's folder models/loras, then press R.");
    pick.setAttribute("aria-label", `${t("adapter")}: ${stem.textContent}`);
    const title = t("About {name}", { name: own });
    about.title = title;
    about.setAttribute("aria-label", title);
    about.hidden = !value;
  }

  const learn = () => allAdapters().then(({ names }) => ((known = names), show(hosted.get())), () => {});
  window.addEventListener("loha-adapters", learn);
  after(node, "onRemoved", () => window.removeEventListener("loha-adapters", learn));
  learn();
  show(hosted.get());
  return { widget: hosted.widget, minWidth: 270 };
}
