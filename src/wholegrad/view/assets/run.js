// A run's curves, from its log, while it goes on.
import { ask, el } from "./net.js";

const get = (id) => document.getElementById(id);
const EVERY = 2000; // milliseconds between looks at the log
const STALE = 15; // of its usual steps that may pass until a run is taken to have ended
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [292, 104, 36, 15, 5];
const POINTS = 300;

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export class Run {
  constructor(scene) {
    if (!scene.run) return;
    Object.assign(this, { told: scene.run, next: 0, steps: [], validations: [] });
    get("run-part").hidden = false;
    get("run-of").textContent = scene.run.name;
    this.look();
  }

  async look() {
    try {
      const found = await ask(`log/${this.next}`);
      if (found.again) { this.steps = []; this.validations = []; }
      const more = found.next > this.next;
      this.next = found.next;
      this.steps.push(...found.steps);
      this.validations.push(...found.validations);
      if (found.steps.length || found.validations.length || found.again) {
        this.seen = this.began ? performance.now() : -Infinity; // what was there before says nothing of now
        this.draw();
      }
      this.began = !more || this.began;
      this.say();
      this.again = setTimeout(() => this.look(), more ? 50 : EVERY);
    } catch { /* said already */ }
  }

  say() {
    const last = this.steps.at(-1);
    if (!last) { get("run-said").textContent = "No step yet."; return; }
    const typical = median(this.steps.slice(-50).map((step) => step[4]));
    const going = this.seen !== undefined && performance.now() - this.seen < 1000 * STALE * Math.max(1, typical);
    const rate = `${(3600 / Math.max(typical, 1e-3)).toFixed(typical > 36 ? 0 : 1)} steps an hour`;
    get("run-said").textContent = `${this.steps.length} steps, last of ${last[1]}. ${going ? `Going on, ${rate}.` : `${rate}.`}`;
  }

  draw() {
    const of = (column, scale = 1) => this.steps.map((step) => [step[0] + 1, step[column] * scale]);
    const gib = 2 ** -30;
    const judged = this.validations.map(([step, dice]) => [step, dice]);
    get("charts").replaceChildren(...[
      chart("Loss", [{ style: "c1", points: of(2) }]),
      chart("Dice", [{ style: "c1", points: of(3), name: "training" }, { style: "c2", points: judged, dots: true, name: "validation" }]),
      chart("Memory, GiB", [{ style: "c3", points: of(7, gib), name: "projected" }, { style: "c1", points: of(6, gib), name: "peak" }], true),
      chart("Seconds a step", [{ style: "c1", points: of(4) }], true),
    ]);
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1] || 0;
}

// At most POINTS points: each the mean of its neighbours.
function thinned(points) {
  if (points.length <= POINTS) return points;
  return Array.from({ length: POINTS }, (_, i) => {
    const part = points.slice(Math.floor(i * points.length / POINTS), Math.floor((i + 1) * points.length / POINTS));
    return [0, 1].map((axis) => part.reduce((sum, point) => sum + point[axis], 0) / part.length);
  });
}

function chart(title, lines, zero = false) {
  const drawn = lines.filter((line) => line.points.length).map((line) => ({ ...line, points: thinned(line.points.filter(([, y]) => Number.isFinite(y))) }));
  const all = drawn.flatMap((line) => line.points);
  if (!all.length) return "";
  const range = (axis) => [Math.min(...all.map((point) => point[axis])), Math.max(...all.map((point) => point[axis]))];
  const [x0, x1] = range(0);
  let [y0, y1] = range(1);
  if (zero) y0 = 0;
  if (y1 - y0 < 1e-9) { y0 -= 0.5 * Math.abs(y0) + 1e-6; y1 += 0.5 * Math.abs(y1) + 1e-6; }
  const x = (value) => LEFT + (x1 > x0 ? (value - x0) / (x1 - x0) : 0.5) * (WIDTH - LEFT - 4);
  const y = (value) => HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP);
  const said = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3));
  const text = (at, level, what, anchor) => { const made = svg("text", { x: at, y: level, "text-anchor": anchor }); made.textContent = what; return made; };
  const parts = [y0, y1].flatMap((value) => [svg("line", { class: "rule", x1: LEFT, x2: WIDTH - 4, y1: y(value), y2: y(value) }), text(LEFT - 6, y(value) + 4, said(value), "end")]);
  parts.push(text(LEFT, HEIGHT - 2, String(Math.round(x0)), "start"), text(WIDTH - 4, HEIGHT - 2, `step ${Math.round(x1)}`, "end"));
  for (const line of drawn) {
    parts.push(svg("polyline", { class: line.style, points: line.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ") }));
    if (line.dots || line.points.length === 1) for (const point of line.points) parts.push(svg("circle", { class: line.style, cx: x(point[0]), cy: y(point[1]), r: 2.5 }));
  }
  const key = drawn.length > 1 ? drawn.map((line) => el("span", { class: line.style, text: line.name })) : [];
  const last = drawn[0].points.at(-1)[1];
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", { text: title }), el("span", { class: "legend" }, ...key)),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${said(last)} at step ${Math.round(x1)}` }, ...parts));
}
