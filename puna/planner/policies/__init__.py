"""What to do about faults: when to save, skip, roll back, restart, give up, leave a node out.

Each policy is a frozen value with methods over plain numbers. It has no clock, no files and no tensors: time is an
argument, and what must be remembered is a small state that goes in and comes out. So the trainer's supervisor and the
simulator of a cluster run these very objects, and a policy that the simulator found good is the one that then runs.

    SavePolicy        which steps are saved in memory and on disk, and which copies are kept
    SpikePolicy       a loss that is not finite or jumps: once more, skip, roll back, lower the rate, stop
    DetectPolicy      heartbeats and progress: who hangs
    RestartPolicy     how often, and after which wait, a run is started again
    EvictionPolicy    which nodes are left out because of what happened on them
    StragglerPolicy   who is slower than the others, by how much

Sources: arXiv 2407.21783, 3.3.4 (what interrupts a run of 16K GPUs); Young, CACM 1974 (how often to save); arXiv
2410.21680 (nodes with a history); arXiv 2204.02311, 5.1 (roll back and pass over the data of a spike).
"""

from puna.planner.policies.restarts import POINTS, EvictionPolicy, Restart, RestartPolicy, RestartState
from puna.planner.policies.saves import SavePolicy
from puna.planner.policies.spikes import SpikePolicy, SpikeState, Verdict
from puna.planner.policies.watching import Beat, DetectPolicy, StragglerPolicy, Suspicion

__all__ = [
    "POINTS", "Beat", "DetectPolicy", "EvictionPolicy", "Restart", "RestartPolicy", "RestartState", "SavePolicy",
    "SpikePolicy", "SpikeState", "StragglerPolicy", "Suspicion", "Verdict",
]  # fmt: skip
