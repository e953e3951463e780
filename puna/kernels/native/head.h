// The end of a pass: which states become logits, and, where only the likeliest tokens matter, which rows of the output
// matrix are worth reading whole.
//
// The output matrix of a small model is a fifth of all its weights, and of its 128,256 logits a step draws one. If it is
// split (matrix.h) all rows are multiplied by their upper halves first, which tells every logit to about a tenth of the
// deviation of all; then the REFINED blocks with the largest of these are multiplied again, both halves together. What
// is drawn is one of those, and their logits are, bit for bit, the ones that the whole matrix gives. A token's choice of
// blocks depends on its own logits alone.

#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "model.h"

namespace puna {

// States that become logits together.
struct Ends {
    std::vector<int64_t> rows, places;  // which of the batch's tokens; which row of the result
    std::vector<float> states, logits;  // (rows, dim); (rows, stride), unless they go straight to their place
    int64_t stride = 0;
    bool direct = false;

    void add(int64_t row, int64_t place) { rows.push_back(row), places.push_back(place); }

    void reserve(int64_t dim, int64_t vocabulary, int64_t all) {
        const int64_t n = (int64_t)rows.size();
        stride = up(vocabulary, CHUNK);
        direct = stride == vocabulary && n == all;
        states.resize(n * dim), logits.resize(direct ? 0 : n * stride);
    }
};

// The blocks that are read again, of each screened token.
struct Screen {
    std::vector<float> largest, values;  // (tokens, blocks): a block's largest logit; (tokens, REFINED)
    std::vector<int32_t> indices;
    std::vector<uint8_t> chosen;         // (blocks, tokens)
    int64_t tokens = 0;

    void reserve(int64_t n, int64_t blocks) {
        tokens = n;
        if ((int64_t)largest.size() < n * blocks) largest.resize(n * blocks);
        values.resize(n * REFINED), indices.resize(n * REFINED);
        chosen.assign(n * blocks, 0);
    }

    void choose(const Ops& ops, int64_t token, int64_t blocks) {
        const int64_t count = std::min(REFINED, blocks);
        int32_t* best = indices.data() + token * REFINED;
        ops.top(largest.data() + token * blocks, blocks, count, values.data() + token * REFINED, best);
        for (int64_t i = 0; i < count; i++) chosen[best[i] * tokens + token] = 1;
    }
};

}  // namespace puna
