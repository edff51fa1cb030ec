"""Closed forms of host memory: what checkpoints need there, and batches that are read ahead.

An asynchronous save copies the rank's shards of weights and moments to host memory
(`checkpoint.host_copy`), which is kept for the next save. On GPUs the copy is pinned, and PyTorch's
pinned allocator rounds each tensor up to a power of two (ATen/core/CachingHostAllocator.h). In
checkpoints the moments are float32: those in bf16 or 8 bits are converted into the copy, and in
host memory for the duration of a synchronous save or a load (a rewind loads too). On CPU all of it
is the rank's own memory.
"""

from collections.abc import Iterator

from parallel.traffic import block_matrices, root_matrices
from planning.step_spec import StepSpec

FLOAT32, INT64 = 4, 8  # bytes
GPU_PROCESS_GIB = 2.0
"""Host memory of a rank on a GPU without tensors: interpreter, libraries, CUDA and NCCL."""


def shards(spec: StepSpec) -> Iterator[tuple[int, int]]:
    """Yield the bytes of a parameter's shard on this rank, and how many parameters have it.

    Each of their moments has the same size.
    """
    model, mesh = spec.model, spec.mesh
    ranks = mesh.dp_shard * mesh.cp
    for matrices, count in (
        (block_matrices(model, mesh.tp), spec.n_layers),
        (root_matrices(model, mesh.tp, spec.has_embedding, spec.has_head), 1),
    ):
        for rows, columns in matrices:
            yield -(-rows // ranks) * columns * FLOAT32, count


def shard_bytes(spec: StepSpec) -> int:
    """Return the bytes of all shards of parameters on this rank."""
    return sum(size * count for size, count in shards(spec))


def checkpoint_bytes(spec: StepSpec) -> int:
    """Return the size of a checkpoint: replicas save their shards once, without FSDP's padding."""
    return 3 * sum(rows * columns for rows, columns in _all_matrices(spec)) * FLOAT32


def checkpoint_tensors(spec: StepSpec) -> int:
    """Return the number of tensors in a checkpoint: parameters and two moments of each."""
    return 3 * len(_all_matrices(spec))


def _all_matrices(spec: StepSpec) -> list[tuple[int, int]]:
    """Return the shapes of all parameters of the model."""
    return block_matrices(spec.model, 1) * spec.model.n_layers + root_matrices(spec.model, 1)


def copied_bytes(spec: StepSpec) -> int:
    """Return the size of the copy for asynchronous saves, which lives from the first save on."""
    if not spec.async_save:
        return 0
    if spec.accelerator == "cpu":
        return 3 * shard_bytes(spec)
    return 3 * sum(_power_of_two(size) * count for size, count in shards(spec))


def converted_bytes(spec: StepSpec) -> int:
    """Return the size of the float32 moments that a load holds in host memory."""
    return 0 if spec.precision.optimizer_state == "fp32" else 2 * shard_bytes(spec)


def read_ahead_bytes(spec: StepSpec) -> int:
    """Return the size of the tokens, positions and labels of this step and those read ahead.

    On GPUs they are pinned too. Shards of datasets are mapped and do not count: the system frees
    their pages as needed.
    """
    steps = 0 if spec.prefetch is None else spec.prefetch + 1
    tensor = spec.micro_batch_size * spec.seq_len * INT64
    if spec.accelerator == "cuda":
        tensor = _power_of_two(tensor)
    return steps * spec.micro_batches * 3 * tensor


def host_bytes(spec: StepSpec) -> int:
    """Return the peak of a rank's host memory on a GPU, without its libraries.

    In a pipeline it is that of the fullest rank.
    """
    return max(copied_bytes(s) + converted_bytes(s) + read_ahead_bytes(s) for s in spec.stages)


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
