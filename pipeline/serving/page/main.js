// The page put together: the bundle is asked for, then form, gallery, viewer and history are joined.

import { requestJson, setToken } from "/page/api.js";
import { announce, byId, el, hideUnsupported, show, showError } from "/page/dom.js";
import { Form } from "/page/form.js";
import { Gallery } from "/page/gallery.js";
import { History } from "/page/history.js";
import { settingsOf } from "/page/png.js";
import { recordOfFile, sampled, settingsOfRecord } from "/page/runs.js";
import { BUSY, Viewer } from "/page/viewer.js";

const NUM_IDEAS = 8;
const NOT_KEPT =
  "the browser has no room for more images; download those you want to keep, and clear the history";

const NOT_CLEARED = "the browser did not remove the images; remove this site's data in its settings";

/** Everything that needs to know the bundle. */
class Page {
  #running = null;

  constructor(model, history) {
    this.model = model;
    this.history = history;
    hideUnsupported(model);
    byId("bundle").textContent = `${model.id} · ${model.width} × ${model.height}`;
    this.form = new Form(model);
    this.viewer = new Viewer(model, {
      sample: (run) =>
        this.sample({ ...run, fields: { ...this.form.optionsOfChanges(), ...run.fields } }),
      reuse: (record) => this.fill(settingsOfRecord(record)),
      busy: () => this.#running !== null,
    });
    this.gallery = new Gallery(model, (record) => this.viewer.open(record));
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.sample({ kind: "image", fields: this.form.generation() });
    });
    byId("cancel").addEventListener("click", () => this.#running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    this.#addIdeas();
    this.#takeFiles();
  }

  /** Samples images and shows them as they come. */
  async sample(run) {
    if (this.#running) {
      showError(byId("alert"), new Error(BUSY));
      return;
    }
    this.#running = new AbortController();
    const count = run.fields.n ?? 1;
    const view = this.gallery.begin(run, Math.min(count, this.model.limits.n));
    let ready = 0;
    let kept = true;
    this.#begin(count);
    try {
      const id = `${Date.now()}-${Math.random()}`;
      const found = sampled(this.model, { ...run, id }, this.#running.signal);
      for await (const { index, preview, record } of found) {
        if (preview) view.preview(index, preview);
        if (!record) continue;
        view.complete(index, record);
        ready++;
        announce(`${ready} of ${count} ${count === 1 ? "image is" : "images are"} ready.`);
        kept = (await this.history.add(record)) && kept;
      }
      if (!kept) showError(byId("alert"), new Error(NOT_KEPT));
    } catch (error) {
      const cancelled = error.name === "AbortError";
      announce(cancelled ? `Cancelled. ${ready} of ${count} images are ready.` : "");
      if (!cancelled) showError(byId("alert"), error);
    } finally {
      this.#running = null;
      view.end();
      this.gallery.refresh();
      this.#end();
    }
  }

  /** Fills the form and says what the settings give. */
  fill(settings) {
    announce(this.form.fill(settings));
    byId("prompt").focus();
  }

  async clear() {
    if (!confirm("Remove all images from this browser?")) return;
    if (!(await this.history.clear())) {
      showError(byId("alert"), new Error(NOT_CLEARED));
      return;
    }
    this.gallery.clear();
    announce("The history is empty.");
  }

  #begin(count) {
    showError(byId("alert"));
    announce(`Drawing ${count} ${count === 1 ? "image" : "images"} …`);
    byId("draw").disabled = true;
    byId("clear").disabled = true; // else an image that comes later would be kept
    show(byId("cancel"));
    byId("gallery").setAttribute("aria-busy", "true");
  }

  #end() {
    const focused = [byId("cancel"), document.body].includes(document.activeElement);
    byId("draw").disabled = false;
    byId("clear").disabled = false;
    show(byId("cancel"), false);
    byId("gallery").removeAttribute("aria-busy");
    if (focused) byId("draw").focus({ preventScroll: true });
  }

  #addIdeas() {
    const { examples } = this.model;
    const step = Math.max(1, Math.floor(examples.length / NUM_IDEAS));
    const ideas = examples.filter((_, i) => i % step === 0).slice(0, NUM_IDEAS);
    const buttons = ideas.map((text) =>
      el("button", { type: "button", click: () => this.#choose(text) }, text),
    );
    byId("ideas").replaceChildren(...buttons);
  }

  #choose(prompt) {
    byId("prompt").value = prompt;
    byId("prompt").focus();
  }

  #takeFiles() {
    byId("file").addEventListener("change", async ({ target }) => {
      await this.#read(target.files[0]);
      target.value = ""; // so that the same file can be chosen again
    });
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
    document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      document.body.classList.remove("dropping");
      if (!document.querySelector("dialog[open]")) this.#read(event.dataTransfer.files[0]);
    });
  }

  async #read(file) {
    if (!file) return;
    showError(byId("alert"));
    announce(`Reading ${file.name} …`);
    try {
      const settings = settingsOf(await file.arrayBuffer());
      if (settings) this.fill(settings);
      else await this.#add(file);
    } catch (error) {
      announce("");
      showError(byId("alert"), error);
    }
  }

  /** Adds an image of the user's to the drawn ones, so that it can be edited too. */
  async #add(file) {
    const record = await recordOfFile(this.model, file, this.form.prompt);
    const view = this.gallery.begin({ kind: "file", fields: { prompt: file.name } }, 1);
    view.complete(0, record);
    announce(`${file.name} is in the gallery, in the bundle's size.`);
    if (!(await this.history.add(record))) showError(byId("alert"), new Error(NOT_KEPT));
  }
}

let page = null;

async function start() {
  showError(byId("alert"));
  try {
    const { data } = await requestJson("/v1/models");
    show(byId("token-form"), false);
    if (page) return;
    const history = new History();
    await history.open();
    page = new Page(data[0], history);
    page.gallery.restore(await history.all(page.model.id));
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    showError(byId("alert"), error);
  }
}

document.addEventListener("token-needed", () => {
  show(byId("token-form"));
  byId("token").focus();
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    setToken(byId("token").value.trim());
  } catch (error) {
    showError(byId("alert"), error);
    return;
  }
  start();
});
start();
