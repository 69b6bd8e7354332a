// The whole page: which trace, which mode, search, keys.

const MODES = [
  ["all", "Everything", "The tree of thoughts, pruned text folded"],
  ["live", "Live at the end", "What the model saw when it wrote its last token"],
  ["moment", "At a moment", "What the model saw at one moment; choose it on the curve"],
];
const KEYS = [
  ["j k", "next, previous trace"], ["/", "search all texts"], ["n N", "next, previous hit"], ["e c", "unfold, fold all thoughts"],
  ["m", "next way of showing"], ["s", "another response to the same problem beside this one"], ["f F", "next, previous malformed place"],
  ["← →", "on the curve: move along the trace"], ["?", "this help"], ["Esc", "clear the search, close"],
];
const WORDS = [
  ["thought", "What was written between the markers that open and split a block. The return throws it away."],
  ["solution", "What came out of a thought; it stays when the thought is gone."],
  ["live context", "The tokens that the model sees: the prompt and what was generated since, without what was pruned."],
  ["piece", "A word or another sign; stands for tokens where a trace was not written by this engine."],
  ["position", "Markers are placed exactly. Within a run of text, tokens are spread evenly over the characters."],
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
  drawHelp();
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
  f: () => panes[0].nextFault(1),
  F: () => panes[0].nextFault(-1),
  m: () => setMode(MODES[(MODES.findIndex(([name]) => name === mode) + 1) % MODES.length][0]),
  s: () => compare(!compared),
  "?": () => byId("help").showModal(),
};

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
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
  drawer(false);
}

function drawer(open) {
  byId("side").classList.toggle("open", open);
  byId("drawer").setAttribute("aria-expanded", String(open));
}

function listen() {
  document.addEventListener("keydown", pressed);
  byId("query").addEventListener("input", typed);
  byId("side-by-side").addEventListener("click", () => compare(!compared));
  byId("help-open").addEventListener("click", () => byId("help").showModal());
  byId("drawer").addEventListener("click", () => drawer(!byId("side").classList.contains("open")));
  for (const id of ["list", "panes"]) byId(id).addEventListener("click", () => drawer(false));
  document.querySelector(".modes").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = MODES[(MODES.findIndex(([name]) => name === mode) + step + MODES.length) % MODES.length][0];
    setMode(next);
    byId(`mode-${next}`).focus();
  });
}

function drawHelp() {
  const table = (rows, tag) => rows.map(([name, meaning]) => make("div", {}, make("dt", {}, make(tag, { text: name })), make("dd", { text: meaning })));
  byId("help").replaceChildren(
    make("form", { method: "dialog" }, make("h2", { id: "help-title", text: "Keys and words" }), make("button", { class: "quiet", "aria-label": "Close", text: "✕" })),
    make("dl", {}, ...table(KEYS, "kbd")),
    make("dl", {}, ...table([...WORDS, ...TOTALS.map(([, word, meaning]) => [word, meaning])], "b")),
  );
}

start();
