// Causal attention within documents, forward and backward, for one sequence and one key/value head with its queries.
//
// Numbers come from the rows of qkv and go back to them: turning by position happens on the way. Queries pass in blocks;
// their scores are float32, are never in main memory, and are made again by the backward pass from the logarithms of the
// sums that the forward pass keeps (as in FlashAttention, arXiv 2307.08691, whose formulas these are):
//
//   p = exp(q k^T - logs)    dv = p^T d    ds = p (d v^T - sum(d o))    dq = ds k    dk = ds^T q
//
// What lies ahead of a tile's last query, or in panels before its first query's document, is not computed.

#pragma once
#include "products.h"
#include "training.h"
#include "training_ops.h"

namespace PUNA_NAMESPACE {

constexpr int64_t QUERIES = 96;  // in a block: whole tiles

// Where things lie: `qkv` of the first token of the sequence, (T, (H + 2 K) E); kv head `k`.
struct Places {
    const puna::AttentionShape& s;
    int64_t kv;

    int64_t width() const { return (s.H + 2 * s.K) * s.E; }
    int64_t query(int64_t t, int64_t g) const { return t * width() + (kv * (s.H / s.K) + g) * s.E; }
    int64_t key(int64_t t) const { return t * width() + (s.H + kv) * s.E; }
    int64_t value(int64_t t) const { return t * width() + (s.H + s.K + kv) * s.E; }
    int64_t read(int64_t t, int64_t g) const { return (t * s.H + kv * (s.H / s.K) + g) * s.E; }
    int64_t log(int64_t t, int64_t g) const { return (kv * (s.H / s.K) + g) * s.T + t; }
    const float* turn(int64_t t) const { return s.turns + s.positions[t] * 2 * s.E; }
};

// Pieces of one scratch memory, each on a line of its own.
struct Room {
    char* at;
    template <typename T>
    T* take(int64_t n) {
        T* const taken = (T*)at;
        at += (n * sizeof(T) + 63) & ~63;
        return taken;
    }
};

// Columns [lo, hi) that the queries from t to t + n may need: whole panels below, whole lanes above.
struct Span {
    int64_t lo, hi;
    Span(const int64_t* starts, int64_t t, int64_t n) : lo(starts[t] / PANEL * PANEL), hi((t + n + 15) & ~15) {}
    // of the tile that query m of n is in
    static Span of_tile(const int64_t* starts, int64_t t, int64_t n, int64_t m) {
        const int64_t first = m / TILE_ROWS * TILE_ROWS;
        return Span(starts, t + first, std::min<int64_t>(TILE_ROWS, n - first));
    }
};

// out (n queries, T) float32 = left times panels of keys or values, of which `steps` pairs are summed, where they are needed
inline void scores(Left left, int64_t t, int64_t n, const int64_t* starts, const uint32_t* panels, int64_t steps, int64_t T,
                   float* out) {
    for (int64_t c = 0; c < T; c += PANEL)
        for (int64_t m = 0; m < n; m += TILE_ROWS) {
            const int64_t rows = std::min<int64_t>(TILE_ROWS, n - m);
            const Span span(starts, t + m, rows);
            if (c < span.lo || c >= span.hi) continue;
            tile_of<STORE>(rows, span.hi - c)(left.from(m, 0), panels + c * steps, panel_width(T, c), steps, out + m * T + c, T, nullptr, 0);
        }
}

// out (n queries, E) = p (n, T) times panels of values or keys (T, E)
template <Put PUT, typename N>
void weighted(const uint16_t* p, int64_t t, int64_t n, const int64_t* starts, const uint32_t* panels, int64_t T, int64_t E,
              N* out, int64_t stride) {
    for (int64_t m = 0; m < n; m += TILE_ROWS) {
        const int64_t rows = std::min<int64_t>(TILE_ROWS, n - m);
        const Span span(starts, t + m, rows);
        const Left left = Left::lying(p + m * T + span.lo, T);
        block<PUT>(left, rows, panels, E, T / 2, span.lo / 2, (span.hi - span.lo) / 2, out + m * stride, stride);
    }
}

inline void turn_rows(const uint16_t* x, int64_t stride, const Places& at, int64_t t, int64_t n, float factor, uint16_t* out) {
    const int64_t E = at.s.E;
    for (int64_t i = 0; i < n; i++) soon(x, stride, i + AHEAD, n, E), train_turn(x + i * stride, at.turn(t + i), 1, factor, E, out + i * E);
}

// Numbers between pairs of queries laid out across T keys: no power of two, whose lines would share a few places of the cache.
constexpr int64_t apart(int64_t T) { return T + 16; }

inline int64_t train_attend_scratch(int64_t T, int64_t E) {
    return QUERIES * T * 4 * 3 + QUERIES / 2 * apart(T) * 4 * 2 + T * E * 2 * 4 + T * E * 4 * 2 + QUERIES * E * 16 + QUERIES * 8 + 64 * 24;
}

inline void train_attend(const puna::AttentionShape& s, int64_t kv, const uint16_t* qkv, uint16_t* read, float* logs,
                         char* scratch) {
    const Places at{s, kv};
    const int64_t T = s.T, E = s.E;
    Room room{scratch};
    uint16_t* turned = room.take<uint16_t>(T * E);
    uint32_t *keys = room.take<uint32_t>(T * E / 2), *values = room.take<uint32_t>(T * E / 2);
    float* x = room.take<float>(QUERIES * T);
    uint16_t *p = room.take<uint16_t>(QUERIES * T), *q = room.take<uint16_t>(QUERIES * E);
    turn_rows(qkv + at.key(0), at.width(), at, 0, T, 1, turned);
    panels_across(turned, E, T, E / 2, keys);
    train_panels(qkv + at.value(0), at.width(), T, E, 0, T / 2, values);
    for (int64_t g = 0; g < s.H / s.K; g++)
        for (int64_t t = 0; t < T; t += QUERIES) {
            const int64_t n = std::min(QUERIES, T - t);
            turn_rows(qkv + at.query(t, g), at.width(), at, t, n, s.factor, q);
            scores(Left::lying(q, E), t, n, s.starts, keys, E / 2, T, x);
            for (int64_t m = 0; m < n; m++) {
                const Span span = Span::of_tile(s.starts, t, n, m);
                const int64_t begin = s.starts[t + m], end = t + m + 1;
                float* row = x + m * T;
                F top = splat(-INFINITE), total = zero();
                for (int64_t i = span.lo; i < span.hi; i += 16) {
                    const F v = within(load(row + i), i, begin, end, -INFINITE);
                    store(row + i, v);
                    top = max(top, v);
                }
                const float most = largest(top);
                for (int64_t i = span.lo; i < span.hi; i += 16) {
                    const F v = exp(sub(load(row + i), splat(most)));
                    const F kept = within(v, i, begin, end, 0.0f);
                    store(row + i, kept);
                    total = add(total, kept);
                }
                const float whole = sum(total);
                const F share = splat(1.0f / whole);
                for (int64_t i = span.lo; i < span.hi; i += 16) store_brain(p + m * T + i, mul(load(row + i), share));
                logs[at.log(t + m, g)] = most + std::log(whole);
            }
            weighted<ROUND>(p, t, n, s.starts, values, T, E, read + at.read(t, g), s.H * E);
        }
}

// dqkv from d, the gradient of `read`
inline void train_attend_back(const puna::AttentionShape& s, int64_t kv, const uint16_t* qkv, const uint16_t* read,
                              const float* logs, const uint16_t* d, uint16_t* dqkv, char* scratch) {
    const Places at{s, kv};
    const int64_t T = s.T, E = s.E, stride = s.H * E;
    Room room{scratch};
    uint16_t* turned = room.take<uint16_t>(T * E);
    uint32_t *keys = room.take<uint32_t>(T * E / 2), *values = room.take<uint32_t>(T * E / 2);  // across, for scores
    uint32_t* keys_along = room.take<uint32_t>(T * E / 2);
    float *dk = room.take<float>(T * E), *dv = room.take<float>(T * E);
    float *x = room.take<float>(QUERIES * T), *dp = room.take<float>(QUERIES * T);
    uint16_t *p = room.take<uint16_t>(QUERIES * T), *ds = room.take<uint16_t>(QUERIES * T);
    uint32_t *p_across = room.take<uint32_t>(QUERIES / 2 * apart(T)), *ds_across = room.take<uint32_t>(QUERIES / 2 * apart(T));
    uint16_t *q = room.take<uint16_t>(QUERIES * E), *dq = room.take<uint16_t>(QUERIES * E);
    uint32_t *q_along = room.take<uint32_t>(QUERIES * E / 2), *d_along = room.take<uint32_t>(QUERIES * E / 2);
    turn_rows(qkv + at.key(0), at.width(), at, 0, T, 1, turned);
    panels_across(turned, E, T, E / 2, keys);
    train_panels(turned, E, T, E, 0, T / 2, keys_along);
    for (int64_t t = 0; t < T; t++) {  // together first: a panel is filled column by column
        soon(qkv + at.value(0), at.width(), t + AHEAD, T, E);
        memcpy(turned + t * E, qkv + at.value(t), E * 2);
    }
    panels_across(turned, E, T, E / 2, values);
    memset(dk, 0, T * E * 4), memset(dv, 0, T * E * 4);
    for (int64_t g = 0; g < s.H / s.K; g++)
        for (int64_t t = 0; t < T; t += QUERIES) {
            const int64_t n = std::min(QUERIES, T - t), seen = (t + n + 15) & ~15, unseen = s.starts[t] / PANEL * PANEL;
            const uint16_t *given = d + at.read(t, g), *got = read + at.read(t, g);
            turn_rows(qkv + at.query(t, g), at.width(), at, t, n, s.factor, q);
            scores(Left::lying(q, E), t, n, s.starts, keys, E / 2, T, x);
            scores(Left::lying(given, stride), t, n, s.starts, values, E / 2, T, dp);
            for (int64_t m = 0; m < n; m++) {
                const Span span = Span::of_tile(s.starts, t, n, m);
                const int64_t begin = s.starts[t + m], end = t + m + 1;
                soon(got, stride, m + AHEAD, n, E);
                F dots = zero();
                for (int64_t i = 0; i < E; i += 16) dots = fma(brain(given + m * stride + i), brain(got + m * stride + i), dots);
                const F mean = splat(sum(dots)), log = splat(logs[at.log(t + m, g)]);
                uint16_t *rp = p + m * T, *rds = ds + m * T;
                memset(rp + unseen, 0, (span.lo - unseen) * 2), memset(rds + unseen, 0, (span.lo - unseen) * 2);
                for (int64_t i = span.lo; i < span.hi; i += 16) {
                    const F v = within(exp(sub(load(x + m * T + i), log)), i, begin, end, 0.0f);
                    store_brain(rp + i, v);
                    store_brain(rds + i, mul(v, within(sub(load(dp + m * T + i), mean), i, begin, end, 0.0f)));
                }
                memset(rp + span.hi, 0, (seen - span.hi) * 2), memset(rds + span.hi, 0, (seen - span.hi) * 2);
            }
            weighted<ROUND>(ds, t, n, s.starts, keys_along, T, E, dq, E);
            for (int64_t m = 0; m < n; m++)
                train_turn(dq + m * E, at.turn(t + m), -1, s.factor, E, dqkv + at.query(t + m, g));
            const int64_t next = apart(T);
            for (int64_t k = 0; k < n / 2; k++) {
                interleave(p + unseen, T, k, n, seen - unseen, p_across + k * next);
                interleave(ds + unseen, T, k, n, seen - unseen, ds_across + k * next);
            }
            train_panels(q, E, n, E, 0, n / 2, q_along);
            train_panels(given, stride, n, E, 0, n / 2, d_along);
            for (int64_t m = unseen; m < seen; m += TILE_ROWS) {  // keys; queries before them do not see them
                const int64_t rows = std::min<int64_t>(TILE_ROWS, seen - m), k = std::max<int64_t>(0, (m - t) / 2);
                const Left ps = Left::across(p_across, next).from(m - unseen, k), dss = Left::across(ds_across, next).from(m - unseen, k);
                block<ADD>(ps, rows, d_along, E, n / 2, k, n / 2 - k, dv + m * E, E);
                block<ADD>(dss, rows, q_along, E, n / 2, k, n / 2 - k, dk + m * E, E);
            }
        }
    for (int64_t t = 0; t < T; t++) {
        for (int64_t i = 0; i < E; i += 16) {
            store_brain(turned + i, load(dk + t * E + i));
            store_brain(dqkv + at.value(t) + i, load(dv + t * E + i));
        }
        train_turn(turned, at.turn(t), -1, 1, E, dqkv + at.key(t));
    }
}

}  // namespace PUNA_NAMESPACE
