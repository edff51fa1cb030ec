"""Closed forms of peak memory per rank.

A few microseconds per call. Each method of `_DistributedStep`, or of `_SingleProcessStep`, counts
what `parallelize`, FSDP2 and autograd keep alive in one phase of a step; the phase with the largest
sum is the result. A test compares it with the traced step (`planning.tracing`). Activations are in
`planning.activations`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from parallel.traffic import block_matrices, root_matrices
from planning.activations import (
    backward_buffer_bytes,
    batch_bytes,
    block_input_bytes,
    block_recomputed_bytes,
    block_saved_bytes,
    full_hidden_bytes,
    head_saved_bytes,
    last_norm_backward_bytes,
)
from planning.host import converted_bytes, copied_bytes, read_ahead_bytes
from planning.step_spec import MOMENT_BLOCK, StepSpec

GIB = 2**30
FLOAT32 = 4  # bytes
HEAD_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # `model.loss.BLOCK`: logits in float32 at a time
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + FLOAT32 / MOMENT_BLOCK}  # per matrix element
MOMENT_CHUNK = {"cpu": 2**16, "cuda": 2**25}  # low-precision values converted to float32 at a time


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


PARTS = tuple(field.name for field in fields(MemoryBreakdown) if field.name != "phase")
"""Parts of a memory breakdown, in display order."""


def size_text(size: int) -> str:
    """Return a size for messages, in MiB where GiB would show zeros."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def step_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of a rank over the phases of a step.

    With gradient accumulation, the last micro-batch is the fullest.
    """
    step = _DistributedStep(spec) if spec.mesh.world_size > 1 else _SingleProcessStep(spec)
    return with_host_memory(spec, max(step.phases(), key=lambda memory: memory.peak))


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
    )
    return max(step, save, key=lambda each: each.peak)


class _Group:
    """Sizes of an FSDP2 parameter group: one block, or the root (embedding, head, last norm).

    They count one tensor-parallel rank. The shards of rank 0 are the largest; all are padded to
    the same size.

    Attributes:
        shard: Bytes of one float32 shard.
        gathered: Bytes of the gathered weights.
        gradients: Bytes of the unsharded gradients of a micro-batch.
        to_reduce: Bytes of the unsharded gradients in the reduction's data type.
    """

    def __init__(self, matrices: list[tuple[int, int]], shards: int, spec: StepSpec) -> None:
        self.shard_elements = sum(-(-rows // shards) * columns for rows, columns in matrices)
        self.elements = self.shard_elements * shards
        self.shard = self.shard_elements * FLOAT32
        self.gradients = self.gathered = self.elements * spec.param_bytes
        self.to_reduce = self.elements * spec.reduce_bytes


class _DistributedStep:
    """Phases of a step under FSDP2."""

    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        model, mesh = spec.model, spec.mesh
        self.layers, self.shards = model.n_layers, mesh.dp_shard * mesh.cp
        self.block = _Group(block_matrices(model, mesh.tp), self.shards, spec)
        self.root = _Group(root_matrices(model, mesh.tp), self.shards, spec)
        in_fp8 = sum(rows * columns for rows, columns in spec.fp8_gathered)
        self.block.gathered -= in_fp8 * (spec.param_bytes - 1)
        self.head_elements = model.vocab_size // mesh.tp * model.dim
        self.head_weight = self.head_elements * spec.param_bytes
        self.ffn_weight = model.dim * model.ffn_dim // mesh.tp * spec.param_bytes
        self.elements = self.block.shard_elements * self.layers + self.root.shard_elements
        self.vectors = (2 * self.layers + 1) * -(-model.dim // self.shards)
        reshard = spec.parallel.reshard_after_forward
        # Blocks whose weights remain gathered between forward and backward.
        self.kept_blocks = 0 if reshard else self.layers
        if reshard is None and self.shards > 1:
            self.kept_blocks = 1
        # Reduce-scatter input still alive during the next block's backward (none with one shard).
        self.reduced = self.block.to_reduce if self.shards > 1 else 0
        accumulating = spec.micro_batches > 1
        self.accumulates = accumulating and spec.parallel.reduce_gradients == "step"
        self.accumulates_shards = accumulating and not self.accumulates

    def phases(self) -> Iterator[MemoryBreakdown]:
        """Yield the memory of the phases of a step, of which some may be the fullest."""
        last = self.layers - 1
        yield from self.head()
        for done in sorted({0, min(1, last), last}):
            yield from self.block_backward(done)
        yield from self.root_backward()
        yield self.update()
        if self.spec.accelerator == "cpu":
            yield self.last_norm_backward()

    # ------------------------------------------------------------ persistent state

    def _gradients(self, blocks: int) -> int:
        """Return reduced shards of `blocks` blocks, or of all if micro-batches reduce into them."""
        if self.accumulates_shards:
            return self.layers * self.block.shard + self.root.shard
        return blocks * self.block.shard

    def _accumulated(self, blocks: int) -> int:
        """Return gradients of `blocks` blocks and the root accumulated before reduction."""
        return self.accumulates * (blocks * self.block.to_reduce + self.root.to_reduce)

    def _memory(self, phase: str, **parts: int) -> MemoryBreakdown:
        moment = MOMENT_BYTES[self.spec.precision.optimizer_state]
        moments = 2 * (moment * (self.elements - self.vectors) + FLOAT32 * self.vectors)
        parameters = self.elements * FLOAT32
        return MemoryBreakdown(parameters, optimizer=int(moments), phase=phase, **parts)

    # ------------------------------------------------------------ phases

    def head(self) -> Iterator[MemoryBreakdown]:
        """Yield the memory in the forward of a chunk of the head, with all activations alive."""
        spec = self.spec
        rows = min(spec.step.head_chunk, spec.local_tokens)
        vocab = spec.model.vocab_size // spec.mesh.tp
        logits = rows * vocab * spec.param_bytes
        if spec.mesh.tp > 1 and not spec.parallel.loss_parallel:
            vocab = spec.model.vocab_size
            logits += 2 * rows * vocab * spec.param_bytes
        block = HEAD_BLOCK[spec.accelerator]
        float32_rows = 0 if spec.parallel.compile else min(max(1, block // vocab), rows)
        yield self._memory(
            "head",
            activations=self._activations(self.layers) + head_saved_bytes(spec),
            logits=logits,
            temporary=full_hidden_bytes(spec) + float32_rows * vocab * FLOAT32,
            **self._during_head(),
        )

    def _during_head(self) -> dict[str, int]:
        """Return weights and gradients during the head; the last all-gather is still alive."""
        last_gather = self.block.gathered if self.shards > 1 else 0
        after = self._after_head()
        return after | {"gathered": after["gathered"] + last_gather}

    def _after_head(self) -> dict[str, int]:
        """Return weights and gradients between the head and the backward of the blocks."""
        gathered = self.root.gathered + self.kept_blocks * self.block.gathered + self.head_weight
        accumulated = self._accumulated(self.layers)
        return {"gradients": self._gradients(0), "gathered": gathered + accumulated}

    def _activations(self, blocks: int) -> int:
        return batch_bytes(self.spec) + blocks * block_saved_bytes(self.spec)

    def last_norm_backward(self) -> MemoryBreakdown:
        """Return the memory in the backward of the last norm, if it is not one fused kernel."""
        saved, temporary = last_norm_backward_bytes(self.spec)
        activations = self._activations(self.layers) + saved
        after = self._after_head()
        return self._memory("backward", activations=activations, temporary=temporary, **after)

    def block_backward(self, done: int) -> Iterator[MemoryBreakdown]:
        """Yield the memory in a block's backward (FFN, end and reduction) after `done` others."""
        spec, block = self.spec, self.block
        gathered = self.root.gathered + self.head_weight
        pending_blocks = self.layers - done - 1  # blocks with a pending backward
        kept = self.kept_blocks - done if self.kept_blocks == self.layers else 0
        gathered += max(kept, 1) * block.gathered
        if self.shards > 1 and pending_blocks and not kept > 1:
            gathered += block.gathered  # prefetched
        if done:
            gathered += self.reduced  # the previous block's, freed by this block's reduction
        accumulated = self._accumulated(self.layers - done)
        gradients = self._gradients(done)
        yield self._memory(
            "backward",
            activations=self._activations(self.layers - done) + block_recomputed_bytes(spec),
            gathered=gathered + accumulated + self.ffn_weight,
            temporary=backward_buffer_bytes(spec),
            gradients=gradients,
        )
        yield self._memory(
            "reduction",
            activations=self._activations(pending_blocks) + block_input_bytes(spec),
            gathered=gathered + accumulated + block.gradients,
            temporary=2 * block_input_bytes(spec),
            gradients=gradients,
        )
        yield self._memory(
            "reduction",
            activations=self._activations(pending_blocks),
            gathered=gathered - block.gathered + self._reduction(block, accumulated, done > 0),
            temporary=block_input_bytes(spec),
            gradients=gradients,
        )

    def _reduction(self, group: _Group, accumulated: int, old: bool) -> int:
        """Return gradients of a group before and after reduction, plus `accumulated` ones."""
        before = 0 if self.accumulates else group.gradients
        buffers = group.to_reduce - (self.reduced if old else 0)
        if self.shards > 1 or self.spec.mesh.dp_replicate > 1:  # else reduced in place
            buffers += group.to_reduce // self.shards
        return accumulated + before + buffers

    def root_backward(self) -> Iterator[MemoryBreakdown]:
        """Yield the memory while gradients of embedding, head and last norm are reduced."""
        batch, accumulated = batch_bytes(self.spec), self._accumulated(0)
        gradients = self._gradients(self.layers)
        yield self._memory(
            "reduction",
            gradients=gradients,
            gathered=2 * self.root.gathered + self.reduced + accumulated,
            activations=batch,
            temporary=block_input_bytes(self.spec),
        )
        gathered = self._reduction(self.root, accumulated, old=False)
        yield self._memory("reduction", gradients=gradients, gathered=gathered, activations=batch)

    def update(self) -> MemoryBreakdown:
        """Return the memory in the optimizer step; low-precision moments are updated in chunks."""
        chunk = MOMENT_CHUNK[self.spec.accelerator]
        largest = max(self.root.shard_elements, self.block.shard_elements)
        narrow = self.spec.precision.optimizer_state != "fp32"
        return self._memory(
            "update",
            gradients=self.layers * self.block.shard + self.root.shard,
            temporary=2 * min(chunk, largest) * FLOAT32 * narrow,
        )


class _SingleProcessStep(_DistributedStep):
    """Phases of a step in one process: no gathering, each gradient is accumulated directly.

    In mixed precision, low-precision copies of weights live until their gradients are computed.
    """

    def _grads_and_copies(
        self, blocks: int, head: bool = False, in_flight: int = 0
    ) -> dict[str, int]:
        """Return existing gradients, and copies of the weights whose gradients are pending.

        Args:
            blocks: Blocks with pending gradients; the embedding's is always pending.
            head: Whether the head's gradient is pending.
            in_flight: Bytes of gradients not yet accumulated.
        """
        spec = self.spec
        heads = 2 if head and not spec.model.tie_embeddings else 1
        pending = blocks * self.block.elements + heads * self.head_elements
        existing = self.elements - (0 if spec.micro_batches > 1 else pending)
        copies = pending * spec.param_bytes if spec.param_bytes < FLOAT32 else 0
        return {"gradients": existing * FLOAT32, "gathered": copies + in_flight}

    def _accumulation(self) -> int:
        """Return the bytes of a gradient of head or embedding, and of its float32 copy if any."""
        widens = self.spec.param_bytes < FLOAT32 and self.spec.micro_batches == 1
        return self.head_weight + widens * self.head_elements * FLOAT32

    @property
    def _tied_grad(self) -> int:
        """Bytes of the head's gradient if it is tied, which stays alive until the embedding's."""
        return self.head_weight if self.spec.model.tie_embeddings else 0

    def head(self) -> Iterator[MemoryBreakdown]:
        """Yield the memory of the head's logits and of its gradient accumulation."""
        yield from super().head()
        if not self.spec.model.tie_embeddings:
            yield self._memory(
                "head",
                activations=self._activations(self.layers) + head_saved_bytes(self.spec),
                **self._grads_and_copies(self.layers, head=True, in_flight=self._accumulation()),
            )

    def _during_head(self) -> dict[str, int]:
        return self._grads_and_copies(self.layers, head=True, in_flight=self.head_weight)

    def _after_head(self) -> dict[str, int]:
        return self._grads_and_copies(self.layers, in_flight=self._tied_grad)

    def block_backward(self, done: int) -> Iterator[MemoryBreakdown]:
        spec, pending_blocks = self.spec, self.layers - done - 1
        yield self._memory(
            "backward",
            activations=self._activations(pending_blocks + 1) + block_recomputed_bytes(spec),
            temporary=backward_buffer_bytes(spec),
            **self._grads_and_copies(
                pending_blocks + 1, in_flight=self._tied_grad + self.ffn_weight
            ),
        )
        yield self._memory(
            "backward",
            activations=self._activations(pending_blocks) + block_input_bytes(spec),
            temporary=2 * block_input_bytes(spec),
            **self._grads_and_copies(pending_blocks, in_flight=self._tied_grad),
        )

    def root_backward(self) -> Iterator[MemoryBreakdown]:
        """Yield the memory in the backward of the embedding, which adds to the head's if tied."""
        yield self._memory(
            "backward",
            activations=batch_bytes(self.spec),
            temporary=block_input_bytes(self.spec),
            **self._grads_and_copies(0, in_flight=self.head_weight + 2 * self._tied_grad),
        )
        accumulation = self._grads_and_copies(0, in_flight=self._accumulation())
        yield self._memory("backward", **accumulation)
