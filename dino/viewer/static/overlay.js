// Draws values of tiles over the slide. One cell of the lattice is one pixel of a small picture, which the browser
// enlarges without smoothing: exact at every zoom, and as fast for a million tiles as for ten.

/** viridis at eleven places (matplotlib). */
const VIRIDIS = [[68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140], [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37]];

export function viridis(t) {
  const at = Math.min(1, Math.max(0, t)) * (VIRIDIS.length - 1);
  const i = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return VIRIDIS[i].map((v, k) => Math.round(v + (at - i) * (VIRIDIS[i + 1][k] - v)));
}

export const css = (rgb) => `rgb(${rgb.join(" ")})`;

/** Values of a rectangle, row by row, from their lowest to their highest one, one px each; null is transparent. */
export function heatmap(values, side) {
  const canvas = document.createElement("canvas");
  canvas.width = side;
  canvas.height = values.length / side;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const known = values.filter((v) => v !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  values.forEach((v, i) => { if (v !== null) image.data.set([...viridis((v - low) / (high - low || 1)), 255], 4 * i); });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The distance between neighbouring tiles: their side, or less where they overlap. */
export function strideOf(tiles) {
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let stride = tiles.step;
  for (let i = 0; i < tiles.x.length; i += 1) stride = divisor(divisor(stride, tiles.x[i]), tiles.y[i]);
  return stride;
}

/** A picture with one pixel per cell, which draws itself; `colours` has [r, g, b] or null per tile. */
export function raster(tiles, stride, width, height, colours) {
  const picture = paint(tiles, stride, width, height, colours);
  return {
    draw: (context, [scale, left, top]) => context.drawImage(picture, left, top, picture.width * stride * scale, picture.height * stride * scale),
  };
}

function paint(tiles, stride, width, height, colours) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.ceil(width / stride));
  canvas.height = Math.max(1, Math.ceil(height / stride));
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const cells = Math.round(tiles.step / stride);
  for (let i = 0; i < colours.length; i += 1) {
    if (!colours[i]) continue;
    const [column, row] = [tiles.x[i] / stride, tiles.y[i] / stride];
    for (let dy = 0; dy < cells && row + dy < canvas.height; dy += 1) {
      for (let dx = 0; dx < cells && column + dx < canvas.width; dx += 1) {
        image.data.set([...colours[i], 255], 4 * ((row + dy) * canvas.width + column + dx));
      }
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The layer over the slide. `content` is a function that returns what to draw. */
export class Layer {
  constructor(viewer, content) {
    this.viewer = viewer;
    this.content = content;
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    Object.assign(this.canvas.style, { position: "absolute", left: 0, top: 0, pointerEvents: "none" });
    viewer.canvas.appendChild(this.canvas);
    for (const event of ["update-viewport", "resize", "open"]) viewer.addHandler(event, () => this.draw());
  }

  /** Level-0 px to px of the page: [scale, left, top]. */
  transform() {
    const item = this.viewer.world.getItemAt(0);
    if (!item) return null;
    const origin = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(0, 0));
    const far = item.imageToViewerElementCoordinates(new OpenSeadragon.Point(item.getContentSize().x, 0));
    return [(far.x - origin.x) / item.getContentSize().x, origin.x, origin.y];
  }

  draw() {
    const place = this.transform();
    const [width, height] = [this.viewer.canvas.clientWidth, this.viewer.canvas.clientHeight];
    const ratio = window.devicePixelRatio || 1;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const shown = place && this.content();
    if (!shown) return;
    const [scale, left, top] = place;
    const border = shown.split * width;
    const parts = shown.rasters.length > 1 ? [[0, border], [border, width]] : [[0, width]];
    shown.rasters.forEach((picture, i) => {
      if (!picture) return;
      context.save();
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.beginPath();
      context.rect(parts[i][0], 0, parts[i][1] - parts[i][0], height);
      context.clip();
      context.imageSmoothingEnabled = false;
      context.globalAlpha = shown.opacity;
      picture.draw(context, place, [width, height]);
      context.restore();
    });
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const rectangle = ([x, y, w, h]) => context.strokeRect(left + x * scale, top + y * scale, w * scale, h * scale);
    const visible = ([x, y, w, h]) => left + (x + w) * scale > 0 && top + (y + h) * scale > 0 && left + x * scale < width && top + y * scale < height;
    for (const { boxes, colour, line, least } of shown.outlines) {
      if (least && boxes.length && boxes[0][2] * scale < least) continue; // borders closer than that hide the slide
      context.strokeStyle = colour;
      context.lineWidth = line;
      for (const box of boxes) if (visible(box)) rectangle(box);
    }
    if (shown.drawn && shown.drawn.length > 1) {
      context.strokeStyle = "#ffd400";
      context.lineWidth = 2;
      context.setLineDash([6, 4]);
      context.beginPath();
      shown.drawn.forEach(([x, y], i) => context[i ? "lineTo" : "moveTo"](left + x * scale, top + y * scale));
      context.closePath();
      context.stroke();
      context.setLineDash([]);
    }
  }
}

/** Whether a point is inside a polygon (even-odd rule). */
export function inside([x, y], polygon) {
  let result = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i, i += 1) {
    const [xi, yi] = polygon[i];
    const [xj, yj] = polygon[j];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) result = !result;
  }
  return result;
}
