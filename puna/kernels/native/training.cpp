// A training step's kernels over all rows, called from Python by ctypes.
//
// Rows are shared out over the threads of the OpenMP runtime that PyTorch has already started: a second team of threads
// would fight with PyTorch's own, which spin for a while after each matrix product. That runtime is looked up by name;
// where it is not GNU's, a team of our own does the work.

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "model.h"
#include "pages.h"
#include "training_ops.h"

using namespace puna;

namespace {

constexpr int64_t PIECES = 8;  // per thread, so that one that is held up takes fewer
constexpr int MOST_THREADS = 256;

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Rows that a team works through. Each thread begins with a range of its own, the same in every job over these rows: what
// it wrote for the last job is in its caches, and another's may be far. Who has finished helps the others.
struct Job {
    const std::function<void(int64_t, int64_t, int)>* work;
    int64_t rows, piece, unit;
    int team;
    std::atomic<int> threads{0};
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    } ranges[MOST_THREADS];

    void cut() {
        const int64_t units = (rows + unit - 1) / unit;
        for (int i = 0; i < team; i++) ranges[i].next = units * i / team * unit, ranges[i].end = std::min(rows, units * (i + 1) / team * unit);
    }

    // The next rows of a range: `piece` of them while there are many, whole units, fewer towards the end.
    bool take(Range& range, int64_t& first, int64_t& last) {
        for (first = range.next.load(); first < range.end;) {
            const int64_t fair = (range.end - first) / 2 / unit * unit;
            last = std::min(range.end, first + std::clamp(fair, unit, std::max(unit, piece)));
            if (range.next.compare_exchange_weak(first, last)) return true;
        }
        return false;
    }
};

void serve(void* data) {
    static const auto number = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    Job& job = *(Job*)data;
    const int thread = job.threads.fetch_add(1), own = number ? number() % job.team : thread;
    for (int i = 0; i < job.team; i++)
        for (int64_t first, last; job.take(job.ranges[(own + i) % job.team], first, last);) (*job.work)(first, last, thread);
}

// work(first, last, thread) over all rows, thread < threads
void share(int threads, int64_t rows, const std::function<void(int64_t, int64_t, int)>& work, int64_t piece = 0,
           int64_t unit = 1) {
    static const auto parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    threads = std::min(threads, MOST_THREADS);
    Job job{&work, rows, piece ? piece : std::max<int64_t>(1, rows / (threads * PIECES)), unit, threads};
    job.cut();
    if (threads == 1) return serve(&job);
    if (parallel) return parallel(serve, &job, (unsigned)threads, 0);
    static Team team(threads);
    team.run(1, [&](int) { serve(&job); });
}

const TrainingOps& ops() { return *operations().training; }

// Memory of this thread's own, which stays: taking it anew in each call would cost page faults. On large pages always: a heap
// of another thread than the first has small ones.
template <typename T>
T* scratch(int64_t n) {
    thread_local struct Memory {
        void* at = nullptr;
        size_t bytes = 0;
        ~Memory() { free(at); }
    } memory;
    const size_t bytes = n * sizeof(T);
    if (memory.bytes < bytes) {
        free(memory.at);
        memory = {}, memory.at = on_large_pages(bytes), memory.bytes = bytes;
    }
    return (T*)memory.at;
}

constexpr int64_t UNIT = 6;  // rows of a tile (products.h)

// Where part i of n equal parts of so many rows or columns begins; lines of 32 are not cut.
int64_t cut(int64_t all, int64_t n, int64_t i) { return i == n ? all : all * i / n / 32 * 32; }

// Parts of a matrix for so many threads, down and across, in which the least is laid out twice.
std::pair<int64_t, int64_t> grid(int64_t threads, int64_t rows, int64_t columns) {
    int64_t best = threads;
    for (int64_t down = threads; down > 0; down--)
        if (threads % down == 0 && rows / down + columns * down / threads < rows / best + columns * best / threads) best = down;
    return {best, threads / best};
}

constexpr int64_t HEAVY = 1 << 22;  // numbers of a matrix that should be read as seldom as possible

// y (rows, columns) = x (rows, n) times a packed matrix, `then(first, last, y of these rows)` while they are in the cache.
// Without y they are nowhere else. Rows are shared out in multiples of `unit`.
template <typename Then>
void multiply(int threads, int64_t rows, int64_t n, int64_t columns, const uint16_t* x, const uint32_t* packed, uint16_t* y,
              int64_t unit, Then then) {
    int64_t piece = n <= 2048 ? 16 * UNIT : 8 * UNIT;
    if (n * columns > HEAVY) piece = unit = std::max(unit, ((rows + threads - 1) / threads + unit - 1) / unit * unit);
    share(threads, rows, [&](int64_t first, int64_t last, int) {
        const int64_t count = (last - first) * columns;
        const int64_t sums = n > 2048 ? count : 0;  // products of longer sums need them (products.h, DEEP)
        float* room = scratch<float>(sums + (y ? 0 : count / 2));
        uint16_t* made = y ? y + first * columns : (uint16_t*)(room + sums);
        ops().product(x + first * n, last - first, n / 2, packed, columns, made, room);
        then(first, last, made);
    }, piece, unit);
}

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

// A part of a matrix (rows, n) of bfloat16, its rows from `first` on, from w (part, n) float32.
API void puna_train_pack(int threads, const float* w, int64_t first, int64_t part, int64_t rows, int64_t n, uint32_t* across,
                         uint32_t* along) {
    share(threads, part / 16, [&](int64_t from, int64_t to, int) {
        for (int64_t r = 16 * from; r < 16 * to; r += 16)
            ops().pack(w + r * n, first + r, rows, n, across, along, scratch<uint16_t>(16 * n));
    });
}

// y (rows, columns) = x (rows, n) times a packed matrix
API void puna_train_product(int threads, int64_t rows, int64_t n, int64_t columns, const uint16_t* x, const uint32_t* packed,
                            uint16_t* y) {
    multiply(threads, rows, n, columns, x, packed, y, 2 * UNIT, [](int64_t, int64_t, uint16_t*) {});
}

// gate_up (rows, 2 f) = x (rows, n) times a packed matrix; gated (rows, f) from it
API void puna_train_product_swiglu(int threads, int64_t rows, int64_t n, int64_t f, const uint16_t* x, const uint32_t* packed,
                                   uint16_t* gate_up, uint16_t* gated) {
    multiply(threads, rows, n, 2 * f, x, packed, gate_up, 2 * UNIT, [&](int64_t first, int64_t last, uint16_t* made) {
        for (int64_t r = first; r < last; r++) ops().swiglu(made + (r - first) * 2 * f, f, gated + r * f);
    });
}

// gate_up (rows, 2 f) becomes its gradient, for that of gated, which is d (rows, n) times a packed matrix
API void puna_train_product_swiglu_back(int threads, int64_t rows, int64_t n, int64_t f, const uint16_t* d,
                                        const uint32_t* packed, uint16_t* gate_up) {
    multiply(threads, rows, n, f, d, packed, nullptr, 2 * UNIT, [&](int64_t first, int64_t last, uint16_t* made) {
        for (int64_t r = first; r < last; r++) ops().swiglu_back(gate_up + r * 2 * f, made + (r - first) * f, f);
    });
}

// `puna_train_norm` with delta = x (rows, n) times a packed matrix
API void puna_train_product_norm(int threads, int64_t rows, int64_t n, int64_t width, const uint16_t* x, const uint32_t* packed,
                                 const float* stream, const float* weight, float eps, float* total, uint16_t* normed,
                                 float* factors) {
    multiply(threads, rows, n, width, x, packed, nullptr, 2 * UNIT, [&](int64_t first, int64_t last, uint16_t* made) {
        for (int64_t r = first; r < last; r++)
            factors[r] = ops().norm(stream + r * width, made + (r - first) * width, weight, eps, width, total + r * width,
                                    normed + r * width);
    });
}

// `puna_train_norm_back` of d (rows, n) times a packed matrix
API void puna_train_product_norm_back(int threads, int64_t rows, int64_t n, int64_t width, const uint16_t* d,
                                      const uint32_t* packed, const float* total, const float* weight, const float* factors,
                                      float* dx, uint16_t* dx_brain, float* dweight) {
    const int64_t piece = 8 * UNIT;  // for each a sum, so that none depends on who computes what
    std::vector<float> sums((rows + piece - 1) / piece * width, 0.0f);
    multiply(threads, rows, n, width, d, packed, nullptr, piece, [&](int64_t first, int64_t last, uint16_t* made) {
        for (int64_t r = first; r < last; r++)
            ops().norm_back(made + (r - first) * width, total + r * width, weight, factors[r], width, dx + r * width,
                            dx_brain + r * width, &sums[r / piece * width]);
    });
    for (auto sum = sums.begin(); sum != sums.end(); sum += width)
        for (int64_t i = 0; i < width; i++) dweight[i] += sum[i];
}

// out (rows, columns) float32 = d^T x, or is added to; d (tokens, rows), x (tokens, columns)
API void puna_train_outer(int threads, int64_t tokens, int64_t rows, int64_t columns, const uint16_t* d, const uint16_t* x,
                          int add_to, float* out) {
    const auto [down, across] = grid(threads, rows, columns);
    share(threads, down * across, [&, down = down, across = across](int64_t part, int64_t end, int) {
        for (; part < end; part++) {
            const int64_t r = part / across, c = part % across;
            const OuterPart mine{rows, columns, cut(rows, down, r), cut(rows, down, r + 1), cut(columns, across, c), cut(columns, across, c + 1)};
            ops().outer(d, x, tokens, mine, add_to, out, scratch<uint32_t>(ops().outer_scratch(mine.right - mine.left)));
        }
    }, 1);
}

// read (B T, H E) and logs (B, H, T) from qkv (B T, (H + 2 K) E); or, with d (B T, H E), dqkv from all of them
API void puna_train_attend(int threads, int64_t B, int64_t T, int64_t H, int64_t K, int64_t E, const uint16_t* qkv,
                           const float* turns, const int64_t* positions, const int64_t* starts, float factor,
                           uint16_t* read, float* logs, const uint16_t* d, uint16_t* dqkv) {
    share(threads, B * K, [&](int64_t first, int64_t last, int) {
        char* room = scratch<char>(ops().attend_scratch(T, E));
        for (int64_t i = first; i < last; i++) {
            const int64_t b = i / K, row = b * T, width = (H + 2 * K) * E;
            const AttentionShape shape{T, H, K, E, turns, positions + row, starts + row, factor};
            const uint16_t* from = qkv + row * width;
            uint16_t* got = read + row * H * E;
            float* kept = logs + b * H * T;
            if (d) ops().attend_back(shape, i % K, from, got, kept, d + row * H * E, dqkv + row * width, room);
            else ops().attend(shape, i % K, from, got, kept, room);
        }
    }, 1);
}
