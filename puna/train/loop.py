"""The one training loop: every objective, every size.

    for step in range(steps):
        loss = objective.loss(model, objective.batch(step))      the batch is a function of the step alone
        loss.backward(); clip; update; log; now and then save the state

A run that is killed continues from its newest valid state and ends with the very same bits, on the same machine with
the same number of threads: nothing depends on the clock, and no random numbers are drawn after the first weights.
The output is a checkpoint that is at once a Hugging Face folder, with `metrics.jsonl` beside it (a line per step).
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puna import artifacts, log
from puna.artifacts import Artifact
from puna.config import require
from puna.errors import PunaError
from puna.model.checkpoint import load_model, save_model
from puna.model.headstart import give_head_start
from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.train import hardware, state
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardModel, RewardObjective
from puna.train.objectives.sft import SftObjective
from puna.train.optimizers import OptimizerConfig, optimizers
from puna.train.schedule import Schedule

Objective = LmObjective | SftObjective | DpoObjective | RewardObjective


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Exactly one of the four objectives is set."""

    lm: LmObjective | None = None
    sft: SftObjective | None = None
    dpo: DpoObjective | None = None
    reward: RewardObjective | None = None
    model: LlamaConfig | None = None  # for a run that starts from random weights
    head_start: bool = False  # such a run's first two layers can copy from the first step: `model.headstart`
    steps: int = 1000
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip: float = 1.0  # gradient norm
    seed: int = 0
    threads: int = 0  # 0: PyTorch's choice
    save_every_steps: int = 50
    validate_every_steps: int = 200

    def __post_init__(self) -> None:
        given = [name for name in ("lm", "sft", "dpo", "reward") if getattr(self, name) is not None]
        require(
            len(given) == 1, f"a run has one objective, not {given or 'none'}", hint="set one of lm, sft, dpo, reward"
        )
        require(self.steps > 0, f"steps={self.steps} must be positive")
        require(self.save_every_steps > 0, f"save_every_steps={self.save_every_steps} must be positive")

    @property
    def objective(self) -> Objective:
        return self.lm or self.sft or self.dpo or self.reward


class Data(Protocol):
    """What an objective makes of an artifact."""

    notes: dict[str, Any]

    def batch(self, step: int) -> Any: ...

    def validation(self) -> list[Any]: ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]: ...


@artifacts.stage("checkpoint")
def train(
    config: TrainConfig, data: Artifact, tokenizer: Artifact, base: Artifact | None, *, out: Path
) -> dict[str, Any]:
    """Train on `data` (tokens, dialogs or preferences), from `base` or, without one, from random weights.

    `tokenizer` is copied into the checkpoint, so that it is complete. Raises `PunaError` if the loss stops being finite.
    """
    hardware.prepare(config.threads)
    model = _model(config, base)
    batches = config.objective.data(data, tokenizer.path, config.seed)
    if hasattr(batches, "prepare"):
        with _bf16():
            batches.prepare(model)
    run = state.RunState(
        step=0,
        model=model,
        optimizers=optimizers(model, config.optimizer, config.schedule.peak),
        average={},
        averaged=0,
    )
    with MetricsLog(out / "metrics.jsonl") as metrics:
        if state.restore(run, out / artifacts.WORK):
            log.info(f"{out.name}: continuing at step {run.step} of {config.steps}")
        metrics.cut(run.log_bytes)
        _steps(run, config, batches, metrics, out)
        summary = metrics.summary()
    _finish(run, tokenizer.path, out)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        **batches.notes,
        **summary,
    }


def _model(config: TrainConfig, base: Artifact | None) -> nn.Module:
    if base is None:
        hint = "give a base checkpoint or set `model`"
        require(config.model is not None, "there is nothing to start from: no base and no model size", hint=hint)
        model = Llama(config.model).init_weights(config.seed)
        if config.head_start:
            give_head_start(model, config.seed)
    else:
        model = load_model(base.path)
    model.train()
    return RewardModel(model) if config.reward else model


def _steps(run: state.RunState, config: TrainConfig, data: Data, metrics: "MetricsLog", out: Path) -> None:
    with log.progress(out.name, config.steps, unit="steps", done=run.step) as bar, _interruptible() as interrupted:
        while run.step < config.steps:
            record = _step(run, config, data)
            run.step += 1
            if _validates(run.step, config):
                record |= _validate(run.model, data)
            metrics.write(record)
            bar.note(f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s  mfu {record['mfu']:.0%}")
            bar.advance()
            if run.step % config.save_every_steps == 0 or interrupted():
                run.log_bytes = metrics.flush()
                state.save(run, out / artifacts.WORK)
            if interrupted():
                raise KeyboardInterrupt


def _validates(step: int, config: TrainConfig) -> bool:
    return step % config.validate_every_steps == 0 or step == config.steps


def _step(run: state.RunState, config: TrainConfig, data: Data) -> dict[str, float]:
    started = time.perf_counter()
    rate = config.schedule.learning_rate(run.step, config.steps)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    batch = data.batch(run.step)
    with _bf16():
        loss, notes = data.loss(run.model, batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.clip).item()
    value = loss.item()
    if not (math.isfinite(value) and math.isfinite(norm)):
        hint = "lower schedule.peak; the run continues from its last saved state"
        raise PunaError(f"step {run.step}: loss {value}, gradient norm {norm}: training has diverged", hint=hint)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if config.schedule.is_averaged(run.step, config.steps):
        _average(run)
    rows = batch.rows if hasattr(batch, "rows") else batch[0] if isinstance(batch, tuple) else batch
    seconds = time.perf_counter() - started
    tokens = rows.tokens.numel()
    flops = tokens * run.model.config.train_flops_per_token(rows.tokens.shape[1])
    return {
        "step": run.step + 1,
        "loss": value,
        "grad_norm": norm,
        "lr": rate,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "mfu": flops / seconds / hardware.peak_flops(),
        **notes,
    }


def _average(run: state.RunState) -> None:
    for name, parameter in run.model.named_parameters():
        total = run.average.get(name)
        run.average[name] = parameter.detach().clone() if total is None else total + parameter.detach()
    run.averaged += 1


@torch.no_grad()
def _validate(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean loss on held-out batches; empty for objectives that have none."""
    with _bf16():
        losses = [data.loss(model, batch)[0].item() for batch in data.validation()]
    return {"val_loss": sum(losses) / len(losses)} if losses else {}


def _finish(run: state.RunState, tokenizer: Path, out: Path) -> None:
    if run.averaged:
        with torch.no_grad():
            for name, parameter in run.model.named_parameters():
                parameter.copy_(run.average[name] / run.averaged)
    model = run.model
    if isinstance(model, RewardModel):
        with artifacts.replacing(out / "reward_head.safetensors") as temporary:
            save_file({"head.weight": model.head.weight.detach()}, temporary)
        model = model.llama
    save_model(model, tokenizer, out)


def load_reward_model(path: Artifact) -> RewardModel:
    """The reward model that `train` wrote."""
    from safetensors.torch import load_file

    model = RewardModel(load_model(path.path))
    with torch.no_grad():
        model.head.weight.copy_(load_file(path.file("reward_head.safetensors"))["head.weight"])
    return model.eval()


def _bf16() -> torch.autocast:
    """Matrix products in bfloat16, sums and weights in float32."""
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """Ctrl-C and SIGTERM let the step end and its state be saved; a second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(signal_number: int, _frame: Any) -> None:
        if received and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal_number)
        log.info("stopping after this step (once more: at once) ...")

    import threading

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    earlier = {s: signal.signal(s, receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


class MetricsLog:
    """`metrics.jsonl`: a line per step, cut back to the restored state's length when a run continues."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "MetricsLog":
        self.file = self.path.open("a+b")
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def cut(self, length: int) -> None:
        """Forget what was logged after the first `length` bytes."""
        self.file.truncate(length)
        self.file.seek(0, 2)

    def write(self, record: dict[str, float]) -> None:
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        self.file.write(json.dumps(rounded).encode() + b"\n")

    def flush(self) -> int:
        """Bring the log to the disk; its length."""
        self.file.flush()
        return self.file.tell()

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the run: ends of the curves, tokens, median speed."""
        self.flush()
        lines = [json.loads(line) for line in self.path.read_bytes().splitlines()]
        last = lines[-20:]
        speeds = sorted(line["tokens_per_s"] for line in lines)
        usage = sorted(line["mfu"] for line in lines)
        summary = {
            "tokens": sum(line["tokens"] for line in lines),
            "loss": sum(line["loss"] for line in last) / len(last),
            "tokens_per_s": round(speeds[len(speeds) // 2]),
            "mfu": usage[len(usage) // 2],
        }
        validated = [line["val_loss"] for line in lines if "val_loss" in line]
        return summary | ({"val_loss": validated[-1]} if validated else {})
