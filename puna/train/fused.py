"""A Llama's training step on a CPU, forward and backward written out: the same numbers as the model's, in far less time.

PyTorch's autocast casts every weight in every step, and each operator between two matrix products reads and writes a
whole matrix: on two cores that is half of a small model's step. Here

    weights       float32 masters; bfloat16 copies are made once per update, q k v in one matrix, gate and up in one
    products      in bfloat16, each as large as it can be, and attention in one pass (`puna.kernels.training_products`)
    between them  one pass per formula (`puna.kernels.training_rows`)
    gradients     of weights are float32 from the sums on
    residuals     float32, forward and backward

    layer:  total, n1 = norm(x + last)          backward, each line's gradient, from below:
            o         = attend(n1 Wqkv^T)            d -> dW2, swiglu_back, dW13, norm_back
            total, n2 = norm(total + o Wo^T)           -> dWo, attend_back, dWqkv, norm_back
            last      = swiglu(n2 W13^T) W2^T

What is the model's business stays there: `FusedLlama` is a `Llama` with another way through `hidden`, and where that
way does not lead (long rows, another device, widths that are no multiples of 16) it takes the model's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puna.kernels import training_rows as rows
from puna.kernels.attention import WRITTEN_OUT_UP_TO
from puna.kernels.training_products import Heads, Implementation, Weight, attend, attend_back, chosen, outer
from puna.model.llama import Attend, Block, Llama, RMSNorm, WithinDocuments, rope_frequencies
from puna.model.sizes import LlamaConfig


def fuse(model: nn.Module) -> nn.Module:
    """The model with every `Llama` in it on the fast way, if this machine has the kernels; the parameters are the same."""
    if rows.available():
        for module in model.modules():
            if type(module) is Llama and suits(module.config):
                module.__class__ = FusedLlama
    return model


def suits(config: LlamaConfig) -> bool:
    """Whether the kernels can work on these widths."""
    return all(width % rows.LANES == 0 for width in (config.dim, config.ffn_dim, config.head_dim))


class FusedLlama(Llama):
    """A Llama that trains fast on a CPU."""

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As the model's, in bfloat16."""
        T = tokens.shape[1]
        ours = isinstance(attend, WithinDocuments) and T <= WRITTEN_OUT_UP_TO and not tokens.is_cuda
        if not (ours and torch.is_autocast_enabled("cpu") and all(p.requires_grad for p in self.parameters())):
            return super().hidden(tokens, positions, attend)
        missing = -T % rows.LANES
        if missing:  # a document of its own behind each row, which nothing else sees
            documents = attend.documents
            filling = (documents.amax(1, keepdim=True) + 1).expand(-1, missing)
            attend = WithinDocuments(torch.cat((documents, filling), 1))
            tokens, positions = nn.functional.pad(tokens, (0, missing)), _extended(positions, missing)
        starts = _starts(attend.documents)
        wanted = torch.is_grad_enabled()
        hidden = _Body.apply(self.tok_embeddings.weight, self, tokens, positions.contiguous(), starts, wanted)
        return hidden[:, :T]

    def copies(self) -> list["Copies"]:
        """The layers' matrices in bfloat16, made anew if the masters may have changed.

        PyTorch counts changes of a tensor, but its fused AdamW does not: so a backward pass counts too.
        """
        version = sum(parameter._version for parameter in self.layers.parameters())
        kept, impl = self.__dict__.get("_copies"), chosen()
        if kept is None or kept[2] != impl:
            kept = self.__dict__["_copies"] = [-1, [Copies.like(layer, impl) for layer in self.layers], impl]
        if kept[0] != version:
            for copies, layer in zip(kept[1], self.layers, strict=True):
                copies.refresh(layer)
            kept[0] = version
        return kept[1]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_copies"}


def _extended(positions: Tensor, more: int) -> Tensor:
    new = torch.arange(more).expand(len(positions), more)
    return torch.cat((positions, new), 1)


def _starts(documents: Tensor) -> Tensor:
    """(B, T): where in its row the document of each token begins."""
    index = torch.arange(documents.shape[1]).expand_as(documents)
    same = nn.functional.pad(documents[:, 1:] == documents[:, :-1], (1, 0))
    return torch.where(same, 0, index).cummax(1).values.contiguous()


@dataclass(frozen=True)
class Copies:
    """A layer's matrices in bfloat16."""

    qkv: Weight  # ((H + 2 K) E, D)
    wo: Weight
    gate_up: Weight  # (2 F, D)
    w2: Weight

    @classmethod
    def like(cls, layer: Block, impl: Implementation) -> "Copies":
        """Room for the copies of `layer`."""
        return cls(*(Weight.like([part.weight for part in group], impl) for group in _groups(layer)))

    def refresh(self, layer: Block) -> None:
        """Take the masters' values."""
        for copy, group in zip((self.qkv, self.wo, self.gate_up, self.w2), _groups(layer), strict=True):
            copy.refresh([part.weight for part in group])


def _groups(layer: Block) -> tuple[tuple[nn.Linear, ...], ...]:
    """The matrices that are one product each."""
    a, f = layer.attention, layer.feed_forward
    return (a.wq, a.wk, a.wv), (a.wo,), (f.w1, f.w3), (f.w2,)


@dataclass
class Kept:
    """What a layer's backward pass needs of its forward pass."""

    total1: Tensor  # (N, D) float32: the residual stream before attention
    normed1: Tensor
    factors1: Tensor
    attention: tuple[Tensor, ...]
    read: Tensor  # (N, H E), what attention read
    total2: Tensor
    normed2: Tensor
    factors2: Tensor
    gate_up: Tensor
    gated: Tensor


class _Body(torch.autograd.Function):
    """Embedding, layers and last norm. `anchor` only tells autograd that gradients are wanted; they go to `.grad`."""

    @staticmethod
    def forward(
        ctx, anchor: Tensor, model: FusedLlama, tokens: Tensor, positions: Tensor, starts: Tensor, wanted: bool
    ) -> Tensor:
        config, (B, T) = model.config, tokens.shape
        shape = (B, T, config.n_heads, config.n_kv_heads, config.head_dim)
        ctx.heads = Heads(shape, rows.turns(rope_frequencies(config), T), positions, starts)
        ctx.model, ctx.tokens, ctx.layers, ctx.impl = model, tokens, [], chosen()
        norms = [*(layer.attention_norm for layer in model.layers), model.norm]
        stream = nn.functional.embedding(tokens, anchor.detach()).flatten(0, 1)
        normed = rows.norm(stream, None, norms[0].weight, norms[0].eps)
        for layer, copies, following in zip(model.layers, model.copies(), norms[1:], strict=True):
            normed, kept = _layer(layer, copies, ctx, normed, following)
            if wanted:
                ctx.layers.append(kept)
        ctx.total, hidden, ctx.factors = normed
        return hidden.view(B, T, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        model, d = ctx.model, upstream.to(torch.bfloat16).flatten(0, 1).contiguous()
        dx = torch.zeros_like(ctx.total)
        d = rows.norm_back(d, ctx.total, model.norm.weight, ctx.factors, dx, _grad(model.norm.weight))
        for layer, copies in reversed(list(zip(model.layers, model.copies(), strict=True))):
            d = _layer_back(layer, copies, ctx.layers.pop(), ctx, d, dx)
        _grad(model.tok_embeddings.weight).index_add_(0, ctx.tokens.flatten(), dx)
        model.__dict__["_copies"][0] = -1  # an update may follow
        return None, None, None, None, None, None


Normed = tuple[Tensor, Tensor, Tensor]  # the residual stream, its norm, one over its root mean squares


def _layer(layer: Block, c: Copies, ctx, normed: Normed, following: RMSNorm) -> tuple[Normed, Kept]:
    """One layer on the normed stream: the stream behind it, normed for what follows, and what is kept."""
    total1, normed1, factors1 = normed
    read, attention = attend(c.qkv.forward(normed1), ctx.heads, ctx.impl)
    total2, normed2, factors2 = c.wo.norm(read, total1, layer.ffn_norm.weight, layer.ffn_norm.eps)
    gate_up, gated = c.gate_up.swiglu(normed2)
    kept = Kept(total1, normed1, factors1, attention, read, total2, normed2, factors2, gate_up, gated)
    return c.w2.norm(gated, total2, following.weight, following.eps), kept


def _layer_back(layer: Block, c: Copies, kept: Kept, ctx, d: Tensor, dx: Tensor) -> Tensor:
    """Through one layer: `dx` (float32) is the stream's gradient, `d` the same in bfloat16. Returns the new `d`."""
    qkv, wo, gate_up, w2 = _groups(layer)
    _add(ctx.impl, d, kept.gated, *w2)
    between = c.w2.swiglu_back_(d, kept.gate_up)
    _add(ctx.impl, between, kept.normed2, *gate_up)
    weight = layer.ffn_norm.weight
    d = c.gate_up.norm_back(between, kept.total2, weight, kept.factors2, dx, _grad(weight))
    _add(ctx.impl, d, kept.read, *wo)
    between = attend_back(c.wo.backward(d), kept.attention, ctx.heads, ctx.impl)
    _add(ctx.impl, between, kept.normed1, *qkv)
    weight = layer.attention_norm.weight
    return c.qkv.norm_back(between, kept.total1, weight, kept.factors1, dx, _grad(weight))


def _add(impl: Implementation, d: Tensor, x: Tensor, *parts: nn.Linear) -> None:
    """Add d^T x, whose rows belong to `parts` in this order, to their gradients."""
    made = outer(d, x, impl)
    for part, rows_of in zip(parts, made.split([part.out_features for part in parts]), strict=True):
        if part.weight.grad is None:
            part.weight.grad = rows_of
        else:
            part.weight.grad.add_(rows_of)


def _grad(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, zeros if there was none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
