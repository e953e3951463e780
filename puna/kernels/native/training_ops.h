// The kernels of a training step that are no matrix products, one row of numbers at a time; `training.h` has them.

#pragma once
#include <cstdint>

namespace puna {

struct TrainingOps {
    // total = x + delta (x alone if delta is null); normed = total / rms(total) * weight; returns 1 / rms(total).
    float (*norm)(const float* x, const uint16_t* delta, const float* weight, float eps, int64_t n, float* total,
                  uint16_t* normed);
    // dx += the gradient through `norm` of d (n); dweight += its own; dx_brain = dx.
    void (*norm_back)(const uint16_t* d, const float* total, const float* weight, float factor, int64_t n, float* dx,
                      uint16_t* dx_brain, float* dweight);
    // Turn the pairs of a head: out = (x cos + swapped(x) sin) * factor; turns is cos (n), then sin (n) with signs.
    void (*turn)(const uint16_t* x, const float* turns, float sign, float factor, int64_t n, uint16_t* out);
    // In place: softmax of x[begin, end), zero elsewhere in [0, n).
    void (*softmax)(uint16_t* x, int64_t begin, int64_t end, int64_t n);
    // In place: d = p (d - sum(p d)) over [begin, end), zero elsewhere in [0, n).
    void (*softmax_back)(const uint16_t* p, uint16_t* d, int64_t begin, int64_t end, int64_t n);
    // out = silu(gate) up, where gate_up is gate (n), then up (n).
    void (*swiglu)(const uint16_t* gate_up, int64_t n, uint16_t* out);
    // In place: gate_up becomes its gradient for the gradient d (n) of `swiglu`.
    void (*swiglu_back)(uint16_t* gate_up, const uint16_t* d, int64_t n);
    // Returns log(sum(exp(x))) - x[target]; x becomes weight * (softmax(x) - onehot(target)) if `gradient`.
    float (*loss)(uint16_t* x, int64_t n, int64_t target, float weight, bool gradient);
};

}  // namespace puna
