"""What a training run is, as a value."""

from dataclasses import dataclass, field

from puna.config import require
from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.train.accelerate import SpeedConfig
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.objectives.sft import SftObjective
from puna.train.optimizers import OptimizerConfig
from puna.train.phases import Phase
from puna.train.resilience.settings import ResilienceConfig
from puna.train.schedule import Course, Schedule

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
    steps: int = 1000  # if the objective has no phases, which say themselves how long they are
    micro_batch: int = 0  # samples per forward and backward pass; 0: a rank's whole share of the step
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip: float = 1.0  # gradient norm
    seed: int = 0
    threads: int = 0  # 0: PyTorch's choice
    layout: Layout = field(default_factory=Layout, metadata={"machine": True})  # over how many processes, and how
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    save_every_steps: int = 50
    # how a supervised run meets faults
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig, metadata={"machine": True})
    validate_every_steps: int = 200

    def __post_init__(self) -> None:
        given = [name for name in ("lm", "sft", "dpo", "reward") if getattr(self, name) is not None]
        require(
            len(given) == 1, f"a run has one objective, not {given or 'none'}", hint="set one of lm, sft, dpo, reward"
        )
        require(self.steps > 0, f"steps={self.steps} must be positive")
        require(self.micro_batch >= 0, f"micro_batch={self.micro_batch} must be positive, or 0 for the whole batch")
        require(self.save_every_steps > 0, f"save_every_steps={self.save_every_steps} must be positive")
        require(self.validate_every_steps > 0, f"validate_every_steps={self.validate_every_steps} must be positive")

    @property
    def objective(self) -> Objective:
        """The one that is set."""
        return self.lm or self.sft or self.dpo or self.reward

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The run's phases, at least one."""
        return self.objective.course(self.steps)

    @property
    def course(self) -> Course:
        """The learning rate over the run."""
        phases = self.phases
        anneal = next((i for i, phase in enumerate(phases) if phase.anneal), None)
        start = None if anneal is None else sum(phase.planned for phase in phases[:anneal])
        total = sum(phase.planned for phase in phases)
        return Course.of(self.schedule, total, phases[0].batch_tokens, start)
