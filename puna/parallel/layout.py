"""How a run is laid out over processes: how many ways each kind of parallelism splits it, and who sits where.

    tensor     each matrix of a layer is cut, and its part multiplied here; the ranks exchange activations in every layer
    context    each sequence is cut; the ranks exchange keys and values in every layer
    pipeline   the layers are dealt out in stages; neighbours exchange activations at the border of a stage
    shard      each weight is cut and gathered just before it is used (FSDP); every rank has rows of its own
    replicate  whole copies of all that; gradients are summed once per step (with `shard`: HSDP)

Ranks are counted in the order of how much they have to say to each other, the most talkative innermost (arXiv
2407.21783, 3.3.2): tensor, context, pipeline, then data (shard, replicate). With 8 processes to a node, tensor=8 stays
inside the node; replicas, which speak once per step, may be far apart.

This module needs no PyTorch: the planner computes with the same value that the trainer runs.
"""

from dataclasses import dataclass, fields

from puna.config import require
from puna.model.sizes import LlamaConfig

ORDER = ("tensor", "context", "pipeline", "shard", "replicate")  # innermost first


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ways a run is split, by kind. The product is the number of processes."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    pipeline: int = 1  # ranks; each holds `stages_per_rank` stages
    tensor: int = 1
    sequence_parallel: bool = True  # between the cut matrices, activations are cut along the sequence
    stages_per_rank: int = 1  # above 1: interleaved, stage s lies on pipeline rank s % pipeline
    microbatches: int = 0  # that a rank's rows of a step are cut into; 0: as many as pipeline ranks
    in_flight: int = 0  # Llama 3's N: micro-batches that a stage takes in a row; 0: as many as pipeline ranks
    layers_per_stage: tuple[int, ...] = ()  # of each stage; empty: even, embedding and output counted as a layer each

    def __post_init__(self) -> None:
        for name in (*ORDER, "stages_per_rank"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, f"{name}={value} must be a whole number of at least 1")
        for name in ("microbatches", "in_flight"):
            value = getattr(self, name)
            require(type(value) is int and value >= 0, f"{name}={value} must be a whole number, 0 for the default")
        alone = self.stages_per_rank == 1 or self.pipeline > 1
        require(alone, f"stages_per_rank={self.stages_per_rank} needs pipeline > 1", hint="set stages_per_rank=1")
        given = self.layers_per_stage
        if given:
            require(len(given) == self.stages, f"layers_per_stage names {len(given)} stages, there are {self.stages}")
            require(min(given) >= 1, f"layers_per_stage={given}: every stage needs a layer", hint="use fewer stages")

    @property
    def world(self) -> int:
        """Processes."""
        return self.tensor * self.context * self.pipeline * self.data_ranks

    @property
    def data_ranks(self) -> int:
        """How many different sets of rows a step has."""
        return self.replicate * self.shard

    @property
    def stages(self) -> int:
        """Pieces that the layers are dealt out into."""
        return self.pipeline * self.stages_per_rank

    @property
    def microbatch_count(self) -> int:
        """Micro-batches that a rank's rows of a step are cut into."""
        return self.microbatches or self.pipeline

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` sits, by kind."""
        require(0 <= rank < self.world, f"rank {rank} is not among the {self.world} of this layout")
        found = {}
        for name in ORDER:
            rank, found[name] = divmod(rank, getattr(self, name))
        return found

    def data_rank(self, rank: int) -> int:
        """Whose rows `rank` works on; ranks that differ in tensor, context or pipeline only share them."""
        return rank // (self.tensor * self.context * self.pipeline)

    def stage_layers(self, n_layers: int) -> list[range]:
        """The layers of each stage, first to last.

        Without `layers_per_stage` the load is even where embedding and output count as a layer each, so that the first
        and the last stage get one layer fewer, as in Llama 3: 126 layers over 16 stages are 7, 14 times 8, and 7.
        """
        counts = self.layers_per_stage or _even(n_layers, self.stages)
        require(
            sum(counts) == n_layers,
            f"layers_per_stage={tuple(counts)} has {sum(counts)} layers, the model {n_layers}",
            hint="leave layers_per_stage out for an even division",
        )
        starts = [sum(counts[:stage]) for stage in range(self.stages)]
        return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """The stages that lie on a pipeline rank, first to last."""
        return list(range(pipeline_rank, self.stages, self.pipeline))

    def check_world(self, world: int) -> None:
        """Raises `ConfigError` unless there are as many processes as the layout needs."""
        require(
            world == self.world,
            f"the layout {self} needs {self.world} processes, there are {world}",
            hint=f"start with torchrun --nproc-per-node {self.world}, or change the layout",
        )

    def check_model(self, config: LlamaConfig, sequence_length: int | None = None) -> None:
        """Raises `ConfigError` if a model of this shape, or sequences of this many tokens, cannot be cut this way."""
        for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
            value = getattr(config, name)
            hint = f"tensor must divide {value}"
            if name == "n_kv_heads":
                hint += ": a key/value head is not cut, so at most as many ranks as there are of them"
            require(value % self.tensor == 0, f"{name}={value} is not divisible by tensor={self.tensor}", hint=hint)
        require(
            config.n_layers >= self.stages,
            f"{config.n_layers} layers cannot fill {self.stages} stages "
            f"(pipeline={self.pipeline} x stages_per_rank={self.stages_per_rank})",
            hint="use fewer stages: each needs a layer",
        )
        self.stage_layers(config.n_layers)
        if sequence_length is not None:
            self._check_sequence(sequence_length)

    def _check_sequence(self, length: int) -> None:
        pieces = 2 * self.context if self.context > 1 else 1
        require(
            length % pieces == 0,
            f"sequence_length={length} is not divisible by 2 * context = {pieces}",
            hint="each context rank takes one piece from the front and one from the back; change either number",
        )
        cut = self.context * self.tensor if self.sequence_parallel else self.context
        require(
            length % cut == 0,
            f"sequence_length={length} is not divisible by context * tensor = {cut}",
            hint="change the length, or set sequence_parallel=false",
        )

    def __str__(self) -> str:
        """What differs from one process, as one would type it: `tensor=2 pipeline=4`."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        parts = [f"{n}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for n, v in given]
        return " ".join(parts).replace("True", "true").replace("False", "false") or "one process"


def _even(n_layers: int, stages: int) -> tuple[int, ...]:
    """Layers per stage: each has one, and the rest go one by one to the stage with the least to do."""
    counts = [1] * stages
    extra = [0] * stages  # embedding on the first, output on the last, each as heavy as a layer
    extra[0] += 1
    extra[-1] += 1
    for _ in range(n_layers - stages):
        counts[min(range(stages), key=lambda s: counts[s] + extra[s])] += 1
    return tuple(counts)
