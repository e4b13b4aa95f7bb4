// A training step over the slide: its passes, and one tile after the other with what it owns and what it reads.
import { el, follow } from "./net.js";

const get = (id) => document.getElementById(id);
const LASTS = 24; // seconds in which a whole step is played, each pass as long as its share of the predicted time
const SWEEPS = { forward: "Forward", backward: "Backward", "one pass": "Forward and backward" };
const DENSE = 4; // screen pixels: closer lines are not drawn

export class Step {
  constructor(scene, slide, redraw) {
    Object.assign(this, { scene, slide, redraw, at: 0, on: false, playing: false, plan: null, lasts: LASTS });
    this.changed = new EventTarget();
    get("step-show").addEventListener("click", () => this.open());
    get("play").addEventListener("click", () => this.play(!this.playing));
    get("at-tile").addEventListener("input", (event) => { this.play(false); this.goTo(Number(event.target.value)); });
    get("step-on").addEventListener("change", (event) => this.setOn(event.target.checked));
    const steps = scene.run?.steps;
    if (scene.run && steps) get("step-ask").firstElementChild.append(` The run took ${steps.count} on this slide.`);
  }

  // Ask for the plan; `then` runs once it is there.
  open(then = () => {}) {
    if (this.plan) { then(); return; }
    this.then = then;
    if (this.asked) return;
    this.asked = true;
    get("step-ask").hidden = true;
    get("step-problem").hidden = true;
    get("step-wait").hidden = false;
    follow("plan.json", (state) => {
      if (state.state === "running") return;
      get("step-wait").hidden = true;
      if (state.problem) {
        get("step-problem").textContent = state.problem;
        get("step-problem").hidden = false;
        return;
      }
      this.begin(state.plan, state.said);
      this.then();
    });
  }

  begin(plan, said) {
    this.plan = plan;
    this.starts = [];
    let tiles = 0;
    for (const pass of plan.passes) { this.starts.push(tiles); tiles += pass.tiles; }
    this.tiles = tiles;
    get("step-of").textContent = said;
    get("step-of").title = said;
    get("step").hidden = false;
    const facts = [
      ["Image", plan.image.slice(-2).reverse().map((n) => n.toLocaleString("en").replaceAll(",", " ")).join(" × ")],
      ["Peak memory", `${plan.projected}${plan.budget ? ` of ${plan.budget}` : ""}`],
      ["Whole-image maps", plan.whole_image],
      ["Predicted time", seconds(plan.seconds)],
    ];
    const ran = this.scene.run?.steps;
    if (ran) facts.push(["Measured in the run", `${seconds(ran.seconds)}, ${ran.peak}`]);
    get("step-facts").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))));
    if (!tiles) {
      get("tile-said").textContent = `Held by ${plan.strategy}, on whole maps: no tiles.`;
      document.querySelector(".player").hidden = true;
      document.querySelector(".keys").hidden = true;
      return;
    }
    get("passes").replaceChildren(...plan.passes.map((pass, i) => {
      const segment = plan.segments[pass.segment];
      const named = plan.segments.length > 1 ? `, segment ${pass.segment + 1} of ${plan.segments.length}` : "";
      return el("li", {}, el("button", { type: "button", title: segment.modules, onclick: () => { this.play(false); this.goTo(this.starts[i]); this.setOn(true); } },
        el("span", { text: `${SWEEPS[pass.sweep]}${named}` }), el("span", { text: seconds(pass.seconds) }),
        el("small", { text: `${pass.tiles} tiles of ${segment.tile.slice().reverse().join(" × ")}, ${segment.modules}` }), el("progress", { max: pass.tiles, value: 0, "aria-label": "tiles done" })));
    }));
    get("at-tile").max = tiles - 1;
    this.setOn(true);
    this.goTo(0);
  }

  setOn(on) {
    this.on = on && !!this.tiles;
    get("step-on").checked = this.on;
    if (!this.on) this.play(false);
    this.redraw();
    this.changed.dispatchEvent(new Event("change"));
  }

  // Where a tile of the whole step is: pass, segment, row and column.
  find(at) {
    let pass = this.plan.passes.length - 1;
    while (this.starts[pass] > at) pass--;
    const segment = this.plan.segments[this.plan.passes[pass].segment];
    const number = at - this.starts[pass];
    return { pass, segment, number, row: Math.floor(number / segment.cols.length), col: number % segment.cols.length };
  }

  goTo(at) {
    if (!this.plan || !this.tiles) return;
    this.at = Math.min(this.tiles - 1, Math.max(0, Math.floor(at)));
    const { pass, segment, number, row, col } = this.find(this.at);
    const range = get("at-tile");
    range.value = this.at;
    range.style.setProperty("--at", `${this.tiles > 1 ? 100 * this.at / (this.tiles - 1) : 0}%`);
    get("passes").querySelectorAll("button").forEach((button, i) => {
      button.toggleAttribute("aria-current", false);
      if (i === pass) button.setAttribute("aria-current", "true");
      button.querySelector("progress").value = Math.max(0, Math.min(this.plan.passes[i].tiles, this.at - this.starts[i] + 1));
    });
    const [y0, y1, ry0, ry1] = segment.rows[row];
    const [x0, x1, rx0, rx1] = segment.cols[col];
    const size = (w, h) => `${Math.round(w).toLocaleString("en").replaceAll(",", " ")} × ${Math.round(h).toLocaleString("en").replaceAll(",", " ")}`;
    const own = (y1 - y0) * (x1 - x0);
    const read = (ry1 - ry0) * (rx1 - rx0);
    const more = own ? Math.round(100 * (read / own - 1)) : 0;
    const what = segment.reads === "image" ? "of the image" : `of ${segment.reads}`;
    const text = `Tile ${number + 1} of ${this.plan.passes[pass].tiles} owns ${size(x1 - x0, y1 - y0)} px and reads ${size(rx1 - rx0, ry1 - ry0)} px ${what}, ${more} % more. Yields ${segment.yields}.`;
    get("tile-said").textContent = text;
    range.setAttribute("aria-valuetext", text);
    this.redraw();
    this.changed.dispatchEvent(new Event("change"));
  }

  move(by) { this.play(false); this.setOn(true); this.goTo(this.at + by); }

  // The tile that owns a level-0 pixel, in the pass that is shown.
  pick({ x, y }) {
    if (!this.on) return;
    const { pass, segment } = this.find(this.at);
    const row = segment.rows.findIndex(([y0, y1]) => y >= y0 && y < y1);
    const col = segment.cols.findIndex(([x0, x1]) => x >= x0 && x < x1);
    if (row >= 0 && col >= 0) { this.play(false); this.goTo(this.starts[pass] + row * segment.cols.length + col); }
  }

  play(on) {
    if (on === this.playing || !this.tiles) return;
    this.playing = on;
    get("play").setAttribute("aria-label", on ? "Pause" : "Play");
    get("play").querySelector("use").setAttribute("href", on ? "#i-pause" : "#i-play");
    if (!on) return;
    this.setOn(true);
    if (this.at >= this.tiles - 1) this.goTo(0);
    let exact = this.at;
    let before = null; // the time of the last frame
    const total = this.plan.passes.reduce((sum, pass) => sum + pass.seconds, 0);
    const frame = (now) => {
      if (!this.playing) return;
      const { pass } = this.find(Math.floor(exact));
      const { tiles, seconds: lasts } = this.plan.passes[pass];
      exact += (now - (before ?? now)) / 1000 * tiles / Math.max(this.lasts / 60, this.lasts * lasts / total);
      before = now;
      if (exact >= this.tiles) { this.goTo(this.tiles - 1); this.play(false); return; }
      if (Math.floor(exact) !== this.at) this.goTo(exact);
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  }

  paint(draw, place, colours, size) {
    if (!this.on || !this.plan) return;
    const { segment, row, col } = this.find(this.at);
    const box = ([x0, x1], [y0, y1]) => { const [l, t] = place(x0, y0); const [r, b] = place(x1, y1); return [l, t, r - l, b - t]; };
    const span = (list, from, to) => [list[from][0], list[to][1]];
    const all = span(segment.cols, 0, segment.cols.length - 1);
    draw.globalAlpha = 0.16;
    draw.fillStyle = colours.own;
    if (row > 0) draw.fillRect(...box(all, span(segment.rows, 0, row - 1)));
    if (col > 0) draw.fillRect(...box(span(segment.cols, 0, col - 1), segment.rows[row]));
    draw.globalAlpha = 0.5;
    draw.strokeStyle = colours.own;
    draw.lineWidth = 1;
    this.lines(draw, place, segment, size);
    const owned = box(segment.cols[col], segment.rows[row]);
    const read = box(segment.cols[col].slice(2), segment.rows[row].slice(2));
    draw.globalAlpha = 0.2;
    draw.fillStyle = colours.halo;
    draw.beginPath();
    draw.rect(...read);
    draw.rect(...owned);
    draw.fill("evenodd");
    draw.globalAlpha = 0.28;
    draw.fillStyle = colours.own;
    draw.fillRect(...owned);
    draw.globalAlpha = 1;
    draw.strokeStyle = colours.halo;
    draw.lineWidth = 2;
    draw.setLineDash([6, 4]);
    draw.strokeRect(...read);
    draw.setLineDash([]);
    draw.strokeStyle = colours.own;
    draw.lineWidth = 2;
    draw.strokeRect(...owned);
  }

  lines(draw, place, segment, size) {
    const [left, top] = place(segment.cols[0][0], segment.rows[0][0]);
    const [right, bottom] = place(segment.cols.at(-1)[1], segment.rows.at(-1)[1]);
    draw.beginPath();
    const every = (list, from, to) => list.length && (to - from) / list.length >= DENSE;
    if (every(segment.cols, left, right)) {
      for (const [x] of [...segment.cols, [segment.cols.at(-1)[1]]]) {
        const at = Math.round(place(x, 0)[0]) + 0.5;
        if (at >= -1 && at <= size.width + 1) { draw.moveTo(at, Math.max(0, top)); draw.lineTo(at, Math.min(size.height, bottom)); }
      }
    }
    if (every(segment.rows, top, bottom)) {
      for (const [y] of [...segment.rows, [segment.rows.at(-1)[1]]]) {
        const at = Math.round(place(0, y)[1]) + 0.5;
        if (at >= -1 && at <= size.height + 1) { draw.moveTo(Math.max(0, left), at); draw.lineTo(Math.min(size.width, right), at); }
      }
    }
    draw.stroke();
  }
}

function seconds(value) {
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  return value < 120 ? `${value.toFixed(1)} s` : `${(value / 60).toFixed(1)} min`;
}
