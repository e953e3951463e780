// Sixteen lanes of numbers, whatever the processor has: the vocabulary in which the kernels are written.
//
//   F   16 float32        I   16 int32, or the 64 bytes of 16 x 4 int8 or 16 x 2 bfloat16
//
// One definition for AVX-512, one for AVX2, one for NEON, one in plain C++. A file that includes this first defines
// PUNA_NAMESPACE and one of PUNA_AVX512, PUNA_AVX2, PUNA_NEON, PUNA_PLAIN; PUNA_VNNI and PUNA_BF16 say which dot products
// there are. What is exact (integers) is the same everywhere; sums in float32 are taken in the same order by all.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(PUNA_AVX512) || defined(PUNA_AVX2)
#include <immintrin.h>
#elif defined(PUNA_NEON)
#include <arm_neon.h>
#endif

#include "matrix.h"

#define INLINE inline __attribute__((always_inline))

namespace PUNA_NAMESPACE {


constexpr float INFINITE = std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------------------------------------------------- AVX-512
#if defined(PUNA_AVX512)

using F = __m512;
using I = __m512i;

INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F splat(float x) { return _mm512_set1_ps(x); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F abs(F a) { return _mm512_abs_ps(a); }
// Lane by lane: a < b ? yes : no.
INLINE F less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }
INLINE bool exceeds(F x, float level) { return _mm512_cmp_ps_mask(x, splat(level), _CMP_GT_OQ); }  // in any lane
INLINE F first(F x, int n, float other) {  // lanes below n, `other` in the rest
    return _mm512_mask_blend_ps(n >= 16 ? 0xffff : (1u << n) - 1, splat(other), x);
}
INLINE F swapped(F x) { return _mm512_permute_ps(x, 0xb1); }  // lanes 2i and 2i + 1 exchanged
INLINE F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }  // x * 2^n
INLINE F nearest(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE F brain(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

INLINE I izero() { return _mm512_setzero_si512(); }
INLINE I isplat(int32_t x) { return _mm512_set1_epi32(x); }
INLINE I iload(const void* p) { return _mm512_loadu_si512(p); }
INLINE void istore(void* p, I x) { _mm512_storeu_si512(p, x); }
INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }
INLINE I to_int(F x) { return _mm512_cvtps_epi32(x); }
INLINE I low_nibbles(I x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
template <int STEP>  // 6-bit codes: nibbles, and of each byte of `twos` the STEP-th two bits, 0 the lowest, above them
INLINE I six_bits(I nibbles, I twos) {
    if constexpr (STEP < 2) twos = _mm512_slli_epi16(twos, 4 - 2 * STEP);
    if constexpr (STEP == 3) twos = _mm512_srli_epi16(twos, 2);
    return _mm512_ternarylogic_epi32(nibbles, twos, _mm512_set1_epi8(0x30), 0xf8);  // a | (b & c)
}
// 8-bit codes from their halves: those whose halves are the low nibbles of `upper` and `lower`, and those of the high ones.
INLINE I join_low(I upper, I lower) {
    return _mm512_ternarylogic_epi32(_mm512_slli_epi16(upper, 4), lower, _mm512_set1_epi8(15), 0xd8);  // c ? b : a
}
INLINE I join_high(I upper, I lower) {
    return _mm512_ternarylogic_epi32(upper, _mm512_srli_epi16(lower, 4), _mm512_set1_epi8(15), 0xd8);
}
INLINE int32_t isum(I x) { return _mm512_reduce_add_epi32(x); }
INLINE void store_bytes(int8_t* p, I x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
INLINE F from_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// Sums of four products of an unsigned and a signed byte. 8-bit codes are stored + 128; `BIAS8` has to be taken off.
constexpr int BIAS8 = 128;
INLINE I dot_nibbles(I c, I w, I a) { return _mm512_dpbusd_epi32(c, w, a); }
INLINE I dot_bytes(I c, I w, I a) { return _mm512_dpbusd_epi32(c, w, a); }

#if defined(PUNA_BF16)
INLINE F dot_brain(F c, I w, I a) { return _mm512_dpbf16_ps(c, (__m512bh)w, (__m512bh)a); }
INLINE void add_dot_brain(F& c, I w, I a) { asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(w), "v"(a)); }
#else
INLINE F dot_brain(F c, I w, I a) {
    const I high = _mm512_set1_epi32(0xffff0000);
    c = fma((F)_mm512_slli_epi32(w, 16), (F)_mm512_slli_epi32(a, 16), c);
    return fma((F)_mm512_and_si512(w, high), (F)_mm512_and_si512(a, high), c);
}
#endif

// The same, onto c. Said as instructions, for compilers copy their sums from register to register otherwise, which takes as
// many of the processor's slots as the products do.
INLINE void add_dot_nibbles(I& c, I w, I a) { asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(a)); }
INLINE void add_dot_bytes(I& c, I w, I a) { add_dot_nibbles(c, w, a); }

// Lines of weights that are read soon: at once and then no more, or from the second cache in a while.
INLINE void ask_now(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_NTA); }
INLINE void ask_later(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

constexpr int TILE_Q = 6;  // tokens that a kernel multiplies at once, as many as the registers hold: integers
constexpr int TILE_F = 6;  // and floats
constexpr int blocks_for(int tokens) { return tokens <= 3 ? 4 : 2; }  // of 16 rows, that it multiplies them by

// ------------------------------------------------------------------------------------------------------------- AVX2
#elif defined(PUNA_AVX2)

struct F { __m256 a, b; };
struct I { __m256i a, b; };
#define BOTH(T, f) T{f(x.a), f(x.b)}

INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
INLINE F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE F abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
INLINE F less(F a, F b, F yes, F no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}
INLINE F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
INLINE float sum(F x) {
    const __m256 v = _mm256_add_ps(x.a, x.b);
    __m128 w = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    w = _mm_add_ps(w, _mm_movehl_ps(w, w));
    return _mm_cvtss_f32(_mm_add_ss(w, _mm_movehdup_ps(w)));
}
INLINE float largest(F x) {
    const __m256 v = _mm256_max_ps(x.a, x.b);
    __m128 w = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    w = _mm_max_ps(w, _mm_movehl_ps(w, w));
    return _mm_cvtss_f32(_mm_max_ss(w, _mm_movehdup_ps(w)));
}
INLINE F first(F x, int n, float other) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 o = _mm256_set1_ps(other);
    const __m256 a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
    const __m256 b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes));
    return {_mm256_blendv_ps(o, x.a, a), _mm256_blendv_ps(o, x.b, b)};
}
INLINE F swapped(F x) { return {_mm256_permute_ps(x.a, 0xb1), _mm256_permute_ps(x.b, 0xb1)}; }
INLINE __m256 scale2_(__m256 x, __m256 n) {  // n is whole and within the exponents that a normal number has
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)));
}
INLINE F scale2(F x, F n) { return {scale2_(x.a, n.a), scale2_(x.b, n.b)}; }
INLINE __m256 nearest_(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F nearest(F x) { return BOTH(F, nearest_); }
INLINE F half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
INLINE __m256 brain_(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F brain(const uint16_t* p) { return {brain_(p), brain_(p + 8)}; }

INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE I isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE I iload(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE void istore(void* p, I x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)p + 1, x.b); }
INLINE I iadd(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE F to_float(I x) { return BOTH(F, _mm256_cvtepi32_ps); }
INLINE I to_int(F x) { return BOTH(I, _mm256_cvtps_epi32); }
INLINE __m256i low_(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE __m256i high_(__m256i x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
INLINE I low_nibbles(I x) { return BOTH(I, low_); }
INLINE I high_nibbles(I x) { return BOTH(I, high_); }
template <int STEP>
INLINE __m256i six_(__m256i nibbles, __m256i twos) {
    if constexpr (STEP < 2) twos = _mm256_slli_epi16(twos, 4 - 2 * STEP);
    if constexpr (STEP == 3) twos = _mm256_srli_epi16(twos, 2);
    return _mm256_or_si256(nibbles, _mm256_and_si256(twos, _mm256_set1_epi8(0x30)));
}
template <int STEP>
INLINE I six_bits(I nibbles, I twos) {
    return {six_<STEP>(nibbles.a, twos.a), six_<STEP>(nibbles.b, twos.b)};
}
INLINE __m256i chosen_(__m256i upper, __m256i lower) {  // the upper four bits of each byte from one, the lower from the other
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_or_si256(_mm256_andnot_si256(low, upper), _mm256_and_si256(low, lower));
}
INLINE I join_low(I upper, I lower) {
    return {chosen_(_mm256_slli_epi16(upper.a, 4), lower.a), chosen_(_mm256_slli_epi16(upper.b, 4), lower.b)};
}
INLINE I join_high(I upper, I lower) {
    return {chosen_(upper.a, _mm256_srli_epi16(lower.a, 4)), chosen_(upper.b, _mm256_srli_epi16(lower.b, 4))};
}
INLINE int32_t isum(I x) {
    int32_t v[16], s = 0;
    istore(v, x);
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
}
INLINE void store_bytes(int8_t* p, I x) {
    int32_t v[16];
    istore(v, x);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
}
INLINE F from_bytes(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}

#if defined(PUNA_VNNI)
constexpr int BIAS8 = 128;
INLINE I dot_nibbles(I c, I w, I a) {
    return {_mm256_dpbusd_avx_epi32(c.a, w.a, a.a), _mm256_dpbusd_avx_epi32(c.b, w.b, a.b)};
}
INLINE I dot_bytes(I c, I w, I a) { return dot_nibbles(c, w, a); }
#else
constexpr int BIAS8 = 0;  // the 128 is taken off before multiplying, as the 16-bit sums would overflow with it
INLINE __m256i dot_(__m256i c, __m256i w, __m256i a) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
}
INLINE I dot_nibbles(I c, I w, I a) { return {dot_(c.a, w.a, a.a), dot_(c.b, w.b, a.b)}; }
INLINE __m256i dot_signed_(__m256i c, __m256i w, __m256i a) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
    return dot_(c, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}
INLINE I dot_bytes(I c, I w, I a) { return {dot_signed_(c.a, w.a, a.a), dot_signed_(c.b, w.b, a.b)}; }
#endif
INLINE __m256 dot_brain_(__m256 c, __m256i w, __m256i a) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    c = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), c);
    return _mm256_fmadd_ps(
        _mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(a, high)), c);
}
INLINE F dot_brain(F c, I w, I a) { return {dot_brain_(c.a, w.a, a.a), dot_brain_(c.b, w.b, a.b)}; }

INLINE void add_dot_nibbles(I& c, I w, I a) { c = dot_nibbles(c, w, a); }
INLINE void add_dot_bytes(I& c, I w, I a) { c = dot_bytes(c, w, a); }
INLINE void ask_now(const void* p) { __builtin_prefetch(p, 0, 0); }
INLINE void ask_later(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int TILE_Q = 2;
constexpr int TILE_F = 1;
constexpr int blocks_for(int) { return 1; }
#undef BOTH

// ------------------------------------------------------------------------------------------------------------- NEON
#elif defined(PUNA_NEON)

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
#define EACH for (int i = 0; i < 4; i++)

INLINE F splat(float x) { F r; EACH r.v[i] = vdupq_n_f32(x); return r; }
INLINE F zero() { return splat(0); }
INLINE F load(const float* p) { F r; EACH r.v[i] = vld1q_f32(p + 4 * i); return r; }
INLINE void store(float* p, F x) { EACH vst1q_f32(p + 4 * i, x.v[i]); }
INLINE F add(F x, F y) { EACH x.v[i] = vaddq_f32(x.v[i], y.v[i]); return x; }
INLINE F sub(F x, F y) { EACH x.v[i] = vsubq_f32(x.v[i], y.v[i]); return x; }
INLINE F mul(F x, F y) { EACH x.v[i] = vmulq_f32(x.v[i], y.v[i]); return x; }
INLINE F div(F x, F y) { EACH x.v[i] = vdivq_f32(x.v[i], y.v[i]); return x; }
INLINE F max(F x, F y) { EACH x.v[i] = vmaxq_f32(x.v[i], y.v[i]); return x; }
INLINE F min(F x, F y) { EACH x.v[i] = vminq_f32(x.v[i], y.v[i]); return x; }
INLINE F abs(F x) { EACH x.v[i] = vabsq_f32(x.v[i]); return x; }
INLINE F less(F a, F b, F yes, F no) {
    EACH no.v[i] = vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]);
    return no;
}
INLINE F fma(F x, F y, F z) { EACH z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]); return z; }
INLINE float sum(F x) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3])));
}
INLINE float largest(F x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
}
INLINE F first(F x, int n, float other) {
    static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    EACH x.v[i] = vbslq_f32(vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lanes + 4 * i)), x.v[i], vdupq_n_f32(other));
    return x;
}
INLINE F swapped(F x) { EACH x.v[i] = vrev64q_f32(x.v[i]); return x; }
INLINE F nearest(F x) { EACH x.v[i] = vrndnq_f32(x.v[i]); return x; }
INLINE F scale2(F x, F n) {
    EACH x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(
        vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
    return x;
}
INLINE F half(const uint16_t* p) { F r; EACH r.v[i] = vcvt_f32_f16(vld1_f16((const __fp16*)p + 4 * i)); return r; }
INLINE F brain(const uint16_t* p) {
    F r; EACH r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); return r;
}

INLINE I isplat(int32_t x) { I r; EACH r.v[i] = vdupq_n_s32(x); return r; }
INLINE I izero() { return isplat(0); }
INLINE I iload(const void* p) { I r; EACH r.v[i] = vld1q_s32((const int32_t*)p + 4 * i); return r; }
INLINE void istore(void* p, I x) { EACH vst1q_s32((int32_t*)p + 4 * i, x.v[i]); }
INLINE I iadd(I x, I y) { EACH x.v[i] = vaddq_s32(x.v[i], y.v[i]); return x; }
INLINE F to_float(I x) { F r; EACH r.v[i] = vcvtq_f32_s32(x.v[i]); return r; }
INLINE I to_int(F x) { I r; EACH r.v[i] = vcvtnq_s32_f32(x.v[i]); return r; }
INLINE I low_nibbles(I x) {
    EACH x.v[i] = vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x.v[i]), vdupq_n_u8(15)));
    return x;
}
INLINE I high_nibbles(I x) { EACH x.v[i] = vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x.v[i]), 4)); return x; }
template <int STEP>
INLINE I six_bits(I nibbles, I twos) {
    EACH {
        uint8x16_t t = vreinterpretq_u8_s32(twos.v[i]);
        if constexpr (STEP < 2) t = vshlq_n_u8(t, 4 - 2 * STEP);
        if constexpr (STEP == 3) t = vshrq_n_u8(t, 2);
        t = vorrq_u8(vreinterpretq_u8_s32(nibbles.v[i]), vandq_u8(t, vdupq_n_u8(0x30)));
        nibbles.v[i] = vreinterpretq_s32_u8(t);
    }
    return nibbles;
}
INLINE uint8x16_t joined_(uint8x16_t upper, uint8x16_t lower) { return vbslq_u8(vdupq_n_u8(15), lower, upper); }
INLINE I join_low(I upper, I lower) {
    EACH upper.v[i] = vreinterpretq_s32_u8(joined_(vshlq_n_u8(vreinterpretq_u8_s32(upper.v[i]), 4),
                                                   vreinterpretq_u8_s32(lower.v[i])));
    return upper;
}
INLINE I join_high(I upper, I lower) {
    EACH upper.v[i] = vreinterpretq_s32_u8(joined_(vreinterpretq_u8_s32(upper.v[i]),
                                                   vshrq_n_u8(vreinterpretq_u8_s32(lower.v[i]), 4)));
    return upper;
}
INLINE int32_t isum(I x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3])));
}
INLINE void store_bytes(int8_t* p, I x) {
    const int16x8_t a = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
    const int16x8_t b = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
}
INLINE F from_bytes(const int8_t* p) {
    const int8x16_t x = vld1q_s8(p);
    const int16x8_t a = vmovl_s8(vget_low_s8(x)), b = vmovl_s8(vget_high_s8(x));
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(a))),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(b)))}};
}

constexpr int BIAS8 = 0;
INLINE I dot_nibbles(I c, I w, I a) {
    EACH c.v[i] = vdotq_s32(c.v[i], vreinterpretq_s8_s32(w.v[i]), vreinterpretq_s8_s32(a.v[i]));
    return c;
}
INLINE I dot_bytes(I c, I w, I a) {
    EACH c.v[i] = vdotq_s32(c.v[i], veorq_s8(vreinterpretq_s8_s32(w.v[i]), vdupq_n_s8((int8_t)0x80)),
                            vreinterpretq_s8_s32(a.v[i]));
    return c;
}
INLINE F dot_brain(F c, I w, I a) {
    const int32x4_t high = vdupq_n_s32((int32_t)0xffff0000);
    EACH {
        c.v[i] = vfmaq_f32(c.v[i], vreinterpretq_f32_s32(vshlq_n_s32(w.v[i], 16)),
                           vreinterpretq_f32_s32(vshlq_n_s32(a.v[i], 16)));
        c.v[i] = vfmaq_f32(c.v[i], vreinterpretq_f32_s32(vandq_s32(w.v[i], high)),
                           vreinterpretq_f32_s32(vandq_s32(a.v[i], high)));
    }
    return c;
}

INLINE void add_dot_nibbles(I& c, I w, I a) { c = dot_nibbles(c, w, a); }
INLINE void add_dot_bytes(I& c, I w, I a) { c = dot_bytes(c, w, a); }
INLINE void ask_now(const void* p) { __builtin_prefetch(p, 0, 0); }
INLINE void ask_later(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int TILE_Q = 3;
constexpr int TILE_F = 1;
constexpr int blocks_for(int) { return 1; }
#undef EACH

// -------------------------------------------------------------------------------------------------------- plain C++
#else

struct F { float v[16]; };
struct I { int32_t v[16]; };
#define EACH for (int i = 0; i < 16; i++)

INLINE F splat(float x) { F r; EACH r.v[i] = x; return r; }
INLINE F zero() { return splat(0); }
INLINE F load(const float* p) { F r; memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, F x) { memcpy(p, x.v, 64); }
INLINE F add(F x, F y) { EACH x.v[i] += y.v[i]; return x; }
INLINE F sub(F x, F y) { EACH x.v[i] -= y.v[i]; return x; }
INLINE F mul(F x, F y) { EACH x.v[i] *= y.v[i]; return x; }
INLINE F div(F x, F y) { EACH x.v[i] /= y.v[i]; return x; }
INLINE F max(F x, F y) { EACH x.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return x; }
INLINE F min(F x, F y) { EACH x.v[i] = x.v[i] < y.v[i] ? x.v[i] : y.v[i]; return x; }
INLINE F abs(F x) { EACH x.v[i] = std::fabs(x.v[i]); return x; }
INLINE F less(F a, F b, F yes, F no) { EACH no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; return no; }
INLINE F fma(F x, F y, F z) { EACH z.v[i] += x.v[i] * y.v[i]; return z; }
INLINE float sum(F x) { float s = 0; EACH s += x.v[i]; return s; }
INLINE float largest(F x) { float s = x.v[0]; EACH s = s > x.v[i] ? s : x.v[i]; return s; }
INLINE F first(F x, int n, float other) { EACH x.v[i] = i < n ? x.v[i] : other; return x; }
INLINE F swapped(F x) { F r; EACH r.v[i] = x.v[i ^ 1]; return r; }
INLINE F nearest(F x) { EACH x.v[i] = std::nearbyint(x.v[i]); return x; }
INLINE F scale2(F x, F n) { EACH x.v[i] = std::ldexp(x.v[i], (int)n.v[i]); return x; }
INLINE F half(const uint16_t* p) { F r; EACH r.v[i] = puna::from_half(p[i]); return r; }
INLINE F brain(const uint16_t* p) {
    F r;
    EACH { const uint32_t bits = (uint32_t)p[i] << 16; memcpy(&r.v[i], &bits, 4); }
    return r;
}

INLINE I isplat(int32_t x) { I r; EACH r.v[i] = x; return r; }
INLINE I izero() { return isplat(0); }
INLINE I iload(const void* p) { I r; memcpy(r.v, p, 64); return r; }
INLINE void istore(void* p, I x) { memcpy(p, x.v, 64); }
INLINE I iadd(I x, I y) { EACH x.v[i] += y.v[i]; return x; }
INLINE F to_float(I x) { F r; EACH r.v[i] = (float)x.v[i]; return r; }
INLINE I to_int(F x) { I r; EACH r.v[i] = (int32_t)std::nearbyint(x.v[i]); return r; }
INLINE I low_nibbles(I x) { EACH x.v[i] &= 0x0f0f0f0f; return x; }
INLINE I high_nibbles(I x) { EACH x.v[i] = (int32_t)((uint32_t)x.v[i] >> 4 & 0x0f0f0f0f); return x; }
template <int STEP>
INLINE I six_bits(I nibbles, I twos) {
    EACH nibbles.v[i] |= (int32_t)(((uint32_t)twos.v[i] >> 2 * STEP & 0x03030303) << 4);
    return nibbles;
}
INLINE I join_low(I x, I y) {
    EACH x.v[i] = (int32_t)(((uint32_t)x.v[i] << 4 & 0xf0f0f0f0) | (y.v[i] & 0x0f0f0f0f));
    return x;
}
INLINE I join_high(I x, I y) {
    EACH x.v[i] = (int32_t)((x.v[i] & 0xf0f0f0f0) | ((uint32_t)y.v[i] >> 4 & 0x0f0f0f0f));
    return x;
}
INLINE int32_t isum(I x) { int32_t s = 0; EACH s += x.v[i]; return s; }
INLINE void store_bytes(int8_t* p, I x) { EACH p[i] = (int8_t)x.v[i]; }
INLINE F from_bytes(const int8_t* p) { F r; EACH r.v[i] = (float)p[i]; return r; }

constexpr int BIAS8 = 128;
INLINE I dot_bytes(I c, I w, I a) {
    uint8_t u[64];
    int8_t s[64];
    memcpy(u, w.v, 64), memcpy(s, a.v, 64);
    EACH for (int j = 4 * i; j < 4 * i + 4; j++) c.v[i] += u[j] * s[j];
    return c;
}
INLINE I dot_nibbles(I c, I w, I a) { return dot_bytes(c, w, a); }
INLINE F dot_brain(F c, I w, I a) {
    uint16_t u[32], s[32];
    memcpy(u, w.v, 64), memcpy(s, a.v, 64);
    float x[32], y[32];
    for (int h = 0; h < 2; h++) store(x + 16 * h, brain(u + 16 * h)), store(y + 16 * h, brain(s + 16 * h));
    EACH c.v[i] += x[2 * i] * y[2 * i], c.v[i] += x[2 * i + 1] * y[2 * i + 1];
    return c;
}

INLINE void add_dot_nibbles(I& c, I w, I a) { c = dot_nibbles(c, w, a); }
INLINE void add_dot_bytes(I& c, I w, I a) { c = dot_bytes(c, w, a); }
INLINE void ask_now(const void* p) { __builtin_prefetch(p, 0, 0); }
INLINE void ask_later(const void* p) { __builtin_prefetch(p, 0, 2); }

constexpr int TILE_Q = 4;
constexpr int TILE_F = 4;
constexpr int blocks_for(int) { return 1; }
#undef EACH

#endif

// ------------------------------------------------------------------------------------------- on top of any of these

using puna::to_brain;

INLINE void store_brain(uint16_t* p, F x) {
#if defined(PUNA_AVX512) && defined(PUNA_BF16)
    const __m256bh y = _mm512_cvtneps_pbh(x);
    memcpy(p, &y, 32);
#else
    float v[16];
    store(v, x);
    for (int i = 0; i < 16; i++) p[i] = to_brain(v[i]);
#endif
}

#if !defined(PUNA_BF16)
INLINE void add_dot_brain(F& c, I w, I a) { c = dot_brain(c, w, a); }
#endif
#if !defined(PUNA_AVX512)
INLINE bool exceeds(F x, float level) { return largest(x) > level; }  // in any lane
#endif

// e^x for x <= 0 (and a little above): 2^n times a polynomial on [-ln2/2, ln2/2], within 2 units in the last place.
INLINE F exp(F x) {
    x = max(x, splat(-87.0f));
    const F n = nearest(mul(x, splat(1.44269504f)));
    F r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), splat(1.0f));
    return scale2(p, n);
}

}  // namespace PUNA_NAMESPACE
