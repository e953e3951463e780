"""The model in the C++ kernels' hands: the runner that the engine uses on a CPU where the kernels were built.

The whole network, from tokens to logits, is one call into the library. Matrices are taken over one by one, in the form
that they have: float32, bfloat16, or codes of 8 or 4 bits with their scales; and the model's own copies are dropped on
the way, so that no more than one matrix is there twice.

What a token gets depends on its own sequence alone, bit for bit: not on the batch, nor on how a prompt was cut up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.kernels import native
from puna.model.llama import Llama, rope_frequencies
from puna.quant.modules import QuantEmbedding, QuantLinear, QuantMatrix

_CACHE_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def unfit(model: Llama) -> str | None:
    """Why the kernels cannot run this model here; None if they can."""
    if why := native.why_not():
        return why
    if model.config.head_dim % 16 or model.config.head_dim > 1024:
        return f"a head of {model.config.head_dim} is not a multiple of 16"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "the model is not on the CPU"
    return None


class NativeRunner:
    """`model` in native form with a cache of `blocks` blocks; `kv` is how keys and values are kept.

    With `consume` the model's own weights are dropped as they are taken over: it cannot be used afterwards.
    """

    block_tokens = native.BLOCK_TOKENS

    def __init__(
        self, model: Llama, blocks: int, *, threads: int, kv: torch.dtype = torch.float32, consume: bool = False
    ):
        c = self.config = model.config
        self.blocks = blocks
        sizes = (c.n_layers, c.dim, c.ffn_dim, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size)
        self.network = native.Network(sizes, c.norm_eps, rope_frequencies(c), threads)
        _fill(self.network, model, consume)
        self.cache = native.Cache(_CACHE_KINDS[kv], c.n_layers, blocks, c.n_kv_heads, c.head_dim)

    @property
    def team(self) -> native.Borrowed:
        """Its threads, for other kernels between two passes."""
        return self.network.team

    def forward(self, spans: Sequence["Span"], *, hidden: bool = False) -> Tensor:  # noqa: F821
        """Logits (sum of wanted, V) float32 after the last wanted tokens of each span; see `spans.Runner`."""
        facts, blocks, tokens = [], [], []
        for span in spans:
            adapter = -1 if span.adapter is None else span.adapter
            facts.append((len(span.tokens), span.start, span.wanted, adapter, len(blocks)))
            blocks += span.blocks
            tokens += span.tokens
        table = torch.tensor(facts, dtype=torch.int64).T.contiguous()
        ids = torch.tensor(tokens, dtype=torch.int32)
        return self.network.forward(self.cache, ids, table, torch.tensor(blocks, dtype=torch.int32), hidden=hidden)

    def copy_block(self, source: int, target: int) -> None:
        self.cache.copy(source, target)

    def forget(self) -> None:
        """Nothing of the cache is needed any more: its memory goes back to the system."""
        self.cache.forget()


def _fill(network: native.Network, model: Llama, consume: bool) -> None:
    take = _Taker(network.team, consume)
    embedding = take(model.tok_embeddings)
    for index, layer in enumerate(model.layers):
        attention, feed = layer.attention, layer.feed_forward
        modules = (attention.wq, attention.wk, attention.wv, attention.wo, feed.w1, feed.w2, feed.w3)
        matrices = [take(module) for module in modules]
        network.layer(index, matrices, layer.attention_norm.weight, layer.ffn_norm.weight)
    output = embedding if model.config.tied else take(model.output)
    network.ends(embedding, output, model.norm.weight)


class _Taker:
    """Makes native matrices of modules."""

    def __init__(self, team: native.Borrowed, consume: bool):
        self.team, self.consume = team, consume

    def __call__(self, module: nn.Module) -> native.Matrix:
        if isinstance(module, QuantLinear | QuantEmbedding):
            return self._quantised(module.matrix)
        weight = module.weight
        kind = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
        matrix = native.Matrix(kind, *weight.shape).floats(self.team, weight)
        if self.consume:
            weight.data = torch.empty(0, dtype=weight.dtype)
        return matrix

    def _quantised(self, source: QuantMatrix) -> native.Matrix:
        columns, bits, group = source.form
        if group % 16:  # not a form that the kernels have: numbers instead
            weight = source.expanded()
            return native.Matrix("float32", *weight.shape).floats(self.team, weight)
        matrix = native.Matrix(f"int{bits}", len(source.codes), columns, group)
        matrix.codes(self.team, source.codes, source.scales)
        if self.consume:
            source.codes = source.scales = torch.empty(0)
        return matrix
