// The gallery: runs, the newest first, each with its images and previews. Knows elements; asks the
// server nothing.

import { byId, el, show } from "/page/dom.js";

const KINDS = {
  image: "",
  variation: "variations of ",
  edit: "edit: ",
  extension: "extension: ",
  file: "from a file: ",
};

/** Name of a file to download an image as. */
export function fileName(record) {
  const words = (record.file ?? record.prompt).toLowerCase().match(/[a-z0-9]+/g) ?? ["image"];
  const number = isFile(record) ? "" : `-${record.seed}-${record.index + 1}`;
  return `${words.join("-").slice(0, 60)}${number}.png`;
}

/** Text of an image for screen readers. */
export function altOf(record) {
  return record.file || record.prompt || "an image without a prompt";
}

/** Whether an image was not drawn here, so that it has no seed. */
export function isFile(record) {
  return record.kind === "file";
}

/** All runs. `open` is called with a record whose image is chosen. */
export class Gallery {
  #root = byId("runs");
  #open;

  constructor(model, open) {
    this.#open = open;
    const scale = Math.max(1, Math.round(176 / model.width));
    byId("gallery").style.setProperty("--image", `${model.width * scale}px`);
    byId("gallery").style.setProperty("--ratio", `${model.width} / ${model.height}`);
    this.refresh();
  }

  /** A run that begins: tiles for `count` images. */
  begin({ kind, fields }, count) {
    const run = new RunView(kind, fields.prompt ?? "", this.#open);
    this.#root.prepend(run.element);
    run.reserve(count);
    this.refresh();
    run.element.scrollIntoView({ block: "nearest" });
    return run;
  }

  /** Shows records of the history, the oldest first. */
  restore(records) {
    const runs = new Map(records.map(({ run }) => [run, []]));
    for (const record of records) runs.get(record.run).push(record);
    for (const images of runs.values()) {
      const run = new RunView(images[0].kind, images[0].file ?? images[0].prompt, this.#open);
      this.#root.prepend(run.element);
      images.sort((one, other) => one.index - other.index);
      for (const record of images) run.complete(record.index, record);
    }
    this.refresh();
  }

  clear() {
    for (const { href } of this.#root.querySelectorAll("a[download]")) URL.revokeObjectURL(href);
    this.#root.replaceChildren();
    this.refresh();
  }

  /** Shows the hint where there is nothing else. */
  refresh() {
    const any = this.#root.childElementCount > 0;
    show(byId("empty"), !any);
    show(byId("clear"), any);
  }
}

class RunView {
  #tiles = new Map();
  #list = el("ul", { class: "tiles" });
  #facts = el("p", { class: "run-facts" });
  #warnings = el("ul", { class: "warnings", "aria-label": "Warnings", hidden: true });

  constructor(kind, prompt, open) {
    this.open = open;
    this.prompt = prompt;
    const title = el("h3", {}, `${KINDS[kind]}${prompt || "no prompt"}`);
    const head = el("div", { class: "run-head" }, title, this.#facts);
    this.element = el("article", { class: "run" }, head, this.#warnings, this.#list);
  }

  reserve(count) {
    for (let index = 0; index < count; index++) this.#tile(index);
  }

  /** Shows an image in the making. */
  preview(index, base64) {
    const box = this.#tile(index).querySelector(".checker");
    let image = box.querySelector("img");
    if (!image) {
      image = el("img", { alt: `${this.prompt}: preview`, class: "preview" });
      box.replaceChildren(image);
    }
    image.src = `data:image/png;base64,${base64}`;
  }

  complete(index, record) {
    const url = URL.createObjectURL(record.blob);
    const image = el("img", { src: url, alt: altOf(record) });
    const name = `Open image ${index + 1}: ${altOf(record)}`;
    const button = el(
      "button",
      { type: "button", class: "checker open", "aria-label": name, click: () => this.open(record) },
      image,
    );
    const download = el(
      "a",
      { class: "quiet button", href: url, download: fileName(record) },
      "Download",
    );
    download.setAttribute("aria-label", `Download image ${index + 1}: ${altOf(record)}`);
    const likelihood = el(
      "span",
      { class: "nats", title: "Log-likelihood of the codes, given the prompt" },
      `${record.logLikelihood.toFixed(1)} nats`,
    );
    const tile = this.#tile(index);
    tile.classList.remove("waiting");
    tile.replaceChildren(button, el("div", { class: "tile-foot" }, likelihood, download));
    this.#facts.textContent = isFile(record) ? "" : `seed ${record.seed}`;
    this.#warn(record.warnings);
  }

  /** Removes the tiles whose images did not come. Returns how many images there are. */
  end() {
    for (const [index, tile] of this.#tiles) {
      if (!tile.classList.contains("waiting")) continue;
      tile.remove();
      this.#tiles.delete(index);
    }
    if (!this.#tiles.size) this.element.remove();
    return this.#tiles.size;
  }

  #tile(index) {
    if (!this.#tiles.has(index)) {
      const box = el("div", { class: "checker" });
      const tile = el("li", { class: "tile waiting" }, box, el("div", { class: "tile-foot" }));
      this.#tiles.set(index, tile);
      this.#list.append(tile);
    }
    return this.#tiles.get(index);
  }

  #warn(warnings = []) {
    this.#warnings.replaceChildren(...warnings.map((text) => el("li", {}, text)));
    show(this.#warnings, warnings.length > 0);
  }
}
