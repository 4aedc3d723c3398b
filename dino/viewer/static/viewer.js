import { ask, change, forgetToken, onChange, read, slidePath, state } from "./state.js";
import { TiledMap } from "./maps.js";
import { Layer, raster, strideOf } from "./overlay.js";
import { $, download, element, guarded, page, say, tileIndex } from "./page.js";
import { OVERLAYS, channelOf, coloursOf, showLegend } from "./legend.js";
import { clusterName, legendOf } from "./names.js";
import { addTools, clearSelection, drawnOutline, isDrawing, pointAt, selectionBoxes, setTool } from "./selection.js";
import { showNeighbours, showNumbers, showTile } from "./tile.js";

let rasters = []; // of the overlay: one, or A and B
let loading = 0; // counts what was asked for, so that late answers are dropped

// ------------------------------------------------------------------------------------------------- start

async function start() {
  forgetToken();
  read();
  page.root = await ask("api/root");
  document.title = `${page.root.name} - slides`;
  $("root-name").textContent = page.root.name;
  fillControls();
  page.viewer = OpenSeadragon({
    id: "zoom", drawer: "canvas", showNavigationControl: false, showNavigator: true, navigatorPosition: "BOTTOM_RIGHT",
    navigatorSizeRatio: 0.16, navigatorBackground: "transparent", navigatorBorderColor: "#8a8f99", navigatorDisplayRegionColor: "#0b63c5", navigatorAutoFade: false, animationTime: 0.5, maxZoomPixelRatio: 8, visibilityRatio: 0.3, gestureSettingsMouse: { clickToZoom: false },
    imageLoaderLimit: 6, timeout: 60000, keyboardNavEnabled: true,
  });
  page.layer = new Layer(page.viewer, overlayContent);
  page.viewer.addHandler("canvas-click", (event) => { if (event.quick && !isDrawing()) clickAt(event.position); });
  page.viewer.addHandler("update-viewport", showScale);
  page.viewer.addHandler("animation-finish", rememberView);
  page.viewer.addHandler("resize", showSplit);
  page.viewer.addHandler("tile-load-failed", () => say("a part of the slide could not be read"));
  addTools();
  listSlides();
  const readable = page.root.slides.filter((one) => one.readable);
  const first = readable.find((one) => one.slide_id === state.slide) || readable.find((one) => one.tiles) || readable[0];
  page.visit = visit;
  onChange(react);
  document.addEventListener("named", showNames);
  addEventListener("hashchange", () => { read(); fillStates(); open(state.slide); });
  if (first) await open(first.slide_id);
  document.body.dataset.ready = "1";
}

function fillControls() {
  for (const column of page.root.columns) $("filter-column").append(element("option", { value: column, textContent: column.replace("_id", "") }));
  const has = page.root.encoders.length > 0;
  const available = ({ features, maps }) => (!features || page.root.features.length > 0) && (!maps || page.root.attention.length > 0);
  for (const [i, { name, label, ...needs }] of OVERLAYS.entries()) {
    if (!available(needs)) continue;
    const button = element("button", { textContent: label, title: `${label} (${i + 1})` });
    Object.assign(button.dataset, { overlay: name });
    button.addEventListener("click", () => change({ overlay: name }));
    $("overlays").append(button);
  }
  $("encoders").hidden = !has;
  $("line-b").hidden = page.root.encoders.length < 2;
  $("encoder-b").append(element("option", { value: "", textContent: "none" }));
  for (const name of page.root.encoders) {
    for (const id of ["encoder-a", "encoder-b"]) $(id).append(element("option", { value: name, textContent: name }));
  }
  if (!page.root.encoders.includes(state.a)) state.a = page.root.encoders[0] || "";
  if (!page.root.encoders.includes(state.b)) state.b = "";
  const offered = OVERLAYS.find((one) => one.name === state.overlay);
  if (!offered || !available(offered)) state.overlay = "none";
  $("selection-save").hidden = !page.root.writable;
  fillStates();
  $("filter").addEventListener("input", listSlides);
  $("filter-column").addEventListener("change", listSlides);
  $("opacity").addEventListener("input", () => change({ opacity: $("opacity").value }));
  for (const id of ["regions", "grid"]) $(id).addEventListener("change", () => change({ [id]: $(id).checked ? 1 : 0 }));
  $("encoder-a").addEventListener("change", () => change({ a: $("encoder-a").value, only: "" }));
  $("encoder-b").addEventListener("change", () => change({ b: $("encoder-b").value }));
  $("others").addEventListener("change", () => change({ others: $("others").value }));
  $("home").addEventListener("click", () => page.viewer.viewport.goHome());
  $("zoom-in").addEventListener("click", () => page.viewer.viewport.zoomBy(1.6).applyConstraints());
  $("zoom-out").addEventListener("click", () => page.viewer.viewport.zoomBy(1 / 1.6).applyConstraints());
  $("export").addEventListener("click", exportGeojson);
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input, select")) return;
    const chosen = OVERLAYS[Number(event.key) - 1];
    if (chosen && document.querySelector(`[data-overlay=${chosen.name}]`)) change({ overlay: chosen.name });
    if (event.key === "Escape") setTool("");
  });
}

function fillStates() {
  for (const button of $("overlays").children) button.setAttribute("aria-pressed", button.dataset.overlay === state.overlay);
  $("opacity").value = state.opacity;
  $("regions").checked = state.regions === "1";
  $("grid").checked = state.grid === "1";
  $("encoder-a").value = state.a;
  $("encoder-b").value = state.b;
  $("others").value = state.others;
}

// ------------------------------------------------------------------------------------------------- slides

function listSlides() {
  const wanted = $("filter").value.trim().toLowerCase();
  const column = $("filter-column").value;
  const shown = page.root.slides.filter((one) => !wanted || String(one[column] ?? "").toLowerCase().includes(wanted));
  $("count").textContent = `${shown.length} of ${page.root.slides.length} slides`;
  $("slides").replaceChildren(...shown.map((one) => {
    const about = [one.patient_id && `patient ${one.patient_id}`, one.centre, one.status === "ok" ? `${one.tiles} tiles` : one.status].filter(Boolean);
    const picture = one.readable
      ? element("img", { src: `slides/${encodeURIComponent(one.slide_id)}/thumbnail.jpg`, alt: "", loading: "lazy" })
      : element("span", { className: "blank" });
    const button = element("button", { disabled: !one.readable, title: one.reason || one.slide_id }, picture,
      element("span", {}, element("div", { className: "name", textContent: one.slide_id }), element("div", { className: "about", textContent: one.readable ? about.join(" · ") : "file not found" })));
    button.dataset.slide = one.slide_id;
    button.setAttribute("aria-current", one.slide_id === state.slide);
    button.addEventListener("click", () => change({ slide: one.slide_id, tile: "", view: "" }));
    return element("li", {}, button);
  }));
}

async function open(slideId) {
  if (page.slide && page.slide.slide_id === slideId) return;
  const ticket = ++loading;
  document.body.dataset.overlayReady = "";
  const found = await ask(slidePath(slideId));
  if (ticket !== loading) return;
  const { tiles, width, height } = found;
  page.slide = { ...found, stride: tiles ? strideOf(tiles) : 1, place: new Map() };
  if (tiles) tiles.x.forEach((x, i) => page.slide.place.set(`${x},${tiles.y[i]}`, i));
  [rasters, page.values] = [[], []];
  clearSelection();
  change({ slide: slideId });
  for (const button of document.querySelectorAll("#slides button")) button.setAttribute("aria-current", button.dataset.slide === slideId);
  const { tile_px: tilePx, overlap_px: overlap } = page.root.deep_zoom;
  const base = `slides/${encodeURIComponent(slideId)}/zoom`;
  page.viewer.open({ width, height, tileSize: tilePx, tileOverlap: overlap, getTileUrl: (level, x, y) => `${base}/${level}/${x}_${y}.jpg` });
  page.viewer.addOnceHandler("open", () => { restoreView(); showScale(); showSplit(); });
  await Promise.all([guarded(loadOverlay()), guarded(showTile())]);
}

function react(changed) {
  fillStates();
  if (changed.has("slide")) guarded(open(state.slide));
  if (["overlay", "a", "b", "only", "map"].some((name) => changed.has(name)) || (changed.has("tile") && state.overlay === "similarity")) guarded(loadOverlay());
  if (["tile", "a", "others"].some((name) => changed.has(name)) && !changed.has("slide")) guarded(showTile());
  if (changed.has("by") && tileIndex() >= 0) showNeighbours();
  if (changed.has("names")) showNames();
  else if (changed.has("overlay")) showNumbers();
  if (["b", "split", "overlay"].some((name) => changed.has(name))) showSplit();
  if (page.layer) page.layer.draw();
}

/** Show names of clusters again; the same name is the same colour. */
function showNames() {
  if (document.body.dataset.overlayReady === "clusters") colour(); // else its values are not there
  showLegend();
  showNumbers();
  if (tileIndex() >= 0) showNeighbours();
  page.layer.draw();
}

// -------------------------------------------------------------------------------------------------- view

function rememberView() {
  if (!page.viewer.world.getItemAt(0)) return;
  const item = page.viewer.world.getItemAt(0);
  const centre = item.viewportToImageCoordinates(page.viewer.viewport.getCenter());
  const zoom = item.viewportToImageZoom(page.viewer.viewport.getZoom());
  change({ view: [Math.round(centre.x), Math.round(centre.y), zoom.toPrecision(4)].join(",") });
}

function restoreView() {
  const [x, y, zoom] = state.view.split(",").map(Number);
  if (!(zoom > 0)) return;
  const item = page.viewer.world.getItemAt(0);
  page.viewer.viewport.zoomTo(item.imageToViewportZoom(zoom), null, true);
  page.viewer.viewport.panTo(item.imageToViewportCoordinates(x, y), true);
}

function goTo(x, y, side) {
  const item = page.viewer.world.getItemAt(0);
  page.viewer.viewport.fitBounds(item.imageToViewportRectangle(x - 2 * side, y - 2 * side, 5 * side, 5 * side));
}

function showScale() {
  const place = page.layer.transform();
  $("scale").hidden = !(place && page.slide && page.slide.spacing_um);
  if (!place || !page.slide || !page.slide.spacing_um) return;
  const umPerPx = page.slide.spacing_um / place[0];
  const power = 10 ** Math.floor(Math.log10(umPerPx * 150));
  const length = [5, 2, 1].map((n) => n * power).find((n) => n <= umPerPx * 150);
  const bar = $("scale").firstElementChild;
  bar.style.width = `${length / umPerPx}px`;
  bar.textContent = length >= 1000 ? `${length / 1000} mm` : `${Number(length.toPrecision(2))} µm`;
}

function showSplit() {
  const shown = isCompared();
  $("split").hidden = !shown;
  $("split").style.left = `${100 * state.split}%`;
  $("split").setAttribute("aria-valuenow", Math.round(100 * state.split));
}

const isCompared = () => Boolean(state.b) && Boolean(OVERLAYS.find((one) => one.name === state.overlay && (one.features || one.maps)));

// ----------------------------------------------------------------------------------------------- overlays

async function loadOverlay() {
  const ticket = ++loadOverlay.ticket;
  document.body.dataset.overlayReady = "";
  if (!page.slide) return;
  const shown = page.slide;
  const names = shownEncoders();
  let found = [];
  if (!page.slide.tiles || state.overlay === "none") found = [];
  else if (state.overlay === "tissue") found = [page.slide.tiles.tissue];
  else if (state.overlay === "annotations") found = [page.slide.tiles.annotations];
  else if (state.overlay === "attention") found = await Promise.all(names.map(mapsOf));
  else if (state.overlay !== "similarity" || state.tile) found = await Promise.all(names.map(valuesOf));
  if (state.overlay === "clusters") {
    await Promise.all(names.map(legendOf));
  }
  if (ticket !== loadOverlay.ticket || shown !== page.slide) return;
  page.values = found;
  colour();
  showLegend();
  showNumbers();
  if (page.layer) page.layer.draw();
  document.body.dataset.overlayReady = state.overlay;
}
loadOverlay.ticket = 0;

const shownEncoders = () => (isCompared() ? [state.a, state.b] : [state.a]);

/** Make the pictures of the overlay from its values. */
function colour() {
  const { slide } = page;
  const picture = (one, encoder) => (state.overlay === "attention" ? tiledMap(one, encoder) : raster(slide.tiles, slide.stride, slide.width, slide.height, coloursOf(one, encoder)));
  rasters = page.values.map((one, i) => picture(one, shownEncoders()[i]));
}

function valuesOf(encoder) {
  const query = `encoder=${encodeURIComponent(encoder)}`;
  const path = slidePath(page.slide.slide_id);
  return ask(state.overlay === "similarity" ? `${path}/similarity?${query}&tile=${tileIndex()}` : `${path}/${state.overlay}?${query}`);
}

const mapsOf = (encoder) => ask(`${slidePath(page.slide.slide_id)}/attention?encoder=${encodeURIComponent(encoder)}`);

function tiledMap(about, encoder) {
  const base = `slides/${encodeURIComponent(page.slide.slide_id)}/attention`;
  const address = (channel, key) => `${base}/${channel}/${key}.png?encoder=${encodeURIComponent(encoder)}`;
  return new TiledMap(about, channelOf(about), address, () => page.layer.draw());
}

function overlayContent() {
  if (!page.slide) return null;
  const outlines = [];
  const { slide, region } = page;
  const { tiles } = slide;
  if (tiles && state.grid === "1") outlines.push({ boxes: tiles.x.map((x, i) => [x, tiles.y[i], tiles.step, tiles.step]), colour: "rgba(30,30,30,.55)", line: 1, least: 6 });
  if (state.regions === "1") outlines.push({ boxes: slide.regions, colour: "#005ac8", line: 2 });
  if (region) outlines.push({ boxes: [region], colour: "#ffffff", line: 5 }, { boxes: [region], colour: "#b3006b", line: 3 });
  if (selectionBoxes().length) outlines.push({ boxes: selectionBoxes(), colour: "#ffd400", line: 2 });
  const tile = tileIndex();
  if (tile >= 0) {
    const box = [tiles.x[tile], tiles.y[tile], tiles.step, tiles.step];
    outlines.push({ boxes: [box], colour: "#ffffff", line: 5 }, { boxes: [box], colour: "#111111", line: 2 });
  }
  return { rasters, opacity: Number(state.opacity), split: Number(state.split), outlines, drawn: drawnOutline() };
}

// -------------------------------------------------------------------------------------------------- tiles

function clickAt(position) {
  if (!page.slide || !page.slide.tiles) return;
  const [x, y] = pointAt(position);
  const { tiles, stride } = page.slide;
  const cells = Math.round(tiles.step / stride);
  for (let dy = 0; dy < cells; dy += 1) { // the tile whose upper left cell is nearest
    for (let dx = 0; dx < cells; dx += 1) {
      const place = `${(Math.floor(x / stride) - dx) * stride},${(Math.floor(y / stride) - dy) * stride}`;
      if (page.slide.place.has(place)) return change({ tile: place });
    }
  }
  change({ tile: "" });
}

async function visit(slideId, tile) {
  const other = slideId !== page.slide.slide_id;
  if (other) {
    state.tile = "";
    state.view = "";
    await open(slideId);
  }
  const { tiles } = page.slide;
  const [x, y] = [tiles.x[tile], tiles.y[tile]];
  change({ tile: `${x},${y}` });
  if (!page.viewer.world.getItemAt(0)) await new Promise((done) => { page.viewer.addOnceHandler("open", done); });
  goTo(x, y, tiles.step);
}

// ------------------------------------------------------------------------------------------------- export

function exportGeojson() {
  guarded(writeGeojson());
}

async function writeGeojson() {
  const hasFeatures = page.root.features.includes(state.a);
  const labels = hasFeatures ? (await legendOf(state.a)).map(({ name }) => name) : [];
  const content = await ask(`${slidePath(page.slide.slide_id)}/geojson${hasFeatures ? `?encoder=${encodeURIComponent(state.a)}` : ""}`);
  for (const { properties } of content.features) { // with the names of this page
    const number = labels.indexOf(properties.classification.name);
    if (number < 0) continue;
    if (properties.name === properties.classification.name) properties.name = clusterName(number);
    properties.classification = { ...properties.classification, name: clusterName(number) };
  }
  download(content, `${page.slide.slide_id}.geojson`);
}

guarded(start());
