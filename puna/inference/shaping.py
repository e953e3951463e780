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

import torch
from torch import Tensor

from puna.errors import DataError
from puna.inference.sequence import Sequence


def needs_shaping(sequence: Sequence) -> bool:
    """Whether any of it applies now."""
    s = sequence.sampling
    penalties = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
    ends = s.ignore_end or sequence.count < s.min_tokens
    return penalties or ends or bool(s.logit_bias) or sequence.matcher is not None


def shape(logits: Tensor, sequence: Sequence, guessed: Tokens[int] = ()) -> Tensor:
    """`logits` (V,) as the request wants them, after the tokens of `sequence` and then those `guessed`; a new tensor.

    Raises `DataError` where they leave nothing to draw, or the form became too complex.
    """
    s = sequence.sampling
    logits = logits.clone()
    if s.repetition_penalty != 1:
        ids = _ids({*sequence.tokens, *guessed}, logits)
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
    if s.presence_penalty != 0 or s.frequency_penalty != 0:
        counts = Counter([*sequence.drawn, *guessed])
        often = torch.tensor([counts[i] for i in sorted(counts)], dtype=logits.dtype, device=logits.device)
        logits[_ids(counts, logits)] -= s.presence_penalty + s.frequency_penalty * often
    if s.logit_bias:
        bias = dict(s.logit_bias)
        added = torch.tensor([bias[i] for i in sorted(bias)], dtype=logits.dtype, device=logits.device)
        logits[_ids(bias, logits)] += added
    before = logits
    if s.ignore_end or sequence.count + len(guessed) < s.min_tokens:
        logits = logits.clone()
        logits[_ids(sequence.stop_ids, logits)] = -torch.inf
    if sequence.matcher is not None:
        allowed = sequence.matcher.allowed(len(logits), guessed).to(logits.device)
        formed = logits.masked_fill(~allowed, -torch.inf)
        logits = formed if formed.isfinite().any() else before.masked_fill(~allowed, -torch.inf)
    if s.logit_bias and not logits.isfinite().any():
        raise DataError("no token is left to draw: logit_bias bans all that may come here")
    return logits


def _ids(tokens, like: Tensor) -> Tensor:
    return torch.tensor(sorted(tokens), dtype=torch.int64, device=like.device)
