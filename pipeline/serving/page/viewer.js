// One image in a dialog: its facts, its codes, and what can be made of it. Knows records and panels;
// sampling is the caller's.

import { requestJson } from "/page/api.js";
import { byId, el, facts, show, showError } from "/page/dom.js";
import { EditPanel, ExtendPanel } from "/page/edit.js";
import { linkSliders } from "/page/form.js";
import { altOf, fileName, isFile } from "/page/gallery.js";
import { base64Of } from "/page/png.js";
import { TokensView } from "/page/tokens.js";

const STAGES = { view: ["image"], tokens: ["image", "codes"], edit: ["mask"], extend: ["canvas"] };
const ALL = ["image", "codes", "mask", "canvas"];
const NUM_CAPTIONS = 3;
export const BUSY = "images are being drawn; wait for them, or cancel";

/**
 * The dialog. `sample` is called with a run, `reuse` with a record; `busy` says whether images are
 * being drawn.
 */
export class Viewer {
  #dialog = byId("viewer");
  #record = null;
  #url = null;

  constructor(model, { sample, reuse, busy }) {
    this.sample = sample;
    this.busy = busy;
    linkSliders(this.#dialog);
    this.tokens = new TokensView(model);
    this.edit = new EditPanel(model);
    this.extend = new ExtendPanel(model);
    byId("viewer-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => this.#release());
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog && this.#isOutside(event)) this.#dialog.close();
    });
    document.addEventListener("token-needed", () => this.#dialog.close());
    byId("modes").addEventListener("click", (event) => {
      const { mode } = event.target.closest("button")?.dataset ?? {};
      if (mode) this.#guard(() => this.#show(mode));
    });
    byId("reuse").addEventListener("click", () => {
      this.#dialog.close();
      reuse(this.#record);
    });
    this.#click("caption", () => this.#caption());
    this.#click("vary", () => this.#leave(this.#variation()));
    this.#click("edit-go", async () => this.#leave(await this.edit.run()));
    this.#click("extend-go", async () => this.#leave(await this.extend.run()));
  }

  /** Shows a record. */
  open(record) {
    this.#release();
    this.#record = record;
    this.#url = URL.createObjectURL(record.blob);
    byId("viewer-title").textContent = altOf(record);
    const image = byId("stage-image");
    image.src = this.#url;
    image.alt = altOf(record);
    facts(byId("facts"), {
      Seed: record.seed,
      Image: isFile(record) ? null : `number ${record.index + 1} of this seed`,
      "Log-likelihood": `${record.logLikelihood.toFixed(2)} nats`,
      Codes: record.codes.length,
      Bundle: record.bundle,
      [isFile(record) ? "Opened" : "Sampled"]: new Date(record.created).toLocaleString(),
    });
    show(byId("reuse"), !isFile(record));
    const download = byId("download");
    download.href = this.#url;
    download.download = fileName(record);
    byId("captions").replaceChildren();
    showError(byId("viewer-alert"));
    this.#show("view");
    this.#dialog.showModal();
  }

  async #show(mode) {
    for (const button of byId("modes").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    for (const panel of this.#dialog.querySelectorAll("[data-panel]")) {
      show(panel, panel.dataset.panel === mode);
    }
    for (const name of ALL) show(byId(`stage-${name}`), STAGES[mode].includes(name));
    if (mode === "tokens") await this.tokens.load(this.#record);
    if (mode === "extend") this.extend.start(this.#record, this.#url);
    if (mode === "edit") {
      await byId("stage-image").decode();
      this.edit.start(this.#record, byId("stage-image"));
    }
  }

  #variation() {
    const strength = Number(byId("strength").value);
    const fields = { prompt: this.#record.prompt, strength };
    return { kind: "variation", fields, files: { image: this.#record.blob } };
  }

  async #caption() {
    const record = this.#record;
    const json = { image: await base64Of(record.blob), n: NUM_CAPTIONS };
    const { data } = await requestJson("/v1/captions", { json });
    if (record !== this.#record) return; // another image is shown by now
    const lines = data.map(({ text, log_likelihood }) =>
      el("li", {}, text || "no words", el("span", { class: "nats" }, `${log_likelihood.toFixed(1)} nats`)),
    );
    byId("captions").replaceChildren(...lines);
  }

  #leave(run) {
    if (this.busy()) throw new Error(BUSY);
    this.#dialog.close();
    this.sample(run);
  }

  #click(id, action) {
    byId(id).addEventListener("click", () => this.#guard(action));
  }

  async #guard(action) {
    const record = this.#record;
    showError(byId("viewer-alert"));
    try {
      await action();
    } catch (error) {
      // Of an image that is shown no more, it would stand beside another one.
      if (record === this.#record) showError(byId("viewer-alert"), error);
    }
  }

  /** Whether a click is beside the dialog, on what it covers. */
  #isOutside({ clientX, clientY }) {
    const { left, right, top, bottom } = this.#dialog.getBoundingClientRect();
    return clientX < left || clientX > right || clientY < top || clientY > bottom;
  }

  #release() {
    if (this.#url) URL.revokeObjectURL(this.#url);
    this.#url = null;
  }
}
