"""How much of its time a run trains, by formula: no random numbers, no library, microseconds.

    Young (1974)   save every sqrt(2 d M) seconds            d seconds a save takes, M mean seconds between faults
    Daly (2006)    time to do T seconds of work, saving each t:  M exp(R/M) (exp((t+d)/M) - 1) T/t    R seconds a restart
                   best t: sqrt(2dM) (1 + sqrt(d/2M)/3 + d/18M) - d  for d < 2M, else M

Sources: J. W. Young, CACM 17(9), 1974; J. T. Daly, FGCS 22(3), 2006. Both assume that faults come
at random at a constant rate, also while a run restarts. `expected_effective_time` adds planned interruptions with notice,
which lose no steps, and saves that are durable only some time after they began. `simulator.py` knows the rest.
"""

import math

from puna.planner.detection import seconds_until_suspected
from puna.planner.failures import Shows
from puna.planner.scenario import Scenario


def young_interval_s(stall_s: float, between_s: float) -> float:
    """Seconds of training between saves that lose the least time, to first order."""
    return math.sqrt(2 * stall_s * between_s)


def daly_interval_s(stall_s: float, between_s: float) -> float:
    """The same to higher order; holds also where saves are not small beside the time between faults."""
    if stall_s >= 2 * between_s:
        return between_s
    ratio = stall_s / (2 * between_s)
    return math.sqrt(2 * stall_s * between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def daly_effective_time(interval_s: float, stall_s: float, restart_s: float, between_s: float) -> float:
    """Share of the time that ends up as training, saving each `interval_s` seconds of training.

    `restart_s` is all from the fault until training goes on, its detection included.
    """
    if math.isinf(between_s):
        return interval_s / (interval_s + stall_s)
    try:
        spent = between_s * math.exp(restart_s / between_s) * math.expm1((interval_s + stall_s) / between_s)
    except OverflowError:  # a fault in practice always comes before the restart is over
        return 0.0
    return interval_s / spent


def expected_effective_time(
    *,
    step_s: float,
    save_every_steps: float,
    save_stall_s: float,
    between_faults_s: float,
    detect_s: float,
    restart_s: float,
    save_write_s: float = 0.0,
    between_planned_s: float = math.inf,
    planned_s: float = 0.0,
) -> float:
    """Share of a run's time that ends up in steps that count, 0 to 1. The formula behind `puna plan`'s risk.

    `detect_s` and `restart_s` follow every fault; steps since the last save that was durable are made again.
    `planned_s` is the whole length of a planned interruption, before which the run saves.
    """
    interval = save_every_steps * step_s
    share = daly_effective_time(interval, save_stall_s, detect_s + restart_s, between_faults_s)
    # A save that is still being written when a fault comes is lost, and with it the interval before it.
    lost = 0.0 if math.isinf(between_faults_s) else min(save_write_s, interval) / between_faults_s
    planned = 0.0 if math.isinf(between_planned_s) else planned_s / between_planned_s
    return max(0.0, share * (1 - lost) * (1 - min(1.0, planned)))


def expected(scenario: Scenario) -> float:
    """`expected_effective_time` of a scenario: its mean detection and restart, its spares taken to be enough.

    Left out: lemons, stragglers, restarts that fail because of a node, damaged saves, waits for nodes or persons.
    """
    times, save = scenario.times, scenario.save
    memory = bool(save.memory_every_steps)
    every = save.memory_every_steps or save.every_steps
    stall = times.memory_stall_s + times.save_stall_s * every / save.every_steps if memory else times.save_stall_s
    load = times.memory_load_s if memory else times.load_s
    fixed = times.stop_s + times.diagnose_s
    detect = _mean_detection_s(scenario)
    restart = (times.start_s + load) / scenario.restarts_work + times.swap_s
    return expected_effective_time(
        step_s=scenario.step_s,
        save_every_steps=every,
        save_stall_s=stall,
        save_write_s=0.0 if memory else times.save_write_s,
        between_faults_s=scenario.between_faults_s,
        detect_s=detect + fixed,
        restart_s=restart,
        between_planned_s=scenario.between_planned_s,
        planned_s=times.save_write_s + times.stop_s + restart if scenario.maintenance.notice else fixed + restart,
    )


def _mean_detection_s(scenario: Scenario) -> float:
    if not scenario.failures.count:
        return 0.0

    def seconds(shows: Shows) -> float:
        if shows == "silent":  # not noticed, and so not idle, but lost
            return scenario.corruption.hash_every_steps / 2 * scenario.step_s
        return seconds_until_suspected(scenario.detect, shows)

    return sum(cause.count * seconds(cause.shows) for cause in scenario.failures.causes) / scenario.failures.count
