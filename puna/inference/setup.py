"""How an engine is run, as a value: what `puna serve` and `puna chat` were asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from puna.config import require
from puna.errors import ArtifactError

if TYPE_CHECKING:
    from puna.inference.engine import Engine

AHEAD = 4  # tokens that a draft model guesses if nothing else is said
MOST_AHEAD = 64
MOST_THREADS = 1024
MOST_SLOTS = 1024
LONGEST_NAME = 128


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of an engine and of the queue before it; `open` makes the engine."""

    dialog: str = ""  # the dialog format; by default the checkpoint's
    threads: int | None = None  # None: one for each core
    cache_bytes: int | None = None  # memory for keys and values; None: what `room.cache_blocks` says
    cache_tokens: int | None = None  # the same in tokens
    kv: Literal["model", "int8"] = "model"  # how keys and values are kept
    lookahead: int | None = None  # tokens guessed ahead; None: none without a draft model
    draft: Path | None = None  # a smaller model that guesses; without one guesses are looked up in the text
    adapters: tuple[tuple[str, Path], ...] = ()  # LoRA adapters by name
    slots: int = 16  # answers written at the same time
    queue: int = 64  # requests that may wait

    def __post_init__(self) -> None:
        _within("threads", self.threads, 1, MOST_THREADS)
        _within("lookahead", self.lookahead, 0, MOST_AHEAD)
        _within("slots", self.slots, 1, MOST_SLOTS)
        _within("queue", self.queue, 0, 1_000_000)
        for name in ("cache_bytes", "cache_tokens"):
            size = getattr(self, name)
            require(size is None or size > 0, f"{name}={size} must be positive")
        both = self.cache_bytes is not None and self.cache_tokens is not None
        require(not both, "the cache's size is given twice, in bytes and in tokens", hint="give one of them")
        require(self.draft is None or self.lookahead != 0, "a draft model guesses nothing ahead", hint="lookahead=4")
        names = [name for name, _ in self.adapters]
        for name in names:
            fine = 0 < len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()
            require(fine, f"{name!r} cannot be an adapter's name", hint=f"1 to {LONGEST_NAME} printable characters")
            require(names.count(name) == 1, f"two adapters are called {name!r}", hint="give each a name of its own")

    @property
    def ahead(self) -> int:
        """Tokens that are guessed ahead."""
        return self.lookahead if self.lookahead is not None else AHEAD if self.draft else 0

    def open(self, path: Path) -> "Engine":
        """The engine for the model at `path`, with its adapters. Raises `ArtifactError` and `ConfigError`."""
        from puna.inference.engine import Engine

        for name, folder in self.adapters:  # before the weights are read, which takes long
            if not folder.is_dir():
                raise ArtifactError(f"adapter {name!r}: {folder} is no folder", hint="give the one that peft saved")
        engine = Engine.load(
            path,
            dialog=self.dialog,
            threads=self.threads,
            cache_bytes=self.cache_bytes,
            cache_tokens=self.cache_tokens,
            kv=self.kv,
            lookahead=self.ahead,
            draft=self.draft,
            slots=self.slots,
        )
        for name, folder in self.adapters:
            engine.load_adapter(name, folder)
        return engine


def _within(name: str, value: int | None, low: int, high: int) -> None:
    require(value is None or low <= value <= high, f"{name}={value} is out of range", hint=f"from {low:,} to {high:,}")
