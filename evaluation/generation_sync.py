"""What the processes of a mesh tell each other while they generate text.

The logits of tensor-parallel peers are equal up to rounding at most, and of two tokens that are as
likely each could choose another: so the first of them chooses for all. Data ranks have prompts of
their own, and yet gather each other's shards of the weights in every step.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.mesh import DATA_AXES


class GenerationSync:
    """The agreement of all processes of a mesh with the axes of `parallel.mesh.AXES`."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device

    def chosen(self, tokens: Tensor) -> Tensor:
        """The tokens (batch,) that the first of the tensor-parallel peers has chosen."""
        if self.mesh["tp"].size() > 1:
            dist.broadcast(tokens, group=self.mesh["tp"].get_group(), group_src=0)
        return tokens

    def any_left(self, left: bool) -> bool:
        """Whether a rank of the data axes still has a row to go on with."""
        axes = [axis for axis in DATA_AXES if self.mesh[axis].size() > 1]
        if not axes:
            return left
        count = torch.tensor(int(left), device=self.device)
        for axis in axes:
            dist.all_reduce(count, group=self.mesh[axis].get_group())
        return bool(count)
