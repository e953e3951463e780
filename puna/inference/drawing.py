"""From logits to tokens: each sequence of a step gets its next one, or several if guesses were right."""

import numpy as np

from puna.chat import TokenChoice
from puna.errors import PunaError
from puna.inference import sampler
from puna.inference.sequence import Sequence
from puna.inference.shaping import needs_shaping, shape
from puna.kernels.logits import Logits, at, best, row, with_rows
from puna.tokenizer import AnyTokenizer

# A sequence, and the guessed tokens that it had read (after its own) when these logits came.
Row = tuple[Sequence, list[int]]


class Drawing:
    """Draws for a batch, and keeps what stays the same from step to step."""

    def __init__(self, tokenizer: AnyTokenizer):
        self._tokenizer = tokenizer
        self.right = 0  # guesses so far
        self._bytes: dict[tuple[int, bool], bytes] = {}  # token, whether it begins a text -> its text
        self._settings: tuple[list[Sequence], sampler.Rows] | None = None

    def draw(self, rows: list[Row], logits: Logits) -> None:
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
            self.right += bool(guessed)
            top = self._likeliest(logits[i : i + 1], sequence.sampling.logprobs)[0]
            sequence.append(token, logprob, self.text(token, sequence.begins), top)

    def prompt(self, sequence: Sequence, start: int, logits: Logits) -> None:
        """Note the log-probabilities of the prompt's tokens from `start` + 1 on; `logits` (T, V) came before them."""
        targets = sequence.tokens[start + 1 : min(start + 1 + len(logits), sequence.prompt_length)]
        known = max(0, len(sequence.prompt_choices) - start)  # it was preempted, and reads these again
        targets = targets[known:]
        if not targets:
            return
        logits = logits[known : known + len(targets)]
        logprobs = (at(logits, np.array(targets)) - best(logits, 1)[2]).tolist()
        tops = self._likeliest(logits, sequence.sampling.prompt_logprobs)
        for token, logprob, top in zip(targets, logprobs, tops):
            sequence.prompt_choices.append(TokenChoice(token=token, data=self.text(token), logprob=logprob, top=top))

    def text(self, token: int, begins: bool = False) -> bytes:
        """The token's text; a vocabulary of SentencePiece's may spell it otherwise where it `begins` one."""
        if (token, begins) not in self._bytes:
            spelled = self._tokenizer.first_bytes(token) if begins else self._tokenizer.decode_bytes([token])
            self._bytes[token, begins] = spelled
        return self._bytes[token, begins]

    def _rows(self, rows: list[Row], logits: Logits) -> sampler.Rows:
        """The sampling settings of a batch; computed once for as long as the same sequences run."""
        sequences = [s for s, _ in rows]
        if self._settings is None or self._settings[0] != sequences:
            made = sampler.Rows.of([s.sampling for s in sequences], logits.shape[1])
            self._settings = (sequences, made)
        return self._settings[1]

    def _shaped(self, rows: list[Row], logits: Logits) -> Logits | None:
        shaped = {}
        for i, (sequence, guessed) in enumerate(rows):
            if needs_shaping(sequence):
                try:
                    shaped[i] = shape(row(logits, i), sequence, guessed)
                except PunaError as error:  # its form became too complex: that is no reason to fail others
                    sequence.error = error
        return with_rows(logits, shaped) if shaped else None

    def _likeliest(self, logits: Logits, count: int | None) -> list[tuple[TokenChoice, ...]]:
        """For each row the likeliest tokens, if the request wants any."""
        if not count:
            return [()] * len(logits)
        values, ids, sums = best(logits, min(count, logits.shape[1]))
        logprobs = (values - sums[:, None]).tolist()
        return [
            tuple(TokenChoice(token=t, data=self.text(t), logprob=p) for t, p in zip(*pair))
            for pair in zip(ids.tolist(), logprobs)
        ]
