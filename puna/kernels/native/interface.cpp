// What Python calls, by ctypes: plain C functions on opaque pointers. Arrays are contiguous and belong to the caller.
// Nothing here checks shapes; the Python side does (`native.py`).

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "model.h"

using namespace puna;

namespace {

// Zeros; pages come when they are touched. Small pages: large ones made decoding no faster and loading three times slower.
uint8_t* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    return (uint8_t*)p;
}

float value(const void* data, int source, int64_t i) {
    if (source == FROM_FLOAT) return ((const float*)data)[i];
    if (source == FROM_HALF) return from_half(((const uint16_t*)data)[i]);
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Sixteen rows are placed together: what they have at one place of a row becomes one line of 64 bytes.
typedef uint32_t Line __attribute__((vector_size(64)));

struct Rows16 {
    const uint8_t* row[LANES];  // where each row's data begins; absent rows repeat the first
    int count;

    Line at(int64_t offset) const {
        uint32_t four[LANES];
        for (int l = 0; l < LANES; l++) memcpy(four + l, row[l] + offset, 4);
        Line line;
        memcpy(&line, four, 64);
        return line;
    }
};

void put(uint8_t* to, const Line& line, int count) { memcpy(to, &line, 4 * count); }

uint8_t* block_of(const Matrix& w, int64_t row) {
    return w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK / LANES * w.block_bytes();
}

void place_floats(const Matrix& w, int64_t row, const uint8_t* data, int source) {
    uint8_t* chunk = w.data + row / CHUNK * w.chunk_bytes() + row % CHUNK * 4;
    for (int64_t i = 0; i < w.columns; i++) {
        if (w.kind == FLOAT) {
            const float x = value(data, source, i);
            memcpy(chunk + i * 256, &x, 4);
        } else {
            const uint16_t x = source == FROM_BRAIN ? ((const uint16_t*)data)[i] : to_brain(value(data, source, i));
            memcpy(chunk + i / 2 * 256 + i % 2 * 2, &x, 2);
        }
    }
}

// Numbers of 16 neighbouring rows, the first a multiple of 16; those that need no conversion go line by line.
void place_floats(const Matrix& w, int64_t first, const Rows16& rows, int source) {
    const bool as_they_are = w.kind == FLOAT ? source == FROM_FLOAT : source == FROM_BRAIN && w.columns % 2 == 0;
    if (!as_they_are) {
        for (int l = 0; l < rows.count; l++) place_floats(w, first + l, rows.row[l], source);
        return;
    }
    uint8_t* to = w.data + first / CHUNK * w.chunk_bytes() + first % CHUNK * 4;
    for (int64_t step = 0; step < w.steps(); step++, to += 256) put(to, rows.at(4 * step), rows.count);
}

// `count` codes of a group, which begin in each row at the byte `from`.
void place_bytes(const Rows16& rows, int64_t from, int64_t count, uint8_t* to) {
    const int64_t whole = count / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4, to += 64) put(to, rows.at(from + i) ^ 0x80808080u, rows.count);
    for (int64_t i = whole; i < count; i++)
        for (int l = 0; l < rows.count; l++) to[4 * l + i - whole] = rows.row[l][from + i] ^ 0x80;
}

// 8 columns of a row are 4 bytes there, and 4 bytes of a lane here: steps 2j (low halves) and 2j + 1 (high halves).
// Nibbles n0 n1 | n2 n3 | n4 n5 | n6 n7 (low first) -> bytes (n0, n4) (n1, n5) (n2, n6) (n3, n7)
Line two_steps(const Line& x) {
    const Line y = x >> 16;
    const Line low = (x & 0xf) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
    const Line high = (y & 0xf) | (y & 0xf0) << 4 | (y & 0xf00) << 8 | (y & 0xf000) << 12;
    return low | high << 4;
}

// The same codes as halves: columns of an even step in the low nibbles, those of the odd step after it in the high ones.
void place_halves(const Rows16& rows, int64_t from, int64_t count, uint8_t* upper, uint8_t* lower) {
    const int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8, upper += 64, lower += 64) {
        const Line even = rows.at(from + i) ^ 0x80808080u, odd = rows.at(from + i + 4) ^ 0x80808080u;
        put(upper, (even >> 4 & 0x0f0f0f0f) | (odd & 0xf0f0f0f0), rows.count);
        put(lower, (even & 0x0f0f0f0f) | (odd & 0x0f0f0f0f) << 4, rows.count);
    }
    for (int l = 0; l < rows.count; l++)
        for (int64_t i = whole; i < count; i++) {
            const int j = (int)(i - whole), code = rows.row[l][from + i] ^ 0x80;
            upper[4 * l + j % 4] |= (uint8_t)(code >> 4 << (j / 4 * 4));
            lower[4 * l + j % 4] |= (uint8_t)((code & 15) << (j / 4 * 4));
        }
}

void place_nibbles(const Rows16& rows, int64_t from, int64_t count, uint8_t* to) {
    const int64_t whole = (count + 1) / 2 / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4, to += 64)  // signed codes become codes + 8
        put(to, two_steps(rows.at(from + i) ^ 0x88888888u), rows.count);
    for (int l = 0; l < rows.count; l++)
        for (int64_t i = 2 * whole; i < count; i++) {
            const int j = (int)(i - 2 * whole), code = ((rows.row[l][from + i / 2] >> (i % 2 * 4)) & 15) ^ 8;
            to[4 * l + j % 4] |= (uint8_t)(code << (j / 4 * 4));
        }
}

// 16 columns of a row are 12 bytes: 8 of nibbles, and 4 of which the k-th holds the upper bits of columns k, k + 4, ...
void place_sixes(const Rows16& rows, int64_t from, int64_t count, uint8_t* to) {
    for (int64_t i = 0; i < count; i += 16, from += 12, to += 192) {
        put(to, two_steps(rows.at(from)), rows.count);
        put(to + 64, two_steps(rows.at(from + 4)), rows.count);
        put(to + 128, rows.at(from + 8) ^ 0xaaaaaaaau, rows.count);  // signed codes become codes + 32
    }
}

// Codes as they lie on disk (`quant/groups.py`): 8-bit signed; two of 4 bits to a byte, even columns low; 6-bit ones.
void place_codes(const Matrix& w, int64_t first, const Rows16& rows) {
    for (int64_t g = 0; g < w.groups(); g++) {
        uint8_t* to = block_of(w, first) + w.codes_at(g);
        const int64_t count = std::min(w.group, w.columns - g * w.group);
        if (w.kind == INT8) place_bytes(rows, g * w.group, count, to);
        else if (w.kind == SPLIT) place_halves(rows, g * w.group, count, to, w.lower(first / LANES) + g * w.group_bytes());
        else if (w.kind == INT6) place_sixes(rows, g * w.group / 16 * 12, count, to);
        else place_nibbles(rows, g * w.group / 2, count, to);
    }
}

void place_scales(const Matrix& w, int64_t row, const uint8_t* scales, bool offsets) {
    uint8_t* to = block_of(w, row) + row % LANES * 2 + (offsets ? 32 : 0);
    for (int64_t g = 0; g < w.groups(); g++) memcpy(to + w.scales_at(g), scales + 2 * g, 2);
}

// GGUF's blocks of 32 weights (`blocks.py`): a float16 scale, then 32 signed bytes or 16 bytes of nibbles.
void place_blocks(const Matrix& w, int64_t first, const Rows16& rows) {
    const int64_t bytes = w.kind == INT4 ? 18 : 34;
    for (int64_t g = 0; g < w.groups(); g++) {
        const int64_t at = g * bytes;
        uint8_t* to = block_of(w, first) + w.codes_at(g);
        if (w.kind == SPLIT) {
            place_halves(rows, at + 2, 32, to, w.lower(first / LANES) + g * w.group_bytes());
        } else if (w.kind == INT8) {
            for (int j = 0; j < 8; j++, to += 64) put(to, rows.at(at + 2 + 4 * j) ^ 0x80808080u, rows.count);
        } else {  // weight i < 16 is the low half of byte i, the other sixteen are the high halves
            const Line q[4] = {rows.at(at + 2), rows.at(at + 6), rows.at(at + 10), rows.at(at + 14)};
            for (int j = 0; j < 4; j++, to += 64) {
                const Line even = q[j % 2 * 2] >> (j / 2 * 4), odd = q[j % 2 * 2 + 1] >> (j / 2 * 4);
                put(to, (even & 0x0f0f0f0f) | (odd & 0x0f0f0f0f) << 4, rows.count);
            }
        }
        uint16_t* scales = (uint16_t*)(block_of(w, first) + w.scales_at(g));
        for (int l = 0; l < rows.count; l++) memcpy(scales + l, rows.row[l] + at, 2);
    }
}

// Where rows come from: memory, or a file that is read 16 rows at a time. Row r of the matrix is row order[r] there.
struct Rows {
    const uint8_t* memory;
    int file;
    int64_t begin, bytes;  // where row 0 lies, and bytes of a row
    const int64_t* order;

    bool take(int64_t first, int count, std::vector<uint8_t>& room, Rows16& rows) const {
        rows.count = count;
        if (!memory) room.resize(LANES * bytes);
        if (!memory && !order && !read(first, count, room.data())) return false;
        for (int l = 0; l < LANES; l++) {
            const int64_t r = order ? order[first + (l < count ? l : 0)] : first + (l < count ? l : 0);
            if (memory) rows.row[l] = memory + r * bytes;
            else rows.row[l] = room.data() + (l < count ? l : 0) * bytes;
            if (!memory && order && l < count && !read(r, 1, room.data() + l * bytes)) return false;
        }
        return true;
    }

    bool read(int64_t row, int64_t count, uint8_t* to) const {
        for (int64_t done = 0; done < count * bytes;) {
            const ssize_t n = pread(file, to + done, count * bytes - done, begin + row * bytes + done);
            if (n <= 0) return false;
            done += n;
        }
        return true;
    }
};

// place(first, rows) for every 16 rows of w from `first` on; false if a file ended.
template <typename Place>
bool each16(Team* team, int64_t rows, const Rows& source, const Place& place) {
    std::atomic<bool> whole{true};
    team->run(1, [&](int thread) {
        std::vector<uint8_t> room;
        team->each(thread, 0, (rows + LANES - 1) / LANES, [&](int64_t b) {
            Rows16 taken;
            const int count = (int)std::min<int64_t>(LANES, rows - b * LANES);
            if (!source.take(b * LANES, count, room, taken)) whole = false;
            else place(b * LANES, taken);
        });
    });
    return whole;
}

// Numbers into a packed matrix: 64 rows are laid out in a thread's own memory, then packed.
bool pack_floats(Team* team, const Matrix& w, int64_t first, int64_t rows, const Rows& source, int type) {
    std::atomic<bool> whole{true};
    team->run(1, [&](int thread) {
        std::vector<uint8_t> room, laid(w.steps() * 256 + 64);
        Matrix plain = w;
        plain.packed = false, plain.data = (uint8_t*)up((int64_t)laid.data(), 64);
        team->each(thread, 0, (rows + CHUNK - 1) / CHUNK, [&](int64_t c) {
            const int64_t count = std::min<int64_t>(CHUNK, rows - c * CHUNK);
            if (count < CHUNK || w.columns % 2) memset(plain.data, 0, plain.chunk_bytes());
            for (int64_t b = 0; b < count; b += LANES) {
                Rows16 taken;
                if (!source.take(c * CHUNK + b, (int)std::min<int64_t>(LANES, count - b), room, taken)) whole = false;
                else place_floats(plain, b, taken, type);
            }
            operations().pack(plain.data, w.steps(), w.data + (first / CHUNK + c) * w.chunk_bytes());
        });
    });
    return whole;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// Which functions and layouts these are; Python refuses a library that was built from another version of these files.
API int puna_version() { return 9; }
API int puna_layout() { return LAYOUT; }

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
// packed: of bfloat16; it then takes rows from multiples of 64 on, and memory for what it holds.
API Matrix* puna_matrix(int kind, int offsets, int packed, int64_t rows, int64_t columns, int64_t group) {
    auto w = new Matrix;
    w->kind = (Kind)kind, w->offsets = offsets, w->packed = packed;
    w->rows = rows, w->columns = columns, w->group = group;
    w->mapped = (size_t)w->bytes() + 64;
    w->data = w->pages = reserve(w->mapped);
#if defined(MADV_NOHUGEPAGE)
    if (w->data && packed) madvise(w->data, w->mapped, MADV_NOHUGEPAGE);  // what is left of a chunk's room stays untouched
#endif
    if (w->data) return w;
    delete w;
    return nullptr;
}
// Codes that lie in `file` at `begin` as they lie in memory. The matrix is these pages of the file; where they cannot be had
// so, or lie askew, it is a copy of them. Null if the file ended.
API Matrix* puna_matrix_laid(int kind, int offsets, int64_t rows, int64_t columns, int64_t group, int file, int64_t begin) {
    auto w = new Matrix;
    w->kind = (Kind)kind, w->offsets = offsets;
    w->rows = rows, w->columns = columns, w->group = group;
    const int64_t before = begin % sysconf(_SC_PAGESIZE);
    void* p = begin % 64 ? MAP_FAILED : mmap(nullptr, w->bytes() + before, PROT_READ, MAP_SHARED, file, begin - before);
    if (p != MAP_FAILED) {
        w->of_file = true, w->mapped = (size_t)(w->bytes() + before);
        w->pages = (uint8_t*)p, w->data = w->pages + before;
        madvise(w->pages, w->mapped, MADV_WILLNEED);  // what is not in memory is read in meanwhile
        return w;
    }
    w->mapped = (size_t)w->bytes() + 64;
    w->data = w->pages = reserve(w->mapped);
    if (w->data && Rows{nullptr, file, begin, w->bytes(), nullptr}.read(0, 1, w->data)) return w;
    if (w->data) munmap(w->pages, w->mapped);
    delete w;
    return nullptr;
}
API void puna_matrix_free(Matrix* w) {
    munmap(w->pages, w->mapped);
    delete w;
}
API int64_t puna_matrix_bytes(const Matrix* w) {
    if (!w->packed) return w->of_file ? w->bytes() : (int64_t)w->mapped;
    int64_t bytes = 0;
    for (int64_t c = 0; c < w->chunks(); c++) {
        const auto& head = *(const PackedHead*)w->chunk(c);
        const int64_t packed = w->steps() * PACKED_STEP + (head.odds + 1) * (int64_t)sizeof(Odd);
        bytes += HEAD + (head.plain ? 4 * w->block_bytes() : packed);
    }
    return bytes;
}
// Each of these takes n rows for w's rows from `first` on, a multiple of 16: from `data`, or, if that is null, from `file`
// at `begin`. `order` (n) says which row there is which row here; null: the same. False if the file ended.
API int puna_matrix_floats(Team* team, Matrix* w, int64_t first, int64_t n, const uint8_t* data, int file, int64_t begin,
                           const int64_t* order, int source) {
    const Rows rows{data, file, begin, w->columns * (source == FROM_FLOAT ? 4 : 2), order};
    if (w->packed) return pack_floats(team, *w, first, n, rows, source);
    return each16(team, n, rows, [&](int64_t row, const Rows16& r) { place_floats(*w, first + row, r, source); });
}
API int puna_matrix_codes(Team* team, Matrix* w, int64_t first, int64_t n, const uint8_t* data, int file, int64_t begin,
                          const int64_t* order) {
    const int64_t bytes = w->kind == INT6 ? up(w->columns, 16) / 16 * 12 : w->kind == INT4 ? (w->columns + 1) / 2 : w->columns;
    const Rows rows{data, file, begin, bytes, order};
    return each16(team, n, rows, [&](int64_t row, const Rows16& r) { place_codes(*w, first + row, r); });
}
API int puna_matrix_scales(Team* team, Matrix* w, int64_t first, int64_t n, const uint8_t* data, int file, int64_t begin,
                           const int64_t* order, int offsets) {
    const Rows rows{data, file, begin, w->groups() * 2, order};
    return each16(team, n, rows, [&](int64_t row, const Rows16& r) {
        for (int l = 0; l < r.count; l++) place_scales(*w, first + row + l, r.row[l], offsets);
    });
}
// Rows of GGUF's own blocks: Q4_0 for 4-bit codes, Q8_0 for 8-bit ones, in groups of 32.
API int puna_matrix_blocks(Team* team, Matrix* w, int64_t first, int64_t n, const uint8_t* data, int file, int64_t begin) {
    const Rows rows{data, file, begin, w->groups() * (w->kind == INT4 ? 18 : 34), nullptr};
    return each16(team, n, rows, [&](int64_t row, const Rows16& r) { place_blocks(*w, first + row, r); });
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
    a.wide = w->wide(), a.bias = w->bias();
    a.tile = tile_for(tokens, a.integer ? ops.tile_integers : ops.tile_floats);
    std::vector<uint32_t> data(tokens * a.steps);
    std::vector<float> scales(tokens * a.groups);
    std::vector<int32_t> sums(tokens * a.groups);
    a.data = data.data(), a.scales = scales.data(), a.sums = sums.data();
    const int64_t stride = up(w->rows, CHUNK);
    std::vector<float> padded;
    if (stride != w->rows) padded.resize(tokens * stride);
    float* to = padded.empty() ? y : padded.data();
    team->run(2, [&](int thread) {
        team->each(thread, 0, a.tiles(), [&](int64_t t) { ops.prepare(a, t, x, w->columns, w->columns, nullptr, 0, nullptr); });
        team->wait();
        team->each(thread, 1, w->chunks(), [&](int64_t c) { ops.multiply(*w, c, c + 1, a, to, stride, false); });
    });
    if (!padded.empty())
        for (int64_t t = 0; t < tokens; t++) memcpy(y + t * w->rows, to + t * stride, w->rows * sizeof(float));
}

// ------------------------------------------------------------------------------------------------------- small kernels
API void puna_rms_norm(const float* x, const float* norm, float eps, int64_t columns, int64_t rows, float* y) {
    for (int64_t r = 0; r < rows; r++) operations().rms_norm(x + r * columns, norm, eps, columns, y + r * columns);
}
API void puna_rotate(float* x, const float* turns, int64_t width, int64_t count) {
    std::vector<float> spread(2 * width);
    for (int64_t i = 0; i < count; i++, x += width, turns += width) {
        for (int64_t j = 0; j < width; j++)
            spread[j] = turns[j / 2 * 2], spread[width + j] = j % 2 ? turns[j] : -turns[j + 1];
        operations().rotate(x, spread.data(), width);
    }
}
API void puna_gate(float* y, const float* x, int64_t n) { operations().gate(y, x, n); }
API void puna_top(Team* team, const float* x, int64_t rows, int64_t n, int64_t k, float* values, int32_t* indices,
                  float* log_sums) {
    team->run(1, [&](int thread) {
        team->each(thread, 0, rows, [&](int64_t r) {
            log_sums[r] = operations().top(x + r * n, n, k, values + r * k, indices + r * k);
        });
    });
}

// ------------------------------------------------------------------------------------------------------- GGUF's blocks
// Blocks of GGUF's type `kind` from `blocks` times as many weights, of the type `source`, one behind the other into `out`.
// Returns the size of the largest weight; infinity where one is not finite.
API float puna_encode(Team* team, int kind, const void* weights, int source, int64_t blocks, uint8_t* out) {
    const int64_t width = kind == Q4_K || kind == Q6_K ? 256 : 32, bytes = kind == Q4_0 ? 18 : kind == Q8_0 ? 34 : kind == Q4_K ? 144 : 210;
    std::atomic<float> largest{0};
    team->run(1, [&](int thread) {
        uint8_t made[210 * LANES];
        float most = 0;
        team->each(thread, 0, (blocks + LANES - 1) / LANES, [&](int64_t unit) {
            const int64_t first = unit * LANES, count = std::min<int64_t>(LANES, blocks - first);
            const void* from = (const uint8_t*)weights + first * width * (source == FROM_FLOAT ? 4 : 2);
            most = std::max(most, operations().encode((Blocks)kind, from, (Source)source, (int)count, made));
            memcpy(out + first * bytes, made, count * bytes);
        });
        float before = largest;
        while (before < most && !largest.compare_exchange_weak(before, most)) {}
    });
    return largest;
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
    team->run(1, [&](int thread) {
        std::vector<float> scratch(ops.attend_scratch(c->width));
        team->each(thread, 0, c->heads, [&](int64_t h) {
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
// Spans in arrays: counts, starts, wanted, adapters, where each one's blocks begin in `blocks`, and who is screened.
API void puna_forward(Model* m, const Cache* cache, int64_t n, const int64_t* counts, const int64_t* starts,
                      const int64_t* wanted, const int64_t* adapters, const int64_t* block_at, const int64_t* screened,
                      const int32_t* blocks, const int32_t* tokens, float* out, int hidden) {
    std::vector<Span> spans(n);
    int64_t first = 0;
    for (int64_t i = 0; i < n; i++) {
        spans[i] = {first, counts[i], starts[i], blocks + block_at[i]};
        first += counts[i];
    }
    m->forward(*cache, spans, tokens, wanted, adapters, screened, out, hidden);
}
