// bfloat16 in 12 bits, and not one bit of a weight lost: a fourth less to read for each token.
//
// The upper byte of a bfloat16 is its sign and all but the last bit of its exponent. Of 256 such bytes sixteen make up
// nearly all of a matrix's, as its weights are of few sizes. So each chunk of 64 rows has a table of its sixteen
// commonest upper bytes, and a weight is its lower byte, as it is, and four bits that say where in the table the upper
// one stands. The few weights that have another (2 in 100,000 of normally distributed ones, 4 in 10,000 of Student's t with
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

#include "simd.h"

namespace PUNA_NAMESPACE {
using namespace puna;

// ------------------------------------------------------------------------------------------ what a processor has for it
//   lookup       each byte the entry of a table of sixteen
//   weave        bytes of a low and of a high line into 16-bit numbers: two lines, of each 16 bytes the first and last 8
//   part         the reverse
//   places       each byte where it stands in a table; 0 for one that does not
#if defined(PUNA_AVX512)
using Table = __m512i;
INLINE Table table_of(const uint8_t* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE I lookup(Table t, I places) { return _mm512_shuffle_epi8(t, places); }
INLINE void weave(I low, I high, I& even, I& odd) {
    even = _mm512_unpacklo_epi8(low, high), odd = _mm512_unpackhi_epi8(low, high);
}
INLINE void part(I even, I odd, I& low, I& high) {
    const I bytes = _mm512_set1_epi16(255);
    low = _mm512_packus_epi16(_mm512_and_si512(even, bytes), _mm512_and_si512(odd, bytes));
    high = _mm512_packus_epi16(_mm512_srli_epi16(even, 8), _mm512_srli_epi16(odd, 8));
}
INLINE I places(I x, const uint8_t* table) {
    I found = izero();
    for (int j = 1; j < 16; j++)
        found = _mm512_mask_mov_epi8(found, _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8((char)table[j])), _mm512_set1_epi8(j));
    return found;
}
INLINE I with_high_nibbles(I low, I high) { return _mm512_or_si512(low, _mm512_slli_epi16(high, 4)); }
INLINE bool same(I a, I b) { return _mm512_cmpneq_epi32_mask(a, b) == 0; }

#elif defined(PUNA_AVX2)
using Table = __m256i;
INLINE Table table_of(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE I lookup(Table t, I places) { return {_mm256_shuffle_epi8(t, places.a), _mm256_shuffle_epi8(t, places.b)}; }
INLINE void weave(I low, I high, I& even, I& odd) {
    even = {_mm256_unpacklo_epi8(low.a, high.a), _mm256_unpacklo_epi8(low.b, high.b)};
    odd = {_mm256_unpackhi_epi8(low.a, high.a), _mm256_unpackhi_epi8(low.b, high.b)};
}
INLINE __m256i low_of_(__m256i even, __m256i odd) {
    const __m256i bytes = _mm256_set1_epi16(255);
    return _mm256_packus_epi16(_mm256_and_si256(even, bytes), _mm256_and_si256(odd, bytes));
}
INLINE __m256i high_of_(__m256i even, __m256i odd) {
    return _mm256_packus_epi16(_mm256_srli_epi16(even, 8), _mm256_srli_epi16(odd, 8));
}
INLINE void part(I even, I odd, I& low, I& high) {
    low = {low_of_(even.a, odd.a), low_of_(even.b, odd.b)}, high = {high_of_(even.a, odd.a), high_of_(even.b, odd.b)};
}
INLINE __m256i places_(__m256i x, const uint8_t* table) {
    __m256i found = _mm256_setzero_si256();
    for (int j = 1; j < 16; j++) {
        const __m256i here = _mm256_cmpeq_epi8(x, _mm256_set1_epi8((char)table[j]));
        found = _mm256_or_si256(found, _mm256_and_si256(here, _mm256_set1_epi8(j)));
    }
    return found;
}
INLINE I places(I x, const uint8_t* table) { return {places_(x.a, table), places_(x.b, table)}; }
INLINE I with_high_nibbles(I low, I high) {
    return {_mm256_or_si256(low.a, _mm256_slli_epi16(high.a, 4)), _mm256_or_si256(low.b, _mm256_slli_epi16(high.b, 4))};
}
INLINE bool same(I a, I b) {
    return _mm256_movemask_epi8(_mm256_and_si256(_mm256_cmpeq_epi8(a.a, b.a), _mm256_cmpeq_epi8(a.b, b.b))) == -1;
}

#elif defined(PUNA_NEON)
#define EACH for (int i = 0; i < 4; i++)
using Table = uint8x16_t;
INLINE uint8x16_t bytes_(int32x4_t x) { return vreinterpretq_u8_s32(x); }
INLINE int32x4_t words_(uint8x16_t x) { return vreinterpretq_s32_u8(x); }
INLINE Table table_of(const uint8_t* p) { return vld1q_u8(p); }
INLINE I lookup(Table t, I places) { EACH places.v[i] = words_(vqtbl1q_u8(t, bytes_(places.v[i]))); return places; }
INLINE void weave(I low, I high, I& even, I& odd) {
    EACH {
        even.v[i] = words_(vzip1q_u8(bytes_(low.v[i]), bytes_(high.v[i])));
        odd.v[i] = words_(vzip2q_u8(bytes_(low.v[i]), bytes_(high.v[i])));
    }
}
INLINE void part(I even, I odd, I& low, I& high) {
    EACH {
        low.v[i] = words_(vuzp1q_u8(bytes_(even.v[i]), bytes_(odd.v[i])));
        high.v[i] = words_(vuzp2q_u8(bytes_(even.v[i]), bytes_(odd.v[i])));
    }
}
INLINE I places(I x, const uint8_t* table) {
    EACH {
        uint8x16_t found = vdupq_n_u8(0);
        for (int j = 1; j < 16; j++)
            found = vbslq_u8(vceqq_u8(bytes_(x.v[i]), vdupq_n_u8(table[j])), vdupq_n_u8(j), found);
        x.v[i] = words_(found);
    }
    return x;
}
INLINE I with_high_nibbles(I low, I high) {
    EACH low.v[i] = words_(vorrq_u8(bytes_(low.v[i]), vshlq_n_u8(bytes_(high.v[i]), 4)));
    return low;
}
INLINE bool same(I a, I b) {
    bool all = true;
    EACH all &= vminvq_u8(vceqq_u8(bytes_(a.v[i]), bytes_(b.v[i]))) != 0;
    return all;
}
#undef EACH

#else
struct Table { uint8_t v[16]; };
INLINE Table table_of(const uint8_t* p) { Table t; memcpy(t.v, p, 16); return t; }
INLINE I lookup(Table t, I places) {
    uint8_t* p = (uint8_t*)&places;
    for (int i = 0; i < 64; i++) p[i] = t.v[p[i]];
    return places;
}
INLINE void weave(I low, I high, I& even, I& odd) {
    const uint8_t *l = (const uint8_t*)&low, *h = (const uint8_t*)&high;
    uint8_t *e = (uint8_t*)&even, *o = (uint8_t*)&odd;
    for (int u = 0; u < 64; u += 16)
        for (int i = 0; i < 8; i++) {
            e[u + 2 * i] = l[u + i], e[u + 2 * i + 1] = h[u + i];
            o[u + 2 * i] = l[u + 8 + i], o[u + 2 * i + 1] = h[u + 8 + i];
        }
}
INLINE void part(I even, I odd, I& low, I& high) {
    const uint8_t *e = (const uint8_t*)&even, *o = (const uint8_t*)&odd;
    uint8_t *l = (uint8_t*)&low, *h = (uint8_t*)&high;
    for (int u = 0; u < 64; u += 16)
        for (int i = 0; i < 8; i++) {
            l[u + i] = e[u + 2 * i], h[u + i] = e[u + 2 * i + 1];
            l[u + 8 + i] = o[u + 2 * i], h[u + 8 + i] = o[u + 2 * i + 1];
        }
}
INLINE I places(I x, const uint8_t* table) {
    uint8_t* p = (uint8_t*)&x;
    for (int i = 0; i < 64; i++) {
        uint8_t found = 0;
        for (int j = 1; j < 16; j++) found |= p[i] == table[j] ? j : 0;
        p[i] = found;
    }
    return x;
}
INLINE I with_high_nibbles(I low, I high) {
    for (int i = 0; i < 16; i++) low.v[i] |= (int32_t)((uint32_t)high.v[i] << 4);
    return low;
}
INLINE bool same(I a, I b) { return !memcmp(&a, &b, 64); }
#endif

// ------------------------------------------------------------------------------------------------------------- reading
INLINE const PackedHead& head_of(const uint8_t* chunk) { return *(const PackedHead*)chunk; }
INLINE const Odd* odds_of(const uint8_t* chunk, int64_t steps) { return (const Odd*)(chunk + HEAD + steps * PACKED_STEP); }

// Half a step, two lines of bfloat16.
template <int HALF>
INLINE void unpack(const uint8_t* step, Table table, I w[2]) {
    const I both = iload(step + 128);
    weave(iload(step + 64 * HALF), lookup(table, HALF ? high_nibbles(both) : low_nibbles(both)), w[0], w[1]);
}

INLINE void store_half(uint8_t* to, const I w[2]) { istore(to, w[0]), istore(to + 64, w[1]); }

template <int HALF, int M>
INLINE void half_times_tokens(const I w[2], const uint32_t* x, F y[M][4]) {
    for (int m = 0; m < M; m++) {
        const I token = isplat((int32_t)x[m]);
        for (int i = 0; i < 2; i++) y[m][2 * HALF + i] = dot_brain(y[m][2 * HALF + i], w[i], token);
    }
}

// A step with something odd: put together at `to`.
__attribute__((noinline)) inline const Odd* unpack_odd(const uint8_t* step, const uint8_t* high, const Odd* odd, uint8_t* to) {
    I w[2];
    unpack<0>(step, table_of(high), w), store_half(to, w);
    unpack<1>(step, table_of(high), w), store_half(to + 128, w);
    const uint32_t here = odd->step;
    for (; odd->step == here; odd++) to[2 * odd->place + 1] = odd->high;
    return odd;
}

// A packed chunk of 64 rows times M tokens. KEEP: it is left as bfloat16 at `room`, for the tokens that come next.
template <int M, bool KEEP>
INLINE void chunk_packed(const uint8_t* chunk, int64_t steps, const uint32_t* x, uint8_t* room, F y[M][4]) {
    const Table table = table_of(head_of(chunk).high);
    const Odd* odd = odds_of(chunk, steps);
    const uint8_t* at = chunk + HEAD;
    alignas(64) uint8_t spot[256];
    I w[2];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 4; v++) y[m][v] = zero();
    for (int64_t step = 0;; step++, at += PACKED_STEP, x += M) {
        for (const int64_t stop = odd->step; step < stop; step++, at += PACKED_STEP, x += M) {
            unpack<0>(at, table, w);
            if constexpr (KEEP) store_half(room + step * 256, w);
            half_times_tokens<0, M>(w, x, y);
            unpack<1>(at, table, w);
            if constexpr (KEEP) store_half(room + step * 256 + 128, w);
            half_times_tokens<1, M>(w, x, y);
        }
        if (step == steps) return;
        uint8_t* to = KEEP ? room + step * 256 : spot;
        odd = unpack_odd(at, head_of(chunk).high, odd, to);
        w[0] = iload(to), w[1] = iload(to + 64), half_times_tokens<0, M>(w, x, y);
        w[0] = iload(to + 128), w[1] = iload(to + 192), half_times_tokens<1, M>(w, x, y);
    }
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
constexpr int64_t ODD_STEPS = 4;  // a chunk is packed if it has no more than one odd weight to so many steps

// The sixteen commonest upper bytes of a chunk, by a fourth of its steps where it has many.
inline void commonest(const uint8_t* plain, int64_t steps, uint8_t* high) {
    uint32_t counts[4][256] = {};
    const int64_t stride = steps < 256 ? 1 : 4;
    for (int64_t step = 0; step < steps; step += stride)
        for (int i = 0; i < 256; i += 8)
            for (int j = 0; j < 4; j++) counts[j][plain[step * 256 + i + 2 * j + 1]]++;
    uint64_t ranked[256];  // the counts, and by them the bytes: the larger of two that are as common
    for (uint64_t b = 0; b < 256; b++)
        ranked[b] = ((uint64_t)counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b]) << 8 | b;
    std::partial_sort(ranked, ranked + 16, ranked + 256, [](uint64_t a, uint64_t b) { return a > b; });
    for (int j = 0; j < 16; j++) high[j] = (uint8_t)ranked[j];
}

// Packs a chunk of bfloat16 (`steps` times 256 bytes) into `to`.
inline void pack(const uint8_t* plain, int64_t steps, uint8_t* to) {
    PackedHead head{};
    commonest(plain, steps, head.high);
    const Table table = table_of(head.high);
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
            at[half] = places(high, head.high);
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
