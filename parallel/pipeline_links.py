"""Transfers between neighboring ranks of a pipeline, and the waits for them.

Each link carries hidden states or gradients in one direction, so that two ranks never wait for each
other's transfers on one communicator. The waits of a step are kept: hang reports name the current
one (`Links.waits_for`), metrics contain their duration.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from parallel.pipeline_schedule import Transfer
from parallel.timestamps import timestamp


@dataclass
class Wait:
    """A wait for a transfer, with timestamps of the device."""

    transfer: Transfer
    start: Any
    end: Any = None

    @property
    def is_over(self) -> bool:
        return self.end is not None and (isinstance(self.end, float) or self.end.query())


class Links:
    """The transfers of one rank of the `pp` axis; the user clears `waits`."""

    def __init__(self, mesh: DeviceMesh, parts: int, dtype: torch.dtype) -> None:
        self.dtype, self.device_type = dtype, mesh.device_type
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self._groups = _create_groups(mesh, parts)
        self._receiving: dict[Transfer, tuple[Any, Tensor]] = {}
        self._sending: dict[bool, tuple[Transfer, Any, Tensor]] = {}  # by direction
        self.waits: list[Wait] = []
        cuda = self.device_type == "cuda"
        self._device = torch.cuda.device(torch.cuda.current_device()) if cuda else nullcontext()

    def receive(self, transfer: Transfer, shape: Sequence[int]) -> None:
        """Start to receive a tensor of a shape."""
        source = transfer.source % self.ranks
        values = torch.empty(shape, dtype=self.dtype, device=self.device_type)
        group = self._groups[source, self.rank, transfer.forward]
        work = dist.irecv(values, group=group, group_src=0 if source < self.rank else 1)
        self._receiving[transfer] = work, values

    def received(self, transfer: Transfer) -> Tensor:
        """Wait for a receive that has been started, and return its tensor."""
        work, values = self._receiving.pop(transfer)
        self._wait(transfer, work)
        return values

    def send(self, transfer: Transfer, values: Tensor) -> None:
        """Start to send, after the previous send in this direction, whose memory is free then."""
        self.finish_sends((transfer.forward,))
        target, values = transfer.target % self.ranks, values.contiguous()
        group = self._groups[self.rank, target, transfer.forward]
        work = dist.isend(values, group=group, group_dst=0 if target < self.rank else 1)
        self._sending[transfer.forward] = transfer, work, values

    def finish_sends(self, directions: Sequence[bool] = (True, False)) -> None:
        """Wait for the last send in each direction: forward, backward."""
        for sending in filter(None, [self._sending.pop(each, None) for each in directions]):
            self._wait(*sending[:2])

    def waits_for(self) -> str:
        """Return what this rank waits for from another stage, empty if nothing.

        Called by other threads. On a GPU it is what the device waits for, not the host.
        """
        with self._device:  # otherwise CUDA would use the first device
            waiting = (each for each in self.waits if not each.is_over)
            if (wait := next(waiting, None)) is None:
                return ""
        source, target, index = wait.transfer
        what = "hidden states" if wait.transfer.forward else "gradients"
        if target % self.ranks == self.rank:
            return f"stage {target} waits for micro-batch {index} from stage {source} ({what})"
        return f"stage {source} waits to send micro-batch {index} to stage {target} ({what})"

    def _wait(self, transfer: Transfer, work: Any) -> None:
        """Let the stream of the device, or on CPU this thread, wait for a transfer."""
        wait = Wait(transfer, timestamp(self.device_type))
        self.waits.append(wait)
        work.wait()
        wait.end = timestamp(self.device_type)


def _create_groups(mesh: DeviceMesh, parts: int) -> dict[tuple[int, int, bool], dist.ProcessGroup]:
    """Create this rank's process groups of two, by source, target and `forward`.

    A first message sets up each communicator: NCCL creates that of two ranks when both first send
    or receive, and blocks until then (getKeySendRecv in ProcessGroupNCCL.cpp); in a step, a rank
    would block in a receive before it has sent.

    Only the members of a group create it, and its name depends on how many groups each has: all
    ranks create equally many, those without a neighbor groups of their own.
    """
    global_ranks = dist.get_process_group_ranks(mesh.get_group())
    ranks, own = mesh.size(), mesh.get_local_rank()
    even, odd = ([(each, each + 1) for each in range(start, ranks - 1, 2)] for start in (0, 1))
    around = [(ranks - 1, 0)] if parts > 1 else []
    groups = {}
    for pairs in (even, odd, around):
        source, target = next((pair for pair in pairs if own in pair), (own, own))
        members = sorted({global_ranks[source], global_ranks[target]})
        for key in ((source, target, True), (target, source, False)):
            groups[key] = dist.new_group(members, use_local_synchronization=True)
            if source != target:
                exchange: Any = dist.send if own == key[0] else dist.recv
                other = global_ranks[target if own == source else source]
                exchange(torch.zeros(1, device=mesh.device_type), other, groups[key])
    return groups
