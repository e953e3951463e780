"""The one training loop: every objective, every size, any number of processes.

    while the recipe is not over:
        the step's samples, by number           phases.py, data.py
        loss and gradients of the global batch  the placement: one process or many (puna.parallel)
        is the step sound?                      the guard: go, again, skip, roll back, lower the rate, stop
        clip; rate of this many tokens; update  schedule.py, optimizers.py
        save, and only then evaluate and log    the guard, evaluations.py

A run that is killed continues from its newest valid state and ends with the very same bits, on the same machine with
the same number of threads: nothing depends on the clock, and no random numbers are drawn after the first weights.
The output is a checkpoint that is at once a Hugging Face folder, with `metrics.jsonl` beside it (a line per step).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from puna import artifacts, log
from puna.artifacts import Artifact
from puna.config import require
from puna.errors import DataError
from puna.model.checkpoint import load_model, save_model
from puna.model.reward import RewardModel
from puna.train import evaluations, hardware, ledger, speed
from puna.train.data import Loader
from puna.train.guard import Guard, Verdict, guard_of, stopped
from puna.train.metrics import MetricsLog
from puna.train.optimizers import optimizers
from puna.train.placing import place
from puna.train.settings import TrainConfig
from puna.train.state import Run

__all__ = ["TrainConfig", "load_reward_model", "train"]


@artifacts.stage("checkpoint")
def train(
    config: TrainConfig, data: Artifact | list[Artifact], tokenizer: Artifact, base: Artifact | None, *, out: Path
) -> dict[str, Any]:
    """Train on `data` (tokens, dialogs or preferences), from `base` or, without one, from random weights.

    `data` may be several artifacts: the sources of a mix, called after their folders. `tokenizer` is copied into the
    checkpoint, so that it is complete. Raises `PunaError` if the loss stops being finite.
    """
    hardware.prepare(config.threads)
    run = begin(config, [data] if isinstance(data, Artifact) else data, tokenizer, base, out)
    with guard_of(run) as guard, run.log:
        try:
            go_on(run, guard)
            summary = run.log.summary()
            finish(run, tokenizer.path)
        finally:
            run.loader.close()
            run.ledger.close()
        guard.finished()
    return {
        "parameters": run.placement.parameters,
        "steps": run.position.step,
        **({"layout": str(config.layout)} if config.layout.world > 1 else {}),
        **run.data.notes,
        **summary,
    }


def begin(config: TrainConfig, data: Sequence[Artifact], tokenizer: Artifact, base: Artifact | None, out: Path) -> Run:
    """A run before its first step."""
    placement = place(config, base)
    batches = config.objective.data(data, tokenizer.path, config.seed)
    batches.prepare(placement)
    rank, ranks = placement.data_rank, placement.data_ranks
    for phase in config.phases:
        hint = f"choose rows that {ranks} divides"
        require(phase.rows % ranks == 0, f"{ranks} data ranks cannot share {phase.rows} rows evenly", hint=hint)
    return Run(
        config=config,
        out=out,
        placement=placement,
        optimizers=optimizers(placement, config.optimizer, config.schedule.peak),
        data=batches,
        loader=Loader(batches, rank, ranks, config.micro_batch),
        ledger=ledger.Ledger(out / artifacts.WORK, rank, ranks, keeps=placement.rank * ranks % placement.world == 0),
        log=MetricsLog(out / "metrics.jsonl" if placement.rank == 0 else None),
        phases=config.phases,
        course=config.course,
    )


def go_on(run: Run, guard: Guard) -> None:
    """From the newest state, or the beginning, to the end of the recipe."""
    total = run.course.total
    if guard.restore(run):
        log.info(f"{run.out.name}: continuing at step {run.position.step}, {run.position.tokens:,} of {total:,} tokens")
    _forget_what_followed(run)
    with log.progress(run.out.name, total, unit="tokens", done=run.position.tokens) as bar:
        conclude(run, guard)  # a kill may have come between the last save and its evaluation
        while not _is_over(run, guard):
            before = run.position.tokens
            step(run, guard)
            guard.after_step(run)
            bar.advance(run.position.tokens - before)
            if run.line:
                bar.note(speed.summary(run.line, run.phase))
            conclude(run, guard)


def _is_over(run: Run, guard: Guard) -> bool:
    if not run.position.finished(run.phases):
        return False
    verdict = guard.settle()
    if verdict.action != "go":
        _roll_back(run, guard, verdict, run.position.samples)
    return verdict.action == "go"


def step(run: Run, guard: Guard) -> None:
    """One update, or, if the guard finds the numbers unsound, what it orders instead."""
    started = time.perf_counter()
    phase, at, number = run.phase, run.position, run.position.step
    rate = run.rate * run.course.learning_rate(done := at.scheduled(run.phases), phase.batch_tokens)
    first = evaluations.next_sample(run)
    guard.beat(number, "data")
    numbers, batches = run.loader.step(phase, at, first)
    run.ledger.take(number, numbers, batches)
    waited = time.perf_counter() - started
    verdict = Verdict(action="again")
    while verdict.action == "again":
        guard.beat(number, "backward")
        loss, notes = run.placement.backward(run.data, batches)
        norm = run.placement.clip(run.config.clip)
        verdict = guard.judge(number, loss, norm)
    if verdict.action == "stop":
        raise stopped(number, verdict)
    if verdict.action in ("roll_back", "lower_rate"):
        return _roll_back(run, guard, verdict, first + phase.rows)
    guard.beat(number, "update")
    if verdict.action == "go":
        update(run, rate)
        if run.course.is_averaged(done, phase.batch_tokens):
            run.average.add(run.placement)
    at.consume(phase, first)
    seconds = time.perf_counter() - started
    run.line = {
        "step": at.step,
        "loss": loss,
        "grad_norm": norm,
        "lr": rate,
        **speed.measure(run, batches, seconds),
        "waited_s": waited,
        **({"skipped": 1} if verdict.action == "skip" else {}),
        **notes,
    }


def update(run: Run, rate: float) -> None:
    """Let the gradients change the weights, at this learning rate."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    run.placement.updated()


def conclude(run: Run, guard: Guard) -> None:
    """After a step whose state is safe: evaluate if it is time, write its line, and enter the next phase."""
    if not run.line:
        return
    if evaluations.due(run):
        guard.beat(run.position.step, "evaluate")
        run.line |= evaluations.evaluate(run)
    run.log.write(run.line)
    run.line = {}
    evaluations.enter_next_phase(run)


def _roll_back(run: Run, guard: Guard, verdict: Verdict, stop: int) -> None:
    """To an earlier state; if the data was at fault, all since then, up to sample number `stop`, is passed over."""
    failed = run.position.step
    if not guard.restore(run, verdict.to):
        raise DataError(f"step {failed}: {verdict.why}; there is no state to go back to", hint="lower schedule.peak")
    log.warn(f"step {failed}: {verdict.why}; back to step {run.position.step}")
    if verdict.pass_over:
        run.passed.append([run.position.samples, stop])
    run.rate = verdict.rate
    _forget_what_followed(run)


def _forget_what_followed(run: Run) -> None:
    """Log and ledger as they were at the run's position."""
    run.log.cut(run.log_bytes)
    run.ledger.cut(run.position.step)


def finish(run: Run, tokenizer: Path) -> None:
    """The result: averaged weights if the recipe says so, the tokenizer, and the account of the samples."""
    run.average.put(run.placement)
    run.ledger.flush()
    model = run.placement.whole()
    if run.placement.rank != 0:
        return
    found = ledger.audit(run.out / artifacts.WORK, run.passed)
    if found.repeated or found.missing:
        raise DataError(f"samples came twice: {found.repeated[:5]}, or never: {found.missing[:5]} (by their numbers)")
    account: dict[str, Any] = {"samples": found.samples, "content": found.content, "passed": run.passed}
    account["position"] = asdict(run.position)
    artifacts.write_atomic(run.out / "samples.json", json.dumps(account, indent=1))
    if isinstance(model, RewardModel):
        with artifacts.replacing(run.out / "reward_head.safetensors") as temporary:
            save_file({"head.weight": model.head.weight.detach().cpu()}, temporary)
        model = model.llama
    save_model(model, tokenizer, run.out)


def load_reward_model(path: Artifact) -> RewardModel:
    """The reward model that `train` wrote."""
    model = RewardModel(load_model(path.path))
    with torch.no_grad():
        model.head.weight.copy_(load_file(path.file("reward_head.safetensors"))["head.weight"])
    return model.eval()
