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
