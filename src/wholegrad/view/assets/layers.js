// The panel's layers: shown or not, how strongly, as areas or outlines, which classes, from which probability on.
import { el } from "./net.js";

const BITS = 32; // classes that can be hidden
const START = { truth: 0.45, prediction: 0.45, probability: 0.6, error: 0.6 };

export class Layers {
  constructor(scene, slide) {
    this.scene = scene;
    this.slide = slide;
    this.threshold = scene.threshold;
    this.touched = false; // whether someone chose what to see
    this.changed = new EventTarget();
    this.states = new Map();
    this.list();
    this.last = [...this.states.values()].find((state) => state.on)?.layer.key;
    slide.show("slide", 1);
    for (const key of this.states.keys()) this.apply(key);
  }

  // Rows for the scene's layers; those that were there before stay as they are, the first of all is shown.
  list() {
    const before = this.states;
    this.states = new Map();
    const over = this.scene.layers.filter((layer) => layer.key !== "slide");
    const first = ["error", "prediction", "truth", "probability"].find((key) => over.some((layer) => layer.key === key));
    document.getElementById("no-layers").hidden = over.length > 0;
    for (const layer of over) {
      const known = before.get(layer.key);
      const fresh = { on: layer.key === first && !this.touched, opacity: START[layer.key], line: false, hidden: 0 };
      this.states.set(layer.key, { ...(known || fresh), layer });
    }
    const rows = [...this.states.values()].reverse().map(({ layer }) => this.row(layer)); // topmost first
    document.getElementById("layers").replaceChildren(...rows);
  }

  // The scene has another prediction, perhaps its first.
  renew(scene) {
    const had = new Set(this.states.keys());
    this.scene = scene;
    this.list();
    if (!this.touched && !had.has("error") && this.states.has("error")) this.states.get("truth").on = false; // its errors tell more
    for (const key of this.states.keys()) this.apply(key);
  }

  row(layer) {
    const key = layer.key;
    const state = this.states.get(key);
    state.box = el("input", { type: "checkbox", class: "switch", role: "switch", id: `on-${key}`, onchange: () => this.set(key, { on: state.box.checked }) });
    state.range = el("input", { type: "range", min: 5, max: 100, "aria-label": `Opacity of ${layer.title.toLowerCase()}`, oninput: () => this.set(key, { opacity: state.range.value / 100 }) });
    state.row = el("div", { class: "layer", "data-layer": key },
      el("div", { class: "head" }, state.box, el("label", { class: "name", for: `on-${key}`, text: layer.title }), state.range,
        el("span", { class: "file", title: layer.file, text: layer.file })));
    const more = el("div", { class: "more" });
    if (layer.looks.includes("line")) {
      state.picks = ["Areas", "Outlines"].map((text, line) => el("button", { type: "button", text, onclick: () => this.set(key, { line: line === 1 }) }));
      more.append(el("span", { class: "pick", role: "group", "aria-label": `How ${layer.title.toLowerCase()} is drawn` }, ...state.picks));
    }
    state.keys = (layer.legend || []).filter(({ bit }) => bit <= BITS).map(({ bit, name, colour }) => {
      const swatch = el("i");
      swatch.style.setProperty("--colour", colour);
      const button = el("button", { type: "button", class: "key", title: `Hide or show ${name.toLowerCase()}`, onclick: () => this.set(key, { hidden: (state.hidden ^ (1 << (bit - 1))) >>> 0 }) }, swatch, name);
      more.append(button);
      return { bit, button };
    });
    if (layer.channels) more.append(this.channels(layer, state));
    if (layer.scale) more.append(this.ramp(layer));
    if (layer.looks.includes("threshold") && key === "prediction") more.append(this.slider());
    if (more.children.length) state.row.append(more);
    return state.row;
  }

  channels(layer, state) { // of which class the probability is
    state.channel ??= layer.channel;
    state.choice = el("select", { "aria-label": "Class whose probability is shown", onchange: () => this.set(layer.key, { channel: Number(state.choice.value) }) },
      ...layer.channels.map((name, number) => el("option", { value: number, text: name })));
    return state.choice;
  }

  ramp(layer) {
    const strip = el("canvas", { width: 256, height: 1, role: "img", "aria-label": "Colours from probability 0 to 1" });
    const draw = strip.getContext("2d");
    const fill = draw.createLinearGradient(0, 0, 256, 0);
    layer.scale.forEach((colour, i) => fill.addColorStop(i / (layer.scale.length - 1), colour));
    draw.fillStyle = fill;
    draw.fillRect(0, 0, 256, 1);
    return el("div", { class: "ramp" }, strip, el("div", { class: "ends" }, el("span", { text: "0" }), el("span", { text: "probability" }), el("span", { text: "1" })));
  }

  slider() {
    this.said = el("output");
    this.range = el("input", { type: "range", id: "threshold", min: 1, max: 255, step: 1, value: this.threshold });
    let soon;
    this.range.addEventListener("input", () => {
      this.sayThreshold(Number(this.range.value));
      clearTimeout(soon);
      soon = setTimeout(() => this.setThreshold(Number(this.range.value)), 160);
    });
    return el("div", { class: "threshold" }, el("label", { for: "threshold", text: "Threshold" }), this.range, this.said);
  }

  sayThreshold(value) {
    if (!this.range) return;
    this.range.value = value;
    this.range.style.setProperty("--at", `${(value - 1) / 2.54}%`);
    this.said.textContent = (value / 255).toFixed(2);
  }

  setThreshold(value) {
    if (value === this.threshold) return;
    this.threshold = value;
    for (const [key, state] of this.states) if (state.layer.looks.includes("threshold")) this.apply(key);
    this.changed.dispatchEvent(new Event("threshold"));
  }

  set(key, change) {
    const state = this.states.get(key);
    if (!state) return;
    this.touched = true;
    Object.assign(state, change);
    this.last = key;
    this.apply(key);
  }

  toggle(key) {
    const state = this.states.get(key);
    if (!state) return null;
    this.set(key, { on: !state.on });
    return `${state.layer.title} ${state.on ? "on" : "off"}`;
  }

  outline() {
    const able = [...this.states].filter(([, state]) => state.layer.looks.includes("line"));
    if (!able.length) return null;
    const line = !able.every(([, state]) => state.line);
    for (const [key] of able) this.set(key, { line });
    return line ? "Outlines" : "Areas";
  }

  fade(by) {
    const state = this.states.get(this.last);
    if (!state) return null;
    this.set(this.last, { on: true, opacity: Math.min(1, Math.max(0.05, Math.round((state.opacity + by) * 20) / 20)) });
    return `${state.layer.title} ${Math.round(100 * state.opacity)} %`;
  }

  query(state) {
    const parts = [];
    if (state.line) parts.push("line=1");
    if (state.hidden) parts.push(`hide=${state.hidden}`);
    if (state.layer.looks.includes("threshold") && this.threshold !== this.scene.threshold) parts.push(`t=${this.threshold}`);
    if (state.layer.channels && state.channel !== state.layer.channel) parts.push(`c=${state.channel}`);
    if (this.scene.version && ["prediction", "error"].includes(state.layer.key)) parts.push(`v=${this.scene.version}`);
    return parts.join("&");
  }

  // What tells an address that asks for one pixel how the layers are looked at.
  pointed() {
    const parts = this.threshold === this.scene.threshold ? [] : [`t=${this.threshold}`];
    const chosen = this.states.get("probability");
    if (chosen?.layer.channels && chosen.channel !== chosen.layer.channel) parts.push(`c=${chosen.channel}`);
    return parts.length ? `?${parts.join("&")}` : "";
  }

  apply(key) {
    const state = this.states.get(key);
    state.box.checked = state.on;
    state.row.classList.toggle("off", !state.on);
    state.range.value = Math.round(100 * state.opacity);
    state.range.style.setProperty("--at", `${(100 * state.opacity - 5) / 0.95}%`);
    if (state.choice) state.choice.value = state.channel;
    state.picks?.forEach((button, line) => button.setAttribute("aria-pressed", String(state.line === (line === 1))));
    state.keys.forEach(({ bit, button }) => button.setAttribute("aria-pressed", String(!(state.hidden >> (bit - 1) & 1))));
    this.sayThreshold(this.threshold);
    const strength = state.line ? Math.min(1, 2 * state.opacity) : state.opacity; // lines are thin
    this.slide.show(key, state.on ? strength : 0, this.query(state));
    this.changed.dispatchEvent(new Event("change"));
  }

  // For links: "truth.45.line,error.60.hide1", with what is off left out.
  toText() {
    const on = [...this.states.values()].filter((state) => state.on);
    return on.map(({ layer, opacity, line, hidden, channel }) => [layer.key, Math.round(100 * opacity), ...(line ? ["line"] : []), ...(hidden ? [`hide${hidden}`] : []),
      ...(layer.channels && channel !== layer.channel ? [`c${channel}`] : [])].join(".")).join(",");
  }

  fromText(text) {
    this.touched = true;
    const given = new Map(text.split(",").filter(Boolean).map((part) => { const [key, ...rest] = part.split("."); return [key, rest]; }));
    for (const [key, state] of this.states) {
      const [opacity, ...looks] = given.get(key) || [];
      const hidden = looks.find((look) => /^hide\d+$/.test(look));
      Object.assign(state, { on: given.has(key), line: looks.includes("line") && state.layer.looks.includes("line"), hidden: hidden ? Number(hidden.slice(4)) >>> 0 : 0 });
      const channel = Number(looks.find((look) => /^c\d+$/.test(look))?.slice(1));
      if (state.layer.channels) state.channel = channel < state.layer.channels.length ? channel : state.layer.channel;
      if (Number(opacity) >= 5 && Number(opacity) <= 100) state.opacity = Number(opacity) / 100;
      this.apply(key);
    }
  }
}
