// GGUF's quantised blocks from weights: the search that `model/gguf/quantise.py` explains and does with PyTorch.
//
// Sixteen lanes are sixteen blocks, so that a sum over the weights of a block is a row of additions, taken in one order
// everywhere. Nothing is fused or reordered: PyTorch, which does the same steps, gives the same bytes.

#pragma once
#include "matrix.h"
#include "simd.h"

namespace PUNA_NAMESPACE {
using namespace puna;

constexpr int TRIALS = 15;       // ranges tried
constexpr float TINY = 1e-30f;   // what is smaller counts as nothing

INLINE F clamp(F x, float low, float high) { return min(max(x, splat(low)), splat(high)); }
// numerator / x, or zero where x is nothing
INLINE F over(F numerator, F x) { return less(abs(x), splat(TINY), zero(), div(numerator, x)); }
INLINE F halved(F x) {  // what is left of it in float16
    float v[16];
    store(v, x);
    for (float& one : v) one = from_half(to_half(one));
    return add(load(v), zero());  // no zero with a sign
}
INLINE F further(F low, F high) { return less(high, sub(zero(), low), low, high); }  // the one of larger size

// Weights of sixteen groups, and how much each one's squared error counts.
template <int N>
struct Groups {
    F x[N], w[N];
    F low, high, weights, squares;  // of x; sums of w and w x x

    INLINE void take(const float* from) {
        low = splat(INFINITE), high = splat(-INFINITE);
        F size = zero();
        for (int i = 0; i < N; i++) {
            x[i] = load(from + 16 * i);
            low = min(low, x[i]), high = max(high, x[i]);
            size = add(size, abs(x[i]));
        }
        size = mul(size, splat(1.0f / N));
        weights = zero();
        for (int i = 0; i < N; i++) {
            w[i] = add(size, abs(x[i]));
            weights = add(weights, w[i]);
        }
    }

    // The scale with which whole numbers in [-limit, limit) tell the weights best.
    F scale(float limit) const {
        const F largest = further(low, high);
        F best = zero(), most = zero();
        for (int t = 0; t <= TRIALS; t++) {
            // The last trial starts from the best scale instead of a range.
            const F inverse = t < TRIALS ? over(splat(-(limit + 0.1f * (float)(t - TRIALS / 2))), largest) : over(splat(1.0f), best);
            F xq = zero(), qq = zero();
            for (int i = 0; i < N; i++) {
                const F q = clamp(nearest(mul(x[i], inverse)), -limit, limit - 1), wq = mul(w[i], q);
                xq = add(xq, mul(wq, x[i])), qq = add(qq, mul(wq, q));
            }
            const F found = over(xq, qq), gain = mul(found, xq);
            best = less(most, gain, found, best), most = less(most, gain, gain, most);
        }
        return best;
    }

    // s and t, neither negative, with which s q - t tells the weights best, q in [0, limit].
    void line(float limit, F& best_s, F& best_t) const {
        const F from = min(low, zero()), span = sub(high, from);
        F sum = zero(), most = splat(-1.0f);
        for (int i = 0; i < N; i++) sum = add(sum, mul(w[i], x[i]));
        best_s = best_t = zero();
        for (int t = 0; t <= TRIALS; t++) {
            const bool last = t == TRIALS;
            const F inverse = last ? over(splat(1.0f), best_s) : over(splat(limit + 0.1f * (float)(t - TRIALS / 2)), span);
            const F below = last ? best_t : sub(zero(), from);
            F q1 = zero(), qq = zero(), xq = zero();
            for (int i = 0; i < N; i++) {
                const F q = clamp(nearest(mul(add(x[i], below), inverse)), 0, limit), wq = mul(w[i], q);
                q1 = add(q1, wq), qq = add(qq, mul(wq, q)), xq = add(xq, mul(wq, x[i]));
            }
            const F both = mul(weights, qq), spread = sub(both, mul(q1, q1));
            F s = over(sub(mul(weights, xq), mul(sum, q1)), spread), o = over(sub(mul(q1, xq), mul(qq, sum)), spread);
            // Where all q are one number, or the offset would raise: a scale alone, or an offset alone.
            const F alone_s = max(over(xq, qq), zero());
            const F alone_t = less(qq, splat(TINY), max(sub(zero(), over(sum, weights)), zero()), zero());
            const F flat = mul(both, splat(1e-6f));
            s = less(flat, spread, s, alone_s), o = less(flat, spread, o, alone_t);
            s = less(o, zero(), alone_s, s), o = less(o, zero(), alone_t, o);
            s = max(s, zero());
            const F gain = sub(mul(s, xq), mul(o, sum));
            best_s = less(most, gain, s, best_s), best_t = less(most, gain, o, best_t), most = less(most, gain, gain, most);
        }
    }

    // The squared error of a q - b, and its q.
    INLINE F error(F a, F b, float low, float high, float* q) const {
        const F inverse = over(splat(1.0f), a);
        F wrong = zero();
        for (int i = 0; i < N; i++) {
            const F n = clamp(nearest(mul(add(x[i], b), inverse)), low, high), off = sub(sub(mul(a, n), b), x[i]);
            wrong = add(wrong, mul(w[i], mul(off, off)));
            if (q) store(q + 16 * i, n);
        }
        return wrong;
    }
};

// Numbers of a block's weights (weights, 16 lanes) as bytes, for one lane.
struct Numbers {
    uint8_t q[256][16];
    void take(const float* from, int weights, float above) {
        for (int i = 0; i < weights; i++) store_bytes((int8_t*)q[i], to_int(add(load(from + 16 * i), splat(above))));
    }
    // Two to a byte: `width` neighbours in the low halves, the next in the high ones.
    void nibbles(int lane, int weights, int width, uint8_t* out) const {
        for (int i = 0; i < weights; i += 2 * width)
            for (int j = 0; j < width; j++) *out++ = (q[i + j][lane] & 15) | (uint8_t)(q[i + width + j][lane] << 4);
    }
};

inline void put_half(uint8_t* out, float x) {
    const uint16_t h = to_half(x);
    memcpy(out, &h, 2);
}

inline void encode_q8_0(const float* x, uint8_t* out) {
    Groups<32> g;
    g.take(x);
    const F scale = halved(mul(max(g.high, sub(zero(), g.low)), splat(1.0f / 127)));
    float d[16], q[32 * 16];
    store(d, scale);
    for (int i = 0; i < 32; i++) store(q + 16 * i, clamp(nearest(over(g.x[i], scale)), -127, 127));
    Numbers n;
    n.take(q, 32, 0);
    for (int l = 0; l < 16; l++, out += 34) {
        put_half(out, d[l]);
        for (int i = 0; i < 32; i++) out[2 + i] = n.q[i][l];
    }
}

inline void encode_q4_0(const float* x, uint8_t* out) {
    Groups<32> g;
    g.take(x);
    const F scale = halved(g.scale(8));
    float d[16], q[32 * 16];
    store(d, scale);
    for (int i = 0; i < 32; i++) store(q + 16 * i, clamp(nearest(over(g.x[i], scale)), -8, 7));
    Numbers n;
    n.take(q, 32, 8);
    for (int l = 0; l < 16; l++, out += 18) {
        put_half(out, d[l]);
        n.nibbles(l, 32, 16, out + 2);
    }
}

// A Q4_K block's two levels: d, dmin, and for each group s and t.
struct Levels {
    F d, dmin, s[8], t[8], wrong;

    // s and t of each group moved by one where that lowers the error.
    void settle(const Groups<32>* g) {
        wrong = zero();
        for (int k = 0; k < 8; k++) {
            const F s0 = s[k], t0 = t[k];
            F least = g[k].error(mul(d, s0), mul(dmin, t0), 0, 15, nullptr);
            for (int move = 0; move < 9; move++) {
                if (move == 4) continue;
                const F s1 = clamp(add(s0, splat((float)(move / 3 - 1))), 0, 63), t1 = clamp(add(t0, splat((float)(move % 3 - 1))), 0, 63);
                const F here = g[k].error(mul(d, s1), mul(dmin, t1), 0, 15, nullptr);
                s[k] = less(here, least, s1, s[k]), t[k] = less(here, least, t1, t[k]), least = less(here, least, here, least);
            }
            wrong = add(wrong, least);
        }
    }

    // d and dmin by least squares for the numbers that they give now.
    Levels fitted(const Groups<32>* g) const {
        F aa = zero(), ab = zero(), bb = zero(), ax = zero(), bx = zero();
        float q[32 * 16];
        for (int k = 0; k < 8; k++) {
            g[k].error(mul(d, s[k]), mul(dmin, t[k]), 0, 15, q);
            F q1 = zero(), qq = zero(), xq = zero(), sum = zero();
            for (int i = 0; i < 32; i++) {
                const F n = load(q + 16 * i), wq = mul(g[k].w[i], n);
                q1 = add(q1, wq), qq = add(qq, mul(wq, n)), xq = add(xq, mul(wq, g[k].x[i]));
                sum = add(sum, mul(g[k].w[i], g[k].x[i]));
            }
            aa = add(aa, mul(mul(s[k], s[k]), qq)), ab = add(ab, mul(mul(s[k], t[k]), q1));
            bb = add(bb, mul(mul(t[k], t[k]), g[k].weights));
            ax = add(ax, mul(s[k], xq)), bx = add(bx, mul(t[k], sum));
        }
        Levels to = *this;
        const F both = mul(aa, bb), det = sub(both, mul(ab, ab)), flat = mul(both, splat(1e-6f));
        to.d = less(flat, det, over(sub(mul(bb, ax), mul(ab, bx)), det), over(ax, aa));
        to.dmin = less(flat, det, over(sub(mul(ab, ax), mul(aa, bx)), det), dmin);
        to.d = halved(max(to.d, zero())), to.dmin = halved(max(to.dmin, zero()));
        return to;
    }
};

inline void encode_q4_k(const float* x, uint8_t* out) {
    Groups<32> g[8];
    Levels best;
    F s[8], t[8], most_s = zero(), most_t = zero();
    for (int k = 0; k < 8; k++) {
        g[k].take(x + k * 32 * 16);
        g[k].line(15, s[k], t[k]);
        most_s = max(most_s, s[k]), most_t = max(most_t, t[k]);
    }
    best.d = halved(div(most_s, splat(63))), best.dmin = halved(div(most_t, splat(63)));
    for (int k = 0; k < 8; k++) {
        best.s[k] = clamp(nearest(over(s[k], best.d)), 0, 63);
        best.t[k] = clamp(nearest(over(t[k], best.dmin)), 0, 63);
    }
    best.settle(g);
    Levels other = best.fitted(g);
    other.settle(g);
    const F worse = best.wrong, better = other.wrong;
    best.d = less(better, worse, other.d, best.d), best.dmin = less(better, worse, other.dmin, best.dmin);
    alignas(64) float q[256 * 16], d[2][16], s6[8][16], t6[8][16];
    for (int k = 0; k < 8; k++) {
        best.s[k] = less(better, worse, other.s[k], best.s[k]), best.t[k] = less(better, worse, other.t[k], best.t[k]);
        g[k].error(mul(best.d, best.s[k]), mul(best.dmin, best.t[k]), 0, 15, q + k * 32 * 16);
        store(s6[k], best.s[k]), store(t6[k], best.t[k]);
    }
    store(d[0], best.d), store(d[1], best.dmin);
    Numbers n;
    n.take(q, 256, 0);
    for (int l = 0; l < 16; l++, out += 144) {
        put_half(out, d[0][l]), put_half(out + 2, d[1][l]);
        for (int k = 0; k < 4; k++) {
            const int s0 = (int)s6[k][l], s1 = (int)s6[k + 4][l], t0 = (int)t6[k][l], t1 = (int)t6[k + 4][l];
            out[4 + k] = (uint8_t)(s0 | s1 >> 4 << 6), out[8 + k] = (uint8_t)(t0 | t1 >> 4 << 6);
            out[12 + k] = (uint8_t)((s1 & 15) | t1 << 4);
        }
        n.nibbles(l, 256, 32, out + 16);
    }
}

inline void encode_q6_k(const float* x, uint8_t* out) {
    Groups<16> g[16];
    F scale[16], low = zero(), high = zero();
    for (int k = 0; k < 16; k++) {
        g[k].take(x + k * 16 * 16);
        scale[k] = g[k].scale(32);
        low = min(low, scale[k]), high = max(high, scale[k]);
    }
    // Small weights make d a subnormal float16 with few bits. One step of room for s makes up for a d rounded down.
    const F d = halved(div(further(low, high), splat(-127)));
    alignas(64) float q[256 * 16], d0[16], s8[16][16];
    for (int k = 0; k < 16; k++) {
        const F s0 = clamp(nearest(over(scale[k], d)), -128, 127);
        F s = s0, least = g[k].error(mul(d, s0), zero(), -32, 31, nullptr);
        for (int move = -1; move < 2; move += 2) {
            const F s1 = clamp(add(s0, splat((float)move)), -128, 127), here = g[k].error(mul(d, s1), zero(), -32, 31, nullptr);
            s = less(here, least, s1, s), least = less(here, least, here, least);
        }
        g[k].error(mul(d, s), zero(), -32, 31, q + k * 16 * 16);
        store(s8[k], s);
    }
    store(d0, d);
    Numbers n;
    n.take(q, 256, 32);
    for (int l = 0; l < 16; l++, out += 210) {
        n.nibbles(l, 256, 64, out);
        for (int h = 0; h < 2; h++)
            for (int j = 0; j < 32; j++) {
                uint8_t four = 0;
                for (int p = 0; p < 4; p++) four |= (uint8_t)(n.q[h * 128 + p * 32 + j][l] >> 4 << 2 * p);
                out[128 + h * 32 + j] = four;
            }
        for (int k = 0; k < 16; k++) out[192 + k] = (uint8_t)(int8_t)s8[k][l];
        put_half(out + 208, d0[l]);
    }
}

// 16 blocks of `kind` from the weights of `count` (1 to 16), of the type `source`, one behind the other; absent ones repeat
// the last. Returns the size of the largest weight: infinity where one is not finite.
inline float encode(Blocks kind, const void* weights, Source source, int count, uint8_t* out) {
    const int width = kind == Q4_K || kind == Q6_K ? 256 : 32;
    alignas(64) float x[256 * 16], rows[16][16];
    F most = zero(), wrong = zero();
    for (int i = 0; i < width; i += 16) {
        for (int l = 0; l < 16; l++) {
            const int64_t at = (int64_t)(l < count ? l : count - 1) * width + i;
            const F some = source == FROM_FLOAT ? load((const float*)weights + at)
                           : source == FROM_BRAIN ? brain((const uint16_t*)weights + at) : half((const uint16_t*)weights + at);
            most = max(most, abs(some)), wrong = add(wrong, mul(some, zero()));
            store(rows[l], some);
        }
        for (int j = 0; j < 16; j++)
            for (int l = 0; l < 16; l++) x[(i + j) * 16 + l] = rows[l][j];
    }
    if (!(sum(wrong) == 0)) return INFINITE;
    if (kind == Q8_0) encode_q8_0(x, out);
    else if (kind == Q4_0) encode_q4_0(x, out);
    else if (kind == Q4_K) encode_q4_k(x, out);
    else encode_q6_k(x, out);
    return largest(most);
}

}  // namespace PUNA_NAMESPACE
