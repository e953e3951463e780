// Kernels of a training step, a row at a time. Numbers that matrix products read are bfloat16; sums are float32.
//
// All lengths are whole lanes (16 numbers); Python sees to that.

#pragma once
#include "simd.h"
#include "training_ops.h"

namespace PUNA_NAMESPACE {

INLINE F brain_sum(F a, const uint16_t* b) { return add(a, brain(b)); }

inline float train_norm(const float* x, const uint16_t* delta, const float* weight, float eps, int64_t n, float* total,
                        uint16_t* normed) {
    F squares = zero();
    for (int64_t i = 0; i < n; i += 16) {
        F v = load(x + i);
        if (delta) v = brain_sum(v, delta + i);
        if (delta || total != x) store(total + i, v);
        squares = fma(v, v, squares);
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += 16)
        store_brain(normed + i, mul(mul(load(total + i), splat(factor)), load(weight + i)));
    return factor;
}

inline void train_norm_back(const uint16_t* d, const float* total, const float* weight, float factor, int64_t n,
                            float* dx, uint16_t* dx_brain, float* dweight) {
    F dots = zero();
    for (int64_t i = 0; i < n; i += 16) dots = fma(mul(brain(d + i), load(weight + i)), load(total + i), dots);
    const F shift = splat(-sum(dots) / (float)n * factor * factor * factor), scale = splat(factor);
    for (int64_t i = 0; i < n; i += 16) {
        const F g = mul(brain(d + i), scale), x = load(total + i);
        store(dweight + i, fma(g, x, load(dweight + i)));
        const F made = fma(shift, x, fma(g, load(weight + i), load(dx + i)));
        store(dx + i, made);
        store_brain(dx_brain + i, made);
    }
}

inline void train_turn(const uint16_t* x, const float* turns, float sign, float factor, int64_t n, uint16_t* out) {
    const F f = splat(factor), s = splat(sign * factor);
    for (int64_t i = 0; i < n; i += 16) {
        const F v = brain(x + i);
        store_brain(out + i, fma(v, mul(load(turns + i), f), mul(swapped(v), mul(load(turns + n + i), s))));
    }
}

// The lanes of x (16 numbers from number i on) within [begin, end), `other` in the rest.
INLINE F within(F x, int64_t i, int64_t begin, int64_t end, float other) {
    if (i >= begin && i + 16 <= end) return x;
    if (i >= begin && i < end) return first(x, (int)(end - i), other);
    float v[16];
    store(v, x);
    for (int64_t l = 0; l < 16; l++)
        if (i + l < begin || i + l >= end) v[l] = other;
    return load(v);
}

inline void train_softmax(uint16_t* x, int64_t begin, int64_t end, int64_t n) {
    const int64_t from = begin & ~15, to = (end + 15) & ~15;
    F top = splat(-INFINITE), total = zero();
    for (int64_t i = from; i < to; i += 16) top = max(top, within(brain(x + i), i, begin, end, -INFINITE));
    const F most = splat(largest(top));
    for (int64_t i = from; i < to; i += 16)
        total = add(total, within(exp(sub(brain(x + i), most)), i, begin, end, 0.0f));
    const F scale = splat(1.0f / sum(total));
    memset(x, 0, from * 2);
    for (int64_t i = from; i < to; i += 16)
        store_brain(x + i, mul(within(exp(sub(brain(x + i), most)), i, begin, end, 0.0f), scale));
    memset(x + to, 0, (n - to) * 2);
}

inline void train_softmax_back(const uint16_t* p, uint16_t* d, int64_t begin, int64_t end, int64_t n) {
    const int64_t from = begin & ~15, to = (end + 15) & ~15;
    F dots = zero();
    for (int64_t i = from; i < to; i += 16) dots = fma(brain(p + i), brain(d + i), dots);
    const F mean = splat(sum(dots));
    memset(d, 0, from * 2);
    for (int64_t i = from; i < to; i += 16) store_brain(d + i, mul(brain(p + i), sub(brain(d + i), mean)));
    memset(d + to, 0, (n - to) * 2);
}

INLINE F sigmoid(F x) { return div(splat(1.0f), add(splat(1.0f), exp(min(sub(zero(), x), splat(87.0f))))); }

inline void train_swiglu(const uint16_t* gate_up, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
        const F gate = brain(gate_up + i);
        store_brain(out + i, mul(mul(gate, sigmoid(gate)), brain(gate_up + n + i)));
    }
}

inline void train_swiglu_back(uint16_t* gate_up, const uint16_t* d, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const F gate = brain(gate_up + i), up = brain(gate_up + n + i), given = brain(d + i);
        const F s = sigmoid(gate), silu = mul(gate, s);
        store_brain(gate_up + n + i, mul(given, silu));
        // d silu = s (1 + gate (1 - s)) = s + silu (1 - s)
        store_brain(gate_up + i, mul(mul(given, up), fma(silu, sub(splat(1.0f), s), s)));
    }
}

inline float train_loss(uint16_t* x, int64_t n, int64_t target, float weight, bool gradient) {
    F top = splat(-INFINITE), total = zero();
    for (int64_t i = 0; i < n; i += 16) top = max(top, brain(x + i));
    const float most = largest(top);
    for (int64_t i = 0; i < n; i += 16) total = add(total, exp(sub(brain(x + i), splat(most))));
    const float normaliser = most + std::log(sum(total)), share = std::exp(most - normaliser) * weight;
    float wanted[16];
    store(wanted, brain(x + (target & ~15)));
    const float loss = normaliser - wanted[target & 15];
    if (!gradient) return loss;
    for (int64_t i = 0; i < n; i += 16)
        store_brain(x + i, mul(exp(sub(brain(x + i), splat(most))), splat(share)));
    x[target] = to_brain(weight * (std::exp(-loss) - 1.0f));
    return loss;
}

}  // namespace PUNA_NAMESPACE
