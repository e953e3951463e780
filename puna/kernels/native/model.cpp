// One forward pass: all threads walk through it together.
//
//   for each layer    norm, quantise   q, k, v     | turn q and k, cache k and v | attend | quantise, wo, add
//                     norm, quantise   silu(w1 x) w3 x                                    | quantise, w2, add
//   at the end        norm, quantise   output, of the rows that are wanted                         head.h
//
// A bar is where threads wait for each other. Of the last layer, tokens that no logits come from only need keys and values;
// from there on the pass is one of the others alone. A lone token's activations are quantised by every thread for itself,
// which is faster than to wait for one of them; and its w1 x and w3 x are made one after the other, with a bar before they
// are joined, so that each matrix is one stream.

#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "workspace.h"

namespace puna {

Model::Model(const Shape& s, const float* f, int threads)
    : shape(s), team(threads), frequencies(f, f + s.width / 2), layers(s.layers), norms(s.layers),
      space_(std::make_unique<Workspace>()) {
    for (auto& layer : layers) layer.fill(nullptr);
    space_->scratch.resize(team.size());
    space_->own.resize(team.size());
}

Model::~Model() = default;

// The state of one call; its methods are called by all threads.
struct Model::Pass {
    Model& model;
    const Ops& ops;
    const Cache& cache;
    const std::vector<Span>& spans;
    const int64_t* adapter;
    Workspace& space;
    int64_t tokens;
    int64_t dim, ffn, q_rows, kv_rows, mixed_rows;  // padded to chunks: q | k | v side by side in `mixed`
    bool cached = false;  // whether the cache has the tokens' keys and values of this layer

    const Shape& shape() const { return model.shape; }

    // The activations for each of `matrices`, laid out from x; matrices that are alike share them.
    template <size_t N>
    std::array<const Activations*, N> lay(int thread, int& list, const float* x, int64_t stride, int64_t n,
                                          const float* norm, const std::array<const Matrix*, N>& matrices) {
        const bool alone = n == 1;
        auto& places = alone ? space.own[thread] : space.shared;
        std::array<const Activations*, N> found;
        for (size_t i = 0; i < N; i++) {
            size_t same = i;
            for (size_t j = 0; j < i; j++)
                if (alike(*matrices[i], *matrices[j])) same = j;
            found[i] = same == i ? &places[i].a : found[same];
            const int work = list++;
            if (same != i) continue;
            Laid& laid = places[i];
            if (alone) {
                laid.shape(*matrices[i], 1);
                const Matrix& w = *matrices[i];
                const uint8_t* soon = w.chunk(model.team.stretch(thread, w.chunks()));
                ops.prepare(laid.a, 0, x, stride, w.columns, norm, shape().eps, soon);
            } else {
                if (thread == 0) laid.shape(*matrices[i], n);
                model.team.wait();
                model.team.each(thread, work, laid.a.tiles(), [&](int64_t t) {
                    ops.prepare(laid.a, t, x, stride, matrices[i]->columns, norm, shape().eps, nullptr);
                });
            }
        }
        if (!alone) model.team.wait();
        return found;
    }

    // Waits for the others. What this thread reads next is the beginning of its stretch of `w`.
    void wait(int thread, const Matrix& w) {
        constexpr int64_t MOST = 96 * 1024;
        const int64_t begin = model.team.stretch(thread, w.chunks()), end = model.team.stretch(thread + 1, w.chunks());
        model.team.wait({w.chunk(begin), std::min(MOST, (end - begin) * w.chunk_bytes())});
    }

    void multiply(int thread, int& list, const Matrix& w, const Activations& a, float* y, int64_t stride, bool add) {
        model.team.each(thread, list++, w.chunks(), [&](int64_t c) { ops.multiply(w, c, c + 1, a, y, stride, add); });
    }

    // Products that need not wait for one another.
    struct Product {
        const Matrix& w;
        const Activations& a;
        float* y;
        int64_t stride;
    };
    void multiply(int thread, int& list, std::initializer_list<Product> products) {
        const int first = list;
        for (const bool own : {true, false}) {
            list = first;
            for (const Product& p : products) {
                const auto work = [&](int64_t c) { ops.multiply(p.w, c, c + 1, p.a, p.y, p.stride, false); };
                if (own) model.team.own(thread, list++, p.w.chunks(), work);
                else model.team.help(thread, list++, p.w.chunks(), work);
            }
        }
    }

    // y (tokens of the spans that have one, stride) += up (down x)
    void adapt(int thread, int& list, int64_t layer, Part part, const float* x, int64_t x_stride, const float* norm, float* y,
               int64_t y_stride) {
        const int work = list++;
        if (!adapter) return;
        model.team.wait();
        model.team.each(thread, work, (int64_t)spans.size(), [&](int64_t s) {
            if (adapter[s] < 0) return;
            const auto& pair = model.adapters[adapter[s]]->layers[layer][part];
            if (!pair.rank) return;
            const int64_t inputs = (int64_t)pair.down.size() / pair.rank;
            const int64_t outputs = (int64_t)pair.up.size() / pair.rank;
            std::vector<float> row(inputs), low(pair.rank);
            for (int64_t t = spans[s].first; t < spans[s].first + spans[s].count; t++) {
                const float* from = x + t * x_stride;
                if (norm) ops.rms_norm(from, norm, shape().eps, inputs, row.data()), from = row.data();
                for (int64_t r = 0; r < pair.rank; r++) {
                    float sum = 0;
                    for (int64_t i = 0; i < inputs; i++) sum += pair.down[r * inputs + i] * from[i];
                    low[r] = sum;
                }
                for (int64_t o = 0; o < outputs; o++) {
                    float sum = 0;
                    for (int64_t r = 0; r < pair.rank; r++) sum += pair.up[o * pair.rank + r] * low[r];
                    y[t * y_stride + o] += sum;
                }
            }
        });
        model.team.wait();
    }

    // The heads of queries that read one head of keys and values.
    void turn(int64_t token, int64_t head) {
        const int64_t E = shape().width, G = shape().heads / shape().kv_heads;
        float* row = space.mixed.data() + token * mixed_rows;
        for (int64_t g = 0; g < G; g++) ops.rotate(row + (head * G + g) * E, space.turns.data() + 2 * token * E, E);
    }

    void cache_one(int64_t layer, int64_t token, const Span& span, int64_t head) {
        const int64_t E = shape().width, position = span.start + token - span.first;
        float* k = space.mixed.data() + token * mixed_rows + q_rows + head * E;
        ops.rotate(k, space.turns.data() + 2 * token * E, E);
        ops.write(cache, layer, head, span.blocks[position / 16], (int)(position % 16), k, k + kv_rows);
    }

    void attend(int thread, int64_t layer, const Span& span, int64_t head, int64_t from, int64_t to) {
        ops.attend({&cache, layer, head, span, from, to, shape().heads, space.mixed.data(), mixed_rows,
                    space.attended.data(), q_rows, space.scratch[thread].data()});
    }

    // Queries of a span that are one piece of work.
    static constexpr int64_t TOGETHER = 32;
    static int64_t pieces(const Span& span) { return (span.count + TOGETHER - 1) / TOGETHER; }
    int64_t pieces() const {
        int64_t n = 0;
        for (const Span& span : spans) n += pieces(span);
        return n;
    }
    template <typename Work>
    void piece(int64_t p, const Work& work) {  // the p-th of all pieces
        for (const Span& span : spans) {
            const int64_t n = pieces(span);
            if (p < n) return work(span, p * TOGETHER, std::min(span.count, (p + 1) * TOGETHER));
            p -= n;
        }
    }

    void fill_cache(int thread, int& list, int64_t layer) {
        const int64_t heads = shape().kv_heads;
        model.team.each(thread, list++, pieces() * heads, [&](int64_t i) {
            piece(i / heads, [&](const Span& span, int64_t from, int64_t to) {
                for (int64_t t = span.first + from; t < span.first + to; t++) cache_one(layer, t, span, i % heads);
            });
        });
        model.team.wait();
    }

    void attention(int thread, int& list, int64_t layer) {
        const int64_t heads = shape().kv_heads, all = pieces();
        const bool single = all == tokens;  // one token of each sequence: nobody else's query reads its key
        if (!single && !cached) fill_cache(thread, list, layer);
        model.team.each(thread, list++, all * heads, [&](int64_t i) {
            const int64_t late = all - 1 - i / heads;  // the longest first
            piece(late, [&](const Span& span, int64_t from, int64_t to) {
                for (int64_t t = span.first + from; t < span.first + to; t++) turn(t, i % heads);
                if (single && !cached) cache_one(layer, span.first, span, i % heads);
                attend(thread, layer, span, i % heads, from, to);
            });
        });
        wait(thread, *model.layers[layer][WO]);
    }

    void layer(int thread, int& list, int64_t index) {
        const auto& w = model.layers[index];
        const float* norm = model.norms[index][0].data();
        float* x = space.x.data();
        float* mixed = space.mixed.data();

        auto in = lay<3>(thread, list, x, dim, tokens, norm, {w[WQ], w[WK], w[WV]});
        multiply(thread, list, {{*w[WQ], *in[0], mixed, mixed_rows},
                                {*w[WK], *in[1], mixed + q_rows, mixed_rows},
                                {*w[WV], *in[2], mixed + q_rows + kv_rows, mixed_rows}});
        adapt(thread, list, index, WQ, x, dim, norm, mixed, mixed_rows);
        adapt(thread, list, index, WK, x, dim, norm, mixed + q_rows, mixed_rows);
        adapt(thread, list, index, WV, x, dim, norm, mixed + q_rows + kv_rows, mixed_rows);
        wait(thread, *w[WO]);
        attention(thread, list, index);
        rest(thread, list, index);
    }

    // What follows attention.
    void rest(int thread, int& list, int64_t index) {
        const auto& w = model.layers[index];
        float* x = space.x.data();
        auto mid = lay<1>(thread, list, space.attended.data(), q_rows, tokens, nullptr, {w[WO]});
        multiply(thread, list, *w[WO], *mid[0], x, dim, true);
        adapt(thread, list, index, WO, space.attended.data(), q_rows, nullptr, x, dim);
        wait(thread, *w[W1]);

        auto up = lay<2>(thread, list, x, dim, tokens, model.norms[index][1].data(), {w[W1], w[W3]});
        float* lifted = space.lifted.data();
        feed(thread, list, index, up, lifted);
        wait(thread, *w[W2]);
        auto down = lay<1>(thread, list, lifted, ffn, tokens, nullptr, {w[W2]});
        multiply(thread, list, *w[W2], *down[0], x, dim, true);
        adapt(thread, list, index, W2, lifted, ffn, nullptr, x, dim);
        wait(thread, index + 1 < shape().layers ? *model.layers[index + 1][WQ] : *model.output);
    }

    // Keys and values of all tokens; all else of `few`, a pass of the tokens `rows`, which move to the front.
    void last_layer(int thread, int& list, int64_t index, Pass& few, const std::vector<int64_t>& rows) {
        const auto& w = model.layers[index];
        const float* norm = model.norms[index][0].data();
        float* x = space.x.data();
        float* mixed = space.mixed.data();

        auto in = lay<2>(thread, list, x, dim, tokens, norm, {w[WK], w[WV]});
        multiply(thread, list, {{*w[WK], *in[0], mixed + q_rows, mixed_rows},
                                {*w[WV], *in[1], mixed + q_rows + kv_rows, mixed_rows}});
        adapt(thread, list, index, WK, x, dim, norm, mixed + q_rows, mixed_rows);
        adapt(thread, list, index, WV, x, dim, norm, mixed + q_rows + kv_rows, mixed_rows);
        wait(thread, *w[WQ]);
        fill_cache(thread, list, index);
        if (rows.empty()) return;
        if (thread == 0)
            for (int64_t i = 0; i < few.tokens; i++) {  // each comes from no place before its own
                memmove(x + i * dim, x + rows[i] * dim, dim * sizeof(float));
                float* turns = space.turns.data();
                const int64_t n = 2 * shape().width;
                memmove(turns + i * n, turns + rows[i] * n, n * sizeof(float));
            }
        model.team.wait();
        few.queries(thread, list, index);
        few.rest(thread, list, index);
    }

    void queries(int thread, int& list, int64_t index) {
        const Matrix& w = *model.layers[index][WQ];
        const float* norm = model.norms[index][0].data();
        float* x = space.x.data();
        float* mixed = space.mixed.data();
        auto in = lay<1>(thread, list, x, dim, tokens, norm, {&w});
        multiply(thread, list, w, *in[0], mixed, mixed_rows, false);
        adapt(thread, list, index, WQ, x, dim, norm, mixed, mixed_rows);
        wait(thread, *model.layers[index][WO]);
        attention(thread, list, index);
    }

    void feed(int thread, int& list, int64_t index, const std::array<const Activations*, 2>& in, float* lifted) {
        const auto& w = model.layers[index];
        const bool together = !adapter && in[0]->tile == in[1]->tile;  // numbers and codes come in tiles of their own
        if (together && tokens > 1) {
            model.team.each(thread, list++, w[W1]->chunks(), [&](int64_t c) {
                ops.swiglu(*w[W1], *in[0], *w[W3], *in[1], c, c + 1, lifted, ffn);
            });
            return;
        }
        // A lone token waits for memory: each matrix is read in one go.
        const float* norm = model.norms[index][1].data();
        float* other = space.other.data();
        multiply(thread, list, {{*w[W1], *in[0], lifted, ffn}, {*w[W3], *in[1], other, ffn}});
        adapt(thread, list, index, W1, space.x.data(), dim, norm, lifted, ffn);
        adapt(thread, list, index, W3, space.x.data(), dim, norm, other, ffn);
        wait(thread, *w[W2]);
        constexpr int64_t PIECE = 16 * CHUNK;
        const int64_t pieces = (ffn + PIECE - 1) / PIECE;
        model.team.each(thread, list++, tokens * pieces, [&](int64_t i) {
            const int64_t at = i / pieces * ffn + i % pieces * PIECE;
            ops.gate(lifted + at, other + at, std::min(PIECE, ffn - i % pieces * PIECE));
        });
    }

    // From the states at `ends` to their rows of logits in `out`.
    void head(int thread, int& list, Ends& ends, bool screened, float* out) {
        const int64_t n = (int64_t)ends.places.size();
        model.team.each(thread, list++, n, [&](int64_t r) {
            memcpy(ends.states.data() + r * dim, space.x.data() + ends.places[r] * dim, dim * sizeof(float));
        });
        model.team.wait();
        float* y = ends.direct ? out : ends.logits.data();
        const float* norm = model.last_norm.data();
        auto last = lay<1>(thread, list, ends.states.data(), dim, n, norm, {model.output});
        if (screened) screen(thread, list, ends, *last[0], y);
        else multiply(thread, list, *model.output, *last[0], y, ends.stride, false);
        model.team.wait();
        if (ends.direct) return;
        model.team.each(thread, list++, n, [&](int64_t r) {
            memcpy(out + ends.places[r] * shape().vocabulary, y + r * ends.stride, shape().vocabulary * sizeof(float));
        });
        model.team.wait();
    }

    // All rows by their upper halves; then, for each token, the best blocks of 16 again, and all if that leaves a doubt.
    void screen(int thread, int& list, const Ends& ends, const Activations& last, float* y) {
        const Matrix& w = *model.output;
        const Matrix upper = w.upper();
        const int64_t n = (int64_t)ends.places.size(), blocks = 4 * w.chunks();
        model.team.each(thread, list++, w.chunks(), [&](int64_t c) {
            ops.multiply(upper, c, c + 1, last, y, ends.stride, false);
            for (int64_t r = 0; r < n; r++)
                ops.maxima(y + r * ends.stride + c * CHUNK, 4, space.screen.largest.data() + r * blocks + 4 * c);
        });
        const Activations* single = &last;
        if (n > 1) {  // tokens on their own
            if (thread == 0) space.single.shape(w, n), space.single.a.tile = 1;
            single = &space.single.a;
        }
        model.team.wait();
        model.team.each(thread, list++, n, [&](int64_t r) {
            space.screen.choose(ops, r);
            if (n > 1)
                ops.prepare(space.single.a, r, ends.states.data(), dim, w.columns, model.last_norm.data(), shape().eps, nullptr);
        });
        for (int round = 0; round < 2; round++) {
            if (round) model.team.each(thread, list, n, [&](int64_t r) { space.screen.check(r); });
            list += round;
            model.team.wait();
            constexpr int64_t PIECE = 64;  // blocks: most have nothing to do
            model.team.each(thread, list++, (blocks + PIECE - 1) / PIECE, [&](int64_t i) {
                for (int64_t b = PIECE * i; b < std::min(blocks, PIECE * (i + 1)); b++)
                    for (int64_t r = 0; r < n; r++)
                        if (space.screen.state[b * n + r] == Screen::CHOSEN)
                            space.screen.refine(ops, w, b, *single, r, y + r * ends.stride + b * LANES);
            });
            model.team.wait();
        }
    }
};

void Model::forward(const Cache& cache, const std::vector<Span>& spans, const int32_t* tokens, const int64_t* wanted,
                    const int64_t* adapter, const int64_t* screened, float* out, bool hidden) {
    const Ops& ops = operations();
    Workspace& space = *space_;
    Pass pass{*this, ops, cache, spans, nullptr, space, 0, up(shape.dim, CHUNK), up(shape.ffn, CHUNK),
              up(shape.heads * shape.width, CHUNK), up(shape.kv_heads * shape.width, CHUNK), 0};
    Ends whole, best;
    std::vector<int64_t> rows;  // of the tokens that end in logits
    std::vector<Span> ends;     // of the same
    for (size_t s = 0; s < spans.size(); s++) {
        const int64_t before = spans[s].count - wanted[s];
        ends.push_back({(int64_t)rows.size(), wanted[s], spans[s].start + before, spans[s].blocks});
        pass.tokens += spans[s].count;
        for (int64_t i = 0; i < wanted[s]; i++) {
            (screened[s] && output->kind == SPLIT && !hidden ? best : whole).places.push_back((int64_t)rows.size());
            rows.push_back(spans[s].first + before + i);
        }
        if (adapter[s] >= 0) pass.adapter = adapter;
    }
    const int64_t places = (int64_t)rows.size();
    Laid::grow(space.positions, pass.tokens);
    for (const Span& span : spans)
        for (int64_t i = 0; i < span.count; i++) space.positions[span.first + i] = span.start + i;
    pass.mixed_rows = pass.q_rows + 2 * pass.kv_rows;
    const int64_t n = pass.tokens, dim = pass.dim, E = shape.width;
    Laid::grow(space.x, n * dim), Laid::grow(space.mixed, n * pass.mixed_rows);
    Laid::grow(space.attended, n * pass.q_rows), Laid::grow(space.lifted, n * pass.ffn);
    Pass few{*this, ops, cache, ends, pass.adapter, space, places, dim, pass.ffn, pass.q_rows, pass.kv_rows,
             pass.mixed_rows, true};
    bool apart = pass.adapter || n == 1;
    for (const auto& w : layers) apart |= w[W1]->integer() != w[W3]->integer();
    Laid::grow(space.turns, 2 * n * E), Laid::grow(space.other, (apart ? n : places == 1) * pass.ffn);
    for (auto& scratch : space.scratch) Laid::grow(scratch, ops.attend_scratch(E));
    for (Ends* ends : {&whole, &best}) ends->reserve(dim, hidden ? 0 : shape.vocabulary, places);
    space.screen.reserve((int64_t)best.places.size(), up(shape.vocabulary, CHUNK) / LANES);

    team.run((int)shape.layers * 26 + 30, [&](int thread) {
        int list = 0;
        team.each(thread, list++, n, [&](int64_t t) {
            float* x = space.x.data() + t * dim;
            ops.embed(*embedding, tokens[t], x);
            for (int64_t j = shape.dim; j < dim; j++) x[j] = 0;
            const float position = (float)space.positions[t];
            for (int64_t j = 0; j < E / 2; j++) {
                float* turns = space.turns.data() + 2 * t * E + 2 * j;
                const float c = std::cos(position * frequencies[j]), s = std::sin(position * frequencies[j]);
                turns[0] = c, turns[1] = c, turns[E] = -s, turns[E + 1] = s;
            }
        });
        team.wait();
        for (int64_t l = 0; l < shape.layers; l++) {
            if (l + 1 == shape.layers && few.tokens < pass.tokens) pass.last_layer(thread, list, l, few, rows);
            else pass.layer(thread, list, l);
        }
        if (hidden) {
            team.each(thread, list++, places, [&](int64_t r) {
                ops.rms_norm(space.x.data() + whole.places[r] * dim, last_norm.data(), shape.eps, shape.dim, out + r * shape.dim);
            });
            return;
        }
        for (Ends* ends : {&whole, &best})
            if (!ends->places.empty()) pass.head(thread, list, *ends, ends == &best, out);
    });
}

}  // namespace puna
