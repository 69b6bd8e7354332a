// One trace on the screen.

// The live context over time. It follows the reading position; a click or the arrow keys go somewhere else.

class Curve {
  constructor(onjump) {
    this.onjump = onjump;
    this.plot = makeSvg("svg", { class: "plot", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.cursor = make("div", { class: "cursor" });
    this.dot = make("div", { class: "dot" });
    this.flag = make("span", { class: "flag" });
    this.scale = make("span", { class: "scale" });
    this.slider = make(
      "div",
      { class: "curve", role: "slider", tabindex: "0", "aria-label": "Reading position in the trace" },
      this.plot, this.cursor, this.dot,
    );
    this.root = make("div", { class: "curve-box" }, make("div", { class: "caption" }, this.flag, this.scale), this.slider);
    this.slider.addEventListener("pointerdown", (event) => this.point(event));
    this.slider.addEventListener("pointermove", (event) => event.buttons === 1 && this.point(event));
    this.slider.addEventListener("keydown", (event) => this.key(event));
  }

  show(trace, hits) {
    this.trace = trace;
    this.points = curvePoints(trace);
    const limit = SOURCES[trace.row.source].facts.max_context;
    const height = Math.max(trace.row.peak_live_tokens, 1);
    this.top = limit && limit <= 1.6 * height ? limit : height;
    this.first = trace.row.prompt_tokens;
    const width = Math.max(trace.total - this.first, 1);
    const [x, y] = [(token) => (token - this.first) / width * 1000, (live) => 100 - (live / this.top) * 96];
    const line = this.points.map(([token, live], i) => `${i ? "L" : "M"}${x(token).toFixed(2)} ${y(live).toFixed(2)}`).join("");
    this.plot.setAttribute("viewBox", "0 0 1000 100");
    this.plot.replaceChildren(
      makeSvg("path", { class: "unpruned", d: `M0 ${y(trace.row.started)}L1000 ${y(trace.row.started + width)}` }),
      makeSvg("path", { class: "area", d: `${line}L1000 100L0 100Z` }),
      makeSvg("path", { class: "line", d: line }),
      ...(this.top === limit ? [makeSvg("path", { class: "limit", d: `M0 ${y(limit)}H1000` })] : []),
      ...hits.map((token) => makeSvg("path", { class: "hit-tick", d: `M${x(token)} 0V9` })),
      ...trace.faults.map((token) => makeSvg("path", { class: "fault-tick", d: `M${x(token)} 88V100` })),
    );
    const window = this.top === limit ? ` of a window of ${number(limit)}` : "";
    this.scale.textContent = `peak live ${number(trace.row.peak_live_tokens)}${window}`;
    this.slider.setAttribute("aria-valuemin", this.first);
    this.slider.setAttribute("aria-valuemax", Math.max(trace.total - 1, this.first));
  }

  /** Live tokens just after the token at index `token`. */
  liveAt(token) {
    const points = this.points;
    const place = Math.max(0, lastOf(points, ([at]) => at <= token + 1));
    const grown = points[place + 1] ? Math.max(0, token + 1 - points[place][0]) : 0;
    return points[place][1] + grown;
  }

  move(token) {
    if (!this.trace) return;
    this.token = clamp(Math.round(token), this.first, Math.max(this.trace.total - 1, this.first));
    const share = (this.token - this.first) / Math.max(this.trace.total - this.first, 1);
    const live = this.liveAt(this.token);
    const depth = this.trace.segments.length ? this.trace.segmentAt(this.token).depth : 0;
    this.cursor.style.left = `${share * 100}%`;
    this.dot.style.left = `${share * 100}%`;
    this.dot.style.top = `${100 - (live / this.top) * 96}%`;
    this.flag.textContent = `${this.trace.row.unit} ${number(this.token)} · live ${number(live)} · depth ${depth}`;
    this.slider.setAttribute("aria-valuenow", this.token);
    this.slider.setAttribute("aria-valuetext", this.flag.textContent);
  }

  point(event) {
    const box = this.slider.getBoundingClientRect();
    const share = clamp((event.clientX - box.left) / box.width, 0, 1);
    this.jump(this.first + share * (this.trace.total - this.first));
    event.preventDefault();
    this.slider.focus({ preventScroll: true });
  }

  key(event) {
    const step = Math.max(1, Math.round((this.trace.total - this.first) / 100));
    const moves = { ArrowRight: step, ArrowLeft: -step, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation();
    this.jump(this.token + moves[event.key]);
  }

  jump(token) {
    const target = clamp(Math.floor(token), this.first, Math.max(this.trace.total - 1, this.first));
    this.onjump(target);
    this.move(target);
  }
}

/** Corners of the curve as [tokens of the trace so far, live tokens]. */
function curvePoints(trace) {
  let [token, live] = [trace.row.prompt_tokens, trace.row.started];
  const points = [[token, live]];
  for (const [grown, after] of trace.growth) {
    if (grown) points.push([(token += grown), (live += grown)]);
    if (after === null) continue;
    token += 1;
    if (trace.row.policy === "evict") points.push([token, live + 1]); // the return is read with the thought in sight
    points.push([token, (live = after)]);
  }
  return points;
}

// One trace on the screen: what is known about it, its curve, and its rows.

const TOTALS = [
  ["prompt_tokens", "prompt", "Tokens of the prompt."],
  ["generated_tokens", "generated", "Every token sampled, pruned later or not, the end token included."],
  ["pruned_tokens", "pruned", "Tokens thrown out of the live context by returns."],
  ["reforwarded_tokens", "re-forwarded", "Tokens read a second time because a thought before them was cut out (policy recompute)."],
  ["peak_live_tokens", "peak live", "The largest live context, prompt included: the memory needed."],
  ["live_tokens", "live at the end", "The live context when the generation ended: prompt + generated − pruned."],
  ["prune_events", "prunes", "Times at which something was thrown away."],
  ["max_depth", "depth", "Most blocks open at once."],
];
const MAX_HITS = 2000;
const HEADROOM = 8; // pixels above a row that is jumped to

class Pane {
  constructor(hooks) {
    this.hooks = hooks;
    this.head = make("div", { class: "pane-head" });
    this.curve = new Curve((token) => this.goTo(token));
    this.body = make("div", { class: "rows", tabindex: "0", role: "document", "aria-label": "Text of the trace" });
    this.root = make("section", { class: "pane" }, this.head, this.curve.root, this.body);
    this.body.addEventListener("scroll", () => this.follow(), { passive: true });
    this.folds = new Map(); // block -> folded, where the reader chose
    this.mode = "all";
  }

  async show(place, query, mode) {
    this.place = place;
    const trace = await openTrace(place);
    if (this.place !== place) return; // another one was asked for meanwhile
    if (this.trace !== trace) {
      this.folds.clear();
      this.moment = trace.total - 1;
    }
    this.trace = trace;
    this.mode = mode;
    this.setQuery(query);
    this.drawHead();
    this.draw();
    this.body.scrollTop = 0;
    this.follow();
  }

  setQuery(query) {
    this.hit = -1;
    this.query = query;
    this.hits = hitsIn(this.trace.text, query);
    this.painter = new Painter(this.trace, this.hits, query);
  }

  search(query) {
    if (!this.trace || query === this.query) return;
    this.setQuery(query);
    const token = this.curve.token;
    this.draw();
    this.scrollTo(token);
  }

  setMode(mode) {
    this.mode = mode;
    if (!this.trace) return;
    const token = mode === "moment" ? this.moment : this.curve.token;
    this.draw();
    if (mode === "moment") this.toWritten();
    else this.scrollTo(token);
    this.curve.move(token);
  }

  drawHead() {
    const { row } = this.trace;
    const source = SOURCES[row.source];
    const several = ROWS.some((other) => other.repeat !== 0);
    const facts = Object.entries(source.facts).map(([key, value]) => `${key.split("_").join(" ")} ${value}`).join(" · ");
    const title = make("h2", {}, `${row.task} · ${row.doc}${several ? ` · response ${row.repeat}` : ""}`);
    const chips = make("div", { class: "chips" }, verdictChip(row));
    if (row.extracted !== null) chips.append(chip("answer", row.extracted || "none"));
    if (row.gold !== null) chips.append(chip("gold", row.gold));
    if (row.level !== null) chips.append(make("span", { class: "chip", text: row.level }));
    if (row.finish) chips.append(make("span", { class: `chip ${row.finish === "eos" || row.finish === "stop" ? "" : "warn"}`, text: `ended by ${row.finish}`, title: FINISH[row.finish] }));
    for (const [kind, count] of Object.entries(row.malformed)) {
      const badge = faultBadge(kind);
      badge.append(count > 1 ? ` × ${number(count)}` : "");
      chips.append(badge);
    }
    for (const [cause, count] of Object.entries(row.forced)) {
      chips.append(make("span", { class: "chip warn", text: `${cause} × ${number(count)}`, title: "Tokens that came out otherwise than the model wanted, by this option" }));
    }
    if (row.loops) chips.append(make("span", { class: "chip warn", text: "loop", title: "The trace was found to repeat itself" }));
    const totals = make("dl", { class: "totals" });
    for (const [key, word, meaning] of TOTALS) {
      const text = TOKENS.has(key) ? meaning.replace("Tokens", row.unit === "piece" ? "Pieces (words and other signs)" : "Tokens") : meaning;
      totals.append(make("div", { title: text, tabindex: "0", "aria-label": `${word} ${row[key]}. ${text}` }, make("dt", { text: word }), make("dd", { text: number(row[key]) })));
    }
    const unit = row.unit === "piece" ? "counts are words and other signs, not tokens" : "counts are tokens";
    const time = row.seconds === null ? "" : ` · ${row.seconds.toFixed(1)} s`;
    const acts = row.prompt_acts ? " · markers in the prompt acted; the prompt is shown whole" : "";
    this.head.replaceChildren(
      make("div", { class: "pane-title" }, title, this.hooks.beside ? this.hooks.beside(row) : null),
      chips, totals,
      make("p", { class: "run" }, make("span", { class: `run-name source${row.source % 6}`, text: source.name }), ` ${facts ? `${facts} · ` : ""}${unit}${time}${acts}`),
    );
  }

  draw() {
    this.curve.show(this.trace, this.hits.map((at) => this.tokenOf(at)));
    const rows = this.mode === "all" ? this.trace.tree(0, this.trace.segments.length, this.folded) : this.trace.sight(this.moment);
    const prompt = make("div", { class: "prompt" });
    this.painter.prompt(prompt);
    const told = { all: "prompt", moment: `what the model saw just after ${this.trace.row.unit} ${number(this.moment)}: the prompt` };
    this.body.replaceChildren(make("div", { class: "label", text: `${told[this.mode]} · ${number(this.trace.row.prompt_tokens)}` }), prompt, make("div", { class: "label", text: this.mode === "all" ? `generated · ${number(this.trace.row.generated_tokens)}` : "and behind it" }), ...this.elements(rows), make("div", { class: "beyond" }));
    this.root.classList.toggle("seen", this.mode !== "all");
  }

  elements(rows) {
    const nodes = rows.map((row) => this.painter.row(row, this.folded, (block) => this.toggle(block)));
    return nodes.filter((node) => {
      const { type, block, segment } = node.row;
      const dull = type === "close" && block && this.folded(block) && !segment.fault;
      return !dull; // the head of a folded block tells what its return did
    });
  }

  folded = (block) => {
    if (block.thought === 0) return true;
    return this.folds.get(block.place) ?? (block.gone > 0 && block.gone === block.thought);
  };

  toggle(block) {
    this.folds.set(block.place, !this.folded(block));
    const top = this.body.scrollTop;
    this.draw();
    this.body.scrollTop = top;
    const start = this.trace.segments[block.open].start;
    this.body.querySelector(`.head[data-start="${start}"] button`)?.focus({ preventScroll: true });
    this.follow();
  }

  foldAll(shut) {
    if (!this.trace) return;
    const token = this.curve.token;
    for (const block of this.trace.blocks) this.folds.set(block.place, shut);
    this.draw();
    this.scrollTo(token);
  }

  tokenOf(at) {
    const segment = this.trace.segmentOf(at);
    const share = (at - segment.from) / Math.max(segment.to - segment.from, 1);
    return segment.start + Math.floor(share * segment.count);
  }

  /** Unfolds whatever hides a segment. */
  reveal(segment) {
    let hidden = false;
    for (let block = this.trace.blocks[segment.block]; block; block = this.trace.blocks[block.parent]) {
      if (!this.folded(block) || !this.trace.inThought(block, segment.place)) continue;
      this.folds.set(block.place, false);
      hidden = true;
    }
    if (hidden && this.mode === "all") this.draw();
  }

  /** The curve was clicked. */
  goTo(token) {
    if (this.mode === "moment") {
      this.moment = token;
      this.draw();
      this.toWritten();
      return;
    }
    if (this.mode === "all" && this.trace.segments.length) this.reveal(this.trace.segmentAt(token));
    this.scrollTo(token);
  }

  /** Scrolls so that the token is at the upper edge; nothing is unfolded. */
  scrollTo(token) {
    const nodes = this.rowNodes();
    if (!nodes.length || token === undefined) return;
    if (token <= nodes[0].row.start) {
      this.body.scrollTop = 0; // the prompt, which stands above the first row, in sight too
      return this.curve.move(token);
    }
    const place = Math.max(0, lastOf(nodes, (node) => node.row.start <= token));
    const node = nodes[place];
    this.quiet = true; // what the reader pointed at counts, not the row's first token
    this.body.scrollTop = node.offsetTop - HEADROOM + this.within(nodes, place, token) * node.offsetHeight;
    requestAnimationFrame(() => requestAnimationFrame(() => (this.quiet = false)));
    this.curve.move(token);
  }

  /** Scrolls to what was written last before the moment. */
  toWritten() {
    const last = this.rowNodes().pop();
    if (last) this.body.scrollTop = last.offsetTop + last.offsetHeight + HEADROOM - this.body.clientHeight;
  }

  within(nodes, place, token) {
    const [start, stop] = this.span(nodes, place);
    return nodes[place].row.type === "text" ? clamp((token - start) / Math.max(stop - start, 1), 0, 1) : 0;
  }

  /** Tokens [start, stop) that a row stands for, those folded into it included. */
  span(nodes, place) {
    const { row } = nodes[place];
    const next = nodes[place + 1];
    return [row.start, next ? next.row.start : this.trace.total];
  }

  rowNodes() {
    return [...this.body.children].filter((node) => node.row && node.offsetHeight);
  }

  /** The reading position is the upper edge; the space behind the last row lets every row come there. */
  follow() {
    if (!this.trace || this.quiet || this.mode === "moment") return;
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      const nodes = this.rowNodes();
      if (!nodes.length || this.quiet) return;
      const edge = this.body.scrollTop + HEADROOM + 1;
      const place = Math.max(0, lastOf(nodes, (node) => node.offsetTop <= edge));
      const [start, stop] = this.span(nodes, place);
      const node = nodes[place];
      const share = clamp((edge - node.offsetTop) / Math.max(node.offsetHeight, 1), 0, 1);
      this.curve.move(node.row.type === "text" ? start + share * (stop - 1 - start) : start);
    });
  }

  nextHit(step) {
    if (!this.hits.length) return;
    this.hit = (this.hit + step + this.hits.length) % this.hits.length;
    const at = this.hits[this.hit];
    this.reveal(this.trace.segmentOf(at));
    for (const mark of this.body.querySelectorAll(".current")) mark.classList.remove("current");
    const marks = [...this.body.querySelectorAll("[data-hit]")].filter((mark) => Number(mark.dataset.hit) === at);
    for (const mark of marks) mark.classList.add("current");
    if (marks.length) marks[0].scrollIntoView({ block: "center" });
    else this.scrollTo(this.tokenOf(at));
  }
}

const TOKENS = new Set(["prompt_tokens", "pruned_tokens", "reforwarded_tokens"]);
const FINISH = {
  eos: "The model wrote its end token.",
  stop: "A stop string or stop token matched.",
  length: "The most tokens that may be generated were generated (max_gen_toks).",
  context: "The next token did not fit into the window of live tokens (max_context).",
  loop: "The trace repeated itself (loop_tokens).",
};

function chip(word, text) {
  const node = make("span", { class: "chip" }, make("span", { class: "dim", text: `${word} ` }));
  const value = make("bdi", { class: "value", title: text });
  appendPlain(value, text);
  node.append(value);
  return node;
}

function verdictChip(row) {
  const text = { right: "✓ right", wrong: "✗ wrong", unknown: "? not graded" }[row.verdict] ?? `${Math.round(row.score * 100)} % of the responses right`;
  return make("span", { class: `chip verdict ${row.verdict.split(" ")[0]}`, text });
}

/** Where `query` begins in a text, at most `MAX_HITS` times; capitals count as small letters. */
function hitsIn(text, query) {
  if (!query) return [];
  const pattern = new RegExp(query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi");
  const hits = [];
  for (const found of text.matchAll(pattern)) if (hits.push(found.index) >= MAX_HITS) break;
  return hits;
}
