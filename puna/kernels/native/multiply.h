// Matrix products: a chunk of 64 rows of weights times a tile of tokens, of each kind of numbers (integers: codes.h; packed
// ones: packed.h), what is done with them, and how activations are laid out for them.

#pragma once
#include "codes.h"
#include "matrix.h"
#include "packed.h"
#include "simd.h"
#include "transpose.h"

namespace PUNA_NAMESPACE {
using namespace puna;

template <Kind KIND, int M>
INLINE void chunk_floats(const uint8_t* chunk, int64_t steps, const uint32_t* x, F y[M][4]) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 4; v++) y[m][v] = zero();
    for (int64_t step = 0; step < steps; step++, chunk += 256, x += M) {
        if constexpr (M == 1)
            for (int v = 0; v < 4; v++) ask_now(chunk + LEAD + 64 * v);
        for (int v = 0; v < 4; v++) {
            if constexpr (KIND == BRAIN) {
                const I w = iload(chunk + 64 * v);
                for (int m = 0; m < M; m++) y[m][v] = dot_brain(y[m][v], w, isplat((int32_t)x[m]));
            } else {
                const F w = load((const float*)(chunk + 64 * v));
                for (int m = 0; m < M; m++) y[m][v] = fma(w, splat(((const float*)x)[m]), y[m][v]);
            }
        }
    }
}

// One chunk of 64 rows times tile t: y (M, 4, 16).
template <Kind KIND, bool OFFSETS, int M>
INLINE void chunk_times_tile(const Matrix& w, int64_t c, const Activations& a, int64_t t, float* y) {
    if constexpr (KIND >= INT8 && M == 1) {
        for (int b = 0; b < 4; b++) store(y + b * LANES, block_times_token<KIND, OFFSETS>(w, 4 * c + b, a, t));
    } else if constexpr (KIND >= INT8) {
        constexpr int B = blocks_for(M);
        using Blocks = void (*)(const Matrix&, int64_t, const Activations&, int64_t, const uint8_t*, float*);
        constexpr Blocks ways[2][2] = {
            {blocks_times_tile<KIND, OFFSETS, B, M, 0, false>, blocks_times_tile<KIND, OFFSETS, B, M, 0, true>},
            {blocks_times_tile<KIND, OFFSETS, B, M, 2, false>, blocks_times_tile<KIND, OFFSETS, B, M, 2, true>},
        };
        // Who asks for the next chunk: the last ones of all blocks times tiles. Half a block each: eight, and one for the scales.
        const int64_t blocks = 4 * a.tiles(), askers = blocks < 9 ? blocks : 9;
        for (int b = 0; b < 4; b += B) {
            const int64_t asker = 4 * t + b - (blocks - askers);
            const uint8_t* soon = nullptr;
            if (asker >= 0 && c + 1 < w.chunks()) soon = w.chunk(c + 1) + asker * 4 * w.block_bytes(a.groups) / askers;
            ways[w.group == 32][a.tiles() == 1](w, 4 * c + b, a, t, soon, y + b * LANES);
        }
    } else {
        F r[M][4];
        chunk_floats<KIND, M>(w.chunk(c), w.steps(), a.data + a.start(t) * a.steps, r);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 4; v++) store(y + m * CHUNK + v * LANES, r[m][v]);
    }
}

template <int M>
INLINE void packed_times_tile(const Matrix& w, int64_t c, const Activations& a, int64_t t, uint8_t* room, float* y) {
    F r[M][4];
    const uint32_t* x = a.data + a.start(t) * a.steps;
    if (const uint8_t* plain = unpacked(w.chunk(c), a, t, room)) chunk_floats<BRAIN, M>(plain, a.steps, x, r);
    else chunk_packed<M>(w.chunk(c), a.steps, x, r);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 4; v++) store(y + m * CHUNK + v * LANES, r[m][v]);
}

// One chunk times tile t; the tiles of a chunk come one after the other, from 0 on, and have `room` in common.
using Product = void (*)(const Matrix&, int64_t c, const Activations&, int64_t t, uint8_t* room, float* y);

template <Kind KIND, bool OFFSETS, int M>
__attribute__((noinline)) void product(const Matrix& w, int64_t c, const Activations& a, int64_t t, uint8_t*, float* y) {
    chunk_times_tile<KIND, OFFSETS, M>(w, c, a, t, y);
}

template <int M>
__attribute__((noinline)) void packed_product(const Matrix& w, int64_t c, const Activations& a, int64_t t, uint8_t* room,
                                              float* y) {
    packed_times_tile<M>(w, c, a, t, room, y);
}

// The function for tiles of M tokens, M from 1 to TILE.
template <Kind KIND, bool OFFSETS, int M>
Product product_for(int m) {
    if constexpr (M == 1) return product<KIND, OFFSETS, 1>;
    else return m == M ? product<KIND, OFFSETS, M> : product_for<KIND, OFFSETS, M - 1>(m);
}

template <int M>
Product packed_product_for(int m) {
    if constexpr (M == 1) return packed_product<1>;
    else return m == M ? packed_product<M> : packed_product_for<M - 1>(m);
}

inline Product product_of(const Matrix& w, int m) {
    if (w.packed) return packed_product_for<TILE_F>(m);
    switch (w.kind) {
        case FLOAT: return product_for<FLOAT, false, TILE_F>(m);
        case BRAIN: return product_for<BRAIN, false, TILE_F>(m);
        case INT8: return w.offsets ? product_for<INT8, true, TILE_Q>(m) : product_for<INT8, false, TILE_Q>(m);
        case INT6: return w.offsets ? product_for<INT6, true, TILE_Q>(m) : product_for<INT6, false, TILE_Q>(m);
        case SPLIT: return product_for<SPLIT, false, TILE_Q>(m);
        case UPPER: return product_for<UPPER, false, TILE_Q>(m);
        default: return w.offsets ? product_for<INT4, true, TILE_Q>(m) : product_for<INT4, false, TILE_Q>(m);
    }
}

// A thread's memory for packed products: of w, and of a second matrix beside it.
inline uint8_t* room_for(const Matrix& w, const Activations& a, int which) {
    thread_local struct Room {
        uint8_t* data = nullptr;
        int64_t bytes = 0;
        ~Room() { ::operator delete[](data, std::align_val_t(64)); }
    } rooms[2];
    const int64_t bytes = room_bytes(w, a);
    Room& room = rooms[which];
    if (room.bytes < bytes) {
        ::operator delete[](room.data, std::align_val_t(64));
        room.data = (uint8_t*)::operator new[](room.bytes = bytes, std::align_val_t(64));
    }
    return room.data;
}

// Where a chunk's results of tile t will go, y (tokens, stride): asked for before they are computed.
INLINE void expect(const Activations& a, int64_t t, int64_t c, float* y, int64_t stride) {
    for (int64_t token = a.start(t); token < a.start(t + 1); token++)
        for (int v = 0; v < CHUNK; v += LANES) __builtin_prefetch(y + token * stride + c * CHUNK + v, 1);
}

inline void multiply(const Matrix& w, int64_t from, int64_t to, const Activations& a, float* y, int64_t stride,
                     bool add_to) {
    alignas(64) float part[TILE_Q * CHUNK];
    uint8_t* room = room_for(w, a, 0);
    for (int64_t c = from; c < to; c++) {
        for (int64_t t = 0; t < a.tiles(); t++) {
            const int size = a.size(t);
            const int64_t first = a.start(t);
            expect(a, t, c, y, stride);
            product_of(w, size)(w, c, a, t, room, part);
            for (int m = 0; m < size; m++) {
                float* row = y + (first + m) * stride + c * CHUNK;
                for (int v = 0; v < CHUNK; v += LANES) {
                    const F r = load(part + m * CHUNK + v);
                    store(row + v, add_to ? add(load(row + v), r) : r);
                }
            }
        }
    }
}

inline void refine(const Matrix& w, int64_t b, const Activations& a, int64_t t, float* y) {
    store(y, block_times_token<SPLIT, false>(w, b, a, t));
}

inline void maxima(const float* x, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = largest(load(x + LANES * i));
}

INLINE F silu(F x) { return div(x, add(splat(1.0f), exp(min(sub(zero(), x), splat(88.0f))))); }

inline void swiglu(const Matrix& w1, const Activations& x1, const Matrix& w3, const Activations& x3, int64_t from,
                   int64_t to, float* y, int64_t stride) {
    alignas(64) float gate[TILE_Q * CHUNK], lift[TILE_Q * CHUNK];
    uint8_t *room1 = room_for(w1, x1, 0), *room3 = room_for(w3, x3, 1);
    for (int64_t c = from; c < to; c++) {
        for (int64_t t = 0; t < x1.tiles(); t++) {
            const int size = x1.size(t);
            const int64_t first = x1.start(t);
            expect(x1, t, c, y, stride);
            product_of(w1, size)(w1, c, x1, t, room1, gate);
            product_of(w3, size)(w3, c, x3, t, room3, lift);
            for (int m = 0; m < size; m++)
                for (int v = 0; v < CHUNK; v += LANES)
                    store(y + (first + m) * stride + c * CHUNK + v,
                          mul(silu(load(gate + m * CHUNK + v)), load(lift + m * CHUNK + v)));
        }
    }
}

inline void gate(float* y, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, mul(silu(load(y + i)), load(x + i)));
}

// ---------------------------------------------------------------------------------------------- activations, laid out

inline void rms_norm(const float* x, const float* norm, float eps, int64_t columns, float* y) {
    F squares = zero();
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < columns; i++) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / (float)columns + eps);
    for (i = 0; i + LANES <= columns; i += LANES) store(y + i, mul(mul(load(x + i), splat(factor)), load(norm + i)));
    for (; i < columns; i++) y[i] = x[i] * factor * norm[i];
}

// Token m of tile t, as numbers (filled up with zeros to whole groups), as codes: round(x / scale), scale = largest / 127.
// Of what is read soon four lines are asked for with each group.
INLINE void quantise(const float* x, Activations& a, int64_t t, int m, int8_t* codes, const uint8_t* soon) {
    constexpr int64_t BEFORE = 512;  // numbers that x is asked for before they are read: long rows come from far away
    const int size = a.size(t);
    float* scales = a.scales + a.start(t) * a.groups + m;
    int32_t* sums = a.sums + a.start(t) * a.groups + m;
    for (int64_t first = 0; first < a.groups; first += a.wide) {
        const int64_t end = first + a.wide < a.groups ? first + a.wide : a.groups;
        F top = zero();
        for (int64_t i = first * a.group; i < end * a.group; i += LANES) {
            top = max(top, abs(load(x + i)));
            ask_later(x + i + BEFORE);
        }
        const float most = largest(top);
        const F inverse = splat(most > 0 ? 127.0f / most : 0.0f);
        for (int64_t g = first; g < end; g++) {
            for (int i = 0; soon && i < 4; i++, soon += 64) ask_later(soon);
            I s = izero();
            for (int64_t i = g * a.group; i < (g + 1) * a.group; i += LANES) {
                const I some = to_int(mul(load(x + i), inverse));
                s = iadd(s, some);
                store_bytes(codes + i, some);
            }
            scales[g * size] = most / 127.0f;
            sums[g * size] = -a.bias * isum(s);
        }
    }
}

INLINE void to_pairs(const float* x, int64_t columns, uint32_t* pairs) {
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) store_brain((uint16_t*)pairs + i, load(x + i));
    for (; i < columns; i += 2) pairs[i / 2] = to_brain(x[i]) | (uint32_t)to_brain(x[i + 1]) << 16;
}

inline void prepare(Activations& a, int64_t t, const float* x, int64_t stride, int64_t columns, const float* norm,
                    float eps, const uint8_t* soon) {
    thread_local float* room = nullptr;
    thread_local int64_t has = 0;
    const int64_t filled = a.integer ? a.groups * a.group : up(columns, 2);
    const int64_t line = up(a.steps, LANES), first = a.start(t);
    const int size = a.size(t);
    if (has < up(filled, LANES) + size * line) {
        delete[] room;
        room = new float[has = up(filled, LANES) + size * line];
    }
    float* row = room;  // one token's numbers; behind them each token's steps
    uint32_t* steps = (uint32_t*)(row + up(filled, LANES));
    for (int m = 0; m < size; m++) {
        const float* from = x + (first + m) * stride;
        if (norm) rms_norm(from, norm, eps, columns, row);
        else if (columns < filled) memcpy(row, from, columns * sizeof(float));
        for (int64_t i = columns; i < filled; i++) row[i] = 0;
        if (norm || columns < filled) from = row;
        uint32_t* to = steps + m * line;
        if (a.integer) quantise(from, a, t, m, (int8_t*)to, soon);
        else if (a.brain) to_pairs(from, filled, to);
        else memcpy(to, from, a.steps * 4);
    }
    transpose_some<(TILE_Q > TILE_F ? TILE_Q : TILE_F)>(size, steps, line, a.steps, a.data + first * a.steps);
}

// One of four 6-bit codes, as it is stored, of a lane's byte in the three lines at `codes`.
inline int six(const uint8_t* codes, int64_t step) {
    return (codes[step / 2 * 64] >> (step % 2 * 4) & 15) | (codes[128] >> (2 * step) & 3) << 4;
}

// A row of the matrix as numbers: what an embedding looks up.
inline void embed(const Matrix& w, int64_t row, float* out) {
    const int64_t lane = row % LANES, block = row % CHUNK / LANES;
    const uint8_t* chunk = w.chunk(row / CHUNK);
    if (w.packed && !head_of(chunk).plain) return embed_packed(w, row, out);
    if (w.packed) chunk += HEAD;
    if (!w.integer()) {
        for (int64_t i = 0; i < w.columns; i++) {
            if (w.kind == FLOAT) memcpy(out + i, chunk + i * 256 + block * 64 + lane * 4, 4);
            else {
                uint32_t bits = 0;
                memcpy((uint8_t*)&bits + 2, chunk + i / 2 * 256 + block * 64 + lane * 4 + i % 2 * 2, 2);
                memcpy(out + i, &bits, 4);
            }
        }
        return;
    }
    chunk += block * w.block_bytes();
    const uint8_t* lower = w.kind == SPLIT ? w.lower(row / LANES) : nullptr;
    for (int64_t g = 0; g < w.groups(); g++) {
        const uint16_t* line = (const uint16_t*)(chunk + w.scales_at(g));
        const float scale = from_half(line[lane]), offset = w.offsets ? from_half(line[LANES + lane]) : 0;
        const uint8_t* codes = chunk + w.codes_at(g) + lane * 4;
        for (int64_t i = 0; i < w.group && g * w.group + i < w.columns; i++) {
            const int64_t step = i / 4;
            int code;
            const auto nibble = [&](const uint8_t* from) { return from[step / 2 * 64 + i % 4] >> (step % 2 * 4) & 15; };
            if (w.kind == INT8) code = codes[step * 64 + i % 4] - 128;
            else if (w.kind == INT4) code = nibble(codes) - 8;
            else if (w.kind == UPPER) code = 16 * nibble(codes) - 120;
            else if (w.kind == SPLIT) code = 16 * nibble(codes) + nibble(lower + g * w.group_bytes() + lane * 4) - 128;
            else code = six(codes + step / 4 * 192 + i % 4, step % 4) - 32;
            out[g * w.group + i] = scale * (float)code + offset;
        }
    }
}

}  // namespace PUNA_NAMESPACE
