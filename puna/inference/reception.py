"""Where a request comes in: checked, turned into tokens, and made the `Sequence` that is queued."""

from pathlib import Path

from puna.chat import Continuation, Request
from puna.config import require
from puna.errors import DataError
from puna.inference import sampler
from puna.inference.adapters import Adapter
from puna.inference.sequence import ContextError, Sequence
from puna.inference.spans import Runner
from puna.inference.structure import Forms
from puna.model.sizes import LlamaConfig
from puna.tokenizer import AnyTokenizer
from puna.tokenizer.formats import DialogFormat


class Reception:
    """Knows what a request may ask for: the tokenizer's ids, the loaded adapters, the room there is.

    `config.context` is how many tokens a sequence may have; it is less than `model_context` where the cache holds less.
    """

    def __init__(self, tokenizer: AnyTokenizer, format: DialogFormat, config: LlamaConfig, model_context: int):
        self.forms = Forms(tokenizer)
        self.adapters: dict[str, int] = {}  # names, and the runner's indices
        self._tokenizer, self._format, self._config = tokenizer, format, config
        self._holder = "model's context" if config.context == model_context else "cache"

    def load_adapter(self, name: str, path: Path, runner: Runner) -> None:
        """Take in the LoRA adapter in the folder `path`. Raises `ArtifactError`, and `ConfigError` for a name in use."""
        require(name not in self.adapters, f"there is an adapter {name!r} already", hint="choose another name")
        self.adapters[name] = runner.add_adapter(Adapter.load(path, self._config))

    def sequence(self, request: Request) -> Sequence:
        """The request, ready to be queued. Raises `ContextError` if it is too long, and other `PunaError`s."""
        sampler.check(request.sampling)
        require(isinstance(request.priority, int), f"priority={request.priority!r} is no whole number")
        last = self._tokenizer.vocab_size - 1
        strange = next((t for t, _ in request.sampling.logit_bias if t > last), None)
        require(strange is None, f"logit_bias: there is no token {strange}; ids go to {last}")
        if request.prompt is None and not request.dialog:
            raise DataError("a request has neither a dialog nor a prompt", hint="give one of them")
        prompt = self.context_ids(request)
        room = self._config.context - len(prompt)
        if room < 1:
            size = f"the prompt has {len(prompt):,} tokens, the {self._holder} {self._config.context:,}"
            raise ContextError(size, hint="shorten the prompt or drop old messages; one token at least must be free")
        begins = not self._format.continues if request.dialog else not request.prompt
        limit = min(request.sampling.max_tokens, room)
        sequence = Sequence(prompt, request, limit, self._tokenizer.stop_ids, begins, self._tokenizer.errors)
        if request.adapter is not None:
            known = ", ".join(self.adapters) or "none"
            require(request.adapter in self.adapters, f"no adapter {request.adapter!r}", hint=f"loaded: {known}")
            sequence.adapter = self.adapters[request.adapter]
        if request.structure is not None:
            sequence.matcher = self.forms.matcher(request.structure)
        return sequence

    def context_ids(self, of: Request | Continuation) -> list[int]:
        """The tokens of what is to be continued."""
        raw = of.prompt if isinstance(of, Request) else of.context
        if of.dialog and raw:
            raise DataError("both a dialog and a raw text were given", hint="give one of them")
        if of.dialog:
            return list(self._format.render(of.dialog).ids)
        return [self._tokenizer.bos, *self._tokenizer.encode(raw or "")]
