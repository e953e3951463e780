"""What a launcher is to run, and the order by which the zygote forks one rank of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.train.resilience.settings import ResilienceConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """`target` ("module:function") with `argument`, as `processes` ranks."""

    target: str
    argument: dict[str, Any]
    processes: int
    modules: tuple[str, ...] = ()  # for the zygote to import
    nodes: tuple[str, ...] = ()  # where ranks may live; more than are needed: spares
    per_node: int = 0  # ranks on one; 0: all
    settings: ResilienceConfig = field(default_factory=ResilienceConfig)

    @property
    def each(self) -> int:
        """Ranks on a node."""
        return self.per_node or self.processes

    def order(
        self, rank: int, *, node: str, attempt: int, root: Path, errors: Path, log: Path | None
    ) -> dict[str, Any]:
        """For the zygote: one rank of the start number `attempt`, on `node`. `root` is the run's shared memory."""
        env = {
            "RANK": rank,
            "WORLD_SIZE": self.processes,
            "LOCAL_RANK": rank % self.each,
            "LOCAL_WORLD_SIZE": self.each,
            "PUNA_NODE": node,
            "PUNA_MEMORY": root,
            "PUNA_ATTEMPT": attempt,
            "PUNA_RENDEZVOUS": f"file://{root}/meet-{attempt}",
        }
        return {
            "target": self.target,
            "argument": self.argument,
            "rank": rank,
            "env": {name: str(value) for name, value in env.items()},
            "errors": str(errors),
            "log": str(log or ""),
        }
