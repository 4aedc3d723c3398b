// Colours of the overlays, and the legend that explains them.
import { change, state } from "./state.js";
import { viridis } from "./overlay.js";
import { $, classRow, element, guarded, note, page, scaleBar, tileGrid } from "./page.js";
import { clusterName, isSaved, isWords, knownLegend, nameCluster, nameInField, nameOf } from "./names.js";

export const OVERLAYS = [
  { name: "none", label: "none" },
  { name: "tissue", label: "tissue" },
  { name: "annotations", label: "annotations" },
  { name: "clusters", label: "clusters", features: true },
  { name: "colours", label: "PCA colours", features: true },
  { name: "similarity", label: "similarity", features: true },
  { name: "attention", label: "attention", maps: true },
];
const CLASS_COLOURS = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [240, 228, 66], [86, 180, 233], [213, 94, 0], [204, 121, 167]];
const MAX_NAME = 100; // characters, as the server has it

export function coloursOf(found, encoder) {
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
  const [isA, clusters] = [encoder === state.a, knownLegend(encoder)];
  return found.map((v) => (v < 0 || (isA && state.only !== "" && Number(state.only) !== v) ? null : clusters[v].colour));
}

const annotationNames = () => [...new Set(page.slide.tiles.annotations.filter(Boolean))].sort();

/** From the lowest value to the highest one but the clicked tile itself, which is 1. */
function rangeOf(found) {
  const known = found.filter((v) => v !== null).sort((a, b) => a - b);
  return known.length ? [known[0], known[Math.max(0, known.length - 2)]] : [0, 1];
}

/** Which channel of an encoder's maps is shown. */
export const channelOf = (about) => Math.max(0, about.channels.findIndex((one) => one.name === state.map));

export function showLegend() {
  const { slide, values } = page;
  const box = $("legend");
  const typing = box.contains(document.activeElement) && document.activeElement.matches("input");
  const title = { tissue: "Tissue of a tile", annotations: "Annotations", clusters: isWords() ? "Words" : "Clusters", colours: "PCA colours", similarity: "Similarity to the selected tile", attention: "Attention of the cls token" }[state.overlay];
  box.replaceChildren();
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
  if (typing) box.querySelector("input")?.focus();
}

function showMaps(box) {
  const [{ channels }] = page.values;
  const choice = element("select", {}, ...channels.map(({ name }) => element("option", { value: name, textContent: channelLabel(name) })));
  choice.setAttribute("aria-label", "Map");
  choice.value = channels[channelOf(page.values[0])].name;
  choice.addEventListener("change", () => change({ map: choice.value }));
  const { low, high } = channels[channelOf(page.values[0])];
  box.append(choice, ...scaleBar(low.toFixed(2), high.toFixed(2)), note("times uniform attention"));
  for (const models of new Set(page.values.map((one) => one.made_by))) box.append(note(`Maps of ${models}`));
}

const channelLabel = (name) => name.replace(/^tile x region$/, "product of both levels").replace(/^tile/, "level 1").replace(/^region/, "level 2");

function showClusters(box) {
  const counts = new Map();
  for (const v of page.values[0]) counts.set(v, (counts.get(v) || 0) + 1);
  for (const [i, { colour, examples }] of knownLegend(state.a).entries()) {
    const button = classRow(colour, clusterName(i), counts.get(i) || 0, "button");
    button.setAttribute("aria-pressed", state.only === String(i));
    button.title = "show these tiles alone, with its name and typical tiles";
    button.addEventListener("click", () => change({ only: state.only === String(i) ? "" : i }));
    box.append(button);
    if (state.only === String(i)) box.append(nameField(i), tileGrid(examples.map(([slideId, tile]) => ({ slide_id: slideId, tile }))));
  }
}

/** Where a cluster is named: Enter, or leaving the field. */
function nameField(i) {
  const field = element("input", { type: "text", maxLength: MAX_NAME, value: nameInField(i), placeholder: "what is it? for example keratin" });
  field.setAttribute("aria-label", `Name of ${isWords() ? "word" : "cluster"} ${i + 1}`);
  let sent = nameOf(i);
  const send = () => {
    const name = field.value.trim();
    if (name === sent) return;
    sent = name;
    guarded(nameCluster(i, name).catch((error) => { sent = null; throw error; }));
  };
  field.addEventListener("change", send);
  field.addEventListener("keydown", (event) => { if (event.key === "Enter") send(); }); // also what could not be saved before
  const line = element("div", { className: "line" }, field);
  return isSaved() ? element("div", {}, line, note("Enter saves it in words.csv, for everyone.")) : line;
}
