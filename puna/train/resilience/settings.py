"""How a run meets faults: the policies, together. No PyTorch here: the supervisor reads it too."""

from dataclasses import dataclass, field

from puna.config import require
from puna.planner.policies import (
    DetectPolicy,
    EvictionPolicy,
    RestartPolicy,
    SavePolicy,
    SpikePolicy,
    StragglerPolicy,
)


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """How a run meets faults."""

    save: SavePolicy = field(default_factory=SavePolicy)
    spikes: SpikePolicy = field(default_factory=SpikePolicy)
    detect: DetectPolicy = field(default_factory=DetectPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    eviction: EvictionPolicy = field(default_factory=EvictionPolicy)
    straggler: StragglerPolicy = field(default_factory=StragglerPolicy)
    check_every_steps: int = 10  # replicas are compared, and also before each durable save; 0: never
    recompute_every_steps: int = 0  # a step is computed twice, to find who brings wrong gradients to the sum; 0: never
    corrupt_most: int = 2  # the same step may come out wrong this often before the run stops
    leave_s: float = 30.0  # time to save and exit for a run that is asked to end; then it is killed

    def __post_init__(self) -> None:
        require(self.check_every_steps >= 0, f"check_every_steps={self.check_every_steps} must not be negative")
        require(
            self.recompute_every_steps >= 0, f"recompute_every_steps={self.recompute_every_steps} must not be negative"
        )
