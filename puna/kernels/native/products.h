// A training step's matrix products in bfloat16, summed in float32.
//
// The processor multiplies pairs: sixteen lanes of two bfloat16 with one pair spread over all lanes. So with k running
// along what is summed,
//
//   left    a matrix as it lies (step 1), or its transpose: rows 2k and 2k + 1 laid between each other (row 1)
//   right   panels of 64 columns, the last one narrower: panel of column c at `c * steps`, pair k of its columns
//           `at[k * width]` and following, so that a product reads it from front to back
//   tile    6 rows by 64 columns of sums, which fill 24 of the 32 registers
//
// A panel is read again for each tile of rows; blocks of rows are chosen so that it stays in the second cache.

#pragma once
#include <algorithm>

#include "simd.h"
#include "training_ops.h"

namespace PUNA_NAMESPACE {

constexpr int64_t PANEL = 64;
#if defined(PUNA_BF16)
constexpr int TILE_ROWS = 6;
#else
constexpr int TILE_ROWS = 1;  // Python takes PyTorch's products there; this one is only to be right
#endif

constexpr int64_t AHEAD = 16;  // rows

// Pair k of row m at `at[m * row + k * step]`.
struct Left {
    const uint32_t* at;
    int64_t row, step;

    static Left lying(const uint16_t* x, int64_t n) { return {(const uint32_t*)x, n / 2, 1}; }
    static Left across(const uint32_t* pairs, int64_t width) { return {pairs, 1, width}; }
    Left from(int64_t m, int64_t k) const { return {at + m * row + k * step, row, step}; }
};

// Memory that will be read next, asked for by the tiles before, a line in each step: `lines` columns of `rows` lines that
// are `stride` bytes apart. The second cache has it when its turn comes, and the memory has work meanwhile.
struct Ahead {
    const char* at = nullptr;
    int64_t stride = 0, rows = 0, lines = 0;
    int64_t row = 0, line = 0;

    static Ahead of(const void* at, int64_t bytes) { return {(const char*)at, 64, bytes / 64, 1}; }
    // Where the next tile begins, which goes on for so many steps; null if all is asked for. It may go beyond the last row.
    const char* next(int64_t steps) {
        if (line >= lines) return nullptr;
        const char* from = at + row * stride + line * 64;
        if ((row += steps) >= rows) row = 0, line++;
        return from;
    }
};

enum Put { ROUND, STORE, ADD };  // sums become bfloat16, float32, or are added to float32

// rows M, columns 16 V; out has `stride` numbers a row; with MORE, a line is asked for in each step
template <Put PUT, int M, int V, bool MORE = false>
__attribute__((noinline)) void tile(Left left, const uint32_t* right, int64_t width, int64_t steps, void* out,
                                    int64_t stride, const char* more, int64_t apart) {
    F sums[M][V];
    const uint32_t* three[(M + 2) / 3];  // addresses of three rows each: as many as the processor's addressing reaches
#pragma GCC unroll 32  // whatever is not unrolled would keep the sums in memory
    for (int i = 0; i < M * V; i++) sums[i / V][i % V] = zero();
    for (int m = 0; m < M; m += 3) three[m / 3] = left.at + m * left.row;
    constexpr int64_t size = PUT == ROUND ? 2 : 4;
    for (int m = 0; m < M; m++)  // where the sums will go: in the cache by then
        for (int64_t byte = 0; byte < 16 * V * size; byte += 64) __builtin_prefetch((char*)out + m * stride * size + byte, 1);
    for (int64_t k = 0; k < steps; k++, right += width) {
        I columns[V];
        for (int v = 0; v < V; v++) columns[v] = iload(right + 16 * v);
        for (int m = 0; m < M; m++) {
            const I pair = isplat((int32_t)three[m / 3][m % 3 * left.row]);
            for (int v = 0; v < V; v++) sums[m][v] = dot_brain(sums[m][v], columns[v], pair);
        }
        for (int i = 0; i < (M + 2) / 3; i++) three[i] += left.step;
        if constexpr (MORE) __builtin_prefetch(more, 0, 2), more += apart;
    }
#pragma GCC unroll 32
    for (int i = 0; i < M * V; i++) {
        const int64_t at = i / V * stride + i % V * 16;
        const F sum = sums[i / V][i % V];
        if constexpr (PUT == ROUND) store_brain((uint16_t*)out + at, sum);
        else if constexpr (PUT == STORE) store((float*)out + at, sum);
        else store((float*)out + at, add(load((float*)out + at), sum));
    }
}

using Tile = void (*)(Left, const uint32_t*, int64_t, int64_t, void*, int64_t, const char*, int64_t);

template <Put PUT, int M = TILE_ROWS>
Tile tile_of(int64_t rows, int64_t columns, bool more = false) {
    if constexpr (M > 1)
        if (rows < M) return tile_of<PUT, M - 1>(rows, columns);
    if constexpr (M == TILE_ROWS)
        if (more && columns >= 64) return tile<PUT, M, 4, true>;
    return columns >= 64 ? tile<PUT, M, 4> : columns >= 48 ? tile<PUT, M, 3> : columns >= 32 ? tile<PUT, M, 2> : tile<PUT, M, 1>;
}

inline int64_t panel_width(int64_t columns, int64_t first) { return std::min(PANEL, columns - first); }

// out (rows, columns) from `steps` pairs; `stored` pairs are in a whole column of `right`, of which these begin at `from`.
// Meanwhile `ahead` is asked for, or else the left's other rows and then each next panel.
template <Put PUT>
void block(Left left, int64_t rows, const uint32_t* right, int64_t columns, int64_t stored, int64_t from, int64_t steps,
           void* out, int64_t stride, Ahead* ahead = nullptr) {
    constexpr int64_t size = PUT == ROUND ? 2 : 4;
    for (int64_t c = 0; c < columns; c += PANEL) {
        const int64_t width = panel_width(columns, c), after = c + PANEL;
        const uint32_t* panel = right + c * stored + from * width;
        Ahead rest, panels;
        if (c == 0 && left.step == 1 && rows > TILE_ROWS)
            rest = Ahead::of(left.at + TILE_ROWS * left.row, (rows - TILE_ROWS) * left.row * 4);
        if (after < columns) {
            const int64_t next = panel_width(columns, after);
            panels = Ahead::of(right + after * stored + from * next, steps * next * 4);
        }
        for (int64_t m = 0; m < rows; m += TILE_ROWS) {
            Ahead& wanted = ahead ? *ahead : rest.line < rest.lines ? rest : panels;
            const char* more = rows - m >= TILE_ROWS ? wanted.next(steps) : nullptr;
            tile_of<PUT>(rows - m, width, more)(left.from(m, 0), panel, width, steps, (char*)out + (m * stride + c) * size, stride,
                                                more, wanted.stride);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- laying out

// Row 2k of x and the next, which there may not be, between each other: n pairs, and what it takes to fill a line.
INLINE void interleave(const uint16_t* x, int64_t stride, int64_t k, int64_t rows, int64_t n, uint32_t* out) {
    const uint16_t *even = x + 2 * k * stride, *odd = 2 * k + 1 < rows ? even + stride : nullptr;
#if defined(PUNA_AVX512)
    const I low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                   39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const I high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 there = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
        const I e = _mm512_maskz_loadu_epi16(there, even + i), o = odd ? _mm512_maskz_loadu_epi16(there, odd + i) : izero();
        istore(out + i, _mm512_permutex2var_epi16(e, low, o));
        if (n - i > 16) istore(out + i + 16, _mm512_permutex2var_epi16(e, high, o));
    }
#else
    for (int64_t i = 0; i < n; i++) out[i] = even[i] | (odd ? (uint32_t)odd[i] << 16 : 0);
#endif
}

// Row r of x will be read soon, n numbers of it. Columns out of wide rows are no stream that the processor foresees.
INLINE void soon(const uint16_t* x, int64_t stride, int64_t r, int64_t rows, int64_t n) {
    if (r >= rows) return;
    for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(x + r * stride + i);
}

constexpr int64_t TOGETHER = 16;  // pairs of rows

// x (rows, columns), `stride` numbers a row, as the right of a product that sums over its rows; pairs [first, last).
inline void train_panels(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, int64_t first, int64_t last,
                         uint32_t* out) {
    const int64_t steps = (rows + 1) / 2;
    for (int64_t from = first; from < last; from += TOGETHER)  // so many in a panel, then as many in the next
        for (int64_t c = 0; c < columns; c += PANEL) {
            const int64_t width = panel_width(columns, c), to = std::min(last, from + TOGETHER);
            for (int64_t k = from; k < to; k++) {
                for (int64_t r : {0, 1}) soon(x + c, stride, 2 * (k + TOGETHER) + r, rows, width);
                interleave(x + c, stride, k, rows, width, out + c * steps + k * width);
            }
        }
}

// x (columns, 2 steps), `stride` numbers a row, as the right of a product that sums along its rows; columns whole lanes.
inline void panels_across(const uint16_t* x, int64_t stride, int64_t columns, int64_t steps, uint32_t* out) {
    for (int64_t c = 0; c < columns; c++) {
        const int64_t start = c / PANEL * PANEL, width = panel_width(columns, start);
        const uint32_t* pairs = (const uint32_t*)(x + c * stride);
        uint32_t* to = out + start * steps + (c - start);
        for (int64_t k = 0; k < steps; k++) to[k * width] = pairs[k];
    }
}

// 16 rows of w (n) float32, which are rows [row, row + 16) of a matrix (rows, n), where they belong in `across`, for
// products with its transpose, and in `along`, for products with itself. `scratch` has room for 16 n numbers.
inline void train_pack(const float* w, int64_t row, int64_t rows, int64_t n, uint32_t* across, uint32_t* along,
                       uint16_t* scratch) {
    for (int64_t i = 0; i < 16 * n; i += 16) store_brain(scratch + i, load(w + i));
    const int64_t start = row / PANEL * PANEL, width = panel_width(rows, start), steps = n / 2;
    const uint32_t* pairs = (const uint32_t*)scratch;
    uint32_t* to = across + start * steps + (row - start);
    for (int64_t k = 0; k < steps; k++)
        for (int64_t r = 0; r < 16; r++) to[k * width + r] = pairs[r * steps + k];
    for (int64_t r = 0; r < 16; r += 2)
        for (int64_t c = 0; c < n; c += PANEL) {
            const int64_t wide = panel_width(n, c);
            interleave(scratch + c, n, r / 2, 16, wide, along + c * (rows / 2) + (row + r) / 2 * wide);
        }
}

// ------------------------------------------------------------------------------------------------------------ products

constexpr int64_t DEEP = 1024;       // pairs: 256 KB of a panel; longer sums are taken in parts, in float32
constexpr int64_t OUTER_DEEP = 512, OUTER_ROWS = 96;  // pairs of tokens; rows, which are whole lines of d

// y (rows, columns) bfloat16 = x (rows, 2 steps) times a packed matrix. `scratch`: rows * columns float32 if it is deep.
inline void train_product(const uint16_t* x, int64_t rows, int64_t steps, const uint32_t* packed, int64_t columns,
                          uint16_t* y, float* scratch) {
    const Left left = Left::lying(x, 2 * steps);
    if (steps <= DEEP) return block<ROUND>(left, rows, packed, columns, steps, 0, steps, y, columns);
    for (int64_t k = 0; k < steps; k += DEEP) {
        const int64_t some = std::min(DEEP, steps - k);
        if (k == 0) block<STORE>(left, rows, packed, columns, steps, k, some, scratch, columns);
        else block<ADD>(left.from(0, k), rows, packed, columns, steps, k, some, scratch, columns);
    }
    for (int64_t i = 0; i < rows * columns; i += 16) store_brain(y + i, load(scratch + i));
}

// Numbers of room that `train_outer` needs for a part of `columns` columns.
inline int64_t train_outer_scratch(int64_t columns) { return OUTER_DEEP * (columns + OUTER_ROWS); }

// A part of out (rows, columns) float32 = d^T x, or added to it: of d (tokens, rows) and x (tokens, columns). Both are laid
// out here, for this part alone: what another thread has laid out would come from its caches, or through the memory.
inline void train_outer(const uint16_t* d, const uint16_t* x, int64_t tokens, const puna::OuterPart& part, bool add_to,
                        float* out, uint32_t* scratch) {
    const auto [rows, columns, first, last, left_most, right_most] = part;
    const int64_t steps = (tokens + 1) / 2, wide = right_most - left_most;
    // As deep as leaves the panels in the second cache; the same for all parts, as sums must be.
    const int64_t deep = std::clamp<int64_t>((1 << 17) / std::min(rows, columns) / TOGETHER * TOGETHER, 128, OUTER_DEEP);
    uint32_t *panels = scratch, *pairs = scratch + deep * wide;
    const Left across = Left::across(pairs, OUTER_ROWS);
    for (int64_t k = 0; k < steps; k += deep) {
        const int64_t some = std::min(deep, steps - k), left = tokens - 2 * k;
        const uint16_t *ds = d + 2 * k * rows, *xs = x + 2 * k * columns + left_most;
        train_panels(xs, columns, std::min(2 * some, left), wide, 0, some, panels);
        for (int64_t m = first; m < last; m += OUTER_ROWS) {
            const int64_t n = std::min(OUTER_ROWS, last - m);
            for (int64_t i = 0; i < some; i++) {
                for (int64_t r : {0, 1}) soon(ds + m, rows, 2 * i + AHEAD + r, left, n);
                interleave(ds + m, rows, i, left, n, pairs + i * OUTER_ROWS);
            }
            Ahead ahead;  // the next rows' numbers; behind the last, the next tokens'
            if (m + OUTER_ROWS < last) ahead = {(const char*)(ds + m + OUTER_ROWS), 2 * rows, std::min(2 * some, left), 3};
            else if (2 * some < left) ahead = {(const char*)(xs + 2 * some * columns), 2 * columns, std::min(2 * some, left - 2 * some), wide / 32};
            float* to = out + m * columns + left_most;
            if (k == 0 && !add_to) block<STORE>(across, n, panels, wide, some, 0, some, to, columns, &ahead);
            else block<ADD>(across, n, panels, wide, some, 0, some, to, columns, &ahead);
        }
    }
}

}  // namespace PUNA_NAMESPACE
