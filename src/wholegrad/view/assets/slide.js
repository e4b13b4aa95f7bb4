// The slide on the screen: one tiled image a layer, all of the same size, and where the view is in level-0 pixels.
import { explain } from "./net.js";

const OSD = window.OpenSeadragon;
const SHARP = 3; // screen pixels to one of the slide from which pixels are drawn as squares

export class Slide {
  constructor(scene) {
    this.scene = scene;
    this.images = new Map(); // layer key -> { image, url }
    this.wanted = new Map();
    const mini = Math.max(190, Math.min(420, 70 * Math.max(scene.width / scene.height, scene.height / scene.width)));
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.viewer = new OSD.Viewer({
      element: document.getElementById("slide"),
      drawer: "canvas", // exact colours; 6.1.1's WebGL drawer adds translucent ones instead of blending them
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorWidth: `${Math.round(mini * Math.min(1, scene.width / scene.height))}px`,
      navigatorHeight: `${Math.round(mini * Math.min(1, scene.height / scene.width))}px`,
      navigatorAutoFade: false,
      animationTime: calm ? 0 : 0.45,
      springStiffness: 9,
      blendTime: calm ? 0 : 0.08,
      zoomPerScroll: 1.35,
      maxZoomPixelRatio: 24,
      minZoomImageRatio: 0.5,
      visibilityRatio: 0.35,
      imageLoaderLimit: 6,
      maxImageCacheCount: 400,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { pinchRotate: false },
      background: "transparent",
    });
    this.viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; event.preventVerticalPan = true; });
    this.viewer.addHandler("tile-load-failed", () => explain());
    if (scene.from_all) { // until something is seen, which takes as long as reading the file
      const reading = document.getElementById("reading");
      const soon = setTimeout(() => { reading.hidden = false; }, 800);
      this.viewer.addOnceHandler("tile-drawn", () => { clearTimeout(soon); reading.hidden = true; });
    }
    this.viewer.addHandler("zoom", () => this.sharpen());
    this.viewer.canvas.setAttribute("role", "application");
    this.viewer.canvas.setAttribute("aria-label", "Slide. Arrow keys pan, plus and minus zoom, 0 shows all of it.");
  }

  source(key, query) {
    const { width, height, tile, rungs } = this.scene;
    return new OSD.TileSource({
      width, height, tileSize: tile, tileOverlap: 0, minLevel: 0, maxLevel: rungs - 1,
      getTileUrl: (level, x, y) => `tiles/${key}/${rungs - 1 - level}/${x}_${y}${query ? `?${query}` : ""}`,
    });
  }

  // Show a layer with that opacity (0: not at all), drawn as the query says.
  show(key, opacity, query = "") {
    this.wanted.set(key, { opacity, query });
    const known = this.images.get(key);
    if (known && known.query === query) {
      known.image?.setOpacity(opacity);
      return;
    }
    if (!known && !opacity) return;
    const entry = { query, image: null };
    this.images.set(key, entry);
    this.viewer.addTiledImage({
      tileSource: this.source(key, query),
      opacity: known?.image ? 0 : opacity,
      preload: true,
      success: ({ item }) => {
        if (this.images.get(key) !== entry) { // asked for otherwise meanwhile
          this.viewer.world.removeItem(item);
          return;
        }
        entry.image = item;
        item.layer = key;
        this.arrange();
        const take = () => {
          clearTimeout(late);
          item.setOpacity(this.wanted.get(key).opacity);
          if (known?.image) this.viewer.world.removeItem(known.image);
        };
        const late = setTimeout(take, known?.image ? 900 : 0);
        if (known?.image) item.addOnceHandler("fully-loaded-change", take);
        else item.setOpacity(this.wanted.get(key).opacity);
        this.sharpen();
      },
    });
  }

  arrange() { // the scene's order, whichever was there first
    const order = ["slide", "truth", "prediction", "probability", "error"];
    const world = this.viewer.world;
    const items = Array.from({ length: world.getItemCount() }, (_, at) => world.getItemAt(at));
    items.sort((a, b) => order.indexOf(a.layer) - order.indexOf(b.layer)).forEach((item, at) => world.setItemIndex(item, at));
  }

  get viewport() { return this.viewer.viewport; }
  get size() { return this.viewer.container.getBoundingClientRect(); }

  // Screen pixels to one level-0 pixel.
  get zoom() { return this.viewport.getZoom(true) * this.viewport.getContainerSize().x / this.scene.width; }

  view(current = false) {
    const bounds = this.viewport.getBounds(current);
    const scale = this.scene.width;
    return { x: (bounds.x + bounds.width / 2) * scale, y: (bounds.y + bounds.height / 2) * scale, w: bounds.width * scale };
  }

  go({ x, y, w }, at_once = false) {
    const scale = this.scene.width;
    if (w) this.viewport.zoomTo(scale / w, null, at_once);
    this.viewport.panTo(new OSD.Point(x / scale, y / scale), at_once);
    this.viewport.applyConstraints(at_once);
  }

  // Show a box of level 0 with room around it.
  goBox([x, y, width, height], at_once = false, room = 1.5) {
    const { x: across, y: down } = this.viewport.getContainerSize();
    this.go({ x: x + width / 2, y: y + height / 2, w: room * Math.max(width, height * across / down) }, at_once);
  }

  fit(at_once = false) { this.viewport.goHome(at_once); }
  pan(x, y) {
    this.viewport.panBy(this.viewport.deltaPointsFromPixels(new OSD.Point(x, y)));
    this.viewport.applyConstraints();
  }
  zoomBy(factor) { this.viewport.zoomBy(factor); this.viewport.applyConstraints(); }
  zoomTo(pixels) { // screen pixels a level-0 pixel
    this.viewport.zoomTo(pixels * this.scene.width / this.viewport.getContainerSize().x);
    this.viewport.applyConstraints();
  }

  // A point of the page in level-0 pixels, and back to pixels of the stage.
  pixelAt(clientX, clientY) {
    const box = this.size;
    const point = this.viewport.pointFromPixel(new OSD.Point(clientX - box.left, clientY - box.top), true);
    return { x: point.x * this.scene.width, y: point.y * this.scene.width };
  }
  placer() {
    const zoom = this.zoom;
    const origin = this.viewport.pixelFromPoint(new OSD.Point(0, 0), true);
    return (x, y) => [origin.x + x * zoom, origin.y + y * zoom];
  }

  sharpen() {
    const smooth = this.viewport.getZoom() * this.viewport.getContainerSize().x / this.scene.width < SHARP;
    if (smooth !== this.smooth) {
      this.smooth = smooth;
      this.viewer.drawer.setImageSmoothingEnabled(smooth);
    }
  }
}
