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
import torch
from torch import Tensor

from puna.chat import Sampling
from puna.config import from_json, require
from puna.kernels.top import likeliest

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


@dataclass(frozen=True)
class Rows:
    """The settings of a batch as arrays, one row per request; made anew when the batch changes."""

    seeds: np.ndarray  # (B,) uint64
    temperature: Tensor  # (B, 1)
    top_p: Tensor  # (B, 1)
    top_k: Tensor  # (B, 1), the vocabulary's size where there is no limit
    min_p: Tensor  # (B, 1)
    greedy: Tensor  # indices of the rows at temperature 0
    whole: Tensor  # of those drawn from the whole vocabulary (min_p at most)
    ranked: Tensor  # of those with top_k or top_p

    @classmethod
    def of(cls, settings: Sequence[Sampling], vocab_size: int, device: torch.device | str = "cpu") -> "Rows":
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        def rows(kind: str) -> Tensor:
            found = [i for i, s in enumerate(settings) if _kind(s) == kind]
            return torch.tensor(found, dtype=torch.int64, device=device)

        return cls(
            seeds=np.array([s.seed & (2**64 - 1) for s in settings], dtype=np.uint64),
            temperature=column([max(s.temperature, _LEAST) for s in settings]),
            top_p=column([max(s.top_p, _LEAST) for s in settings]),
            top_k=column([s.top_k or vocab_size for s in settings]),
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
    logits: Tensor, rows: Rows, drawn: Sequence[int], shaped: Tensor | None = None
) -> tuple[list[int], list[float]]:
    """The next token of each request and its log-probability. `logits` (B, V) float32; `drawn` counts earlier tokens.

    Tokens are drawn from `shaped` where it is given; log-probabilities are those of `logits`.
    """
    shaped = logits if shaped is None else shaped
    if len(rows.greedy) == len(logits):
        tokens = shaped.argmax(-1)
    else:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        uniforms = torch.from_numpy(uniform(rows.seeds, np.array(drawn, dtype=np.uint64)))[:, None].to(logits.device)
        for which, pick in ((rows.greedy, _likeliest), (rows.whole, _from_all), (rows.ranked, _from_ranked)):
            if len(which):
                tokens[which] = pick(shaped[which], rows, which, uniforms[which])
    chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return tokens.tolist(), chosen.tolist()


def _likeliest(logits: Tensor, _rows: Rows, _which: Tensor, _uniforms: Tensor) -> Tensor:
    return logits.argmax(-1)


def _from_all(logits: Tensor, rows: Rows, which: Tensor, uniforms: Tensor) -> Tensor:
    p = torch.softmax(logits / rows.temperature[which], -1)
    floor = rows.min_p[which]
    if floor.any():
        p = torch.where(p >= floor * p.amax(-1, keepdim=True), p, 0.0)
    return _inverse(p, uniforms)


def _from_ranked(logits: Tensor, rows: Rows, which: Tensor, uniforms: Tensor) -> Tensor:
    scaled, V = logits / rows.temperature[which], logits.shape[1]
    limits = rows.top_k[which], rows.top_p[which], rows.min_p[which]
    best, ids = likeliest(scaled, min(_FEW, V))
    tokens = _from_sorted(best, ids, *limits, uniforms)
    top_k, top_p, _ = limits
    enough = (top_k <= best.shape[1]) | ((top_k == V) & (best.sum(-1, keepdim=True) >= top_p))
    if not enough.all():  # a larger top_k, or a flat distribution of which these hold less than top_p
        short = ~enough[:, 0]
        best, ids = torch.softmax(scaled[short], -1).sort(dim=-1, descending=True, stable=True)
        tokens[short] = _from_sorted(best, ids, *(limit[short] for limit in limits), uniforms[short])
    return tokens


def _from_sorted(best: Tensor, ids: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from the likeliest tokens `ids` (B, N), whose probabilities `best` are in descending order."""
    best = torch.where(torch.arange(best.shape[1], device=best.device) < top_k, best, 0.0)
    # With top_k the probability is counted among the k; without, all of it is 1, also where only a few are at hand.
    total = torch.where(top_k <= best.shape[1], best.sum(-1, keepdim=True), 1.0)
    before = best.cumsum(-1) - best
    best = torch.where((before < top_p * total) & (best >= min_p * best[:, :1]), best, 0.0)
    return ids.gather(1, _inverse(best, uniforms)[:, None])[:, 0]


def _inverse(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The index of each row (B, N) at which the running sum first passes `uniforms` (B, 1) of the row's total."""
    sums = weights.double().cumsum(-1)
    return torch.searchsorted(sums, uniforms * sums[:, -1:], right=True)[:, 0].clamp_max(weights.shape[1] - 1)


def uniform(seeds: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, one per (seed, count); both uint64. SplitMix64's finaliser (Steele et al. 2014)."""
    return (_mix(_mix(seeds + _GOLDEN) + counts * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
