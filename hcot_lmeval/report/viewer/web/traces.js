// Traces: elements to build, what the page holds, and a trace as rows.

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

// What the page holds: a row about each trace, and the traces themselves, compressed until they are wanted.

const INDEX = JSON.parse(byId("index").textContent);
const ROWS = INDEX.rows;
const SOURCES = INDEX.sources;
const SEPARATOR = "\u0000";

ROWS.forEach((row, place) => {
  row.place = place;
  row.faults = Object.values(row.malformed).reduce((sum, count) => sum + count, 0);
  row.verdict = row.score === null ? "unknown" : row.score === 1 ? "right" : row.score === 0 ? "wrong" : "some right";
});

/** Returns the two lines of JSON of one trace. */
async function unpack(place) {
  const packed = byId(`blob${place}`).textContent;
  const bytes = Uint8Array.fromBase64
    ? Uint8Array.fromBase64(packed)
    : Uint8Array.from(atob(packed), (char) => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const opened = new Map(); // place -> promise of a trace; the last few

function openTrace(place) {
  if (!opened.has(place)) {
    opened.set(place, unpack(place).then((lines) => readTrace(ROWS[place], lines)));
    if (opened.size > 24) opened.delete(opened.keys().next().value);
  }
  return opened.get(place);
}

function readTrace(row, lines) {
  const end = lines.indexOf("\n");
  const [prompt, text] = JSON.parse(lines.slice(0, end));
  return new Trace(row, prompt, text, JSON.parse(lines.slice(end + 1)));
}

/** All texts in lower case, unpacked in the background, so that a search reads memory alone. */
class Haystack {
  constructor() {
    this.texts = new Array(ROWS.length);
    this.ready = 0;
    this.onprogress = () => {};
  }

  async fill() {
    const waiting = [...ROWS.keys()];
    const worker = async () => {
      while (waiting.length) {
        const place = waiting.shift();
        const lines = await unpack(place);
        const [prompt, text] = JSON.parse(lines.slice(0, lines.indexOf("\n")));
        this.texts[place] = (prompt + SEPARATOR + text).toLowerCase();
        this.ready += 1;
        if (this.ready % 25 === 0 || this.ready === ROWS.length) this.onprogress();
      }
    };
    await Promise.all([worker(), worker(), worker(), worker()]);
  }

  get whole() {
    return this.ready === ROWS.length;
  }

  /** Returns place -> number of hits, of the texts unpacked so far. */
  find(query) {
    const needle = query.toLowerCase();
    const hits = new Map();
    this.texts.forEach((text, place) => {
      let count = 0;
      for (let at = text.indexOf(needle); at >= 0; at = text.indexOf(needle, at + needle.length)) count += 1;
      if (count) hits.set(place, count);
    });
    return hits;
  }
}

/** Returns the rows of other responses to the same problem: of other runs first, of the same repeat first. */
function counterparts(row) {
  const same = ROWS.filter((other) => other !== row && other.task === row.task && other.doc === row.doc);
  const distance = (other) => (other.source === row.source ? 1e6 : 0) + Math.abs(other.repeat - row.repeat);
  return same.sort((a, b) => distance(a) - distance(b) || a.place - b.place);
}

// A trace as a flat list of rows. Depth is a number, not nesting: a trace may open a thousand blocks.

const CHUNK = 1200; // characters of a row of text, about

class Trace {
  constructor(row, prompt, text, structure) {
    Object.assign(this, { row, prompt, text, growth: structure.growth, trees: structure.trees });
    Object.assign(this, { formulas: structure.formulas, promptFormulas: structure.prompt_formulas });
    this.total = row.prompt_tokens + row.generated_tokens;
    this.segments = [];
    let token = row.prompt_tokens;
    let at = 0;
    for (const [kind, count, chars, depth, gone, fault] of structure.segments) {
      this.segments.push({ place: this.segments.length, kind, start: token, count, from: at, to: at + chars, depth, gone, fault });
      token += count;
      at += chars;
    }
    this.blocks = structure.blocks.map(([open, split, close, depth, thought, solution, pruned], place) => ({
      place, open, split, close, depth, thought, solution, pruned, parent: -1, gone: 0,
    }));
    this.adopt();
  }

  /** Tells every segment its innermost block, and every block its parent and how much of its thought is gone. */
  adopt() {
    const byOpen = (this.byOpen = new Map(this.blocks.map((block) => [block.open, block])));
    const gone = [0];
    const stack = [];
    for (const segment of this.segments) {
      gone.push(gone[segment.place] + (segment.gone ? segment.count : 0));
      const block = byOpen.get(segment.place);
      if (block) {
        block.parent = stack.length ? stack[stack.length - 1].place : -1;
        stack.push(block);
      }
      segment.block = stack.length ? stack[stack.length - 1].place : -1;
      if (stack.length && stack[stack.length - 1].close === segment.place) stack.pop();
    }
    for (const block of this.blocks) block.gone = gone[this.thoughtEnd(block)] - gone[block.open + 1];
  }

  /** Indices of the malformed tokens, and of the openings of blocks that were never closed. */
  get faults() {
    const faulty = this.segments.filter((segment) => segment.fault);
    const unclosed = this.blocks.filter((block) => block.close < 0).map((block) => this.segments[block.open]);
    return [...faulty, ...unclosed].map((segment) => segment.start).sort((a, b) => a - b);
  }

  /** Index of the segment behind the thought of a block: its split, its close, or the end. */
  thoughtEnd(block) {
    return block.split >= 0 ? block.split : block.close >= 0 ? block.close : this.segments.length;
  }

  inThought(block, place) {
    return place > block.open && place < this.thoughtEnd(block);
  }

  /** Whether the segment stands in the solution of its innermost block. */
  inSolution(segment) {
    const block = this.blocks[segment.block];
    return Boolean(block) && block.split >= 0 && segment.place > block.split && segment.place !== block.close;
  }

  /** Segment that holds the token at index `token`. */
  segmentAt(token) {
    return this.segments[Math.max(0, lastOf(this.segments, (segment) => segment.start <= token))];
  }

  /** Segment that holds the character at index `at` of the text. */
  segmentOf(at) {
    return this.segments[Math.max(0, lastOf(this.segments, (segment) => segment.from <= at))];
  }

  /** Rows of the segments [begin, end); `folded` says whether the thought of a block is hidden. */
  tree(begin, end, folded) {
    const rows = [];
    const { byOpen } = this;
    for (let place = begin; place < end; place += 1) {
      const segment = this.segments[place];
      const block = this.blocks[segment.block];
      if (segment.kind === "o") {
        rows.push({ type: "head", segment, block: byOpen.get(place), start: segment.start, depth: segment.depth });
        if (folded(byOpen.get(place))) place = this.thoughtEnd(byOpen.get(place)) - 1;
      } else if (segment.kind === "s") {
        const next = this.segments[place + 1];
        const heads = block && block.split === place;
        if (heads && !segment.fault && next && next.kind === "t" && !next.fault) continue; // the text says it
        rows.push({ type: heads ? "split" : "marker", segment, block, start: segment.start, depth: segment.depth });
      } else if (segment.kind === "c") {
        rows.push({ type: "close", segment, block, start: segment.start, depth: segment.depth + 1 });
      } else if (segment.fault) {
        rows.push({ type: "fault", segment, block, start: segment.start, depth: segment.depth });
      } else rows.push(...this.textRows(segment, segment.to));
    }
    return rows;
  }

  /** Rows of what was live just after the token at index `moment`; what was out of sight becomes a cut. */
  sight(moment) {
    const rows = [];
    let cut = null;
    for (const segment of this.segments) {
      if (segment.start > moment) break;
      if (segment.gone && segment.gone <= moment) {
        cut ??= rows[rows.push({ type: "cut", tokens: 0, start: segment.start, depth: segment.depth, segment }) - 1];
        cut.tokens += segment.count;
        continue;
      }
      cut = null;
      const share = Math.min(1, (moment + 1 - segment.start) / segment.count);
      const to = segment.from + Math.round((segment.to - segment.from) * share);
      if (segment.kind === "t" && !segment.fault) rows.push(...this.textRows(segment, to));
      else {
        const depth = segment.depth - (segment.kind === "o" || segment.kind === "s" ? 1 : 0);
        rows.push({ type: "marker", segment, start: segment.start, depth });
      }
    }
    const future = this.total - 1 - moment;
    if (future > 0) rows.push({ type: "future", tokens: future, start: moment, depth: 0 });
    return rows;
  }

  /** A run of text in rows of about `CHUNK` characters that end at a line's end where there is one. */
  textRows(segment, to) {
    const rows = [];
    const rate = segment.count / Math.max(segment.to - segment.from, 1);
    for (let from = segment.from; from < to; ) {
      const end = this.lineEnd(from, to);
      const start = segment.start + Math.floor((from - segment.from) * rate);
      const solution = this.inSolution(segment);
      const first = solution && from === segment.from && this.blocks[segment.block].split === segment.place - 1;
      rows.push({ type: "text", segment, start, depth: segment.depth, from, to: end, solution, first });
      from = end;
    }
    return rows;
  }

  lineEnd(from, to) {
    if (to - from <= CHUNK * 1.5) return to;
    let end = this.text.indexOf("\n", from + CHUNK);
    if (end < 0 || end > from + 3 * CHUNK) end = this.text.indexOf(" ", from + 2 * CHUNK);
    if (end < 0 || end > from + 4 * CHUNK) end = from + 2 * CHUNK;
    const formula = formulasWithin(this.formulas, end, end + 1)[0];
    return Math.min(to, formula ? formula[1] : end + 1);
  }
}

/** The formulas [from, to, tree] that reach beyond `from` and begin before `to`; they are in order. */
function formulasWithin(formulas, from, to) {
  return formulas.slice(lastOf(formulas, ([, end]) => end <= from) + 1, lastOf(formulas, ([start]) => start < to) + 1);
}

// Rows to elements.

const DEEPEST = 24; // blocks deeper than this are drawn at this indent

class Painter {
  constructor(trace, hits, query) {
    Object.assign(this, { trace, hits, length: query.length, promptHits: hitsIn(trace.prompt, query) });
    this.unit = trace.row.unit;
  }

  /** Returns the element of a row. `ontoggle(block)` is called when a head is pressed. */
  row(row, folded, ontoggle) {
    const node = make("div", { class: `row ${row.type}`, data: { start: row.start } });
    node.style.setProperty("--depth", Math.min(row.depth, DEEPEST));
    this[row.type](node, row, folded, ontoggle);
    node.row = row;
    return node;
  }

  head(node, { block, segment }, folded, ontoggle) {
    const shut = folded(block);
    node.style.setProperty("--depth", Math.min(segment.depth - 1, DEEPEST));
    const button = make("button", {
      type: "button", class: "toggle", "aria-expanded": String(!shut), on: { click: () => ontoggle(block) },
      "aria-label": this.spoken(block),
    });
    button.append(
      make("span", { class: "caret", "aria-hidden": "true" }),
      make("span", { class: "word thought", text: "thought" }),
      make("span", { class: "tokens", text: number(block.thought) }),
      make("span", { class: "arrow", text: "→" }),
      make("span", { class: "word solution", text: "solution" }),
      make("span", { class: "tokens", text: block.split < 0 ? "none" : number(block.solution) }),
      make("span", { class: "where", text: `depth ${block.depth} · from ${number(segment.start)}` }),
      this.fate(block),
    );
    const end = this.trace.segments[this.trace.thoughtEnd(block) - 1].to;
    const hidden = this.hitsWithin(segment.to, end);
    if (hidden) button.append(make("span", { class: "badge hit", text: plural(hidden, "hit") }));
    if (block.close < 0) button.append(faultBadge("unclosed"));
    node.append(button);
    const preview = this.trace.text.slice(segment.to, Math.min(segment.to + 160, end)).split("\n").join(" ").trim();
    const line = make("span", { class: "preview", "aria-hidden": "true" });
    appendPlain(line, preview);
    button.append(line);
  }

  spoken(block) {
    const solution = block.split < 0 ? "no solution" : `solution of ${plural(block.solution, this.unit)}`;
    return `thought of ${plural(block.thought, this.unit)}, ${solution}, depth ${block.depth}`;
  }

  fate(block) {
    if (block.thought === 0) return make("span", { class: "badge", text: "empty" });
    if (block.gone === 0) return make("span", { class: "badge kept", text: "kept", title: "Nothing of this thought left the live context." });
    if (block.gone < block.thought) {
      return make("span", { class: "badge pruned", text: `${number(block.gone)} gone`, title: "Part of this thought left the live context." });
    }
    const text = block.pruned ? `pruned ${number(block.pruned)}` : "pruned";
    const title = block.pruned
      ? `The return threw ${plural(block.pruned, this.unit)} out of the live context; blocks within had been pruned before.`
      : "This thought left the live context later.";
    return make("span", { class: "badge pruned", text, title });
  }

  split(node, { block, segment }) {
    node.style.setProperty("--depth", Math.min(segment.depth - 1, DEEPEST));
    node.append(make("span", { class: "word solution", text: "solution" }));
    if (segment.fault) node.append(faultBadge(segment.fault));
    if (block.solution === 0) node.append(make("span", { class: "where", text: "empty" }));
  }

  close(node, { block, segment }) {
    node.style.setProperty("--depth", Math.min(segment.depth, DEEPEST));
    const told = block && block.pruned ? `threw away ${plural(block.pruned, this.unit)}` : "nothing thrown away";
    node.append(make("span", { class: "word return", text: "return" }), make("span", { class: "where", text: told }));
    if (segment.fault) node.append(faultBadge(segment.fault));
    node.classList.toggle("faulty", Boolean(segment.fault));
  }

  fault(node, { segment }) {
    const marker = make("span", { class: "marker" });
    this.marked(marker, this.trace.text, segment.from, segment.to, this.hits);
    node.append(marker, faultBadge(segment.fault));
  }

  marker(node, { segment }) {
    const marker = make("span", { class: `marker ${{ o: "thought", s: "solution", c: "return", t: "" }[segment.kind]}` });
    appendPlain(marker, this.trace.text.slice(segment.from, segment.to).trim());
    node.append(marker);
    if (segment.fault) node.append(faultBadge(segment.fault));
  }

  cut(node, { tokens }) {
    node.append(make("span", { class: "scissors", text: `✂ ${plural(tokens, this.unit)} out of sight` }));
  }

  future(node, { tokens }) {
    node.append(make("span", { class: "scissors", text: `${plural(tokens, this.unit)} still to be written` }));
  }

  text(node, { segment, from, to, solution, first }) {
    node.classList.toggle("gone", Boolean(segment.gone));
    node.classList.toggle("in-solution", solution);
    node.dir = "auto";
    if (first && !this.trace.segments[segment.place - 1].fault) node.append(make("span", { class: "word solution", text: "solution" }), " ");
    [from, to] = [trimStart(this.trace.text, from, to), trimEnd(this.trace.text, from, to)];
    node.classList.toggle("blank", from >= to && !first);
    this.rich(node, this.trace.text, from, to, this.trace.formulas, this.hits);
  }

  prompt(node) {
    node.dir = "auto";
    this.rich(node, this.trace.prompt, 0, this.trace.prompt.length, this.trace.promptFormulas, this.promptHits);
  }

  /** Appends text with its formulas drawn and its hits marked; a formula that holds a hit is marked whole. */
  rich(parent, text, from, to, formulas, hits) {
    let at = from;
    for (const [start, stop, tree] of formulasWithin(formulas, from, to)) {
      if (start < at || stop > to) continue; // cut off at a moment
      const display = this.trace.trees[tree][1].display === "block";
      this.marked(parent, text, at, display ? trimEnd(text, at, start) : start, hits);
      const hit = hits.find((place) => place < stop && place + this.length > start);
      const holder = make("span", {
        class: `math${display ? " display" : ""}${hit === undefined ? "" : " hit"}`, title: text.slice(start, stop),
        data: hit === undefined ? {} : { hit },
      });
      holder.append(makeMath(this.trace.trees[tree]));
      parent.append(holder);
      at = display ? trimStart(text, stop, to) : stop;
    }
    this.marked(parent, text, at, to, hits);
  }

  /** Appends text with its hits marked. */
  marked(parent, text, from, to, hits) {
    let at = from;
    for (const hit of hits) {
      if (hit + this.length <= at) continue;
      if (hit >= to) break;
      const [start, stop] = [Math.max(hit, at), Math.min(hit + this.length, to)];
      appendPlain(parent, text.slice(at, start));
      const mark = make("mark", { data: { hit } });
      appendPlain(mark, text.slice(start, stop));
      parent.append(mark);
      at = stop;
    }
    if (at < to) appendPlain(parent, text.slice(at, to));
  }

  hitsWithin(from, to) {
    return this.hits.filter((hit) => hit >= from && hit < to).length;
  }
}

function faultBadge(name) {
  return make("span", { class: "badge fault", text: `⚠ ${name.split("_").join(" ")}`, title: INDEX.faults[name] });
}

/** Spaces at the ends of a row, and around a formula that stands alone, would show as empty lines. */
function trimEnd(text, from, to) {
  while (to > from && " \n".includes(text[to - 1])) to -= 1;
  return to;
}

function trimStart(text, from, to) {
  while (from < to && " \n".includes(text[from])) from += 1;
  return from;
}
