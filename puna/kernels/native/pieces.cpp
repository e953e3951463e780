// Byte-pair merging of a text by a table of pairs: what `tokenizer/merging.py` does, for whole texts at once.
//
// A symbol is a number: a character that occurs in some piece, or a piece. Neighbours whose pair has a rank are joined,
// the lowest rank first, the leftmost among equals. Where no piece reaches from one word into the next, each word is
// merged on its own: the short ones by looking through their few pairs again and again, the others with a queue.

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <queue>
#include <vector>

namespace {

constexpr int32_t NONE = -1, NEVER = std::numeric_limits<int32_t>::max();
constexpr int64_t SHORT = 40;  // symbols

struct Pair {
    uint64_t both = ~0ull;
    int32_t rank = NEVER, joined = NONE;
};

struct Pieces {
    std::vector<int32_t> symbol;   // of a character; NONE beyond its end
    std::vector<int32_t> id;       // of a symbol; NONE where it is no piece
    std::vector<Pair> pairs;       // open addressing; its size is a power of two
    std::vector<int32_t> bytes;    // ids of the 256 bytes, or none
    int32_t unknown;
    uint32_t space;                // words begin with it; 0: the text is one word

    static uint64_t spread(uint64_t both) { return (both ^ both >> 29) * 0x9e3779b97f4a7c15ull; }
    static uint64_t key(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }
    uint64_t slot(uint64_t both) const {
        const uint64_t mask = pairs.size() - 1;
        uint64_t at = spread(both) >> 20 & mask;
        while (pairs[at].both != both && pairs[at].both != ~0ull) at = (at + 1) & mask;
        return at;
    }
    const Pair& pair(int32_t left, int32_t right) const {
        static const Pair nothing;
        return left == NONE || right == NONE ? nothing : pairs[slot(key(left, right))];
    }

    int32_t* put(int32_t symbol, uint32_t character, int32_t* out) const {
        if (symbol != NONE && id[symbol] != NONE) return *out++ = id[symbol], out;
        if (bytes.empty()) return *out++ = unknown, out;
        const uint32_t c = character;  // only a single character can be no piece
        if (c < 0x80) *out++ = bytes[c];
        else if (c < 0x800) *out++ = bytes[0xc0 | c >> 6];
        else if (c < 0x10000) *out++ = bytes[0xe0 | c >> 12], *out++ = bytes[0x80 | (c >> 6 & 63)];
        else *out++ = bytes[0xf0 | c >> 18], *out++ = bytes[0x80 | (c >> 12 & 63)], *out++ = bytes[0x80 | (c >> 6 & 63)];
        if (c >= 0x80) *out++ = bytes[0x80 | (c & 63)];
        return out;
    }

    int32_t* word(const uint32_t* text, int64_t n, int32_t* out) const {
        if (n > SHORT) return long_word(text, n, out);
        int32_t symbols[SHORT], ranks[SHORT], joined[SHORT];
        uint32_t first[SHORT];
        for (int64_t i = 0; i < n; i++) symbols[i] = text[i] < symbol.size() ? symbol[text[i]] : NONE, first[i] = text[i];
        const auto look = [&](int64_t i) {
            const Pair& p = pair(symbols[i], symbols[i + 1]);
            ranks[i] = p.rank, joined[i] = p.joined;
        };
        for (int64_t i = 0; i + 1 < n; i++) look(i);
        while (n > 1) {
            int64_t best = 0;
            for (int64_t i = 1; i + 1 < n; i++)
                if (ranks[i] < ranks[best]) best = i;
            if (ranks[best] == NEVER) break;
            symbols[best] = joined[best];
            const int64_t after = n - best - 2;
            memmove(symbols + best + 1, symbols + best + 2, after * sizeof(int32_t));
            memmove(first + best + 1, first + best + 2, after * sizeof(uint32_t));
            memmove(ranks + best + 1, ranks + best + 2, after * sizeof(int32_t));
            memmove(joined + best + 1, joined + best + 2, after * sizeof(int32_t));
            n--;
            if (best > 0) look(best - 1);
            if (best + 1 < n) look(best);
        }
        for (int64_t i = 0; i < n; i++) out = put(symbols[i], first[i], out);
        return out;
    }

    int32_t* long_word(const uint32_t* text, int64_t n, int32_t* out) const {
        std::vector<int32_t> symbols(n);
        std::vector<int64_t> before(n), after(n);
        std::vector<bool> gone(n);
        struct Wait {
            int32_t rank;
            int64_t place;
            bool operator>(const Wait& o) const { return rank != o.rank ? rank > o.rank : place > o.place; }
        };
        std::priority_queue<Wait, std::vector<Wait>, std::greater<Wait>> queue;
        const auto offer = [&](int64_t left, int64_t right) {
            const int32_t rank = pair(symbols[left], symbols[right]).rank;
            if (rank != NEVER) queue.push({rank, left});
        };
        for (int64_t i = 0; i < n; i++) {
            symbols[i] = text[i] < symbol.size() ? symbol[text[i]] : NONE;
            before[i] = i - 1, after[i] = i + 1;
        }
        for (int64_t i = 0; i + 1 < n; i++) offer(i, i + 1);
        while (!queue.empty()) {
            const Wait next = queue.top();
            queue.pop();
            const int64_t left = next.place, right = after[left];
            if (gone[left] || right == n) continue;
            const Pair& p = pair(symbols[left], symbols[right]);
            if (p.rank != next.rank) continue;
            symbols[left] = p.joined, gone[right] = true;
            after[left] = after[right];
            if (after[left] < n) before[after[left]] = left, offer(left, after[left]);
            if (before[left] >= 0) offer(before[left], left);
        }
        for (int64_t i = 0; i < n; i = after[i]) out = put(symbols[i], text[i], out);
        return out;
    }
};

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// The first `characters` symbols are characters. ids (symbols); pairs in four arrays; bytes (256) or null.
API Pieces* puna_pieces(const uint32_t* text, int64_t characters, const int32_t* ids, int64_t symbols, const int32_t* left,
                        const int32_t* right, const int32_t* rank, const int32_t* joined, int64_t pairs,
                        const int32_t* bytes, int32_t unknown, uint32_t space) {
    auto p = new Pieces;
    p->unknown = unknown, p->space = space;
    for (int64_t i = 0; i < characters; i++) {
        if (text[i] >= p->symbol.size()) p->symbol.resize(text[i] + 1, NONE);
        p->symbol[text[i]] = (int32_t)i;
    }
    p->id.assign(ids, ids + symbols);
    if (bytes) p->bytes.assign(bytes, bytes + 256);
    int64_t room = 16;
    while (room < 2 * pairs) room *= 2;
    p->pairs.resize(room);
    for (int64_t i = 0; i < pairs; i++) {
        const uint64_t both = Pieces::key(left[i], right[i]);
        p->pairs[p->slot(both)] = {both, rank[i], joined[i]};
    }
    return p;
}
API void puna_pieces_free(Pieces* p) { delete p; }
// Ids of a text of n characters into `out`, which has room for 4 n; returns how many.
API int64_t puna_pieces_encode(const Pieces* p, const uint32_t* text, int64_t n, int32_t* out) {
    int32_t* const begin = out;
    for (int64_t i = 0, end; i < n; i = end) {
        end = p->space ? i + 1 : n;
        while (end < n && !(text[end] == p->space && text[end - 1] != p->space)) end++;
        out = p->word(text + i, end - i, out);
    }
    return out - begin;
}
