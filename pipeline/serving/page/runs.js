// One request for images: what is sent, and what the stream of its answer says. Knows bodies; shows
// nothing.

import { ApiError, errorOf, request, requestJson, SILENT } from "/page/api.js";
import { base64Of, blobOf, scaled } from "/page/png.js";
import { events } from "/page/sse.js";

const PREVIEWS = 16;
const PATHS = {
  image: "/v1/images/generations",
  variation: "/v1/images/variations",
  edit: "/v1/images/edits",
  extension: "/v1/images/edits",
};

/** Codes of an image, over all levels. */
export function numCodes(model) {
  return model.grids.reduce((sum, [height, width]) => sum + height * width, 0);
}

/**
 * Yields `{index, preview}` with base64 of a PNG while codes arrive, and `{index, record}` for each
 * image that is complete.
 *
 * `run` has an `id`, a `kind`, the `fields`, and `files` by their name where the kind needs some.
 */
export async function* sampled(model, run, signal) {
  const every = Math.max(1, Math.round(numCodes(model) / PREVIEWS));
  const fields = { ...run.fields, stream: true, preview_every: every };
  const body = run.files ? { form: formOf(fields, run.files) } : { json: fields };
  const response = await request(PATHS[run.kind], { ...body, signal });
  let missing = fields.n ?? 1;
  for await (const event of events(response)) {
    if (event.type === "error") throw errorOf(event);
    const index = event.image_index;
    if (event.type.endsWith(".partial_image")) yield { index, preview: event.b64_json };
    if (!event.type.endsWith(".completed")) continue;
    missing--;
    yield { index, record: recordOf(model, run, event) };
  }
  if (missing > 0) throw new ApiError(SILENT);
}

function recordOf(model, run, event) {
  const { n, prompt, ...options } = run.fields;
  return {
    run: run.id,
    kind: run.kind,
    prompt: prompt ?? "",
    bundle: model.id,
    created: Date.now(),
    seed: event.seed,
    index: event.image_index,
    codes: event.codes,
    logLikelihood: event.log_likelihood,
    warnings: event.warnings,
    options: { ...options, seed: event.seed },
    blob: blobOf(event.b64_json),
  };
}

/**
 * The record of an image that was not drawn here: its middle in the bundle's size, with the codes of
 * the tokenizer and their likelihood given the prompt.
 */
export async function recordOfFile(model, file, prompt) {
  const blob = await scaled(file, model.width, model.height).catch(() => {
    throw new Error(`${file.name} is no image that the browser can read; choose a PNG or JPEG`);
  });
  const json = { prompt, image: await base64Of(blob) };
  const { codes, log_likelihood } = await requestJson("/v1/score", { json });
  return {
    run: `${Date.now()}-${Math.random()}`,
    kind: "file",
    file: file.name,
    prompt,
    bundle: model.id,
    created: Date.now(),
    seed: null,
    index: 0,
    codes,
    logLikelihood: log_likelihood,
    warnings: [],
    options: {},
    blob,
  };
}

function formOf(fields, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  for (const [name, blob] of Object.entries(files)) form.append(name, blob, `${name}.png`);
  return form;
}

/** What fills the form again with the settings of a record, named as in a PNG. */
export function settingsOfRecord(record) {
  const best = record.kind === "image" ? { best_of: record.options.best_of ?? 1 } : {};
  const { bundle, prompt, index } = record;
  return { ...record.options, ...best, bundle, prompt, image: index };
}
