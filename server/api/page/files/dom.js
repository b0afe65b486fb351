// Small helpers for elements. All text goes in as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; `class`, `data` and attributes with a dash are set as such. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function svg(tag, attributes = {}, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function number(value, digits = 0) {
  return Number(value).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function amount(value) {
  return number(value, value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2);
}

export function percent(share, digits = 0) {
  return `${number(100 * share, digits)} %`;
}

/** "1 byte", "2 bytes". */
export function count(value, noun) {
  return `${number(value)} ${noun}${value === 1 ? "" : noun.endsWith("s") ? "es" : "s"}`;
}

export function milliseconds(seconds) {
  return seconds < 1 ? `${number(1000 * seconds, seconds < 0.01 ? 1 : 0)} ms` : `${number(seconds, 2)} s`;
}

const NARROW = window.matchMedia("(prefers-reduced-motion: reduce)");
export const still = () => NARROW.matches;

/** A tile: a label, a figure with its unit, and a line of more. */
export function tile(label) {
  const value = h("span", { textContent: "–" });
  const unit = h("span", { class: "unit" });
  const more = h("div", { class: "more" });
  const box = h("div", { class: "tile" }, h("div", { class: "label", textContent: label }),
    h("div", { class: "value" }, value, " ", unit), more);
  return {
    box,
    set(figure, unitText, moreText) {
      value.textContent = figure;
      unit.textContent = unitText;
      if (moreText instanceof Node) more.replaceChildren(moreText);
      else more.textContent = moreText ?? "";
    },
  };
}

/** A labelled field of a form. `options` make it a select, `type` an input. */
export function field(prefix, name, label, { options, title, ...rest }) {
  const id = `${prefix}-${name}`;
  const control = options
    ? h("select", { id, name }, options.map(([value, text]) => h("option", { value, textContent: text ?? value })))
    : h("input", { id, name, ...rest });
  if (options && rest.value !== undefined) control.value = rest.value;
  if (title) control.title = title;
  return { box: h("div", { class: `field ${name}` }, h("label", { for: id, textContent: label }), control), control };
}
