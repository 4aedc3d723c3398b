import { ask, change, forgetToken, onChange, read, slidePath, state, tilePicture } from "./state.js";
import { TiledMap } from "./maps.js";
import { Layer, css, heatmap, inside, raster, strideOf, viridis } from "./overlay.js";

const OVERLAYS = [
  { name: "none", label: "none" },
  { name: "tissue", label: "tissue" },
  { name: "annotations", label: "annotations" },
  { name: "clusters", label: "clusters", features: true },
  { name: "colours", label: "PCA colours", features: true },
  { name: "similarity", label: "similarity", features: true },
  { name: "attention", label: "attention", maps: true },
];
const CLASS_COLOURS = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [240, 228, 66], [86, 180, 233], [213, 94, 0], [204, 121, 167]];

const $ = (id) => document.getElementById(id);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};

let root = null; // what api/root answered
let slide = null; // what the shown slide's address answered, with its stride
let rasters = []; // of the overlay: one, or A and B
let values = []; // of the overlay, per encoder, in the order of tiles
let legend = {}; // clusters by encoder
let selected = new Set(); // tiles of the selection
let selectionBoxes = [];
let neighbours = []; // of the selected tile
let drawn = []; // corners of the rectangle or lasso that is being drawn, level-0 px
let tool = "";
let viewer = null;
let layer = null;
let loading = 0; // counts what was asked for, so that late answers are dropped

// ------------------------------------------------------------------------------------------------- start

async function start() {
  forgetToken();
  read();
  root = await ask("api/root");
  document.title = `${root.name} - slides`;
  $("root-name").textContent = root.name;
  fillControls();
  viewer = OpenSeadragon({
    id: "zoom", drawer: "canvas", showNavigationControl: false, showNavigator: true, navigatorPosition: "BOTTOM_RIGHT",
    navigatorSizeRatio: 0.16, navigatorBackground: "transparent", navigatorBorderColor: "#8a8f99", navigatorDisplayRegionColor: "#0b63c5", navigatorAutoFade: false, animationTime: 0.5, maxZoomPixelRatio: 8, visibilityRatio: 0.3, gestureSettingsMouse: { clickToZoom: false },
    imageLoaderLimit: 6, timeout: 60000, keyboardNavEnabled: true,
  });
  layer = new Layer(viewer, overlayContent);
  viewer.addHandler("canvas-click", (event) => { if (event.quick && !tool) clickAt(event.position); });
  viewer.addHandler("update-viewport", showScale);
  viewer.addHandler("animation-finish", rememberView);
  viewer.addHandler("resize", showSplit);
  viewer.addHandler("tile-load-failed", () => say("a part of the slide could not be read"));
  addTools();
  listSlides();
  const readable = root.slides.filter((one) => one.readable);
  const first = readable.find((one) => one.slide_id === state.slide) || readable.find((one) => one.tiles) || readable[0];
  onChange(react);
  addEventListener("hashchange", () => { read(); fillStates(); open(state.slide); });
  if (first) await open(first.slide_id);
  document.body.dataset.ready = "1";
}

function fillControls() {
  for (const column of root.columns) $("filter-column").append(element("option", { value: column, textContent: column.replace("_id", "") }));
  const has = root.encoders.length > 0;
  const available = ({ features, maps }) => (!features || root.features.length > 0) && (!maps || root.attention.length > 0);
  for (const [i, { name, label, ...needs }] of OVERLAYS.entries()) {
    if (!available(needs)) continue;
    const button = element("button", { textContent: label, title: `${label} (${i + 1})` });
    Object.assign(button.dataset, { overlay: name });
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => change({ overlay: name }));
    $("overlays").append(button);
  }
  $("encoders").hidden = !has;
  $("line-b").hidden = root.encoders.length < 2;
  $("encoder-b").append(element("option", { value: "", textContent: "none" }));
  for (const name of root.encoders) {
    for (const id of ["encoder-a", "encoder-b"]) $(id).append(element("option", { value: name, textContent: name }));
  }
  if (!root.encoders.includes(state.a)) state.a = root.encoders[0] || "";
  if (!root.encoders.includes(state.b)) state.b = "";
  const offered = OVERLAYS.find((one) => one.name === state.overlay);
  if (!offered || !available(offered)) state.overlay = "none";
  $("selection-save").hidden = !root.writable;
  fillStates();
  $("filter").addEventListener("input", listSlides);
  $("filter-column").addEventListener("change", listSlides);
  $("opacity").addEventListener("input", () => change({ opacity: $("opacity").value }));
  for (const id of ["regions", "grid"]) $(id).addEventListener("change", () => change({ [id]: $(id).checked ? 1 : 0 }));
  $("encoder-a").addEventListener("change", () => change({ a: $("encoder-a").value, only: "" }));
  $("encoder-b").addEventListener("change", () => change({ b: $("encoder-b").value }));
  $("others").addEventListener("change", () => change({ others: $("others").value }));
  $("home").addEventListener("click", () => viewer.viewport.goHome());
  $("zoom-in").addEventListener("click", () => viewer.viewport.zoomBy(1.6).applyConstraints());
  $("zoom-out").addEventListener("click", () => viewer.viewport.zoomBy(1 / 1.6).applyConstraints());
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
  for (const button of $("overlays").children) button.setAttribute("aria-checked", button.dataset.overlay === state.overlay);
  $("opacity").value = state.opacity;
  $("regions").checked = state.regions === "1";
  $("grid").checked = state.grid === "1";
  $("encoder-a").value = state.a;
  $("encoder-b").value = state.b;
  $("others").value = state.others;
}

function say(message, good = false) {
  $("message").textContent = message;
  $("message").classList.toggle("good", good);
  $("message").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("message").hidden = true; }, 6000);
}

const guarded = (work) => work.catch((error) => say(error.message));

// ------------------------------------------------------------------------------------------------- slides

function listSlides() {
  const wanted = $("filter").value.trim().toLowerCase();
  const column = $("filter-column").value;
  const shown = root.slides.filter((one) => !wanted || String(one[column] ?? "").toLowerCase().includes(wanted));
  $("count").textContent = `${shown.length} of ${root.slides.length} slides`;
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
  if (slide && slide.slide_id === slideId) return;
  const ticket = ++loading;
  document.body.dataset.overlayReady = "";
  const found = await ask(slidePath(slideId));
  if (ticket !== loading) return;
  slide = found;
  slide.stride = slide.tiles ? strideOf(slide.tiles) : 1;
  slide.place = new Map();
  if (slide.tiles) slide.tiles.x.forEach((x, i) => slide.place.set(`${x},${slide.tiles.y[i]}`, i));
  [rasters, values] = [[], []];
  clearSelection();
  change({ slide: slideId });
  for (const button of document.querySelectorAll("#slides button")) button.setAttribute("aria-current", button.dataset.slide === slideId);
  const { tile_px: tilePx, overlap_px: overlap } = root.deep_zoom;
  const base = `slides/${encodeURIComponent(slideId)}/zoom`;
  viewer.open({ width: slide.width, height: slide.height, tileSize: tilePx, tileOverlap: overlap, getTileUrl: (level, x, y) => `${base}/${level}/${x}_${y}.jpg` });
  viewer.addOnceHandler("open", () => { restoreView(); showScale(); showSplit(); });
  await Promise.all([guarded(loadOverlay()), guarded(showTile())]);
}

function react(changed) {
  fillStates();
  if (changed.has("slide")) guarded(open(state.slide));
  if (["overlay", "a", "b", "only", "map"].some((name) => changed.has(name)) || (changed.has("tile") && state.overlay === "similarity")) guarded(loadOverlay());
  if (["tile", "a", "others"].some((name) => changed.has(name)) && !changed.has("slide")) guarded(showTile());
  if (changed.has("by") && tileIndex() >= 0) showNeighbours();
  if (changed.has("names")) showLegend();
  if (changed.has("names") || changed.has("overlay")) showNumbers();
  if (["b", "split", "overlay"].some((name) => changed.has(name))) showSplit();
  if (layer) layer.draw();
}

// -------------------------------------------------------------------------------------------------- view

function rememberView() {
  if (!viewer.world.getItemAt(0)) return;
  const item = viewer.world.getItemAt(0);
  const centre = item.viewportToImageCoordinates(viewer.viewport.getCenter());
  const zoom = item.viewportToImageZoom(viewer.viewport.getZoom());
  change({ view: [Math.round(centre.x), Math.round(centre.y), zoom.toPrecision(4)].join(",") });
}

function restoreView() {
  const [x, y, zoom] = state.view.split(",").map(Number);
  if (!(zoom > 0)) return;
  const item = viewer.world.getItemAt(0);
  viewer.viewport.zoomTo(item.imageToViewportZoom(zoom), null, true);
  viewer.viewport.panTo(item.imageToViewportCoordinates(x, y), true);
}

export function goTo(x, y, side) {
  const item = viewer.world.getItemAt(0);
  viewer.viewport.fitBounds(item.imageToViewportRectangle(x - 2 * side, y - 2 * side, 5 * side, 5 * side));
}

function showScale() {
  const place = layer.transform();
  $("scale").hidden = !(place && slide && slide.spacing_um);
  if (!place || !slide || !slide.spacing_um) return;
  const umPerPx = slide.spacing_um / place[0];
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
  if (!slide) return;
  const shown = slide;
  const names = isCompared() ? [state.a, state.b] : [state.a];
  let found = [];
  if (!slide.tiles || state.overlay === "none") found = [];
  else if (state.overlay === "tissue") found = [slide.tiles.tissue];
  else if (state.overlay === "annotations") found = [slide.tiles.annotations];
  else if (state.overlay === "attention") found = await Promise.all(names.map(mapsOf));
  else if (state.overlay !== "similarity" || state.tile) found = await Promise.all(names.map(valuesOf));
  if (state.overlay === "clusters") {
    await Promise.all(names.map(legendOf));
  }
  if (ticket !== loadOverlay.ticket || shown !== slide) return;
  values = found;
  rasters = found.map((one, i) => state.overlay === "attention" ? tiledMap(one, names[i]) : raster(slide.tiles, slide.stride, slide.width, slide.height, coloursOf(one, names[i])));
  showLegend();
  showNumbers();
  if (layer) layer.draw();
  document.body.dataset.overlayReady = state.overlay;
}
loadOverlay.ticket = 0;

function valuesOf(encoder) {
  const query = `encoder=${encodeURIComponent(encoder)}`;
  const path = slidePath(slide.slide_id);
  return ask(state.overlay === "similarity" ? `${path}/similarity?${query}&tile=${tileIndex()}` : `${path}/${state.overlay}?${query}`);
}

const mapsOf = (encoder) => ask(`${slidePath(slide.slide_id)}/attention?encoder=${encodeURIComponent(encoder)}`);

const channelOf = (about) => Math.max(0, about.channels.findIndex((one) => one.name === state.map));

function tiledMap(about, encoder) {
  const base = `slides/${encodeURIComponent(slide.slide_id)}/attention`;
  const address = (channel, key) => `${base}/${channel}/${key}.png?encoder=${encodeURIComponent(encoder)}`;
  return new TiledMap(about, channelOf(about), address, () => layer.draw());
}

function showMaps(box) {
  const [{ channels }] = values;
  const choice = element("select", {}, ...channels.map(({ name }) => element("option", { value: name, textContent: channelLabel(name) })));
  choice.setAttribute("aria-label", "Map");
  choice.value = channels[channelOf(values[0])].name;
  choice.addEventListener("change", () => change({ map: choice.value }));
  const { low, high } = channels[channelOf(values[0])];
  box.append(choice, ...scaleBar(low.toFixed(2), high.toFixed(2)), note("times uniform attention"));
  for (const models of new Set(values.map((one) => one.made_by))) box.append(note(`Maps of ${models}`));
}

const channelLabel = (name) => name.replace(/^tile x region$/, "product of both levels").replace(/^tile/, "level 1").replace(/^region/, "level 2");

function coloursOf(found, encoder) {
  if (state.overlay === "colours") return found;
  if (state.overlay === "tissue") return found.map(viridis);
  if (state.overlay === "similarity") {
    const [low, high] = rangeOf(found);
    return found.map((v) => (v === null ? null : viridis((v - low) / (high - low || 1))));
  }
  if (state.overlay === "annotations") {
    const names = annotationNames();
    return found.map((name) => (name ? CLASS_COLOURS[names.indexOf(name) % CLASS_COLOURS.length] : null));
  }
  const isA = encoder === state.a;
  return found.map((v) => (v < 0 || (isA && state.only !== "" && Number(state.only) !== v) ? null : legend[encoder][v].colour));
}

const annotationNames = () => [...new Set(slide.tiles.annotations.filter(Boolean))].sort();

/** From the lowest value to the highest one but the clicked tile itself, which is 1. */
function rangeOf(found) {
  const known = found.filter((v) => v !== null).sort((a, b) => a - b);
  return known.length ? [known[0], known[Math.max(0, known.length - 2)]] : [0, 1];
}

function overlayContent() {
  if (!slide) return null;
  const outlines = [];
  const { tiles } = slide;
  if (tiles && state.grid === "1") outlines.push({ boxes: tiles.x.map((x, i) => [x, tiles.y[i], tiles.step, tiles.step]), colour: "rgba(30,30,30,.55)", line: 1, least: 6 });
  if (state.regions === "1") outlines.push({ boxes: slide.regions, colour: "#005ac8", line: 2 });
  if (selectionBoxes.length) outlines.push({ boxes: selectionBoxes, colour: "#ffd400", line: 2 });
  const tile = tileIndex();
  if (tile >= 0) {
    const box = [tiles.x[tile], tiles.y[tile], tiles.step, tiles.step];
    outlines.push({ boxes: [box], colour: "#ffffff", line: 5 }, { boxes: [box], colour: "#111111", line: 2 });
  }
  return { rasters, opacity: Number(state.opacity), split: Number(state.split), outlines, drawn };
}

function showLegend() {
  const box = $("legend");
  box.replaceChildren();
  const title = { tissue: "Tissue of a tile", annotations: "Annotations", clusters: "Clusters", colours: "PCA colours", similarity: "Similarity to the selected tile", attention: "Attention of the cls token" }[state.overlay];
  $("legend-section").hidden = !title;
  $("legend-title").textContent = title || "";
  if (state.overlay === "tissue") box.append(...scaleBar("0 %", "100 %"));
  if (state.overlay === "colours") box.append(note("Red, green and blue are the first three principal components, the same for all slides: similar colours are similar tiles."));
  if (state.overlay === "similarity") {
    if (!values.length) box.append(note("Click a tile."));
    else box.append(...scaleBar(...rangeOf(values[0]).map((v) => v.toFixed(2))), note("cosine similarity"));
  }
  if (state.overlay === "annotations") {
    const names = slide.tiles ? annotationNames() : [];
    if (!names.length) box.append(note("The tiles of this slide have no annotations."));
    for (const [i, name] of names.entries()) {
      box.append(classRow(CLASS_COLOURS[i % CLASS_COLOURS.length], name, values[0].filter((v) => v === name).length));
    }
  }
  if (state.overlay === "attention" && values.length) showMaps(box);
  if (state.overlay === "clusters" && values.length) showClusters(box);
}

function showClusters(box) {
  const counts = new Map();
  for (const v of values[0]) counts.set(v, (counts.get(v) || 0) + 1);
  for (const [i, { colour, examples }] of legend[state.a].entries()) {
    const button = classRow(colour, clusterName(i), counts.get(i) || 0, "button");
    button.setAttribute("aria-pressed", state.only === String(i));
    button.title = "show this cluster alone, with typical tiles";
    button.addEventListener("click", () => change({ only: state.only === String(i) ? "" : i }));
    box.append(button);
    if (state.only !== String(i)) continue;
    const name = element("input", { type: "text", maxLength: 60, value: namesOf(state.a)[i] || "", placeholder: "what is it? for example keratin" });
    name.setAttribute("aria-label", `Name of cluster ${i + 1}`);
    name.addEventListener("change", () => nameCluster(i, name.value.trim()));
    box.append(element("div", { className: "line" }, name), tileGrid(examples.map(([slideId, tile]) => ({ slide_id: slideId, tile }))));
  }
}

// Names of clusters are part of the address: {encoder: {cluster: name}}.
function allNames() {
  try {
    const found = JSON.parse(state.names || "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

const namesOf = (encoder) => allNames()[encoder] || {};
const clusterName = (i) => namesOf(state.a)[i] || legend[state.a]?.[i]?.name || `Cluster ${i + 1}`; // of this page, or of words.csv

// Name, colour and typical tiles of the clusters of an encoder.
async function legendOf(encoder) {
  legend[encoder] ??= await ask(`api/legend?encoder=${encodeURIComponent(encoder)}`);
  return legend[encoder];
}

function nameCluster(i, name) {
  const names = { ...namesOf(state.a), [i]: name };
  if (!name) delete names[i];
  change({ names: JSON.stringify({ ...allNames(), [state.a]: names }) });
}

const note = (text) => element("p", { className: "quiet", textContent: text });

function classRow(colour, name, count, tag = "div") {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = css(colour);
  return element(tag, { className: "class" }, swatch, element("span", { textContent: name }), element("span", { className: "quiet", textContent: count }));
}

function scaleBar(low, high) {
  const bar = element("div", { className: "scale" });
  bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((t) => css(viridis(t))).join(", ")})`;
  return [bar, element("div", { className: "ends" }, element("span", { textContent: low }), element("span", { textContent: high }))];
}

// -------------------------------------------------------------------------------------------------- tiles

const tileIndex = () => (slide && state.tile && slide.place.has(state.tile) ? slide.place.get(state.tile) : -1);

function pointAt(position) {
  const [scale, left, top] = layer.transform();
  return [(position.x - left) / scale, (position.y - top) / scale];
}

function clickAt(position) {
  if (!slide || !slide.tiles) return;
  const [x, y] = pointAt(position);
  const { tiles, stride } = slide;
  const cells = Math.round(tiles.step / stride);
  for (let dy = 0; dy < cells; dy += 1) { // the tile whose upper left cell is nearest
    for (let dx = 0; dx < cells; dx += 1) {
      const place = `${(Math.floor(x / stride) - dx) * stride},${(Math.floor(y / stride) - dy) * stride}`;
      if (slide.place.has(place)) return change({ tile: place });
    }
  }
  change({ tile: "" });
}

function numbersOf(tile) {
  const { tiles } = slide;
  const um = slide.spacing_um ? ` (${Math.round(tiles.step * slide.spacing_um)} µm)` : "";
  const rows = [["x, y", state.tile.replace(",", ", ")], ["side", `${tiles.step} px${um}`], ["tissue", `${Math.round(100 * tiles.tissue[tile])} %`]];
  if (tiles.annotations[tile]) rows.push(["annotation", tiles.annotations[tile]]);
  const found = values[0] && values[0][tile];
  if (state.overlay === "clusters" && found >= 0) rows.push(["cluster", clusterName(found)]);
  if (state.overlay === "similarity" && typeof found === "number") rows.push(["similarity", found.toFixed(3)]);
  return rows;
}

function showNumbers() {
  const tile = tileIndex();
  if (tile < 0) return;
  $("tile-numbers").replaceChildren(...numbersOf(tile).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}

async function showTile() {
  const tile = tileIndex();
  $("tile").hidden = tile < 0;
  if (tile < 0) return;
  $("tile-picture").src = tilePicture(slide.slide_id, tile);
  showNumbers();
  const known = root.features.includes(state.a);
  $("neighbours-part").hidden = !known;
  const ticket = ++showTile.ticket;
  guarded(showTileAttention(tile, ticket));
  if (!known) return;
  const found = await ask(`${slidePath(slide.slide_id)}/neighbours/${tile}?encoder=${encodeURIComponent(state.a)}&others=${state.others}&count=16`);
  if (ticket !== showTile.ticket) return;
  neighbours = found;
  showNeighbours();
}
showTile.ticket = 0;

function showNeighbours() {
  const alike = (one) => (compared().includes(state.by) ? isShared(state.by, one) : null);
  $("neighbours").replaceChildren(...(neighbours.length ? tileGrid(neighbours, alike).children : [note("No tiles of other patients.")]));
  showShared();
}

const slideRow = (slideId) => root.slides.find((one) => one.slide_id === slideId);

/** What a tile has in a column: of its slide, or its own annotation. */
const cellOf = (column, slideId, annotation) => (column === "annotation" ? annotation : String(slideRow(slideId)[column] ?? ""));

const ownCell = (column) => cellOf(column, slide.slide_id, slide.tiles.annotations[tileIndex()] ?? "");

/** Columns in which the neighbours of the selected tile can agree with it: it has a value, and not all slides the same. */
const compared = () => (tileIndex() < 0 ? [] : [...root.compared, "annotation"].filter((column) => ownCell(column)
  && (column === "annotation" || new Set(root.slides.map((one) => String(one[column] ?? "")).filter(Boolean)).size > 1)));

const isShared = (column, one) => cellOf(column, one.slide_id, one.annotation) === ownCell(column);

/** How many neighbours share centre, scanner, … with the tile: features of a robust encoder are not alike by these. */
function showShared() {
  const rows = neighbours.length ? compared().map((column) => {
    const count = neighbours.filter((one) => isShared(column, one)).length;
    const button = element("button", { className: "class", title: `frames: same or other ${column}` }, element("span", { textContent: column.replace("_id", "") }), element("span", { className: "quiet", textContent: `${count} of ${neighbours.length} the same (${ownCell(column)})` }));
    button.setAttribute("aria-pressed", state.by === column);
    button.addEventListener("click", () => change({ by: state.by === column ? "" : column }));
    return button;
  }) : [];
  if (compared().includes(state.by) && neighbours.length) rows.push(note(`Frames: orange has the same ${state.by.replace("_id", "")}, blue another one.`));
  $("shared").replaceChildren(...rows);
}

/** The attention of the model itself over the tile, if the viewer was given the run. */
async function showTileAttention(tile, ticket) {
  $("attention-part").hidden = true;
  if (!root.models.includes(state.a)) return;
  const found = await ask(`${slidePath(slide.slide_id)}/attention/${tile}?encoder=${encodeURIComponent(state.a)}`);
  if (ticket !== showTile.ticket) return;
  $("attention-part").hidden = false;
  if (!found) {
    $("attention-maps").replaceChildren(note("The model is being loaded."));
    setTimeout(() => { if (ticket === showTile.ticket) guarded(showTileAttention(tile, ticket)); }, 2000);
    return;
  }
  $("attention-maps").replaceChildren(...found.maps.map((map, i) => {
    const canvas = heatmap(map, found.side);
    canvas.title = i ? `head ${i}` : "mean over heads";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Attention, ${canvas.title}`);
    return element("figure", {}, canvas, element("figcaption", { textContent: i ? i : "mean" }));
  }));
}

function tileGrid(found, alike = () => null) {
  return element("div", { className: "tiles" }, ...found.map((one) => {
    const { slide_id: slideId, tile, similarity } = one;
    const button = element("button", { title: `${slideId}${one.patient_id ? `, patient ${one.patient_id}` : ""}` }, element("img", { src: tilePicture(slideId, tile), alt: `tile of ${slideId}`, loading: "lazy" }));
    if (similarity !== undefined) button.append(element("span", { className: "number", textContent: similarity.toFixed(2) }));
    button.addEventListener("click", () => guarded(visit(slideId, tile)));
    const same = alike(one);
    if (same !== null) button.classList.add(same ? "same" : "other");
    return button;
  }));
}

async function visit(slideId, tile) {
  const other = slideId !== slide.slide_id;
  if (other) {
    state.tile = "";
    state.view = "";
    await open(slideId);
  }
  const { tiles } = slide;
  const [x, y] = [tiles.x[tile], tiles.y[tile]];
  change({ tile: `${x},${y}` });
  if (!viewer.world.getItemAt(0)) await new Promise((done) => { viewer.addOnceHandler("open", done); });
  goTo(x, y, tiles.step);
}

// ---------------------------------------------------------------------------------------------- selection

function setTool(name) {
  tool = tool === name ? "" : name;
  for (const id of ["rectangle", "lasso"]) $(id).setAttribute("aria-pressed", tool === id);
  viewer.setMouseNavEnabled(!tool);
  $("zoom").style.cursor = tool ? "crosshair" : "";
}

function addTools() {
  const place = $("zoom");
  for (const id of ["rectangle", "lasso"]) $(id).addEventListener("click", () => setTool(id));
  const at = (event) => {
    const box = place.getBoundingClientRect();
    return pointAt({ x: event.clientX - box.left, y: event.clientY - box.top });
  };
  place.addEventListener("pointerdown", (event) => { if (tool && slide) { drawn = [at(event)]; event.preventDefault(); } }, true);
  place.addEventListener("pointermove", (event) => {
    if (!tool || !drawn.length) return;
    const [[x, y], [right, bottom]] = [drawn[0], at(event)];
    drawn = tool === "lasso" ? [...drawn, [right, bottom]] : [[x, y], [right, y], [right, bottom], [x, bottom]];
    layer.draw();
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
  const { tiles } = slide;
  if (tiles && drawn.length > 2) {
    tiles.x.forEach((x, i) => { if (inside([x + tiles.step / 2, tiles.y[i] + tiles.step / 2], drawn)) selected.add(i); });
  }
  drawn = [];
  showSelection();
}

function clearSelection() {
  selected = new Set();
  showSelection();
}

function showSelection() {
  selectionBoxes = slide && slide.tiles ? [...selected].map((i) => [slide.tiles.x[i], slide.tiles.y[i], slide.tiles.step, slide.tiles.step]) : [];
  $("selection").hidden = !selected.size;
  $("selection-count").textContent = `${selected.size} ${selected.size === 1 ? "tile" : "tiles"}`;
  if (layer) layer.draw();
}

function download(content, name) {
  const link = element("a", { href: URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/geo+json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const selectionName = () => $("selection-name").value.trim() || "selection";

function downloadSelection() {
  const classification = { name: selectionName(), color: [255, 200, 0] };
  const features = selectionBoxes.map(([x, y, w, h]) => ({
    type: "Feature",
    geometry: { type: "Polygon", coordinates: [[[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]] },
    properties: { objectType: "tile", name: `${x}, ${y}`, classification },
  }));
  download({ type: "FeatureCollection", features }, `${slide.slide_id} ${selectionName()}.geojson`);
}

async function saveSelection() {
  const body = JSON.stringify({ name: selectionName(), tiles: [...selected] });
  const { saved } = await ask(`${slidePath(slide.slide_id)}/selections`, { method: "POST", headers: { "content-type": "application/json" }, body });
  say(`saved in annotations/${saved}`, true);
}

function exportGeojson() {
  guarded(writeGeojson());
}

async function writeGeojson() {
  const hasFeatures = root.features.includes(state.a);
  const labels = hasFeatures ? (await legendOf(state.a)).map(({ name }) => name) : [];
  const content = await ask(`${slidePath(slide.slide_id)}/geojson${hasFeatures ? `?encoder=${encodeURIComponent(state.a)}` : ""}`);
  for (const { properties } of content.features) { // with the names of this page
    const number = labels.indexOf(properties.classification.name);
    if (number < 0) continue;
    if (properties.name === properties.classification.name) properties.name = clusterName(number);
    properties.classification = { ...properties.classification, name: clusterName(number) };
  }
  download(content, `${slide.slide_id}.geojson`);
}

guarded(start());
