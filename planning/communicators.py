"""GPU memory of NCCL, which is outside PyTorch's allocator.

Each communicator has buffers of its own, also if NCCL splits it from another one
(https://github.com/NVIDIA/nccl/issues/986).
"""

from parallel.mesh import MeshShape
from planning.step_spec import StepSpec

COMMUNICATOR_BYTES = 32 * int((4 + 4.7 + 0.5) * 2**20)
"""By NCCL's default sizes: 32 channels on NVLink (fewer on slower links) with a buffer for each of
the protocols Simple, LL128 and LL (src/include/comm.h and device.h)."""


def n_communicators(mesh: MeshShape, pp_parts: int = 1, tied: bool = False) -> int:
    """Return the communicators of a rank with several ranks; NCCL creates each at its first use.

    One has all ranks. Each axis has one, and FSDP2 one for the flattened `dp_shard` and `cp`; a
    group of all ranks uses the first one (torch/distributed/device_mesh.py,
    _init_one_process_group). A pipeline rank has two for each neighbor, one per direction, and the
    first and the last one another for a tied weight; the result is that of a rank with the most.
    """
    groups = [*mesh.sizes, mesh.dp_shard * mesh.cp if mesh.cp > 1 else 1]
    count = (mesh.world_size > 1) + sum(1 < size < mesh.world_size for size in groups)
    if mesh.pp == 1:
        return count
    if mesh.pp == 2 or pp_parts > 1:
        return count + (2 if pp_parts == 1 else 4) + tied
    return count + 4


def spec_communicators(spec: StepSpec) -> int:
    """Return `n_communicators` of a step."""
    return n_communicators(spec.mesh, spec.parallel.pp_parts, spec.model.tie_embeddings)


def communicator_bytes(spec: StepSpec) -> int:
    """Return the memory of a rank's communicators; on CPU, gloo's buffers are not counted."""
    return COMMUNICATOR_BYTES * spec_communicators(spec) if spec.accelerator == "cuda" else 0
