"""Recompute a bad step on other ranks, to separate faults of the data from faults of hardware.

The loss of the same samples is the same on every rank. After an update that was skipped or a spike,
each data-parallel group recomputes the loss of its part of the batch, and of the part of the next
group. A loss that is bad on both groups comes from the data or the weights; one that is bad on one
of them comes from its hardware. Only forward passes are recomputed. Imported when a step is bad.
"""

import math
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from data.dataset import WindowDataset
from resilience.exit_codes import ExitCode
from training.run import Run

if TYPE_CHECKING:
    from resilience.loss_monitor import StepStats

TOLERANCE = 1e-3  # relative; equal kernels on equal shapes usually give equal bits


class Diagnosis(NamedTuple):
    """What the two results for each part of a batch mean.

    Attributes:
        faulty: Data-parallel groups that computed a wrong loss.
        is_certain: Whether each of them is; otherwise only some of them.
        bad: Parts whose loss is not finite on both groups.
    """

    faulty: list[int]
    is_certain: bool
    bad: list[int]


def diagnose(own: Sequence[float], moved: Sequence[float]) -> Diagnosis:
    """Compare the losses of the parts of a batch.

    Args:
        own: Loss of each part, on the group that trained on it.
        moved: Loss of each part, on the previous group.
    """
    faulty: set[int] = set()
    bad, is_certain = [], True
    for part, (here, there) in enumerate(zip(own, moved, strict=True)):
        previous = (part - 1) % len(own)
        finite = math.isfinite(here), math.isfinite(there)
        if finite == (False, False):
            bad.append(part)
        elif finite == (False, True):
            faulty.add(part)
        elif finite == (True, False):
            faulty.add(previous)
        elif not math.isclose(here, there, rel_tol=TOLERANCE):
            faulty |= {part, previous}
            is_certain = False
    return Diagnosis(sorted(faulty), is_certain, bad)


def rerun(run: Run, stats: "StepStats") -> str | None:
    """Recompute the losses of a step, and report what they mean; all ranks call it.

    Returns:
        If a group computed a wrong loss, the ranks and hosts, as a reason to stop.
    """
    size = run.mesh.dp
    if size == 1 or not isinstance(run.dataset, WindowDataset):
        return None
    local = [_loss(run, stats.batch, (run.data_rank + shift) % size) for shift in (0, 1)]
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, (run.data_rank, *local, socket.gethostname()))
    own, moved = [0.0] * size, [0.0] * size
    for group, here, there, _ in results:  # the sum of a group's losses, as in `train_step`
        own[group] += here / run.strategy.ranks_per_loss
        moved[(group + 1) % size] += there / run.strategy.ranks_per_loss
    diagnosis = diagnose(own, moved)
    fields = {"faulty": diagnosis.faulty, "bad": diagnosis.bad}
    run.record("rerun", step=stats.step, batch=stats.batch, **fields)
    if diagnosis.faulty:
        ranks = [(r, each[3]) for r, each in enumerate(results) if each[0] in diagnosis.faulty]
        separator = ", " if diagnosis.is_certain else " or "
        named = separator.join(f"rank {rank} ({host})" for rank, host in ranks)
        hosts = list(dict.fromkeys(host for _, host in ranks))
        reason = (
            f"Silent data corruption on {named}: other ranks compute another loss for the same "
            f"samples of step {stats.step}"
        )
        code = int(ExitCode.CORRUPTION)
        run.record("fault", step=stats.step, reason=reason, hosts=hosts, code=code)
        return reason
    if diagnosis.bad:
        text = "is not finite on other ranks either: the cause is the data or the weights"
    else:
        text = "is finite and equal on other ranks: the cause is the backward, or was transient"
    run.console.note(f"Step {stats.step} was recomputed: its loss {text}.")
    return None


@torch.no_grad()
def _loss(run: Run, batch: int, part: int) -> float:
    """Return the sum of the losses of one part of a batch, computed by this rank's group."""
    micro_batches = run.loader(part).step(batch)
    total = 0.0
    pairs = zip(micro_batches.micro_batches, micro_batches.n_documents, strict=True)
    for micro_batch, n_documents in pairs:
        tokens, positions, labels = run.fabric.to_device(micro_batch)
        total += float(run.model(tokens, positions, labels, n_documents=n_documents))
    return total
