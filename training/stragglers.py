"""Warning about ranks that compute more slowly than the others, for which all ranks wait.

Under FSDP all ranks take equally long for a step, because each block waits for the weights of all.
So the time inside the forward of the blocks is measured, after their weights are gathered: with
CUDA events on a GPU, with a clock on the CPU. Collectives of tensor and context parallelism are
inside of it; ranks of such a group therefore take equally long, and are named together. Waits for
other pipeline stages are not; stages are compared by layer, because their numbers of layers differ.
Results of the run do not depend on it. Imported with several processes.
"""

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.timestamps import seconds_between, timestamp
from resilience.rank_groups import name_ranks

STEPS = 20  # measured before ranks are compared
MAX_COST = 0.1  # of the median step
STEP_TO_FORWARD = 3  # a backward takes about twice as long as its forward


class StragglerMonitor:
    """The time that this rank computes in each step, and its comparison with the other ranks.

    Args:
        blocks: Modules whose forward is measured, after FSDP has been applied to them; none on a
            pipeline stage that is the head alone.
        device: Where they compute.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device, self._n_blocks = device, len(blocks)
        self._spans: list[tuple[Any, Any]] = []  # of this step: start and end of each forward
        self._steps: deque[tuple[list[tuple[Any, Any]], float]] = deque(maxlen=STEPS)
        self._start: Any = None
        self._step_start = time.perf_counter()
        self._reported: set[str] = set()
        for block in blocks:
            block.register_forward_pre_hook(self._before)  # after FSDP's, which gathers the weights
            block.register_forward_hook(self._after, prepend=True)

    def _before(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._start = timestamp(self._device.type)

    def _after(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._spans.append((self._start, timestamp(self._device.type)))

    def end_step(self) -> None:
        """Keep the measurements of a step."""
        now = time.perf_counter()
        self._steps.append((self._spans, now - self._step_start))
        self._spans, self._step_start = [], now

    def warning(self) -> str | None:
        """Return a message if ranks have been slow for `STEPS` steps, once for each host.

        A collective call, after the device has completed the steps; equal on all ranks.
        """
        if len(self._steps) < STEPS:
            return None
        measured = [(_seconds(spans), self._n_blocks, duration) for spans, duration in self._steps]
        local = torch.tensor(measured, device=self._device)  # (STEPS, 3)
        self._steps.clear()
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local)
        computed, layers, steps = torch.stack(gathered).unbind(-1)  # each (ranks, STEPS)
        slow = find_stragglers(computed, layers[:, 0], steps.median(dim=0).values)
        if not slow:
            return None
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())
        new = {rank: cost for rank, cost in slow.items() if hosts[rank] not in self._reported}
        self._reported |= {hosts[rank] for rank in new}
        return describe(new, hosts)


def describe(costs: Mapping[int, float], hosts: Sequence[str]) -> str | None:
    """Return a message that names ranks by host, the slowest host first; None without ranks.

    Args:
        costs: Fraction of a step that each slow rank costs.
        hosts: Of all ranks.
    """
    ranks: dict[str, list[int]] = {}
    for rank in sorted(costs, key=lambda rank: -costs[rank]):
        ranks.setdefault(hosts[rank], []).append(rank)
    if not ranks:
        return None
    shown = "; ".join(f"{name_ranks(each)} on {host}" for host, each in ranks.items())
    return (
        f"Warning: {shown}: slower than the other ranks, which cost {max(costs.values()):.0%} of "
        f"the last {STEPS} steps; check for other processes, heat and faults"
    )


def find_stragglers(computed: Tensor, layers: Tensor, steps: Tensor) -> dict[int, float]:
    """Return the ranks that are slow in most steps, with the fraction of a step that this costs.

    Args:
        computed: (ranks, steps) seconds that each rank computed in the forward.
        layers: (ranks) number of layers of each rank; one without layers is not compared.
        steps: (steps) seconds of each step.
    """
    layers = layers.unsqueeze(1)  # (ranks, 1)
    by_layer = (computed / layers)[layers[:, 0] > 0]  # (ranks with layers, steps)
    usual = layers * by_layer.median(dim=0).values  # (ranks, steps); of two ranks, the faster one
    costs = STEP_TO_FORWARD * (computed - usual) / steps  # (ranks, steps)
    medians = costs.median(dim=1).values.tolist()  # (ranks)
    return {rank: cost for rank, cost in enumerate(medians) if cost > MAX_COST}


def _seconds(spans: Sequence[tuple[Any, Any]]) -> float:
    """Return the sum of the spans of a step."""
    if spans and not isinstance(spans[-1][1], float):
        spans[-1][1].synchronize()
    return sum(seconds_between(*span) for span in spans)
