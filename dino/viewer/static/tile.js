// The selected tile: its numbers, the tiles most similar to it, and what models look at in it and in its region.
import { ask, change, regionPicture, slidePath, state, tilePicture } from "./state.js";
import { heatmap } from "./overlay.js";
import { $, element, guarded, note, page, tileGrid, tileIndex } from "./page.js";
import { clusterName, legendOf } from "./names.js";

const AGAIN_MS = 2000; // until a model that is being loaded is asked again

let neighbours = []; // of the selected tile
let word = null; // its word, if there are words

export async function showTile() {
  const { root, slide } = page;
  const tile = tileIndex();
  const ticket = ++showTile.ticket;
  $("tile").hidden = tile < 0;
  showRegionBox(null);
  if (tile < 0) return;
  $("tile-picture").src = tilePicture(slide.slide_id, tile);
  word = null;
  showNumbers();
  const known = root.features.includes(state.a);
  $("neighbours-part").hidden = !known;
  guarded(showTileAttention(tile, ticket));
  guarded(showRegionAttention(tile, ticket));
  if (!known) return;
  const found = await ask(`${slidePath(slide.slide_id)}/neighbours/${tile}?encoder=${encodeURIComponent(state.a)}&others=${state.others}&count=16`);
  if (found.word !== null) await legendOf(state.a); // the names
  if (ticket !== showTile.ticket) return;
  ({ neighbours, word } = found);
  showNumbers();
  showNeighbours();
}
showTile.ticket = 0;

function numbersOf(tile) {
  const { slide, values } = page;
  const { tiles } = slide;
  const um = slide.spacing_um ? ` (${Math.round(tiles.step * slide.spacing_um)} µm)` : "";
  const rows = [["x, y", state.tile.replace(",", ", ")], ["side", `${tiles.step} px${um}`], ["tissue", `${Math.round(100 * tiles.tissue[tile])} %`]];
  if (tiles.annotations[tile]) rows.push(["annotation", tiles.annotations[tile]]);
  const found = values[0] && values[0][tile];
  if (word !== null) rows.push(["word", clusterName(word)]);
  else if (state.overlay === "clusters" && found >= 0) rows.push(["cluster", clusterName(found)]);
  if (state.overlay === "similarity" && typeof found === "number") rows.push(["similarity", found.toFixed(3)]);
  return rows;
}

export function showNumbers() {
  const tile = tileIndex();
  if (tile < 0) return;
  $("tile-numbers").replaceChildren(...numbersOf(tile).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}

// --------------------------------------------------------------------------------------------- neighbours

export function showNeighbours() {
  const framed = compared().includes(state.by);
  const describe = (one) => ({
    title: Number.isInteger(one.word) ? clusterName(one.word) : "",
    frame: framed && (isShared(state.by, one) ? "same" : "other"),
  });
  $("neighbours").replaceChildren(...(neighbours.length ? tileGrid(neighbours, describe).children : [note("No tiles of other patients.")]));
  showShared();
}

const slideRow = (slideId) => page.root.slides.find((one) => one.slide_id === slideId);

/** What a tile has in a column: of its slide, or its own annotation or word. */
function cellOf(column, slideId, own) {
  if (column === "annotation") return own.annotation;
  if (column === "word") return Number.isInteger(own.word) ? clusterName(own.word) : "";
  return String(slideRow(slideId)[column] ?? "");
}

const ownCell = (column) => cellOf(column, page.slide.slide_id, { annotation: page.slide.tiles.annotations[tileIndex()] ?? "", word });

/** Columns in which the neighbours of the selected tile can agree with it: it has a value, and not all slides the same. */
const compared = () => (tileIndex() < 0 ? [] : [...page.root.compared, "annotation", "word"].filter((column) => ownCell(column)
  && (["annotation", "word"].includes(column) || new Set(page.root.slides.map((one) => String(one[column] ?? "")).filter(Boolean)).size > 1)));

const isShared = (column, one) => cellOf(column, one.slide_id, one) === ownCell(column);

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

// ---------------------------------------------------------------------------------------------- attention

/** The attention of the level-1 model over the tile, if the viewer was given the run. */
async function showTileAttention(tile, ticket) {
  $("attention-part").hidden = true;
  if (!page.root.models.includes(state.a)) return;
  const found = await ask(`${slidePath(page.slide.slide_id)}/attention/${tile}?encoder=${encodeURIComponent(state.a)}`);
  if (ticket !== showTile.ticket) return;
  $("attention-part").hidden = false;
  if (found) $("attention-maps").replaceChildren(...figures(found, "Attention over the tile"));
  else {
    $("attention-maps").replaceChildren(note("The model is being loaded."));
    askAgain(showTileAttention, tile, ticket);
  }
}

/** The attention of level 2 over the region that contains the tile, of the run or of the maps that are there. */
async function showRegionAttention(tile, ticket) {
  $("region-part").hidden = true;
  if (!page.slide.regions.length) return;
  let [found, problem] = [null, ""];
  try {
    found = await ask(`${slidePath(page.slide.slide_id)}/attention/${tile}/region?encoder=${encodeURIComponent(state.a)}`);
  } catch (error) {
    problem = error.message;
  }
  if (ticket !== showTile.ticket) return;
  $("region-part").hidden = false;
  $("region-row").hidden = !(found && found.maps);
  $("region-maps").replaceChildren();
  $("region-note").textContent = problem || regionNote(found);
  if (found && found.loading) askAgain(showRegionAttention, tile, ticket);
  if (!found || !found.maps) return;
  $("region-picture").src = regionPicture(page.slide.slide_id, found.region);
  const [mean, ...heads] = figures(found, "Attention over the region", found.cell);
  $("region-mean").replaceChildren(mean);
  $("region-maps").replaceChildren(...heads);
  showRegionBox(found.box);
}

function regionNote(found) {
  if (!found) return "This tile is in no region.";
  if (found.loading) return "The level-2 model is being loaded.";
  if (found.maps) return found.computed ? "" : "From the maps of dino attention: means over all regions that were mapped.";
  return `To see it, pass a level-2 run of these features too: dino view ${page.root.name} RUN LEVEL2_RUN`;
}

function showRegionBox(box) {
  page.region = box;
  if (page.layer) page.layer.draw();
}

function askAgain(show, tile, ticket) {
  setTimeout(() => { if (ticket === showTile.ticket) guarded(show(tile, ticket)); }, AGAIN_MS);
}

/** Maps of all heads, the mean first; the outline of a cell is [column, row]. */
function figures({ maps, side }, label, cell = null) {
  return maps.map((map, i) => {
    const canvas = heatmap(map, side);
    canvas.title = i ? `head ${i}` : "mean over heads";
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${label}, ${canvas.title}`);
    const picture = element("div", { className: "map" }, canvas);
    if (cell) picture.append(cellMark(cell, side, map.length / side));
    return element("figure", {}, picture, element("figcaption", { textContent: i ? i : "mean" }));
  });
}

function cellMark([column, row], columns, rows) {
  const mark = element("span", { className: "mark" });
  Object.assign(mark.style, { left: `${(100 * column) / columns}%`, top: `${(100 * row) / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%` });
  return mark;
}
