"""Guessing tokens cheaply, so that the model can read several in one step.

A step costs little more for five tokens than for one, since all the weights are read either way. So something quick
guesses how an answer goes on; the model reads the last token and the guesses, and draws *after each of them* as it
would have drawn without. The guesses that agree with what was drawn were right, and their tokens come for free; the
first that does not ends it, and what was read of the rest is forgotten.

    drawn so far  ... the           guesses  sea and sky
    the model reads    the  sea  and  sky
    and draws          sea  and  the  ...        two right, three tokens from one step

This is exact, and more than in distribution: a token is drawn with the random number of its place in the answer
(`sampler.py`), whoever guessed what, so a request gets the very tokens that it gets without. A guess counts with the
probability that the model gives it, which for a single guess is the best there is (Leviathan et al. 2023, arXiv
2211.17192); a draft model draws its guesses with the same random numbers, so that the two agree where they can.
"""

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from puna.config import require
from puna.inference import sampler
from puna.inference.runner import Choice, make_runner
from puna.inference.scheduler import Reading
from puna.inference.sequence import Sequence
from puna.inference.shaping import needs_shaping, shape
from puna.inference.spans import Runner, Span
from puna.kernels.logits import Logits, row, with_rows

if TYPE_CHECKING:
    from puna.model.llama import Llama


class Guesser(Protocol):
    """What guesses."""

    ahead: int  # tokens at most

    def guess(self, readings: list[Reading]) -> list[list[int]]:
        """For each reading the tokens that may follow it, at most its `ahead`; it may give none."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """The cache has copied a block."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens earlier in the text follows them again.

    It costs nothing, and is right where an answer repeats its prompt: in summaries, edits of code, quotations.
    """

    def __init__(self, ahead: int = 4, longest: int = 3):
        self.ahead, self.longest = ahead, longest
        self._seen: WeakKeyDictionary[Sequence, dict[Tokens[int], int]] = WeakKeyDictionary()

    def guess(self, readings: list[Reading]) -> list[list[int]]:
        """See `Guesser`."""
        return [self._continue(r.sequence, r.ahead) if r.ahead else [] for r in readings]

    def copy_block(self, source: int, target: int) -> None:
        """Nothing of it is in the cache."""

    def _continue(self, sequence: Sequence, ahead: int) -> list[int]:
        tokens = sequence.tokens
        after = self._seen.setdefault(sequence, {})  # the last tokens -> where what followed them begins
        for end in range(after.get((), 1), len(tokens)):
            for size in range(1, min(self.longest, end) + 1):
                after[tuple(tokens[end - size : end])] = end
        after[()] = len(tokens)
        for size in range(min(self.longest, len(tokens)), 1, -1):
            if begin := after.get(tuple(tokens[-size:])):
                period = len(tokens) - begin  # where the text ends the repetition goes on from its beginning
                return [tokens[begin + i % period] for i in range(ahead)]
        return []


class DraftModel:
    """Guesses with a smaller model of the same vocabulary.

    Its runner has as many blocks as the engine's, and keeps its own keys and values of the same tokens under the same
    numbers: what the engine shares, copies and gives up is shared, copied and given up here.
    """

    def __init__(self, runner: Runner, vocab_size: int, ahead: int = 4):
        self.ahead = ahead
        self._runner, self._vocab_size = runner, vocab_size
        self._read: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()  # tokens that the draft has read

    def copy_block(self, source: int, target: int) -> None:
        """See `Guesser`."""
        self._runner.copy_block(source, target)

    def guess(self, readings: list[Reading]) -> list[list[int]]:
        """See `Guesser`. The draft reads all that the model reads."""
        guesses: list[list[int]] = [[] for _ in readings]
        spans = [self._catch_up(reading) for reading in readings]
        active = [i for i, r in enumerate(readings) if r.ahead]
        while spans:
            logits = self._runner.forward(spans)[:, : self._vocab_size]
            if not active:
                break
            sequences = [readings[i].sequence for i in active]
            for i, token in zip(active, self._draw(sequences, [guesses[i] for i in active], logits)):
                guesses[i].append(token)
            active = [i for i in active if len(guesses[i]) < readings[i].ahead]
            spans = [self._next(readings[i], guesses[i]) for i in active]
        return guesses

    def _catch_up(self, reading: Reading) -> Span:
        """What the draft has not read of the sequence, up to where the model's span ends."""
        sequence, span = reading.sequence, reading.span
        end = span.start + len(span.tokens)
        start = min(self._read.get(sequence, span.start), span.start)
        self._read[sequence] = end
        wanted = int(reading.ahead > 0)
        return Span(sequence.tokens[start:end], start, span.blocks, wanted, screened=sequence.screened)

    def _next(self, reading: Reading, guesses: list[int]) -> Span:
        start = reading.span.start + len(reading.span.tokens) + len(guesses) - 1
        self._read[reading.sequence] = start + 1
        return Span([guesses[-1]], start, reading.span.blocks, screened=reading.sequence.screened)

    def _draw(self, sequences: list[Sequence], guesses: list[list[int]], logits: Logits) -> list[int]:
        rows = sampler.Rows.of([s.sampling for s in sequences], logits.shape[1])
        shaped = {
            i: shape(row(logits, i), sequence, guessed)
            for i, (sequence, guessed) in enumerate(zip(sequences, guesses))
            if needs_shaping(sequence)
        }
        counts = [s.count + len(g) for s, g in zip(sequences, guesses)]
        return sampler.draw(logits, rows, counts, with_rows(logits, shaped) if shaped else None)[0]


def make_guesser(
    lookahead: int, draft: "Llama | Runner | None", vocab_size: int, runner: Runner, choice: Choice
) -> Guesser | None:
    """What guesses `lookahead` tokens for an engine over `runner`: `draft`, or the text itself; None for 0 tokens.

    `vocab_size` is the tokenizer's: a model may have more logits than there are tokens.
    """
    require(lookahead >= 0, f"lookahead={lookahead} must not be negative", hint="0 switches it off")
    if lookahead == 0:
        require(draft is None, "a draft model without lookahead has nothing to do", hint="lookahead=4")
        return None
    if draft is None:
        return PromptLookup(lookahead)
    sizes = draft.config.vocab_size, runner.config.vocab_size
    fits = f"the draft's vocabulary has {sizes[0]:,} tokens, the model's {sizes[1]:,}"
    require(sizes[0] == sizes[1], fits, hint="both must have been trained with one tokenizer")
    if not isinstance(draft, Runner):
        draft = make_runner(draft, blocks=runner.blocks, choice=choice)
    require(draft.blocks == runner.blocks, f"the draft's cache has {draft.blocks} blocks, the model's {runner.blocks}")
    return DraftModel(draft, vocab_size, lookahead)
