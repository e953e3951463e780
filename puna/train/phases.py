"""The recipe of a pretraining run: phases, one after another, all measured in tokens (arXiv 2407.21783, 3.4).

What changes during a run changes at a phase's border: the batch (Llama 3 went from 4M to 8M to 16M tokens), the length
of sequences (8K to 128K in six steps), the mix of sources (more mathematics late, fresher text last), and at the very
end a small set of high quality while the rate goes to zero. A phase that stretches the context ends at a *gate*: the
loss on short contexts must have recovered and needles must be found at the new length; until then the phase goes on.

    tokens scheduled  =  planned tokens of finished phases + min(tokens of this phase, its plan)

is what the learning rate follows, so a phase that a gate prolongs holds its last rate, and the rest is as planned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from puna.config import require


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What must hold for a phase to end. Measured when its tokens are spent, and again after each prolongation."""

    recovered: float = 1.01  # the short-context loss may be this many times what it was before the first gate
    needles: int = 16  # haystacks, each with a needle at another depth
    found: float = 1.0  # the share of needles that must be found
    extra_tokens: int = 0  # by which the phase is prolonged when it fails; 0: a quarter of its plan
    most_times: int = 4  # prolongations, after which the run stops and says so

    def __post_init__(self) -> None:
        require(self.recovered >= 1, f"recovered={self.recovered} must be at least 1")
        require(0 < self.found <= 1, f"found={self.found} must lie in 0..1 and not be 0")
        require(self.needles >= 1, f"needles={self.needles} must be positive")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of a run in which nothing of the recipe changes but the learning rate."""

    name: str = "main"
    tokens: int  # planned; rounded up to whole batches
    sequence_length: int  # tokens of a sample
    rows: int  # samples per step, over all ranks
    mix: dict[str, float] = field(default_factory=dict)  # share of each source's samples; empty: by the sources' sizes
    gate: Gate | None = None
    anneal: bool = False  # the learning rate goes to zero from here on

    def __post_init__(self) -> None:
        require(self.tokens > 0, f"phase {self.name!r}: tokens={self.tokens} must be positive")
        require(self.rows > 0, f"phase {self.name!r}: rows={self.rows} must be positive")
        fits = self.gate is None or self.sequence_length >= 64
        require(fits, f"phase {self.name!r}: sequence_length={self.sequence_length} is too short for needles (64)")
        positive = all(share >= 0 for share in self.mix.values()) and (not self.mix or sum(self.mix.values()) > 0)
        require(positive, f"phase {self.name!r}: mix={self.mix} needs shares of at least 0, and one above it")

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step, over all ranks."""
        return self.rows * self.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the plan."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def planned(self) -> int:
        """Tokens of the plan, in whole batches."""
        return self.steps * self.batch_tokens

    @property
    def prolongation(self) -> int:
        """Tokens that a failed gate adds, in whole batches."""
        wanted = (self.gate.extra_tokens if self.gate else 0) or -(-self.planned // 4)
        return -(-wanted // self.batch_tokens) * self.batch_tokens


def check(phases: Sequence[Phase]) -> None:
    """Raises `ConfigError` for phases that do not make a run together."""
    names = [phase.name for phase in phases]
    require(len(set(names)) == len(names), f"phases are told apart by name, and these repeat: {names}")
    longest = max(phase.sequence_length for phase in phases)
    for phase in phases:
        length = phase.sequence_length
        hint = "lengths double, or keep to divisors: a longer sample is made of whole shorter ones"
        require(
            longest % length == 0,
            f"phase {phase.name!r}: sequence_length={length} does not divide the longest, {longest}",
            hint=hint,
        )
    annealed = [phase.anneal for phase in phases]
    require(annealed == sorted(annealed), "only the last phases may anneal: the rate that reached zero stays there")


@dataclass(kw_only=True)
class Position:
    """Where a run stands in its recipe. Small, exact, and all that addressing the next sample needs."""

    step: int = 0  # updates made (or skipped)
    samples: int = 0  # the global number of the next sample; every smaller one has been consumed, or was passed over
    tokens: int = 0  # consumed, over all phases
    phase: int = 0
    phase_first: int = 0  # the number of the phase's first sample
    phase_tokens: int = 0  # consumed in this phase
    prolonged: int = 0  # times a gate has prolonged this phase
    cursors: dict[str, list[int]] = field(default_factory=dict)  # source -> [samples, their length] before this phase
    short_loss: float = 0.0  # on short contexts, before the first gate; 0: not measured yet

    def scheduled(self, phases: Sequence[Phase]) -> int:
        """The tokens that the learning rate counts."""
        before = sum(phase.planned for phase in phases[: self.phase])
        return before + (min(self.phase_tokens, phases[self.phase].planned) if self.phase < len(phases) else 0)

    def phase_spent(self, phases: Sequence[Phase]) -> bool:
        """Whether the phase has had all its tokens, prolongations included."""
        phase = phases[self.phase]
        return self.phase_tokens >= phase.planned + self.prolonged * phase.prolongation

    def finished(self, phases: Sequence[Phase]) -> bool:
        """Whether every phase is over."""
        return self.phase >= len(phases)

    def consume(self, phase: Phase, first: int) -> None:
        """A step took the `phase.rows` samples from number `first` on."""
        self.step += 1
        self.samples = first + phase.rows
        self.tokens += phase.batch_tokens
        self.phase_tokens += phase.batch_tokens

    def enter_next(self, cursors: dict[str, list[int]]) -> None:
        """The next phase begins here; `cursors` say how far each source has been read."""
        self.phase += 1
        self.phase_first = self.samples
        self.phase_tokens = self.prolonged = 0
        self.cursors = cursors
