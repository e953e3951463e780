"""Meta's names and rotary order <-> Hugging Face's.

The two published forms of a Llama hold the same numbers under other names, and the rows of `wq` and `wk` in another
order. Meta rotates the components (2i, 2i+1) of a head together, Hugging Face i and i + E/2, so that within each head

    Hugging Face's row   0  1  2 ... E/2-1   E/2  E/2+1 ... E-1
    is Meta's row        0  2  4 ... E-2     1    3     ... E-1

The order stays inside a head, so a matrix can be converted a few heads at a time.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from puna.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTSIDE_BACK = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_INSIDE_BACK = {theirs: ours for ours, theirs in _INSIDE.items()}


def hf_name(name: str) -> str:
    """Hugging Face's name of the tensor that Meta calls `name`; the last part (`.weight`) is kept whatever it is."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_INSIDE[module]}.{leaf}"


def meta_name(name: str) -> str | None:
    """Meta's name of the tensor that Hugging Face calls `name`; None if a Llama has no such tensor."""
    if name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[name]
    parts = name.split(".", 3)
    if len(parts) < 4 or parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        return None
    module, _, leaf = parts[3].rpartition(".")
    if module not in _INSIDE_BACK or leaf != "weight":
        return None
    return f"layers.{parts[2]}.{_INSIDE_BACK[module]}.{leaf}"


def is_rotary(name: str) -> bool:
    """Whether the rows of the tensor that Meta calls `name` are ordered by rotary pairs."""
    return ".attention.wq." in name or ".attention.wk." in name


def to_hf_rows(weight: "Tensor", head_dim: int) -> "Tensor":
    """Rows of `wq` or `wk` from Meta's order to Hugging Face's; `weight` is (heads * E, ...)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_meta_rows(weight: "Tensor", head_dim: int) -> "Tensor":
    """The inverse of `to_hf_rows`."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def meta_order(rows: int, head_dim: int) -> np.ndarray:
    """Where each row of Meta's order lies in Hugging Face's, (rows,) int64."""
    return np.ascontiguousarray(np.arange(rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2)).reshape(-1)


def to_hf(state: "Mapping[str, Tensor]", head_dim: int) -> "dict[str, Tensor]":
    """A whole state dict in Hugging Face's form."""
    return {hf_name(name): to_hf_rows(w, head_dim) if is_rotary(name) else w for name, w in state.items()}


def to_meta(state: "Mapping[str, Tensor]", head_dim: int) -> "dict[str, Tensor]":
    """A whole state dict in Meta's form. Raises `ArtifactError` for a tensor that no Llama has."""
    converted = {}
    for theirs, weight in state.items():
        name = meta_name(theirs)
        if name is None:
            raise ArtifactError(f"tensor {theirs!r} does not belong to a Llama", hint="only dense Llamas can be read")
        converted[name] = to_meta_rows(weight, head_dim) if is_rotary(name) else weight
    return converted
