// What Python calls, by ctypes: plain C functions on opaque pointers. Arrays are contiguous and belong to the caller.
// Nothing here checks shapes; the Python side does (`native.py`).

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "model.h"

using namespace puna;

namespace {

uint8_t* reserve(size_t bytes) {  // zeros; pages come when they are touched
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    if (bytes >= 4u << 20) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return (uint8_t*)p;
}

enum Source : int { FROM_FLOAT = 0, FROM_BRAIN = 1, FROM_HALF = 2 };

float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    if (e == 0) return (sign ? -1.0f : 1.0f) * (float)m * 5.9604644775390625e-8f;
    const uint32_t bits = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

uint16_t to_brain(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float value(const void* data, int source, int64_t i) {
    if (source == FROM_FLOAT) return ((const float*)data)[i];
    if (source == FROM_HALF) return from_half(((const uint16_t*)data)[i]);
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

void place_floats(const Matrix& w, int64_t row, const void* data, int source, int64_t from) {
    uint8_t* chunk = w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK * 4;
    for (int64_t i = 0; i < w.columns; i++) {
        if (w.kind == FLOAT) {
            const float x = value(data, source, from + i);
            memcpy(chunk + i * 256, &x, 4);
        } else {
            const uint16_t x = source == FROM_BRAIN ? ((const uint16_t*)data)[from + i] : to_brain(value(data, source, from + i));
            memcpy(chunk + i / 2 * 256 + i % 2 * 2, &x, 2);
        }
    }
}

// One row of codes as they lie on disk: 8-bit signed, or two of 4 bits to a byte, even columns low.
void place_codes(const Matrix& w, int64_t row, const uint8_t* codes) {
    const int64_t lane = row % LANES;
    uint8_t* to = w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK / LANES * w.block_bytes() + w.scale_bytes() + lane * 4;
    if (w.kind == INT8) {
        for (int64_t i = 0; i < w.columns; i++) to[i / 4 * 64 + i % 4] = codes[i] ^ 0x80;
        return;
    }
    // 8 columns of a row are 4 bytes there, and 4 bytes of a lane here: steps 2j (low halves) and 2j + 1 (high halves).
    int64_t i = 0;
    for (; i + 8 <= w.columns; i += 8, to += 64, codes += 4) {
        uint32_t x;
        memcpy(&x, codes, 4);
        x ^= 0x88888888u;  // signed codes become codes + 8
        // nibbles n0 n1 | n2 n3 | n4 n5 | n6 n7 (low first) -> bytes (n0, n4) (n1, n5) (n2, n6) (n3, n7)
        const uint32_t low = (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
        const uint32_t y = x >> 16;
        const uint32_t high = (y & 0xf) | (y & 0xf0) << 4 | (y & 0xf00) << 8 | (y & 0xf000) << 12;
        const uint32_t both = low | high << 4;
        memcpy(to, &both, 4);
    }
    for (int64_t j = 0; i + j < w.columns; j++) {
        const int code = ((codes[j / 2] >> (j % 2 * 4)) & 15) ^ 8;
        to[j % 4] |= (uint8_t)(code << (j / 4 * 4));
    }
}

void place_blocks(const Matrix& w, int64_t row, const uint8_t* from, int64_t groups, int64_t bytes) {
    uint8_t* block = w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK / LANES * w.block_bytes();
    uint16_t* scales = (uint16_t*)block + row % LANES;
    uint8_t* to = block + w.scale_bytes() + row % LANES * 4;
    for (int64_t g = 0; g < groups; g++, from += bytes) {
        memcpy(scales + g * LANES, from, 2);
        if (w.kind == INT8) {
            for (int j = 0; j < 8; j++, to += 64) {
                uint32_t four;
                memcpy(&four, from + 2 + 4 * j, 4);
                four ^= 0x80808080u;
                memcpy(to, &four, 4);
            }
            continue;
        }
        uint32_t q[4];  // weight i < 16 is the low half of byte i, the other sixteen are the high halves
        memcpy(q, from + 2, 16);
        for (int j = 0; j < 4; j++, to += 64) {
            const uint32_t even = q[j % 2 * 2] >> (j / 2 * 4) & 0x0f0f0f0f, odd = q[j % 2 * 2 + 1] >> (j / 2 * 4) & 0x0f0f0f0f;
            const uint32_t both = even | odd << 4;
            memcpy(to, &both, 4);
        }
    }
}

void place_scales(const Matrix& w, int64_t row, const uint16_t* scales, const uint16_t* offsets) {
    uint8_t* block = w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK / LANES * w.block_bytes();
    uint16_t* to = (uint16_t*)block + row % LANES;
    for (int64_t g = 0; g < w.groups(); g++) {
        to[g * LANES] = scales[g];
        if (offsets) to[(w.groups() + g) * LANES] = offsets[g];
    }
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API const char* puna_instructions() {  // names, best first, one to a line; the first line is the one in use
    static std::string names;
    names = operations().name;
    for (const Ops* ops : available()) names += std::string("\n") + ops->name;
    return names.c_str();
}
API int puna_choose(const char* name) { return choose(name); }

// ------------------------------------------------------------------------------------------------------------ teams
API Team* puna_team(int threads) { return new Team(threads); }
API void puna_team_free(Team* team) { delete team; }

// --------------------------------------------------------------------------------------------------------- matrices
API Matrix* puna_matrix(int kind, int offsets, int64_t rows, int64_t columns, int64_t group) {
    auto w = new Matrix;
    w->kind = (Kind)kind, w->offsets = offsets, w->rows = rows, w->columns = columns, w->group = group;
    w->mapped = (size_t)(w->chunks() * w->chunk_bytes()) + 64;
    w->data = reserve(w->mapped);
    if (w->data) return w;
    delete w;
    return nullptr;
}
API void puna_matrix_free(Matrix* w) {
    munmap(w->data, w->mapped);
    delete w;
}
API int64_t puna_matrix_bytes(const Matrix* w) { return (int64_t)w->mapped; }
API void puna_matrix_floats(Team* team, Matrix* w, int64_t first, int64_t rows, const void* data, int source) {
    team->run(1, [&](int) {
        team->each(0, (rows + 15) / 16, [&](int64_t b) {
            for (int64_t r = b * 16; r < std::min(rows, b * 16 + 16); r++)
                place_floats(*w, first + r, data, source, r * w->columns);
        });
    });
}
API void puna_matrix_codes(Team* team, Matrix* w, int64_t first, int64_t rows, const uint8_t* codes, int64_t code_stride,
                           const uint16_t* scales, const uint16_t* offsets) {
    const int64_t groups = w->groups();
    team->run(1, [&](int) {
        team->each(0, (rows + 15) / 16, [&](int64_t b) {
            for (int64_t r = b * 16; r < std::min(rows, b * 16 + 16); r++) {
                place_codes(*w, first + r, codes + r * code_stride);
                place_scales(*w, first + r, scales + r * groups, offsets ? offsets + r * groups : nullptr);
            }
        });
    });
}
// Rows of GGUF's own blocks of 32 weights (`blocks.py`): Q4_0 into 4-bit codes, Q8_0 into 8-bit ones, groups of 32.
API void puna_matrix_blocks(Team* team, Matrix* w, int64_t first, int64_t rows, const uint8_t* data) {
    const int64_t groups = w->groups(), bytes = w->kind == INT4 ? 18 : 34;
    team->run(1, [&](int) {
        team->each(0, (rows + 15) / 16, [&](int64_t b) {
            for (int64_t r = b * 16; r < std::min(rows, b * 16 + 16); r++) {
                const uint8_t* from = data + r * groups * bytes;
                place_blocks(*w, first + r, from, groups, bytes);
            }
        });
    });
}
API void puna_embed(const Matrix* w, const int64_t* rows, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) operations().embed(*w, rows[i], out + i * w->columns);
}

// y (tokens, rows) = x (tokens, columns) W^T
API void puna_multiply(Team* team, const Matrix* w, const float* x, int64_t tokens, float* y) {
    const Ops& ops = operations();
    Activations a;
    a.integer = w->integer(), a.brain = w->kind == BRAIN, a.tokens = tokens, a.steps = w->steps();
    a.group = a.integer ? w->group : 0, a.groups = a.integer ? w->groups() : 0;
    a.tile = a.integer ? ops.tile_integers : ops.tile_floats;
    std::vector<uint32_t> data(tokens * a.steps);
    std::vector<float> scales(tokens * a.groups);
    std::vector<int32_t> sums(tokens * a.groups);
    a.data = data.data(), a.scales = scales.data(), a.sums = sums.data();
    const int64_t stride = up(w->rows, CHUNK);
    std::vector<float> padded;
    if (stride != w->rows) padded.resize(tokens * stride);
    float* to = padded.empty() ? y : padded.data();
    team->run(2, [&](int) {
        team->each(0, a.tiles(), [&](int64_t t) { ops.prepare(a, t, x, w->columns, w->columns, nullptr, 0); });
        team->wait();
        team->each(1, w->chunks(), [&](int64_t c) { ops.multiply(*w, c, c + 1, a, to, stride, false); });
    });
    if (!padded.empty())
        for (int64_t t = 0; t < tokens; t++) memcpy(y + t * w->rows, to + t * stride, w->rows * sizeof(float));
}

// ------------------------------------------------------------------------------------------------------- small kernels
API void puna_rms_norm(const float* x, const float* norm, float eps, int64_t columns, int64_t rows, float* y) {
    for (int64_t r = 0; r < rows; r++) operations().rms_norm(x + r * columns, norm, eps, columns, y + r * columns);
}
API void puna_rotate(float* x, const float* turns, int64_t width, int64_t count) {
    for (int64_t i = 0; i < count; i++) operations().rotate(x + i * width, turns + i * width, width);
}
API void puna_gate(float* y, const float* x, int64_t n) { operations().gate(y, x, n); }
API void puna_top(Team* team, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices,
                  float* log_sums) {
    team->run(1, [&](int) {
        team->each(0, rows, [&](int64_t r) {
            log_sums[r] = operations().top(x + r * n, n, k, values + r * k, indices + r * k);
        });
    });
}

// ------------------------------------------------------------------------------------------------------------- cache
API Cache* puna_cache(int kind, int64_t layers, int64_t blocks, int64_t heads, int64_t width) {
    auto c = new Cache;
    c->kind = (Kind)kind, c->layers = layers, c->blocks = blocks, c->heads = heads, c->width = width;
    c->mapped = (size_t)(layers * blocks * heads * c->unit_bytes()) + 64;
    void* p = mmap(nullptr, c->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) {
        c->data = (uint8_t*)p;
        return c;
    }
    delete c;
    return nullptr;
}
API void puna_cache_free(Cache* c) {
    munmap(c->data, c->mapped);
    delete c;
}
API void puna_cache_forget(Cache* c) { madvise(c->data, c->mapped, MADV_DONTNEED); }
API int64_t puna_cache_block_bytes(const Cache* c) { return c->layers * c->heads * c->unit_bytes(); }
API void puna_cache_copy(Cache* c, int64_t from, int64_t to) {
    for (int64_t l = 0; l < c->layers; l++) memcpy(c->unit(l, to, 0), c->unit(l, from, 0), c->heads * c->unit_bytes());
}
// Keys and values (count, heads, width) of positions start, start + 1, … of a sequence; they are not turned.
API void puna_cache_write(const Cache* c, int64_t layer, const int32_t* blocks, int64_t start, int64_t count,
                          const float* k, const float* v) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < c->heads; h++)
            operations().write(*c, layer, h, blocks[(start + i) / 16], (int)((start + i) % 16),
                               k + (i * c->heads + h) * c->width, v + (i * c->heads + h) * c->width);
}
// out, q (count, heads, width): queries at positions start, start + 1, …
API void puna_attend(Team* team, const Cache* c, int64_t layer, const int32_t* blocks, int64_t start, int64_t count,
                     int64_t heads, const float* q, float* out) {
    const Ops& ops = operations();
    team->run(1, [&](int) {
        std::vector<float> scratch(ops.attend_scratch(c->width));
        team->each(0, c->heads, [&](int64_t h) {
            ops.attend({c, layer, h, {0, count, start, blocks}, 0, count, heads, q, heads * c->width, out,
                        heads * c->width, scratch.data()});
        });
    });
}

// ------------------------------------------------------------------------------------------------------------- model
// sizes: layers, dim, ffn, heads, kv_heads, width, vocabulary
API Model* puna_model(const int64_t* sizes, float eps, const float* frequencies, int threads) {
    return new Model({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], eps}, frequencies, threads);
}
API void puna_model_free(Model* m) { delete m; }
API Team* puna_model_team(Model* m) { return &m->team; }
API void puna_model_layer(Model* m, int64_t layer, Matrix* const* parts, const float* norm1, const float* norm2) {
    for (int p = 0; p < PARTS; p++) m->layers[layer][p] = parts[p];
    m->norms[layer][0].assign(norm1, norm1 + m->shape.dim);
    m->norms[layer][1].assign(norm2, norm2 + m->shape.dim);
}
API void puna_model_ends(Model* m, const Matrix* embedding, const Matrix* output, const float* norm) {
    m->embedding = embedding, m->output = output;
    m->last_norm.assign(norm, norm + m->shape.dim);
}
API int64_t puna_model_adapter(Model* m) {
    m->adapters.push_back(std::make_unique<Adapter>());
    m->adapters.back()->layers.resize(m->shape.layers);
    return (int64_t)m->adapters.size() - 1;
}
API void puna_model_adapt(Model* m, int64_t adapter, int64_t layer, int part, int64_t rank, int64_t inputs,
                          int64_t outputs, const float* down, const float* up) {
    auto& pair = m->adapters[adapter]->layers[layer][part];
    pair.rank = rank;
    pair.down.assign(down, down + rank * inputs);
    pair.up.assign(up, up + outputs * rank);
}
// Spans in arrays: counts, starts, wanted, adapters, and where each one's blocks begin in `blocks`.
API void puna_forward(Model* m, const Cache* cache, int64_t n, const int64_t* counts, const int64_t* starts,
                      const int64_t* wanted, const int64_t* adapters, const int64_t* block_at, const int32_t* blocks,
                      const int32_t* tokens, float* out, int hidden) {
    std::vector<Span> spans(n);
    int64_t first = 0;
    for (int64_t i = 0; i < n; i++) {
        spans[i] = {first, counts[i], starts[i], blocks + block_at[i]};
        first += counts[i];
    }
    m->forward(*cache, spans, tokens, wanted, adapters, out, hidden);
}
