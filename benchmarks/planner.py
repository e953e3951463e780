"""How far is the planner from published training runs?

    python benchmarks/planner.py                       the table; two seconds, no GPU, nothing is measured
    python benchmarks/planner.py --docs docs/planning.md

The rows are all published H100 figures for Llama 8B, 70B and 405B of torchtitan, NVIDIA (Megatron-Bridge, NeMo
AutoModel) and the Llama 3 paper that state their layout. Twelve of them, marked, were chosen by rule before the planner
was first run: of torchtitan's December 2024 page the compiled rows of each table without context parallelism, and of
NVIDIA's the three Megatron-Bridge and the AutoModel row of docs/planning.md. The rest are shown, not counted.

Each row is computed twice: with the table of hardware, where nothing is from a training run, and, for the machine with
the 500 W limit, with its speeds scaled by one run that is not among the twelve (`calibrate.from_run`): 8B on 8 devices
without compilation. torchtitan's overlapped tensor parallelism hides the share of the exchanges that the pair of rows
for 8B on 64 devices shows; that pair is not among the twelve either.

Prints a table and writes `benchmarks/results/planner-DATE.json` (or `--out`); exit code 1 if the paper's rows are off
by more than 7%, or fewer than nine of the twelve within 12%.
"""

import argparse
import contextlib
import datetime
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import command, revision

from puna.model.sizes import SIZES
from puna.parallel.layout import Layout
from puna.planner.calibrate import from_run
from puna.planner.hardware import Device, device
from puna.planner.step import Step, step_time
from puna.planner.work import Work

RESULTS = Path(__file__).parent / "results"
TABLE = "<!-- the table of benchmarks/planner.py -->"
META = "<!-- puna plan 8b --tokens 15e12 --gpus 2048xH100 -->"
END = "<!-- its end -->"
PAPER_LIMIT, LIMIT, WANTED = 0.07, 0.12, 9
LIMITED = "H100-500W"
# How torchtitan computed, read from its source at the commit that its page names (9dec370).
TITAN_WAY: dict[str, Any] = {
    "attention": "flash2",  # scaled_dot_product_attention
    "fused_optimizer": False,  # AdamW by foreach
    "complex_rotation": True,  # models/llama/model.py: apply_rotary_emb
    "copied_heads": True,  # ... repeat_kv
    "cast_bytes": 7,  # torch.compile reads the cast input once more (pytorch issue 130015, torchao's roofline)
}
TITAN, ASYNC_TITAN = "torchtitan, December 2024", "torchtitan, June 2025"
BRIDGE = "Megatron-Bridge archive"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run that somebody measured, and all the planner needs to know of it."""

    name: str
    size: str
    layout: Layout
    work: Work
    device: str
    tokens_per_s: float = 0.0  # of one device; or
    teraflops: float = 0.0  # model FLOP/s of one device, causal
    source: str
    counted: bool = False  # one of the twelve

    def step(self, on: Device) -> Step:
        return step_time(SIZES[f"llama-3.1-{self.size}"], self.layout, self.work, on)

    def error(self, on: Device) -> float:
        """(computed - measured) / measured."""
        found = self.step(on)
        return (
            found.flops() / 1e12 / self.teraflops - 1
            if self.teraflops
            else found.tokens_per_s_per_device / self.tokens_per_s - 1
        )


def _paper(shard: int, microbatches: int, measured: float, *, context: int = 1, length: int = 8192) -> Published:
    # Stages of one layer: taking a layer from the first leaves it the embedding alone, says the paper (3.3.2). Early
    # 2024, nothing said of compilation: PyTorch's operators one by one.
    layout = Layout(
        tensor=8, context=context, pipeline=16, shard=shard, stages_per_rank=8, microbatches=microbatches
    )  # fmt: skip
    work = Work(rows=shard * microbatches, sequence_length=length, uneven_ends=True, compiled=False)
    return Published(
        name=f"{layout.world:,} devices, {length // 1024}K", size="405b", layout=layout, work=work, device="H100",
        teraflops=measured, source="Llama 3 paper, table 4",
    )  # fmt: skip


def _titan(
    name: str, size: str, layout: Layout, rows: int, measured: float, *, counted: bool = False, source: str = TITAN,
    length: int = 8192, **how: Any,
) -> Published:  # fmt: skip
    work = Work(rows=rows, sequence_length=length, **{**TITAN_WAY, **how})
    return Published(
        name=name, size=size, layout=layout, work=work, device=LIMITED, tokens_per_s=measured, source=source,
        counted=counted,
    )  # fmt: skip


PAPER = [_paper(64, 32, 430), _paper(128, 16, 400), _paper(8, 16, 380, context=16, length=131_072)]
ONE_STAGE = Layout(tensor=8, shard=32)
PIPELINED = {"tensor": 8, "shard": 8, "pipeline": 8, "microbatches": 8}  # as many as ranks: torchtitan's default then
EAGER = _titan("8B, 8, not compiled", "8b", Layout(shard=8), 16, 5762, recompute="selective", compiled=False)
PLAIN_64 = _titan(
    "8B, 64, tensor 8", "8b", Layout(tensor=8, shard=8), 96, 4378, source=ASYNC_TITAN, recompute="selective"
)  # fmt: skip
OVERLAPPED_64 = 4809.4  # the same with overlap


def hidden_share() -> float:
    """The share of tensor exchanges that torchtitan's overlap hides: from the 8B pair on 64 devices."""
    found = PLAIN_64.step(device(LIMITED))
    saved = found.seconds * (1 - PLAIN_64.tokens_per_s / OVERLAPPED_64)
    return saved / (found.tensor * (1 - device(LIMITED).comm_share))


def titan_rows(hidden: float) -> list[Published]:
    """torchtitan's, H100 with 96 GB HBM2e and a limit of 500 W."""
    selective = {"recompute": "selective"}
    attention = {"recompute": "attention"}  # parallelize_llama.py, _save_list: fp8 products are not in it
    full = {"recompute": "full"}
    fp8: dict[str, Any] = {"precision": "fp8"}
    overlapped = {"tensor_hidden": hidden}
    rows = [
        EAGER,
        _titan("8B, 8", "8b", Layout(shard=8), 16, 6667, counted=True, **selective),
        _titan("8B, 8, fp8", "8b", Layout(shard=8), 16, 8532, counted=True, **attention, **fp8),
        _titan("8B, 128", "8b", Layout(shard=128), 256, 6514, counted=True, **selective),
        _titan("8B, 128, fp8", "8b", Layout(shard=128), 256, 8380, counted=True, **attention, **fp8),
        _titan("70B, 256, fp8", "70b", ONE_STAGE, 512, 829, counted=True, **full, **fp8),
        _titan("70B, 256, fp8, overlap", "70b", ONE_STAGE, 512, 876, counted=True, **full, **fp8, **overlapped),
        _titan(
            "405B, 512, fp8, 1F1B", "405b", Layout(**PIPELINED), 256, 100, counted=True, **full, **fp8, **overlapped
        ),
        _titan(
            "405B, 512, fp8, interleaved",
            "405b",
            Layout(**PIPELINED, stages_per_rank=2),
            256,
            128,
            counted=True,
            **full,
            **fp8,
            **overlapped,
        ),
        _titan("70B, 256", "70b", ONE_STAGE, 512, 597.3, source=ASYNC_TITAN, **full),
        _titan("70B, 256, overlap", "70b", ONE_STAGE, 512, 652.4, source=ASYNC_TITAN, **full, **overlapped),
        PLAIN_64,
    ]
    for context, measured in ((1, 3890), (2, 2540), (4, 1071), (8, 548)):
        layout = Layout(context=context, shard=8 // context)
        rows.append(
            _titan(
                f"8B, 8, fp8, {32 * context}K",
                "8b",
                layout,
                8 // context,
                measured,
                length=32_768 * context,
                **full,
                **fp8,
            )
        )
    return rows


def nvidia_rows() -> list[Published]:
    """NVIDIA's, DGX H100; Transformer Engine overlaps tensor exchanges and uses cuDNN's attention."""
    how: dict[str, Any] = {"attention": "cudnn", "tensor_hidden": 1.0}
    eight = Work(rows=128, precision="fp8", **how)
    seventy = Work(rows=256, precision="fp8", **how)
    big = Work(rows=1536, precision="fp8", **how)
    plain = Work(rows=128, recompute="full", **how)
    layouts = [
        Layout(shard=8, microbatches=16),
        Layout(tensor=4, pipeline=8, stages_per_rank=5, shard=2, microbatches=128),
        Layout(tensor=8, context=2, pipeline=8, stages_per_rank=8, shard=8, microbatches=192),
        Layout(context=2, shard=32, microbatches=4),
    ]
    given = [
        ("8B, 8, fp8", "8b", eight, 14_451, BRIDGE),
        ("70B, 64, fp8", "70b", seventy, 1_664, BRIDGE),
        ("405B, 1,024, fp8", "405b", big, 328, BRIDGE),
        ("70B, 64", "70b", plain, 866.77, "NeMo AutoModel"),
    ]
    return [
        Published(
            name=name, size=size, layout=layout, work=work, device="H100", tokens_per_s=measured, source=source,
            counted=True,
        )
        for layout, (name, size, work, measured, source) in zip(layouts, given, strict=True)
    ]  # fmt: skip


def compared() -> list[dict[str, Any]]:
    """Each row: what was measured, what the planner says, from the table alone and with the calibrated machine."""
    limited = from_run(
        device(LIMITED), SIZES["llama-3.1-8b"], EAGER.layout, EAGER.work, EAGER.tokens_per_s, "a run of torchtitan's"
    )
    found = []
    for row in [*PAPER, *titan_rows(hidden_share()), *nvidia_rows()]:
        plain = device(row.device)
        calibrated = limited if row.device == LIMITED else plain
        step = row.step(plain)
        found.append(
            {
                "run": row.name,
                "source": row.source,
                "device": row.device,
                "layout": str(row.layout),
                "measured": row.teraflops or row.tokens_per_s,
                "unit": "TFLOP/s" if row.teraflops else "tokens/s",
                "computed": step.flops() / 1e12 if row.teraflops else step.tokens_per_s_per_device,
                "error": row.error(plain),
                "error_calibrated": row.error(calibrated),
                "mfu_causal": step.mfu(),
                "mfu_full": step.mfu(causal=False),
                "counted": row.counted,
                "paper": bool(row.teraflops),
            }
        )
    return found


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counted = [r for r in rows if r["counted"]]
    return {
        "paper_worst": max(abs(r["error"]) for r in rows if r["paper"]),
        "counted": len(counted),
        "within_table": sum(abs(r["error"]) <= LIMIT for r in counted),
        "within_calibrated": sum(abs(r["error_calibrated"]) <= LIMIT for r in counted),
    }


def table(rows: list[dict[str, Any]], judged: dict[str, Any]) -> str:
    lines = [
        "| run | of | published | computed | off | calibrated | MFU causal / full |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        name = f"**{r['run']}**" if r["counted"] or r["paper"] else r["run"]
        calibrated = f"{r['error_calibrated']:+.1%}" if r["device"] == LIMITED else ""
        lines.append(
            f"| {name} | {r['source']} | {r['measured']:,.0f} {r['unit']} | {r['computed']:,.0f} | {r['error']:+.1%} | "
            f"{calibrated} | {r['mfu_causal']:.1%} / {r['mfu_full']:.1%} |"
        )
    lines.append("")
    lines.append(
        f"Of the twelve rows in bold type that are not the paper's, {judged['within_table']} are within {LIMIT:.0%} from "
        f"the table alone, {judged['within_calibrated']} with the calibrated machine; the paper's are within "
        f"{judged['paper_worst']:.1%}."
    )
    return "\n".join(lines)


def metas_page() -> str:
    """What `puna plan` says of Meta's 15T tokens for 8B: as indented text."""
    from puna.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(META.removeprefix("<!-- puna ").removesuffix(" -->").split())
    return "\n".join(f"    {line}".rstrip() for line in out.getvalue().splitlines())


def between(page: str, start: str, text: str) -> str:
    """`page` with what stands between `start` and the next end replaced by `text`."""
    before, rest = page.split(start)
    return f"{before}{start}\n{text}\n{END}{rest.split(END, 1)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / f"planner-{datetime.date.today()}.json")
    parser.add_argument("--docs", type=Path, default=None, help="a page whose table is replaced")
    options = parser.parse_args()
    rows = compared()
    judged = verdict(rows)
    text = table(rows, judged)
    print(text)
    options.out.write_text(
        json.dumps({"command": command(), "revision": revision(), **judged, "rows": rows}, indent=1) + "\n"
    )
    if options.docs:
        page = between(options.docs.read_text(), TABLE, text)
        options.docs.write_text(between(page, META, metas_page()))
    return 0 if judged["paper_worst"] <= PAPER_LIMIT and judged["within_calibrated"] >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
