// Chooses a token for each row of logits: the tokens that `sample` of engine/sampling.py chooses, in a fraction of its time.
//
// A sample is the largest sum of score and Gumbel noise, and the noise of a token is a hash of its id.
//
// * Of the noise, two logarithms per token, hardly anything is computed. With u the hash as a number in (0, 1), the noise
//   -log(-log u) is at most -log(1 - u). So a token can beat the best sum so far, b, only if 1 - u <= exp(score - b),
//   and in a whole vocabulary about one does.
// * Nothing is sorted for top-p and min-p. They keep the tokens in front of some place in the order of the scores. If the
//   winner among all tokens is kept, it is the winner among those that are kept. If not, whatever ranks behind it is
//   not kept either, and the search is repeated among the tokens in front of it. Where top-k ends is found first.
//
// Compiled with WEIGHT = float or double, the type of the logits. Rows do not see one another, nor how many threads
// there are; sums go by a fixed order.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <queue>
#include <vector>

#include <omp.h>

#include "numbers.hpp"

extern "C" {

struct Rows {
    int rows, vocabulary, threads;
    const real* logits;                           // [rows, vocabulary]
    const double *temperature, *top_p, *min_p;    // [rows]; 0, 1, 0 are off
    const int64_t *top_k, *start;                 // [rows]; 0 is off; where the hash starts
    int64_t* tokens;                              // [rows]
};

void choose(const Rows* rows);
}

namespace {

constexpr int SPAN = 256;               // tokens at a time
constexpr size_t WORTH_THREADS = 1 << 16;  // tokens; on a busy machine a thread may come milliseconds late
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
constexpr uint64_t STEPS = 1ull << 53;  // of the hash as a number
constexpr float MARGIN = 1.0001f;       // beyond the rounding of what is compared in float

// The scores of a row: logits over the temperature.
struct Scores {
    const real* logits;
    real temperature;
    int size;

    // Writes the scores from `from` on; returns how many.
    int read(int from, real* out) const {
        int many = size - from < SPAN ? size - from : SPAN;
        for (int i = 0; i < many; i++) out[i] = logits[from + i] / temperature;
        return many;
    }
};

// A place in the order of the scores; of equal scores the lower id is in front.
struct Place {
    real score;
    int id;
};
inline bool in_front(real score, int id, const Place& place) {
    return (score > place.score) | ((score == place.score) & (id < place.id));
}

// SplitMix64 (Steele, Lea, Flood 2014), with 53 bits.
inline uint64_t hashed(uint64_t start, int id) {
    uint64_t bits = start + (uint64_t)(id + 1) * GOLDEN;
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB;
    return (bits ^ (bits >> 31)) >> 11;
}

double with_noise(real score, uint64_t bits) { return score - std::log(-std::log(((double)bits + .5) / STEPS)); }

Place highest(const Scores& scores) {
    Place best{-std::numeric_limits<real>::infinity(), 0};
    real s[SPAN];
    for (int from = 0; from < scores.size; from += SPAN) {
        int many = scores.read(from, s);
        real most = s[0];
#pragma omp simd reduction(max : most)
        for (int i = 1; i < many; i++) most = s[i] > most ? s[i] : most;
        if (!(most > best.score)) continue;
        int i = 0;
        while (s[i] != most) i++;
        best = {most, from + i};
    }
    return best;
}

// The largest sum of score and noise among the tokens in front of `limit`; `first` is the first of them all.
Place strongest(const Scores& scores, uint64_t start, const Place& limit, const Place& first) {
    Place best = first;
    double sum = with_noise(first.score, hashed(start, first.id));
    real s[SPAN];
    float reach[SPAN], rest[SPAN];  // exp(score - sum), 1 - u
    for (int from = 0; from < scores.size; from += SPAN) {
        int many = scores.read(from, s), hopeful = 0;
        for (int i = 0; i < many; i++) reach[i] = (float)(s[i] - sum);
        exponentials(reach, many);
        for (int i = 0; i < many; i++) rest[i] = (float)(STEPS - 1 - hashed(start, from + i)) * (1.f / STEPS);
        for (int i = 0; i < many; i++) hopeful += rest[i] <= reach[i] * MARGIN;
        for (int i = 0; hopeful; i++) {
            if (!(rest[i] <= reach[i] * MARGIN)) continue;
            hopeful--;
            double noisy = with_noise(s[i], hashed(start, from + i));
            if (in_front(s[i], from + i, limit) && (noisy > sum || (noisy == sum && from + i < best.id)))
                best = {s[i], from + i}, sum = noisy;
        }
    }
    return best;
}

// The sum of exp(score - top) of the tokens in front of a place.
double mass_in_front(const Scores& scores, const Place& place, real top) {
    double total = 0;
    real s[SPAN], parts[SPAN];
    for (int from = 0; from < scores.size; from += SPAN) {
        int many = scores.read(from, s);
        real mass = 0;
        for (int i = 0; i < many; i++) parts[i] = s[i] - top;
        exponentials(parts, many);
#pragma omp simd reduction(+ : mass)
        for (int i = 0; i < many; i++) mass += in_front(s[i], from + i, place) ? parts[i] : 0;
        total += mass;
    }
    return total;
}

// The place behind the first `count` tokens.
Place behind(const Scores& scores, int64_t count) {
    if (count >= scores.size) return {-std::numeric_limits<real>::infinity(), scores.size};
    auto later = [](const Place& a, const Place& b) { return in_front(a.score, a.id, b); };
    std::priority_queue<Place, std::vector<Place>, decltype(later)> kept(later);  // the last of those kept on top
    real s[SPAN];
    for (int from = 0; from < scores.size; from += SPAN) {
        int many = scores.read(from, s);
        for (int i = 0; i < many; i++) {
            if ((int64_t)kept.size() == count) {
                if (!in_front(s[i], from + i, kept.top())) continue;
                kept.pop();
            }
            kept.push({s[i], from + i});
        }
    }
    return {kept.top().score, kept.top().id + 1};
}

int choose_row(const Rows& all, int row) {
    double temperature = all.temperature[row], top_p = all.top_p[row], total = -1;
    Scores scores{all.logits + (size_t)row * all.vocabulary, (real)(temperature > 0 ? temperature : 1), all.vocabulary};
    Place first = highest(scores), winner = first;
    if (temperature == 0) return first.id;
    Place most = behind(scores, all.top_k[row] ? all.top_k[row] : scores.size), limit = most;
    while ((winner = strongest(scores, (uint64_t)all.start[row], limit, first)).id != first.id) {
        limit = winner;  // from here on, should it not be kept
        if (std::exp((double)winner.score - first.score) < all.min_p[row]) continue;
        if (top_p >= 1) break;
        if (total < 0) total = mass_in_front(scores, most, first.score);
        if (mass_in_front(scores, winner, first.score) < top_p * total) break;
    }
    return winner.id;
}

}  // namespace

void choose(const Rows* rows) {
    int threads = rows->threads < rows->rows ? rows->threads : rows->rows;
    bool much = (size_t)rows->rows * rows->vocabulary >= WORTH_THREADS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && much)
    for (int row = 0; row < rows->rows; row++) rows->tokens[row] = choose_row(*rows, row);
}
