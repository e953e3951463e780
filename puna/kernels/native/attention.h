// Attention over cached keys and values, by the online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867).
//
// The positions are read in strides of 64, four cache blocks. For up to ROWS queries at once, a stride gives scores in
// which a lane is a position; then the weights, and a sum of values in which a lane is a component of the head. The
// query heads that share a key/value head are rows of one another, so each key is read once for all of them.
//
// Strides begin at multiples of 64 whatever is asked, so that a query's result depends on its own position only.
//
// With bfloat16 the weights are rounded like everything else, and it is the rounded ones that are summed up. With 8-bit
// keys the queries are quantised too, a scale for each; the values' scales go into the weights.

#pragma once
#include "matrix.h"
#include "simd.h"

namespace PUNA_NAMESPACE {
using namespace puna;

constexpr int ROWS = TILE_F;
constexpr int STRIDE = 64;

INLINE void rotate(float* x, const float* turns, int64_t width) {
    for (int64_t i = 0; i < width; i += 2) {
        const float a = x[i], b = x[i + 1], c = turns[i], s = turns[i + 1];
        x[i] = a * c - b * s;
        x[i + 1] = a * s + b * c;
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
        for (int64_t i = 0; i < E; i++) {
            const uint16_t a = to_brain(k[i]), b = to_brain(v[i]);
            memcpy(keys + ((i / 2 * 16 + slot) * 2 + i % 2) * 2, &a, 2);
            memcpy(values + ((slot / 2 * E + i) * 2 + slot % 2) * 2, &b, 2);
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

// What `attend` needs for ROWS queries, in floats: queries, scores, running sums.
inline int64_t attend_scratch(int64_t width) { return ROWS * (2 * width + 2 * STRIDE + 64) + 64; }

struct Rows {
    uint32_t* q;       // [step][row][4 bytes]
    float* scores;     // [row][STRIDE]
    uint32_t* weights; // the same, as they meet the values
    float* sums;       // [row][E]
    float most[ROWS], total[ROWS], q_scale[ROWS];
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
                for (int m = 0; m < M; m++) s[m][b] = dot_bytes(s[m][b], k, isplat((int32_t)r.q[step * M + m]));
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
                    for (int m = 0; m < M; m++) s[m][b] = dot_brain(s[m][b], k, isplat((int32_t)r.q[step * M + m]));
                } else {
                    const F k = load((const float*)(keys[b] + 64 * step));
                    for (int m = 0; m < M; m++) s[m][b] = fma(k, splat(((const float*)r.q)[step * M + m]), s[m][b]);
                }
            }
        for (int m = 0; m < M; m++)
            for (int b = 0; b < 4; b++) store(r.scores + m * STRIDE + 16 * b, s[m][b]);
    }
}

// Scores become weights, relative to the largest so far; what was summed before is scaled down to it.
template <Kind KIND>
INLINE void weigh(Rows& r, int m, int64_t base, const uint8_t* const values[4], int64_t width) {
    float* s = r.scores + m * STRIDE;
    const int64_t visible = r.position[m] + 1 - base;  // positions of this stride that the query may see
    F x[4], most = splat(-INFINITE);
    for (int v = 0; v < 4; v++) {
        const int64_t n = visible - 16 * v;
        x[v] = first(load(s + 16 * v), n < 0 ? 0 : n > 16 ? 16 : (int)n, -INFINITE);
        most = max(most, x[v]);
    }
    const float top = largest(most);
    const float level = top > r.most[m] ? top : r.most[m];
    F total = zero();
    for (int v = 0; v < 4; v++) {
        const int64_t n = visible - 16 * v;
        F p = first(exp(sub(x[v], splat(level))), n < 0 ? 0 : n > 16 ? 16 : (int)n, 0.0f);
        if constexpr (KIND == BRAIN) {
            store_brain((uint16_t*)(r.weights + m * STRIDE) + 16 * v, p);
            p = brain((const uint16_t*)(r.weights + m * STRIDE) + 16 * v);
        } else if constexpr (KIND == INT8) {
            store((float*)(r.weights + m * STRIDE) + 16 * v, mul(p, load((const float*)(values[v] + 16 * width) + 16)));
        } else {
            store((float*)(r.weights + m * STRIDE) + 16 * v, p);
        }
        total = add(total, p);
    }
    if (level > r.most[m]) {
        const float shrink = r.most[m] == -INFINITE ? 0.0f : std::exp(r.most[m] - level);
        r.total[m] *= shrink;
        float* sums = r.sums + m * width;
        for (int64_t i = 0; i < width; i += 16) store(sums + i, mul(load(sums + i), splat(shrink)));
        r.most[m] = level;
    }
    r.total[m] += sum(total);
}

// sums += weights . values for `blocks` blocks, 64 (or what is left: 16 VECS) components of the head at a time
template <Kind KIND, int M, int VECS>
INLINE void collect(const Rows& r, const uint8_t* const values[4], int blocks, int64_t width, int64_t at) {
    F s[M][VECS];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) s[m][v] = load(r.sums + m * width + at + 16 * v);
    for (int b = 0; b < blocks; b++) {
        if constexpr (KIND == BRAIN) {
            for (int j = 0; j < 8; j++)
                for (int v = 0; v < VECS; v++) {
                    const I x = iload(values[b] + (j * width + at + 16 * v) * 4);
                    for (int m = 0; m < M; m++)
                        s[m][v] = dot_brain(s[m][v], x, isplat((int32_t)r.weights[m * STRIDE + 8 * b + j]));
                }
        } else {
            for (int j = 0; j < 16; j++)
                for (int v = 0; v < VECS; v++) {
                    const F x = KIND == INT8 ? from_bytes((const int8_t*)values[b] + j * width + at + 16 * v)
                                             : load((const float*)values[b] + j * width + at + 16 * v);
                    for (int m = 0; m < M; m++)
                        s[m][v] = fma(x, splat(((const float*)r.weights)[m * STRIDE + 16 * b + j]), s[m][v]);
                }
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECS; v++) store(r.sums + m * width + at + 16 * v, s[m][v]);
}

template <Kind KIND, int M>
INLINE void lay_out(Rows& r, int m, const float* q, int64_t width) {
    const float factor = 1.0f / std::sqrt((float)width);
    if constexpr (KIND == INT8) {
        int8_t codes[1024];
        r.q_scale[m] = to_codes(q, width, codes) * factor;
        r.q_sum[m] = 0;
        for (int64_t i = 0; i < width; i++) r.q_sum[m] += codes[i];
        for (int64_t i = 0; i < width / 4; i++) memcpy(r.q + i * M + m, codes + 4 * i, 4);
    } else if constexpr (KIND == BRAIN) {
        for (int64_t i = 0; i < width / 2; i++)
            r.q[i * M + m] = to_brain(q[2 * i] * factor) | (uint32_t)to_brain(q[2 * i + 1] * factor) << 16;
    } else {
        for (int64_t i = 0; i < width; i++) ((float*)r.q)[i * M + m] = q[i] * factor;
    }
}

// M queries: row i of the task is query head (i % G) of new token (from + i / G).
template <Kind KIND, int M>
__attribute__((noinline)) void attend_rows(const Attend& a, int64_t row) {
    const Cache& cache = *a.cache;
    const int64_t E = cache.width, G = a.heads / cache.heads, half_bytes = cache.half_bytes();
    Rows r;
    float* room = a.scratch;
    r.q = (uint32_t*)room, room += ROWS * E;
    r.scores = room, room += ROWS * STRIDE;
    r.weights = (uint32_t*)room, room += ROWS * STRIDE;
    r.sums = room;
    int64_t last = 0;
    for (int m = 0; m < M; m++) {
        const int64_t token = a.from + (row + m) / G, head = a.head * G + (row + m) % G;
        lay_out<KIND, M>(r, m, a.q + (a.span.first + token) * a.q_stride + head * E, E);
        r.position[m] = a.span.start + token;
        r.most[m] = -INFINITE, r.total[m] = 0;
        last = r.position[m] > last ? r.position[m] : last;
    }
    memset(r.sums, 0, M * E * sizeof(float));
    for (int64_t base = 0; base <= last; base += STRIDE) {
        const int blocks = last - base >= 48 ? 4 : (int)((last - base) / 16 + 1);
        const uint8_t* keys[4];
        const uint8_t* values[4];
        for (int b = 0; b < 4; b++) {  // past the end the last block stands in, and is seen by nobody
            keys[b] = cache.unit(a.layer, a.span.blocks[base / 16 + (b < blocks ? b : blocks - 1)], a.head);
            values[b] = keys[b] + half_bytes;
        }
        score<KIND, M>(r, keys, E);
        for (int m = 0; m < M; m++) weigh<KIND>(r, m, base, values, E);
        int64_t at = 0;
        for (; at + 64 <= E; at += 64) collect<KIND, M, 4>(r, values, blocks, E, at);
        for (; at < E; at += 16) collect<KIND, M, 1>(r, values, blocks, E, at);
    }
    for (int m = 0; m < M; m++) {
        const int64_t token = a.from + (row + m) / G, head = a.head * G + (row + m) % G;
        float* out = a.out + (a.span.first + token) * a.out_stride + head * E;
        const F inverse = splat(1.0f / r.total[m]);
        for (int64_t i = 0; i < E; i += 16) store(out + i, mul(load(r.sums + m * E + i), inverse));
    }
}

template <Kind KIND, int M>
void attend_some(const Attend& a, int64_t row, int m) {
    if constexpr (M == 1) attend_rows<KIND, 1>(a, row);
    else m == M ? attend_rows<KIND, M>(a, row) : attend_some<KIND, M - 1>(a, row, m);
}

inline void attend(const Attend& a) {
    const int64_t rows = (a.to - a.from) * (a.heads / a.cache->heads);
    for (int64_t row = 0; row < rows; row += ROWS) {
        const int m = rows - row < ROWS ? (int)(rows - row) : ROWS;
        switch (a.cache->kind) {
            case FLOAT: attend_some<FLOAT, ROWS>(a, row, m); break;
            case BRAIN: attend_some<BRAIN, ROWS>(a, row, m); break;
            default: attend_some<INT8, ROWS>(a, row, m);
        }
    }
}

}  // namespace PUNA_NAMESPACE
