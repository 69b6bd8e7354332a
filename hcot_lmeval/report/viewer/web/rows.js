// A trace as a flat list of rows. Depth is a number, not nesting: a trace may open a thousand blocks.

const CHUNK = 1200; // characters of a row of text, about

class Trace {
  constructor(row, prompt, text, structure) {
    Object.assign(this, { row, prompt, text, trees: structure.trees, growth: structure.growth });
    this.formulas = structure.formulas;
    this.promptFormulas = structure.prompt_formulas;
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
    const formula = this.formulaAround(end);
    return Math.min(to, formula ? formula[1] : end + 1);
  }

  formulaAround(at) {
    return formulasWithin(this.formulas, at, at + 1)[0];
  }
}

/** The formulas [from, to, tree] that reach beyond `from` and begin before `to`; they are in order. */
function formulasWithin(formulas, from, to) {
  return formulas.slice(lastOf(formulas, ([, end]) => end <= from) + 1, lastOf(formulas, ([start]) => start < to) + 1);
}
