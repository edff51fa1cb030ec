"""Communication of a step that is not overlapped with computation, in seconds per axis.

On GPUs, FSDP2 gathers the weights of the next block and reduces the gradients of the last one
during computation; async TP and some frameworks overlap tensor parallelism with the products next
to it. On CPU, all communication is exposed, except for the sends of a pipeline
(`planning.pipeline_time`).
"""

from collections import defaultdict
from typing import NamedTuple

from parallel.traffic import Collective
from planning.collectives import collective_seconds
from planning.frameworks import FRAMEWORKS
from planning.hardware import Hardware
from planning.step_spec import StepSpec

OVERLAP_SLOWDOWN = 0.25
"""Slowdown of the computation by overlapped communication, as a fraction of the latter's time: 0.19
in the mean and 0.4 at most on A100 and H100 (arXiv:2507.03114)."""

TP_OVERLAP_SLOWDOWN = 0.10
"""The same for chunks that copy engines transfer between the products of tensor parallelism."""


Seconds = defaultdict[str, float]
"""By axis."""


class Exposed(NamedTuple):
    """Exposed communication of a step.

    Attributes:
        by_axis: All of it, in seconds by axis.
        once: Seconds of FSDP2 that only one micro-batch has.
        at_end: Seconds after the last backward.
    """

    by_axis: dict[str, float]
    once: float
    at_end: float


def exposed_communication(
    spec: StepSpec,
    hardware: Hardware,
    sharing: int,
    passes: tuple[float, float],
    attention: float,
) -> Exposed:
    """Return the exposed communication of a step, without sends between pipeline stages.

    Args:
        sharing: Ranks that share the links.
        passes: Seconds of computation of a micro-batch, forward and backward.
        attention: Seconds of attention of a step.
    """
    exposed, weights, gradients = (Seconds(float) for _ in range(3))
    by_part, at_end = {"weights": weights, "gradients": gradients}, 0.0
    for each in spec.traffic():
        if each.kind == "send":
            continue
        # Gradients on other axes: of norms (tp), and of a tied weight after the last backward (pp).
        target = exposed if each.axis in ("tp", "pp") else by_part.get(each.part, exposed)
        seconds = collective_seconds(each, spec.mesh, hardware, sharing)
        seconds *= _relative_bytes(each, spec)
        target[each.axis] += seconds
        at_end += seconds if each.part == "scalars" or each.axis == "pp" else 0.0
    _overlap_within_block(exposed, spec, attention)
    once = _exposed_fsdp(spec, weights, gradients, passes, exposed)
    return Exposed(dict(exposed), once, at_end)


def hop_seconds(spec: StepSpec, hardware: Hardware, sharing: int) -> float:
    """Return the seconds of one send of hidden states to the next stage."""
    sends = [each for each in spec.traffic() if each.kind == "send"]
    return sum(
        collective_seconds(each, spec.mesh, hardware, sharing) / each.count for each in sends
    )


def reshards(spec: StepSpec) -> bool:
    """Return whether blocks free their gathered weights after forward.

    By default not in a pipeline, whose micro-batches would gather them twice each.
    """
    given = spec.parallel.reshard_after_forward
    return spec.mesh.pp == 1 if given is None else given


def _overlap_within_block(exposed: Seconds, spec: StepSpec, attention: float) -> None:
    """Subtract what tensor and context parallelism overlap."""
    framework, mesh = FRAMEWORKS[spec.framework], spec.mesh
    if spec.parallel.async_tp and "tp" in exposed:
        # Overlapped with the products before a scatter or after a gather: of a block's 8
        # collectives the compiler fuses 6, with one sequence 2 (tests/cuda).
        exposed["tp"] *= 1 / 2 if spec.micro_batch_size > 1 else 5 / 6
    elif framework.tp_overlap and "tp" in exposed:
        exposed["tp"] *= 1 / mesh.tp + TP_OVERLAP_SLOWDOWN
    if framework.ring_attention and "cp" in exposed:
        exposed["cp"] = max(exposed["cp"] - attention, exposed["cp"] / mesh.cp)


def _exposed_fsdp(
    spec: StepSpec,
    weights: Seconds,
    gradients: Seconds,
    passes: tuple[float, float],
    exposed: Seconds,
) -> float:
    """Add the exposed seconds of gathers of weights and reductions of gradients to `exposed`.

    On GPUs each pass overlaps its own: what exceeds its computation is exposed, but at least the
    first gather or the last reduction. Overlapped communication slows the computation down.

    Returns:
        The seconds that only one micro-batch has.
    """
    micro, n_layers = spec.micro_batches, max(spec.n_layers, 1)
    resharded = reshards(spec) and spec.mesh.dp_shard * spec.mesh.cp > 1
    often = spec.parallel.reduce_gradients == "micro_batch"
    once = 0.0
    # The last micro-batch, and the others.
    for is_last, repeats in ((True, 1), (False, micro - 1)):
        for is_backward, compute in enumerate(passes):
            sent = Seconds(float)
            if resharded or (is_last and not is_backward):
                for axis, seconds in weights.items():
                    sent[axis] += seconds / (2 * micro if resharded else 1)
            if is_backward and (is_last or often):
                for axis, seconds in gradients.items():
                    sent[axis] += seconds / (micro if often else 1)
            total = sum(sent.values())
            excess = max(total - compute, total / n_layers)
            remaining = excess + OVERLAP_SLOWDOWN * min(total, compute)
            if spec.accelerator == "cpu":
                remaining = total
            for axis, seconds in sent.items():
                each = remaining * seconds / total if total else 0.0
                exposed[axis] += repeats * each
                once += each if is_last else -each
    return once


def _relative_bytes(each: Collective, spec: StepSpec) -> float:
    """Return the bytes of a framework's collectives relative to those of this program."""
    framework = FRAMEWORKS[spec.framework]
    if each.axis != "tp" or each.part != "activations":
        return 1.0
    again = 2 if spec.parallel.activation_checkpoint in ("full", "selective") else 0
    gathers = each.kind == "all_gather"
    in_forward = (2 + again) / (4 + again)  # of the all-gathers; half of the reduce-scatters
    if framework.fp8_tp_gather and spec.precision.fp8 == "tensorwise" and gathers:
        return 1 - in_forward / 2
    more = framework.tp_gathers / 2 - 1  # in the forward; their gradients in the backward
    return 1 + more * (in_forward if gathers else 1 / 2)
