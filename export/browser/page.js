// What one sees: a place to drop pictures, the five best labels of the last one, and errors.

import { loadModel } from "./classifier.js";
import { softmax } from "./pictures.js";

const at = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });

let shown = Promise.resolve(); // one picture after the other

/** Classify `file`, a File or a promise of one, once those before it are done. */
function show(file) {
  shown = shown.then(async () => {
    try {
      const picture = await file;
      at("status").textContent = `Looking at ${picture.name} …`;
      await answer(picture);
    } catch (error) {
      fail(error);
    }
  });
}

async function answer(file) {
  const { labels, logits } = await model;
  const result = await logits(file);
  const probabilities = softmax(result.logits);
  const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 5);
  preview(file);
  at("answers").replaceChildren(...best.map((index) => row(labels[index], probabilities[index])));
  at("status").textContent = `${file.name}, computed in ${result.milliseconds.toFixed(1)} ms`;
}

function row(label, probability) {
  const [item, name, value] = ["li", "span", "data"].map((tag) => document.createElement(tag));
  name.textContent = label;
  value.value = probability;
  value.textContent = percent.format(probability);
  item.style.setProperty("--share", probability);
  item.append(name, value);
  return item;
}

/** Show `file`; without one, the empty page. */
function preview(file) {
  const image = at("picture");
  URL.revokeObjectURL(image.src);
  if (file) Object.assign(image, { src: URL.createObjectURL(file), alt: file.name });
  else image.removeAttribute("src");
  at("error").hidden = true;
  document.body.classList.toggle("answered", Boolean(file));
  for (const button of demos) button.ariaPressed = file?.name === nameOf(button);
}

function fail(error) {
  preview();
  at("answers").replaceChildren();
  at("status").textContent = "";
  at("error").textContent = error.message;
  at("error").hidden = false;
}

function introduce({ card, labels, threads }) {
  const [, height, width] = card.preprocessing.input_size;
  const runs = threads > 1 ? `WebAssembly, ${threads} threads` : "WebAssembly, 1 thread";
  document.title = at("name").textContent = card.tag ? `${card.model}.${card.tag}` : card.model;
  const facts = [`${labels.length} classes`, `${width} × ${height} pixels`, card.precision, runs];
  at("facts").replaceChildren(...facts.map((fact) => Object.assign(document.createElement("li"), { textContent: fact })));
  at("proof").textContent = proof(card.parity);
  at("status").textContent = "Ready.";
  at("demos").hidden = !demos.every((button) => labels.includes(button.value));
  document.body.classList.add("ready");
}

/** Return what the card says of the comparison with the model that was trained. */
function proof({ max_abs_diff: difference, allowed, top1_percent_before: before, top1_percent_after: after }) {
  if (before !== undefined) return `Top-1 ${before.toFixed(2)} % before quantisation, ${after.toFixed(2)} % after.`;
  if (difference === undefined) return "Not compared with the model that was trained.";
  const [seen, most] = [difference, allowed].map((value) => value.toExponential(1));
  return `Compared with the trained model before export: logits within ${seen}, at most ${most} allowed.`;
}

const nameOf = (button) => `${button.value}.jpg`;

async function demo(button) {
  const response = await fetch(`demo/${nameOf(button)}`);
  return new File([await response.blob()], nameOf(button));
}

const demos = [...document.querySelectorAll("#demos button")];
for (const button of demos) button.addEventListener("click", () => show(demo(button)));

at("file").addEventListener("change", ({ target }) => {
  if (target.files.length) show(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) show(file);
  else fail(new Error("That was no file. Save the picture, then drop it here."));
});

const model = loadModel("model/");
model.then(introduce).catch(fail);
