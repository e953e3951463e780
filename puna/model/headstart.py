"""First weights that can copy from the first step.

Much of what a language model does in context is copying: find where the present token occurred before, and expect what
came after it there. The circuit has two parts (Olsson et al. 2022, "In-context Learning and Induction Heads"): a head
that tells each place what preceded it, and, a layer above, a head that looks for places whose predecessor is the present
token. Gradients find neither part useful without the other, so random weights need far more tokens to come upon both
than the smallest recipe has. Here the first two layers start with that circuit, roughly; training refines it or gives
it up. That structure may be given in the initial weights instead of searched for is the idea of "Mimetic Initialization
of Self-Attention Layers" (Trockman and Kolter 2023). Architecture and export are untouched: only first values change.

The residual stream is divided at first, and training is free to mix it:

    content    random for each token, n numbers
    constant   one number, the same for every token: what a head reads that looks at a place, whatever is there
    last       m numbers: written by layer 0, a projection of the content of the token before
    earlier    m numbers: likewise of the token before that

    layer 0    head 0 looks one token back, head 1 two: constant queries and keys in the fast rotary pairs, the query
               turned by that many positions; values are the projection, written to `last` and `earlier`
    layer 1    queries: what this token and the one before it are; keys: `last` and `earlier`; both in the slow pairs,
               which hardly turn within a context. Head 0 wants both to agree, head 1 the last one alone. Values are
               content, written back as content, so that the output expects the token that was found

All other matrices that write into the stream start at zero.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.config import require
from puna.model.llama import Llama, rope_frequencies
from puna.model.sizes import LlamaConfig

SPREAD = 0.1  # standard deviation of the content
FINAL_NORM = (
    0.2  # scale of the final norm: the output is often the embedding, whose numbers are five times the customary
)
CONSTANT = 0.5  # the constant, as a share of the content's length
WRITTEN = 0.6  # the length of what layer 0 writes for a token, likewise
LOOK_MARGIN = 4.0  # nats by which the token looked back at is ahead of its neighbours
MATCH = 9.0  # nats that an equal token is worth to the searching heads
FAST, SLOW = 300, 800  # tokens: pairs that turn once in less are for positions, in more for content
MATCHED = 20  # numbers to tell tokens apart by, if the head is wide enough


@dataclass(frozen=True)
class _Parts:
    """Where the parts of the stream lie, and which rotary pairs (of E/2) are fast, and first of the slow."""

    content: slice
    constant: int
    last: slice
    earlier: slice
    fast: int
    slow: int

    @property
    def matched(self) -> int:
        return self.last.stop - self.last.start


def _parts(config: LlamaConfig) -> _Parts:
    wavelengths = 2 * math.pi / rope_frequencies(config)
    fast, slow = int((wavelengths < FAST).sum()), int((wavelengths < SLOW).sum())
    m = min(MATCHED, config.head_dim // 2 - slow)
    n = config.dim - 2 * m - 1
    require(
        config.n_layers >= 2 and config.n_heads >= 2 and fast >= 1 and m >= 4 and n >= config.head_dim,
        f"a model of {config.n_layers} layers, {config.n_heads} heads of {config.head_dim} and width {config.dim} has "
        "no room for a head start",
        hint="it takes two layers, two heads of 32 or more, and a width above that of a head; or set head_start=false",
    )
    return _Parts(slice(0, n), n, slice(n + 1, n + 1 + m), slice(n + 1 + m, n + 1 + 2 * m), fast, slow)


@torch.no_grad()
def give_head_start(model: Llama, seed: int) -> None:
    """Overwrite the first weights of `model`, drawn by `init_weights`; the result depends on `seed` and the shapes alone.

    Raises `ConfigError` if the shape has no room for the circuit.
    """
    config = model.config
    parts = _parts(config)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        layer.attention.wo.weight.zero_()
        layer.feed_forward.w2.weight.zero_()
    _spread(model.tok_embeddings.weight, parts, generator)
    model.output.weight.copy_(model.tok_embeddings.weight)  # also where training may part them later
    model.norm.weight.fill_(FINAL_NORM)
    n = parts.constant
    token = _orthonormal(parts.matched, n, generator)  # what of the content tells tokens apart
    _look_back(model, parts, token)
    _search(model, parts, token, _orthonormal(config.head_dim, n, generator))


def _spread(matrix: Tensor, parts: _Parts, generator: torch.Generator) -> None:
    matrix.normal_(0.0, SPREAD, generator=generator)
    matrix[:, parts.constant :] = 0.0
    matrix[:, parts.constant] = CONSTANT * SPREAD * math.sqrt(parts.constant)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].t()


def _look_back(model: Llama, parts: _Parts, token: Tensor) -> None:
    """Layer 0: heads 0 and 1 carry what one and two tokens before was into `last` and `earlier`."""
    config = model.config
    E, n, m = config.head_dim, parts.constant, parts.matched
    turn = rope_frequencies(config)[: parts.fast]
    # The score at distance d from the wanted token is size^2 / sqrt(E) * sum of cos(turn * d).
    size = math.sqrt(LOOK_MARGIN * math.sqrt(E) / (1 - turn.cos()).sum().item())
    constant = math.sqrt(config.dim / (1 + CONSTANT**2)) * CONSTANT  # after the norm
    content = math.sqrt(config.dim / (1 + CONSTANT**2))
    even = slice(0, 2 * parts.fast, 2)
    odd = slice(1, 2 * parts.fast, 2)
    query, key, value, out = _heads(model, 0)
    for head, distance, target in ((0, 1, parts.last), (1, 2, parts.earlier)):
        k, v = key[head], value[head]
        k.zero_()
        k[even, n] = size / constant
        query[head].zero_()
        query[head][even, n] = size / constant * (-turn * distance).cos()
        query[head][odd, n] = size / constant * (-turn * distance).sin()
        v[:m] = 0.0
        v[:m, :n] = token
        length = content * math.sqrt(m / n)  # of a value
        out[head][target, :m] = WRITTEN * SPREAD * math.sqrt(n) / length * torch.eye(m)


def _search(model: Llama, parts: _Parts, token: Tensor, copied: Tensor) -> None:
    """Layer 1: heads 0 and 1 look for places that followed what is here now, and bring their content."""
    config = model.config
    E, n, m = config.head_dim, parts.constant, parts.matched
    scale = math.sqrt(config.dim / (n * SPREAD**2 * (1 + CONSTANT**2 + 2 * WRITTEN**2)))  # the norm's
    content = scale * SPREAD * math.sqrt(n)
    here, before = content * math.sqrt(m / n), content * WRITTEN  # lengths of the two descriptions of a token
    strength = math.sqrt(MATCH * math.sqrt(E))
    first, second = slice(E - 2 * m, E - m), slice(E - m, E)  # in the slow pairs
    query, key, value, out = _heads(model, 1)
    for head, (last, earlier) in enumerate(((1.0, 1.0), (1.4, 0.0))):
        k, v = key[head], value[head]
        k.zero_()
        k[first, parts.last] = strength / before * torch.eye(m)
        k[second, parts.earlier] = strength / before * torch.eye(m)
        query[head].zero_()
        query[head][first, :n] = last * strength / here * token
        query[head][second, parts.last] = earlier * strength / before * torch.eye(m)
        v.zero_()
        v[:, :n] = copied
        length = content * math.sqrt(E / n)  # of a value
        out[head][:n] = SPREAD * math.sqrt(n) / length * copied.t()


def _heads(model: Llama, layer: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Views of a layer's matrices per query head: query, key and value (E, D), and output (D, E).

    Heads of one group share the views of their key and value.
    """
    config, attention = model.config, model.layers[layer].attention
    H, K, E, D = config.n_heads, config.n_kv_heads, config.head_dim, config.dim
    query = list(attention.wq.weight.view(H, E, D))
    key, value = (list(w.weight.view(K, E, D)) for w in (attention.wk, attention.wv))
    group = H // K
    out = list(attention.wo.weight.view(D, H, E).unbind(1))
    return query, [key[h // group] for h in range(H)], [value[h // group] for h in range(H)], out
