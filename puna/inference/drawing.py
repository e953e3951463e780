"""From logits to tokens: each sequence of a step gets its next one, or several if guesses were right."""

import torch
from torch import Tensor

from puna.chat import TokenChoice
from puna.errors import PunaError
from puna.inference import sampler
from puna.inference.sequence import Sequence
from puna.inference.shaping import needs_shaping, shape
from puna.tokenizer import AnyTokenizer

# A sequence, and the guessed tokens that it had read (after its own) when these logits came.
Row = tuple[Sequence, list[int]]


class Drawing:
    """Draws for a batch, and keeps what stays the same from step to step."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self._bytes: dict[tuple[int, bool], bytes] = {}  # token, whether it begins a text -> its text
        self._settings: tuple[list[Sequence], sampler.Rows] | None = None

    def draw(self, rows: list[Row], logits: Tensor) -> None:
        """Append to each sequence the token drawn from its row of `logits` (B, V).

        The rows of a sequence come in order, the first without guesses. A row whose guesses are not what was drawn
        before it says nothing, and is passed over.
        """
        counts = [s.count + len(guessed) for s, guessed in rows]
        tokens, logprobs = sampler.draw(logits, self._rows(rows, logits), counts, self._shaped(rows, logits))
        before = {s: s.count for s, _ in rows}
        for i, ((sequence, guessed), token, logprob) in enumerate(zip(rows, tokens, logprobs)):
            right = sequence.count == before[sequence] + len(guessed)
            if sequence.done or not right or (guessed and sequence.tokens[-len(guessed) :] != guessed):
                continue
            top = self._likeliest(logits[i], sequence.sampling.logprobs)
            sequence.append(token, logprob, self.text(token, sequence.begins), top)

    def prompt(self, sequence: Sequence, start: int, logits: Tensor) -> None:
        """Note the log-probabilities of the prompt's tokens from `start` + 1 on; `logits` (T, V) came before them."""
        targets = sequence.tokens[start + 1 : min(start + 1 + len(logits), sequence.prompt_length)]
        known = max(0, len(sequence.prompt_choices) - start)  # it was preempted, and reads these again
        for row, token in zip(logits[known:], targets[known:]):
            logprob = float(row[token] - row.logsumexp(-1))
            top = self._likeliest(row, sequence.sampling.prompt_logprobs)
            sequence.prompt_choices.append(TokenChoice(token=token, data=self.text(token), logprob=logprob, top=top))

    def text(self, token: int, begins: bool = False) -> bytes:
        """The token's text; a vocabulary of SentencePiece's may spell it otherwise where it `begins` one."""
        if (token, begins) not in self._bytes:
            spelled = self._tokenizer.first_bytes(token) if begins else self._tokenizer.decode_bytes([token])
            self._bytes[token, begins] = spelled
        return self._bytes[token, begins]

    def _rows(self, rows: list[Row], logits: Tensor) -> sampler.Rows:
        """The sampling settings of a batch; computed once for as long as the same sequences run."""
        sequences = [s for s, _ in rows]
        if self._settings is None or self._settings[0] != sequences:
            made = sampler.Rows.of([s.sampling for s in sequences], logits.shape[1], logits.device)
            self._settings = (sequences, made)
        return self._settings[1]

    def _shaped(self, rows: list[Row], logits: Tensor) -> Tensor | None:
        shaped = None
        for i, (sequence, guessed) in enumerate(rows):
            if needs_shaping(sequence):
                shaped = logits.clone() if shaped is None else shaped
                try:
                    shaped[i] = shape(logits[i], sequence, guessed)
                except PunaError as error:  # its form became too complex: that is no reason to fail others
                    sequence.error = error
        return shaped

    def _likeliest(self, row: Tensor, count: int | None) -> tuple[TokenChoice, ...]:
        if not count:
            return ()
        logprobs, tokens = torch.topk(row.log_softmax(-1), min(count, len(row)))
        pairs = zip(tokens.tolist(), logprobs.tolist())
        return tuple(TokenChoice(token=t, data=self.text(t), logprob=p) for t, p in pairs)
