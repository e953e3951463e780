// Products of integer codes: blocks of 16 rows times a tile of tokens, in registers.
//
// Group by group:   y += (w scale x a scale) * (sum of code products)
// or, where several groups have one scale of the activations (4-bit codes: WIDE in matrix.h):
//     part += w scale * (sum of code products), and after these groups   y += a scale * part
// The sums are exact, so that each output is the same sequence of float32 additions whatever the number of tokens: a
// token's result does not depend on what is computed beside it.
//
// A multiplication in float32 takes the place of a dot product, a conversion does not. With groups of 32, which are eight
// dot products, the second way saves one multiplication of the two that follow them.
//
// Weight codes are stored without sign, as the dot product instructions want it. The surplus (8 or 128 times the sum of
// the activations' codes) is where the group's sum starts from.
//
// Several tokens share what is spread of their codes over as many blocks of rows as the registers hold sums of
// (`blocks_for` in simd.h): with one block each dot product has a load of its own, and loads are then what there is too
// little of. A lone token's products wait for memory and for nothing else. They go through the blocks one by one, so that
// a thread reads one stream from its first chunk to its last, and ask for what comes LEAD bytes later. The last
// tiles ask for the next chunk while they multiply by this one: few lines each, so that they do not wait for them.

#pragma once
#include "matrix.h"
#include "simd.h"

namespace PUNA_NAMESPACE {
using namespace puna;

constexpr int64_t LEAD = 5 * 1024;

constexpr bool bytes_of(Kind kind) { return kind == INT8 || kind == SPLIT || kind == UPPER; }  // multiplied as 8-bit codes
constexpr bool biased(Kind kind) { return !bytes_of(kind) || BIAS8; }  // whether the surplus is in the dot products
constexpr int unit_bytes(Kind kind) { return kind == INT8 ? 256 : kind == INT6 ? 192 : 128; }  // four steps of 16 rows

template <Kind KIND>
INLINE void dot(I& sum, I w, I a) {
    if constexpr (bytes_of(KIND)) add_dot_bytes(sum, w, a);
    else add_dot_nibbles(sum, w, a);
}

// Two of a unit's four steps.
template <Kind KIND, int HALF>
INLINE void two_steps(const uint8_t* unit, const uint8_t* lower, I& even, I& odd) {
    if constexpr (KIND == INT8) {
        even = iload(unit + 128 * HALF), odd = iload(unit + 128 * HALF + 64);
    } else if constexpr (bytes_of(KIND)) {
        const I upper = iload(unit + 64 * HALF);
        const I rest = KIND == SPLIT ? iload(lower + 64 * HALF) : isplat((int32_t)0x88888888);
        even = join_low(upper, rest), odd = join_high(upper, rest);
    } else {
        const I both = iload(unit + 64 * HALF);
        even = low_nibbles(both), odd = high_nibbles(both);
    }
    if constexpr (KIND == INT6) {
        const I twos = iload(unit + 128);
        even = six_bits<2 * HALF>(even, twos), odd = six_bits<2 * HALF + 1>(odd, twos);
    }
}

template <Kind KIND, int HALF, int B, int M>
INLINE void half_unit(const uint8_t* unit, int64_t block, const uint8_t* lower, int64_t lower_block, const uint32_t* x,
                      I s[B][M]) {
    I even[B], odd[B];
    for (int b = 0; b < B; b++) two_steps<KIND, HALF>(unit + b * block, lower + b * lower_block, even[b], odd[b]);
    for (int m = 0; m < M; m++) {
        const I token = isplat((int32_t)x[2 * HALF * M + m]);
        for (int b = 0; b < B; b++) dot<KIND>(s[b][m], even[b], token);
    }
    for (int m = 0; m < M; m++) {
        const I token = isplat((int32_t)x[(2 * HALF + 1) * M + m]);
        for (int b = 0; b < B; b++) dot<KIND>(s[b][m], odd[b], token);
    }
}

// Blocks b to b + B - 1 of 16 rows times tile t, into y (M, CHUNK). `soon`: what is to be asked for meanwhile, or null:
// ALL of as many blocks, line by line as these are read; or half as many bytes, one after the other.
template <Kind KIND, bool OFFSETS, int B, int M, int UNITS, bool ALL>
__attribute__((noinline)) void blocks_times_tile(const Matrix& w, int64_t b0, const Activations& a, int64_t t,
                                                 const uint8_t* soon, float* out) {
    const int64_t groups = a.groups, units = UNITS ? UNITS : w.group / 16, block = w.block_bytes(groups);
    const int64_t lower_block = KIND == SPLIT ? groups * w.group_bytes() : 0;
    const uint32_t* x = a.data + a.start(t) * a.steps;
    const float* scales = a.scales + a.start(t) * groups;
    const int32_t* sums = a.sums + a.start(t) * groups;
    constexpr float unbias = -1.0f / (float)bias_of(KIND);
    const uint8_t* codes = w.data + b0 * block;
    const uint8_t* lower = KIND == SPLIT ? w.lower(b0) : nullptr;
    const uint8_t* line = codes;
    const int64_t ahead = soon ? soon - codes : 0;
    F y[B][M];  // the sums; with 4-bit codes, parts of them
    for (int b = 0; b < B; b++)
        for (int m = 0; m < M; m++) {
            y[b][m] = zero();
            if constexpr (KIND == INT4) store(out + m * CHUNK + b * LANES, zero());
        }
    int64_t until = a.wide;  // the next group with another scale of the activations
    for (int64_t g = 0; g < groups; g++, scales += M, sums += M) {
        if (OFFSETS || g % 2 == 0) line = codes, codes += 64;
        else line += 2 * LANES;
        I s[B][M];
        for (int m = 0; m < M; m++) {
            const I start = biased(KIND) ? isplat(sums[m]) : izero();
            for (int b = 0; b < B; b++) s[b][m] = start;
        }
        for (int64_t unit = 0; unit < units; unit++, codes += unit_bytes(KIND), x += 4 * M) {
            if (soon) {
                constexpr int some = B * unit_bytes(KIND) / 2;
                for (int b = 0; b < B && ALL; b++)
                    for (int i = 0; i < unit_bytes(KIND); i += 64) ask_later(codes + ahead + b * block + i);
                for (int i = 0; i < some && !ALL; i += 64) ask_later(soon + i);
                soon += some;
            }
            half_unit<KIND, 0, B, M>(codes, block, lower, lower_block, x, s);
            half_unit<KIND, 1, B, M>(codes, block, lower, lower_block, x, s);
            if constexpr (KIND == SPLIT) lower += 128;
        }
        F scale[B];
        for (int b = 0; b < B; b++) scale[b] = half((const uint16_t*)(line + b * block));
        for (int m = 0; m < M; m++) {
            const F token = KIND == INT4 ? zero() : splat(scales[m]);
            for (int b = 0; b < B; b++)
                y[b][m] = fma(to_float(s[b][m]), KIND == INT4 ? scale[b] : mul(scale[b], token), y[b][m]);
        }
        if constexpr (OFFSETS) {
            for (int b = 0; b < B; b++) scale[b] = half((const uint16_t*)(line + b * block) + LANES);
            for (int m = 0; m < M; m++) {
                const F token = splat((KIND == INT4 ? 1.0f : scales[m]) * (float)sums[m] * unbias);
                for (int b = 0; b < B; b++) y[b][m] = fma(scale[b], token, y[b][m]);
            }
        }
        if constexpr (KIND == INT4) {
            if (g + 1 < until && g + 1 < groups) continue;
            until += a.wide;
            asm volatile("" ::: "memory");  // the sums stay in memory: there are no registers for them
            for (int m = 0; m < M; m++) {
                const F token = splat(scales[m]);
                for (int b = 0; b < B; b++) {
                    float* to = out + m * CHUNK + b * LANES;
                    store(to, fma(y[b][m], token, load(to))), y[b][m] = zero();
                }
            }
        }
    }
    if constexpr (KIND != INT4)
        for (int b = 0; b < B; b++)
            for (int m = 0; m < M; m++) store(out + m * CHUNK + b * LANES, y[b][m]);
}

// Block b of 16 rows times tile t, which is one token. Sums of codes are exact in any order, so there
// are two of them, which need not wait for each other.
template <Kind KIND, bool OFFSETS>
INLINE F block_times_token(const Matrix& w, int64_t b, const Activations& a, int64_t t) {
    const int64_t groups = a.groups, units = w.group / 16;
    const uint32_t* x = a.data + a.start(t) * a.steps;
    const float* scales = a.scales + a.start(t) * groups;
    const int32_t* sums = a.sums + a.start(t) * groups;
    constexpr float unbias = -1.0f / (float)bias_of(KIND);
    const uint8_t* codes = w.data + b * w.block_bytes(groups);
    const uint8_t* lower = KIND == SPLIT ? w.lower(b) : nullptr;
    const uint8_t* line = codes;
    F y = zero(), part = zero();
    int64_t until = a.wide;
    for (int64_t g = 0; g < groups; g++) {
        if (OFFSETS || g % 2 == 0) line = codes, ask_now(line + LEAD), codes += 64;
        else line += 2 * LANES;
        I s = biased(KIND) ? isplat(sums[g]) : izero(), other = izero();
        for (int64_t unit = 0; unit < units; unit++, codes += unit_bytes(KIND), x += 4) {
            for (int i = 0; i < unit_bytes(KIND); i += 64) ask_now(codes + LEAD + i);
            I even, odd;
            two_steps<KIND, 0>(codes, lower, even, odd);
            dot<KIND>(s, even, isplat((int32_t)x[0])), dot<KIND>(other, odd, isplat((int32_t)x[1]));
            two_steps<KIND, 1>(codes, lower, even, odd);
            dot<KIND>(s, even, isplat((int32_t)x[2])), dot<KIND>(other, odd, isplat((int32_t)x[3]));
            if constexpr (KIND == SPLIT) ask_now(lower + LEAD), ask_now(lower + LEAD + 64), lower += 128;
        }
        const F scale = half((const uint16_t*)line);
        F& onto = KIND == INT4 ? part : y;
        onto = fma(to_float(iadd(s, other)), KIND == INT4 ? scale : mul(scale, splat(scales[g])), onto);
        if constexpr (OFFSETS) {
            const float token = (KIND == INT4 ? 1.0f : scales[g]) * (float)sums[g] * unbias;
            onto = fma(half((const uint16_t*)line + LANES), splat(token), onto);
        }
        if constexpr (KIND == INT4) {
            if (g + 1 < until && g + 1 < groups) continue;
            y = fma(part, splat(scales[g]), y), part = zero(), until += a.wide;
        }
    }
    return y;
}

}  // namespace PUNA_NAMESPACE
