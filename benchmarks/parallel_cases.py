"""The cases of the parity matrix: layouts, variants, and the rows that a step of each learns."""

from dataclasses import dataclass

import parallel_updates as updates
import torch

from puna.model.sizes import LlamaConfig
from puna.parallel.layout import Layout
from puna.train.objectives.rows import Rows

TOLERANCE = 2e-5  # of loss, norm and gradients, relative: the order of float32 sums
TOLERANCE_BF16 = 0.05  # where products have 8 bits
ROWS, TOKENS = 16, 64  # of the global batch
SEED = 7


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the matrix."""

    layout: Layout
    variant: str = "documents"

    @property
    def tied(self) -> bool:
        return self.variant in ("tied", "dpo")

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.variant == "bf16" else "float32"

    @property
    def config(self) -> LlamaConfig:
        kv_heads = {"8 of 8": 8, "2 of 8": 2}.get(self.variant, 4)
        return LlamaConfig(
            dim=64, n_layers=6, n_heads=8, n_kv_heads=kv_heads, head_dim=8, ffn_dim=160,
            vocab_size=136, context=TOKENS, rope_theta=500.0, tied=self.tied,
        )  # fmt: skip

    @property
    def tolerance(self) -> float:
        return {"bf16": TOLERANCE_BF16, "muon": updates.TOLERANCE}.get(self.variant, TOLERANCE)


VARIANTS = ("documents", "tied", "causal", "8 of 8", "2 of 8", "bf16", "dpo", "reward", "muon")
LAYOUTS = [
    Layout(**given)
    for given in (
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
    )
]
FEW = [
    Case(layout=Layout(tensor=2, pipeline=2, microbatches=4), variant="tied"),
    Case(layout=Layout(context=2, pipeline=2, stages_per_rank=2, microbatches=4, in_flight=3), variant="2 of 8"),
    Case(layout=Layout(replicate=2, shard=2), variant="bf16"),
    Case(layout=Layout(tensor=2, context=2, sequence_parallel=False)),
    Case(layout=Layout(tensor=2, context=2, pipeline=2)),
    Case(layout=Layout(shard=2, tensor=2), variant="dpo"),
    Case(layout=Layout(context=2, pipeline=2), variant="dpo"),
    Case(layout=Layout(context=2, tensor=2), variant="reward"),
    Case(layout=Layout(shard=2, pipeline=2), variant="reward"),
    Case(layout=Layout(shard=2, tensor=2), variant="muon"),
    Case(layout=Layout(replicate=2, pipeline=2, tensor=2), variant="muon"),
]


def cases() -> list[Case]:
    """The matrix, without what a layout refuses."""
    every = [Case(layout=layout, variant=variant) for layout in LAYOUTS for variant in VARIANTS]
    return [case for case in every if case.config.n_kv_heads % case.layout.tensor == 0]


def global_batch(case: Case) -> Rows:
    """The rows of one step, the same for every layout."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, case.config.vocab_size, (ROWS, TOKENS + 1), generator=generator)
    documents = torch.zeros(ROWS, TOKENS + 1, dtype=torch.int64)
    if case.variant != "causal":
        borders = torch.rand(ROWS, TOKENS + 1, generator=generator) < 0.08
        documents = borders.long().cumsum(1)
        documents[::3, -TOKENS // 5 :] = -1
    weights = ((documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)).float()
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights)
