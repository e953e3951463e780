"""How fast a step was, in numbers that can be compared: tokens per second, and shares of the machine's peak.

    mfu       the model's FLOPs, attention counted as the causal half, over what the machine could have done
    mfu_full  the same with every pair of tokens counted, as torchtitan and the PaLM paper do
    hfu       all FLOPs that were done, recomputation of activations included

Where no data sheet says it, the peak is measured, and raised when a step is faster than what was measured: `mfu` and `hfu`
stay below one, `mfu_full` may not, since it counts pairs of tokens that nobody computes.

The two conventions of MFU differ by an eighth for 8B at 8K tokens, and by two fifths at 128K: say which.
"""

from collections.abc import Sequence
from typing import Any

from puna.parallel.placement import Batch
from puna.train import hardware
from puna.train.accelerate import recomputed_flops_per_token
from puna.train.phases import Phase
from puna.train.state import Run


def measure(run: Run, batches: Sequence[Batch], seconds: float) -> dict[str, float]:
    """Numbers of a step of `seconds`, over all ranks."""
    shapes = [batch.shape for batch in batches]
    ranks = run.placement.data_ranks
    tokens = ranks * sum(B * T for B, T in shapes)
    config = run.placement.parts[0].config
    causal, full = (
        ranks * sum(B * T * config.train_flops_per_token(T, causal=causal) for B, T in shapes)
        for causal in (True, False)
    )
    again = ranks * sum(B * T * recomputed_flops_per_token(config, T, run.config.speed.recompute) for B, T in shapes)
    done = causal + again
    could = seconds * run.placement.world * hardware.peak_flops(done / seconds / run.placement.world)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "mfu": causal / could,
        "mfu_full": full / could,
        "hfu": done / could,
    }


def summary(line: dict[str, Any], phase: Phase) -> str:
    """A log line as a person wants it beside a progress bar."""
    speed = f"{line['tokens_per_s']:,.0f} tok/s  mfu {line['mfu']:.0%}"
    return f"step {line['step']:,}  {phase.name}  loss {line['loss']:.3f}  {speed}"
