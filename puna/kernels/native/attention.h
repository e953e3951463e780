// Attention over cached keys and values, by the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
//
// The positions are read in strides of 64, four cache blocks. For up to ROWS queries at once, a stride gives scores in
// which a lane is a position; then the weights, and a sum of values in which a lane is a component of the head. The
// query heads that share a key/value head are rows of one another, so each key is read once for all of them.
//
// Strides begin at multiples of 64 whatever is asked, so that a query's result depends on its own position only.
//
// Many queries read a RANGE of positions after one another before any of them reads the next: it comes from the second
// cache for all but the first. Query by query, a long context came from memory once for every six of them.
//
// With bfloat16 the weights are rounded like everything else, and it is the rounded ones that are summed up. With 8-bit
// keys the queries are quantised too, a scale for each; the values' scales go into the weights.

#pragma once
#include "matrix.h"
#include "simd.h"
#include "transpose.h"

namespace PUNA_NAMESPACE {
using namespace puna;

constexpr int ROWS = TILE_F;
constexpr int STRIDE = 64;
constexpr int AT_ONCE = 32;    // times ROWS queries that read a range after one another
constexpr int64_t RANGE = 1024;

// Pairs (2i, 2i + 1) of a head turned: `turns` has each pair's cosine twice (width), then its sine with signs - and +.
INLINE void rotate(float* x, const float* turns, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const F v = load(x + i);
        store(x + i, fma(v, load(turns + i), mul(swapped(v), load(turns + width + i))));
    }
}

// Quantises x (width) to signed codes; returns the scale.
INLINE float to_codes(const float* x, int64_t width, int8_t* codes) {
    float most = 0;
    for (int64_t i = 0; i < width; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < width; i++) codes[i] = (int8_t)std::nearbyint(x[i] * inverse);
    return most / 127.0f;
}

// Puts the key and the value of one position into slot `slot` of a block.
inline void write(const Cache& cache, int64_t layer, int64_t head, int64_t block, int slot, const float* k,
                  const float* v) {
    const int64_t E = cache.width;
    uint8_t* keys = cache.unit(layer, block, head);
    uint8_t* values = keys + cache.half_bytes();
    if (cache.kind == FLOAT) {
        for (int64_t i = 0; i < E; i++) memcpy(keys + (i * 16 + slot) * 4, k + i, 4);
        memcpy(values + slot * E * 4, v, E * 4);
    } else if (cache.kind == BRAIN) {
        alignas(64) uint16_t a[LANES], b[LANES];
        for (int64_t i = 0; i < E; i += LANES) {
            store_brain(a, load(k + i)), store_brain(b, load(v + i));
            for (int64_t j = 0; j < LANES; j += 2) memcpy(keys + ((i + j) / 2 * 16 + slot) * 4, a + j, 4);
            for (int64_t j = 0; j < LANES; j++) memcpy(values + ((slot / 2 * E + i + j) * 2 + slot % 2) * 2, b + j, 2);
        }
    } else {
        float* scales = (float*)(values + cache.half_bytes());
        int8_t codes[1024];
        scales[slot] = to_codes(k, E, codes);
        for (int64_t i = 0; i < E; i += 4) {
            const uint32_t bytes = 0x80808080u;
            uint32_t four;
            memcpy(&four, codes + i, 4);
            four ^= bytes;  // stored + 128, as the weights are
            memcpy(keys + (i / 4 * 16 + slot) * 4, &four, 4);
        }
        scales[16 + slot] = to_codes(v, E, (int8_t*)values + slot * E);
    }
}

// What `attend` needs, in floats: scores and weights; queries and running sums of all that read together.
inline int64_t attend_scratch(int64_t width) { return ROWS * 2 * (STRIDE + AT_ONCE * width); }

// Up to ROWS queries, and what they have read so far.
struct Rows {
    uint32_t* q;       // [step][row][4 bytes]
    float* scores;     // [row][STRIDE]
    uint32_t* weights; // the same, as they meet the values
    float* sums;       // [row][E]
    int64_t last;      // the largest of their positions
    float most[ROWS], q_scale[ROWS];
    float total[ROWS][LANES];
    int32_t q_sum[ROWS];
    int64_t position[ROWS];
};

// scores = q . keys for 4 blocks
template <Kind KIND, int M>
INLINE void score(const Rows& r, const uint8_t* const keys[4], int64_t width) {
    const int64_t steps = KIND == FLOAT ? width : KIND == BRAIN ? width / 2 : width / 4;
    if constexpr (KIND == INT8) {
        I s[M][4];
        for (int m = 0; m < M; m++)
            for (int b = 0; b < 4; b++) s[m][b] = isplat(-BIAS8 * r.q_sum[m]);
        for (int64_t step = 0; step < steps; step++)
            for (int b = 0; b < 4; b++) {
                const I k = iload(keys[b] + 64 * step);
                for (int m = 0; m < M; m++) add_dot_bytes(s[m][b], k, isplat((int32_t)r.q[step * M + m]));
            }
        for (int b = 0; b < 4; b++) {
            const F scale = load((const float*)(keys[b] + 32 * width));
            for (int m = 0; m < M; m++)
                store(r.scores + m * STRIDE + 16 * b, mul(to_float(s[m][b]), mul(scale, splat(r.q_scale[m]))));
        }
    } else {
        F s[M][4];
        for (int m = 0; m < M; m++)
            for (int b = 0; b < 4; b++) s[m][b] = zero();
        for (int64_t step = 0; step < steps; step++)
            for (int b = 0; b < 4; b++) {
                if constexpr (KIND == BRAIN) {
                    const I k = iload(keys[b] + 64 * step);
                    for (int m = 0; m < M; m++) add_dot_brain(s[m][b], k, isplat((int32_t)r.q[step * M + m]));
                } else {
                    const F k = load((const float*)(keys[b] + 64 * step));
                    for (int m = 0; m < M; m++) s[m][b] = fma(k, splat(((const float*)r.q)[step * M + m]), s[m][b]);
                }
            }
        float* const scores = r.scores;
        for (int m = 0; m < M; m++)
            for (int b = 0; b < 4; b++) store(scores + m * STRIDE + 16 * b, s[m][b]);
    }
}

// Scores become weights, relative to the largest so far; what was summed before is scaled down to it. WHOLE: the query may
// see all of the stride's positions, as it may of all strides but its last.
template <Kind KIND, bool WHOLE>
INLINE void weigh(Rows& r, int m, int64_t base, const uint8_t* const values[4], int64_t width) {
    const float* s = r.scores + m * STRIDE;
    uint32_t* const weights = r.weights + m * STRIDE;
    const auto seen = [&](F x, int v, float other) {
        const int64_t n = r.position[m] + 1 - base - 16 * v;
        return WHOLE ? x : first(x, n < 0 ? 0 : n > 16 ? 16 : (int)n, other);
    };
    F x[4];
    for (int v = 0; v < 4; v++) x[v] = seen(load(s + 16 * v), v, -INFINITE);
    const F most = max(max(x[0], x[1]), max(x[2], x[3]));
    if (exceeds(most, r.most[m])) {
        const float level = largest(most);
        const F shrink = splat(r.most[m] == -INFINITE ? 0.0f : std::exp(r.most[m] - level));
        store(r.total[m], mul(load(r.total[m]), shrink));
        float* sums = r.sums + m * width;
        for (int64_t i = 0; i < width; i += 16) store(sums + i, mul(load(sums + i), shrink));
        r.most[m] = level;
    }
    const F level = splat(r.most[m]);
    F total = load(r.total[m]);
    for (int v = 0; v < 4; v++) {
        F p = seen(exp(sub(x[v], level)), v, 0.0f);
        if constexpr (KIND == BRAIN) {
            store_brain((uint16_t*)weights + 16 * v, p);
            p = brain((const uint16_t*)weights + 16 * v);
        } else if constexpr (KIND == INT8) {
            store((float*)weights + 16 * v, mul(p, load((const float*)(values[v] + 16 * width) + 16)));
        } else {
            store((float*)weights + 16 * v, p);
        }
        total = add(total, p);
    }
    store(r.total[m], total);
}

// sums += weights . values for `blocks` blocks, 64 (or what is left: 16 VECS) components of the head at a time
template <Kind KIND, int M, int VECS>
INLINE void collect(const Rows& r, const uint8_t* const values[4], int blocks, int64_t width, int64_t at) {
    const uint32_t* const weights = r.weights;
    F s[M][VECS];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) s[m][v] = load(r.sums + m * width + at + 16 * v);
    for (int b = 0; b < blocks; b++) {
        if constexpr (KIND == BRAIN) {
            const uint32_t* pair = weights + 8 * b;
            for (int j = 0; j < 8; j++, pair++) {
                I x[VECS];
                for (int v = 0; v < VECS; v++) x[v] = iload(values[b] + (j * width + at + 16 * v) * 4);
                for (int m = 0; m < M; m++) {
                    const I weight = isplat((int32_t)pair[m * STRIDE]);
                    for (int v = 0; v < VECS; v++) add_dot_brain(s[m][v], x[v], weight);
                }
            }
        } else {
            const float* one = (const float*)weights + 16 * b;
            for (int j = 0; j < 16; j++, one++) {
                F x[VECS];
                for (int v = 0; v < VECS; v++)
                    x[v] = KIND == INT8 ? from_bytes((const int8_t*)values[b] + j * width + at + 16 * v)
                                        : load((const float*)values[b] + j * width + at + 16 * v);
                for (int m = 0; m < M; m++) {
                    const F weight = splat(one[m * STRIDE]);
                    for (int v = 0; v < VECS; v++) s[m][v] = fma(x[v], weight, s[m][v]);
                }
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) store(r.sums + m * width + at + 16 * v, s[m][v]);
}

// Row m's query, as it meets the keys.
template <Kind KIND>
INLINE void to_keys(Rows& r, int m, const float* q, int64_t width, void* to) {
    const float factor = 1.0f / std::sqrt((float)width);
    if constexpr (KIND == INT8) {
        const int8_t* codes = (int8_t*)to;
        r.q_scale[m] = to_codes(q, width, (int8_t*)to) * factor;
        r.q_sum[m] = 0;
        for (int64_t i = 0; i < width; i++) r.q_sum[m] += codes[i];
    } else {
        for (int64_t i = 0; i < width; i += LANES) {
            const F x = mul(load(q + i), splat(factor));
            if constexpr (KIND == BRAIN) store_brain((uint16_t*)to + i, x);
            else store((float*)to + i, x);
        }
    }
}

// Row i of the task is query head (i % G) of new token (from + i / G).
template <Kind KIND, int M>
INLINE void begin(const Attend& a, int64_t row, Rows& r) {
    const int64_t E = a.cache->width, G = a.heads / a.cache->heads;
    const int64_t steps = KIND == FLOAT ? E : KIND == BRAIN ? E / 2 : E / 4;
    uint32_t* const rows = (uint32_t*)r.sums;  // as wide, and not in use yet
    r.last = 0;
    for (int m = 0; m < M; m++) {
        const int64_t token = a.from + (row + m) / G, head = a.head * G + (row + m) % G;
        to_keys<KIND>(r, m, a.q + (a.span.first + token) * a.q_stride + head * E, E, rows + m * steps);
        r.position[m] = a.span.start + token;
        r.most[m] = -INFINITE, store(r.total[m], zero());
        r.last = r.position[m] > r.last ? r.position[m] : r.last;
    }
    transpose<M>(rows, steps, steps, r.q);
    memset(r.sums, 0, M * E * sizeof(float));
}

template <int M>
INLINE void finish(const Attend& a, int64_t row, const Rows& r) {
    const int64_t E = a.cache->width, G = a.heads / a.cache->heads;
    for (int m = 0; m < M; m++) {
        const int64_t token = a.from + (row + m) / G, head = a.head * G + (row + m) % G;
        float* out = a.out + (a.span.first + token) * a.out_stride + head * E;
        const F inverse = splat(1.0f / sum(load(r.total[m])));
        for (int64_t i = 0; i < E; i += 16) store(out + i, mul(load(r.sums + m * E + i), inverse));
    }
}

// M queries read the positions from `from` to before `to` that they may see.
template <Kind KIND, int M>
__attribute__((noinline)) void attend_rows(const Attend& a, int64_t row, int64_t from, int64_t to, Rows& r) {
    const Cache& cache = *a.cache;
    const int64_t E = cache.width, half_bytes = cache.half_bytes();
    if (from == 0) begin<KIND, M>(a, row, r);
    else if (from > r.last) return;
    for (int64_t base = from; base <= r.last && base < to; base += STRIDE) {
        const int blocks = r.last - base >= 48 ? 4 : (int)((r.last - base) / 16 + 1);
        const uint8_t* keys[4];
        const uint8_t* values[4];
        for (int b = 0; b < 4; b++) {  // past the end the last block stands in, and is seen by nobody
            keys[b] = cache.unit(a.layer, a.span.blocks[base / 16 + (b < blocks ? b : blocks - 1)], a.head);
            values[b] = keys[b] + half_bytes;
        }
        score<KIND, M>(r, keys, E);
        for (int m = 0; m < M; m++) {
            if (base + STRIDE <= r.position[m] + 1) weigh<KIND, true>(r, m, base, values, E);
            else weigh<KIND, false>(r, m, base, values, E);
        }
        int64_t at = 0;
        for (; at + 64 <= E; at += 64) collect<KIND, M, 4>(r, values, blocks, E, at);
        for (; at < E; at += 16) collect<KIND, M, 1>(r, values, blocks, E, at);
    }
    if (to > r.last) finish<M>(a, row, r);
}

template <Kind KIND, int M>
void attend_some(const Attend& a, int64_t row, int m, int64_t from, int64_t to, Rows& r) {
    if constexpr (M == 1) attend_rows<KIND, 1>(a, row, from, to, r);
    else m == M ? attend_rows<KIND, M>(a, row, from, to, r) : attend_some<KIND, M - 1>(a, row, m, from, to, r);
}

// Rows first to end, AT_ONCE times ROWS at the most.
template <Kind KIND>
void attend_together(const Attend& a, int64_t first, int64_t end) {
    const int64_t E = a.cache->width, G = a.heads / a.cache->heads, last = a.span.start + a.from + (end - 1) / G;
    Rows all[AT_ONCE];
    float* room = a.scratch;
    float* const scores = room;
    uint32_t* const weights = (uint32_t*)(room + ROWS * STRIDE);
    room += ROWS * 2 * STRIDE;
    for (Rows& r : all) {
        r.scores = scores, r.weights = weights;
        r.q = (uint32_t*)room, room += ROWS * E;
        r.sums = room, room += ROWS * E;
    }
    for (int64_t from = 0; from <= last; from += RANGE)
        for (int64_t row = first; row < end; row += ROWS) {
            const int m = end - row < ROWS ? (int)(end - row) : ROWS;
            attend_some<KIND, ROWS>(a, row, m, from, from + RANGE, all[(row - first) / ROWS]);
        }
}

inline void attend(const Attend& a) {
    const int64_t rows = (a.to - a.from) * (a.heads / a.cache->heads);
    for (int64_t row = 0; row < rows; row += AT_ONCE * ROWS) {
        const int64_t end = rows - row < AT_ONCE * ROWS ? rows : row + AT_ONCE * ROWS;
        switch (a.cache->kind) {
            case FLOAT: attend_together<FLOAT>(a, row, end); break;
            case BRAIN: attend_together<BRAIN>(a, row, end); break;
            default: attend_together<INT8>(a, row, end);
        }
    }
}

}  // namespace PUNA_NAMESPACE
