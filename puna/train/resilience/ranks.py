"""The training stage as ranks under the supervisor: what `puna pretrain --processes N` starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna import artifacts, config
from puna.artifacts import Artifact
from puna.errors import PunaError
from puna.train.resilience import signals
from puna.train.resilience.job import Job
from puna.train.resilience.launcher import launch

MODULES = ("puna.train.processes", "puna.parallel.sharded")


def train_watched(
    settings: Any,
    data: Artifact | Sequence[Artifact],
    tokenizer: Artifact,
    base: Artifact | None,
    *,
    out: Path,
) -> Artifact:
    """`train` (puna/train/loop.py) as supervised ranks on this machine, as many as the layout says; the checkpoint.

    Raises `PunaError` if the run could not go on, and `KeyboardInterrupt` if it was asked to end: the same call goes on.
    """
    sources = [data] if isinstance(data, Artifact) else list(data)
    argument = {
        "settings": config.to_json(settings),
        "data": [str(a.path.resolve()) for a in sources],
        "tokenizer": str(tokenizer.path.resolve()),
        "base": str(base.path.resolve()) if base else None,
        "out": str(out.resolve()),
    }
    job = Job(
        target="puna.train.resilience.ranks:rank",
        argument=argument,
        processes=settings.layout.world,
        modules=MODULES,
        settings=settings.resilience,
    )
    if (out / artifacts.MANIFEST).exists():
        rank(**argument)  # nothing to do, or a clear error
        return artifacts.load(out)
    status = launch(job, out)
    if status in (signals.LEFT, 130):
        raise KeyboardInterrupt
    if status:
        raise PunaError(
            f"{out}: the run ended with status {status}", hint="see the lines above; the same command goes on"
        )
    return artifacts.load(out)


def rank(*, settings: dict[str, Any], data: list[str], tokenizer: str, base: str | None, out: str) -> None:
    """One rank."""
    from puna.train.processes import train_together
    from puna.train.settings import TrainConfig

    sources = [artifacts.load(path) for path in data]
    start = artifacts.load(base) if base else None
    train_together(
        config.from_json(TrainConfig, settings),
        sources[0] if len(sources) == 1 else sources,
        artifacts.load(tokenizer),
        start,
        out=Path(out),
    )
