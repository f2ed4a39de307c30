// The codes over their image: a grid of one level, with each code's number and surprise. Knows
// layouts and scores.

import { requestJson } from "/page/api.js";
import { colour, isLight, scale } from "/page/colours.js";
import { byId, el, facts, show } from "/page/dom.js";

const TOLD = ["scores", "legend-low", "legend-high", "code-readout"];

/** Splits what is there for each code into the levels of a bundle, the coarse ones first. */
export function byLevel(grids, values) {
  let at = 0;
  return grids.map(([height, width]) => values.slice(at, (at += height * width)));
}

/** The view of one image's codes. */
export class TokensView {
  #grid = byId("stage-codes");
  #model;
  #asked = null;
  #scored = null;
  #cells = [];
  #at = 0;

  constructor(model) {
    this.#model = model;
    const names = model.grids.map(([height, width], i) => `${i + 1}: ${height} × ${width} codes`);
    byId("level").replaceChildren(...names.map((name, i) => el("option", { value: i }, name)));
    show(byId("level-field"), model.grids.length > 1);
    byId("level").value = model.grids.length - 1;
    byId("level").addEventListener("change", () => this.#draw());
    byId("numbers").addEventListener("change", (event) => {
      this.#grid.classList.toggle("numbered", event.target.checked);
    });
    byId("legend-bar").style.backgroundImage = scale();
    this.#grid.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Asks for the scores of a record and shows them. */
  async load(record) {
    this.#scored = null;
    this.#grid.replaceChildren();
    for (const name of TOLD) byId(name).textContent = ""; // of the image before
    const json = { prompt: record.prompt, codes: record.codes };
    this.#asked = record;
    const scored = await requestJson("/v1/score", { json });
    if (record !== this.#asked) return; // another image is shown by now
    this.#scored = scored;
    const each = -scored.log_likelihood / scored.codes.length;
    // A prior of random orders sampled in another order than the one of scores.
    const total = this.#model.can_edit ? "Log-likelihood in raster order" : "Log-likelihood";
    facts(byId("scores"), {
      [total]: `${scored.log_likelihood.toFixed(2)} nats`,
      "Surprise per code": `${each.toFixed(2)} nats, ${(each / Math.LN2).toFixed(2)} bits`,
      PMI: scored.pmi === null ? undefined : `${scored.pmi.toFixed(2)} nats`,
    });
    this.#draw();
  }

  #draw() {
    if (!this.#scored) return;
    const level = Number(byId("level").value);
    const width = this.#model.grids[level][1];
    const codes = byLevel(this.#model.grids, this.#scored.codes)[level];
    const nats = byLevel(this.#model.grids, this.#scored.nats)[level];
    const most = Math.max(...this.#scored.nats, 1e-9);
    byId("legend-low").textContent = "0 nats";
    byId("legend-high").textContent = `${most.toFixed(1)} nats`;
    this.#at = 0;
    this.#cells = codes.map((code, i) => this.#cell(i, width, code, nats[i], nats[i] / most));
    this.#grid.style.gridTemplateColumns = `repeat(${width}, 1fr)`;
    const rows = [];
    for (let i = 0; i < this.#cells.length; i += width) {
      rows.push(el("div", { role: "row" }, ...this.#cells.slice(i, i + width)));
    }
    this.#grid.replaceChildren(...rows);
    if (this.#cells.length) this.#cells[0].tabIndex = 0;
  }

  #cell(index, width, code, nats, share) {
    const place = `row ${Math.floor(index / width) + 1}, column ${(index % width) + 1}`;
    const text = `${place}: code ${code}, ${nats.toFixed(2)} nats`;
    const tell = () => {
      byId("code-readout").textContent = text;
    };
    const cell = el("div", {
      role: "gridcell",
      class: `code${isLight(share) ? " light" : ""}`,
      title: text,
      "aria-label": text,
      tabIndex: -1,
      pointerenter: tell,
      focus: tell,
    });
    cell.append(el("span", { "aria-hidden": "true" }, String(code)));
    cell.style.setProperty("--colour", colour(share));
    return cell;
  }

  #move(event) {
    const width = this.#model.grids[Number(byId("level").value)][1];
    const column = this.#at % width;
    const steps = {
      ArrowLeft: column > 0 ? -1 : 0,
      ArrowRight: column < width - 1 ? 1 : 0,
      ArrowUp: -width,
      ArrowDown: width,
    };
    const next = this.#at + (steps[event.key] ?? 0);
    if (!(event.key in steps)) return;
    event.preventDefault();
    if (next < 0 || next >= this.#cells.length) return;
    this.#cells[this.#at].tabIndex = -1;
    this.#at = next;
    this.#cells[next].tabIndex = 0;
    this.#cells[next].focus();
  }
}
