// The page around it.

// The list of traces: filters, order, and only as many elements as fit on the screen.

const ROW_HEIGHT = 62;
const SORTS = {
  "by problem": (a, b) => byName(a.task, b.task) || byName(a.doc, b.doc) || a.repeat - b.repeat || a.source - b.source,
  "as in the file": () => 0,
  "generated ↓": (a, b) => b.generated_tokens - a.generated_tokens,
  "peak live ↓": (a, b) => b.peak_live_tokens - a.peak_live_tokens,
  "faults ↓": (a, b) => b.faults - a.faults,
  "wrong first": (a, b) => (a.score ?? 2) - (b.score ?? 2),
  "hits ↓": (a, b, hits) => (hits?.get(b.place) ?? 0) - (hits?.get(a.place) ?? 0),
};
const byName = (a, b) => String(a).localeCompare(String(b), "en", { numeric: true });
const FILTERS = [
  ["run", (row) => [SOURCES[row.source].name]],
  ["task", (row) => [row.task]],
  ["verdict", (row) => [row.verdict]],
  ["level", (row) => [row.level ?? "none"]],
  ["finish", (row) => [row.finish || "unknown"]],
  ["malformed", (row) => (row.faults ? ["any", ...Object.keys(row.malformed).map((kind) => kind.split("_").join(" "))] : ["well-formed"])],
];

const TASKS = new Set(ROWS.map((row) => row.task)).size;

class List {
  constructor(onchoose) {
    this.onchoose = onchoose;
    this.root = byId("list");
    this.space = make("div", { class: "space" });
    this.root.append(this.space);
    this.wanted = {};
    this.hits = null;
    this.drawFilters();
    this.root.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.root);
  }

  drawFilters() {
    for (const [name, values] of FILTERS) {
      const counts = new Map();
      for (const row of ROWS) for (const value of values(row)) counts.set(value, (counts.get(value) ?? 0) + 1);
      if (counts.size < 2) continue;
      const select = make("select", { id: `filter-${name}`, on: { change: () => { this.wanted[name] = select.value; this.update(); } } }, make("option", { value: "", text: `every ${name}` }));
      if (name === "malformed") select.options[0].text = "malformed or not";
      const ordered = [...counts].sort(([a], [b]) => byName(a, b));
      for (const [value, count] of ordered) select.append(make("option", { value, text: `${value === "any" ? "malformed" : value} (${number(count)})` }));
      byId("filters").append(make("label", {}, make("span", { class: "sr", text: name }), select));
    }
    const sort = make("select", { id: "sort", on: { change: () => { this.order = sort.value; this.update(); } } });
    for (const name of Object.keys(SORTS)) sort.append(make("option", { value: name, text: name }));
    byId("filters").append(make("label", {}, make("span", { class: "sr", text: "order" }), sort));
    this.order = "by problem";
  }

  /** Sets a filter from outside. */
  filter(name, value) {
    const select = byId(`filter-${name}`);
    if (!select) return;
    select.value = value;
    this.wanted[name] = value;
    this.update();
  }

  setHits(hits) {
    this.hits = hits;
    this.update();
  }

  update() {
    const compare = SORTS[this.order];
    const fits = (row) => FILTERS.every(([name, values]) => !this.wanted[name] || values(row).includes(this.wanted[name]));
    this.rows = ROWS.filter((row) => fits(row) && (!this.hits || this.hits.has(row.place)));
    this.rows.sort((a, b) => compare(a, b, this.hits) || a.place - b.place);
    const chosen = this.rows.length === ROWS.length ? plural(ROWS.length, "trace") : `${number(this.rows.length)} of ${plural(ROWS.length, "trace")}`;
    const graded = this.rows.filter((row) => row.score !== null);
    const right = graded.reduce((sum, row) => sum + row.score, 0);
    byId("count").textContent = graded.length ? `${chosen} · ${Math.round((100 * right) / graded.length)} % right` : chosen;
    this.space.style.height = `${this.rows.length * ROW_HEIGHT}px`;
    this.draw(true);
  }

  draw() {
    if (!this.rows) return;
    const first = Math.max(0, Math.floor(this.root.scrollTop / ROW_HEIGHT) - 6);
    const last = Math.min(this.rows.length, Math.ceil((this.root.scrollTop + this.root.clientHeight) / ROW_HEIGHT) + 6);
    this.space.replaceChildren(...this.rows.slice(first, last).map((row, i) => this.item(row, first + i)));
    this.root.setAttribute("aria-activedescendant", this.current === undefined ? "" : `item${this.current}`);
  }

  item(row, place) {
    const mark = { right: "✓", wrong: "✗", unknown: "·" }[row.verdict] ?? "◐";
    const hits = this.hits?.get(row.place);
    const item = make(
      "div",
      {
        class: "item", id: `item${row.place}`, role: "option", "aria-selected": String(row.place === this.current),
        "aria-setsize": this.rows.length, "aria-posinset": place + 1, on: { click: () => this.onchoose(row.place) },
      },
      make("span", { class: `mark ${row.verdict.split(" ")[0]}`, text: mark, title: row.verdict }),
      make("span", { class: "name" }, make("bdi", { text: `${row.doc}` }), TASKS > 1 && !this.wanted.task ? make("span", { class: "dim", text: ` ${row.task}` }) : null, row.repeat ? make("span", { class: "dim", text: ` #${row.repeat}` }) : null,
        row.faults ? make("span", { class: "warn", text: " ⚠", title: "malformed" }) : null,
        SOURCES.length > 1 && !this.wanted.run ? make("span", { class: `run-name source${row.source % 6}`, text: SOURCES[row.source].name }) : null,
        hits ? make("span", { class: "badge hit", text: number(hits) }) : null),
      make("span", { class: "size", text: number(row.generated_tokens), title: `${row.unit}s generated` }),
      make("bdi", { class: "preview" }),
      sparkline(row),
    );
    appendPlain(item.querySelector(".preview"), row.title);
    item.style.top = `${place * ROW_HEIGHT}px`;
    return item;
  }

  select(place) {
    this.current = place;
    const at = this.rows.findIndex((row) => row.place === place);
    if (at >= 0) {
      const top = at * ROW_HEIGHT;
      if (top < this.root.scrollTop) this.root.scrollTop = top;
      if (top + ROW_HEIGHT > this.root.scrollTop + this.root.clientHeight) this.root.scrollTop = top + ROW_HEIGHT - this.root.clientHeight;
    }
    this.draw();
  }

  /** The trace `step` places further in the list as it is shown. */
  beside(step) {
    const at = this.rows.findIndex((row) => row.place === this.current);
    const next = at < 0 ? this.rows[0] : this.rows[clamp(at + step, 0, this.rows.length - 1)];
    return next?.place;
  }
}

function sparkline(row) {
  const points = [...row.spark].map((char, i) => `${(i / (row.spark.length - 1)) * 100},${36 - parseInt(char, 36)}`);
  return makeSvg("svg", { class: "spark", viewBox: "0 0 100 37", preserveAspectRatio: "none", "aria-hidden": "true" }, makeSvg("polyline", { points: points.join(" ") }));
}

// The whole page: which trace, which mode, search, keys.

const MODES = [
  ["all", "Everything", "The tree of thoughts, pruned text folded"],
  ["moment", "What the model saw", "At the end, or at another moment; choose it on the curve"],
];
const haystack = new Haystack();
const panes = [];
let list, query = "", mode = "all", compared = false, partner = null, current;

function start() {
  byId("title").textContent = INDEX.title;
  for (const [name, word, meaning] of MODES) {
    byId("side-by-side").parentElement.querySelector(".modes").append(
      make("button", { type: "button", role: "radio", id: `mode-${name}`, title: meaning, text: word, on: { click: () => setMode(name) } }),
    );
  }
  list = new List((place) => choose(place));
  panes.push(new Pane({}));
  byId("panes").append(panes[0].root);
  if (SOURCES.length > 1 && ROWS.some((row) => row.source === 0 && counterparts(row).some((other) => other.source > 0))) {
    compared = true;
    list.filter("run", SOURCES[0].name);
  }
  list.update();
  readHash();
  setMode(mode);
  listen();
  haystack.onprogress = progress;
  setTimeout(() => haystack.fill(), 50);
}

function readHash() {
  const told = new URLSearchParams(location.hash.slice(1));
  if (MODES.some(([name]) => name === told.get("mode"))) mode = told.get("mode");
  const place = Number(told.get("trace"));
  choose(ROWS[place] && told.has("trace") ? place : list.rows[0]?.place ?? 0);
}

async function choose(place) {
  if (place === undefined) return;
  current = place;
  list.select(place);
  const others = counterparts(ROWS[place]);
  byId("side-by-side").disabled = !others.length;
  byId("side-by-side").setAttribute("aria-pressed", String(compared && others.length > 0));
  try {
    await Promise.all([panes[0].show(place, query, mode), drawPartner(others)]);
  } catch (error) {
    byId("panes").replaceChildren(make("p", { class: "notice", role: "alert", text: `This trace cannot be shown: ${error.message}. The page needs a browser of 2023 or later.` }));
    throw error;
  }
  history.replaceState(null, "", `#trace=${place}${mode === "all" ? "" : `&mode=${mode}`}`);
  document.documentElement.dataset.shown = String(place);
}

async function drawPartner(others) {
  const wanted = compared && others.length ? (others.find((row) => row.place === partner) ?? others[0]) : null;
  byId("panes").classList.toggle("two", Boolean(wanted));
  if (!wanted) {
    if (panes[1]) panes.pop().root.remove();
    return;
  }
  if (!panes[1]) {
    panes.push(new Pane({ beside: () => partnerChoice() }));
    byId("panes").append(panes[1].root);
  }
  panes[1].others = others;
  await panes[1].show(wanted.place, query, mode);
}

function partnerChoice() {
  const pane = panes[1];
  const select = make("select", { "aria-label": "Which response to show beside", on: { change: () => { partner = Number(select.value); drawPartner(pane.others); } } });
  for (const row of pane.others) {
    select.append(make("option", { value: row.place, text: `${SOURCES[row.source].name} · response ${row.repeat} · ${row.verdict}` }));
  }
  select.value = String(pane.place);
  return pane.others.length > 1 ? select : null;
}

function compare(on) {
  compared = on;
  choose(current);
}

function setMode(name) {
  mode = name;
  for (const [other] of MODES) {
    byId(`mode-${other}`).setAttribute("aria-checked", String(other === name));
    byId(`mode-${other}`).tabIndex = other === name ? 0 : -1;
  }
  for (const pane of panes) pane.setMode(name);
}

// --- search ----------------------------------------------------------------------------------------------------------

let typing = 0;

function typed() {
  clearTimeout(typing);
  typing = setTimeout(() => search(byId("query").value), 120);
}

function search(text) {
  query = text;
  for (const pane of panes) pane.search(query);
  progress();
}

/** Shows what was found so far; called again as more texts are unpacked. */
function progress() {
  if (query) list.setHits(haystack.find(query));
  else if (list.hits) list.setHits(null);
  const ready = haystack.whole ? "" : `reading ${number(haystack.ready)} of ${number(ROWS.length)}`;
  const found = query ? [...list.hits.values()].reduce((sum, count) => sum + count, 0) : 0;
  byId("progress").textContent = query ? `${plural(found, "hit")}${ready ? `, ${ready}` : ""}` : ready;
  Object.assign(document.documentElement.dataset, { ready: String(haystack.whole), query });
}

// --- keys ------------------------------------------------------------------------------------------------------------

const ACTIONS = {
  j: () => choose(list.beside(1)),
  k: () => choose(list.beside(-1)),
  "/": () => byId("query").select(),
  n: () => panes[0].nextHit(1),
  N: () => panes[0].nextHit(-1),
  e: () => panes.forEach((pane) => pane.foldAll(false)),
  c: () => panes.forEach((pane) => pane.foldAll(true)),
  m: () => setMode(MODES[(MODES.findIndex(([name]) => name === mode) + 1) % MODES.length][0]),
  s: () => compare(!compared),
};

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest("input, select, textarea");
  if (event.key === "Escape") return escape(field);
  if (field) {
    if (event.key === "Enter" && field.id === "query") panes[0].nextHit(1);
    return;
  }
  if (event.target.closest("#list") && ["ArrowDown", "ArrowUp"].includes(event.key)) {
    event.preventDefault();
    choose(list.beside(event.key === "ArrowDown" ? 1 : -1));
  } else if (ACTIONS[event.key]) {
    event.preventDefault();
    ACTIONS[event.key]();
  }
}

function escape(field) {
  if (byId("query").value) {
    byId("query").value = "";
    search("");
  }
  field?.blur();
}

function listen() {
  document.addEventListener("keydown", pressed);
  byId("query").addEventListener("input", typed);
  byId("side-by-side").addEventListener("click", () => compare(!compared));
  document.querySelector(".modes").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = MODES[(MODES.findIndex(([name]) => name === mode) + step + MODES.length) % MODES.length][0];
    setMode(next);
    byId(`mode-${next}`).focus();
  });
}

start();
