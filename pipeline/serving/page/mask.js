// A mask over an image, painted with a pointer or the keyboard. Knows pixels and cells; sends nothing.

import { pngOf } from "/page/png.js";

const MOST_UNDO = 50;
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** The mask of one canvas. `changed` is called after every change with a line about it. */
export class Mask {
  #undo = [];
  #pixels;
  #image = null;
  #cursor = [0, 0];
  #last = null;

  /** The brush's diameter, in pixels of the image. */
  size = 8;
  erasing = false;

  constructor(canvas, { width, height, grids }, changed) {
    this.canvas = canvas;
    this.width = width;
    this.height = height;
    [this.rows, this.columns] = grids.at(-1);
    this.changed = changed;
    this.scale = Math.max(1, Math.floor(512 / width));
    canvas.width = width * this.scale;
    canvas.height = height * this.scale;
    this.#pixels = new Uint8Array(width * height);
    canvas.addEventListener("pointerdown", (event) => this.#begin(event));
    canvas.addEventListener("pointermove", (event) => this.#stroke(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, () => (this.#last = null));
    }
    canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.draw());
  }

  get cell() {
    return [this.width / this.columns, this.height / this.rows];
  }

  get isEmpty() {
    return !this.#pixels.some(Boolean);
  }

  /** Begins with an image, and nothing painted. */
  start(image) {
    this.#image = image;
    this.#pixels.fill(0);
    this.#undo = [];
    this.#cursor = [0, 0];
    this.#done("Nothing is marked.");
  }

  undo() {
    const before = this.#undo.pop();
    if (!before) return;
    this.#pixels = before;
    this.#done();
  }

  clear() {
    this.#remember();
    this.#pixels.fill(0);
    this.#done();
  }

  /** An opaque PNG of the image's size: white is replaced. */
  async png() {
    const { width, height } = this;
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const image = new ImageData(width, height);
    this.#pixels.forEach((is, i) => image.data.set([is * 255, is * 255, is * 255, 255], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    return pngOf(canvas);
  }

  /** Codes with a marked pixel, which are resampled. */
  get numCodes() {
    let count = 0;
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        if (this.#inCell(column, row).some((i) => this.#pixels[i])) count++;
      }
    }
    return count;
  }

  draw() {
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.canvas);
    const { width, height } = this.canvas;
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    if (this.#image) context.drawImage(this.#image, 0, 0, width, height);
    context.fillStyle = style.getPropertyValue("--mask");
    this.#pixels.forEach((is, i) => {
      if (!is) return;
      const [x, y] = [i % this.width, Math.floor(i / this.width)];
      context.fillRect(x * this.scale, y * this.scale, this.scale, this.scale);
    });
    this.#lines(context, style.getPropertyValue("--mask-lines"));
    if (document.activeElement === this.canvas) this.#outline(context, style);
  }

  #lines(context, colour) {
    const [wide, high] = this.cell.map((size) => size * this.scale);
    context.fillStyle = colour;
    for (let i = 1; i < this.columns; i++) context.fillRect(i * wide, 0, 1, this.canvas.height);
    for (let i = 1; i < this.rows; i++) context.fillRect(0, i * high, this.canvas.width, 1);
  }

  #outline(context, style) {
    const [wide, high] = this.cell.map((size) => size * this.scale);
    const [x, y] = [this.#cursor[0] * wide, this.#cursor[1] * high];
    context.lineWidth = 6;
    context.strokeStyle = style.getPropertyValue("--surface");
    context.strokeRect(x + 3, y + 3, wide - 6, high - 6);
    context.lineWidth = 3;
    context.strokeStyle = style.getPropertyValue("--accent");
    context.strokeRect(x + 3, y + 3, wide - 6, high - 6);
  }

  #begin(event) {
    if (event.button) return;
    event.preventDefault();
    this.canvas.focus();
    this.canvas.setPointerCapture?.(event.pointerId);
    this.#remember();
    this.#last = this.#place(event);
    this.#dot(...this.#last);
    this.#done();
  }

  #stroke(event) {
    if (!this.#last) return;
    const [x, y] = this.#place(event);
    const [fromX, fromY] = this.#last;
    const steps = Math.max(1, Math.ceil(Math.hypot(x - fromX, y - fromY)));
    for (let i = 1; i <= steps; i++) {
      this.#dot(fromX + ((x - fromX) * i) / steps, fromY + ((y - fromY) * i) / steps);
    }
    this.#last = [x, y];
    this.#done();
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    return [x, ((event.clientY - box.top) / box.height) * this.height];
  }

  #dot(x, y) {
    const radius = this.size / 2;
    for (let row = Math.floor(y - radius); row <= y + radius; row++) {
      for (let column = Math.floor(x - radius); column <= x + radius; column++) {
        if (row < 0 || column < 0 || row >= this.height || column >= this.width) continue;
        const far = Math.hypot(column + 0.5 - x, row + 0.5 - y) > Math.max(radius, 0.71);
        if (!far) this.#pixels[row * this.width + column] = this.erasing ? 0 : 1;
      }
    }
  }

  #key(event) {
    if ((event.ctrlKey || event.metaKey) && event.key === "z") {
      event.preventDefault();
      this.undo();
    } else if (event.key in KEYS) {
      event.preventDefault();
      const [x, y] = KEYS[event.key];
      this.#cursor = [
        Math.min(Math.max(this.#cursor[0] + x, 0), this.columns - 1),
        Math.min(Math.max(this.#cursor[1] + y, 0), this.rows - 1),
      ];
      this.#done(this.#spoken());
    } else if (event.key === " ") {
      event.preventDefault();
      this.#toggle();
    }
  }

  #toggle() {
    this.#remember();
    const inside = this.#inCell(...this.#cursor);
    const marked = inside.every((i) => this.#pixels[i]);
    for (const i of inside) this.#pixels[i] = marked ? 0 : 1;
    this.#done(this.#spoken());
  }

  #spoken() {
    const marked = this.#inCell(...this.#cursor).some((i) => this.#pixels[i]);
    const [column, row] = this.#cursor;
    return `Row ${row + 1}, column ${column + 1}: ${marked ? "marked" : "kept"}.`;
  }

  #inCell(column, row) {
    const [wide, high] = this.cell;
    const found = [];
    for (let y = row * high; y < (row + 1) * high; y++) {
      for (let x = column * wide; x < (column + 1) * wide; x++) found.push(y * this.width + x);
    }
    return found;
  }

  #remember() {
    this.#undo.push(this.#pixels.slice());
    if (this.#undo.length > MOST_UNDO) this.#undo.shift();
  }

  #done(line = "") {
    this.draw();
    this.changed(line);
  }
}
