"""States of a run in a folder, for a process that nobody watches: the durable tier alone, written while the run waits."""

from pathlib import Path

from puna.planner.policies import SavePolicy
from puna.train import state
from puna.train.resilience import restore as restoring
from puna.train.resilience.durable import DurableTier
from puna.train.resilience.image import Snapshot
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.peers import Peers
from puna.train.state import Run

KEPT = SavePolicy().kept
_NOWHERE = "staging"  # where an image lies until its state is complete


def save(run: Run, folder: Path) -> None:
    """Write the state of `run` into `folder`, atomically, and remove all but the newest `KEPT`.

    The first rank writes it, whole: a run may go on with other processes than it was saved by.
    """
    tensors, record = state.capture(run)
    whole = {name: value.contiguous() for name, value in run.placement.join(tensors.items())}
    if run.placement.rank == 0:
        _write(Snapshot(step=run.position.step, tensors=whole, record=record), folder)
    run.placement.most(0)  # nobody goes on before the state is safe


def _write(snapshot: Snapshot, folder: Path) -> None:
    staging = MemoryTier(folder / _NOWHERE)
    for slot in staging.sealed():  # of an earlier process, which died before it could publish
        staging.discard(slot)
    slot, seal = staging.save(snapshot)
    try:
        DurableTier(folder, kept=KEPT).save(seal, staging.image_path(slot), move=True)
    finally:
        staging.discard(slot)


def restore(run: Run, folder: Path, most: int | None = None) -> bool:
    """Fill `run` from the newest valid state in `folder` (of at most `most` steps); False if there never was one.

    Raises `ArtifactError` if there were states and none is valid.
    """
    durable = DurableTier(folder, kept=KEPT)
    rank, world = run.placement.rank, run.placement.world
    peers = Peers(rank=rank, world=world, replica=rank, replicas=world)
    found = restoring.newest(peers, folder / "nothing in memory", durable, layout="", most=most)
    if found is None:
        if most is None:
            durable.refuse_to_start_over()
        return False
    state.fill(run, found.tensors, found.record)
    return True
