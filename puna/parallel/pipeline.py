"""Micro-batches through the stages of a pipeline, in the order of `schedule`, by PyTorch's pipelining runtime.

The order is ours (PyTorch's own schedules fix Llama's N); sending, receiving, gathering and reducing around it is
PyTorch's. Every micro-batch has the same shape, so that neighbours need not tell each other what they send.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from puna.config import require
from puna.parallel.mesh import Mesh
from puna.parallel.schedule import schedule
from puna.parallel.stage import Stage, Tokens

_KINDS = {"F": _ComputationType.FORWARD, "B": _ComputationType.FULL_BACKWARD}


class Pipeline:
    """This rank's stages, and how they take turns with those of other ranks."""

    def __init__(self, stages: list[Stage], mesh: Mesh, device: torch.device):
        self.stages, self.mesh, self.device = stages, mesh, device
        self._runtimes: dict[tuple, _PipelineScheduleRuntime] = {}

    def backward(self, batches: Sequence[Tokens]) -> Tensor:
        """Gradients of all micro-batches; the sum of their losses, zero on ranks without the last stage."""
        shapes = {rows.tokens.shape for rows in batches}
        require(len(shapes) == 1, f"a pipeline's micro-batches must have one shape, these have {sorted(shapes)}")
        losses: list[Tensor] = []
        self._runtime(len(batches), *shapes)._step_microbatches(
            arg_mbs=[(rows.tokens,) for rows in batches] if self.stages[0].is_first else None,
            kwarg_mbs=[{"rows": rows} for rows in batches],
            target_mbs=[None] * len(batches) if self.stages[-1].is_last else None,
            losses=losses,
            return_outputs=False,
        )
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)

    @torch.no_grad()
    def loss(self, batches: Sequence[Tokens]) -> Tensor:
        """The sum of the losses without gradients, zero on ranks without the last stage. Shapes may differ."""
        group, layout = self.mesh.pipeline_group, self.mesh.layout
        here = self.mesh.at["pipeline"]
        before, after = (here - 1) % layout.pipeline, (here + 1) % layout.pipeline
        total = torch.zeros((), device=self.device)
        sent = []
        for rows in batches:
            for stage in self.stages:
                x = rows.tokens
                if not stage.is_first:
                    x = torch.empty_like(self._stream(rows.tokens.shape), device=self.device)
                    dist.recv(x, group=group, group_src=before)
                x = stage(x, rows)
                if stage.is_last:
                    total += x
                else:
                    sent.append((dist.isend(x.contiguous(), group=group, group_dst=after), x))
        for work, _ in sent:
            work.wait()
        return total

    def _runtime(self, count: int, shape: torch.Size) -> _PipelineScheduleRuntime:
        if (count, shape) not in self._runtimes:
            layout = self.mesh.layout
            made = [self._stage(stage, number, shape) for number, stage in self._numbered()]
            runtime = _PipelineScheduleRuntime(made, count, loss_fn=lambda loss, _: loss, scale_grads=False)
            order = schedule(layout, count)
            actions = {
                rank: [_Action(stage, _KINDS[kind], m) for kind, stage, m in passes]
                for rank, passes in enumerate(order)
            }
            runtime.pipeline_order = actions
            runtime._prepare_schedule_with_comms(actions)
            self._runtimes = {
                (count, shape): runtime
            }  # made in less than a millisecond; rows of pairs differ in length
        return self._runtimes[count, shape]

    def _numbered(self) -> list[tuple[int, Stage]]:
        return list(zip(self.mesh.layout.stages_of(self.mesh.at["pipeline"]), self.stages, strict=True))

    def _stage(self, stage: Stage, number: int, shape: torch.Size) -> PipelineStage:
        tokens = torch.empty(shape, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        made = PipelineStage(
            stage,
            number,
            self.mesh.layout.stages,
            self.device,
            input_args=(tokens if stage.is_first else self._stream(shape, requires_grad=True),),
            output_args=(loss if stage.is_last else self._stream(shape, requires_grad=True),),
            group=self.mesh.pipeline_group,
        )
        made.has_backward = True
        return made

    def _stream(self, shape: torch.Size, **options: bool) -> Tensor:
        """The residual stream between stages, (B, T, D), on the meta device."""
        layout, (B, T) = self.mesh.layout, shape
        T = T // layout.tensor if layout.sequence_parallel else T
        return torch.empty((B, T, self.stages[0].config.dim), device="meta", **options)
