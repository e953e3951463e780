"""What is measured between steps, after the state is safe: held-out loss, and whether a phase may end."""

from typing import Any

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
    """Mean loss on held-out batches; empty for objectives that have none."""
    batches = run.data.validation(run.position)
    return {"val_loss": run.placement.validate(run.data, batches)} if batches else {}


def enter_next_phase(run: Run) -> None:
    """Go to the next phase if this one has had its tokens."""
    if run.position.phase_spent(run.phases):
        run.position.enter_next(run.data.cursors(run.position))
