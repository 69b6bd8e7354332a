// Building elements. Text from a trace only ever becomes a text node; names of elements and attributes are our own.

const SVG = "http://www.w3.org/2000/svg";
const MATHML = "http://www.w3.org/1998/Math/MathML";

const MATH_TAGS = new Set(
  ("math mrow mi mn mo mtext mspace msqrt mstyle mpadded menclose mtable mtr mtd mmultiscripts mprescripts " +
    "mfrac mroot msub msup munder mover msubsup munderover").split(" "),
);
const MATH_ATTRIBUTES = new Set(
  ("display accent displaystyle fence form largeop movablelimits separator stretchy symmetric mathvariant " +
    "lspace rspace width minsize maxsize scriptlevel linethickness").split(" "),
);

/** Makes an element. `props`: class, text, on (listeners), data (data-*), and attributes under their own names. */
function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key === "on") for (const [type, call] of Object.entries(value)) node.addEventListener(type, call);
    else if (key === "data") Object.assign(node.dataset, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function makeSvg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  node.append(...children);
  return node;
}

/** Builds MathML from a tree `[tag, attributes, child, ...]`. A name that is not on the lists is an error. */
function makeMath(tree) {
  const [tag, attributes, ...children] = tree;
  if (!MATH_TAGS.has(tag)) throw new Error(`element ${tag} is not allowed in a formula`);
  const enclosed = tag === "menclose"; // browsers lack it; a row with a border does
  const node = document.createElementNS(MATHML, enclosed ? "mrow" : tag);
  if (enclosed) node.setAttribute("class", /strike/.test(attributes.notation) ? "struck" : "boxed");
  if (attributes.columnalign) node.setAttribute("class", `align-${attributes.columnalign}`);
  for (const [key, value] of Object.entries(attributes)) if (MATH_ATTRIBUTES.has(key)) node.setAttribute(key, value);
  for (const child of children) node.append(typeof child === "string" ? child : makeMath(child));
  return node;
}

// Thinking tags, and characters that cannot be seen or that reverse the writing; see terminal.py.
const SPECIAL =
  /<\/?think>|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

/** Appends text to `parent`, with what cannot be seen made visible. */
function appendPlain(parent, text) {
  let place = 0;
  for (const found of text.matchAll(SPECIAL)) {
    if (found.index > place) parent.append(text.slice(place, found.index));
    const char = found[0];
    const shown = char.length > 1 ? char : `U+${char.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    parent.append(make("span", { class: char.length > 1 ? "tag" : "control", text: shown }));
    place = found.index + char.length;
  }
  if (place < text.length) parent.append(text.slice(place));
}

/** Index of the last of `items` for which `test` holds, where it holds for a first part of them; -1 if for none. */
function lastOf(items, test) {
  let [low, high] = [-1, items.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (test(items[middle])) low = middle;
    else high = middle - 1;
  }
  return low;
}

const number = (value) => Math.round(value).toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const byId = (id) => document.getElementById(id);
