"""What the model has to beat: compressors and n-gram models on the very same held-out bytes.

A stage of its own, since it needs no model: `measure_baselines(config, documents, tokenizer, out=…)`. Its metrics:

    {"training": {"documents": 2650, "bytes": 7900000},
     "baselines": {"tokens_5gram": {"label": "5-gram, same tokens", "prior": "training text",
                                    "bits_per_byte": {as evaluation.bits writes it}}, …}}

`prior` says what the thing had seen before the text it was charged for: `nothing` (each excerpt alone), `other excerpts`
(all in a row), or `training text` (the fair comparison). An n-gram model over tokens costs -Σ log2 p(token) bits, as the
neural model does, starts each excerpt with the start symbol where that one sees <|begin_of_text|>, and is not charged
for the end of the document, and neither is the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from puna import log
from puna.artifacts import Artifact, stage
from puna.config import require
from puna.evaluation import compression, ngram
from puna.evaluation.bits import account
from puna.evaluation.heldout import Excerpt, HeldoutConfig, read_texts, sample_excerpts
from puna.tokenizer import load_tokenizer

_LABELS = {
    "gzip_each": ("gzip, each excerpt alone", "nothing"),
    "gzip_all": ("gzip, excerpts in a row", "other excerpts"),
    "xz_each": ("xz, each excerpt alone", "nothing"),
    "xz_all": ("xz, excerpts in a row", "other excerpts"),
    "xz_primed": ("xz, after the training text", "training text"),
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Which baselines are measured, on which held-out text."""

    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    token_orders: tuple[int, ...] = (5,)  # n of the n-gram models over the tokenizer's tokens
    byte_orders: tuple[int, ...] = (5, 8)  # n of those over bytes; 5 bytes are a short memory, 8 do better
    xz_preset: int = 6  # for the primed run; 9 takes longer and was not smaller on 8 MB of text
    max_train_bytes: int | None = None  # only the first documents up to this size; None: all of them

    def __post_init__(self) -> None:
        require(0 <= self.xz_preset <= 9, f"xz_preset={self.xz_preset} is not a level of xz", hint="0 to 9")
        for order in (*self.token_orders, *self.byte_orders):
            require(1 <= order <= 12, f"an n-gram order of {order} is not accepted", hint="1 to 12")


@stage("evaluation")
def measure_baselines(config: BaselineConfig, documents: Artifact, tokenizer: Artifact, *, out) -> dict:
    """Bits per byte of gzip, xz and n-gram models on held-out excerpts, after the same training text."""
    excerpts = sample_excerpts(documents, config.heldout)
    training = list(_training_texts(documents, config.max_train_bytes))
    seed = config.heldout.seed
    results: dict[str, dict] = {}

    def add(name: str, label: str, prior: str, report: dict) -> None:
        overall = report["overall"]["value"]
        log.info(f"  {label}: {overall:.3f} bits per byte")
        results[name] = {"label": label, "prior": prior, "bits_per_byte": report}

    for name, report in _compressors(excerpts, training, config).items():
        add(name, *_LABELS[name], report)
    encoder = load_tokenizer(tokenizer.path)
    for unit, orders, vocabulary, encode in (
        ("bytes", config.byte_orders, 256, lambda text: np.frombuffer(text.encode(), np.uint8)),
        ("tokens", config.token_orders, encoder.vocab_size, encoder.encode),
    ):
        for order, bits in _ngram_bits(excerpts, training, orders, vocabulary, encode):
            same = "same tokens" if unit == "tokens" else "bytes"
            add(f"{unit}_{order}gram", f"{order}-gram, {same}", "training text", account(excerpts, bits, seed))
    size = sum(len(t.encode()) for t in training)
    return {"training": {"documents": len(training), "bytes": size}, "baselines": results}


def _training_texts(documents: Artifact, max_bytes: int | None) -> Iterator[str]:
    total = 0
    for _, _, text in read_texts(documents, "train"):
        total += len(text.encode())
        if max_bytes is not None and total > max_bytes:
            return
        yield text


def _compressors(excerpts: list[Excerpt], training: list[str], config: BaselineConfig) -> dict[str, dict]:
    texts = [e.text for e in excerpts]
    data, prior = "".join(texts).encode(), "".join(training).encode()
    alone = compression.each_bits(texts)
    return {
        "gzip_each": account(excerpts, alone["gzip_each"], config.heldout.seed),
        "gzip_all": _whole(excerpts, compression.gzip_bytes(data)),
        "xz_each": account(excerpts, alone["xz_each"], config.heldout.seed),
        "xz_all": _whole(excerpts, compression.xz_bytes([data], len(data))),
        "xz_primed": _whole(excerpts, compression.xz_primed_bytes(prior, data, preset=config.xz_preset)),
    }


def _whole(excerpts: list[Excerpt], size: int) -> dict:
    """A single measured size of all excerpts: it cannot be told which of them cost what, so there is no interval."""
    total = sum(e.bytes for e in excerpts)
    overall = {"value": round(8 * size / total, 6), "low": None, "high": None, "n": len(excerpts)}
    return {"documents": len(excerpts), "bytes": total, "overall": overall}


def _ngram_bits(excerpts, training, orders, vocabulary, encode) -> Iterator[tuple[int, list[float]]]:
    if not orders:
        return
    counts = ngram.count((encode(t) for t in training), vocabulary, max(orders))
    symbols = [encode(e.text) for e in excerpts]
    for order in orders:
        model = counts.model(order)
        yield order, [float(-model.log2(s).sum()) for s in symbols]
