"""Drawing the next token, for a whole batch at once and yet for each request as if it were alone.

The distribution is softmax(logits / temperature), cut down in this order (that of Hugging Face's generation):

    top_k   the k likeliest tokens
    top_p   of those, the fewest that hold at least p of their probability (Holtzman et al. 2019, arXiv 1904.09751)
    min_p   of those, the ones with at least this share of the likeliest one's probability (arXiv 2407.01082)

Then one uniform number picks from it by inverse cumulative sums. The number is a hash of (seed, how many tokens the
request has drawn): no generator has a state, so neither the batch nor the order of steps can matter. Temperature 0 is
the likeliest token. The log-probability that is reported is the model's own, at temperature 1 and uncut; penalties and
whatever else changes single logits come before all this (`shaping.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puna.chat import Sampling
from puna.config import from_json, require
from puna.kernels.logits import Logits, at, best, inverse, pick, scaled

MOST_LOGPROBS = 20  # OpenAI's limit
_FEW = 256  # candidates that mostly hold top_p of the probability; sorting the whole vocabulary costs five times more
_MOST = 1e6  # of a penalty or bias: sums stay far from the largest float32
_LEAST = 1e-20  # of temperature and top_p: what is smaller means the same, and a logit over it is still a float32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check(sampling: Sampling) -> None:
    """Raises `ConfigError` for a value of a wrong type or out of range."""
    from_json(Sampling, vars(sampling))
    s = sampling
    require(
        0 <= s.temperature < math.inf,
        f"temperature={s.temperature} must be a number and not negative",
        hint="0 is greedy, 1 plain",
    )
    require(0 < s.top_p <= 1, f"top_p={s.top_p} must be above 0 and at most 1", hint="1 switches it off")
    require(s.top_k >= 0, f"top_k={s.top_k} must not be negative", hint="0 switches it off")
    require(0 <= s.min_p <= 1, f"min_p={s.min_p} must be between 0 and 1", hint="0 switches it off")
    require(s.max_tokens >= 0, f"max_tokens={s.max_tokens} must not be negative")
    require(s.min_tokens >= 0, f"min_tokens={s.min_tokens} must not be negative")
    bounds = f"must be from {1 / _MOST:g} to {_MOST:g}"
    penalty = s.repetition_penalty
    require(1 / _MOST <= penalty <= _MOST, f"repetition_penalty={penalty} {bounds}", hint="1 switches it off")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(s, name)
        require(abs(value) <= _MOST, f"{name}={value} must be from {-_MOST:g} to {_MOST:g}", hint="0 switches it off")
    for token, bias in s.logit_bias:
        fine = token >= 0 and (abs(bias) <= _MOST or bias == -math.inf)
        hint = f"from {-_MOST:g} to {_MOST:g}, or -inf, which bans the token"
        require(fine, f"logit_bias: {bias} for token {token} is no bias for a token", hint=hint)
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(s, name)
        require(value is None or 0 <= value <= MOST_LOGPROBS, f"{name}={value}: at most {MOST_LOGPROBS} are reported")


def among_likeliest(sampling: Sampling) -> bool:
    """Whether the draw is among the likeliest tokens, whose logits are taken as they come (`Span.screened`).

    Not so where any token may be drawn, where logits are changed first, and where log-probabilities are reported.
    """
    s = sampling
    cut = s.temperature == 0 or 0 < s.top_k <= _FEW // 4 or s.top_p < 1
    changed = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0 or bool(s.logit_bias)
    return cut and not changed and s.logprobs is None and s.prompt_logprobs is None


@dataclass(frozen=True)
class Rows:
    """The settings of a batch as arrays, one row per request; made anew when the batch changes."""

    seeds: np.ndarray  # (B,) uint64
    temperature: np.ndarray  # (B, 1) float32
    top_p: np.ndarray  # (B, 1) float32
    top_k: np.ndarray  # (B, 1) int64, the vocabulary's size where there is no limit
    min_p: np.ndarray  # (B, 1) float32
    greedy: np.ndarray  # indices of the rows at temperature 0
    whole: np.ndarray  # of those drawn from the whole vocabulary (min_p at most)
    ranked: np.ndarray  # of those with top_k or top_p

    @classmethod
    def of(cls, settings: Sequence[Sampling], vocab_size: int) -> "Rows":
        def column(values: list[float], dtype: type = np.float32) -> np.ndarray:
            return np.array(values, dtype=dtype)[:, None]

        def rows(kind: str) -> np.ndarray:
            return np.array([i for i, s in enumerate(settings) if _kind(s) == kind], dtype=np.int64)

        return cls(
            seeds=np.array([s.seed & (2**64 - 1) for s in settings], dtype=np.uint64),
            temperature=column([max(s.temperature, _LEAST) for s in settings]),
            top_p=column([max(s.top_p, _LEAST) for s in settings]),
            top_k=column([s.top_k or vocab_size for s in settings], np.int64),
            min_p=column([s.min_p for s in settings]),
            greedy=rows("greedy"),
            whole=rows("whole"),
            ranked=rows("ranked"),
        )


def _kind(sampling: Sampling) -> str:
    if sampling.temperature == 0 or sampling.top_k == 1:
        return "greedy"
    return "ranked" if sampling.top_k or sampling.top_p < 1 else "whole"


def draw(
    logits: Logits, rows: Rows, drawn: Sequence[int], shaped: Logits | None = None
) -> tuple[list[int], list[float]]:
    """The next token of each request and its log-probability. `logits` (B, V) float32; `drawn` counts earlier tokens.

    Tokens are drawn from `shaped` where it is given; log-probabilities are those of `logits`.
    """
    values, ids, sums = best(logits, 1)
    if shaped is None and len(rows.greedy) == len(ids):
        return ids[:, 0].tolist(), (values[:, 0] - sums).tolist()
    tokens = ids[:, 0] if shaped is None else best(shaped, 1)[1][:, 0]
    shaped = logits if shaped is None else shaped
    uniforms = uniform(rows.seeds, np.array(drawn, dtype=np.uint64))[:, None]
    for which, draw_from in ((rows.whole, _from_all), (rows.ranked, _from_ranked)):
        if len(which):
            some = shaped if len(which) == len(tokens) else shaped[which]
            tokens[which] = draw_from(scaled(some, rows.temperature[which]), rows, which, uniforms[which])
    return tokens.tolist(), (at(logits, tokens) - sums).tolist()


def _from_all(logits: Logits, rows: Rows, which: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    return inverse(logits, rows.min_p[which], uniforms)


def _from_ranked(logits: Logits, rows: Rows, which: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    V = logits.shape[1]
    limits = rows.top_k[which], rows.top_p[which], rows.min_p[which]
    likeliest, ids = _likeliest(logits, min(_FEW, V))
    tokens = _from_sorted(likeliest, ids, *limits, uniforms)
    top_k, top_p, _ = limits
    held = likeliest.sum(-1, keepdims=True)
    enough = (top_k <= likeliest.shape[1]) | ((top_k == V) & (held >= top_p))
    if not enough.all():  # a larger top_k, or a flat distribution of which these hold less than top_p
        short = np.flatnonzero(~enough[:, 0])
        likeliest, ids = _likeliest(logits[short], V)
        tokens[short] = _from_sorted(likeliest, ids, *(limit[short] for limit in limits), uniforms[short])
    return tokens


def _likeliest(logits: Logits, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities of the k likeliest tokens (B, k), descending, and their ids."""
    values, ids, sums = best(logits, k)
    return np.exp(values - sums[:, None]), ids


def _from_sorted(
    best: np.ndarray,
    ids: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    uniforms: np.ndarray,
) -> np.ndarray:
    """Draw from the likeliest tokens `ids` (B, N), whose probabilities `best` are in descending order."""
    zero = np.float32(0)
    best = np.where(np.arange(best.shape[1]) < top_k, best, zero)
    # With top_k the probability is counted among the k; without, all of it is 1, also where only a few are at hand.
    total = np.where(top_k <= best.shape[1], best.sum(-1, keepdims=True), np.float32(1))
    before = best.cumsum(-1, dtype=np.float64).astype(np.float32) - best
    best = np.where((before < top_p * total) & (best >= min_p * best[:, :1]), best, zero)
    return np.take_along_axis(ids, pick(best, uniforms)[:, None], 1)[:, 0]


def uniform(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, one per (seed, count); both uint64. SplitMix64's finaliser (Steele et al. 2014)."""
    return (_mix(_mix(seeds + _GOLDEN) + counts * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
