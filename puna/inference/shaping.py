"""Single logits changed before a token is drawn: penalties, biases, ends that may not come yet, a form to be kept.

In this order, each for one request by itself:

    repetition penalty r    of tokens in the prompt or the answer: a positive logit / r, a negative one * r
                            (Keskar et al. 2019, arXiv 1909.05858)
    presence, frequency     minus the first, and minus the second times how often the answer has the token
    logit bias              plus the bias
    min_tokens, ignore_end  the end tokens cannot be drawn
    structure               what the answer's form does not allow here cannot be drawn

The form goes last and has the last word: where it allows nothing but the end, the answer ends.
"""

from collections import Counter
from collections.abc import Sequence as Tokens

import numpy as np

from puna.errors import DataError
from puna.inference.sequence import Sequence

_NEVER = np.float32(-np.inf)


def needs_shaping(sequence: Sequence) -> bool:
    """Whether any of it applies now."""
    s = sequence.sampling
    penalties = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
    ends = s.ignore_end or sequence.count < s.min_tokens
    return penalties or ends or bool(s.logit_bias) or sequence.matcher is not None


def shape(logits: np.ndarray, sequence: Sequence, guessed: Tokens[int] = ()) -> np.ndarray:
    """`logits` (V,) as the request wants them, after the tokens of `sequence` and then those `guessed`; a new array.

    Raises `DataError` where they leave nothing to draw, or the form became too complex.
    """
    s = sequence.sampling
    logits = logits.copy()
    if s.repetition_penalty != 1:
        ids = _ids({*sequence.tokens, *guessed})
        penalty, seen = np.float32(s.repetition_penalty), logits[ids]
        logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    if s.presence_penalty != 0 or s.frequency_penalty != 0:
        counts = Counter([*sequence.drawn, *guessed])
        often = np.array([counts[i] for i in sorted(counts)], dtype=np.float32)
        logits[_ids(counts)] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * often
    if s.logit_bias:
        bias = dict(s.logit_bias)
        logits[_ids(bias)] += np.array([bias[i] for i in sorted(bias)], dtype=np.float32)
    before = logits
    if s.ignore_end or sequence.count + len(guessed) < s.min_tokens:
        logits = logits.copy()
        logits[_ids(sequence.stop_ids)] = -np.inf
    if sequence.matcher is not None:
        allowed = sequence.matcher.allowed(len(logits), guessed)
        formed = np.where(allowed, logits, _NEVER)
        logits = formed if np.isfinite(formed).any() else np.where(allowed, before, _NEVER)
    if s.logit_bias and not np.isfinite(logits).any():
        raise DataError("no token is left to draw: logit_bias bans all that may come here")
    return logits


def _ids(tokens) -> np.ndarray:
    return np.array(sorted(tokens), dtype=np.int64)
