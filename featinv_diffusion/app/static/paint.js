// The canvas on which cells of the map are painted; each cell holds at most one edit.

import { get } from "./dom.js";

const WORDS = {
  paint: "from the second picture", erase: "erased", mirror: "mirrored", steer: "steered",
};
const LETTERS = { erase: "E", mirror: "M", steer: "S" };
const ORDER = ["mirror", "paint", "erase", "steer"];

export class Painter {
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.grid = [8, 8];
    this.cells = new Map();
    this.cursor = [0, 0];
    this.first = this.second = null;
    this.enabled = true;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => this.#up());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("focus", () => this.draw());
    canvas.addEventListener("blur", () => this.draw());
  }

  get tool() {
    return document.querySelector("input[name=tool]:checked").value;
  }

  setGrid(grid, enabled) {
    this.enabled = enabled;
    if (!this.cells.size && enabled) {
      this.grid = [...grid];
      this.cursor = this.cursor.map((place, i) => Math.min(place, grid[i] - 1));
    }
    this.draw();
  }

  // Returns the edits, those of one kind together.
  edits() {
    const groups = new Map();
    for (const [cell, edit] of this.cells) {
      const key = JSON.stringify(edit);
      if (!groups.has(key)) groups.set(key, { ...edit, cells: [], grid: [...this.grid] });
      groups.get(key).cells.push(cell);
    }
    for (const group of groups.values()) group.cells.sort((a, b) => a - b);
    return [...groups.values()].sort((a, b) => ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind));
  }

  load(edits) {
    this.cells.clear();
    for (const { cells, grid, ...edit } of edits) {
      this.grid = [...grid];
      for (const cell of cells) this.cells.set(cell, edit);
    }
    this.draw();
  }

  clear() {
    this.cells.clear();
    this.draw();
    this.onChange(true);
  }

  #cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const [h, w] = this.grid;
    const clip = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
    return [
      clip(((event.clientY - box.top) / box.height) * h, h),
      clip(((event.clientX - box.left) / box.width) * w, w),
    ];
  }

  #edit() {
    if (this.tool !== "steer") return { kind: this.tool };
    const along = get("steer-along").selectedOptions[0]?.dataset ?? {};
    const edit = { kind: "steer", factor: Number(get("steer-factor").value) };
    return along.concepts ? { ...edit, concepts: along.concepts, concept: Number(along.concept) } : edit;
  }

  #put([y, x]) {
    if (!this.enabled) return;
    const cell = y * this.grid[1] + x;
    const edit = this.#edit();
    if (edit.kind === "restore" ? !this.cells.has(cell) : JSON.stringify(this.cells.get(cell)) === JSON.stringify(edit)) return;
    if (edit.kind === "restore") this.cells.delete(cell);
    else this.cells.set(cell, edit);
    this.cursor = [y, x];
    this.draw();
    this.onChange(false);
  }

  #down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.isDown = true;
    this.#put(this.#cellAt(event));
  }

  #move(event) {
    if (this.isDown) this.#put(this.#cellAt(event));
  }

  #up() {
    if (this.isDown) this.onChange(true);
    this.isDown = false;
  }

  #key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key in steps) {
      this.cursor = this.cursor.map((place, i) => Math.min(this.grid[i] - 1, Math.max(0, place + steps[event.key][i])));
      if (event.shiftKey) this.#put(this.cursor);
    } else if (event.key === " " || event.key === "Enter") {
      this.#put(this.cursor);
      this.onChange(true);
    } else return;
    event.preventDefault();
    this.draw();
    this.#say();
  }

  #say() {
    const [y, x] = this.cursor;
    const edit = this.cells.get(y * this.grid[1] + x);
    get("map-cell").textContent = `Row ${y + 1} of ${this.grid[0]}, column ${x + 1} of ${this.grid[1]}: ${edit ? WORDS[edit.kind] : "as it is"}.`;
  }

  draw() {
    const { canvas } = this;
    const context = canvas.getContext("2d");
    const [h, w] = this.grid;
    const [dx, dy] = [canvas.width / w, canvas.height / h];
    context.fillStyle = "#808080";
    context.fillRect(0, 0, canvas.width, canvas.height);
    const draw = (image, x, y, mirrored = false) => {
      const [sx, sy] = [image.width / w, image.height / h];
      context.save();
      if (mirrored) { context.translate(2 * x * dx + dx, 0); context.scale(-1, 1); }
      context.drawImage(image, (mirrored ? w - 1 - x : x) * sx, y * sy, sx, sy, x * dx, y * dy, dx, dy);
      context.restore();
    };
    if (this.first) context.drawImage(this.first, 0, 0, canvas.width, canvas.height);
    for (const [cell, edit] of this.cells) {
      const [y, x] = [Math.floor(cell / w), cell % w];
      if (edit.kind === "paint" && this.second) draw(this.second, x, y);
      if (edit.kind === "mirror" && this.first) draw(this.first, x, y, true);
      if (edit.kind === "erase") { context.fillStyle = "#808080"; context.fillRect(x * dx, y * dy, dx, dy); }
      context.lineWidth = 3;
      context.strokeStyle = "#f2c14e";
      context.strokeRect(x * dx + 1.5, y * dy + 1.5, dx - 3, dy - 3);
      if (edit.kind in LETTERS) this.#letter(context, LETTERS[edit.kind], (x + 0.5) * dx, (y + 0.5) * dy, dy);
    }
    context.strokeStyle = "rgba(255,255,255,.35)";
    context.lineWidth = 1;
    for (let i = 1; i < w; i++) context.strokeRect(i * dx, -1, 0, canvas.height + 2);
    for (let i = 1; i < h; i++) context.strokeRect(-1, i * dy, canvas.width + 2, 0);
    if (document.activeElement === canvas) this.#frame(context, dx, dy);
  }

  #letter(context, letter, x, y, size) {
    context.font = `bold ${Math.round(size * 0.5)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 4;
    context.strokeStyle = "#000";
    context.strokeText(letter, x, y);
    context.fillStyle = "#fff";
    context.fillText(letter, x, y);
  }

  #frame(context, dx, dy) {
    const [y, x] = this.cursor;
    for (const [colour, width] of [["#000", 5], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(x * dx + 2, y * dy + 2, dx - 4, dy - 4);
    }
  }
}
