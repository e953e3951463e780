"""Does every layout compute the same? Loss and gradients of many layouts beside those of one process: a parity matrix.

    python benchmarks/parallel.py                all layouts on up to 8 processes; writes benchmarks/results and the table
    python benchmarks/parallel.py --missing --seconds 400   what the day's results lack, for so long
    python benchmarks/parallel.py --worlds 2 4   only layouts of 2 and 4 processes, without portability
    python benchmarks/parallel.py --few          a handful, which the tests run; writes nothing

Each world size is one set of real processes on gloo, which goes through all its layouts. The reference is the plain model
in one process. A difference is the largest of a tensor beside the largest number of the reference's tensor; the worst
tensor counts. Variants of each layout:

    documents    several to a row, and a filling that attends to nothing; 4 key/value heads for 8 query heads (GQA)
    tied         the same, output and embedding tied
    causal       one document to a row
    8 of 8, 2 of 8   as many key/value heads as query heads, and fewer
    dpo, reward  pairs of dialogs instead of rows, with what the reference model says of them; tied, and not
    muon         how weights change in two steps of Muon (`parallel_updates.py`)
    bf16         products in bfloat16; the reference is one process that takes the same micro-batches one by one, and adds
                 their gradients in float32. What differs is a last bit of 8 here and there. Every reduction between ranks
                 is watched: unless tensor parallelism sums activations, all must be in float32

Then weights, AdamW's moments and Muon's momentum are saved on one layout, loaded on the next, and so on around: all must
be equal to the bit.
"""

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parallel_updates as updates
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from parallel_cases import FEW, ROWS, SEED, TOLERANCE, TOLERANCE_BF16, VARIANTS, Case, cases, global_batch
from parallel_pairs import Exact, drawn_head, pairs_data, unsettle, whole_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from puna.model.checkpoint import save_model
from puna.parallel.layout import Layout
from puna.parallel.placement import Cut
from puna.parallel.sharded import Sharded, place
from puna.parallel.whole import WholeReading
from puna.train.objectives.rows import NextTokens
from puna.train.optimizers import optimizers

ROOT = Path(__file__).parent.parent
DATE = datetime.date.today().isoformat()
RESULTS = ROOT / "benchmarks" / "results" / f"parallel-{DATE}.json"

Learnt = tuple[Any, Any, Any]  # an objective, this rank's batch, and the whole one


def learnt(case: Case, placement: Any, rank: int, ranks: int) -> Learnt:
    """What a step of this case learns; of pairs, the placement scores the reference."""
    if case.variant in ("dpo", "reward"):
        data = pairs_data(case.variant, case.config, ROWS, SEED)
        data.prepare(placement)
        unsettle(data, SEED)
        return data, data.batch(range(rank, ROWS, ranks)), data.batch(range(ROWS))
    rows = global_batch(case)
    return NextTokens(), rows.take(slice(rank, None, ranks)), rows


def reference(case: Case) -> tuple[float, dict[str, float], dict[str, Tensor], Any]:
    """Loss, notes and gradients of one process, and its objective; in bfloat16 summed over the layout's micro-batches."""
    model = whole_model(case.config, case.variant, SEED)
    data, _, batch = learnt(case, Exact(model), 0, 1)
    layout, parts = case.layout, [batch]
    if case.dtype == "bfloat16":
        shares = [batch.take(slice(rank, None, layout.data_ranks)) for rank in range(layout.data_ranks)]
        size = shares[0].samples // layout.microbatch_count
        parts = [share.take(slice(i, i + size)) for share in shares for i in range(0, share.samples, size)]
    total, notes = 0.0, dict.fromkeys(data.noted, 0.0)
    for part in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss, said = data.loss(WholeReading(model, part.rows), part, batch.counts)
        loss.backward()
        total += loss.item()
        notes = {name: notes[name] + said[name].item() for name in notes}
    return total, notes, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, data


def placed_for(case: Case) -> Sharded:
    """The model of a case in its place."""
    reward = case.variant == "reward"
    placed = place(case.config, case.layout, seed=SEED, dtype=getattr(torch, case.dtype), reward=reward)
    for name, parameter in placed.named_parameters():
        if name == "head.weight":
            parameter.data.copy_(placed.part(name, drawn_head(case.config, SEED)))
    return placed


def measure(case: Case) -> dict[str, Any] | None:
    """The differences of one case; called by all its processes, answered by the first."""
    if case.variant == "muon":
        return measure_muon(case)
    layout, placed = case.layout, placed_for(case)
    data, mine, _ = learnt(case, placed, placed.data_rank, placed.data_ranks)
    with Reductions() as reductions:
        loss, notes = placed.backward(data, [mine])
    held = ((name, p.grad) for name, p in placed.named_parameters() if p.grad is not None)
    gradients = {name: gradient.clone() for name, gradient in placed.join(held)}
    norm = placed.clip(1e-3)
    validated = placed.validate(data, [mine])
    if placed.rank != 0:
        return None
    wanted_loss, wanted_notes, wanted, wanted_data = reference(case)
    wanted_norm = torch.stack([g.double().norm() for g in wanted.values()]).norm().item()
    gradient, worst = updates.difference(gradients, wanted)
    result = {
        "layout": str(layout),
        "processes": layout.world,
        "variant": case.variant,
        "loss": abs(loss - wanted_loss) / wanted_loss,
        "validation": abs(validated - wanted_loss) / wanted_loss,
        "norm": abs(norm - wanted_norm) / wanted_norm,
        "gradients": gradient,
        "worst": worst,
        "tolerance": case.tolerance,
        "sums": sorted(reductions.types) if layout.tensor == 1 else ["activations too"],
    }
    if data.noted:
        result["notes"] = max(abs(notes[name] - w) / max(1.0, abs(w)) for name, w in wanted_notes.items())
    if case.variant == "dpo":
        result["reference"] = (
            ((data.reference - wanted_data.reference).abs() / wanted_data.reference.abs()).max().item()
        )
    return result


def measure_muon(case: Case) -> dict[str, Any] | None:
    """The same for how Muon changes weights."""
    changed = updates.given_gradients(placed_for(case), SEED)
    placed = placed_for(case)
    data, mine, rows = learnt(case, placed, placed.data_rank, placed.data_ranks)
    update, worst = updates.own_gradients(placed, data, mine, rows, SEED)
    if placed.rank != 0:
        return None
    found = {"layout": str(case.layout), "processes": case.layout.world, "variant": case.variant, "gradients": update}
    bits = {"same_bits": not changed, "sums": ["see documents"]}
    return found | {"loss": 0.0, "worst": changed[0] if changed else worst, "tolerance": case.tolerance, **bits}


class Reductions(TorchDispatchMode):
    """Watches which types of numbers are summed between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[str] = set()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator.namespace in ("c10d", "_c10d_functional") and "reduce" in operator.__name__:
            summed = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
            self.types |= {str(tensor.dtype).removeprefix("torch.") for tensor in summed}
        return operator(*arguments, **(keywords or {}))


def holds(result: dict[str, Any]) -> bool:
    """Whether a case agrees with one process."""
    kinds = ("loss", "validation", "norm", "gradients", "notes", "reference")
    close = all(result[kind] <= result["tolerance"] for kind in kinds if kind in result) and result.get(
        "same_bits", True
    )
    return close and bool(result["sums"]) and "bfloat16" not in result["sums"]


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
            line = f"{mark} {result['gradients']:.1e} {result['loss']:.1e} {case.variant:10} {case.layout}"
            print(line, file=sys.stderr, flush=True)
    return results


CIRCLE = [
    Layout(tensor=2, pipeline=2),
    Layout(replicate=2, shard=2),
    Layout(shard=2, tensor=4),
    Layout(context=2, pipeline=2, stages_per_rank=3),
    Layout(shard=3),
    Layout(tensor=2, context=2, pipeline=2),
    Layout(),
]


def hand_over(layout: Layout, before: Path | None, after: Path, folder: Path) -> int:
    """Load what another layout saved, save it again, and write it as a Hugging Face folder; how many tensors there are.

    The first one makes it: weights, and after a step the moments of AdamW and the momentum of Muon.
    """
    case = Case(layout=layout, variant="tied")
    placed = place(case.config, layout, seed=SEED if before is None else SEED + 1, dtype=torch.float32)
    named = dict(placed.named_parameters())
    if before is None:
        rows = global_batch(case).take(slice(placed.data_rank, None, placed.data_ranks))
        placed.backward(NextTokens(), [rows])
        states: dict[Any, dict[str, Tensor]] = {}
        for optimizer in optimizers(placed, updates.MUON, updates.RATE):
            optimizer.step()
            states |= optimizer.state
        held = {f"model.{name}": p.detach() for name, p in named.items()}
        held |= {f"{k}.{name}": v for name, p in named.items() for k, v in states[p].items()}
    else:
        stored = load_file(before)
        for name, parameter in named.items():
            parameter.data.copy_(placed.part(name, stored[f"model.{name}"]))
        held = {f"model.{name}": p.detach() for name, p in named.items()}
        kinds = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")
        kept = [(name, f"{kind}.{name}") for name in named for kind in kinds]
        held |= {key: placed.part(name, stored[key]) for name, key in kept if key in stored}
    whole = dict(placed.join(held.items()))
    model = placed.whole()
    save_file({name: piece.contiguous() for name, piece in placed.pieces(held)[0].items()}, f"{after}-{placed.rank}")
    cuts: list[Any] = [None] * layout.world
    dist.all_gather_object(cuts, placed.pieces(held)[1])
    if placed.rank == 0:
        assert together(after, cuts, whole), f"the pieces of {layout} do not make the whole"
        save_file(whole, after)
        save_model(model, None, folder)
    return len(whole)


def together(after: Path, cuts: list[Cut], whole: dict[str, Tensor]) -> bool:
    """Whether the ranks' pieces, each at its place, make the whole tensors, and leave nothing out."""
    found = {name: torch.full_like(tensor, float("nan")) for name, tensor in whole.items()}
    for rank, cut in enumerate(cuts):
        for name, piece in load_file(f"{after}-{rank}").items():
            _, start = cut.get(name, (None, (0,) * piece.ndim))
            found[name][tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))] = piece
    return all(torch.equal(found[name], whole[name]) for name in whole)


def portability() -> list[dict[str, Any]]:
    """Around the circle: every file and every folder has the first one's bytes."""
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / f"{i}.safetensors" for i in range(len(CIRCLE))]
        for i, layout in enumerate(CIRCLE):
            before = files[i - 1] if i else None
            tensors = in_processes(layout.world, hand_over, layout, before, files[i], Path(temporary) / f"hf-{i}")[0]
            first, this = load_file(files[0]), load_file(files[i])
            folders = [(Path(temporary) / f"hf-{j}" / "model.safetensors").read_bytes() for j in (0, i)]
            equal = first.keys() == this.keys() and all(torch.equal(first[n], this[n]) for n in first)
            found = {"layout": str(layout), "processes": layout.world, "tensors": tensors, "equal": equal}
            results.append(found | {"same_folder": folders[0] == folders[1]})
            print(results[-1], file=sys.stderr, flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """The largest relative difference of a gradient, by layout and variant, in Markdown."""
    cells = {(r["layout"], r["variant"]): r for r in results}
    lines = ["| layout | processes | " + " | ".join(VARIANTS) + " |", "|---|---|" + "---|" * len(VARIANTS)]
    for layout in dict.fromkeys((r["layout"], r["processes"]) for r in results):
        row = [cells.get((layout[0], variant)) for variant in VARIANTS]
        shown = [f"{r['gradients']:.1e}" if r else "refused" for r in row]
        lines.append(f"| `{layout[0]}` | {layout[1]} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def todays() -> dict[str, Any]:
    """The day's results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": [], "portability": []}


def write(results: list[dict[str, Any]], moved: list[dict[str, Any]]) -> None:
    """Add to the day's results, and make the table in docs/parallel.md of them."""
    earlier = todays()
    cells = {(r["layout"], r["variant"]): r for r in (*earlier["cases"], *results)}
    order = [(str(case.layout), case.variant) for case in cases()]
    results = [cells[key] for key in order if key in cells]
    record = {"date": DATE, "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    record |= {"tolerance": TOLERANCE, "tolerance_bf16": TOLERANCE_BF16, "cases": results}
    record["portability"] = moved or earlier["portability"]
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    page = ROOT / "docs" / "parallel.md"
    begin, end = "<!-- table: benchmarks/parallel.py -->\n", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n{table(results)}\n\n{end}{rest.partition(end)[2]}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--worlds", type=int, nargs="+", default=[], help="only layouts of so many processes")
    options.add_argument("--few", action="store_true", help="only the handful that the tests run; writes nothing")
    options.add_argument("--dry", action="store_true", help="write nothing")
    options.add_argument("--missing", action="store_true", help="only cases that the day's results lack")
    options.add_argument("--seconds", type=float, default=float("inf"), help="start nothing more after so many")
    given = options.parse_args()
    writes, began = not (given.few or given.dry), time.monotonic()
    done = {(r["layout"], r["variant"]) for r in todays()["cases"]} if given.missing else set()
    matrix = [c for c in (FEW if given.few else cases()) if not given.worlds or c.layout.world in given.worlds]
    matrix = [c for c in matrix if (str(c.layout), c.variant) not in done]
    moved = portability() if writes and not given.worlds and not (given.missing and todays()["portability"]) else []
    results = []
    for world, group in groups(matrix):
        if time.monotonic() - began < given.seconds:
            found = in_processes(world, measure_all, group)[0]
            results += found
            if writes:
                write(found, moved)
    bad = [r for r in results if not holds(r)] + [m for m in moved if not (m["equal"] and m["same_folder"])]
    largest = max((r["gradients"] for r in results if r["tolerance"] == TOLERANCE), default=0.0)
    counts = {"cases": len(results), "layouts": len({r["layout"] for r in results}), "bad": bad, "largest": largest}
    print(json.dumps(counts))
    return 1 if bad else 0


def groups(matrix: list[Case]) -> Iterator[tuple[int, list[Case]]]:
    """Cases of one world size, a dozen at a time: what one set of processes goes through."""
    for world in sorted({case.layout.world for case in matrix}):
        ours = [case for case in matrix if case.layout.world == world]
        yield from ((world, ours[i : i + 12]) for i in range(0, len(ours), 12))


if __name__ == "__main__":
    sys.exit(main())
