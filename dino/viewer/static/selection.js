// Selection of tiles by rectangle or lasso, and the border between two encoders, which is drawn the same way.
import { ask, change, slidePath, state } from "./state.js";
import { inside } from "./overlay.js";
import { $, download, guarded, page, say } from "./page.js";

const COLOUR = [255, 200, 0]; // as in selections.py

let selected = new Set(); // tiles of the selection
let boxes = [];
let drawn = []; // corners of the rectangle or lasso that is being drawn, level-0 px
let tool = "";

export const selectionBoxes = () => boxes;
export const drawnOutline = () => drawn;
export const isDrawing = () => Boolean(tool);

export function pointAt(position) {
  const [scale, left, top] = page.layer.transform();
  return [(position.x - left) / scale, (position.y - top) / scale];
}

export function setTool(name) {
  tool = tool === name ? "" : name;
  for (const id of ["rectangle", "lasso"]) $(id).setAttribute("aria-pressed", tool === id);
  page.viewer.setMouseNavEnabled(!tool);
  $("zoom").style.cursor = tool ? "crosshair" : "";
}

export function addTools() {
  const place = $("zoom");
  for (const id of ["rectangle", "lasso"]) $(id).addEventListener("click", () => setTool(id));
  const at = (event) => {
    const box = place.getBoundingClientRect();
    return pointAt({ x: event.clientX - box.left, y: event.clientY - box.top });
  };
  place.addEventListener("pointerdown", (event) => { if (tool && page.slide) { drawn = [at(event)]; event.preventDefault(); } }, true);
  place.addEventListener("pointermove", (event) => {
    if (!tool || !drawn.length) return;
    const [[x, y], [right, bottom]] = [drawn[0], at(event)];
    drawn = tool === "lasso" ? [...drawn, [right, bottom]] : [[x, y], [right, y], [right, bottom], [x, bottom]];
    page.layer.draw();
  }, true);
  addEventListener("pointerup", () => { if (tool && drawn.length) finishDrawing(); });
  $("selection-clear").addEventListener("click", clearSelection);
  $("selection-download").addEventListener("click", downloadSelection);
  $("selection-save").addEventListener("click", () => guarded(saveSelection()));
  const split = $("split");
  split.addEventListener("pointerdown", (event) => split.setPointerCapture(event.pointerId));
  split.addEventListener("pointermove", (event) => {
    if (!split.hasPointerCapture(event.pointerId)) return;
    const box = place.getBoundingClientRect();
    change({ split: Math.min(0.98, Math.max(0.02, (event.clientX - box.left) / box.width)).toFixed(3) });
  });
  split.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
    if (step) change({ split: Math.min(0.98, Math.max(0.02, Number(state.split) + step)).toFixed(3) });
  });
}

function finishDrawing() {
  const { tiles } = page.slide;
  if (tiles && drawn.length > 2) {
    tiles.x.forEach((x, i) => { if (inside([x + tiles.step / 2, tiles.y[i] + tiles.step / 2], drawn)) selected.add(i); });
  }
  drawn = [];
  showSelection();
}

export function clearSelection() {
  selected = new Set();
  showSelection();
}

function showSelection() {
  const tiles = page.slide && page.slide.tiles;
  boxes = tiles ? [...selected].map((i) => [tiles.x[i], tiles.y[i], tiles.step, tiles.step]) : [];
  $("selection").hidden = !selected.size;
  $("selection-count").textContent = `${selected.size} ${selected.size === 1 ? "tile" : "tiles"}`;
  if (page.layer) page.layer.draw();
}

const selectionName = () => $("selection-name").value.trim() || "selection";

function downloadSelection() {
  const classification = { name: selectionName(), color: COLOUR };
  const features = boxes.map(([x, y, w, h]) => ({
    type: "Feature",
    geometry: { type: "Polygon", coordinates: [[[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]] },
    properties: { objectType: "tile", name: `${x}, ${y}`, classification },
  }));
  download({ type: "FeatureCollection", features }, `${page.slide.slide_id} ${selectionName()}.geojson`);
}

async function saveSelection() {
  const body = JSON.stringify({ name: selectionName(), tiles: [...selected] });
  const { saved } = await ask(`${slidePath(page.slide.slide_id)}/selections`, { method: "POST", headers: { "content-type": "application/json" }, body });
  say(`saved in annotations/${saved}`, true);
}
