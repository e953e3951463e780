// The end of a pass: which states become logits, and, where only the likeliest tokens matter, which rows of the output
// matrix are worth reading whole.
//
// The output matrix of a small model is a fifth of all its weights, and of its 128,256 logits a step draws one. If it is
// split (matrix.h) all rows are multiplied by their upper halves first, which tells every logit to about a tenth of the
// deviation of all; then the REFINED blocks with the largest of these are multiplied again, both halves together. What
// is drawn is one of those, and their logits are, bit for bit, the ones that the whole matrix gives.
//
// Some other row could still be the largest: if its error is as large as it is behind. How large errors are is known, now
// that 2,048 logits were computed both ways. A row that was not read again would need more than twice the largest of
// those errors; where that is not ruled out, all blocks are read again. All this depends on the token's own logits alone.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "model.h"

namespace puna {

// States that become logits together.
struct Ends {
    std::vector<int64_t> places;        // which of all states that do, and so which row of the result
    std::vector<float> states, logits;  // (rows, dim); (rows, stride), unless they go straight to their place
    int64_t stride = 0;
    bool direct = false;

    void reserve(int64_t dim, int64_t vocabulary, int64_t all) {
        const int64_t n = (int64_t)places.size();
        stride = up(vocabulary, CHUNK);
        direct = stride == vocabulary && n == all;
        states.resize(n * dim), logits.resize(direct ? 0 : n * stride);
    }
};

// The blocks that are read again, of each screened token.
struct Screen {
    enum : uint8_t { ROUGH, CHOSEN, READ };
    std::vector<float> largest, errors;  // (tokens, blocks): a block's largest logit, and how far its logits were off
    std::vector<float> values;           // (tokens, REFINED + 1): the best blocks' largest logits by the upper halves
    std::vector<int32_t> indices;        // and which blocks they are
    std::vector<uint8_t> state;          // (blocks, tokens)
    int64_t tokens = 0, blocks = 0;

    void reserve(int64_t n, int64_t all) {
        tokens = n, blocks = all;
        if ((int64_t)largest.size() < n * blocks) largest.resize(n * blocks), errors.resize(n * blocks);
        values.resize(n * (REFINED + 1)), indices.resize(n * (REFINED + 1));
        state.assign(n * blocks, ROUGH);
    }

    void choose(const Ops& ops, int64_t token) {
        int32_t* best = indices.data() + token * (REFINED + 1);
        const int64_t count = std::min(REFINED + 1, blocks);
        ops.top(largest.data() + token * blocks, blocks, count, values.data() + token * (REFINED + 1), best);
        for (int64_t i = 0; i < std::min(REFINED, blocks); i++) state[best[i] * tokens + token] = CHOSEN;
    }

    // Block b's logits y (16) of a token as the whole matrix has them.
    void refine(const Ops& ops, const Matrix& w, int64_t b, const Activations& a, int64_t token, float* y) {
        float rough[LANES], most = 0;
        for (int i = 0; i < LANES; i++) rough[i] = y[i];
        ops.refine(w, b, a, token, y);
        for (int i = 0; i < LANES; i++) most = std::max(most, std::fabs(y[i] - rough[i]));
        errors[token * blocks + b] = most;
        ops.maxima(y, 1, largest.data() + token * blocks + b);
        state[b * tokens + token] = READ;
    }

    // Whether the largest logit is surely among those read again; if not, the rest is chosen, too.
    void check(int64_t token) {
        if (blocks <= REFINED) return;
        const int32_t* best = indices.data() + token * (REFINED + 1);
        float most = -INFINITY, error = 0;
        for (int64_t i = 0; i < REFINED; i++) {
            most = std::max(most, largest[token * blocks + best[i]]);
            error = std::max(error, errors[token * blocks + best[i]]);
        }
        if (most - values[token * (REFINED + 1) + REFINED] > 2 * error) return;
        for (int64_t b = 0; b < blocks; b++)
            if (state[b * tokens + token] == ROUGH) state[b * tokens + token] = CHOSEN;
    }
};

}  // namespace puna
