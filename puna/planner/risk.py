"""What interrupts a planned run, and how much of its time is left for training.

Interruptions come at the rate of Llama 3's 54 days (419 on 16,384 GPUs, planned ones beside them), saves are as far
apart as Daly's formula has it, and the rest is the closed form of `expected.py`. `puna simulate` knows more.
"""

from dataclasses import dataclass, replace

from puna.errors import ConfigError
from puna.planner.expected import daly_interval_s, expected
from puna.planner.hardware import Device
from puna.planner.policies import SavePolicy
from puna.planner.scenario import Scenario, llama3

LEAST = 0.01  # of the time: below, a plan is not worth its arithmetic
SOURCE = "Llama 3 paper (arXiv 2407.21783), table 5: 419 interruptions in 54 days on 16,384 GPUs; Daly 2006"


@dataclass(frozen=True, kw_only=True)
class Risk:
    """Of a run on so many devices."""

    effective: float  # share of the time that trains
    between_s: float  # two unexpected interruptions, on average
    save_every_steps: int
    scenario: Scenario | None  # what `simulator.simulate` takes; None for a CPU, whose faults nobody has counted

    def interruptions(self, seconds: float) -> float:
        return seconds / self.between_s


def risk(devices: int, step_s: float, device: Device) -> Risk:
    """How often a run is interrupted and what that costs, when it saves as often as is best."""
    if device.node == 1:
        return Risk(effective=1.0, between_s=float("inf"), save_every_steps=100, scenario=None)
    try:
        scenario = replace(
            llama3(), gpus=devices, gpus_per_node=min(device.node, devices), step_s=step_s, days=1.0,
            spares=max(1, devices // device.node // 64),
        )  # fmt: skip
    except ConfigError:  # so many devices that something fails each minute
        between = 1296 * 3600 / 419 * 16_384 / devices
        return Risk(effective=LEAST, between_s=between, save_every_steps=1, scenario=None)
    interval = daly_interval_s(scenario.times.save_stall_s, scenario.between_faults_s)
    every = max(1, round(interval / step_s))
    scenario = replace(scenario, save=SavePolicy(every_steps=every, memory_every_steps=0, kept=4))
    return Risk(
        effective=max(LEAST, expected(scenario)), between_s=scenario.between_faults_s, save_every_steps=every,
        scenario=scenario,
    )  # fmt: skip
