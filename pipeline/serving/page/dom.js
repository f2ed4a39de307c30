// Elements of the page: finding them and making them. Knows nothing of images.

export const byId = (id) => document.getElementById(id);

/**
 * A new element. Attributes with a dash, `role`, `class` and `for` are set as attributes, functions
 * listen to events, all others are properties.
 */
export function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (/-|^(role|class|for)$/.test(name)) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Shows an element, or hides it. */
export function show(node, is = true) {
  node.hidden = !is;
}

/** Hides what a bundle cannot do: elements with `data-needs` name a property of the model. */
export function hideUnsupported(model) {
  for (const node of document.querySelectorAll("[data-needs]")) {
    show(node, Boolean(model[node.dataset.needs]));
  }
}

/** Fills a `dl` with names and values; absent values are left out. */
export function facts(list, pairs) {
  const there = Object.entries(pairs).filter(([, value]) => value !== undefined && value !== null);
  list.replaceChildren(
    ...there.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]),
  );
}

/** Shows an error's message where screen readers announce it; none clears it. */
export function showError(node, error) {
  node.textContent = error ? error.message : "";
}

/** A line for screen readers and eyes, about what happens. */
export function announce(text) {
  byId("status").textContent = text;
}
