"""The stage that learns a vocabulary.

Training counts the pre-tokens of the text, starts from single bytes, and makes the most frequent adjacent pair a new
token, until the vocabulary is full. The counting and merging is the `tokenizers` library's; what is kept of its result
is the list of byte strings in the order in which they were found. That list is the tokenizer: `bpe.py` encodes by rank,
and `export.py` derives the Hugging Face form from it.

Cost grows with the number of *different* pre-tokens, which grows more slowly than the text; a share of a large corpus
gives nearly the vocabulary of the whole. So training reads at most `sample_bytes`, drawn piece by piece (a piece is at
most 25,000 characters of one document) by a hash of document and piece: the same text gives the same sample.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from puna import log
from puna.artifacts import Artifact, stage
from puna.config import require
from puna.errors import DataError
from puna.tokenizer.bpe import MODEL_FILE, SPECIALS, Tokenizer, write_ranks
from puna.tokenizer.export import byte_alphabet, write_hugging_face
from puna.tokenizer.pretokens import PATTERN, pieces
from puna.tokenizer.texts import Text, read_texts, text_bytes

SAMPLE_PIECE = 25_000  # characters
MIN_COUNT = 2  # a pair seen once is not worth a token


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What vocabulary to learn, and from how much text."""

    vocab_size: int = 4096  # ids in all: byte strings and 256 specials
    digits: int = 3  # of a number in one token, at most; a small vocabulary has no room for numbers: 1
    context: int = 131_072  # tokens; written as `model_max_length` for Hugging Face's library
    sample_bytes: int = 200_000_000  # of UTF-8; the text that training reads, about
    report_bytes: int = 4_000_000  # of UTF-8, of each source's held-out text, that the metrics are measured on
    seed: int = 0  # which sample

    def __post_init__(self) -> None:
        least = 256 + len(SPECIALS)
        require(
            self.vocab_size >= least, f"vocab_size={self.vocab_size} must be at least {least}: 256 bytes, 256 specials"
        )
        require(1 <= self.digits <= 3, f"digits={self.digits} must be 1, 2 or 3: encoding cuts numbers into threes")
        require(self.context > 0, f"context={self.context} must be positive")
        require(self.sample_bytes >= 1_000_000, f"sample_bytes={self.sample_bytes} must be at least 1,000,000")
        require(self.report_bytes > 0, f"report_bytes={self.report_bytes} must be positive")


@stage("tokenizer")
def train_tokenizer(config: TokenizerConfig, documents: Artifact, *, out: Path) -> dict[str, Any]:
    """Learn a vocabulary from the training split of `documents`.

    Writes `tokenizer.model`, and for Hugging Face's library `tokenizer.json`, `tokenizer_config.json` and
    `special_tokens_map.json`. Raises `DataError` if the text has too few different words to fill the vocabulary.
    """
    path = documents.file("documents.parquet")
    share = config.sample_bytes / max(1, text_bytes(path, "train"))
    sample = log.track(_sample(read_texts(path, "train"), share, config.seed), "tokenizer: reading", unit="pieces")
    ranks = train_ranks(sample, config.vocab_size - len(SPECIALS), config.digits)
    write_ranks(out / MODEL_FILE, ranks)
    tokenizer = Tokenizer(ranks)
    write_hugging_face(out, tokenizer, context=config.context)
    return {"vocab_size": tokenizer.vocab_size, "sample_share": min(1.0, share)} | measure(
        tokenizer, read_texts(path, "heldout"), config.report_bytes
    )


def _sample(texts: Iterable[Text], share: float, seed: int) -> Iterator[str]:
    """About `share` of the pieces of `texts`, chosen by hash."""
    bound = share * 2.0**64
    for text in texts:
        for number, piece in enumerate(pieces(text.text, SAMPLE_PIECE)):
            if share >= 1 or xxhash.xxh3_64_intdigest(f"{seed}/{text.id}/{number}".encode()) < bound:
                yield piece


def train_ranks(texts: Iterable[str], size: int, digits: int = 3) -> dict[bytes, int]:
    """`size` byte strings and their ranks, learnt from `texts`. The result depends on the counts of pre-tokens alone.

    No string holds more than `digits` digits: pairs are counted in pieces of that many, encoding still cuts into threes.

    Raises `DataError` if no pair that occurs twice is left before the vocabulary is full.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trained

    model = Trained(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN.replace(r"\p{N}{1,3}", rf"\p{{N}}{{1,{digits}}}")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=MIN_COUNT, initial_alphabet=list(alphabet), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    vocabulary = model.get_vocab()
    if len(vocabulary) < size:
        filled = len(vocabulary) + len(SPECIALS)
        raise DataError(
            f"the text has too few different words for a vocabulary of {size + len(SPECIALS):,}: it fills {filled:,}",
            hint=f"give more text, or set vocab_size to at most {filled}",
        )
    return {bytes(alphabet[c] for c in token): rank for token, rank in vocabulary.items()}


def measure(tokenizer: Tokenizer, texts: Iterable[Text], limit: int) -> dict[str, Any]:
    """How well `tokenizer` packs `texts`: of each source, documents are encoded until they have `limit` bytes.

    Gives characters and bytes per token in all, bytes per token for each source, and the share of the byte strings that
    occur at all.
    """
    characters, seen = 0, set()
    size, count = Counter(), Counter()
    for text in texts:
        if size[text.source] >= limit:
            continue
        shown = text.text[:limit]
        ids = tokenizer.encode(shown)
        seen.update(ids)
        characters += len(shown)
        size[text.source] += len(shown.encode())
        count[text.source] += len(ids)
    tokens = sum(count.values())
    if not tokens:
        return {}
    return {
        "heldout_tokens": tokens,
        "characters_per_token": characters / tokens,
        "bytes_per_token": sum(size.values()) / tokens,
        "bytes_per_token_by_source": {s: size[s] / count[s] for s in sorted(count) if count[s]},
        "vocabulary_used": len(seen) / len(tokenizer.ranks),
    }
