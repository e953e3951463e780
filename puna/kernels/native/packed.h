// bfloat16 in 12 bits, and not one bit of a weight lost: a fourth less to read for each token.
//
// The upper byte of a bfloat16 is its sign and all but the last bit of its exponent. Of 256 such bytes sixteen make up
// nearly all of a matrix's, as its weights are of few sizes. So each chunk of 64 rows has a table of its sixteen
// commonest upper bytes, and a weight is its lower byte, as it is, and four bits that say where in the table the upper
// one stands. The few weights that have another (1 in 10,000 of normally distributed ones, 1 in 2,300 of Student's t with
// 3 degrees of freedom) are listed: their step, their place in it and the upper byte. A chunk that has too many of them is
// not packed.
//
//   chunk    head (matrix.h), then step by step three lines where bfloat16 has four, then what is odd, by steps, up to
//            an entry for a step after the last
//   step     the lower bytes of rows 0 to 31, those of rows 32 to 63, and a line of places: of the first line in the
//            low nibbles, of the second in the high ones. Sixteen bytes of such a line make sixteen bytes in each of two
//            lines of bfloat16: the first eight in the even one, the others in the odd one
//
// Steps that have something odd are put together in memory, the others in registers. Either way a product is the same
// sequence of additions of the same numbers as with bfloat16 as it is: the results have the same bits.

#pragma once
#include <algorithm>

#include "bytes.h"
#include "codes.h"

namespace PUNA_NAMESPACE {
using namespace puna;

// ------------------------------------------------------------------------------------------------------------- reading
INLINE const PackedHead& head_of(const uint8_t* chunk) { return *(const PackedHead*)chunk; }
INLINE const Odd* odds_of(const uint8_t* chunk, int64_t steps) { return (const Odd*)(chunk + HEAD + steps * PACKED_STEP); }

// Half a step, two lines of bfloat16.
template <int HALF>
INLINE void unpack(const uint8_t* step, Table table, I w[2]) {
    const I both = iload(step + 128);
    weave(iload(step + 64 * HALF), lookup(table, HALF ? high_nibbles(both) : low_nibbles(both)), w[0], w[1]);
}

template <int HALF, int M>
INLINE void half_times_tokens(const I w[2], const uint32_t* x, F y[M][4]) {
    for (int m = 0; m < M; m++) {
        const I token = isplat((int32_t)x[m]);
        for (int i = 0; i < 2; i++) y[m][2 * HALF + i] = dot_brain(y[m][2 * HALF + i], w[i], token);
    }
}

// A tile unpacks in registers what it multiplies. That is nearly free where the processor multiplies six tokens of bfloat16
// at once, and not elsewhere; there the first tile of many, which waits for memory anyway, does so, and then the chunk is
// unpacked for the others, once. In processor cycles for a step: 14 to unpack it, 1/4 or 10 more in registers, 10 for an odd one.
inline bool for_many(const PackedHead& head, const Activations& a) {
#if defined(PUNA_BF16)
    const int64_t more = a.steps / 4;
#else
    const int64_t more = 10 * a.steps;
#endif
    return (a.tiles() - 1) * (more + 10 * head.odds) > 14 * a.steps;
}

inline int64_t room_bytes(const Matrix& w, const Activations& a) { return w.packed && a.tiles() > 1 ? w.steps() * 256 : 0; }

INLINE void unpack_step(const uint8_t* step, Table table, uint8_t* to) {
    I w[2];
    unpack<0>(step, table, w), istore(to, w[0]), istore(to + 64, w[1]);
    unpack<1>(step, table, w), istore(to + 128, w[0]), istore(to + 192, w[1]);
}

// A chunk of 64 rows times M tokens, unpacked in registers.
template <int M>
INLINE void chunk_packed(const uint8_t* chunk, int64_t steps, const uint32_t* x, F y[M][4]) {
    const Table table = table_of(head_of(chunk).high);
    const Odd* odd = odds_of(chunk, steps);
    const uint8_t* at = chunk + HEAD;
    alignas(64) uint8_t spot[256];
    I w[2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 4; v++) y[m][v] = zero();
    for (int64_t step = 0;; step++, at += PACKED_STEP, x += M) {
        for (const int64_t stop = odd->step; step < stop; step++, at += PACKED_STEP, x += M) {
            for (int i = 0; i < PACKED_STEP; i += 64) ask_now(at + LEAD + i);
            unpack<0>(at, table, w), half_times_tokens<0, M>(w, x, y);
            unpack<1>(at, table, w), half_times_tokens<1, M>(w, x, y);
        }
        if (step == steps) return;
        unpack_step(at, table, spot);
        for (; (int64_t)odd->step == step; odd++) spot[2 * odd->place + 1] = odd->high;
        w[0] = iload(spot), w[1] = iload(spot + 64), half_times_tokens<0, M>(w, x, y);
        w[0] = iload(spot + 128), w[1] = iload(spot + 192), half_times_tokens<1, M>(w, x, y);
    }
}

// A whole chunk as bfloat16.
__attribute__((noinline)) inline void unpack_chunk(const uint8_t* chunk, int64_t steps, uint8_t* to) {
    const Table table = table_of(head_of(chunk).high);
    for (int64_t step = 0; step < steps; step++)
        unpack_step(chunk + HEAD + step * PACKED_STEP, table, to + step * 256);
    for (const Odd* odd = odds_of(chunk, steps); odd->step < steps; odd++) to[odd->step * 256 + 2 * odd->place + 1] = odd->high;
}

// The chunk as bfloat16, if that is what tile t reads: as it is, or at `room`, where it is made for tile 1; else null.
inline const uint8_t* unpacked(const uint8_t* chunk, const Activations& a, int64_t t, uint8_t* room) {
    const PackedHead& head = head_of(chunk);
    if (head.plain) return chunk + HEAD;
    if (t == 0 || !for_many(head, a)) return nullptr;
    if (t == 1) unpack_chunk(chunk, a.steps, room);
    return room;
}

// A row as numbers.
inline void embed_packed(const Matrix& w, int64_t row, float* out) {
    const uint8_t* chunk = w.chunk(row / CHUNK);
    const PackedHead& head = head_of(chunk);
    const int64_t lane = row % LANES, block = row % CHUNK / LANES;
    const int64_t low = block / 2 * 64 + lane / 4 * 16 + block % 2 * 8 + lane % 4 * 2, nibble = low % 64 + 128;
    const int shift = (int)(block / 2 * 4);
    for (int64_t i = 0; i < w.columns; i++) {
        const uint8_t* step = chunk + HEAD + i / 2 * PACKED_STEP;
        const uint32_t high = head.high[step[nibble + i % 2] >> shift & 15];
        const uint32_t bits = high << 24 | (uint32_t)step[low + i % 2] << 16;
        memcpy(out + i, &bits, 4);
    }
    for (const Odd* odd = odds_of(chunk, w.steps()); (int64_t)odd->step < w.steps(); odd++) {
        const int64_t column = 2 * odd->step + odd->place % 2;
        if (odd->place / 2 == row % CHUNK && column < w.columns) ((uint8_t*)(out + column))[3] = odd->high;
    }
}

// ------------------------------------------------------------------------------------------------------------- packing
constexpr int64_t ODD_STEPS = 2;  // a chunk is packed if it has no more than one odd weight to so many steps

// The commonest upper bytes of a chunk, by an eighth of its steps where it has many; then the ones next below, which are
// the commonest of those that a sample does not show. Of bytes that `places` takes for one another only one is among
// them. `where`: its two tables, one behind the other.
inline void commonest(const uint8_t* plain, int64_t steps, uint8_t* high, uint8_t* where) {
    uint32_t counts[4][256] = {};
    const int64_t stride = steps < 512 ? 1 : 8;
    for (int64_t step = 0; step < steps; step += stride)
        for (int i = 0; i < 256; i += 8)
            for (int j = 0; j < 4; j++) counts[j][plain[step * 256 + i + 2 * j + 1]]++;
    uint64_t ranked[256];
    int present = 0, taken = 0, lowest[2] = {128, 256};
    for (uint64_t b = 0; b < 256; b++)
        if (const uint64_t n = (uint64_t)counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b]) ranked[present++] = n << 8 | b;
    std::sort(ranked, ranked + present, [](uint64_t a, uint64_t b) { return a > b; });
    bool known[32] = {};
    const auto take = [&](int byte) {
        const int negative = byte / 128, slot = 16 * negative + ((byte ^ byte >> 4) & 15);
        lowest[negative] = std::min(lowest[negative], byte);
        if (taken == 16 || known[slot]) return;
        known[slot] = true, where[slot] = (uint8_t)taken, high[taken++] = (uint8_t)byte;
    };
    for (int i = 0; i < present; i++)
        if (taken < 16) take((int)(ranked[i] & 255));
    for (int i = 0; i < 256; i++)
        if (lowest[i % 2] > 128 * (i % 2)) take(lowest[i % 2] - 1);
}

// Packs a chunk of bfloat16 (`steps` times 256 bytes) into `to`.
inline void pack(const uint8_t* plain, int64_t steps, uint8_t* to) {
    PackedHead head{};
    uint8_t where[32] = {};
    commonest(plain, steps, head.high, where);
    const Table table = table_of(head.high), below = table_of(where), above = table_of(where + 16);
    const int64_t most = steps / ODD_STEPS;
    Odd* const odds = (Odd*)odds_of(to, steps);
    int64_t count = 0;
    for (int64_t step = 0; step < steps && count <= most; step++) {
        uint8_t* const line = to + HEAD + step * PACKED_STEP;
        I at[2];
        for (int half = 0; half < 2; half++) {
            I low, high;
            const uint8_t* from = plain + step * 256 + half * 128;
            part(iload(from), iload(from + 64), low, high);
            at[half] = places(high, below, above);
            istore(line + 64 * half, low);
            const I found = lookup(table, at[half]);
            if (same(found, high)) continue;
            I made[2];
            weave(low, found, made[0], made[1]);
            for (int i = 0; i < 64 && count <= most; i++)
                if (((const uint8_t*)made)[2 * i + 1] != from[2 * i + 1])
                    odds[count++] = {(uint32_t)step, (uint8_t)(half * 64 + i), from[2 * i + 1]};
        }
        istore(line + 128, with_high_nibbles(at[0], at[1]));
    }
    odds[count] = {(uint32_t)steps, 0, 0};
    head.odds = (uint32_t)count;
    if (count > most) head.plain = 1, memcpy(to + HEAD, plain, steps * 256);
    memcpy(to, &head, sizeof head);
}

}  // namespace PUNA_NAMESPACE
