"""The processes of a layout as PyTorch's device mesh, and the groups that speak with each other.

One mesh holds all ranks in the layout's order (tensor innermost). Data and context ranks see other tokens but the same
weights, so that weights are sharded over both: FSDP's mesh is `rows` = shard x context, under `replicate`.
"""

from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from puna.parallel.layout import Layout


class Mesh:
    """A layout's groups, as this process sees them. Made by all processes together."""

    def __init__(self, layout: Layout, device: torch.device):
        layout.check_world(dist.get_world_size())
        self.layout = layout
        self.rank, self.device = dist.get_rank(), device
        self.at = layout.coordinates(self.rank)
        sizes = (layout.replicate, layout.shard, layout.pipeline, layout.context, layout.tensor)
        # DeviceMesh wants the dimensions that are used together side by side, in whatever order the ranks are
        ranks = torch.arange(layout.world).view(sizes).permute(2, 0, 1, 3, 4)
        rows = ranks.flatten(2, 3)  # shard x context
        names = ("pipeline", "replicate", "rows", "tensor")
        self._mesh = DeviceMesh(device.type, rows, mesh_dim_names=names)
        self.tensor = self._mesh["tensor"]
        self.weights = self._mesh["replicate", "rows"] if layout.replicate > 1 else self._mesh["rows"]
        self.pipeline_group = self._mesh.get_group("pipeline")
        self.tensor_group = self._mesh.get_group("tensor")
        self.rows_rank = self._mesh.get_local_rank("rows")
        self.rows = layout.shard * layout.context
        self._copies = ranks.flatten(2)  # each row: the ranks that hold the parts of one copy of a stage
        self.context_group = self._groups(ranks.movedim(3, -1)) if layout.context > 1 else None
        ends = ranks[[0, -1]].movedim(0, -1)
        self.ends_group = self._groups(ends) if layout.pipeline > 1 else None  # first and last stage of one model

    @cached_property
    def copy_group(self) -> dist.ProcessGroup | None:
        """The ranks that cut the same copy of a stage among them, `rows` outside `tensor`. Made by all ranks together."""
        return self._groups(self._copies)

    def _groups(self, ranks: torch.Tensor) -> dist.ProcessGroup | None:
        """The group among the rows of `ranks` that this process is in; None if it is in none."""
        mine, _ = dist.new_subgroups_by_enumeration(ranks.flatten(0, -2).tolist())
        return mine if mine is not dist.GroupMember.NON_GROUP_MEMBER else None
