"""A run in progress, and its state: what must be kept so that a killed run continues as if nothing had happened.

A state is named tensors and a small record. The names say what a tensor is, never where it lies: `model.NAME`,
`optimizer.KEY.NAME` (moments) and `average.NAME`, NAME being the parameter's in one process. The record holds the
position in the recipe, the length of the log and the log's last line. Nothing else is needed: data is addressed by
number, and no random numbers are drawn during training.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.parallel.placement import Placement
from puna.train.data import Data, Loader
from puna.train.ledger import Ledger
from puna.train.metrics import MetricsLog
from puna.train.phases import Phase, Position
from puna.train.schedule import Course
from puna.train.settings import TrainConfig


@dataclass(kw_only=True)
class Average:
    """Polyak averaging: the mean of the weights at several moments, summed in float32."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, placement: Placement) -> None:
        """One more moment."""
        for name, parameter in placement.named_parameters():
            total = self.sums.get(name)
            self.sums[name] = parameter.detach().clone() if total is None else total + parameter.detach()
        self.count += 1

    @torch.no_grad()
    def put(self, placement: Placement) -> None:
        """Let the mean be the model's weights, if there is one."""
        if self.count:
            for name, parameter in placement.named_parameters():
                parameter.copy_(self.sums[name] / self.count)
            placement.updated()


@dataclass(kw_only=True)
class Run:
    """Everything a step touches."""

    config: TrainConfig
    out: Path
    placement: Placement
    optimizers: list[torch.optim.Optimizer]
    data: Data
    loader: Loader
    ledger: Ledger
    log: MetricsLog
    phases: tuple[Phase, ...]
    course: Course
    position: Position = field(default_factory=Position)
    average: Average = field(default_factory=Average)
    passed: list[list[int]] = field(default_factory=list)  # ranges of sample numbers that are not to be learnt from
    rate: float = 1.0  # factor of the learning rate, after a guard has lowered it
    line: dict[str, Any] = field(default_factory=dict)  # of the log: the last step's, not written yet
    log_bytes: int = 0  # of the log, before that line

    @property
    def phase(self) -> Phase:
        """The phase that the next step belongs to."""
        return self.phases[self.position.phase]


def capture(run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of `run`: this rank's tensors, which are the run's own and change with its next step, and the record.

    `placement.join` makes whole tensors of them, which can be put back on any other layout.
    """
    tensors = {f"model.{name}": p.detach() for name, p in run.placement.named_parameters()}
    names = {id(p): name for name, p in run.placement.named_parameters()}
    for optimizer in run.optimizers:
        for parameter, moments in optimizer.state.items():
            tensors |= {f"optimizer.{key}.{names[id(parameter)]}": value for key, value in moments.items()}
    tensors |= {f"average.{name}": value for name, value in run.average.sums.items()}
    run.log_bytes = run.log.flush()
    run.ledger.flush()
    record = {
        "position": asdict(run.position),
        "averaged": run.average.count,
        "passed": run.passed,
        "rate": run.rate,
        "line": run.line,
        "log_bytes": run.log_bytes,
    }
    return tensors, record


@torch.no_grad()
def fill(run: Run, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Put a captured state of whole tensors back; this rank takes its part of each.

    Raises `KeyError` for one that lacks something, and then has changed nothing.
    """
    parameters, part = dict(run.placement.named_parameters()), run.placement.part
    weights = {name: tensors[f"model.{name}"] for name in parameters}
    position = Position(**record["position"])
    moments: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        kind, _, rest = full.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            moments.setdefault(name, {})[key] = value
    for name, parameter in parameters.items():
        parameter.copy_(part(name, weights[name]))
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in run.optimizers:
        optimizer.state.clear()
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if (name := names[id(parameter)]) in moments:
                optimizer.state[parameter] = {k: _beside(parameter, k, part(name, v)) for k, v in moments[name].items()}
    sums = {name: tensors[f"average.{name}"] for name in parameters if f"average.{name}" in tensors}
    sums = {name: part(name, value).to(parameters[name].device) for name, value in sums.items()}
    run.average = Average(sums=sums, count=record["averaged"])
    run.position, run.passed, run.rate = position, record["passed"], record["rate"]
    run.line, run.log_bytes = record["line"], record["log_bytes"]
    run.placement.updated()


def _beside(parameter: Tensor, key: str, value: Tensor) -> Tensor:
    """A moment where the parameter is. The step counter of an optimiser stays a number on the CPU unless it is fused."""
    return value.clone() if key == "step" and not parameter.is_cuda else value.to(parameter.device, copy=True)
