// Edits and extensions of an image: their panels -> what is sent. Knows masks and places; sampling is
// the caller's.

import { byId, el } from "/page/dom.js";
import { setNumber } from "/page/form.js";
import { Mask } from "/page/mask.js";
import { scaled } from "/page/png.js";

const ROWS = ["top", "middle", "bottom"];
const COLUMNS = ["left", "centre", "right"];

/** The panel of edits. */
export class EditPanel {
  #record = null;

  constructor(model) {
    const canvas = byId("stage-mask");
    this.total = model.grids.reduce((sum, [rows, columns]) => sum + rows * columns, 0);
    this.finest = model.grids.at(-1)[0] * model.grids.at(-1)[1];
    this.mask = new Mask(canvas, model, (line) => this.#tell(line));
    const brush = byId("brush");
    const range = brush.nextElementSibling;
    brush.max = range.max = Math.max(2, Math.round(model.width / 2));
    setNumber(brush, Math.round(this.mask.cell[0]));
    this.mask.size = Number(brush.value);
    brush.addEventListener("input", () => {
      this.mask.size = Math.min(Math.max(1, Number(brush.value) || 1), Number(brush.max));
    });
    for (const radio of document.getElementsByName("tool")) {
      radio.addEventListener("change", () => (this.mask.erasing = radio.value === "erase"));
    }
    byId("mask-undo").addEventListener("click", () => this.mask.undo());
    byId("mask-clear").addEventListener("click", () => this.mask.clear());
  }

  /** Shows a record's image with an empty mask; the image that was shown last keeps its mask. */
  start(record, image) {
    if (record === this.#record) {
      this.mask.draw();
      return;
    }
    this.#record = record;
    byId("edit-prompt").value = record.prompt;
    this.mask.start(image);
  }

  /** What is sent. */
  async run() {
    if (this.mask.isEmpty) throw new Error("nothing is marked; paint the part to be replaced");
    const files = { image: this.#record.blob, mask: await this.mask.png() };
    return { kind: "edit", fields: { prompt: byId("edit-prompt").value }, files };
  }

  #tell(line) {
    const count = `${this.mask.numCodes} of ${this.finest} codes are resampled.`;
    byId("mask-readout").textContent = `${line} ${count}`.trim();
  }
}

/** The panel of extensions: the image at half its size, and its place on the canvas. */
export class ExtendPanel {
  #record = null;

  constructor({ width, height }) {
    this.size = [Math.floor(width / 2), Math.floor(height / 2)];
    const rest = [width - this.size[0], height - this.size[1]];
    ROWS.forEach((row, i) => {
      COLUMNS.forEach((column, j) => {
        const at = [Math.round((rest[0] * j) / 2), Math.round((rest[1] * i) / 2)];
        const radio = el("input", {
          type: "radio",
          name: "place",
          value: at.join(),
          checked: i === 1 && j === 1,
          change: () => this.#place(j, i),
        });
        radio.setAttribute("aria-label", `${row} ${column}`);
        byId("places").append(el("label", { title: `${row} ${column}` }, radio, el("span")));
      });
    });
    this.#place(1, 1);
  }

  /** Shows a record's image on the canvas. */
  start(record, url) {
    this.#record = record;
    byId("extend-prompt").value = record.prompt;
    byId("outer-image").src = url;
    byId("outer-image").alt = record.prompt;
  }

  /** What is sent. */
  async run() {
    const at = [...document.getElementsByName("place")].find((radio) => radio.checked).value;
    const files = { image: await scaled(this.#record.blob, ...this.size) };
    const fields = { prompt: byId("extend-prompt").value, outpaint_at: at };
    return { kind: "extension", fields, files };
  }

  #place(column, row) {
    const { style } = byId("outer-image");
    style.left = `${column * 25}%`;
    style.top = `${row * 25}%`;
  }
}
