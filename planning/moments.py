"""The optimizer of a traced step: what AdamW's moments take, in each of their formats.

It computes nothing. A test holds the sizes against the optimizer itself, which lies in `training`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from planning.memory import MOMENT_BLOCK, MOMENT_PIECE


class FakeAdamW:
    """Two moments of every parameter's local shard, made by the first step.

    Args:
        state: `precision.optimizer_state`; vectors keep float32.
    """

    def __init__(self, model: nn.Module, state: str, accelerator: str) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
        self.format, self.piece = state, MOMENT_PIECE[accelerator]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Holds what a step holds: narrow moments are widened piece by piece."""
        for parameter in self.param_groups[0]["params"]:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter not in self.state:
                self.state[parameter] = self._moments(local)
            if self.format != "fp32" and local.ndim >= 2:
                piece = min(self.piece, local.numel())
                for _ in range(2):
                    widened = [torch.empty(piece) for _ in range(2)]
                del widened

    def _moments(self, local: Tensor) -> dict[str, Tensor]:
        """Tensors of the size of both moments."""
        found = {}
        for name in ("exp_avg", "exp_avg_sq"):
            if self.format == "int8" and local.ndim >= 2:
                blocks = -(-local.numel() // MOMENT_BLOCK)
                found[name] = torch.empty(blocks, MOMENT_BLOCK, dtype=torch.uint8)
                found[f"{name} scales"] = torch.empty(blocks)
            else:
                narrow = self.format == "bf16" and local.ndim >= 2
                dtype = torch.bfloat16 if narrow else torch.float32
                found[name] = torch.empty(local.shape, dtype=dtype)
        return found
