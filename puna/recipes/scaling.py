"""`puna scale run`: a scaling study from raw text to a law, within a time that is given.

    text -> tokenizer -> tokens -> for each budget: runs around the best size -> one larger run, predicted -> fit

Every run is the one training loop with the family's size, rate and batch. The grid is made once, from the measured speed
of this machine, and kept in `plan.json`; where each budget's sizes lie follows from the budgets before it, which are
on the disk, so an interrupted study goes on as if it had not been. When the time is up it stops before the next run
and fits what there is; the same command with more `--minutes` goes on.
"""

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from puna import artifacts, config, log
from puna.artifacts import Artifact
from puna.config import require
from puna.curation.curate import CurationConfig, curate
from puna.errors import ArtifactError, DataError
from puna.recipes.running import held
from puna.scaling.family import recipe_for
from puna.scaling.grid import GridConfig, PlannedRun, budgets, centre, missing_side, run_at, runs_at
from puna.scaling.stage import FitConfig, fit_scaling, points_of
from puna.tokenizer.shards import TokeniseConfig, TokenShards, tokenise
from puna.tokenizer.train import TokenizerConfig, train_tokenizer
from puna.train.loop import TrainConfig, train
from puna.train.objectives.lm import LmObjective
from puna.train.optimizers import OptimizerConfig
from puna.train.schedule import Schedule

MOST_EPOCHS = 4.0  # repeats of the text that cost next to nothing (Muennighoff et al. 2023, arXiv 2305.16264)
_USED = 0.85  # of the minutes, for training; the rest is text, validation and fits
_MOST_ADDED = 2  # runs beside a budget's planned ones, where its lowest loss is at the edge


def _optimizer() -> OptimizerConfig:
    """Muon: with few steps its losses lie near a law's, AdamW's far above it (docs/log.md). A second moment over 100 steps
    instead of 20, for what stays with AdamW: batches this small are noisy (Porian et al. 2024)."""
    return OptimizerConfig(kind="muon", betas=(0.9, 0.99))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Every setting of a study. `grid.flops` is replaced by what the minutes allow, unless it is given."""

    data: Path | None = None  # the user's own text; None: the corpus that every machine with Python has
    flops: float = 0.0  # of all runs; 0: what `minutes` allow at this machine's speed
    grid: GridConfig = field(default_factory=GridConfig)
    curation: CurationConfig = field(default_factory=lambda: CurationConfig(heldout_share=0.06))
    validation_rows: int = 512
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    threads: int = 0  # 0: PyTorch's choice
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.flops >= 0, f"flops={self.flops} must not be negative")
        require(self.threads >= 0, f"threads={self.threads} must not be negative", hint="0 leaves it to PyTorch")
        require(self.validation_rows > 0, f"validation_rows={self.validation_rows} must be positive")


def run(study: Study, minutes: float, out: Path) -> Artifact | None:
    """The study. Returns the fit, or None where the time was up before a law could be told."""
    require(minutes > 0, f"minutes={minutes} must be positive")
    words = TokenizerConfig(
        vocab_size=study.grid.vocab_size, digits=1
    )  # refused before anything is read, if it is wrong
    out.mkdir(parents=True, exist_ok=True)
    with held(out / ".lock", out):
        clock = _Clock(minutes)
        text = curate(study.curation, study.data, out=out / "01-text")
        tokenizer = train_tokenizer(words, text, out=out / "02-tokenizer")
        tokens = tokenise(TokeniseConfig(), text, tokenizer, out=out / "03-tokens")
        grid = _grid(study, clock, out)
        _told(grid, tokens)
        runs, whole = _runs(study, grid, clock, tokens, tokenizer, out)
        return _fitted(study, grid, runs, whole, out)


class _Clock:
    """The time that is left, and what a run will take by the speed of those before it."""

    def __init__(self, minutes: float):
        self.ends = time.monotonic() + 60 * minutes
        self.speeds: list[tuple[float, float]] = []  # parameters, FLOP/s

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def measured(self, planned: PlannedRun, seconds: float) -> None:
        self.speeds.append((planned.model.parameters, planned.flops / max(seconds, 1e-3)))

    def allows(self, planned: PlannedRun) -> bool:
        """Whether the run will end in time; small models compute more slowly, so the nearest size's speed counts."""
        if not self.speeds:
            return self.left > 0
        _, speed = min(self.speeds, key=lambda s: abs(s[0] - planned.model.parameters))
        return planned.flops / speed < self.left


def _grid(study: Study, clock: _Clock, out: Path) -> GridConfig:
    """The grid: as planned before, or for the FLOPs that the time allows."""
    path, settings = out / "plan.json", config.to_json(study)
    if path.is_file():
        before = json.loads(path.read_text())
        changed = config.differences(before["study"], settings)
        if changed:
            raise ArtifactError(
                f"{out} holds a study with other settings:\n  " + "\n  ".join(changed),
                hint="choose another folder, or give the settings it was begun with",
            )
        return config.from_json(GridConfig, before["grid"])
    flops, speed = study.flops, 0.0
    if not flops:
        speed = measured_speed(study)
        flops = _USED * speed * clock.left
    grid = replace(study.grid, flops=flops)
    record = {"study": settings, "grid": config.to_json(grid), "flops_per_s": speed}
    artifacts.write_atomic(path, json.dumps(record, indent=1))
    return grid


def measured_speed(study: Study, seconds: float = 4.0) -> float:
    """FLOP/s of training steps at a size such as the grid will have in its middle, by a few seconds of them."""
    import torch

    from puna.model.llama import Llama
    from puna.parallel.whole import WholeReading
    from puna.train import hardware
    from puna.train.objectives.rows import Rows, next_token_loss

    hardware.prepare(study.threads)
    length = study.grid.sequence_length
    shape = run_at(study.grid, 1e13, 5e5).model
    model = Llama(shape).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(shape.vocab_size, (max(1, 4096 // length), length + 1))
    rows = Rows(tokens=ids[:, :-1], targets=ids[:, 1:], documents=torch.zeros_like(ids[:, 1:]),
                weights=torch.ones(ids[:, 1:].shape))  # fmt: skip
    done, started = 0, 0.0
    while True:
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
            loss, _ = next_token_loss(WholeReading(model, rows), rows, rows.counts)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not started:  # the first step allocates
            started = time.perf_counter()
            continue
        done += rows.tokens.numel()
        elapsed = time.perf_counter() - started
        if elapsed > seconds:
            return done * shape.train_flops_per_token(length) / elapsed


def _told(grid: GridConfig, tokens: Artifact) -> None:
    """Say what will be run, and whether the text is enough for it."""
    steps = budgets(grid)
    log.info(
        f"{grid.budgets} budgets of {steps[0]:.2g} to {steps[-1]:.2g} FLOPs, {grid.sizes} sizes each"
        + (f", and one run of {grid.beyond * steps[-1]:.2g} to predict" if grid.beyond else "")
    )
    have = TokenShards.load(tokens, "train").tokens
    most = max(r.tokens for r in runs_at(grid, steps[-1], centre(grid, steps[-1], None)))
    if most > MOST_EPOCHS * have:
        log.warn(
            f"the smallest size of the largest budget reads {most / have:.1f} times the text; beyond {MOST_EPOCHS:.0f} "
            "times, repeated text is worth less than new, and the law will be of that (give more data, or fewer minutes)"
        )


def _runs(
    study: Study, grid: GridConfig, clock: _Clock, tokens: Artifact, tokenizer: Artifact, out: Path
) -> tuple[list[Artifact], bool]:
    """All runs that the time allows, and whether that is all of them."""
    made: list[Artifact] = []
    folder = out / "runs"

    def one(planned: PlannedRun) -> Artifact | None:
        settings = training(study, planned)
        known = (folder / planned.name / artifacts.MANIFEST).is_file()
        if not known and not clock.allows(planned):
            log.info(f"time is up before {planned.name}; the same command with more --minutes goes on")
            return None
        run_ = train(settings, tokens, tokenizer, None, out=folder / planned.name)
        clock.measured(planned, run_.manifest["seconds"])
        made.append(run_)
        if not known:
            log.info(f"  {planned.name}: loss {run_.metrics['val_loss']:.4f}, {log.duration(run_.manifest['seconds'])}")
        return run_

    for budget in budgets(grid):
        done = points_of(made, "matrices") if made else None
        mine: list[Artifact] = []
        for planned in runs_at(grid, budget, centre(grid, budget, done)):
            run_ = one(planned)
            if run_ is None:
                return made, False
            mine.append(run_)
        for _ in range(_MOST_ADDED):
            size = missing_side(grid, points_of(mine, "matrices"))
            if size is None:
                break
            planned = run_at(grid, budget, size)
            if any(planned.name == m.path.name for m in mine):
                break
            run_ = one(planned)
            if run_ is None:
                return made, False
            mine.append(run_)
    if grid.beyond:
        last = grid.beyond * budgets(grid)[-1]
        best = centre(grid, last, points_of(made, "matrices"))
        return made, one(run_at(grid, last, best, predicted=True)) is not None
    return made, True


def training(study: Study, planned: PlannedRun) -> TrainConfig:
    """One run: the family's rate and batch for its size, a schedule as long as the run, no repeats of a random choice."""
    recipe = recipe_for(planned.model, planned.tokens, study.grid.sequence_length, optimizer=study.optimizer.kind)
    return TrainConfig(
        lm=LmObjective(
            sequence_length=study.grid.sequence_length,
            rows=recipe.batch_tokens // study.grid.sequence_length,
            validation_rows=study.validation_rows,
        ),
        model=planned.model,
        steps=recipe.steps,
        optimizer=study.optimizer,
        schedule=Schedule(peak=recipe.learning_rate, warmup_steps=recipe.warmup_steps, anneal_share=0.3),
        seed=study.seed,
        threads=study.threads,
        save_every_steps=max(200, recipe.steps // 10),
        validate_every_steps=recipe.steps,
    )


def _fitted(study: Study, grid: GridConfig, runs: list[Artifact], whole: bool, out: Path) -> Artifact | None:
    """The fit of what was run, beside earlier and shorter ones: `fit`, or `fit-of-N-runs` while there is more to come."""
    beyond = budgets(grid)[-1] * (1 + grid.beyond) / 2 if grid.beyond else 0.0
    settings = FitConfig(name=out.name, predict_above=beyond, seed=study.seed)
    try:
        return fit_scaling(settings, runs, out=out / ("fit" if whole else f"fit-of-{len(runs)}-runs"))
    except DataError as error:
        if whole:
            raise
        log.warn(f"no law can be told from {len(runs)} runs yet: {error.message}")
        return None


def planned_runs(study: Study) -> list[PlannedRun]:
    """The grid as it is guessed before any run, for whoever wants to see it; `study.flops` must be given."""
    require(study.flops > 0, "a plan needs its FLOPs", hint="give --flops, or --minutes to have the speed measured")
    grid = replace(study.grid, flops=study.flops)
    runs = [r for b in budgets(grid) for r in runs_at(grid, b, centre(grid, b, None))]
    if grid.beyond:
        last = grid.beyond * budgets(grid)[-1]
        runs.append(run_at(grid, last, centre(grid, last, None), predicted=True))
    return runs
