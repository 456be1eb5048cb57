// Small helpers: elements, and maps in colours that everybody can tell apart.

export const get = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Nine colours of cividis, which grow lighter evenly.
const CIVIDIS = [
  [0, 34, 78], [26, 56, 111], [67, 78, 108], [97, 101, 111], [125, 124, 120],
  [155, 149, 118], [187, 175, 111], [220, 203, 93], [254, 232, 56],
];

export function colour(value) {
  const place = Math.min(1, Math.max(0, value)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  const share = place - low;
  return CIVIDIS[low].map((x, i) => Math.round(x + share * (CIVIDIS[low + 1][i] - x)));
}

// Draws rows of numbers, one pixel each; CSS enlarges them.
export function drawMap(canvas, rows, low, high) {
  canvas.height = rows.length;
  canvas.width = rows[0].length;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  rows.flat().forEach((value, i) => {
    pixels.data.set([...colour((value - low) / (high - low || 1)), 255], 4 * i);
  });
  context.putImageData(pixels, 0, 0);
}

export function drawScale(canvas) {
  drawMap(canvas, [Array.from({ length: 64 }, (_, i) => i / 63)], 0, 1);
}

export function toImage(source) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = source;
  });
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
