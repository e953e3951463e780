// A training step's kernels over all rows, called from Python by ctypes.
//
// Rows are shared out over the threads of the OpenMP runtime that PyTorch has already started: a second team of threads
// would fight with PyTorch's own, which spin for a while after each matrix product. That runtime is looked up by name;
// where it is not GNU's, a team of our own does the work.

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "model.h"
#include "training_ops.h"

using namespace puna;

namespace {

constexpr int64_t PIECES = 8;  // per thread, so that one that is held up takes fewer

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Job {
    const std::function<void(int64_t, int64_t, int)>* work;
    int64_t rows, piece;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
};

void serve(void* data) {
    Job& job = *(Job*)data;
    const int thread = job.threads.fetch_add(1);
    for (int64_t first; (first = job.next.fetch_add(job.piece)) < job.rows;)
        (*job.work)(first, std::min(first + job.piece, job.rows), thread);
}

// work(first, last, thread) over all rows, thread < threads
void share(int threads, int64_t rows, const std::function<void(int64_t, int64_t, int)>& work) {
    static const auto parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    Job job{&work, rows, std::max<int64_t>(1, rows / (threads * PIECES))};
    if (threads == 1) return serve(&job);
    if (parallel) return parallel(serve, &job, (unsigned)threads, 0);
    static Team team(threads);
    team.run(1, [&](int) { serve(&job); });
}

const TrainingOps& ops() { return *operations().training; }

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API void puna_train_norm(int threads, int64_t rows, int64_t n, const float* x, const uint16_t* delta, const float* weight,
                         float eps, float* total, uint16_t* normed, float* factors) {
    share(threads, rows, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++)
            factors[r] = ops().norm(x + r * n, delta ? delta + r * n : nullptr, weight, eps, n, total + r * n, normed + r * n);
    });
}

API void puna_train_norm_back(int threads, int64_t rows, int64_t n, const uint16_t* d, const float* total,
                              const float* weight, const float* factors, float* dx, uint16_t* dx_brain, float* dweight) {
    // The sum over rows is taken over fixed pieces in a fixed order, so that it does not depend on who computes what.
    const int64_t pieces = std::min<int64_t>(rows, 64), piece = (rows + pieces - 1) / pieces;
    std::vector<float> sums(pieces * n, 0.0f);
    share(threads, pieces, [&](int64_t first, int64_t last, int) {
        for (int64_t p = first; p < last; p++)
            for (int64_t r = p * piece; r < std::min(rows, (p + 1) * piece); r++)
                ops().norm_back(d + r * n, total + r * n, weight, factors[r], n, dx + r * n, dx_brain + r * n, &sums[p * n]);
    });
    for (int64_t p = 0; p < pieces; p++)
        for (int64_t i = 0; i < n; i++) dweight[i] += sums[p * n + i];
}

// qkv (B, T, H + 2 K, E) becomes q (B, H, T, E), k and v (B, K, T, E); q and k turned, q times factor.
API void puna_train_split(int threads, int64_t B, int64_t T, int64_t H, int64_t K, int64_t E, const uint16_t* qkv,
                          const float* turns, const int64_t* positions, float factor, uint16_t* q, uint16_t* k, uint16_t* v) {
    share(threads, B * T, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) {
            const int64_t b = r / T, t = r % T;
            const uint16_t* x = qkv + r * (H + 2 * K) * E;
            const float* turn = turns + positions[r] * 2 * E;
            for (int64_t h = 0; h < H; h++) ops().turn(x + h * E, turn, 1, factor, E, q + ((b * H + h) * T + t) * E);
            for (int64_t h = 0; h < K; h++) {
                ops().turn(x + (H + h) * E, turn, 1, 1, E, k + ((b * K + h) * T + t) * E);
                memcpy(v + ((b * K + h) * T + t) * E, x + (H + K + h) * E, E * 2);
            }
        }
    });
}

// The gradients of `split`, put together again.
API void puna_train_join(int threads, int64_t B, int64_t T, int64_t H, int64_t K, int64_t E, const uint16_t* q,
                         const uint16_t* k, const uint16_t* v, const float* turns, const int64_t* positions, float factor,
                         uint16_t* qkv) {
    share(threads, B * T, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) {
            const int64_t b = r / T, t = r % T;
            uint16_t* x = qkv + r * (H + 2 * K) * E;
            const float* turn = turns + positions[r] * 2 * E;
            for (int64_t h = 0; h < H; h++) ops().turn(q + ((b * H + h) * T + t) * E, turn, -1, factor, E, x + h * E);
            for (int64_t h = 0; h < K; h++) {
                ops().turn(k + ((b * K + h) * T + t) * E, turn, -1, 1, E, x + (H + h) * E);
                memcpy(x + (H + K + h) * E, v + ((b * K + h) * T + t) * E, E * 2);
            }
        }
    });
}

// (B, H, T, E) to (B, T, H, E), or back
API void puna_train_heads(int threads, int64_t B, int64_t T, int64_t H, int64_t E, const uint16_t* x, int back, uint16_t* y) {
    share(threads, B * T, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++)
            for (int64_t h = 0; h < H; h++) {
                const int64_t inner = ((r / T * H + h) * T + r % T) * E, outer = (r * H + h) * E;
                memcpy(y + (back ? inner : outer), x + (back ? outer : inner), E * 2);
            }
    });
}

// scores (B, H, T, S): row t of a sequence sees columns [starts[b, t], t + offset]; d, if given, becomes the gradient
API void puna_train_softmax(int threads, int64_t B, int64_t H, int64_t T, int64_t S, int64_t offset, const int64_t* starts,
                            uint16_t* scores, uint16_t* d) {
    share(threads, B * H * T, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) {
            const int64_t t = r % T, begin = starts[r / (H * T) * T + t], end = t + offset + 1;
            if (d) ops().softmax_back(scores + r * S, d + r * S, begin, end, S);
            else ops().softmax(scores + r * S, begin, end, S);
        }
    });
}

API void puna_train_swiglu(int threads, int64_t rows, int64_t n, const uint16_t* gate_up, uint16_t* out) {
    share(threads, rows, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) ops().swiglu(gate_up + r * 2 * n, n, out + r * n);
    });
}

API void puna_train_swiglu_back(int threads, int64_t rows, int64_t n, uint16_t* gate_up, const uint16_t* d) {
    share(threads, rows, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++) ops().swiglu_back(gate_up + r * 2 * n, d + r * n, n);
    });
}

API void puna_train_loss(int threads, int64_t rows, int64_t n, uint16_t* logits, const int64_t* targets,
                         const float* weights, int gradient, float* losses) {
    share(threads, rows, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; r++)
            losses[r] = ops().loss(logits + r * n, n, targets[r], weights[r], gradient);
    });
}
