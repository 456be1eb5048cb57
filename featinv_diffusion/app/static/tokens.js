// What the tokens of a vision transformer say, block by block.

import { work } from "./api.js";
import { colour, drawScale, make, toImage } from "./dom.js";
import { recipe } from "./results.js";

const SIZE = 256;

async function draw(canvas, image, rows) {
  canvas.width = canvas.height = SIZE;
  const context = canvas.getContext("2d");
  context.filter = "grayscale(1)";
  context.drawImage(image, 0, 0, SIZE, SIZE);
  context.filter = "none";
  context.globalAlpha = 0.65;
  const [h, w] = [rows.length, rows[0].length];
  rows.forEach((row, y) => row.forEach((value, x) => {
    context.fillStyle = `rgb(${colour(value).join(",")})`;
    context.fillRect((x * SIZE) / w, (y * SIZE) / h, SIZE / w + 1, SIZE / h + 1);
  }));
  context.globalAlpha = 1;
}

function mostNamed(names) {
  const counts = new Map();
  for (const name of names.flat()) counts.set(name, (counts.get(name) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, 3);
}

export async function showTokens(place, picture, target, options) {
  const found = await work("/api/tokens", { picture, ...(target ? { target } : {}) }, options);
  const image = await toImage(found.picture);
  const canvas = make("canvas", { role: "img" });
  const scale = make("canvas", { class: "scale", "aria-hidden": "true" });
  drawScale(scale);
  const words = make("p", { class: "hint", "aria-live": "polite" });
  const slider = make("input", { type: "range", id: "block", min: "1", max: String(found.maps.length), value: String(found.maps.length) });
  const show = async () => {
    const block = Number(slider.value);
    const rows = found.maps[block - 1];
    await draw(canvas, image, rows);
    const mean = rows.flat().reduce((a, b) => a + b) / rows.flat().length;
    const named = mostNamed(found.tops[block - 1]).map(([name, n]) => `${name} (${n})`).join(", ");
    canvas.setAttribute("aria-label", `Identifiability of ${found.class} at each token after block ${block}, mean ${mean.toFixed(2)}`);
    slider.setAttribute("aria-valuetext", `block ${block} of ${found.maps.length}`);
    words.textContent = `After block ${block} of ${found.maps.length} the identifiability of “${found.class}” is ${mean.toFixed(2)} on average (chance 0.5). Most tokens are nearest to ${named}.`;
  };
  slider.addEventListener("input", show);
  const guesses = make("table", {}, make("caption", { class: "hint" }, "What the model says"),
    ...found.guesses.map((one) => make("tr", {}, make("th", { scope: "row" }, one.class), make("td", {}, `${(100 * one.probability).toFixed(1)} %`))));
  place.replaceChildren(
    make("label", { for: "block" }, "Block"), slider,
    make("div", { class: "beside" },
      make("figure", {}, canvas, make("figcaption", { class: "heat" }, "0 ", scale, " 1")),
      make("div", {}, words, guesses)),
    ...recipe(found.command, found.python));
  await show();
}
