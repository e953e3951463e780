"""Answers in a given form: a JSON schema, a regular expression, a grammar.

The library `llguidance` turns the form into an automaton over the vocabulary; after each token it says, as a mask,
which tokens may come next, and the others cannot be drawn. It is an extra: `pip install "puna[structured]"`.
An impossible or overlong form is refused when the request comes; the library bounds its own memory and time.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from puna.chat import Structure
from puna.config import require
from puna.errors import DataError, MissingExtra
from puna.tokenizer import AnyTokenizer

KINDS = get_args(Structure.__annotations__["kind"])
LONGEST = 1 << 17  # characters of a schema, an expression or a grammar
_KEPT = 8  # forms of earlier requests: the next one with the same form starts at once
_MOST_SAID = 300  # characters of what the library says of a form


class Forms:
    """Makes matchers for one tokenizer, in any thread; what the library knows of the vocabulary is made once."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._known: Any = None
        self._made: OrderedDict[Structure, Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, structure: Structure) -> "Matcher":
        """What follows an answer in the form of `structure`. Raises `DataError` for a form that makes no sense."""
        kind, text = structure.kind, structure.text
        require(kind in KINDS, f"{kind!r} is no kind of form", hint=f"known: {', '.join(KINDS)}")
        require(isinstance(text, str), f"the {kind} is a {type(text).__name__}", hint="it must be a string")
        if len(text) > LONGEST:
            raise DataError(f"the {kind} has {len(text):,} characters; at most {LONGEST:,} are read")
        with self._lock:
            made = self._made.pop(structure, None)
        made = made or self._make(structure)
        with self._lock:
            self._made[structure] = made
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return Matcher(made.deep_copy())

    def _make(self, structure: Structure) -> Any:
        try:
            import llguidance
        except ImportError:
            raise MissingExtra("llguidance", "structured") from None
        makers = {
            "json": llguidance.LLMatcher.grammar_from_json_schema,
            "regex": llguidance.LLMatcher.grammar_from_regex,
            "grammar": llguidance.LLMatcher.grammar_from_lark,
        }
        kind = structure.kind
        try:
            grammar = makers[kind](structure.text)
        except ValueError as error:
            raise DataError(f"the {kind} cannot be read: {_cropped(str(error))}") from None
        self._known = self._known or _vocabulary(self._tokenizer)
        made = llguidance.LLMatcher(self._known, grammar, log_level=0)
        if not made.is_error():  # some forms fail only when the first token is asked for
            made.compute_bitmask()
        if made.is_error():
            raise DataError(f"the {kind} cannot be followed: {_cropped(made.get_error())}")
        return made


def _cropped(said: str) -> str:
    """The library's words on a line: without its inner state, and of a long one the beginning and the end."""
    said = " ".join(said.partition("\n<state>")[0].split())
    half = _MOST_SAID // 2
    return said if len(said) <= _MOST_SAID else f"{said[:half]} ... {said[-half:]}"


class Matcher:
    """Where an answer stands in its form."""

    def __init__(self, matcher: Any):
        self._matcher = matcher
        self._bits = np.zeros(0, dtype=np.int32)

    @property
    def complete(self) -> bool:
        """Nothing can follow, not even an end token."""
        return self._matcher.is_stopped()

    def allowed(self, vocab_size: int, guessed: Sequence[int] = ()) -> np.ndarray:
        """Which tokens may come next, after the answer so far and then those `guessed`: (V,) bool.

        After guesses that the form does not allow anything may come: nothing is drawn there.
        """
        if len(self._bits) * 32 < vocab_size:
            self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        followed = self._matcher.try_consume_tokens(list(guessed)) if guessed else 0
        if followed < len(guessed):
            self._matcher.rollback(followed)
            return np.ones(vocab_size, dtype=bool)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if followed:
            self._matcher.rollback(followed)
        if self._matcher.is_error():
            raise DataError(f"the answer's form became too complex: {_cropped(self._matcher.get_error())}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[:vocab_size]
        return bits.view(bool)

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
