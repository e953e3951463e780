"""Any checkpoint that a user may have, opened by what it is: one door to all formats.

with open_checkpoint(path) as opened:      headers only
    opened.kind, opened.config, opened.weights
model = load_checkpoint(path)              the weights, streamed
tokenizer = checkpoint_tokenizer(path)     from its files, or from inside a GGUF file
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from puna.errors import ArtifactError
from puna.model.checkpoint import WeightFiles, load_config, load_model
from puna.model.detect import Kind as CheckpointKind
from puna.model.detect import kind_of
from puna.model.gguf import GgufFile, load_gguf
from puna.model.gguf.vocabulary import to_tokenizer
from puna.model.llama import Llama
from puna.model.meta import MetaFiles, load_meta
from puna.model.sizes import LlamaConfig
from puna.model.weights import Weights
from puna.tokenizer.load import AnyTokenizer, load_tokenizer
from puna.tokenizer.sentencepiece import Kind, Piece, SentencePieceTokenizer


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose headers were read."""

    kind: CheckpointKind
    config: LlamaConfig
    weights: Weights
    notes: tuple[str, ...] = ()  # what had to be concluded


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Opened]:
    """Read the headers of the checkpoint at `path`. Raises `ArtifactError` for what is none."""
    kind = kind_of(path)
    if kind == "quantised":
        raise ArtifactError(f"{path} holds a model that we quantised", hint="give the checkpoint that it was made from")
    if kind == "gguf":
        with GgufFile(path) as file:
            yield Opened(kind=kind, config=file.config, weights=file)
    elif kind == "meta":
        with MetaFiles(path) as files:
            yield Opened(kind=kind, config=files.config, weights=files, notes=tuple(files.notes))
    else:
        with WeightFiles(path) as files:
            yield Opened(kind=kind, config=load_config(path), weights=files)


def load_checkpoint(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    """The model at `path`, whatever its format, with weights in `dtype`.

    Needs the model's memory and a few megabytes more. Raises `ArtifactError` for what is no model, or a damaged one.
    """
    readers = {"gguf": load_gguf, "meta": load_meta}
    return readers.get(kind_of(path), load_model)(path, dtype)


def checkpoint_tokenizer(path: Path) -> AnyTokenizer:
    """The tokenizer of the checkpoint at `path`. Raises `ArtifactError` if it has none whose ids would be exact."""
    if kind_of(path) != "gguf":
        return load_tokenizer(path)
    with GgufFile(path) as file:
        vocabulary = file.vocabulary()
    if vocabulary.model != "llama":
        return to_tokenizer(vocabulary, path)
    pieces = zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True)
    return SentencePieceTokenizer([Piece(text, score, Kind(kind)) for text, score, kind in pieces], where=str(path))
