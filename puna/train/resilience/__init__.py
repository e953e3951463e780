"""Resilience: a run that detects, survives and accounts for faults by itself. docs/faults.md follows one through it.

    guard        what the training loop talks to; everything below is behind it
    image        a state as bytes, and the seal that vouches for it
    memory       the memory tier: the last steps, out of a dying process's reach     sharing   ... and of a dying node's
    durable      the durable tier: states on disk, checked, the newest valid one used
    saver        both, beside the training          keeping   when they are made, and the way back to one
    restore      which state a run goes on from
    comparing    silent corruption: do ranks agree that must?    replicas   who holds a wrong number
    recheck      ... before the sum: some steps are computed twice
    pace         who is slow, by its own time
    signals      a run that is asked to end saves in the middle of a step
    board        signs of life     watch     who hangs, and where     sentry    the watch, where torchrun starts the ranks
    launcher     the command: keeps the two below alive     job   what it is to run
    zygote       a process that has everything imported, and forks ranks
    supervisor   starts ranks, watches them, starts them again    line   to the zygote    blame   who was first
    home         where a run's shared memory lies    peers     what ranks tell each other
    nodes        what happened on which node, and who is left out
    telling      to the ledger, the user, the nodes' histories
    ledger       where every second went, and what each fault cost     goodput   ... as a page
    inject       faults, on purpose

The launcher, the zygote's protocol and the supervisor need no PyTorch, so nothing is imported here before it is used.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("Guard", "ResilienceConfig"):
        from puna.train.resilience import guard

        return getattr(guard, name)
    raise AttributeError(name)
