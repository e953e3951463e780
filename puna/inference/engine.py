"""The engine: requests in, answers out, as many as fit at once.

    step:  admit waiting requests and prefill them, or else decode one token of all that run
           draw a token for each row of logits, append it to its sequence
           retire the sequences that are done

There is no background thread. Whoever waits for an answer makes the steps: `generate` and `stream` may be called from
many threads, one of them steps for all, and the others find their tokens when it has. So requests of many callers run
in one batch, and an idle engine costs nothing.

Sums in floating point depend on the shape of a batch in their last bits; that aside, what a request gets does not
depend on what runs beside it: padding is never seen, and randomness comes from its own seed.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from puna.chat import Completion, Continuation, Message, Request
from puna.config import require
from puna.errors import DataError
from puna.inference import sampler, scoring
from puna.inference.runner import Runner
from puna.inference.scheduler import Scheduler
from puna.inference.sequence import ContextError, Piece
from puna.inference.sequence import Sequence as Running
from puna.model.detect import kind_of
from puna.model.llama import Llama
from puna.model.opening import checkpoint_format, load_checkpoint
from puna.quant import load_quantised
from puna.tokenizer import AnyTokenizer
from puna.tokenizer.formats import DialogFormat, dialog_format

SLOTS = 64
CACHE_BYTES = 2 << 30


class Engine:
    """A model that answers: a `chat.Generator`, and `stream` for one who watches.

    `slots` is how many requests run at once, `cache_bytes` what their keys and values may take, `format` how the model
    is spoken to (by default what is likely for the tokenizer).
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: AnyTokenizer,
        *,
        slots: int = SLOTS,
        cache_bytes: int = CACHE_BYTES,
        format: DialogFormat | None = None,
    ):
        require(slots > 0, f"slots={slots} must be positive")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.format = format or dialog_format(tokenizer)
        self.config = model.config
        self._runner = Runner(self.model)
        per_token = self.config.kv_bytes_per_token(model.norm.weight.element_size())
        self._scheduler = Scheduler(slots, cache_bytes // per_token)
        self._bytes: dict[tuple[int, bool], bytes] = {}  # token, whether it begins a text -> its text
        self._rows: tuple[list[Running], sampler.Rows] | None = None
        self._turn = threading.Condition()
        self._stepping = False

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        dtype: torch.dtype = torch.float32,
        slots: int = SLOTS,
        dialog: str = "",
    ) -> "Engine":
        """The engine for the model at `path`: ours, quantised or not, or of any format that `opening` knows.

        `threads` sets PyTorch's number of threads for the whole process; None leaves it. `dialog` names the dialog format
        (`formats.FORMATS`); by default the checkpoint says which. Raises `ArtifactError`, and `ConfigError` for a format
        that is none or not for this vocabulary.
        """
        path = Path(path)
        if threads is not None:
            torch.set_num_threads(threads)
        format = checkpoint_format(path, dialog)
        model = load_quantised(path, dtype) if kind_of(path) == "quantised" else load_checkpoint(path, dtype)
        return cls(model, format.tokenizer, slots=slots, format=format)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.

        Raises `ContextError` before anything is generated if some prompt does not fit; it says which.
        """
        sequences = []
        for index, request in enumerate(requests):
            try:
                sequences.append(self._sequence(request))
            except ContextError as error:
                where = f"request {index + 1} of {len(requests)}: " if len(requests) > 1 else ""
                raise ContextError(where + error.message, hint=error.hint) from None
        try:
            # Neighbours in the queue are prefilled together: similar lengths need little padding, equal prompts one reading.
            self._scheduler.waiting.extend(sorted(sequences, key=lambda s: (len(s.prompt), s.prompt)))
            for sequence in sequences:
                self._advance(lambda s=sequence: s.done)
        finally:
            self._abandon(sequences)
        return [self._completion(request, sequence) for request, sequence in zip(requests, sequences)]

    def stream(self, request: Request) -> Iterator[Piece]:
        """The answer as it is made: pieces of text, never half a character and never part of a stop string.

        The last piece has the completion. Closing the iterator ends the request. Raises `ContextError`.
        """
        return self._pieces(request, self._sequence(request))

    def _pieces(self, request: Request, sequence: Running) -> Iterator[Piece]:
        try:
            self._scheduler.waiting.append(sequence)
            while not sequence.done:
                self._advance(lambda: bool(sequence.fresh) or sequence.done)
                while sequence.fresh and not sequence.done:
                    yield Piece(sequence.fresh.popleft())
            yield Piece("".join(sequence.fresh), self._completion(request, sequence))
        finally:
            self._abandon([sequence])

    @torch.inference_mode()
    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """The log-likelihood of each text, in nats, in order; exact for texts longer than the context (`scoring.py`).

        The text's tokens follow those of its context (begin-of-text and `context`, or the dialog and an assistant's
        header); the two are encoded apart, and no end token is counted.
        """
        texts = []
        for continuation in continuations:
            given = self._context_ids(continuation)
            begins = continuation.dialog or not continuation.context
            encode = self.tokenizer.encode if begins else self.tokenizer.encode_more
            texts.append((given + encode(continuation.text), len(given)))
        return scoring.log_likelihoods(self.model, texts, self.tokenizer.vocab_size)

    def _context_ids(self, of: Request | Continuation) -> list[int]:
        raw = of.prompt if isinstance(of, Request) else of.context
        if of.dialog and raw:
            raise DataError("both a dialog and a raw text were given", hint="give one of them")
        if of.dialog:
            return list(self.format.render(of.dialog).ids)
        return [self.tokenizer.bos, *self.tokenizer.encode(raw or "")]

    def _sequence(self, request: Request) -> Running:
        sampler.check(request.sampling)
        if request.prompt is None and not request.dialog:
            raise DataError("a request has neither a dialog nor a prompt", hint="give one of them")
        prompt = self._context_ids(request)
        room = self.config.context - len(prompt)
        if room < 1:
            size = f"the prompt has {len(prompt):,} tokens, the model's context {self.config.context:,}"
            raise ContextError(size, hint="shorten the prompt or drop old messages; one token at least must be free")
        limit = min(request.sampling.max_tokens, room)
        begins = not self.format.continues if request.dialog else not request.prompt
        return Running(
            prompt, request.sampling, limit, self.tokenizer.stop_ids, begins=begins, errors=self.tokenizer.errors
        )

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
            prompt_tokens=len(sequence.prompt),
            completion_tokens=len(sequence.drawn),
            logprob=sequence.logprob,
        )

    def _advance(self, reached: Callable[[], bool]) -> None:
        """Make steps until `reached()`, or wait while another thread makes them."""
        while True:
            with self._turn:
                while self._stepping and not reached():
                    self._turn.wait()
                if reached():
                    return
                self._stepping = True
            try:
                self._step()
            finally:
                with self._turn:
                    self._stepping = False
                    self._turn.notify_all()

    @torch.inference_mode()
    def _step(self) -> None:
        scheduler, runner = self._scheduler, self._runner
        try:
            scheduler.retire(runner.cache)
            before = len(scheduler.running)
            if admitted := scheduler.admit():
                longest = max(min(s.longest, len(s.prompt) + 64) for s in admitted)
                self._draw(admitted, runner.prefill([s.prompt for s in admitted], before, longest))
            elif running := scheduler.running:
                logits = runner.decode([s.drawn[-1] for s in running], [s.length - 1 for s in running])
                self._draw(running, logits)
            scheduler.retire(runner.cache)
            if not scheduler.running and not scheduler.waiting:
                runner.cache.clear()
        except BaseException as error:  # the cache may be half written: nothing that ran can go on
            self._fail(error)
            raise

    def _draw(self, sequences: list[Running], logits: torch.Tensor) -> None:
        rows = self._settings(sequences)
        tokens, logprobs = sampler.draw(logits[:, : self.tokenizer.vocab_size], rows, [len(s.drawn) for s in sequences])
        for sequence, token, logprob in zip(sequences, tokens, logprobs):
            sequence.append(token, logprob, self._text(token, sequence.begins and not self._spoken(sequence)))

    def _settings(self, sequences: list[Running]) -> sampler.Rows:
        """The sampling settings of a batch; computed once for as long as the same sequences run."""
        if self._rows is None or self._rows[0] != sequences:
            rows = sampler.Rows.of([s.sampling for s in sequences], self.tokenizer.vocab_size)
            self._rows = (list(sequences), rows)
        return self._rows[1]

    def _text(self, token: int, first: bool = False) -> bytes:
        if (token, first) not in self._bytes:
            decoded = self.tokenizer.first_bytes(token) if first else self.tokenizer.decode_bytes([token])
            self._bytes[token, first] = decoded
        return self._bytes[token, first]

    def _spoken(self, sequence: Running) -> bool:
        """Whether some token of the answer has text. The first one nearly always does."""
        return any(map(self._text, sequence.drawn))

    def _fail(self, error: BaseException) -> None:
        scheduler = self._scheduler
        for sequence in (*scheduler.running, *scheduler.waiting):
            sequence.error = error
        scheduler.running.clear()
        scheduler.waiting.clear()
        self._runner.cache.clear()

    def _abandon(self, sequences: Sequence[Running]) -> None:
        """Nobody waits for these any more: they end at the next step."""
        for sequence in sequences:
            sequence.abandoned = sequence.abandoned or not sequence.done
