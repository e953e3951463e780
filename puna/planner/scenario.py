"""What is simulated: a run, its cluster, its faults, and the policies that deal with them.

Every number that is published says where; every other one is an assumption, and `puna simulate` measures how much the
answer hangs on it. The policies are the trainer's own objects (`policies.py`).
"""

import dataclasses
import math
from dataclasses import dataclass, field

from puna.config import require
from puna.planner.failures import LLAMA3, LLAMA3_PLANNED, FailureTable
from puna.planner.policies import (
    DetectPolicy,
    EvictionPolicy,
    RestartPolicy,
    SavePolicy,
    SpikePolicy,
    StragglerPolicy,
)

DAY_S = 86_400.0
LLAMA3_STEP_S = 6.22  # 405B, 16Mi tokens, 400 TFLOP/s on each of 16,384 GPUs (table 4), by our count of FLOPs


@dataclass(frozen=True, kw_only=True)
class Times:
    """How long things take. Assumptions for 16K GPUs; on your cluster, measure them."""

    stop_s: float = 15.0  # from the suspicion until every process is stopped
    diagnose_s: float = 30.0  # health checks of all nodes
    swap_s: float = 30.0  # a spare takes a node's place
    start_s: float = 180.0  # processes, communicators, compilation
    load_s: float = 60.0  # the state, from disk
    memory_load_s: float = 10.0  # the state, from memory
    save_stall_s: float = 2.0  # training stands still for a durable save
    save_write_s: float = 30.0  # from then until it is on disk; training goes on
    memory_stall_s: float = 0.02  # training stands still for a copy in memory: 0.3 GB a GPU for 405B
    person_s: float = 3600.0  # until a person has put right what the policies gave up

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 0, f"{name}={value} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Maintenance:
    """Planned work, domain by domain: each in its turn leaves the cluster for some hours, and all in one cycle."""

    domain_nodes: int = 64  # taken out together; 0: no maintenance
    cycle_days: float = 2048 / 64 * 54 / LLAMA3_PLANNED  # 36.8: then 16,384 GPUs are interrupted 47 times in 54 days
    hours: float = 4.0  # a domain is away
    notice: bool = True  # the run is told, and saves before it stops

    def __post_init__(self) -> None:
        require(self.domain_nodes >= 0, f"domain_nodes={self.domain_nodes} must not be negative")
        require(self.cycle_days > 0, f"cycle_days={self.cycle_days} must be positive")
        require(self.hours >= 0, f"hours={self.hours} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Stragglers:
    """Nodes that become slow. In a step all wait for the slowest, so the run is as slow as that one."""

    per_gpu_hour: float = 1 / (16_384 * 7 * 24)  # one a week on 16,384 GPUs
    least: float = 1.1  # times the usual time of a step, drawn evenly between these
    most: float = 1.6
    hours: float = 12.0  # mean, after which it is well again by itself

    def __post_init__(self) -> None:
        require(self.per_gpu_hour >= 0, f"per_gpu_hour={self.per_gpu_hour} must not be negative")
        require(1 <= self.least <= self.most, f"least={self.least} must be 1 to most={self.most}")
        require(self.hours > 0, f"hours={self.hours} must be positive")


@dataclass(frozen=True, kw_only=True)
class Lemons:
    """A few nodes fail more often than the others, whatever is repaired (arXiv 2410.21680)."""

    share: float = 0.01  # of all nodes
    times: float = 10.0  # as often; the average over all nodes stays the table's

    def __post_init__(self) -> None:
        require(0 <= self.share < 1, f"share={self.share} is not a share")
        require(self.times >= 1, f"times={self.times} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How a silent corruption comes to light: replicas compare hashes of their weights.

    A wrong gradient that all replicas got alike escapes that. Such a corruption stays in the weights, and is counted.
    """

    hash_every_steps: int = 10  # 0: never compared
    before_saves: bool = True  # also compared before each durable save, so that none holds wrong numbers
    found: float = 0.9  # share that the comparison finds

    def __post_init__(self) -> None:
        require(self.hash_every_steps >= 0, f"hash_every_steps={self.hash_every_steps} must not be negative")
        require(0 <= self.found <= 1, f"found={self.found} is not a share")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A run to be simulated. The defaults: Llama 3's 54 days on 16,384 GPUs, with the trainer's default policies."""

    gpus: int = 16_384
    gpus_per_node: int = 8
    days: float = 54.0
    step_s: float = LLAMA3_STEP_S
    spares: int = 96  # nodes beside those that train; the paper's cluster had 1,024 more nodes
    failures: FailureTable = LLAMA3
    failure_factor: float = 1.0  # times the table's rates
    restarts_work: float = 0.97  # share of restarts that come up, if no broken node takes part
    broken_found: float = 0.9  # share of broken nodes that the health checks find
    bad_saves: float = 0.001  # share of durable saves that turn out damaged when they are needed
    neighbour_lost: float = 0.02  # share of faults that take a node's memory and its neighbour's copy at once
    spikes_per_day: float = 0.0  # jumps of the loss
    spike_steps: int = 2  # how long one lasts
    day_and_night: float = 0.015  # slower at noon than at midnight; the paper saw 1 to 2%
    times: Times = field(default_factory=Times)
    maintenance: Maintenance = field(default_factory=Maintenance)
    stragglers: Stragglers = field(default_factory=Stragglers)
    lemons: Lemons = field(default_factory=Lemons)
    corruption: Corruption = field(default_factory=Corruption)
    save: SavePolicy = field(default_factory=SavePolicy)
    detect: DetectPolicy = field(default_factory=DetectPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    eviction: EvictionPolicy = field(default_factory=EvictionPolicy)
    straggler: StragglerPolicy = field(default_factory=StragglerPolicy)
    spikes: SpikePolicy = field(default_factory=SpikePolicy)

    def __post_init__(self) -> None:
        require(0 < self.gpus <= 1_000_000, f"gpus={self.gpus} must be 1 to 1,000,000")
        require(self.gpus_per_node > 0, f"gpus_per_node={self.gpus_per_node} must be positive")
        require(0 < self.days <= 3650, f"days={self.days} must be above 0 and at most 3,650")
        require(self.step_s > 0 and math.isfinite(self.step_s), f"step_s={self.step_s} must be positive")
        require(0 <= self.spares <= 1_000_000, f"spares={self.spares} must be 0 to 1,000,000")
        require(self.failure_factor >= 0, f"failure_factor={self.failure_factor} must not be negative")
        require(self.spikes_per_day >= 0, f"spikes_per_day={self.spikes_per_day} must not be negative")
        require(self.spike_steps > 0, f"spike_steps={self.spike_steps} must be positive")
        require(0 < self.restarts_work <= 1, f"restarts_work={self.restarts_work} must be above 0 and at most 1")
        for name in ("broken_found", "bad_saves", "neighbour_lost", "day_and_night"):
            value = getattr(self, name)
            require(0 <= value < 1 or (value == 1 and name == "broken_found"), f"{name}={value} is not a share")
        if self.failures.count and self.failure_factor:
            between = self.between_faults_s
            require(
                between > self.step_s,
                f"with {self.gpus:,} GPUs something would fail every {between:.3g} s, and a step takes {self.step_s:g} s",
                hint="no run gets ahead then: take fewer GPUs, or failure_factor below 1",
            )

    @property
    def nodes(self) -> int:
        """Nodes that train."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def seconds(self) -> float:
        return self.days * DAY_S

    @property
    def between_faults_s(self) -> float:
        """Mean seconds between two unexpected interruptions."""
        return self.failures.between_s(self.gpus) / self.failure_factor if self.failure_factor else math.inf

    @property
    def between_planned_s(self) -> float:
        """Seconds between two planned interruptions."""
        if not self.maintenance.domain_nodes:
            return math.inf
        return self.maintenance.cycle_days * DAY_S / -(-self.nodes // self.maintenance.domain_nodes)


def on(scenario: Scenario, gpus: int) -> Scenario:
    """`scenario` on another number of GPUs, with the same share of spares, at least one node."""
    resized = dataclasses.replace(scenario, gpus=gpus)
    return dataclasses.replace(resized, spares=math.ceil(scenario.spares * resized.nodes / scenario.nodes))


def llama3() -> Scenario:
    """Llama 3 405B's 54 days: what is published, and for the rest a cautious guess.

    Published: GPUs, days, step time (by MFU), interruptions by cause, planned ones, day and night. The paper names no
    copies in memory, so there are none here; durable saves each 100 steps, a watchdog of 100 s, restarts in 5 minutes.
    """
    return Scenario(
        save=SavePolicy(every_steps=100, memory_every_steps=0, kept=4),
        detect=DetectPolicy(step_budget_s=100.0, beat_timeout_s=10.0),
        corruption=Corruption(hash_every_steps=100, before_saves=False),
        times=Times(start_s=240.0),
    )


def plain(
    *, save_every_steps: int, save_stall_s: float, detect_s: float, restart_s: float, planned_s: float = 0.0, **changes
) -> Scenario:
    """Only what closed forms know: every fault the same, always noticed after `detect_s` and over after `restart_s` more.

    `planned_s`: how long each of Llama 3's planned interruptions takes, before which the run saves; 0: there are none.
    `changes` are further fields of `Scenario`.
    """
    causes = tuple(dataclasses.replace(c, shows="exit", node=False, broken=0.0) for c in LLAMA3.causes)
    names = (field.name for field in dataclasses.fields(Times) if field.name not in ("start_s", "save_stall_s"))
    beat = max(detect_s, 1e-3) / 100
    settings = {
        "failures": dataclasses.replace(LLAMA3, causes=causes),
        "spares": 64,
        "restarts_work": 1.0,
        "bad_saves": 0.0,
        "neighbour_lost": 0.0,
        "day_and_night": 0.0,
        "maintenance": Maintenance(domain_nodes=64 if planned_s else 0, hours=0.0),
        "stragglers": Stragglers(per_gpu_hour=0.0),
        "lemons": Lemons(share=0.0),
        "save": SavePolicy(every_steps=save_every_steps, memory_every_steps=0),
        "detect": DetectPolicy(beat_every_s=beat, beat_timeout_s=99.5 * beat, step_budget_s=200 * beat),
        "restart": RestartPolicy(first_wait_s=0.0, without_progress=1_000_000, budget=1_000_000),
        "times": Times(**dict.fromkeys(names, 0.0), start_s=restart_s, save_stall_s=save_stall_s),
    }
    return Scenario(**{**settings, **changes})
