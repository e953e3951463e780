// A few rows of numbers turned into columns: what products spread over lanes lies [step][row of the tile][4 bytes].

#pragma once
#include "simd.h"

namespace PUNA_NAMESPACE {

// Sixteen steps of M rows are 16 M numbers, M vectors of them. Number e of these is step e / M of row e % M. A permutation
// takes from two rows at once; `lanes` says which numbers of an output vector a pair of rows has, `at` where in the pair.
template <int M>
struct Shuffle {
    static constexpr int PAIRS = (M + 1) / 2;
    int32_t at[M][PAIRS][16] = {};
    uint16_t lanes[M][PAIRS] = {};

    constexpr Shuffle() {
        for (int e = 0; e < 16 * M; e++) {
            const int row = e % M, step = e / M;
            at[e / 16][row / 2][e % 16] = step + row % 2 * 16;
            lanes[e / 16][row / 2] |= (uint16_t)(1u << e % 16);
        }
    }
};

// rows (M, steps), `stride` numbers from one to the next, into out (steps, M).
template <int M>
INLINE void transpose(const uint32_t* rows, int64_t stride, int64_t steps, uint32_t* out) {
    int64_t i = 0;
#if defined(PUNA_AVX512)
    alignas(64) static constexpr Shuffle<M> shuffle;
    for (; i + 16 <= steps; i += 16) {
        I in[M + 1];
        for (int m = 0; m < M; m++) in[m] = iload(rows + m * stride + i);
        in[M] = in[M - 1];
        for (int v = 0; v < M; v++) {
            I made = izero();
            for (int p = 0; p < shuffle.PAIRS; p++) {
                const I two = _mm512_permutex2var_epi32(in[2 * p], iload(shuffle.at[v][p]), in[2 * p + 1]);
                made = _mm512_mask_mov_epi32(made, shuffle.lanes[v][p], two);
            }
            istore(out + i * M + 16 * v, made);
        }
    }
#endif
    for (; i < steps; i++)
        for (int m = 0; m < M; m++) out[i * M + m] = rows[m * stride + i];
}

// The same for m rows, M at the most.
template <int M>
INLINE void transpose_some(int m, const uint32_t* rows, int64_t stride, int64_t steps, uint32_t* out) {
    if constexpr (M == 1) transpose<1>(rows, stride, steps, out);
    else m == M ? transpose<M>(rows, stride, steps, out) : transpose_some<M - 1>(m, rows, stride, steps, out);
}

}  // namespace PUNA_NAMESPACE
