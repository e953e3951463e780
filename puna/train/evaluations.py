"""What is measured between steps, after the state is safe: held-out loss, downstream choices, and whether a phase may end.

A gate (arXiv 2407.21783, 3.4.2) asks two things after a phase has stretched the context: is the loss on short contexts
back where it was, and does the model find what it read once, far back? A needle is a run of random tokens put somewhere
into held-out text; its beginning stands again at the end of the row, and the rest is to be said. It is *found* when the
rest has a probability above one half, for then a greedy reader says it: each of its tokens has more than all others.
"""

import math
from typing import Any

from puna import log
from puna.errors import PunaError
from puna.train.phases import Gate
from puna.train.state import Run


def next_sample(run: Run) -> int:
    """The number of the next step's first sample: the run's, or the first beyond what is to be passed over."""
    first, rows = run.position.samples, run.phase.rows
    for start, stop in sorted(run.passed):
        if start < first + rows and first < stop:
            first = stop
    return first


def due(run: Run) -> bool:
    """Whether the step just made is followed by an evaluation."""
    return run.position.step % run.config.validate_every_steps == 0 or run.position.phase_spent(run.phases)


def evaluate(run: Run) -> dict[str, Any]:
    """What the log says of the weights as they are. Where a phase's tokens are spent, its gate judges.

    Raises `PunaError` when a gate has failed for the last time it may.
    """
    batches = run.data.validation(run.position)
    found: dict[str, Any] = {"val_loss": run.placement.validate(run.data, batches)} if batches else {}
    if run.config.lm is None:
        return found
    if run.data.choices:
        found["choices_right"] = run.data.choices.score(run.placement, run.data)
    if run.position.phase_spent(run.phases) and _concerns_gates(run):
        found |= _at_border(run)
    return found


def enter_next_phase(run: Run) -> None:
    """Go to the next phase if this one has had its tokens."""
    if run.position.phase_spent(run.phases):
        run.position.enter_next(run.data.cursors(run.position))


def needles_found(run: Run, count: int) -> float:
    """The share of needles that are found, in rows of the phase's length."""
    found = 0
    for row in run.data.needles(run.position, count):
        surprise = run.placement.validate(run.data, [row]) * row.weight  # nats for the whole needle
        found += surprise < math.log(2)
    return found / count


def _concerns_gates(run: Run) -> bool:
    at = run.position.phase
    return any(phase.gate for phase in run.phases[at : at + 2])


def _at_border(run: Run) -> dict[str, Any]:
    at, phase = run.position, run.phase
    shortest = min(p.sequence_length for p in run.phases)
    short = run.placement.validate(run.data, run.data.validation(at, shortest))
    at.short_loss = at.short_loss or short
    measured: dict[str, Any] = {"short_loss": short}
    if phase.gate is None:
        return measured
    measured["needles"] = needles_found(run, phase.gate.needles)
    failed = _failures(phase.gate, measured, at.short_loss)
    if not failed:
        log.info(f"phase {phase.name!r} passed its gate at step {at.step}")
        return measured
    if at.prolonged == phase.gate.most_times:
        hint = f"give the phase more tokens, or allow more: gate.most_times={2 * phase.gate.most_times}"
        raise PunaError(f"phase {phase.name!r} failed its gate {at.prolonged + 1} times: {failed}", hint=hint)
    at.prolonged += 1
    log.info(f"phase {phase.name!r} goes on for {phase.prolongation:,} tokens: {failed}")
    return measured | {"prolonged": at.prolonged}


def _failures(gate: Gate, measured: dict[str, Any], reference: float) -> str:
    """What the gate objects to, in words; empty if it opens."""
    most, said = gate.recovered * reference, []
    if measured["short_loss"] > most:
        said.append(f"the loss on short contexts is {measured['short_loss']:.4f}, at most {most:.4f} is wanted")
    if measured["needles"] < gate.found:
        said.append(f"{measured['needles']:.0%} of the needles were found, {gate.found:.0%} are wanted")
    return "; ".join(said)
