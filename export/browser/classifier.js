// An exported model in a browser: fetched, compared with the sha256 on its card, run by onnxruntime-web.

import { openPicture, toArray } from "./pictures.js";

const RUNTIME = new URL("runtime/", import.meta.url).href;

/** Return the model in `folder`: its `card`, `labels`, `threads`, and `logits(file)` with the milliseconds they took. */
export async function loadModel(folder) {
  const content = await fetched(folder, "card.json");
  const card = parsed(content, "card.json");
  if (card?.format !== "sdzoo-2") throw new Error('card.json is not of the format "sdzoo-2".');
  const unsealed = new TextDecoder().decode(content).replaceAll(card.seal, "0".repeat(64));
  if ((await sha256(new TextEncoder().encode(unsealed))) !== card.seal)
    throw new Error("card.json is damaged: its sha256 is not the seal in it.");
  if (card.output.name !== "logits") throw new Error("This model has no classifier, so there are no labels to show.");
  if (!card.file.endsWith(".onnx")) throw new Error(`A browser runs what sdzoo export --to onnx wrote, not ${card.file}.`);
  const [labels, model] = await Promise.all(["labels.json", card.file].map((name) => checked(folder, name, card)));
  const { ort, session } = await start(model);

  async function run(picture) {
    const { name, dtype, shape } = card.input;
    const tensor = new ort.Tensor(dtype, toArray(picture, card.preprocessing), [1, ...shape.slice(1)]);
    const begun = performance.now();
    const outputs = await session.run({ [name]: tensor });
    return { logits: outputs[card.output.name].data, milliseconds: performance.now() - begun };
  }

  await run(new ImageData(32, 32)); // the first run allocates: it is no measure of the others
  return {
    card,
    labels: parsed(labels, "labels.json"),
    threads: ort.env.wasm.numThreads,
    logits: async (file) => run(await openPicture(file)),
  };
}

async function fetched(folder, name) {
  const response = await fetch(folder + name).catch(() => {
    throw new Error("The server does not answer. Is it still running?");
  });
  if (!response.ok) throw new Error(`There is no model here: ${folder}${name} was not found (${response.status}).`);
  return response.arrayBuffer();
}

async function checked(folder, name, card) {
  const content = await fetched(folder, name);
  if ((await sha256(content)) === card.files[name]) return content;
  throw new Error(`${name} is damaged: its sha256 is not the one in card.json.`);
}

async function sha256(content) {
  if (!crypto.subtle) throw new Error("A browser checks files only on pages from https or from 127.0.0.1.");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function parsed(content, name) {
  try {
    return JSON.parse(new TextDecoder().decode(content));
  } catch {
    throw new Error(`${name} is damaged: it is not JSON.`);
  }
}

async function start(model) {
  try {
    const ort = await import(`${RUNTIME}ort.wasm.min.mjs`);
    ort.env.wasm.wasmPaths = RUNTIME;
    ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    return { ort, session: await ort.InferenceSession.create(model, { executionProviders: ["wasm"] }) };
  } catch (error) {
    throw new Error(`The model cannot be run: ${error.message}. Is runtime/ filled (node fetch.mjs)?`);
  }
}
