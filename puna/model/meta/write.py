"""A model, written as Meta releases one: `params.json` and one pickle per machine (`files.py` says what is in which).

`torch.load(file, weights_only=True)` reads each file, and so does Meta's own code. The embedding is cut by columns for
models of Llama 1's and 2's rotary base and by rows for later ones, as their code expects. With more files than
key/value heads, neighbours get copies of the same heads. The output matrix of a tied model is written too, for Meta's
code has no notion of a tied one. The same weights give the same bytes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from puna.artifacts import replacing, write_atomic
from puna.errors import ArtifactError, ConfigError
from puna.model.llama import Llama
from puna.model.meta.files import EMBEDDING, OUTPUT
from puna.model.meta.params import LLAMA_3_THETA, PARAMS, format_params
from puna.model.sizes import LlamaConfig
from puna.model.stored import StoredModel, Weight, weights_of

TOKENIZER = "tokenizer.model"


def write_meta(
    model: Llama | StoredModel, tokenizer_dir: Path | None, out: Path, shards: int = 1, dtype: torch.dtype | None = None
) -> None:
    """Write `model` into the folder `out` as `shards` files, in `dtype` (the model's own by default).

    `tokenizer.model` is copied from `tokenizer_dir`, unless that is None. Beside the model this needs the memory of one
    file, and of its largest tensor, where weights are cut, converted or not in memory; a stored model is read once for each
    file. Raises `ConfigError` for a model that cannot be cut into so many parts.
    """
    params = format_params(model.config)
    cuts = _cuts(model.config, shards)
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir is not None:
        source = Path(tokenizer_dir) / TOKENIZER
        if not source.is_file():
            raise ArtifactError(f"{tokenizer_dir} has no {TOKENIZER}", hint="Meta's format has the tokenizer in it")
        write_atomic(out / TOKENIZER, source.read_bytes())
    dtype = dtype or (model.dtype if isinstance(model, StoredModel) else model.norm.weight.dtype)
    weights = weights_of(model)
    weights[OUTPUT] = weights.get(OUTPUT, weights[EMBEDDING])
    for shard in range(shards):
        with replacing(out / f"consolidated.{shard:02}.pth") as temporary, temporary.open("wb") as file:
            try:
                torch.save(_shard(weights, shard, cuts, dtype), file)
            except RuntimeError as error:  # what PyTorch makes of a full disk, once it could not finish the archive
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
    write_atomic(out / PARAMS, json.dumps(params))


def _shard(
    weights: dict[str, Weight], shard: int, cuts: dict[str, Callable[[Tensor, int], Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of one file; a matrix that appears under two names and is cut the same way stays one."""
    made: dict[tuple[int, int], Tensor] = {}
    parts = {}
    for name, weight in weights.items():
        cut = cuts[_cut_name(name)]
        key = id(weight), id(cut)
        if key not in made:
            whole = weight.whole(dtype)
            part = cut(whole, shard) if whole.ndim > 1 else whole
            # Of a view torch.save would write all that it looks at, so a view is copied.
            is_view = part.untyped_storage().nbytes() > part.nbytes or not part.is_contiguous()
            made[key] = part.clone(memory_format=torch.contiguous_format) if is_view else part
        parts[name] = made[key]
    return parts


def _cut_name(name: str) -> str:
    leaf = name.split(".")[-2]
    if leaf in ("wo", "w2"):
        return "columns"
    return {"wk": "heads", "wv": "heads", "tok_embeddings": "embedding"}.get(leaf, "rows")


def _cuts(config: LlamaConfig, shards: int) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """How each kind of matrix gives shard number n its part. Raises `ConfigError` if one cannot be cut evenly."""
    by_rows = config.rope_theta >= LLAMA_3_THETA
    divided = {
        "n_heads": config.n_heads,
        "ffn_dim": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "dim": config.dim,
    }
    uneven = [name for name, size in divided.items() if shards < 1 or size % shards]
    heads = min(shards, config.n_kv_heads)  # number of different parts of wk and wv
    if shards < 1 or shards % heads or config.n_kv_heads % heads:
        uneven.append("n_kv_heads")
    if uneven:
        raise ConfigError(
            f"{shards} files cannot share {', '.join(uneven)} evenly", hint="give 1, 2, 4, 8 or 16 shards"
        )

    def rows(weight: Tensor, shard: int) -> Tensor:
        return weight.chunk(shards)[shard]

    def columns(weight: Tensor, shard: int) -> Tensor:
        return weight.chunk(shards, dim=1)[shard]

    def kv_heads(weight: Tensor, shard: int) -> Tensor:
        return weight.chunk(heads)[shard * heads // shards]

    return {"rows": rows, "columns": columns, "heads": kv_heads, "embedding": rows if by_rows else columns}
