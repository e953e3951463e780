"""The Llama of `model/llama.py` in the order in which a GPU likes it: few, large kernels.

    per layer:  qkv = [wq; wk; wv] . norm(x)                      one product
                q = turned queries; keys, values -> cache         one kernel
                x, h = x + wo . attention(q), and its norm        the addition is part of the norm
                h = w2 . swiglu([w1; w3] . h)                     one product, one kernel, one product
                x, h = x + h, and the next layer's norm

In the last layer what follows attention is computed only for the tokens whose states are wanted.

It has no weights of its own (`matrices.py`) and computes the same function; a test compares the two.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from puna.inference.matrices import joined, rows_of
from puna.kernels.paged_attention import Ragged, paged_attention
from puna.kernels.rms_norm import rms_norm
from puna.kernels.rotary_cache import rotary_cache
from puna.kernels.swiglu import swiglu
from puna.model.llama import Block, Llama, rope_frequencies

# What adapters add: Meta's name of a matrix -> (which tokens, A, s B), each y[tokens] += x[tokens] A^T (s B)^T.
Additions = Mapping[str, Sequence[tuple[Tensor, Tensor, Tensor]]]


class FusedLayer:
    """One layer's matrices."""

    def __init__(self, block: Block, fp8: bool):
        def part(owner: str, *names: str) -> "_Part":
            modules = {
                f"layers.{block.attention.index}.{owner}.{n}": block.get_submodule(f"{owner}.{n}") for n in names
            }
            return _Part(modules, fp8)

        self.norms = (block.attention_norm.weight, block.ffn_norm.weight)
        self.qkv = part("attention", "wq", "wk", "wv")
        self.out = part("attention", "wo")
        self.gate_up = part("feed_forward", "w1", "w3")
        self.down = part("feed_forward", "w2")


class _Part:
    """A joined matrix, and whatever adapters add to those it was joined from."""

    def __init__(self, modules: dict[str, nn.Module], fp8: bool):
        self.rows: dict[str, slice] = {}
        end = 0
        for name, module in modules.items():
            begin, end = end, end + rows_of(module)
            self.rows[name] = slice(begin, end)
        self.matrix = joined(list(modules.values()), fp8=fp8)

    def __call__(self, x: Tensor, added: Additions) -> Tensor:
        y = self.matrix(x)
        for name in added.keys() & self.rows.keys():
            for tokens, a, b in added[name]:
                y[tokens, self.rows[name]] += x[tokens] @ a.T @ b.T
        return y


class FusedLlama:
    """`model`, on the device it lies on; with `fp8` its layers' dense matrices are rounded to 8-bit numbers."""

    def __init__(self, model: Llama, *, fp8: bool = False):
        self.model, self.config = model, model.config
        self.layers = [FusedLayer(block, fp8) for block in model.layers]
        self.output = joined([model.output])
        self.frequencies = rope_frequencies(model.config).to(model.norm.weight.device)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: Ragged,
        added: Additions,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The normalised last hidden states (N, D), or those of the tokens `rows` alone, in ascending order.

        `keys`, `values` (L, blocks, block_tokens, K, E) are written for all tokens.
        """
        angles = positions[:, None].float() * self.frequencies
        turn = angles.cos(), angles.sin()
        stream = self.model.tok_embeddings(tokens)
        eps = self.config.norm_eps
        h, stream = rms_norm(stream, self.layers[0].norms[0], eps)
        following = [layer.norms[0] for layer in self.layers[1:]] + [self.model.norm.weight]
        for layer, k, v, next_norm in zip(self.layers, keys, values, following):
            q = rotary_cache(layer.qkv(h, added), *turn, slots, k, v)
            only = rows if layer is self.layers[-1] else None
            if only is not None and not len(only):
                return stream[only]  # kernels take no empty batch
            h = paged_attention(q, k, v, spans).flatten(1)
            if only is not None:
                h, stream, added = h[only], stream[only], _among(only, len(h), added)
            h = layer.out(h, added)
            h, stream = rms_norm(h, layer.norms[1], eps, stream)
            h = layer.down(swiglu(layer.gate_up(h, added)), added)
            h, stream = rms_norm(h, next_norm, eps, stream)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, V) float32."""
        return self.output(hidden).to(torch.float32)


def _among(rows: Tensor, tokens: int, added: Additions) -> Additions:
    """`added`, of `tokens` tokens, where only `rows` of these are left."""
    places = torch.full((tokens,), -1, device=rows.device)
    places[rows] = torch.arange(len(rows), device=rows.device)
    left = {name: [(places[at], a, b) for at, a, b in several] for name, several in added.items()}
    return {name: [(at[at >= 0], a, b) for at, a, b in several] for name, several in left.items()}
