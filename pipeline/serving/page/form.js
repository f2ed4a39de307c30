// The form: a bundle's defaults -> fields, fields -> a request, a file's settings -> fields. Knows
// options of sampling; sends nothing.

import { byId, el, show } from "/page/dom.js";

const NUMBERS = ["guidance_scale", "temperature", "top_k", "top_p", "min_p", "steps"];
const SLIDER_END = { n: 16, best_of: 16 };

/** Couples each number field of `root` with its slider. The number holds the exact value. */
export function linkSliders(root) {
  for (const field of root.querySelectorAll(".slider")) {
    const [number, range] = field.querySelectorAll("input");
    range.addEventListener("input", () => {
      number.value = range.value;
      number.dispatchEvent(new Event("input", { bubbles: true }));
    });
    number.addEventListener("input", () => follow(range, number.value));
  }
}

/** Sets a number field and its slider. */
export function setNumber(input, value) {
  input.value = value ?? "";
  const range = input.closest(".slider")?.querySelector("input[type=range]");
  if (range) follow(range, input.value);
}

function follow(range, value) {
  if (value === "") return;
  if (Number(value) > Number(range.max)) range.max = value;
  range.value = value;
}

/** The fields of the form, over one bundle. */
export class Form {
  constructor(model) {
    this.model = model;
    linkSliders(byId("form"));
    byId("examples").replaceChildren(...model.examples.map((value) => el("option", { value })));
    this.#addStyles();
    byId("judge").querySelector("[value=likelihood]").disabled = !model.can_guide;
    const most = Math.min(model.limits.n ?? SLIDER_END.n, SLIDER_END.n);
    byId("n").max = model.limits.n;
    byId("n").closest(".slider").querySelector("input[type=range]").max = most;
    byId("prompt").maxLength = model.limits.prompt;
    byId("random").addEventListener("change", () => this.#showSeed());
    this.#fillDefaults();
    setNumber(byId("n"), Math.min(4, most));
    show(byId("form"));
  }

  /** The prompt with the style. */
  get prompt() {
    const prompt = byId("prompt").value.trim();
    const style = this.#style();
    return style && prompt ? `${prompt}, ${style} style` : prompt;
  }

  /**
   * The options of edits and variations. The bundle's own number of steps is left out: it is for
   * whole images, and the server takes as many as a part needs.
   */
  optionsOfChanges() {
    const found = this.options();
    if (found.steps === this.model.defaults.num_inference_steps) delete found.steps;
    return found;
  }

  /** The options that edits and variations share with drawing. Empty fields are as in the bundle. */
  options() {
    const found = {};
    const add = (name, value) => {
      if (value !== "") found[name] = Number(value);
    };
    add("n", byId("n").value);
    if (!byId("random").checked) add("seed", byId("seed").value);
    for (const name of NUMBERS) {
      const input = byId(name);
      if (!input.closest("[hidden]")) add(name, input.value);
    }
    return found;
  }

  /** All fields of a request for images. */
  generation() {
    const fields = { prompt: this.prompt, ...this.options() };
    const best = Number(byId("best_of").value);
    if (best > 1) {
      fields.best_of = best;
      fields.judge = byId("judge").value;
    }
    return fields;
  }

  /**
   * Fills the fields with the settings of an image. Returns a line about what they give.
   */
  fill(settings) {
    this.#fillDefaults();
    const { prompt = "", image = 0, seed } = settings;
    this.setPrompt(String(prompt));
    for (const name of NUMBERS) if (settings[name] !== undefined) setNumber(byId(name), settings[name]);
    if (settings.num_inference_steps !== undefined) byId("steps").value = settings.num_inference_steps;
    if (settings.best_of) byId("best_of").value = settings.best_of;
    if (settings.judge && (this.model.can_guide || settings.judge !== "likelihood")) {
      byId("judge").value = settings.judge;
    }
    const most = Math.floor((this.model.limits.n ?? Infinity) / Number(byId("best_of").value));
    const images = Math.min(Number(byId("n").value), most); // as many as the server samples
    setNumber(byId("n"), Math.max(images, image + 1));
    byId("random").checked = seed === undefined;
    this.#showSeed();
    byId("more").open = true;
    if (seed === undefined) return "The settings have no seed.";
    if (!Number.isSafeInteger(seed)) {
      byId("random").checked = true;
      this.#showSeed();
      return "The seed has more digits than this page can hold; use the API with it.";
    }
    byId("seed").value = seed;
    if (settings.bundle && settings.bundle !== this.model.id) {
      return `The settings are of the bundle ${settings.bundle}; ${this.model.id} draws other images.`;
    }
    if (settings.best_of === undefined) {
      return "The settings are of a changed image. Drawing samples all of its codes.";
    }
    return `Settings filled in. The image is number ${image + 1} of this seed.`;
  }

  /** Fills the prompt; a trained style at its end goes into the picker. */
  setPrompt(prompt) {
    const found = /^(.*), (\S+) style$/.exec(prompt);
    const style = found && this.model.styles.includes(found[2]) ? found[2] : "";
    byId("prompt").value = style ? found[1] : prompt;
    for (const radio of document.getElementsByName("style")) radio.checked = radio.value === style;
  }

  #style() {
    return [...document.getElementsByName("style")].find((radio) => radio.checked)?.value ?? "";
  }

  #addStyles() {
    const box = byId("styles");
    for (const style of this.model.styles.length ? ["", ...this.model.styles] : []) {
      const radio = el("input", { type: "radio", name: "style", value: style, checked: !style });
      box.append(el("label", {}, radio, el("span", {}, style || "any")));
    }
    show(box, this.model.styles.length > 0);
  }

  #fillDefaults() {
    const { defaults } = this.model;
    for (const name of NUMBERS) setNumber(byId(name), defaults[name]);
    byId("steps").value = defaults.num_inference_steps ?? "";
    byId("best_of").value = 1;
    byId("judge").value = this.model.can_guide ? "likelihood" : "consensus";
  }

  #showSeed() {
    byId("seed").disabled = byId("random").checked;
  }
}
