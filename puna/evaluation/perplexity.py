"""How well a model reads text, and how fast: bits per byte, perplexity, and tokens per second.

    bits per byte   what the text costs; does not depend on the vocabulary (`bits.py`)
    perplexity      exp of the mean nats per token: comparable between models of one vocabulary only

Both come with a 95% interval, by bootstrap over the excerpts.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from puna.chat import Generator
from puna.errors import DataError
from puna.evaluation import intervals
from puna.evaluation.bits import account, document_bits
from puna.evaluation.heldout import Excerpt
from puna.evaluation.intervals import Estimate
from puna.evaluation.scores import plain


def text_report(
    generator: Generator, excerpts: Sequence[Excerpt], tokens_of: Callable[[str], int], seed: int = 0
) -> dict[str, Any]:
    """`bits.account`'s report of `excerpts` without the single documents, and beside it `tokens`, `perplexity`,
    `bytes_per_token`, `seconds` and `tokens_per_s`.

    `tokens_of` counts the tokens of a text. Raises `DataError` for fewer than two tokens in all.
    """
    counts = [tokens_of(excerpt.text) for excerpt in excerpts]
    if sum(counts) < 2:
        raise DataError(f"the text has {sum(counts)} tokens: too short to measure", hint="give two tokens or more")
    started = time.perf_counter()
    bits = document_bits(generator, excerpts)
    seconds = time.perf_counter() - started
    report = account(excerpts, bits, seed)
    del report["per_document"]
    nats = intervals.ratio([b * math.log(2) for b in bits], counts, seed=seed)
    return report | {
        "tokens": sum(counts),
        "perplexity": plain(_exponential(nats)),
        "bytes_per_token": report["bytes"] / sum(counts),
        "seconds": seconds,
        "tokens_per_s": sum(counts) / seconds,
    }


def _exponential(nats: Estimate) -> Estimate:
    low, high = (math.exp(x) if x < 700 else math.inf for x in (nats.low, nats.high))
    return Estimate(value=math.exp(min(nats.value, 700)), low=low if nats.n > 1 else -math.inf, high=high, n=nats.n)
