// The kernels of a training step that are no matrix products, one row of numbers at a time; `training.h` has them.

#pragma once
#include <cstdint>

namespace puna {

// Attention of one sequence: T tokens, H query heads that share K key/value heads, E wide. `turns` are those of `turn` for
// each position, `starts` where each token's document begins.
struct AttentionShape {
    int64_t T, H, K, E;
    const float* turns;
    const int64_t *positions, *starts;
    float factor;  // of scores
};

// Rows [first, last) and columns [left, right) of a matrix (rows, columns).
struct OuterPart {
    int64_t rows, columns, first, last, left, right;
};

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
    // Matrix products; `products.h` says what is laid out how.
    void (*pack)(const float* w, int64_t row, int64_t rows, int64_t n, uint32_t* across, uint32_t* along, uint16_t* scratch);
    void (*product)(const uint16_t* x, int64_t rows, int64_t steps, const uint32_t* packed, int64_t columns, uint16_t* y,
                    float* scratch);
    int64_t (*outer_scratch)(int64_t columns);  // numbers
    void (*outer)(const uint16_t* d, const uint16_t* x, int64_t tokens, const OuterPart& part, bool add_to, float* out,
                  uint32_t* scratch);
    // Attention of one sequence and key/value head `kv`, and its gradient; `training_attention.h`.
    int64_t (*attend_scratch)(int64_t T, int64_t E);  // bytes
    void (*attend)(const AttentionShape& shape, int64_t kv, const uint16_t* qkv, uint16_t* read, float* logs, char* scratch);
    void (*attend_back)(const AttentionShape& shape, int64_t kv, const uint16_t* qkv, const uint16_t* read,
                        const float* logs, const uint16_t* d, uint16_t* dqkv, char* scratch);
};

}  // namespace puna
