// The page's elements: building them, dragging in them, and a dialog. Text goes in as text, never as markup.
import { t } from "./words.mjs";

const sheet = document.createElement("link");
sheet.rel = "stylesheet";
sheet.href = new URL("./loha.css", import.meta.url).href;
document.head.append(sheet);

/**
 * An element with properties (on… are listeners, others that the element lacks become attributes) and children.
 *
 * @param {string} tag "div" or "div.class.other"
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string)} children
 * @returns {any} the element
 */
export function el(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  element.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/**
 * Follow a press of the main button until it ends. Nothing behind the element sees it, so that no node moves.
 *
 * @param {HTMLElement} element
 * @param {(event: PointerEvent) => ({move(event: PointerEvent): void, end?(event: PointerEvent): void} | undefined)} start
 *   what to do from here on; undefined leaves the press alone
 */
export function onDrag(element, start) {
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    const drag = start(event);
    if (!drag) return;
    element.setPointerCapture(event.pointerId);
    const move = (e) => drag.move(e);
    const end = (e) => {
      element.removeEventListener("pointermove", move);
      for (const type of ["pointerup", "pointercancel"]) element.removeEventListener(type, end);
      drag.end?.(e);
    };
    element.addEventListener("pointermove", move);
    for (const type of ["pointerup", "pointercancel"]) element.addEventListener(type, end);
  });
}

/**
 * A dialog near an element. Escape and a press outside close it; it then leaves the page.
 *
 * @param {string} title
 * @param {HTMLElement} anchor
 * @param {...Node} content
 * @returns {HTMLDialogElement}
 */
export function openDialog(title, anchor, ...content) {
  const close = el("button.loha-icon", { type: "button", textContent: "✕", title: t("Close"), onclick: () => dialog.close() });
  const dialog = el("dialog.loha-dialog", { tabIndex: -1 }, el("header", {}, el("b", { textContent: title }), close), ...content);
  dialog.setAttribute("aria-label", title);
  isolate(dialog);
  dialog.addEventListener("pointerdown", (event) => {
    const box = dialog.getBoundingClientRect();
    const inside = event.clientX >= box.left && event.clientX <= box.right && event.clientY >= box.top && event.clientY <= box.bottom;
    if (event.target === dialog && !inside) dialog.close();
  });
  // ComfyUI's own keys stay out of it, also while nothing in it has the focus.
  const onKey = (event) => {
    if ([...document.querySelectorAll("dialog.loha-dialog[open]")].at(-1) !== dialog) return; // one above has the keys
    if (event.key === "Escape") {
      event.preventDefault(); // else the browser closes the one below, too
      dialog.close();
    } else if (dialog.contains(event.target)) return;
    event.stopPropagation();
  };
  window.addEventListener("keydown", onKey, true);
  dialog.addEventListener("close", () => {
    window.removeEventListener("keydown", onKey, true);
    dialog.remove();
  });
  document.body.append(dialog);
  dialog.showModal();
  const from = anchor.getBoundingClientRect();
  const left = Math.min(from.left, innerWidth - dialog.offsetWidth - 8);
  const top = Math.min(from.bottom + 4, innerHeight - dialog.offsetHeight - 8);
  Object.assign(dialog.style, { left: `${Math.max(8, left)}px`, top: `${Math.max(8, top)}px` });
  return dialog;
}

/**
 * Keep presses and plain keys from what lies behind: the node would move, Delete would remove it. Keys with Ctrl or
 * Meta pass, for undo and run.
 *
 * @param {HTMLElement} element
 */
export function isolate(element) {
  for (const type of ["pointerdown", "pointermove", "pointerup", "mousedown"]) {
    element.addEventListener(type, (event) => {
      const { button, buttons } = event;
      if (button !== 1 && !(buttons & 4)) event.stopPropagation(); // the middle button pans
    });
  }
  element.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
}
