"""A model that only judges: the likelihood of given text, for any Llama and any tokenizer.

An engine answers, and for that must know a dialog format, which a base model or a Llama 1 has not. Reading text needs a
tokenizer and the model's context, no more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from puna.chat import Completion, Continuation, Request
from puna.errors import ArtifactError, PunaError
from puna.inference import scoring
from puna.inference.runner import make_runner, open_runner
from puna.inference.spans import Runner
from puna.model.opening import Dtype, checkpoint_tokenizer
from puna.tokenizer.load import AnyTokenizer

if TYPE_CHECKING:
    from puna.model.llama import Llama


class Scorer:
    """`chat.Generator` as far as `score` goes: raw texts with raw contexts."""

    def __init__(self, model: "Llama | Runner", tokenizer: AnyTokenizer):
        if tokenizer.vocab_size > model.config.vocab_size:
            sizes = f"{tokenizer.vocab_size:,} tokens, the model knows {model.config.vocab_size:,}"
            raise ArtifactError(f"the tokenizer has {sizes}", hint="give the folder the tokenizer it was trained with")
        self.runner = model if isinstance(model, Runner) else make_runner(model)
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path, *, dtype: Dtype = "float32") -> "Scorer":
        """The model at `path`, of any format, quantised by us or not. Raises `ArtifactError`, also without a tokenizer."""
        tokenizer = checkpoint_tokenizer(path)  # first: it is small, and may be missing
        return cls(open_runner(path, dtype=dtype), tokenizer)

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokenizer.encode(text))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Raises `PunaError`: this one does not answer."""
        raise PunaError("this model was loaded to read text, not to answer", hint="load it with an Engine")

    def score(self, continuations: Sequence[Continuation]) -> list[float]:
        """The log-likelihood of each text, in nats, after the begin-of-text token and its context, encoded apart."""
        texts = []
        for continuation in continuations:
            if continuation.dialog:
                raise PunaError("a dialog cannot be judged without a dialog format", hint="load it with an Engine")
            given = [self.tokenizer.bos, *self.tokenizer.encode(continuation.context)]
            encode = self.tokenizer.encode_more if continuation.context else self.tokenizer.encode
            texts.append((given + encode(continuation.text), len(given)))
        return scoring.log_likelihoods(self.runner, texts, self.tokenizer.vocab_size)
