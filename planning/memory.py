"""Peak memory per rank in closed form.

Takes less than a millisecond. `planning.allocations` replays the allocations of a step; its fullest
phase, with the host memory of `planning.host`, is the result. A test compares it with the traced
step (`planning.tracing`).
"""

from dataclasses import dataclass, replace

from planning.allocations import Step
from planning.host import converted_bytes, copied_bytes, read_ahead_bytes
from planning.phases import PARTS, Peaks, fullest_phase
from planning.pipeline_step import PipelineStep
from planning.sharded_step import DistributedStep, SingleProcessStep
from planning.step_spec import StepSpec

GIB = 2**30


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes per rank, by purpose, in the phase of a step with the largest total.

    Attributes:
        parameters, gradients, optimizer: Shards of this rank.
        activations: Tensors saved for the backward.
        gathered: Weights gathered by FSDP2 (with one process: low-precision copies of weights) and
            gradients before reduction.
        logits: One chunk of the head's output.
        host: On CPU: the copy for asynchronous saves, moments that a save converts, and batches
            that are read ahead.
        temporary: Everything else.
        phase: Name of that phase.
        stage: Pipeline rank.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    gathered: int = 0
    logits: int = 0
    host: int = 0
    temporary: int = 0
    phase: str = ""
    stage: int = 0

    @property
    def peak(self) -> int:
        """Sum of all parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """Return the bytes by part, in the order of `PARTS`."""
        return {part: getattr(self, part) for part in PARTS}

    @property
    def largest_part(self) -> str:
        return max(PARTS, key=lambda part: getattr(self, part))


def size_unit(most: float) -> tuple[str, int]:
    """Return the unit for sizes up to `most` bytes, and its bytes."""
    return ("GiB", GIB) if most >= GIB else ("MiB", 2**20)


def size_text(size: int) -> str:
    """Return a size for messages, in MiB where GiB would show zeros."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def step_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of the pipeline rank that needs the most."""
    return max(map(stage_memory, different_stages(spec)), key=lambda memory: memory.peak)


def stage_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of the pipeline rank `spec.stage` over the phases of a step.

    With gradient accumulation, the last micro-batch is the fullest.
    """
    phase, held = fullest_phase(spec, step_peaks)
    parts = {part: round(size) for part, size in held.items()}
    return with_host_memory(spec, MemoryBreakdown(**parts, phase=phase, stage=spec.stage))


def different_stages(spec: StepSpec) -> list[StepSpec]:
    """Return the pipeline ranks of which none needs as much memory as an earlier one for sure.

    Of ranks with the same parts of the model, the first has the most micro-batches in flight.
    """
    different = {}
    for each in reversed(spec.stages):
        shape = [(len(part.layers), part.has_embedding, part.has_head) for part in each.parts]
        different[*shape] = each
    return [*different.values()]


def step_peaks(spec: StepSpec) -> Peaks:
    """Return the peak of each phase of a step without a compiler's memory budget."""
    kind: type[Step] = DistributedStep if spec.mesh.world_size > 1 else SingleProcessStep
    step = (PipelineStep if spec.mesh.pp > 1 else kind)(spec)
    step.run()
    return step.heap.peaks


def with_host_memory(spec: StepSpec, memory: MemoryBreakdown) -> MemoryBreakdown:
    """Return the breakdown with the host memory on CPU, where it is the same memory.

    A save may need more than a step: it has no activations, but converts low-precision moments.
    """
    if spec.accelerator != "cpu":
        return memory
    held = copied_bytes(spec) + read_ahead_bytes(spec)
    step = replace(memory, host=held)
    save = MemoryBreakdown(
        parameters=memory.parameters,
        optimizer=memory.optimizer,
        host=held + converted_bytes(spec),
        phase="save",
        stage=memory.stage,
    )
    return max(step, save, key=lambda each: each.peak)
