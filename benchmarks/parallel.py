"""Does every layout compute the same? Loss and gradients of many layouts beside those of one process: a parity matrix.

    python benchmarks/parallel.py                    all layouts, up to 8 processes; writes benchmarks/results and the table
    python benchmarks/parallel.py --worlds 2 4       only layouts of 2 and 4 processes; writes nothing

Each world size is one set of real processes on gloo, which goes through all its layouts. The reference is the plain model in
one process. A difference is the largest of a tensor beside the largest number of the reference's tensor; the worst
tensor counts. In float32 what is left is the order of sums, and must stay below `TOLERANCE`. In bfloat16 products are rounded to 8
bits, so that one process differs from itself in float32 by about as much as from any layout; both are shown.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from puna.model.llama import Llama
from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.parallel.sharded import Sharded, place
from puna.parallel.weights import whole_on_first
from puna.train.objectives.rows import Rows, next_token_loss

ROOT = Path(__file__).parent.parent
TOLERANCE = 2e-5  # float32: of loss and gradients, relative
TOLERANCE_BF16 = 0.05
ROWS, TOKENS = 16, 64  # of the global batch
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the matrix."""

    layout: Layout
    tied: bool = False
    documents: bool = True  # several documents to a row, and a filling that attends to nothing
    dtype: str = "float32"
    kv_heads: int = 4  # of 8 heads

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            dim=64, n_layers=6, n_heads=8, n_kv_heads=self.kv_heads, head_dim=8, ffn_dim=160,
            vocab_size=136, context=TOKENS, rope_theta=500.0, tied=self.tied,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.layout}; {self.kv_heads} of 8 heads{', tied' * self.tied}{', one document' * (not self.documents)}"


def cases() -> list[Case]:
    """The matrix: each kind alone, then together; and what a kind meets (documents, GQA, tied, bfloat16)."""
    plain = [
        {"shard": 2},
        {"replicate": 2},
        {"tensor": 2},
        {"tensor": 2, "sequence_parallel": False},
        {"context": 2},
        {"pipeline": 2},
        {"pipeline": 2, "microbatches": 8, "in_flight": 1},
        {"pipeline": 2, "stages_per_rank": 3, "microbatches": 4},
        {"pipeline": 2, "layers_per_stage": (2, 4), "microbatches": 4, "in_flight": 4},
        {"shard": 4},
        {"replicate": 2, "shard": 2},
        {"tensor": 4},
        {"context": 4},
        {"pipeline": 4, "layers_per_stage": (1, 2, 2, 1)},
        {"pipeline": 4, "microbatches": 2},
        {"tensor": 2, "context": 2},
        {"tensor": 2, "shard": 2},
        {"tensor": 2, "pipeline": 2},
        {"context": 2, "pipeline": 2, "stages_per_rank": 2, "microbatches": 4, "in_flight": 3},
        {"context": 2, "shard": 2},
        {"shard": 2, "pipeline": 2},
        {"shard": 8},
        {"replicate": 2, "shard": 2, "tensor": 2},
        {"tensor": 2, "context": 2, "pipeline": 2},
        {"tensor": 2, "pipeline": 2, "shard": 2, "stages_per_rank": 2, "microbatches": 4},
        {"context": 2, "pipeline": 2, "shard": 2},
        {"tensor": 2, "context": 2, "shard": 2},
        {"tensor": 4, "pipeline": 2, "layers_per_stage": (2, 4)},
        {"tensor": 2, "replicate": 2, "pipeline": 2},
    ]
    matrix = [Case(layout=Layout(**given), tied=tied) for given in plain for tied in (False, True)]
    few = [{"shard": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}, {"tensor": 2, "context": 2, "pipeline": 2}]
    for given in few:
        layout = Layout(**given)
        matrix += [Case(layout=layout, documents=False), Case(layout=layout, kv_heads=8), Case(layout=layout, kv_heads=2)]
    mixed = [*few, {"replicate": 2, "shard": 2}, {"tensor": 2, "pipeline": 2, "shard": 2}, {"shard": 8}]
    matrix += [Case(layout=Layout(**given), dtype="bfloat16", tied=tied) for given in mixed for tied in (False, True)]
    return sorted(matrix, key=lambda case: case.layout.world)


def global_batch(case: Case) -> Rows:
    """The rows of one step, the same for every layout."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, case.config.vocab_size, (ROWS, TOKENS + 1), generator=generator)
    documents = torch.zeros(ROWS, TOKENS + 1, dtype=torch.int64)
    if case.documents:
        borders = torch.rand(ROWS, TOKENS + 1, generator=generator) < 0.08
        documents = borders.long().cumsum(1)
        documents[::3, -TOKENS // 5 :] = -1
    weights = ((documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)).float()
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights)


def part_of(rows: Rows, which: slice) -> Rows:
    """Some rows of a batch."""
    return Rows(**{f.name: getattr(rows, f.name)[which] for f in dataclasses.fields(rows)})


def reference(case: Case, dtype: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process."""
    model = Llama(case.config).init_weights(SEED)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss, _ = next_token_loss(model, global_batch(case))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def measure(case: Case) -> dict[str, Any] | None:
    """The differences of one case; called by all its processes, answered by the first."""
    layout, config = case.layout, case.config
    dtype = getattr(torch, case.dtype)
    placed = place(config, layout, seed=SEED, dtype=dtype)
    mine = part_of(global_batch(case), slice(placed.data_rank, None, placed.data_ranks))
    loss, _ = placed.backward(None, [mine])
    gradients = collected(placed, {name: p.grad for name, p in placed.named_parameters()})
    norm = placed.clip(1e-3)
    validated = placed.validate(None, [mine])
    if placed.rank != 0:
        return None
    wanted_loss, wanted = reference(case, case.dtype)
    wanted_norm = torch.stack([g.double().norm() for g in wanted.values()]).norm().item()
    found = {
        "case": str(case),
        "world": layout.world,
        "dtype": case.dtype,
        "loss": abs(loss - wanted_loss) / wanted_loss,
        "validation": abs(validated - wanted_loss) / wanted_loss,
        "norm": abs(norm - wanted_norm) / wanted_norm,
    }
    found["gradients"], found["worst"] = difference(gradients, wanted)
    if case.dtype == "bfloat16":
        found["rounding"] = difference(reference(case, "float32")[1], wanted)[0]
    return found


def collected(placed: Sharded, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first rank from the parts of all."""
    shapes = {name: tuple(w.shape) for name, w in _empty(placed.config).named_parameters()}
    return {name: w.clone() for name, w in whole_on_first(parts.items(), placed.mesh, shapes)}


def _empty(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of any tensor, relative to the largest number of the wanted one, and whose."""
    assert found.keys() == wanted.keys()
    each = {name: ((found[name] - w).abs().max() / w.abs().max()).item() for name, w in wanted.items()}
    worst = max(each, key=lambda name: each[name] if each[name] == each[name] else float("inf"))
    return each[worst], worst


def tolerance(result: dict[str, Any]) -> float:
    return TOLERANCE if result["dtype"] == "float32" else TOLERANCE_BF16


def holds(result: dict[str, Any]) -> bool:
    """Whether a case agrees with one process."""
    return all(result[key] <= tolerance(result) for key in ("loss", "validation", "norm", "gradients"))


def in_processes(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of `world` forked gloo processes.

    They are forked from this one, which has imported everything; it must not have computed with threads before.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        store = Path(folder) / "store"
        children = [
            context.Process(target=_process, args=(rank, world, store, work, arguments)) for rank in range(world)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join()
        failed = [rank for rank, child in enumerate(children) if child.exitcode]
        if failed:
            raise RuntimeError(f"ranks {failed} of {world} failed; their messages are above")
        return [torch.load(f"{store}-{rank}", weights_only=True) for rank in range(world)]


def _process(rank: int, world: int, store: Path, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120)
    )
    torch.save(work(*arguments), f"{store}-{rank}")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # groups of many layouts take long to take down, and nothing is left to do


def measure_all(matrix: list[Case]) -> list[dict[str, Any]]:
    """All cases of one world size, one after the other."""
    results = []
    for case in matrix:
        started = time.perf_counter()
        result = measure(case)
        if result is not None:
            result["seconds"] = time.perf_counter() - started
            results.append(result)
            mark = "ok " if holds(result) else "BAD"
            print(f"{mark} {case.dtype:8} {result['gradients']:.1e} {result['loss']:.1e} {case}", flush=True)
    return results


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--worlds", type=int, nargs="+", default=[], help="only layouts of so many processes")
    options.add_argument("--only", default="", help="only cases that contain this text")
    given = options.parse_args()
    matrix = [c for c in cases() if (not given.worlds or c.layout.world in given.worlds) and given.only in str(c)]
    results = []
    for world in sorted({c.layout.world for c in matrix}):
        ours = [c for c in matrix if c.layout.world == world]
        results += in_processes(world, measure_all, ours)[0]
    bad = [r for r in results if not holds(r)]
    print(f"{len(results)} cases, {len({r['case'].split(';')[0] for r in results})} layouts, {len(bad)} differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
