// Every instruction set that this processor has beside plain C++: the same products, norms, attention and top values.
// For processors on which the Python tests cannot run; exit code 1 and a line for each disagreement.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "model.h"

using namespace puna;

static float uniform() { return (float)std::rand() / (float)RAND_MAX * 2 - 1; }
static int failures = 0;

static void check(const char* ops, const char* what, const std::vector<float>& a, const std::vector<float>& b, float limit) {
    double difference = 0, size = 1e-30;
    for (size_t i = 0; i < a.size(); i++) difference += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
    const double relative = std::sqrt(difference / size);
    if (relative <= limit) return;
    std::printf("%s: %s differs by %.2e\n", ops, what, relative);
    failures++;
}

static std::vector<float> product(const Ops& ops, const Matrix& w, const std::vector<float>& x, int64_t tokens) {
    Activations a;
    a.integer = w.integer(), a.brain = w.kind == BRAIN, a.tokens = tokens, a.steps = w.steps();
    a.group = a.integer ? w.group : 0, a.groups = a.integer ? w.groups() : 0, a.wide = w.wide(), a.bias = w.bias();
    a.tile = a.integer ? ops.tile_integers : ops.tile_floats;
    std::vector<uint32_t> data(tokens * a.steps);
    std::vector<float> scales(tokens * a.groups), y(tokens * up(w.rows, CHUNK));
    std::vector<int32_t> sums(tokens * a.groups);
    a.data = data.data(), a.scales = scales.data(), a.sums = sums.data();
    for (int64_t t = 0; t < a.tiles(); t++) ops.prepare(a, t, x.data(), w.columns, w.columns, nullptr, 0, nullptr);
    ops.multiply(w, 0, w.chunks(), a, y.data(), up(w.rows, CHUNK), false);
    return y;
}

static bool is_scale(const Matrix& w, int64_t at) {  // whether a block's byte belongs to a scale or an offset
    for (int64_t g = 0; g < w.groups(); g++)
        if (at >= w.scales_at(g) && at < w.scales_at(g) + (w.offsets ? 64 : 32)) return true;
    return false;
}

static void products(const Ops& ops, const Ops& plain, Kind kind, bool offsets) {
    Matrix w;
    w.kind = kind, w.offsets = offsets, w.rows = 128, w.columns = 160, w.group = 32;
    std::vector<uint8_t> memory(w.bytes() + 64);
    for (uint8_t& byte : memory) byte = std::rand();
    w.data = memory.data();
    for (int64_t c = 0; c < w.chunks(); c++)
        for (int64_t i = 0; i < w.chunk_bytes(); i++) {
            uint8_t* p = w.data + c * w.chunk_bytes() + i;
            const int64_t in_block = i % w.block_bytes();
            if (w.integer() && is_scale(w, in_block)) *p = i % 2 ? 0x20 | (std::rand() & 3) : std::rand();
            else if (w.integer()) *p = std::rand();
            else *p = i % (kind == FLOAT ? 4 : 2) == (kind == FLOAT ? 3 : 1) ? 0x3c | (std::rand() & 0x80) : std::rand();
        }
    std::vector<float> x(7 * w.columns);
    for (float& v : x) v = uniform();
    const char* what = kind == INT8 ? "an 8-bit product" : kind == INT6 ? "a 6-bit product" : kind == INT4 ? "a 4-bit product"
                    : kind == SPLIT ? "a product of halves" : kind == UPPER ? "a product of upper halves" : "a product of floats";
    for (int64_t tokens = 1; tokens <= 7; tokens++)
        check(ops.name, what, product(ops, w, x, tokens), product(plain, w, x, tokens), 1e-5f);
}

// A matrix of bfloat16, and packed: the same bytes as plain C++ packs, and products of the same bits as unpacked.
static void packed(const Ops& ops, const Ops& plain) {
    Matrix w, p;
    w.kind = BRAIN, w.rows = 128, w.columns = 160;
    p = w, p.packed = true;
    std::vector<uint8_t> memory(w.chunks() * w.chunk_bytes() + 64), mine(p.chunks() * p.chunk_bytes() + 64), others(mine.size());
    w.data = memory.data(), p.data = mine.data();
    for (int64_t i = 0; i < w.rows * w.columns; i++) {
        uint16_t bits = to_brain(uniform() * uniform() * uniform());
        if (i % 1000 == 7) bits = (uint16_t)std::rand();  // zeros, infinities, whatever
        memcpy(w.data + 2 * i, &bits, 2);
    }
    for (int64_t c = 0; c < w.chunks(); c++) {
        ops.pack(w.chunk(c), w.steps(), mine.data() + c * p.chunk_bytes());
        plain.pack(w.chunk(c), w.steps(), others.data() + c * p.chunk_bytes());
    }
    if (mine != others) std::printf("%s: packs otherwise\n", ops.name), failures++;
    if (((const PackedHead*)p.chunk(1))->plain) std::printf("%s: does not pack\n", ops.name), failures++;
    for (const int64_t tokens : {1, 3, 40}) {
        std::vector<float> x(tokens * w.columns);
        for (float& v : x) v = uniform();
        const std::vector<float> a = product(ops, w, x, tokens), b = product(ops, p, x, tokens);
        if (memcmp(a.data(), b.data(), a.size() * 4)) std::printf("%s: another packed product\n", ops.name), failures++;
    }
    std::vector<float> a(w.columns), b(w.columns);
    for (int64_t row = 0; row < w.rows; row++) {
        ops.embed(w, row, a.data()), ops.embed(p, row, b.data());
        if (memcmp(a.data(), b.data(), a.size() * 4)) std::printf("%s: another packed row\n", ops.name), failures++;
    }
}

static std::vector<float> attention(const Ops& ops, Kind kind, const std::vector<float>& k, const std::vector<float>& v,
                                    const std::vector<float>& q, int64_t n, int64_t width) {
    Cache cache;
    cache.kind = kind, cache.layers = 1, cache.blocks = (n + 15) / 16, cache.heads = 1, cache.width = width;
    std::vector<uint8_t> memory(cache.blocks * cache.unit_bytes());
    cache.data = memory.data();
    std::vector<int32_t> blocks;
    for (int64_t b = cache.blocks; b--;) blocks.push_back((int32_t)b);
    for (int64_t i = 0; i < n; i++)
        ops.write(cache, 0, 0, blocks[i / 16], (int)(i % 16), k.data() + i * width, v.data() + i * width);
    std::vector<float> out(q.size()), scratch(ops.attend_scratch(width));
    ops.attend({&cache, 0, 0, {0, n, 0, blocks.data()}, 0, n, 2, q.data(), 2 * width, out.data(), 2 * width, scratch.data()});
    return out;
}

int main() {
    const Ops& plain = *available().back();
    for (const Ops* ops : available()) {
        for (const bool offsets : {false, true}) for (const Kind kind : {INT8, INT6, INT4}) products(*ops, plain, kind, offsets);
        products(*ops, plain, SPLIT, false), products(*ops, plain, UPPER, false);
        products(*ops, plain, FLOAT, false), products(*ops, plain, BRAIN, false), packed(*ops, plain);
        const int64_t n = 100, width = 80;
        std::vector<float> k(n * width), v(n * width), q(n * 2 * width);
        for (auto* values : {&k, &v, &q})
            for (float& value : *values) value = uniform() * 3;
        check(ops->name, "attention over floats", attention(*ops, FLOAT, k, v, q, n, width), attention(plain, FLOAT, k, v, q, n, width), 1e-5f);
        check(ops->name, "attention over bfloat16", attention(*ops, BRAIN, k, v, q, n, width), attention(plain, BRAIN, k, v, q, n, width), 5e-3f);
        check(ops->name, "attention over codes", attention(*ops, INT8, k, v, q, n, width), attention(plain, INT8, k, v, q, n, width), 5e-3f);
        std::vector<float> a(160), b(160), norm(160, 0.5f), values(9), others(9);
        ops->rms_norm(k.data(), norm.data(), 1e-5f, 160, a.data()), plain.rms_norm(k.data(), norm.data(), 1e-5f, 160, b.data());
        check(ops->name, "the norm", a, b, 1e-5f);
        a = b;
        ops->gate(a.data(), v.data(), 160), plain.gate(b.data(), v.data(), 160);
        check(ops->name, "the gate", a, b, 1e-5f);
        std::vector<int32_t> at(9), other_at(9);
        const float sum = ops->top(k.data(), (int64_t)k.size(), 9, values.data(), at.data());
        const float other = plain.top(k.data(), (int64_t)k.size(), 9, others.data(), other_at.data());
        check(ops->name, "the sum of exponentials", {sum}, {other}, 1e-5f);
        if (at != other_at) std::printf("%s: other top values\n", ops->name), failures++;
        std::printf("%s\n", ops->name);
    }
    return failures != 0;
}
