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

  /** Appends text with its formulas drawn and its hits marked. */
  rich(parent, text, from, to, formulas, hits) {
    let at = from;
    for (const [start, stop, tree] of formulasWithin(formulas, from, to)) {
      if (start < at || stop > to) continue; // cut off at a moment
      const display = this.trace.trees[tree][1].display === "block";
      this.marked(parent, text, at, display ? trimEnd(text, at, start) : start, hits);
      const math = makeMath(this.trace.trees[tree]);
      const holder = make("span", { class: display ? "math display" : "math", title: text.slice(start, stop) }, math);
      if (hits.some((hit) => hit < stop && hit + this.length > start)) {
        holder.classList.add("hit");
        holder.dataset.hit = hits.find((hit) => hit < stop && hit + this.length > start);
      }
      parent.append(holder);
      at = display ? trimStart(text, stop, to) : stop;
    }
    this.marked(parent, text, at, to, hits);
  }

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
