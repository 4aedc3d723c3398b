// What is shown, kept in the address after the #, so that an address can be sent to a colleague.

const DEFAULTS = { slide: "", overlay: "clusters", opacity: "0.55", regions: "0", grid: "0", a: "", b: "", split: "0.5", map: "", only: "", tile: "", others: "1", by: "", view: "", names: "" };

export const state = { ...DEFAULTS };
const listeners = [];
let timer = null;

export function onChange(listener) {
  listeners.push(listener);
}

/** Change what is shown; listeners get the names of what is different now. */
export function change(values) {
  const changed = Object.keys(values).filter((name) => name in DEFAULTS && state[name] !== String(values[name]));
  for (const name of changed) state[name] = String(values[name]);
  if (!changed.length) return;
  clearTimeout(timer);
  timer = setTimeout(write, 150);
  for (const listener of listeners) listener(new Set(changed));
}

export function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? DEFAULTS[name];
}

function write() {
  const shown = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== DEFAULTS[name]) shown.set(name, value);
  history.replaceState(null, "", `${location.pathname}#${shown}`);
}

export function forgetToken() {
  if (location.search) history.replaceState(null, "", location.pathname + location.hash);
}

/** JSON of an address of this server; an error has the server's one line as its message. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("the viewer does not answer; is `dino view` still running?");
  }
  if (answer.ok) return answer.json();
  let message = `the viewer answered ${answer.status}`;
  try {
    message = (await answer.json()).error;
  } catch { /* not JSON */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

export const slidePath = (slide) => `api/slides/${encodeURIComponent(slide)}`;
export const tilePicture = (slide, tile) => `slides/${encodeURIComponent(slide)}/tiles/${tile}.jpg`;
export const regionPicture = (slide, region) => `slides/${encodeURIComponent(slide)}/regions/${region}.jpg`;
