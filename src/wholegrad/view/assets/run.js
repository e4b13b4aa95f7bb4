// A run's curves, from its log, while it goes on.
import { ask, closed, el } from "./net.js";

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
  // `renew` is called when another prediction is there, and when the run is over.
  constructor(scene, renew) {
    if (!scene.run) return;
    Object.assign(this, { told: scene.run, renew, next: 0, steps: [], validations: [], replans: [], state: null });
    this.version = scene.version;
    get("run-part").hidden = false;
    get("run-of").textContent = scene.run.name;
    this.look();
  }

  async look() {
    let found;
    try {
      found = await ask(`log/${this.next}`);
    } catch { // said already; a run that is resumed may answer again
      if (!this.over()) get("run-state").textContent = "No answer.";
      this.again = setTimeout(() => this.look(), 3 * EVERY);
      return;
    }
    const began = found.status?.began;
    if (this.next && !found.again && this.began && began !== this.began) { // resumed: its log may have been cut and have grown again
      this.next = 0;
      this.began = began;
      found.again = true;
      Object.assign(found, { steps: [], validations: [], replans: [], next: 0 });
    }
    this.began = began;
    if (found.again) Object.assign(this, { steps: [], validations: [], replans: [] });
    const more = found.next > this.next;
    this.next = found.next;
    for (const kind of ["steps", "validations", "replans"]) this[kind].push(...found[kind]);
    Object.assign(this, { status: found.status, budget: found.budget, total: found.total, prediction: found.prediction, viewer: found.viewer });
    if (found.steps.length || found.validations.length || found.again) {
      this.seen = this.caught ? performance.now() : -Infinity; // what was there before says nothing of now
      this.draw();
    }
    this.caught = !more || this.caught;
    if (this.over()) closed.said = "The run is over, and its page was closed with it: wholegrad view --run shows it again.";
    this.say();
    const [state, version] = [this.status?.state, found.prediction?.version ?? this.version];
    const ended = this.state !== null && state !== this.state && this.over();
    if (version !== this.version || ended) this.renew();
    Object.assign(this, { state: state ?? null, version });
    this.again = setTimeout(() => this.look(), more ? 50 : EVERY);
  }

  over() { return ["finished", "interrupted", "failed"].includes(this.status?.state); }

  say() {
    const { status, steps } = this;
    const last = steps.at(-1);
    const typical = median(steps.slice(-50).map((step) => step[4]));
    const done = Math.max(last ? last[0] + 1 : 0, status?.step ?? 0);
    const going = status ? !this.over() && !status.silent : this.seen !== undefined && performance.now() - this.seen < 1000 * STALE * Math.max(1, typical);
    get("run-state").textContent = this.headline(going);
    get("run-state").dataset.state = status?.silent ? "silent" : status?.state ?? (going ? "running" : "unknown");
    const bar = get("run-bar");
    bar.hidden = !this.total;
    bar.max = this.total || 1;
    bar.value = done + (status?.tiles && going ? 0.99 * status.done / status.tiles : 0);
    const facts = [["Steps", this.total ? `${done} of ${this.total}` : String(done)]];
    if (last) {
      const pixels = status?.pixels;
      facts.push(["Speed", `${shown(typical)} s a step${pixels ? `, ${shown(pixels / 1e6 / typical)} MP/s` : ""}`]);
      if (going && this.total) facts.push(["Left", this.left(done, typical)]);
      const gib = 2 ** -30;
      const now = going && status?.rss ? status.rss : last[5];
      facts.push(["Memory", `${shown(now * gib)} GiB, peak ${shown(Math.max(...steps.slice(-1000).map((step) => step[6])) * gib)}${this.budget ? ` of ${shown(this.budget * gib)}` : ""}`]);
      facts.push(["Learning rate", Number(last[8].toPrecision(3)).toString()]);
    }
    if (this.validations.length) {
      const best = this.validations.reduce((a, b) => (b[1] > a[1] ? b : a));
      facts.push(["Validation Dice", `${this.validations.at(-1)[1].toFixed(4)}${best !== this.validations.at(-1) ? `, best ${best[1].toFixed(4)} at ${best[0]}` : ""}`]);
    }
    if (status) facts.push(["This page", `${Math.round(this.viewer / 2 ** 20)} MiB beside the run`]);
    get("run-facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))));
    get("run-said").textContent = this.seeing();
  }

  headline(going) {
    const { status } = this;
    if (!status) return going ? "Going on." : this.steps.length ? "" : "No step yet.";
    if (status.silent) return "The run has said nothing for a while: it may have been killed.";
    if (status.state === "finished") return "Finished.";
    if (status.state === "interrupted") return "Stopped; it goes on with --resume.";
    if (status.state === "failed") return `Failed: ${status.said}`;
    const tiles = status.tiles ? `, tile ${status.done} of ${status.tiles}` : "";
    return `${status.phase[0].toUpperCase()}${status.phase.slice(1)}${tiles}.`;
  }

  // From what went by since the run was started, evaluations included; before that, from steps alone.
  left(done, typical) {
    const { status } = this;
    const since = status?.started && done - status.first >= 3 ? (status.now - status.started) / (done - status.first) : typical;
    const seconds = since * Math.max(0, this.total - done);
    return seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  }

  seeing() { // which prediction is on the slide
    if (this.prediction?.step) return `Shown: the prediction after ${this.prediction.step} steps.`;
    if (this.prediction) return "Shown: the prediction by the weights to use.";
    if (this.status && !this.status.predicts) return "No prediction is made: the run has no validation slides.";
    return this.status && !this.over() ? "The first prediction comes with the first evaluation." : "";
  }

  draw() {
    const of = (column, scale = 1) => this.steps.map((step) => [step[0] + 1, step[column] * scale]);
    const gib = 2 ** -30;
    const judged = this.validations.map(([step, dice]) => [step, dice]);
    const memory = [{ style: "c3", points: of(7, gib), name: "projected" }, { style: "c1", points: of(6, gib), name: "peak" }, { style: "c2", points: of(5, gib), name: "now" }];
    if (this.budget && this.steps.length) memory.push({ style: "c4", points: this.budgets().map(([x, y]) => [x, y * gib]), name: "budget" });
    get("charts").replaceChildren(...[
      chart("Loss", [{ style: "c1", points: of(2) }]),
      chart("Dice", [{ style: "c1", points: of(3), name: "training" }, { style: "c2", points: judged, dots: true, name: "validation" }]),
      chart("Learning rate", [{ style: "c1", points: of(8) }], true),
      chart("Memory, GiB", memory, true),
      chart("Seconds a step", [{ style: "c1", points: of(4) }], true),
    ]);
  }

  // What the run might take, step by step: another budget from a replan on.
  budgets() {
    const [first, last] = [this.steps[0][0] + 1, this.steps.at(-1)[0] + 1];
    const changes = this.replans.map(([step, budget]) => [step + 1, budget]);
    const points = [[first, this.budget]];
    for (const [step, budget] of changes) points.push([step, points.at(-1)[1]], [step, budget]);
    return [...points, [last, points.at(-1)[1]]];
  }
}

function shown(value) { return value >= 100 ? value.toFixed(0) : value.toPrecision(3); }

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
  const said = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value && Math.abs(value) < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(Math.abs(value) < 0.1 ? 2 : 3))));
  const text = (at, level, what, anchor) => { const made = svg("text", { x: at, y: level, "text-anchor": anchor }); made.textContent = what; return made; };
  const parts = [y0, y1].flatMap((value) => [svg("line", { class: "rule", x1: LEFT, x2: WIDTH - 4, y1: y(value), y2: y(value) }), text(LEFT - 6, y(value) + 4, said(value), "end")]);
  parts.push(text(LEFT, HEIGHT - 4, String(Math.round(x0)), "start"), text(WIDTH - 4, HEIGHT - 4, `step ${Math.round(x1)}`, "end"));
  for (const line of drawn) {
    parts.push(svg("polyline", { class: line.style, points: line.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ") }));
    if (line.dots || line.points.length === 1) for (const point of line.points) parts.push(svg("circle", { class: line.style, cx: x(point[0]), cy: y(point[1]), r: 2.5 }));
  }
  const key = drawn.length > 1 ? drawn.map((line) => el("span", { class: line.style, text: line.name })) : [];
  const last = drawn[0].points.at(-1)[1];
  return el("figure", { class: "chart" }, el("figcaption", {}, el("b", { text: title }), el("span", { class: "legend" }, ...key)),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${said(last)} at step ${Math.round(x1)}` }, ...parts));
}
