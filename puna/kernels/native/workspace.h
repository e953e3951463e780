// Memory that a pass writes into; it grows with the largest batch and stays.

#pragma once
#include <array>
#include <vector>

#include "head.h"
#include "pages.h"

namespace puna {

// Room for the activations that meet matrices of one kind.
struct Laid {
    Activations a;
    Room<uint32_t> data;
    std::vector<float> scales;
    std::vector<int32_t> sums;

    void shape(const Matrix& w, int64_t tokens) {
        const Ops& ops = operations();
        a.integer = w.integer(), a.brain = w.kind == BRAIN;
        a.tokens = tokens, a.steps = w.steps();
        a.group = a.integer ? w.group : 0, a.groups = a.integer ? w.groups() : 0;
        a.wide = w.wide(), a.bias = w.bias();
        a.tile = tile_for(tokens, a.integer ? ops.tile_integers : ops.tile_floats);
        grow(data, tokens * a.steps), grow(scales, tokens * a.groups), grow(sums, tokens * a.groups);
        a.data = data.data(), a.scales = scales.data(), a.sums = sums.data();
    }

    template <typename Numbers>
    static void grow(Numbers& v, int64_t n) {
        if ((int64_t)v.size() < n) v.resize(n);
    }
};

inline bool alike(const Matrix& a, const Matrix& b) {  // whether they read the same activations
    if (a.integer() != b.integer() || a.columns != b.columns) return false;
    return a.integer() ? a.group == b.group && a.wide() == b.wide() && a.bias() == b.bias() : a.kind == b.kind;
}

struct Workspace {
    Room<float> x, mixed, attended, lifted, other, turns;
    std::vector<int64_t> positions;                // of each token in its sequence
    std::vector<std::vector<float>> scratch;       // one per thread
    std::vector<std::array<Laid, 3>> own;          // one per thread, for lone tokens
    std::array<Laid, 3> shared;
    Laid single;                                   // tile by tile one token
    Screen screen;
};

}  // namespace puna
