"""GPU memory of NCCL, which is outside PyTorch's allocator.

Each communicator has buffers of its own, also if NCCL splits it from another one
(https://github.com/NVIDIA/nccl/issues/986).
"""

from parallel.mesh import MeshShape
from planning.step_spec import StepSpec

COMMUNICATOR_BYTES = 32 * int((4 + 4.7 + 0.5) * 2**20)
"""By NCCL's default sizes: 32 channels on NVLink (fewer on slower links) with a buffer for each of
the protocols Simple, LL128 and LL (src/include/comm.h and device.h)."""


def n_communicators(mesh: MeshShape) -> int:
    """Return the communicators of a rank with several ranks; NCCL creates each at its first use.

    One has all ranks. Each axis has one, and FSDP2 one for the flattened `dp_shard` and `cp`; a
    group of all ranks uses the first one (torch/distributed/device_mesh.py,
    _init_one_process_group).
    """
    groups = [*mesh.sizes, mesh.dp_shard * mesh.cp if mesh.cp > 1 else 1]
    return (mesh.world_size > 1) + sum(1 < size < mesh.world_size for size in groups)


def communicator_bytes(spec: StepSpec) -> int:
    """Return the memory of a rank's communicators; on CPU, gloo's buffers are not counted."""
    return COMMUNICATOR_BYTES * n_communicators(spec.mesh) if spec.accelerator == "cuda" else 0
