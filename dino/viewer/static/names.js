// Names of clusters and words. Those of words are kept in words.csv if the viewer may write (annotate=true); all others
// are part of the address: {encoder: {cluster: name}}.
import { ask, change, state } from "./state.js";
import { page, say } from "./page.js";

const legends = {}; // what api/legend answered, by encoder
const typed = {}; // names that could not be saved, by encoder and word, so that nobody types them twice

function allNames() {
  try {
    const found = JSON.parse(state.names || "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

const namesOf = (encoder) => allNames()[encoder] || {};

/** Name, colour and typical tiles of the clusters of an encoder. */
export async function legendOf(encoder) {
  legends[encoder] ??= await ask(`api/legend?encoder=${encodeURIComponent(encoder)}`);
  return legends[encoder].clusters;
}

export const knownLegend = (encoder) => legends[encoder]?.clusters;

export const clusterName = (i) => namesOf(state.a)[i] || legends[state.a]?.clusters[i]?.name || `Cluster ${i + 1}`;

/** Whether the shown encoder has words of `dino words`, and whether their names are saved. */
export const isWords = () => Boolean(legends[state.a]?.words);
export const isSaved = () => Boolean(page.root.writable && isWords());

/** What someone called a cluster, and what the field for that contains. */
export const nameOf = (i) => namesOf(state.a)[i] ?? legends[state.a].clusters[i].written;
export const nameInField = (i) => typed[state.a]?.[i] ?? nameOf(i);

export async function nameCluster(i, name) {
  if (isSaved()) await save(state.a, i, name);
  else rename(state.a, i, name);
}

function rename(encoder, i, name) {
  const names = { ...namesOf(encoder), [i]: name };
  if (!name) delete names[i];
  change({ names: JSON.stringify({ ...allNames(), [encoder]: names }) });
}

async function save(encoder, i, name) {
  const { version } = legends[encoder];
  const body = JSON.stringify({ word: i, name, version });
  const address = `encoder=${encodeURIComponent(encoder)}`;
  try {
    legends[encoder] = await ask(`api/words?${address}`, { method: "POST", headers: { "content-type": "application/json" }, body });
  } catch (error) {
    (typed[encoder] ??= {})[i] = name;
    if (error.status === 409) {
      legends[encoder] = await ask(`api/legend?${address}`);
      document.dispatchEvent(new Event("named"));
    }
    throw error;
  }
  delete typed[encoder]?.[i];
  if (namesOf(encoder)[i]) rename(encoder, i, ""); // that of the address
  say(name ? `saved in words.csv: ${legends[encoder].clusters[i].name}` : "the name was removed from words.csv", true);
  document.dispatchEvent(new Event("named"));
}
