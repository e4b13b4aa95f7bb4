// Puts the page together: what was opened, the slide, its layers, and everything that follows where the view is.
import { ask, complain, el, toast } from "./net.js";
import { bind, help } from "./keys.js";
import { Layers } from "./layers.js";
import { Run } from "./run.js";
import { Scores } from "./scores.js";
import { Slide } from "./slide.js";
import { Step } from "./step.js";

const get = (id) => document.getElementById(id);
const grouped = (number) => Math.round(number).toLocaleString("en").replaceAll(",", "\u2009");

function facts({ width, height, mpp }) {
  const lines = [`${grouped(width)} × ${grouped(height)} px`];
  if (mpp) {
    const side = (pixels) => { const mm = pixels * mpp / 1000; return mm < 10 ? mm.toFixed(2) : mm.toFixed(1); };
    lines.push(`${side(width)} × ${side(height)} mm, ${Number(mpp.toPrecision(4))} µm/px`);
  } else lines.push("µm a pixel unknown");
  return lines.map((text) => el("span", { text }));
}

function roundLength(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return Math.max(...[1, 2, 5].filter((step) => step * power <= most).map((step) => step * power));
}

class Page {
  constructor(scene) {
    this.scene = scene;
    document.title = `${scene.name} - wholegrad view`;
    get("name").textContent = scene.name;
    get("facts").replaceChildren(...facts(scene));
    this.slide = new Slide(scene);
    this.layers = new Layers(scene, this.slide);
    this.scores = new Scores(scene, this.slide, this.layers);
    this.step = new Step(scene, this.slide, () => this.redraw());
    this.run = new Run(scene, () => this.renew());
    const viewer = this.slide.viewer;
    for (const event of ["update-viewport", "animation", "resize", "open"]) viewer.addHandler(event, () => this.redraw());
    viewer.world.addOnceHandler("add-item", () => setTimeout(() => { // OpenSeadragon goes home right after this event
      this.restore(true);
      this.ready = true;
      this.redraw();
    }));
    viewer.addHandler("animation-finish", () => this.remember());
    this.layers.changed.addEventListener("change", () => this.remember());
    this.step.changed.addEventListener("change", () => { if (!this.step.playing) this.remember(); });
    viewer.addHandler("canvas-click", (event) => {
      if (event.quick) this.step.pick(this.slide.pixelAt(event.originalEvent.clientX, event.originalEvent.clientY));
    });
    window.addEventListener("hashchange", () => { if (location.hash !== this.hash) this.restore(); });
    this.buttons();
    this.shortcuts();
    this.pointer();
  }

  // The run has made another prediction, or is over.
  async renew() {
    let scene;
    try { scene = await ask("scene.json"); } catch { return; }
    const other = scene.version !== this.scene.version;
    this.scene = scene;
    if (other) this.layers.renew(scene);
    this.scores.renew(scene);
    this.redraw();
  }

  // Drawing over the slide.

  redraw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => { this.drawing = 0; this.draw(); });
  }

  draw() {
    if (!this.slide.viewport || !this.ready) return;
    const canvas = get("overlay");
    const size = canvas.getBoundingClientRect();
    const dense = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(size.width * dense), Math.round(size.height * dense)];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const draw = canvas.getContext("2d");
    draw.setTransform(dense, 0, 0, dense, 0, 0);
    draw.clearRect(0, 0, size.width, size.height);
    const style = getComputedStyle(document.documentElement);
    const colours = Object.fromEntries(["own", "halo", "accent", "panel"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    const place = this.slide.placer();
    this.step.paint(draw, place, colours, size);
    this.scores.paint(draw, place, colours);
    this.scale();
  }

  scale() {
    const zoom = this.slide.zoom;
    const unit = this.scene.mpp || 1;
    const length = roundLength(150 / zoom * unit);
    get("scale-bar").style.width = `${length / unit * zoom}px`;
    const named = !this.scene.mpp ? `${length} px` : length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
    get("scale-said").textContent = named;
    get("scale").dataset.um = this.scene.mpp ? length : "";
  }

  // Links.

  remember() {
    if (!this.ready) return;
    clearTimeout(this.soon);
    this.soon = setTimeout(() => {
      this.hash = this.toHash();
      history.replaceState(null, "", this.hash);
    }, 120);
  }

  toHash() {
    const { x, y, w } = this.slide.view();
    const parts = [`x=${Math.round(x)}`, `y=${Math.round(y)}`, `w=${Math.round(w)}`, `layers=${this.layers.toText()}`];
    if (this.layers.threshold !== this.scene.threshold) parts.push(`t=${this.layers.threshold}`);
    if (this.step.on) parts.push(`tile=${this.step.at}`);
    return `#${parts.join("&")}`;
  }

  restore(at_once = false) {
    const given = new URLSearchParams(location.hash.slice(1));
    const number = (name) => { const value = given.get(name); return value !== null && /^-?\d{1,9}$/.test(value) ? Number(value) : null; };
    const [x, y, w, t, tile] = ["x", "y", "w", "t", "tile"].map(number);
    if (t !== null && t > 0 && t < 256) this.layers.setThreshold(t);
    if (given.has("layers")) this.layers.fromText(given.get("layers"));
    if (x !== null && y !== null && w > 0) this.slide.go({ x, y, w }, at_once);
    if (tile !== null) this.step.open(() => { this.step.setOn(true); this.step.goTo(tile); });
  }

  async copyLink() {
    this.hash = this.toHash();
    history.replaceState(null, "", this.hash);
    try {
      await navigator.clipboard.writeText(location.href);
      toast("Link copied: works while this viewer runs");
    } catch {
      toast("The address bar has the link");
    }
  }

  // What the pointer is over.

  pointer() {
    const stage = get("slide");
    let soon;
    let running;
    const leave = () => { clearTimeout(soon); running?.abort(); get("readout").replaceChildren(); };
    stage.addEventListener("pointermove", (event) => {
      if (event.target.closest(".navigator")) { leave(); return; }
      const at = this.slide.pixelAt(event.clientX, event.clientY);
      const [x, y] = [Math.floor(at.x), Math.floor(at.y)];
      if (x < 0 || y < 0 || x >= this.scene.width || y >= this.scene.height) { leave(); return; }
      clearTimeout(soon);
      running?.abort();
      soon = setTimeout(async () => {
        running = new AbortController();
        const query = this.layers.pointed();
        try { this.say(x, y, await ask(`at/${x}_${y}${query}`, { signal: running.signal })); } catch { /* said already */ }
      }, 70);
    });
    stage.addEventListener("pointerleave", leave);
  }

  say(x, y, found) {
    const parts = [el("span", { text: `x ${grouped(x)}  y ${grouped(y)}` }), el("span", { text: `RGB ${found.rgb.join(" ")}` })];
    for (const [key, name] of [["truth", "truth"], ["prediction", "prediction"], ["probability", "probability"]]) {
      if (found[key] !== undefined) parts.push(el("span", {}, `${name} `, el("b", { text: key === "probability" ? found[key].toFixed(2) : found[key] })));
    }
    get("readout").replaceChildren(...parts);
  }

  // Buttons and keys.

  buttons() {
    const on = (id, action) => get(id).addEventListener("click", action);
    on("zoom-in", () => this.slide.zoomBy(1.6));
    on("zoom-out", () => this.slide.zoomBy(1 / 1.6));
    on("fit", () => this.slide.fit());
    on("one", () => this.slide.zoomTo(1));
    on("link", () => this.copyLink());
    on("theme", () => this.turn());
    on("toggle-panel", () => this.panel());
    if (matchMedia("(max-width: 860px)").matches) this.panel(false);
  }

  panel(shown = document.body.classList.contains("alone")) {
    document.body.classList.toggle("alone", !shown);
    get("toggle-panel").setAttribute("aria-expanded", String(shown));
  }

  turn() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("wholegrad-theme", root.dataset.theme); } catch { /* storage may be forbidden */ }
    this.redraw();
    return dark ? "Light" : "Dark";
  }

  shortcuts() {
    const { slide, layers, scores, step } = this;
    const far = (event) => (event.shiftKey ? 320 : 90);
    bind([
      ["Move", [
        [["ArrowLeft"], "Left (with shift: further)", (event) => slide.pan(-far(event), 0)],
        [["ArrowRight"], "Right", (event) => slide.pan(far(event), 0)],
        [["ArrowUp"], "Up", (event) => slide.pan(0, -far(event))],
        [["ArrowDown"], "Down", (event) => slide.pan(0, far(event))],
        [["+", "="], "Closer", () => slide.zoomBy(1.4)],
        [["-"], "Further away", () => slide.zoomBy(1 / 1.4)],
        [["0", "Home"], "All of the slide", () => slide.fit()],
        [["1"], "One pixel to one", () => slide.zoomTo(1)],
      ]],
      ["Layers", [
        [["t"], "Truth", () => layers.toggle("truth")],
        [["p"], "Prediction", () => layers.toggle("prediction")],
        [["b"], "Probability", () => layers.toggle("probability")],
        [["e"], "Errors", () => layers.toggle("error")],
        [["o"], "Areas or outlines", () => layers.outline()],
        [["["], "Fainter", () => layers.fade(-0.1)],
        [["]"], "Stronger", () => layers.fade(0.1)],
      ]],
      ["Worst regions", [
        [["n"], "Next", () => scores.step(1)],
        [["N"], "Previous", () => scores.step(-1)],
      ]],
      ["Training step", [
        [["g"], "Tiles and halos", () => { if (step.plan) step.setOn(!step.on); else step.open(); }],
        [[" "], "Play or pause", () => { if (step.plan) step.play(!step.playing); }],
        [["."], "Next tile", () => { if (step.plan) step.move(1); }],
        [[","], "Tile before", () => { if (step.plan) step.move(-1); }],
      ]],
      ["Page", [
        [["c"], "Copy a link to this view", () => { this.copyLink(); }],
        [["d"], "Light or dark", () => this.turn()],
        [["\\"], "Hide or show the panel", () => this.panel()],
        [["?"], "This list", () => help()],
      ]],
    ]);
  }
}

try {
  const scene = await ask("scene.json");
  window.page = new Page(scene);
} catch (error) {
  if (get("banner").hidden) complain(`The page could not be set up (${error.message}); reload it.`);
  throw error;
}
