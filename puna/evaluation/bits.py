"""Bits per byte: how many bits the model needs, on average, for each byte of text it has never seen.

    bits per byte = Σ over excerpts of -log2 P(excerpt)  /  Σ over excerpts of their UTF-8 bytes

Unlike a loss per token it does not depend on the vocabulary, so a language model, an n-gram model and `xz` stand on one
axis. `bits_report` gives, and the report reads:

    {"documents": 97, "bytes": 198004,
     "overall": {"value": 1.93, "low": 1.85, "high": 2.02, "n": 97},
     "by_source": {"books": {"value": …, "low": …, "high": …, "n": 40, "bytes": 81000}, …},
     "per_document": {"bytes": [2048, …], "bits": [3955.2, …]}}

`low` and `high` bound the 95% interval (bootstrap over documents; `null` for a single document); `per_document` is in
the order of `sample_excerpts`, so two models measured on one sample can be compared pair by pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from puna import log as news
from puna.artifacts import Artifact
from puna.chat import Continuation, Generator
from puna.evaluation import intervals
from puna.evaluation.heldout import Excerpt, HeldoutConfig, sample_excerpts
from puna.evaluation.scores import plain

_EXCERPTS_AT_ONCE = 32  # between two moves of the progress bar


@dataclass(frozen=True, kw_only=True)
class _Tally:
    bits: list[float]
    bytes: list[int]


def bits_report(generator: Generator, documents: Artifact, config: HeldoutConfig) -> dict:
    """Bits per byte of a model on the held-out split of `documents` (see the module for the form)."""
    excerpts = sample_excerpts(documents, config)
    return account(excerpts, document_bits(generator, excerpts), config.seed)


def document_bits(generator: Generator, excerpts: Sequence[Excerpt]) -> list[float]:
    """The bits that `generator` needs for each excerpt on its own."""
    bits: list[float] = []
    with news.progress("held-out bits per byte", sum(e.bytes for e in excerpts), unit="bytes") as progress:
        for start in range(0, len(excerpts), _EXCERPTS_AT_ONCE):
            group = excerpts[start : start + _EXCERPTS_AT_ONCE]
            bits += [-nats / log(2) for nats in generator.score([Continuation(text=e.text) for e in group])]
            progress.advance(sum(e.bytes for e in group))
    return bits


def account(excerpts: Sequence[Excerpt], bits: Sequence[float], seed: int) -> dict:
    """The report of anything that charges `bits[i]` for `excerpts[i]`: a model, an n-gram model, a compressor."""
    groups: dict[str, _Tally] = {}
    for excerpt, cost in zip(excerpts, bits, strict=True):
        tally = groups.setdefault(excerpt.source, _Tally(bits=[], bytes=[]))
        tally.bits.append(cost)
        tally.bytes.append(excerpt.bytes)
    sizes = [e.bytes for e in excerpts]
    return {
        "documents": len(excerpts),
        "bytes": sum(sizes),
        "overall": plain(intervals.ratio(bits, sizes, seed=seed)),
        "by_source": {
            source: {**plain(intervals.ratio(t.bits, t.bytes, seed=seed)), "bytes": sum(t.bytes)}
            for source, t in sorted(groups.items())
        },
        "per_document": {"bytes": sizes, "bits": [round(b, 3) for b in bits]},
    }
