// One decoding step of a Llama-like model on the CPU: embedding, all layers, logits, over the slots of a KV pool.
//
// Compiled at first use with WEIGHT = float, double or bfloat16 and CACHE, the type of keys and values, the same or
// bfloat16, for the processor at hand. Weights are read where the model has them, row-major [out, in], or from a copy
// in fewer bits. What makes it fast: one parallel region for the whole step; an output is a dot product along a row of
// weights: for one token one row after the other or several side by side, whatever was tried to be faster, for more
// tokens several rows by several tokens at a time in registers; the weights needed next are prefetched; attention reads
// exactly what is live, for all queries of a group together. Vectors are those of GCC and Clang, so that nothing but
// the bfloat16 instruction is bound to one family of processors.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <new>

#include <omp.h>

#include "attention.hpp"
#include "numbers.hpp"
#include "products.hpp"
#include "team.hpp"

// -------------------------------------------------------------------------------------------------- parts of a layer

// y[t][n] (+)= m.rows[n] . x[t] + m.bias[n]; y has rows of `width`.
template <bool ADD> static void multiply(Team& team, const Matrix& m, const Input& input, real* y, int width) {
    int block = (m.out / (12 * team.size) + 7) / 8 * 8;
    team.share(m.out, block < 16 ? 16 : block, [&](int n, int stop) {
        multiply_rows<ADD>(m, n, stop, input, y, width);
    });
}

// x * weight / sqrt(mean(x^2) + eps) (arXiv 1910.07467)
template <class To> static void rms_norm(const real* x, const real* scale, int size, real eps, To* out) {
    Vector squares{};
    int k = 0;
    for (; k + LANES <= size; k += LANES) squares += load(x + k) * load(x + k);
    real total = sum(squares);
    for (; k < size; k++) total += x[k] * x[k];
    real factor = 1 / std::sqrt(total / size + eps);
    for (k = 0; k < size; k++) put(out + k, x[k] * factor * scale[k]);
}

// Rotary embedding, halves rotated against each other (arXiv 2104.09864, layout of GPT-NeoX).
static void rotate(real* x, const real* cosine, const real* sine, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        real low = x[i], high = x[i + half];
        x[i] = low * cosine[i] - high * sine[i];
        x[i + half] = high * cosine[i + half] + low * sine[i + half];
    }
}

// --------------------------------------------------------------------------------------------------------------- a step

extern "C" {

struct Layer {
    Matrix query, key, value, output, gate, up, down;
    const real *attention_norm, *mlp_norm;  // [hidden]
    const real *query_norm, *key_norm;      // [dim] or null
    stored *keys, *values;                  // of the pool: [slots x length, kv_heads, dim]
};

struct Model {
    const Layer* layers;
    const weight* embedding;  // [vocabulary, hidden]
    const real* norm;         // [hidden]
    Matrix head;
    int count, hidden, inner, heads, kv_heads, dim;
    int far;    // see Input
    int known;  // rows of the embedding
    double eps, scaling;
};

struct Step {
    int tokens, outputs, threads;
    int angles, places;              // positions that have angles, rows of the pool
    const int64_t *ids, *positions;  // [tokens]
    const int64_t *first, *row;      // [tokens]: first row of the token's slot in the pool, and the token's own
    const int64_t* last;           // [outputs]: tokens whose logits are asked for
    const real *cosine, *sine;       // [positions, dim]
    real* logits;                    // [outputs, vocabulary]
    char* scratch;                   // scratch_bytes
};

// Bytes of scratch for steps of up to `tokens` tokens that see up to `seen` keys.
size_t scratch_bytes(const Model* model, int tokens, int seen, int threads);
// Returns 0; or which of the step's lists would be read, or would read, out of bounds: 1 ids, 2 positions, 3 rows, 4 last.
int decode(const Model* model, const Step* step);
// Seconds that a single token takes through products of the layers, of which at least `bytes` are read if there are.
double time_products(const Model* model, const Step* step, size_t bytes);

struct Packing {
    int numbers, words;  // in a block of packed rows
    int few;             // tokens that meet narrow rows at most
};

void packing(Packing* p);
size_t blocks(const Matrix* m);
// Packs a matrix into m->blocks and m->bases; returns how many blocks are marked.
size_t pack(const Matrix* m, int threads);
}

namespace {

size_t shares(const Model& m) { return (size_t)m.count * 12 + 3; }  // of the layers and around them

struct Scratch {
    Part* parts;  // [shares, threads]
    real *hidden, *query, *key, *value, *gate, *up, *mixed, *scores;
    operand* input;
};

// Scores of all heads of a token that a thread holds in its cache; where there are more, it has those of a group.
constexpr size_t MOST_SCORES = 1 << 16;

// Numbers that the scores of one thread take, of tokens that see up to `seen` keys.
size_t scores_of(const Model& m, size_t seen) {
    size_t all = m.heads * seen, group = all / m.kv_heads;
    if (all > MOST_SCORES) all = MOST_SCORES;
    return all > group ? all : group;
}

char* take(char*& at, size_t bytes) {
    char* here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
}

// With `at` null, the pointers are offsets and the end is the size.
char* lay_out(Scratch& s, char* at, const Model& m, size_t tokens, size_t seen, size_t threads) {
    auto reals = [&](size_t count) { return (real*)take(at, count * sizeof(real)); };
    size_t widest = m.inner > m.heads * m.dim ? m.inner : m.heads * m.dim;
    if ((size_t)m.hidden > widest) widest = m.hidden;
    s.parts = (Part*)take(at, shares(m) * threads * sizeof(Part));
    s.hidden = reals(tokens * m.hidden);
    s.query = reals(tokens * m.heads * m.dim);
    s.key = reals(tokens * m.kv_heads * m.dim);
    s.value = reals(tokens * m.kv_heads * m.dim);
    s.gate = reals(tokens * m.inner);
    s.up = reals(tokens * m.inner);
    s.mixed = reals(threads * m.heads * m.dim);
    s.scores = reals(threads * scores_of(m, seen));
    s.input = (operand*)take(at, tokens * widest * sizeof(operand));
    return at;
}

void norm_rows(Team& team, const Model& m, const real* x, const real* scale, int tokens, operand* out) {
    team.share(tokens, 1, [&](int t, int) {
        rms_norm(x + (size_t)t * m.hidden, scale, m.hidden, (real)m.eps, out + (size_t)t * m.hidden);
    });
}

// Turns a head's query or key: norm, rotation.
void turn(const Model& m, const Step& step, int token, const real* norm, real* x) {
    if (norm) rms_norm(x, norm, m.dim, (real)m.eps, x);
    size_t at = (size_t)step.positions[token] * m.dim;
    rotate(x, step.cosine + at, step.sine + at, m.dim);
}

// Queries are turned where they are; keys and values go to the pool.
void write_head(const Model& m, const Layer& layer, const Step& step, const Scratch& s, int token, int head) {
    if (head < m.heads) {
        real* query = s.query + ((size_t)token * m.heads + head) * m.dim;
        turn(m, step, token, layer.query_norm, query);
        for (int i = 0; i < m.dim; i++) query[i] *= (real)m.scaling;
        return;
    }
    head -= m.heads;
    size_t from = ((size_t)token * m.kv_heads + head) * m.dim;
    size_t to = ((size_t)step.row[token] * m.kv_heads + head) * m.dim;
    turn(m, step, token, layer.key_norm, s.key + from);
    for (int i = 0; i < m.dim; i++) put(layer.keys + to + i, s.key[from + i]);
    for (int i = 0; i < m.dim; i++) put(layer.values + to + i, s.value[from + i]);
}

void write_heads(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s) {
    int each = m.heads + m.kv_heads, units = step.tokens * each;
    team.share(units, units / (2 * team.size) + 1, [&](int unit, int stop) {
        for (; unit < stop; unit++) write_head(m, layer, step, s, unit / each, unit % each);
    });
}

// What the queries from `unit` on attend to, and those from `then` on, if there are any, behind them.
Context context_of(const Model& m, const Layer& layer, const Step& step, int unit, int then) {
    int stride = m.kv_heads * m.dim, group = m.heads / m.kv_heads;
    auto at = [&](int u) { return (size_t)step.first[u / m.heads] * stride + (size_t)(u % m.heads / group) * m.dim; };
    int token = unit / m.heads, seen = (int)(step.row[token] - step.first[token]) + 1;
    const stored* next = then < step.tokens * m.heads ? layer.keys + at(then) : nullptr;
    return {layer.keys + at(unit), layer.values + at(unit), seen, stride, m.dim, next};
}

// Attention of `count` query heads of one token, from `unit` on: of a group that shares a head of keys, or all of them.
void mix_heads(const Model& m, const Layer& layer, const Step& step, const Scratch& s, int unit, int count,
               real* scores, real* mixed) {
    Context context = context_of(m, layer, step, unit, unit + count);
    int group = m.heads / m.kv_heads, groups = count > group ? count / group : 1;
    attend(context, groups, s.query + (size_t)unit * m.dim, count / groups, scores, mixed);
    for (int i = 0; i < count * m.dim; i++) put(s.input + (size_t)unit * m.dim + i, mixed[i]);
}

// Query heads in a block of work. All of a token read its keys and values as they lie in memory, but there have to be
// many tokens to share; else a block is a group of heads, or a single head where there are fewer groups than threads.
int heads_together(const Model& m, int tokens, int threads, int longest) {
    if (tokens >= 4 * threads && (size_t)m.heads * longest <= MOST_SCORES) return m.heads;
    return tokens * m.kv_heads < threads ? 1 : m.heads / m.kv_heads;
}

void mix(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s, int longest) {
    real* scores = s.scores + team.rank * scores_of(m, longest);
    real* mixed = s.mixed + (size_t)team.rank * m.heads * m.dim;
    int block = heads_together(m, step.tokens, team.size, longest);
    team.share(step.tokens * m.heads, block, [&](int unit, int stop) {
        mix_heads(m, layer, step, s, unit, stop - unit, scores, mixed);
    });
}

// silu(gate) * up for the columns [from, stop) of a token.
void activate_part(const Model& m, const Scratch& s, int token, int from, int stop) {
    real parts[64];
    for (int n = from; n < stop; n += 64) {
        int many = stop - n < 64 ? stop - n : 64;
        size_t at = (size_t)token * m.inner + n;
        for (int i = 0; i < many; i++) parts[i] = -s.gate[at + i];
        exponentials(parts, many);
        for (int i = 0; i < many; i++) put(s.input + at + i, s.gate[at + i] / (1 + parts[i]) * s.up[at + i]);
    }
}

void activate(Team& team, const Model& m, int tokens, const Scratch& s) {
    team.share(m.inner, (m.inner / team.size + 64) / 64 * 64, [&](int from, int stop) {
        for (int t = 0; t < tokens; t++) activate_part(m, s, t, from, stop);
    });
}

void run_layer(Team& team, const Model& m, const Layer& layer, const Step& step, const Scratch& s, int longest) {
    int tokens = step.tokens, wide = m.heads * m.dim, narrow = m.kv_heads * m.dim;
    Input in{s.input, tokens, m.far};
    norm_rows(team, m, s.hidden, layer.attention_norm, tokens, s.input);
    team.together();
    multiply<false>(team, layer.query, in, s.query, wide);
    multiply<false>(team, layer.key, in, s.key, narrow);
    multiply<false>(team, layer.value, in, s.value, narrow);
    team.together();
    write_heads(team, m, layer, step, s);
    team.together();
    mix(team, m, layer, step, s, longest);
    team.together();
    multiply<true>(team, layer.output, in, s.hidden, m.hidden);
    team.together();
    norm_rows(team, m, s.hidden, layer.mlp_norm, tokens, s.input);
    team.together();
    multiply<false>(team, layer.gate, in, s.gate, m.inner);
    multiply<false>(team, layer.up, in, s.up, m.inner);
    team.together();
    activate(team, m, tokens, s);
    team.together();
    multiply<true>(team, layer.down, in, s.hidden, m.hidden);
    team.together();
}

void read_embedding(const Model& m, const Step& step, const Scratch& s, int token) {
    const weight* from = m.embedding + (size_t)step.ids[token] * m.hidden;
    real* to = s.hidden + (size_t)token * m.hidden;
    for (int i = 0; i < m.hidden; i++) to[i] = number(from[i]);
}

void run(Team& team, const Model& m, const Step& step, const Scratch& s, int longest) {
    team.share(step.tokens, 1, [&](int t, int) { read_embedding(m, step, s, t); });
    team.together();
    for (int i = 0; i < m.count; i++) run_layer(team, m, m.layers[i], step, s, longest);
    team.share(step.outputs, 1, [&](int t, int) {
        rms_norm(s.hidden + (size_t)step.last[t] * m.hidden, m.norm, m.hidden, (real)m.eps,
                 s.input + (size_t)t * m.hidden);
    });
    team.together();
    multiply<false>(team, m.head, Input{s.input, step.outputs, m.far}, step.logits, m.head.out);
    team.together();
}

// What is timed to find the best way to read weights: products of one token, whatever its numbers are.
void run_products(Team& team, const Model& m, const Scratch& s, size_t bytes) {
    Input in{s.input, 1, m.far};
    size_t each = ((size_t)m.hidden * m.inner * 3) * sizeof(weight);
    for (int i = 0; i < m.count && i * each < bytes; i++) {
        multiply<false>(team, m.layers[i].gate, in, s.gate, m.inner);
        multiply<false>(team, m.layers[i].up, in, s.up, m.inner);
        multiply<false>(team, m.layers[i].down, in, s.hidden, m.hidden);
        team.together();
    }
}

int fault_of(const Model& m, const Step& step) {
    for (int t = 0; t < step.tokens; t++) {
        if (step.ids[t] < 0 || step.ids[t] >= m.known) return 1;
        if (step.positions[t] < 0 || step.positions[t] >= step.angles) return 2;
        if (step.first[t] < 0 || step.row[t] < step.first[t] || step.row[t] >= step.places) return 3;
    }
    for (int i = 0; i < step.outputs; i++)
        if (step.last[i] < 0 || step.last[i] >= step.tokens) return 4;
    return 0;
}

int most_seen(const Step& step) {
    int most = 1;
    for (int t = 0; t < step.tokens; t++) {
        int seen = (int)(step.row[t] - step.first[t]) + 1;
        if (seen > most) most = seen;
    }
    return most;
}

}  // namespace

size_t scratch_bytes(const Model* model, int tokens, int seen, int threads) {
    Scratch s;
    return (size_t)lay_out(s, nullptr, *model, tokens, seen, threads);
}

// Calls work(team, scratch) in all threads.
template <class Work> static void in_parallel(const Model& model, const Step& step, int longest, Work work) {
    Scratch s;
    lay_out(s, step.scratch, model, step.tokens, longest, step.threads);
    for (size_t i = 0; i < shares(model) * step.threads; i++) new (s.parts + i) Part{{0}, {0}};
#pragma omp parallel num_threads(step.threads)
    {
        Team team(s.parts, omp_get_thread_num(), omp_get_num_threads());
        work(team, s);
    }
}

int decode(const Model* model, const Step* step) {
    if (int fault = fault_of(*model, *step)) return fault;
    int longest = most_seen(*step);
    in_parallel(*model, *step, longest, [&](Team& team, const Scratch& s) { run(team, *model, *step, s, longest); });
    return 0;
}

double time_products(const Model* model, const Step* step, size_t bytes) {
    double start = omp_get_wtime();
    in_parallel(*model, *step, 1, [&](Team& team, const Scratch& s) { run_products(team, *model, s, bytes); });
    return omp_get_wtime() - start;
}

void packing(Packing* p) { *p = {SIDE * LANES, (int)BLOCK_WORDS, FEW}; }

size_t blocks(const Matrix* m) { return (size_t)(m->out / SIDE) * (m->in / LANES); }

size_t pack(const Matrix* m, int threads) {
    size_t marked = 0, across = m->in / LANES;
    if constexpr (std::is_same<weight, float>::value)
#pragma omp parallel for num_threads(threads) reduction(+ : marked)
        for (size_t at = 0; at < blocks(m); at++) {
            const float* rows = (const float*)m->rows + at / across * SIDE * m->in + at % across * LANES;
            uint8_t base = pack_block(rows, m->in, (uint32_t*)m->blocks + at * BLOCK_WORDS);
            ((uint8_t*)m->bases)[at] = base;
            marked += base == MARK;
        }
    return marked;
}
