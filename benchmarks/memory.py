"""Does a rank hold what the planner says? The trainer's own processes, beside `puna.planner.memory`.

    python benchmarks/memory.py                  all layouts, 1 to 8 processes; about a minute; writes benchmarks/results
    python benchmarks/memory.py --docs docs/planning.md
    python benchmarks/memory.py --worlds 2       only layouts of 2 processes; writes nothing
    python benchmarks/memory.py --worlds 0       only what is recomputed; writes nothing

Each world size is one set of real processes on gloo. They place a small Llama by a layout, run one step of AdamW on random
tokens in bfloat16, and count bytes: of weights, gradients and the optimizer's moments as they lie on the rank, and of what
autograd keeps for the backward pass, at its largest, weights not counted. A rank's numbers are compared with the
planner's for its place in the pipeline; the worst rank counts. Then one process again with the trainer's `speed.recompute`:
bytes of every tensor that is alive, at the end of the forward pass and at its most in the backward pass. Exit code 1 if weights,
gradients or moments are off by more than 3%, or activations by more than 10%.
"""

import argparse
import datetime
import gc
import json
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from machine import command, processor, revision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.planner.memory import head_kept, made_again, memory_per_rank
from puna.planner.work import Work

RESULTS = Path(__file__).parent / "results"
TABLE = ("<!-- the table of benchmarks/memory.py -->", "<!-- its end -->")
STORED_LIMIT, ACTIVATIONS_LIMIT = 0.03, 0.10
CONFIG = LlamaConfig(
    dim=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=32, ffn_dim=704, vocab_size=1024, context=256,
    rope_theta=500_000.0,
)  # fmt: skip
ROWS = 8
# As the trainer computes on a CPU.
WORK = Work(sequence_length=CONFIG.context, rows=ROWS, autocast=True, masked=True, chunked_loss=True, compiled=False)
LAYOUTS = [
    Layout(),
    Layout(shard=2),
    Layout(replicate=2),
    Layout(tensor=2),
    Layout(context=2),
    Layout(pipeline=2, microbatches=4),
    Layout(pipeline=2, microbatches=4, in_flight=4),
    Layout(tensor=2, shard=2),
    Layout(pipeline=4, microbatches=8),
    Layout(pipeline=4, microbatches=8, in_flight=6),
    Layout(pipeline=2, stages_per_rank=3, microbatches=4, shard=2),
    Layout(tensor=2, context=2),
    Layout(tensor=2, pipeline=2, shard=2, microbatches=4),
    Layout(shard=8),
]


class Kept:
    """Bytes that autograd keeps, each storage once, and the most there ever were."""

    def __init__(self, parts: list[torch.nn.Module]):
        self.parts, self.now, self.most = parts, 0, 0
        self.held: Counter[int] = Counter()

    def pack(self, tensor: Tensor) -> "_Held":
        return _Held(self, tensor)

    def is_weight(self, place: int) -> bool:
        weights = (_local(p) for part in self.parts for p in part.parameters())
        return any(w.untyped_storage().data_ptr() == place for w in weights)


class _Held:
    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor
        storage = _local(tensor).untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        self.counts = self.size > 0 and not kept.is_weight(self.place)
        if self.counts:
            if not kept.held[self.place]:
                kept.now += self.size
                kept.most = max(kept.most, kept.now)
            kept.held[self.place] += 1

    def __del__(self) -> None:
        if self.counts:
            self.kept.held[self.place] -= 1
            if not self.kept.held[self.place]:
                self.kept.now -= self.size


def _local(tensor: Tensor) -> Tensor:
    inner = getattr(tensor, "_local_tensor", tensor)
    return inner.wait() if hasattr(inner, "wait") else inner


def random_rows(rows: int, seed: int) -> Any:
    """Rows of random tokens, a document each."""
    from puna.train.objectives.rows import Rows

    tokens = torch.randint(CONFIG.vocab_size, (rows, CONFIG.context + 1), generator=torch.Generator().manual_seed(seed))
    documents, weights = torch.zeros(rows, CONFIG.context, dtype=torch.int64), torch.ones(rows, CONFIG.context)
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents, weights=weights)


def step_bytes(layout: Layout) -> dict[str, Any]:
    """One step of this rank, by the layout: bytes by kind."""
    from puna.parallel.sharded import place
    from puna.train.objectives.rows import NextTokens

    placement = place(CONFIG, layout, seed=0)
    batch = random_rows(ROWS // layout.data_ranks, placement.data_rank)
    kept = Kept(placement.parts)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        placement.backward(NextTokens, [batch])
    weights = [p for _, p in placement.named_parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    gradients = sum(_local(p.grad).nbytes for p in weights)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return {
        "pipeline": layout.coordinates(placement.rank)["pipeline"],
        "parameters": sum(_local(p.data).nbytes for p in weights),
        "gradients": gradients,
        "optimizer": sum(_local(t).nbytes for t in moments),
        "activations": kept.most,
    }


def planned_bytes(layout: Layout, pipeline_rank: int) -> dict[str, float]:
    """The same kinds by formula. What the loss keeps is no activation here: its gradients, finished in the forward pass,
    lie outside what autograd saves and is measured by."""
    memory = memory_per_rank(CONFIG, layout, WORK, pipeline_rank)
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
    }


class Alive(TorchDispatchMode):
    """Bytes of the storages that operators made and that still live, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self._came(tensor.untyped_storage())
        return made

    def know(self, tensor: Tensor) -> None:
        """Of a tensor that is not to be counted."""
        self.sizes[tensor.untyped_storage()._cdata] = 0

    def _came(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        self.sizes[place] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._went, place)

    def _went(self, place: int) -> None:
        self.now -= self.sizes.pop(place, 0)


def recomputing(mode: str) -> dict[str, Any]:
    """One step of one process with `speed.recompute=mode`: bytes alive after the forward pass, and at most after that."""
    from puna.model.llama import Llama
    from puna.parallel.whole import WholeReading, products_in_bf16
    from puna.train.accelerate import SpeedConfig, accelerate
    from puna.train.objectives.rows import next_token_loss

    cpu = torch.device("cpu")
    model = accelerate(Llama(CONFIG).init_weights(0), SpeedConfig(fused=False, recompute=mode), cpu)
    batch = random_rows(ROWS, 0)

    def loss() -> Tensor:
        with products_in_bf16(cpu):
            return next_token_loss(WholeReading(model, batch), batch, batch.counts)[0]

    loss().backward()  # gradients exist from here on, and are not counted
    alive = Alive()
    with alive:
        for p in model.parameters():
            alive.know(p)
            alive.know(p.grad)
        value = loss()
        gc.collect()
        kept, alive.most = alive.now, alive.now
        value.backward()
    return {"kept": kept, "peak": alive.most}


def planned_recomputing(mode: str) -> dict[str, float]:
    """The same two by formula, with the casts of weights."""
    work = replace(WORK, recompute={"selective": "products"}.get(mode, mode))
    memory, layout = memory_per_rank(CONFIG, Layout(), work), Layout()
    held = memory.activations + head_kept(CONFIG, layout, work) + memory.communication
    again = made_again(CONFIG, layout, work) * WORK.tokens
    casts = memory.communication if mode != "none" else 0
    return {"kept": held - again - casts, "peak": held}


def compared_recomputing(modes: Sequence[str] = ("none", "selective", "full")) -> list[dict[str, Any]]:
    """Each way of the trainer to recompute: measured, planned, and how far they are apart."""
    found = []
    for mode in modes:
        measured, planned = recomputing(mode), planned_recomputing(mode)
        row = {
            k: {"measured": measured[k], "planned": planned[k], "off": planned[k] / measured[k] - 1} for k in measured
        }
        found.append({"recompute": mode, **row})
    return found


def compared(layouts: list[Layout]) -> list[dict[str, Any]]:
    """Each layout's worst rank: measured, planned, and how far they are apart, by kind."""
    found = []
    for world in sorted({layout.world for layout in layouts}):
        mine = [layout for layout in layouts if layout.world == world]
        for layout, ranks in zip(mine, _on_processes(world, mine), strict=True):
            worst: dict[str, Any] = {}
            for measured in ranks:
                planned = planned_bytes(layout, measured["pipeline"])
                for kind, plan in planned.items():
                    off = plan / measured[kind] - 1
                    if kind not in worst or abs(off) > abs(worst[kind]["off"]):
                        worst[kind] = {"measured": measured[kind], "planned": plan, "off": off}
            found.append({"layout": str(layout), "world": world, **worst})
    return found


def _on_processes(world: int, layouts: list[Layout]) -> list[list[dict[str, Any]]]:
    """For each layout what every rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (world, layouts, folder), nprocs=world)
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return [list(ranks) for ranks in zip(*by_rank, strict=True)]


def _process(rank: int, world: int, layouts: list[Layout], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = [step_bytes(layout) for layout in layouts]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def good(row: dict[str, Any]) -> bool:
    if "recompute" in row:
        return all(abs(row[kind]["off"]) <= ACTIVATIONS_LIMIT for kind in ("kept", "peak"))
    stored = all(abs(row[kind]["off"]) <= STORED_LIMIT for kind in ("parameters", "gradients", "optimizer"))
    return stored and abs(row["activations"]["off"]) <= ACTIVATIONS_LIMIT


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| layout | parameters | gradients | optimizer | activations |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[k]['measured'] / 1e6:.2f} MB, {row[k]['off']:+.1%}" for k in list(row)[2:]]
        lines.append(f"| {row['layout']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recompute_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| `speed.recompute` | alive after the forward pass | at most in the backward pass |", "|---|---|---|"]
    for row in rows:
        cells = [f"{row[k]['measured'] / 1e6:.2f} MB, {row[k]['off']:+.1%}" for k in ("kept", "peak")]
        lines.append(f"| {row['recompute']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS / f"memory-{datetime.date.today()}.json")
    parser.add_argument("--docs", type=Path, default=None, help="a page whose table is replaced")
    options = parser.parse_args()
    chosen = [layout for layout in LAYOUTS if options.worlds is None or layout.world in options.worlds]
    rows, modes = compared(chosen), compared_recomputing()
    text = f"{table(rows)}\n\n{recompute_table(modes)}"
    print(text)
    if options.worlds is None:
        record = {
            "command": command(),
            "revision": revision(),
            "processor": processor(),
            "rows": rows,
            "recomputing": modes,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if options.docs:
        before, rest = options.docs.read_text().split(TABLE[0])
        options.docs.write_text(f"{before}{TABLE[0]}\n{text}\n{TABLE[1]}{rest.split(TABLE[1], 1)[1]}")
    return 0 if all(good(row) for row in [*rows, *modes]) else 1


if __name__ == "__main__":
    sys.exit(main())
