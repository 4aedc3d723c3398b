// What the scripts of the page share: what is shown, and pieces of the page. Names are put into it as text only.
import { state, tilePicture } from "./state.js";
import { css, viridis } from "./overlay.js";

export const page = {
  root: null, // what api/root answered
  slide: null, // what the shown slide's address answered, with its stride
  values: [], // of the overlay, per encoder, in the order of tiles
  region: null, // box of the region that contains the selected tile, where its attention is shown
  viewer: null, // OpenSeadragon
  layer: null, // what is drawn over the slide
  visit: async () => {}, // shows a tile of a slide
};

export const $ = (id) => document.getElementById(id);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function say(message, good = false) {
  $("message").textContent = message;
  $("message").classList.toggle("good", good);
  $("message").hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { $("message").hidden = true; }, 6000);
}

export const guarded = (work) => work.catch((error) => say(error.message));

export const tileIndex = () => (page.slide && state.tile && page.slide.place.has(state.tile) ? page.slide.place.get(state.tile) : -1);

export const note = (text) => element("p", { className: "quiet", textContent: text });

export function classRow(colour, name, count, tag = "div") {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = css(colour);
  return element(tag, { className: "class" }, swatch, element("span", { textContent: name }), element("span", { className: "quiet", textContent: count }));
}

export function scaleBar(low, high) {
  const bar = element("div", { className: "scale" });
  bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((t) => css(viridis(t))).join(", ")})`;
  return [bar, element("div", { className: "ends" }, element("span", { textContent: low }), element("span", { textContent: high }))];
}

/** Pictures of tiles that lead to them. `describe` may return a title and the class of a frame. */
export function tileGrid(found, describe = () => ({})) {
  return element("div", { className: "tiles" }, ...found.map((one) => {
    const { slide_id: slideId, tile, similarity } = one;
    const { title, frame } = describe(one);
    const parts = [slideId, one.patient_id && `patient ${one.patient_id}`, title].filter(Boolean);
    const button = element("button", { title: parts.join(", ") }, element("img", { src: tilePicture(slideId, tile), alt: `tile of ${parts.join(", ")}`, loading: "lazy" }));
    if (similarity !== undefined) button.append(element("span", { className: "number", textContent: similarity.toFixed(2) }));
    button.addEventListener("click", () => guarded(page.visit(slideId, tile)));
    if (frame) button.classList.add(frame);
    return button;
  }));
}

export function download(content, name) {
  const link = element("a", { href: URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/geo+json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
