"""Pretraining: predict every next token; documents do not attend across their borders (arXiv 2407.21783, 3.2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from puna.artifacts import Artifact
from puna.config import require
from puna.tokenizer.shards import TokenShards
from puna.train import phases
from puna.train.downstream import Choices
from puna.train.objectives.rows import NextTokens, Rows
from puna.train.phases import Phase, Position
from puna.train.sources import Deal, open_sources

KEY, ANSWER = 8, 4  # tokens of a needle: those that ask for it, and those to be found


@dataclass(frozen=True, kw_only=True)
class LmObjective:
    """What one step of pretraining is made of."""

    sequence_length: int = 256  # tokens
    rows: int = 16  # sequences per step
    phases: tuple[Phase, ...] = ()  # a recipe that changes on the way; empty: the two numbers above, throughout
    validation_rows: int = 64  # held-out sequences that are scored in the loop
    choices: Path | None = None  # multiple-choice items, scored in the loop: the form is in `puna.evaluation.choice`

    def __post_init__(self) -> None:
        for length in (self.sequence_length, *(phase.sequence_length for phase in self.phases)):
            require(length >= 8, f"sequence_length={length} is too short (8 at least)")
        if self.phases:
            phases.check(self.phases)

    def course(self, steps: int) -> tuple[Phase, ...]:
        """The phases of a run; without any, one of `steps` steps."""
        tokens = steps * self.rows * self.sequence_length
        return self.phases or (Phase(tokens=tokens, sequence_length=self.sequence_length, rows=self.rows),)

    def data(self, artifacts: Sequence[Artifact], tokenizer: Path, seed: int) -> "LmData":
        longest = max(phase.sequence_length for phase in self.course(1))
        choices = Choices(self.choices, tokenizer, longest) if self.choices else None
        return LmData(self, artifacts, seed, choices)


class LmData(NextTokens):
    """Samples of token shards, addressed by their number: nothing to save, nothing to restore."""

    def __init__(self, config: LmObjective, artifacts: Sequence[Artifact], seed: int, choices: Choices | None = None):
        self.choices, self.seed = choices, seed
        self.config, self.phases = config, config.course(1)
        longest = max(phase.sequence_length for phase in self.phases)
        self.sources = open_sources(artifacts, longest, seed)
        self.heldout = [TokenShards.load(artifact, "heldout") for artifact in artifacts]
        self.deals = [self._deal(phase, seed) for phase in self.phases]
        for phase in self.phases:
            enough = phase.gate is None or all(shards.samples(phase.sequence_length) for shards in self.heldout)
            hint = "hold more text out, or leave the gate off"
            require(
                enough, f"phase {phase.name!r}: no held-out sample of {phase.sequence_length} for its gate", hint=hint
            )
        tokens = sum(source.shards.tokens for source in self.sources.values())
        self.notes = {"epoch_steps": tokens / self.phases[0].batch_tokens, "train_tokens": tokens}

    def _deal(self, phase: Phase, seed: int) -> Deal:
        sizes = {name: source.shards.tokens for name, source in self.sources.items()}
        for name in phase.mix:
            hint = f"the sources are {', '.join(sizes)}"
            require(name in sizes, f"phase {phase.name!r} mixes in {name!r}, which is not given", hint=hint)
        return Deal(phase.mix or sizes, seed)

    def batch(self, numbers: Sequence[int], at: Position) -> Rows:
        return _rows([self.sample(number, at) for number in numbers])

    def sample(self, number: int, at: Position) -> tuple[np.ndarray, np.ndarray]:
        """Ids and documents of the sample with this global number, which lies in the phase of `at`."""
        length = self.phases[at.phase].sequence_length
        name, earlier = self.deals[at.phase].source(number - at.phase_first)
        return self.sources[name].sample(self._start(name, at, length) + earlier, length)

    def cursors(self, at: Position) -> dict[str, list[int]]:
        length = self.phases[at.phase].sequence_length
        counts = self.deals[at.phase].counts(at.samples - at.phase_first)
        read = {name: [self._start(name, at, length) + count, length] for name, count in counts.items()}
        return at.cursors | read

    def _start(self, name: str, at: Position, length: int) -> int:
        samples, earlier_length = at.cursors.get(name, (0, length))
        return self.sources[name].resume(samples, earlier_length, length)

    def validation(self, at: Position, length: int = 0) -> list[Rows]:
        """Held-out rows, `validation_rows` over all sources, in the phase's length or another."""
        phase = self.phases[min(at.phase, len(self.phases) - 1)]
        T, size = length or phase.sequence_length, phase.rows
        each = -(-self.config.validation_rows // len(self.heldout))
        samples = [shards.sample(i, T) for shards in self.heldout for i in range(min(each, shards.samples(T)))]
        return [_rows(samples[i : i + size]) for i in range(0, len(samples), size)]

    def needles(self, at: Position, count: int) -> Iterator[Rows]:
        """Rows of the phase's length with a needle at evenly spread depths; what is to be found counts, nothing else."""
        T = self.phases[at.phase].sequence_length
        for number in range(count):
            shards = self.heldout[number % len(self.heldout)]
            text, _ = shards.sample(number % max(1, shards.samples(T)), T)
            draw = np.random.default_rng([self.seed, T, number])
            needle = draw.choice(text, KEY + ANSWER)
            hay = T + 1 - len(needle) - KEY - ANSWER
            depth = round(hay * (number + 0.5) / count)
            tokens = np.concatenate((text[:depth], needle, text[depth:hay], needle))
            weights = np.zeros(T + 1, np.float32)
            weights[-ANSWER:] = 1
            row, counted = torch.from_numpy(tokens)[None], torch.from_numpy(weights)[None]
            documents = torch.zeros(1, T, dtype=torch.int64)
            yield Rows(tokens=row[:, :-1], targets=row[:, 1:], documents=documents, weights=counted[:, 1:])


def _rows(samples: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    tokens = torch.from_numpy(np.stack([t for t, _ in samples]))
    documents = torch.from_numpy(np.stack([d for _, d in samples]))
    # The first token of a document is not predicted from the one before it: that belongs to another document.
    same = documents[:, 1:] == documents[:, :-1]
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=same.float())
