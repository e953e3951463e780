// What packing bfloat16 (packed.h) asks of a processor beside simd.h: bytes by sixteens.
//
//   lookup       each byte the entry of a table of sixteen
//   weave        bytes of a low and of a high line into 16-bit numbers: two lines, of each 16 bytes the first and last 8
//   part         the reverse
//   places       each byte's entry in the first table if it is below 128, in the second if not: at its low nibble xor
//                its high one, which differ between neighbours, and between zero and the bytes that weights mostly have
//   with_high_nibbles    two lines of nibbles as one

#pragma once
#include "simd.h"

namespace PUNA_NAMESPACE {

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
INLINE I places(I x, Table below, Table above) {
    const I at = low_nibbles(_mm512_xor_si512(x, _mm512_srli_epi16(x, 4)));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(below, at), _mm512_movepi8_mask(x), above, at);
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
INLINE __m256i places_(__m256i x, Table below, Table above) {
    const __m256i at = low_(_mm256_xor_si256(x, _mm256_srli_epi16(x, 4)));
    return _mm256_blendv_epi8(_mm256_shuffle_epi8(below, at), _mm256_shuffle_epi8(above, at), x);
}
INLINE I places(I x, Table below, Table above) { return {places_(x.a, below, above), places_(x.b, below, above)}; }
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
INLINE I places(I x, Table below, Table above) {
    EACH {
        const uint8x16_t b = bytes_(x.v[i]), at = vandq_u8(veorq_u8(b, vshrq_n_u8(b, 4)), vdupq_n_u8(15));
        x.v[i] = words_(vbslq_u8(vcgeq_u8(b, vdupq_n_u8(128)), vqtbl1q_u8(above, at), vqtbl1q_u8(below, at)));
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
INLINE I places(I x, Table below, Table above) {
    uint8_t* p = (uint8_t*)&x;
    for (int i = 0; i < 64; i++) p[i] = (p[i] < 128 ? below : above).v[(p[i] ^ p[i] >> 4) & 15];
    return x;
}
INLINE I with_high_nibbles(I low, I high) {
    for (int i = 0; i < 16; i++) low.v[i] |= (int32_t)((uint32_t)high.v[i] << 4);
    return low;
}
INLINE bool same(I a, I b) { return !memcmp(&a, &b, 64); }
#endif

}  // namespace PUNA_NAMESPACE
