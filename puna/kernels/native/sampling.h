// The k largest of many, without sorting the rest.
//
// A running threshold, the k-th largest so far, is met by few of the values that are still to come: sixteen at a time
// are compared with it, and only those that pass go into a heap.

#pragma once
#include <algorithm>

#include "matrix.h"
#include "simd.h"

namespace PUNA_NAMESPACE {
using namespace puna;

struct Entry {  // a type of this instruction set's own, and so are the library's functions made from it
    float value;
    int32_t index;
};

inline float top(const float* x, int64_t n, int64_t k, float* values, int32_t* indices) {
    const auto better = [](const Entry& a, const Entry& b) {
        return a.value > b.value || (a.value == b.value && a.index < b.index);
    };
    Entry* heap = new Entry[k];  // its front is the worst that is kept
    int64_t held = 0;
    const auto offer = [&](int64_t i) {
        const Entry entry{x[i], (int32_t)i};
        if (held == k) {
            if (!better(entry, heap[0])) return;
            std::pop_heap(heap, heap + held--, better);
        }
        heap[held++] = entry;
        std::push_heap(heap, heap + held, better);
    };
    float most = -INFINITE;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const float here = largest(load(x + i));
        most = here > most ? here : most;
        if (held < k || here > heap[0].value)
            for (int64_t j = i; j < i + LANES; j++) offer(j);
    }
    for (; i < n; i++) {
        most = x[i] > most ? x[i] : most;
        offer(i);
    }
    std::sort_heap(heap, heap + held, better);
    for (int64_t j = 0; j < held; j++) values[j] = heap[j].value, indices[j] = heap[j].index;
    delete[] heap;

    double total = 0;
    for (i = 0; i + LANES <= n; i += LANES) total += sum(exp(sub(load(x + i), splat(most))));
    for (; i < n; i++) total += std::exp(x[i] - most);
    return most + (float)std::log(total);
}

}  // namespace PUNA_NAMESPACE
