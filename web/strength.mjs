// Strength: a slider, a field that goes beyond it, and a link between the model's and the text encoders'.
import { el, onDrag } from "./dom.mjs";
import { after, committed, host, setValue } from "./host.mjs";
import { FINE, MAX, MIN, STEP, clamp, numberField, parse, snap, stepped, text } from "./number.mjs";
import { t } from "./words.mjs";

// What the slider spans; the field takes the rest.
const LOW = -2, HIGH = 2;
const NAMES = ["strength_model", "strength_clip"];
const LINKED = "loha_linked_strengths";

/** @param {number} value @returns {number} its place on the slider, in percent */
const place = (value) => ((clamp(value, LOW, HIGH) - LOW) / (HIGH - LOW)) * 100;

/**
 * @param {any} node
 * @param {string} name
 * @param {any} spec
 */
export function strengthWidget(node, name, spec) {
  const partner = NAMES.find((other) => other !== name) ?? "";
  const what = name === "strength_clip" ? t("clip strength") : t("model strength");
  const fill = el("div.loha-fill");
  const thumb = el("div.loha-thumb");
  const label = el("span.loha-label");
  /** Where the track is narrow, its first word alone, which ends before the fill begins. */
  const call = (/** @type {string} */ name) => {
    const [word, ...rest] = name.split(" ");
    label.replaceChildren(word, el("span", { textContent: rest.map((other) => ` ${other}`).join("") }));
  };
  call(what);
  const track = el(
    "div.loha-track",
    {
      role: "slider",
      tabIndex: 0,
      "aria-label": what,
      "aria-valuemin": String(LOW),
      "aria-valuemax": String(HIGH),
      title: `${spec[1]?.tooltip ?? ""}\n${t("Drag, Shift for fine steps; double-click for 1; arrow keys.")}`,
    },
    el("div.loha-tick", { style: `left:${place(0)}%` }),
    el("div.loha-tick", { style: `left:${place(1)}%` }),
    fill,
    thumb,
    label,
  );
  const field = numberField(what, (value) => change(value), committed);
  const link = el("button.loha-icon.loha-link", {
    type: "button",
    title: t("Link: model and clip strength move together"),
    "aria-label": t("link model and clip strength"),
    onclick() {
      node.properties[LINKED] = !node.properties[LINKED];
      if (node.properties[LINKED]) setValue(node, partner, hosted.get());
      showLink();
      committed();
    },
  }, el("i.pi.pi-link"));
  const showLink = () => link.setAttribute("aria-pressed", String(Boolean(node.properties[LINKED])));
  const lead = name === NAMES[0] ? link : el("span.loha-icon", { textContent: "" });

  const hosted = host(node, name, el("div.loha-strength", {}, lead, track, field.element), {
    value: parse(spec[1]?.default) ?? 1,
    read: (found) => clamp(parse(found) ?? 1),
    height: () => 26,
    show,
    rename: (name = what) => call(name),
    field: { type: "number", options: { min: MIN, max: MAX, step: 10 * STEP, step2: STEP, precision: 2 } },
  });
  function show(value) {
    const [from, to] = [place(Math.min(0, value)), place(Math.max(0, value))];
    Object.assign(fill.style, { left: `${from}%`, width: `${to - from}%` });
    fill.classList.toggle("negative", value < 0);
    thumb.style.left = `${place(value)}%`;
    track.classList.toggle("beyond", value < LOW || value > HIGH);
    track.setAttribute("aria-valuenow", text(value));
    field.show(value);
  }
  /** As by the user: the partner follows. */
  const change = (value) => {
    hosted.set(value);
    show(value);
    if (node.properties[LINKED]) setValue(node, partner, value);
  };

  onDrag(track, (event) => {
    const box = track.getBoundingClientRect();
    const unit = (HIGH - LOW) / box.width;
    let x = event.clientX;
    // A fine drag starts from the value as it is, a plain one from where the track was pressed.
    let raw = event.shiftKey ? hosted.get() : LOW + (x - box.left) * unit;
    const put = (e) => {
      raw = clamp(raw, LOW, HIGH);
      change(snap(raw, e.shiftKey ? FINE : STEP));
    };
    track.focus();
    if (!event.shiftKey) put(event);
    return {
      move(e) {
        raw += (e.clientX - x) * unit * (e.shiftKey ? 0.2 : 1);
        x = e.clientX;
        put(e);
      },
      end: committed,
    };
  });
  track.addEventListener("dblclick", () => {
    change(1);
    committed();
  });
  track.addEventListener("keydown", (event) => {
    const value = event.key === "Home" ? 0 : event.key === "End" ? 1 : stepped(event, hosted.get());
    if (value === undefined) return;
    event.preventDefault();
    change(value);
    committed();
  });
  after(node, "onConfigure", showLink);
  showLink();
  show(hosted.get());
  return { widget: hosted.widget, minWidth: 270 };
}
