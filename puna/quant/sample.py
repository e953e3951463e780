"""Text as rows of tokens of one length, to calibrate with and to measure on.

Texts follow one another, each after a begin-of-text token, and the stream is cut into rows. Which text:

    a file          that text
    documents       of an artifact: its training split to calibrate with, its held-out split to measure on
    nothing         a sample of the text that comes with Python and its packages, of which a third is held out
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from puna.artifacts import Artifact
from puna.curation.embedded import embedded_sample
from puna.errors import DataError
from puna.evaluation.excerpts import read_files
from puna.evaluation.heldout import HeldoutConfig, choose, read_texts
from puna.tokenizer.load import AnyTokenizer

ROW = 512  # tokens
Text = Artifact | Path | None


def texts_of(source: Text, part: Literal["heldout", "calibration"]) -> Iterable[str]:
    """The texts of `source` for that use. Raises `DataError` for a file without text."""
    if isinstance(source, Path):
        return [text for _, text in read_files([source])]
    if source is None:
        found = ((d.id, d.source, d.text) for d in embedded_sample(part))
    else:
        found = read_texts(source, "heldout" if part == "heldout" else "train")
    return (excerpt.text for excerpt in choose(found, HeldoutConfig(max_bytes=4_000_000, excerpt_bytes=4096)))


def rows_of(texts: Iterable[str], tokenizer: AnyTokenizer, tokens: int, length: int) -> Tensor:
    """About `tokens` tokens of `texts` as rows (N, `length`), int64; a text too short for one row makes a shorter one.

    Raises `DataError` for fewer than two tokens.
    """
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.bos, *tokenizer.encode(text)]
        if len(stream) >= tokens:
            break
    length = min(length, len(stream))
    if length < 3:
        raise DataError(f"the text has {max(0, len(stream) - 1)} tokens: too short", hint="give two tokens or more")
    count = max(1, min(tokens, len(stream)) // length)
    return torch.tensor(stream[: count * length]).unflatten(0, (count, length))
