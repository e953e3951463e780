// A Llama in memory as the kernels read it, and one forward pass of it.

#pragma once
#include <array>
#include <memory>
#include <vector>

#include "matrix.h"
#include "team.h"

namespace puna {

enum Part : int { WQ, WK, WV, WO, W1, W2, W3, PARTS };

struct Shape {
    int64_t layers, dim, ffn, heads, kv_heads, width, vocabulary;
    float eps;
};

// A low-rank addition to some of the matrices (arXiv 2106.09685): y += up (down x), the scale already in `up`.
struct Adapter {
    struct Pair {
        int64_t rank = 0;
        std::vector<float> down, up;  // (rank, inputs), (outputs, rank)
    };
    std::vector<std::array<Pair, PARTS>> layers;
};

// How many blocks of 16 rows of a split output matrix are read whole for a screened token: those that hold the largest
// logits by the upper halves, so the 128 largest rows are among them (head.h).
constexpr int64_t REFINED = 128;

// Memory for a batch of some tokens; grows when it has to.
struct Workspace;

class Model {
public:
    Model(const Shape& shape, const float* frequencies, int threads);
    ~Model();

    const Shape shape;
    Team team;
    std::vector<float> frequencies;  // (width / 2): the angle of each pair per position
    std::vector<std::array<const Matrix*, PARTS>> layers;
    std::vector<std::array<std::vector<float>, 2>> norms;  // before attention, before the feed-forward
    std::vector<float> last_norm;
    const Matrix* embedding = nullptr;
    const Matrix* output = nullptr;
    std::vector<std::unique_ptr<Adapter>> adapters;

    // Reads the spans' tokens and leaves their keys and values in the cache. For each span the states after its last
    // wanted[i] tokens become logits: rows of (…, vocabulary), or, when `hidden` is set, rows of (…, dim) before the
    // output matrix. adapter[i] is an adapter's number or -1. Where screened[i], only the largest logits need be those of
    // the whole output matrix: if it is split the others are those of its upper halves.
    void forward(const Cache& cache, const std::vector<Span>& spans, const int32_t* tokens, const int64_t* wanted,
                 const int64_t* adapter, const int64_t* screened, float* out, bool hidden);

private:
    struct Pass;
    std::unique_ptr<Workspace> space_;
};

const Ops& operations();                // those of the best instruction set here
bool choose(const char* name);          // or of the one called so; false if it cannot run here
std::vector<const Ops*> available();

}  // namespace puna
