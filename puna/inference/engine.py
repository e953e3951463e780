"""The engine: requests in, answers out, as many as fit at once.

    step:  plan what each sequence reads: its last token, or a piece of its prompt      scheduler, blocks
           guess what may follow, if that was asked for                                 speculation
           read it all in one forward                                                   runner
           draw a token after each sequence that was read to its end                    sampler, shaping
           retire the sequences that are done

There is no background thread. Whoever waits for an answer makes the steps: `generate` and `stream` may be called from
many threads, one of them steps for all, and the others find their tokens when it has. So requests of many callers run
in one batch, and an idle engine costs nothing.

What a request gets does not depend on what runs beside it: padding is never seen, and randomness comes from its own
seed. (Sums in floating point depend on the shape of a batch in their last bits; a runner says whether its do.)
docs/engine.md walks one request through all this.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puna.chat import Completion, Continuation, Message, Request, Structure
from puna.config import require
from puna.inference import scoring
from puna.inference.blocks import BlockCache
from puna.inference.drawing import Drawing
from puna.inference.reception import Reception
from puna.inference.runner import Choice, make_runner, open_runner
from puna.inference.scheduler import Reading, Scheduler
from puna.inference.sequence import ContextError, Piece
from puna.inference.sequence import Sequence as Running
from puna.inference.spans import BLOCK_TOKENS, Runner
from puna.inference.speculation import make_guesser
from puna.inference.turns import Turns
from puna.kernels.logits import Logits
from puna.kernels.threads import set_threads
from puna.model.opening import Dtype, checkpoint_format
from puna.tokenizer import AnyTokenizer
from puna.tokenizer.formats import DialogFormat, dialog_format

if TYPE_CHECKING:
    from puna.model.llama import Llama

SLOTS = 64


class Engine:
    """A model that answers: a `chat.Generator`, and `stream` for one who watches.

    `format` is how the model is spoken to (by default what is likely for the tokenizer), `slots` how many requests run
    at once, `cache_bytes` what their keys and values may take (`runner.py` says what None means), `kv` how they are
    kept; `config.context` is the model's, or less if the cache holds less. A step reads at most `step_tokens` tokens
    of prompts while somebody streams an answer (None: what suits the runner). At most `queue` requests wait, if it is given; more are refused with
    `BusyError`. `lookahead` tokens are guessed, by looking back in the text or by the model `draft`. `runner` chooses
    what computes.
    """

    def __init__(
        self,
        model: "Llama | Runner",
        tokenizer: AnyTokenizer,
        *,
        format: DialogFormat | None = None,
        slots: int = SLOTS,
        cache_bytes: int | None = None,
        kv: str = "model",
        step_tokens: int | None = None,
        queue: int | None = None,
        lookahead: int = 0,
        draft: "Llama | Runner | None" = None,
        runner: Choice = "auto",
    ):
        require(slots > 0, f"slots={slots} must be positive")
        require(step_tokens is None or step_tokens > 0, f"step_tokens={step_tokens} must be positive")
        self.tokenizer = tokenizer
        self.format = format or dialog_format(tokenizer)
        if not isinstance(model, Runner):
            model = make_runner(model, cache_bytes=cache_bytes, kv=kv, choice=runner)
        self._runner = model
        room = self._runner.blocks * self._runner.block_tokens
        self.config = dataclasses.replace(model.config, context=min(model.config.context, room))
        self._reception = Reception(tokenizer, self.format, self.config, model.config.context)
        self._guesser = make_guesser(lookahead, draft, tokenizer.vocab_size, self._runner, runner)
        self._cache = BlockCache(self._runner.blocks, self._runner.block_tokens, self._copy_block)
        self._scheduler = Scheduler(
            self._cache, slots=slots, step_tokens=step_tokens or self._runner.step_tokens, queue=queue
        )
        self._drawing = Drawing(tokenizer)
        self._guessed = 0  # tokens so far
        self._turns = Turns(self._step)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        dtype: Dtype | None = None,
        device: str = "cpu",
        dialog: str = "",
        cache_bytes: int | None = None,
        cache_tokens: int | None = None,
        kv: str = "model",
        draft: Path | None = None,
        runner: Choice = "auto",
        **settings,
    ) -> "Engine":
        """The engine for the model at `path`: ours, quantised or not, or of any format that `opening` knows.

        `threads` sets the number of threads for the whole process; None leaves it (`kernels/threads.py`). `dtype` is what numbers are
        computed with (`open_runner` says what None means). `dialog` names the dialog format
        (`formats.FORMATS`); by default the checkpoint says which. `cache_tokens` says the cache's size otherwise,
        `draft` is another checkpoint, which guesses. `settings` are those of the constructor. Raises
        `ArtifactError`, and `ConfigError` for a format that is none or not for this vocabulary.
        """
        path = Path(path)
        if threads is not None:
            set_threads(threads)
        format = checkpoint_format(path, dialog)
        numbers = {"dtype": dtype, "device": device, "kv": kv, "choice": runner}
        blocks = None if cache_tokens is None else -(-cache_tokens // BLOCK_TOKENS)
        opened = open_runner(path, cache_bytes=cache_bytes, blocks=blocks, **numbers)
        if draft is not None:
            settings["draft"] = open_runner(Path(draft), blocks=opened.blocks, **numbers)
        return cls(opened, format.tokenizer, format=format, runner=runner, **settings)

    def load_adapter(self, name: str, path: Path) -> None:
        """Make the LoRA adapter in the folder `path` known to requests as `name`. Raises `ArtifactError`."""
        self._reception.load_adapter(name, path, self._runner)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may ask for."""
        return tuple(self._reception.adapters)

    def figures(self) -> dict[str, int]:
        """How large the cache is and how much of it is held, and what has happened so far."""
        cache = self._cache
        return {
            "cache_tokens": cache.blocks * cache.block_tokens,
            "cache_tokens_held": (cache.blocks - cache.free) * cache.block_tokens,
            "cache_bytes": cache.blocks * self._runner.block_bytes,
            "preemptions": self._scheduler.preemptions,
            "guessed": self._guessed,
            "guessed_right": self._drawing.right,
        }

    def clear(self) -> bool:
        """Give the cache's memory back, with what it keeps of ended requests; False, and nothing, while one runs."""
        with self._turns.between() as quiet:
            if not quiet or not self._cache.forget():
                return False
            self._runner.forget()
            return True

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Raises `ContextError` before anything is generated if some prompt does not fit; it says which.
        """
        sequences = []
        for index, request in enumerate(requests):
            try:
                sequences.append(self._reception.sequence(request))
            except ContextError as error:
                where = f"request {index + 1} of {len(requests)}: " if len(requests) > 1 else ""
                raise ContextError(where + error.message, hint=error.hint) from None
        try:
            # Neighbours in the queue run together: similar lengths need little padding, equal prompts one reading.
            self._submit(sorted(sequences, key=lambda s: (s.prompt_length, s.tokens)))
            for sequence in sequences:
                self._turns.until(lambda s=sequence: s.done)
        finally:
            self._abandon(sequences)
        return [self._completion(request, sequence) for request, sequence in zip(requests, sequences)]

    def stream(self, request: Request, *, patient: bool = True) -> Iterator[Piece]:
        """The answer as it is made: pieces of text, never half a character and never part of a stop string.

        The last piece has the completion. Closing the iterator ends the request. Who is not `patient`, since he serves
        others meanwhile, gets a piece without text after a step that brought none. Raises `ContextError`, and when the
        first piece is asked for `BusyError`.
        """
        return self._pieces(request, self._reception.sequence(request), patient)

    def check_form(self, structure: Structure) -> None:
        """Raises `DataError` for a form that no answer can have; requests with a form that was checked begin at once."""
        self._reception.forms.matcher(structure)

    def _pieces(self, request: Request, sequence: Running, patient: bool) -> Iterator[Piece]:
        try:
            sequence.watched = True
            self._submit([sequence])
            while not sequence.done:
                made = self._turns.made
                self._turns.until(
                    lambda n=made: sequence.fresh or sequence.done or (self._turns.made > n and not patient)
                )
                if not sequence.fresh and not sequence.done:
                    yield Piece("")
                while sequence.fresh and not sequence.done:
                    yield sequence.fresh.popleft()
            completion = self._completion(request, sequence)
            tokens = [t for piece in sequence.fresh for t in piece.tokens]
            yield Piece("".join(p.text for p in sequence.fresh), completion, (*tokens, *sequence.rest()))
        finally:
            self._abandon([sequence])

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """The log-likelihood of each text, in nats, in order; exact for texts longer than the context (`scoring.py`).

        The text's tokens follow those of its context (begin-of-text and `context`, or the dialog and an assistant's
        header); the two are encoded apart, and no end token is counted.
        """
        texts = []
        for continuation in continuations:
            given = self._reception.context_ids(continuation)
            begins = continuation.dialog or not continuation.context
            encode = self.tokenizer.encode if begins else self.tokenizer.encode_more
            texts.append((given + encode(continuation.text), len(given)))
        return scoring.log_likelihoods(self._runner, texts, self.tokenizer.vocab_size)

    def _completion(self, request: Request, sequence: Running) -> Completion:
        if sequence.error is not None:
            raise sequence.error
        text, reason = sequence.text.text, sequence.finish
        message = Message(role="assistant", content=text)
        if request.dialog:
            whole = self.format.dialect and not sequence.text.stopped
            message = self.format.parse(sequence.drawn) if whole else self.format.parse_text(text)
            if message.tool_calls and reason == "stop":
                reason = "tool_calls"
        return Completion(
            message=message,
            text=text,
            finish_reason=reason,
            prompt_tokens=sequence.prompt_length,
            completion_tokens=sequence.count,
            logprob=sequence.logprob,
            tokens=tuple(sequence.choices),
            prompt_choices=tuple(sequence.prompt_choices),
            cached_tokens=sequence.found,
        )

    def _step(self) -> None:
        try:
            readings = self._scheduler.plan(self._guesser.ahead if self._guesser else 0)
            if readings:
                guesses = self._guess(readings)
                logits = self._runner.forward([reading.span for reading in readings])
                self._draw(readings, guesses, logits[:, : self.tokenizer.vocab_size])
            self._scheduler.retire()
        except BaseException as error:
            self._scheduler.fail(error)
            raise

    def _guess(self, readings: list[Reading]) -> list[list[int]]:
        """What may follow each reading; it is read as well, so that there are logits after each guess."""
        if self._guesser is None:
            return [[] for _ in readings]
        guesses = self._guesser.guess(readings)
        for reading, guess in zip(readings, guesses):
            reading.span.tokens = reading.span.tokens + guess
            reading.span.wanted += len(guess)
            self._guessed += len(guess)
        return guesses

    def _draw(self, readings: list[Reading], guesses: list[list[int]], logits: Logits) -> None:
        """Draw for the sequences that were read to their end, and for those that wait for the same prompt."""
        rows, indices = [], []
        end = 0
        for reading, guess in zip(readings, guesses):
            sequence, begin, end = reading.sequence, end, end + reading.span.wanted
            self._scheduler.read(reading)
            if sequence.alone:
                self._drawing.prompt(sequence, reading.span.start, logits[begin:end])
            if sequence.unread > -len(guess):
                continue
            last = end - 1 - len(guess)
            rows += [(sequence, guess[:i]) for i in range(len(guess) + 1)]
            indices += range(last, end)
            for follower in self._scheduler.followers(sequence):
                rows.append((follower, []))
                indices.append(last)
        if rows:
            self._drawing.draw(rows, logits if indices == list(range(len(logits))) else logits[indices])
        for sequence in (reading.sequence for reading in readings):
            sequence.cached = min(sequence.cached, len(sequence.tokens) - 1)  # without the guesses that were wrong
            self._cache.publish(sequence)

    def _submit(self, sequences: Sequence[Running]) -> None:
        with self._turns.between():
            self._scheduler.submit(s for s in sequences if not s.done)

    def _abandon(self, sequences: Sequence[Running]) -> None:
        """Nobody waits for these any more: what they hold is free, at once or when the step that is under way ends."""
        for sequence in sequences:
            sequence.abandoned = sequence.abandoned or not sequence.done
        with self._turns.between() as quiet:
            if quiet:
                self._scheduler.retire()

    def _copy_block(self, source: int, target: int) -> None:
        self._runner.copy_block(source, target)
        if self._guesser is not None:
            self._guesser.copy_block(source, target)
