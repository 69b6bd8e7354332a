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
