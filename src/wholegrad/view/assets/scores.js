// How good the prediction is, and pictures of the regions where it is worst.
import { el, follow } from "./net.js";

const NAMES = {
  iou: "IoU", precision: "Precision", recall: "Recall", boundary_f1: "Boundary F1", hausdorff95_um: "Hausdorff 95", surface_distance_um: "Surface dist.",
};
const get = (id) => document.getElementById(id);

export function shown(name, value) {
  if (value === null || value === undefined) return "–";
  return name.endsWith("_um") ? `${value < 100 ? value.toFixed(1) : Math.round(value)} µm` : value.toFixed(4);
}

export function area(pixels, mpp) {
  if (!mpp) return `${Math.round(pixels).toLocaleString("en")} px`;
  const mm2 = pixels * mpp * mpp / 1e6;
  return mm2 >= 0.01 ? `${mm2.toFixed(2)} mm²` : `${Math.round(mm2 * 1e6).toLocaleString("en")} µm²`;
}

export class Scores {
  constructor(scene, slide, layers) {
    Object.assign(this, { scene, slide, layers, regions: [], at: -1 });
    layers.changed.addEventListener("threshold", () => { if (this.scene.score) this.ask(); });
    this.renew(scene);
  }

  // The scene as it is now: a run that ended may be scored, one that goes on needs the processor.
  renew(scene) {
    this.scene = scene;
    this.told = scene.run;
    get("scores-part").hidden = !scene.score && !this.recorded();
    get("worst-part").hidden = !scene.score;
    if (scene.score) { this.ask(); return; }
    this.stop?.();
    this.regions = [];
    this.at = -1;
    this.draw({});
  }

  ask() {
    this.stop?.();
    this.regions = [];
    this.at = -1;
    get("worst").replaceChildren();
    get("worst-none").hidden = true;
    const t = this.layers.threshold;
    this.stop = follow(t === this.scene.threshold ? "score.json" : `score.json?t=${t}`, (state) => this.draw(state));
  }

  draw(state) {
    const parts = [];
    if (state.metrics) {
      const { dice, ...rest } = state.metrics;
      parts.push(el("p", { class: "lead" }, el("b", { id: "dice", text: dice.toFixed(4) }), el("span", { text: state.classes.length > 1 ? "Dice, mean of classes" : "Dice" })));
      const waiting = state.state === "running" && this.scene.mpp ? ["boundary_f1", "hausdorff95_um", "surface_distance_um"] : [];
      const names = [...Object.keys(rest), ...waiting.filter((name) => !(name in rest))];
      parts.push(el("dl", { class: "figures" }, ...names.map((name) => el("div", {}, el("dt", { text: NAMES[name] || name }),
        el("dd", {}, name in rest ? shown(name, rest[name]) : el("span", { class: "spinner", role: "img", "aria-label": "being measured" }))))));
      if (state.classes.length > 1) parts.push(classes(state.classes));
      get("scores-of").textContent = `${state.grid[1].toLocaleString("en").replaceAll(",", " ")} × ${state.grid[0].toLocaleString("en").replaceAll(",", " ")} pixels`;
    } else if (state.state === "running") {
      parts.push(el("p", { class: "muted" }, el("span", { class: "spinner" }), "Counting pixels …"));
    }
    if (state.problem) parts.push(el("p", { class: "problem", role: "alert", text: state.problem }));
    const recorded = this.recorded();
    if (recorded) parts.push(el("p", { class: "note", text: recorded }));
    get("scores").replaceChildren(...parts);
    if (state.worst && state.worst !== this.regions && this.regions.length === 0) this.list(state.worst);
  }

  // What the run wrote down of this slide.
  recorded() {
    const told = this.told;
    if (!told) return "";
    if (told.test) return `In ${told.name}: Dice ${told.test.dice.toFixed(4)} as a test slide.`;
    if (told.validation) return `In ${told.name}: Dice ${told.validation.dice.toFixed(4)} as a validation slide, after ${told.validation.step} steps.`;
    if (told.steps) return `In ${told.name}: a training slide, Dice ${told.steps.dice.toFixed(4)} in its last step.`;
    return "";
  }

  list(regions) {
    this.regions = regions;
    get("worst-none").hidden = regions.length > 0;
    const query = this.layers.threshold === this.scene.threshold ? "" : `?t=${this.layers.threshold}`;
    get("worst").replaceChildren(...regions.map((region, i) => {
      const wrong = region.extra + region.missed + region.mixed;
      const kind = region.missed > region.extra ? "missed" : "too much";
      return el("li", {}, el("button", { type: "button", onclick: () => this.go(i), title: `${area(wrong, this.scene.mpp)} wrong, mostly ${kind}` },
        el("img", { src: `thumb/${region.box.join("_")}${query}`, alt: `Region ${i + 1}`, loading: "lazy", width: 90, height: 90 }), el("b", { text: i + 1 }), el("span", { text: area(wrong, this.scene.mpp) })));
    }));
  }

  go(i) {
    if (!this.regions.length) return null;
    this.at = (i + this.regions.length) % this.regions.length;
    const region = this.regions[this.at];
    this.slide.goBox(region.box);
    get("worst").querySelectorAll("button").forEach((button, n) => {
      if (n === this.at) { button.setAttribute("aria-current", "true"); button.scrollIntoView({ block: "nearest" }); } else button.removeAttribute("aria-current");
    });
    return `Region ${this.at + 1} of ${this.regions.length}: ${area(region.extra, this.scene.mpp)} too much, ${area(region.missed, this.scene.mpp)} missed`;
  }

  step(by) { return this.go(this.at < 0 ? (by > 0 ? 0 : -1) : this.at + by); }

  paint(draw, place, colours) {
    if (this.at < 0) return;
    const [x, y, width, height] = this.regions[this.at].box;
    const [left, top] = place(x, y);
    const [right, bottom] = place(x + width, y + height);
    draw.strokeStyle = colours.panel;
    draw.lineWidth = 4;
    draw.strokeRect(left, top, right - left, bottom - top);
    draw.strokeStyle = colours.accent;
    draw.lineWidth = 2;
    draw.strokeRect(left, top, right - left, bottom - top);
  }
}

function classes(found) {
  const head = el("tr", {}, ...["class", "Dice", "precision", "recall"].map((text) => el("th", { scope: "col", text })));
  const rows = found.map((one) => el("tr", {}, el("th", { scope: "row", text: one.name }), ...["dice", "precision", "recall"].map((name) => el("td", { text: one[name].toFixed(3) }))));
  return el("table", { class: "classes" }, el("thead", {}, head), el("tbody", {}, ...rows));
}
