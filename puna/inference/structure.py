"""Answers in a given form: a JSON schema, a regular expression, a grammar.

The library `llguidance` turns the form into an automaton over the vocabulary; after each token it says, as a mask,
which tokens may come next, and the others cannot be drawn. It is an extra: `pip install "puna[structured]"`.
An impossible or overlong form is refused when the request comes; the library bounds its own memory and time.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.chat import Structure
from puna.errors import DataError, MissingExtra
from puna.tokenizer import AnyTokenizer

LONGEST = 1 << 18  # characters of a schema, an expression or a grammar


class Forms:
    """Makes matchers for one tokenizer; what the library knows of the vocabulary is made once."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._known: Any = None

    def matcher(self, structure: Structure) -> "Matcher":
        """What follows an answer in the form of `structure`. Raises `DataError` for a form that makes no sense."""
        try:
            import llguidance
        except ImportError:
            raise MissingExtra("llguidance", "structured") from None
        if len(structure.text) > LONGEST:
            raise DataError(
                f"the {structure.kind} has {len(structure.text):,} characters; at most {LONGEST:,} are read"
            )
        make = {
            "json": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "grammar": llguidance.LLMatcher.grammar_from_lark,
        }[structure.kind]
        try:
            grammar = make(structure.text)
        except ValueError as error:
            raise DataError(f"the {structure.kind} cannot be read: {error}") from None
        self._known = self._known or _vocabulary(self._tokenizer)
        matcher = llguidance.LLMatcher(self._known, grammar, log_level=0)
        if matcher.is_error():
            raise DataError(f"the {structure.kind} cannot be followed: {matcher.get_error()}")
        return Matcher(matcher)


class Matcher:
    """Where an answer stands in its form."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._bits = np.zeros(0, dtype=np.int32)

    @property
    def complete(self) -> bool:
        """Nothing can follow, not even an end token."""
        return self._matcher.is_stopped()

    def allowed(self, vocab_size: int) -> Tensor:
        """Which tokens may come next: (V,) bool."""
        if len(self._bits) * 32 < vocab_size:
            self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise DataError(f"the answer's form became too complex: {self._matcher.get_error()}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:vocab_size]
        return torch.from_numpy(bits.astype(bool))

    def take(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._matcher.consume_token(token)


class _Described:
    """Our tokenizer as the library asks for it."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids), tokenizer.bos
        self.special_token_ids = [tokenizer.special(name) for name in tokenizer.special_names]
        self.tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _vocabulary(tokenizer: AnyTokenizer) -> Any:
    import llguidance

    wrapper = llguidance.TokenizerWrapper(_Described(tokenizer))
    return llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.vocab_size, eos_token=sorted(tokenizer.stop_ids))
