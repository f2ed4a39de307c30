// The API's page, of the server's own description. Knows OpenAPI alone.

import { byId, el, showError } from "/page/dom.js";

let schemas = {};

async function start() {
  try {
    const response = await fetch("/openapi.json");
    const api = await response.json();
    schemas = api.components?.schemas ?? {};
    byId("summary").textContent = api.info.summary ?? "";
    byId("curl").textContent = example();
    const endpoints = Object.entries(api.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => ({ path, method, operation })),
    );
    byId("contents").append(el("ul", {}, ...endpoints.map(link)));
    byId("endpoints").append(...endpoints.map(section));
  } catch (error) {
    showError(byId("alert"), new Error(`the description cannot be read (${error.message})`));
  }
}

function example() {
  const body = JSON.stringify({ prompt: "a red heart", n: 2, seed: 1 });
  return [
    `curl ${location.origin}/v1/images/generations \\`,
    '  -H "Content-Type: application/json" \\',
    '  -H "Authorization: Bearer $TOKEN" \\',
    `  -d '${body}'`,
  ].join("\n");
}

const anchor = ({ method, path }) => `${method}${path.replace(/\W+/g, "-")}`;
const title = ({ method, path }) => [
  el("span", { class: `method ${method}` }, method.toUpperCase()),
  el("code", {}, path),
];

function link(endpoint) {
  return el("li", {}, el("a", { href: `#${anchor(endpoint)}` }, ...title(endpoint)));
}

function section(endpoint) {
  const { operation } = endpoint;
  const text = (operation.description ?? operation.summary ?? "").split(/\n\s*\n/);
  const parts = text.map((paragraph) => el("p", {}, paragraph));
  const parameters = (operation.parameters ?? []).map((one) => ({ ...one.schema, ...one }));
  if (parameters.length) parts.push(...fields("Parameters", parameters));
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
    parts.push(...fields("Request", properties(schema), type));
  }
  for (const [status, answer] of Object.entries(operation.responses ?? {})) {
    const schema = answer.content?.["application/json"]?.schema;
    const found = status < 300 ? properties(schema) : [];
    if (found.length) parts.push(...fields("Answer", found, "application/json"));
  }
  const heading = el("h3", { id: anchor(endpoint) }, ...title(endpoint));
  return el("section", { class: "endpoint" }, heading, ...parts);
}

/** The fields of a schema, by name. */
function properties(schema) {
  const known = resolved(schema);
  return Object.entries(known.properties ?? {}).map(([name, one]) => ({
    ...one,
    name,
    required: known.required?.includes(name),
  }));
}

function fields(name, list, type = "") {
  const rows = list.map((field) => {
    const about = [el("code", {}, field.name), field.required ? " (required)" : ""];
    const notes = [field.description, limits(field)].filter(Boolean).join("; ");
    return el("tr", {}, el("th", { scope: "row" }, ...about), el("td", {}, typeOf(field)), el("td", {}, notes));
  });
  const head = el("tr", {}, ...["Field", "Type", "Meaning"].map((text) => el("th", { scope: "col" }, text)));
  const caption = el("caption", {}, name, type ? el("span", { class: "hint" }, ` ${type}`) : "");
  const table = el("table", {}, caption, el("thead", {}, head), el("tbody", {}, ...rows));
  return [el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": name }, table)];
}

function resolved(schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? schemas[name] : (schema ?? {});
}

/** The alternatives of a type, without the one of absence. */
function kinds(field) {
  return (field.anyOf ?? [field]).filter((one) => one.type !== "null");
}

function typeOf(field) {
  return kinds(field).map(typeName).join(" or ");
}

function typeName(field) {
  if (field.$ref) return field.$ref.split("/").pop();
  if (field.enum) return field.enum.map((value) => JSON.stringify(value)).join(", ");
  if (field.const !== undefined) return JSON.stringify(field.const);
  if (field.type === "array") return `array of ${typeOf(field.items ?? {})}`;
  if (field.format === "binary" || field.contentMediaType) return "file";
  return field.type ?? "any";
}

function limits(field) {
  const names = {
    minimum: "at least",
    exclusiveMinimum: "above",
    maximum: "at most",
    exclusiveMaximum: "below",
    maxLength: "characters at most",
  };
  const found = kinds(field).flatMap((one) =>
    Object.entries(names).filter(([key]) => one[key] !== undefined).map(([key, text]) => `${text} ${one[key]}`),
  );
  if (field.default !== undefined && field.default !== null && field.default !== "") {
    found.push(`default ${JSON.stringify(field.default)}`);
  }
  return found.join(", ");
}

start();
