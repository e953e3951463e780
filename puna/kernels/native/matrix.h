// A weight matrix as the kernels read it: cut into chunks of 64 rows, each one unbroken run of memory.
//
// A processor multiplies 16 rows at once, a lane for each. A *step* is as many columns as fit into 4 bytes of a lane: one
// float32, two bfloat16, four 8-bit codes. Sixteen lanes of a step are 64 bytes, one cache line.
//
//   floats, bfloat16    chunk = step by step, the 64 rows: [step][4][16 lanes][4 bytes]
//   packed bfloat16     the same numbers in three quarters of the room: packed.h
//   8-bit codes         chunk = 4 blocks of 16 rows; block = group by group, a group's codes being [step][16 lanes][4
//                       bytes], each code stored + 128. Before every two groups stands a line of their scales, [2][16]
//                       float16; where there are offsets, before every group one of its scales and its offsets
//   4-bit codes         the same with two steps to a line: the even one in the low nibbles, each code stored + 8
//   6-bit codes         four steps to three lines: two of nibbles, then one of the upper two bits, those of the first step
//                       lowest in each byte; each code stored + 32
//   split 8-bit codes   the upper halves of all chunks as 4-bit codes would lie, with the scales; after them the lower
//                       halves in the same order, without scales. Read alone, upper halves stand for the middle of the
//                       sixteen codes that have them: a matrix of 4 bits (UPPER). Read together they are the 8-bit codes.
//                       They have no offsets
//
// So a product reads one stream from its first byte to its last, which is what processors foresee best: with the scales
// in a place of their own a lone token's products ran at two thirds of this speed (docs/log.md).
//
// What a row lacks of a whole group and a matrix of a whole chunk is filled with codes of 0.
//
// The activations that meet it are laid out by tiles of a few tokens: [step][token of the tile][4 bytes], so that one
// load can spread a token's step over all lanes. For integers they are quantised in the weights' groups, with a scale
// for each group, and the sum of its codes times -bias, which takes the surplus of the weights' codes off: [group][token].
// Those that meet 4-bit codes have one scale for all groups within WIDE columns: their rounding is lost in the weights'.

#pragma once
#include "training_ops.h"
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace puna {

enum Kind : int { FLOAT = 0, BRAIN = 1, INT8 = 2, INT4 = 3, INT6 = 4, SPLIT = 5, UPPER = 6 };
enum Blocks : int { Q4_0 = 2, Q8_0 = 8, Q4_K = 12, Q6_K = 14 };  // GGUF's types, by its numbers
enum Source : int { FROM_FLOAT = 0, FROM_BRAIN = 1, FROM_HALF = 2 };

constexpr int LAYOUT = 1;  // of codes, which files have in it (quant/layout.py): another layout is another number
constexpr int CHUNK = 64;  // rows
constexpr int LANES = 16;
constexpr int64_t WIDE = 128;  // columns

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline uint16_t to_brain(float x) {  // bfloat16: round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 0) return (sign ? -1.0f : 1.0f) * std::ldexp((float)m, -24);
    const uint32_t bits = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint16_t to_half(float x) {  // float16 of a number: round to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and above
    if (bits < 0x38800000) {                                   // subnormal: steps of 2^-24
        memcpy(&x, &bits, 4);
        return (uint16_t)(sign | (uint16_t)std::nearbyint(x * 16777216.0f));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
}

// Packed bfloat16 (packed.h): what stands before a chunk, and a weight that has none of the table's upper bytes.
struct PackedHead {
    uint8_t high[16];
    uint32_t odds, plain;  // how many weights are odd; whether the chunk is bfloat16 as it is
    uint32_t unused[10];
};
struct Odd {
    uint32_t step;
    uint8_t place, high;  // which of the step's 128 weights, its upper byte
};
constexpr int64_t HEAD = sizeof(PackedHead), PACKED_STEP = 192;

// What is added to codes of a kind where they are stored without sign; those of 8 bits are 128 more.
constexpr int bias_of(Kind kind) { return kind == INT4 ? 8 : kind == INT6 ? 32 : 128; }

struct Matrix {
    Kind kind = FLOAT;
    bool offsets = false, packed = false;
    int64_t rows = 0, columns = 0, group = 0;
    uint8_t* data = nullptr;
    uint8_t* pages = nullptr;  // what was mapped: memory, or the part of a file that `data` lies in
    size_t mapped = 0;         // bytes of it
    bool of_file = false;

    bool integer() const { return kind >= INT8; }
    int bias() const { return bias_of(kind); }
    int64_t chunks() const { return up(rows, CHUNK) / CHUNK; }
    int64_t groups() const { return up(columns, group) / group; }
    int64_t steps() const {
        return kind == FLOAT ? columns : kind == BRAIN ? up(columns, 2) / 2 : groups() * group / 4;
    }
    bool halves() const { return kind == INT4 || kind == SPLIT || kind == UPPER; }  // codes lie as nibbles
    int64_t group_bytes() const { return group * (halves() ? 8 : kind == INT6 ? 12 : 16); }  // of 16 rows' codes
    int64_t wide() const { return kind == INT4 && WIDE % group == 0 ? WIDE / group : 1; }  // groups with one scale of the activations
    int64_t groups_a_line() const { return offsets ? 1 : 2; }                // of scales
    int64_t scales_at(int64_t g) const {                                     // in a block; offsets come right after
        const int64_t n = groups_a_line();
        return g / n * (64 + n * group_bytes()) + g % n * 32;
    }
    int64_t codes_at(int64_t g) const {
        const int64_t n = groups_a_line();
        return g / n * (64 + n * group_bytes()) + 64 + g % n * group_bytes();
    }
    int64_t block_bytes() const { return integer() ? block_bytes(groups()) : steps() * 64; }  // of 16 rows
    int64_t block_bytes(int64_t groups) const {  // without a division, for kernels
        return groups * group_bytes() + 64 * (offsets ? groups : (groups + 1) / 2);
    }
    int64_t chunk_bytes() const { return 4 * block_bytes() + (packed ? HEAD : 0); }  // packed: the room that it has
    const uint8_t* chunk(int64_t c) const { return data + c * chunk_bytes(); }
    // Of a split matrix: the lower halves of block b (16 rows), and the matrix of the upper halves.
    int64_t lower_bytes() const { return kind == SPLIT ? groups() * group_bytes() : 0; }
    uint8_t* lower(int64_t b) const { return data + chunks() * chunk_bytes() + b * lower_bytes(); }
    int64_t bytes() const { return chunks() * (chunk_bytes() + 4 * lower_bytes()); }
    Matrix upper() const {
        Matrix m = *this;
        m.kind = UPPER;
        return m;
    }
};

// Activations for matrices of one kind and group.
struct Activations {
    bool integer = false, brain = false;
    int64_t tokens = 0, steps = 0, group = 0, groups = 0, wide = 1;
    int bias = 0;               // of the weights' codes
    int tile = 1;               // tokens of a tile; the last one may have fewer
    uint32_t* data = nullptr;   // tile t begins at start(t) * steps
    float* scales = nullptr;    // at start(t) * groups
    int32_t* sums = nullptr;

    int64_t tiles() const { return (tokens + tile - 1) / tile; }
    int64_t start(int64_t t) const { return t * tile < tokens ? t * tile : tokens; }  // the first token of tile t
    int size(int64_t t) const { return (int)(start(t + 1) - start(t)); }
};

// Tokens of a tile where a kernel takes `most`: tiles as alike as they can be, for small ones are slower.
inline int tile_for(int64_t tokens, int most) {
    const int64_t tiles = tokens > 0 ? (tokens + most - 1) / most : 1;
    return (int)((tokens + tiles - 1) / tiles > 0 ? (tokens + tiles - 1) / tiles : 1);
}

// The form of a cache of keys and values. A block holds 16 positions of one layer and one key/value head:
//   keys     [step of the head][16 positions][4 bytes]      so that a lane is a position
//   values   float32 [16][E], bfloat16 [8 pairs][E][2], 8-bit [16][E]
//   8-bit ones are followed by a float32 scale for each position: 16 of the keys, 16 of the values.
struct Cache {
    Kind kind = FLOAT;
    int64_t layers = 0, blocks = 0, heads = 0, width = 0;  // width: E, of one head
    uint8_t* data = nullptr;
    size_t mapped = 0;

    int64_t half_bytes() const { return 16 * width * (kind == FLOAT ? 4 : kind == BRAIN ? 2 : 1); }
    int64_t unit_bytes() const { return 2 * half_bytes() + (kind == INT8 ? 128 : 0); }
    uint8_t* unit(int64_t layer, int64_t block, int64_t head) const {
        return data + ((layer * blocks + block) * heads + head) * unit_bytes();
    }
};

// The new tokens of one sequence in a batch, as the engine gives them.
struct Span {
    int64_t first;          // its first token's row in the batch
    int64_t count, start;   // new tokens; tokens that are in the cache already
    const int32_t* blocks;  // its cache blocks in order
};

// Queries of one span that attend with one key/value head.
struct Attend {
    const Cache* cache;
    int64_t layer, head;
    Span span;
    int64_t from, to;       // which of the span's new tokens
    int64_t heads;          // query heads in all
    const float* q;         // (tokens of the batch, q_stride)
    int64_t q_stride;
    float* out;             // (tokens of the batch, out_stride)
    int64_t out_stride;
    float* scratch;         // attend_scratch() floats
};

// What each instruction set provides.
struct Ops {
    const char* name;
    int tile_integers, tile_floats;

    // y += or = W x for chunks [from, to) of rows, all tokens; y (tokens, stride).
    void (*multiply)(const Matrix&, int64_t from, int64_t to, const Activations&, float* y, int64_t stride, bool add);
    // y = silu(W1 x) * (W3 x), chunk by chunk.
    void (*swiglu)(const Matrix& w1, const Activations& x1, const Matrix& w3, const Activations& x3, int64_t from,
                   int64_t to, float* y, int64_t stride);
    void (*gate)(float* y, const float* x, int64_t n);  // y = silu(y) * x
    // Lay tile t of x (tokens, stride) out, normalised by RMSNorm first if `norm` is given. `soon`: weights that are read
    // next, to be asked for meanwhile, or null.
    void (*prepare)(Activations&, int64_t t, const float* x, int64_t stride, int64_t columns, const float* norm,
                    float eps, const uint8_t* soon);
    void (*rms_norm)(const float* x, const float* norm, float eps, int64_t columns, float* y);
    void (*rotate)(float* x, const float* turns, int64_t width);  // pairs (2i, 2i + 1) of a head; turns (2 E): attention.h
    void (*write)(const Cache&, int64_t layer, int64_t head, int64_t block, int slot, const float* k, const float* v);
    void (*attend)(const Attend&);
    int64_t (*attend_scratch)(int64_t width);
    void (*embed)(const Matrix&, int64_t row, float* out);
    // y (16) = block b (16 rows) of a split matrix times token t of `a`, each of whose tiles is one token.
    void (*refine)(const Matrix&, int64_t b, const Activations& a, int64_t t, float* y);
    void (*maxima)(const float* x, int64_t n, float* out);  // the largest of every 16 of 16 n numbers
    void (*pack)(const uint8_t* plain, int64_t steps, uint8_t* to);  // a chunk of bfloat16
    // 16 blocks of GGUF's type `kind` from the weights of `count`; returns the size of the largest.
    float (*encode)(Blocks kind, const void* weights, Source source, int count, uint8_t* out);
    // The k largest of x (n), descending, ties by the lower index; returns log(sum(exp(x))).
    float (*top)(const float* x, int64_t n, int64_t k, float* values, int32_t* indices);
    const TrainingOps* training;
};

}  // namespace puna
