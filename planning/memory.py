"""Closed forms of peak memory per rank.

Integer arithmetic, a few microseconds per call. Each method of `_DistributedStep` counts what
`parallelize`, FSDP2 and autograd keep alive in one phase of a step; the phase with the largest sum
is the result. A test compares it with the traced step (`planning.tracing`). Activations are in
`planning.activations`.
"""

from dataclasses import dataclass, fields

from parallel.traffic import block_matrices, root_matrices
from planning.activations import (
    backward_buffer_bytes,
    batch_bytes,
    block_input_bytes,
    block_recomputed_bytes,
    block_saved_bytes,
    head_saved_bytes,
    last_norm_backward_bytes,
)
from planning.step_spec import StepSpec

GIB = 2**30
FLOAT32 = 4  # bytes
HEAD_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # `model.loss.BLOCK`: logits in float32 at a time
MOMENT_BLOCK = 256  # 8-bit values per float32 scale
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
        temporary: Everything else.
        phase: Name of that phase.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    gathered: int = 0
    logits: int = 0
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


def _fullest(*phases: MemoryBreakdown) -> MemoryBreakdown:
    return max(phases, key=lambda memory: memory.peak)


@dataclass(frozen=True)
class _Group:
    """An FSDP2 parameter group: one block, or the root (embedding, head, last norm).

    `elements` counts one tensor-parallel rank, padded to equal shards.
    """

    elements: int
    shards: int

    def gathered(self, spec: StepSpec) -> int:
        """Return the bytes of the gathered weights."""
        return self.elements * spec.param_bytes

    def to_reduce(self, spec: StepSpec) -> int:
        """Return the bytes of the unsharded gradients in the reduction's data type."""
        return self.elements * spec.reduce_bytes

    @property
    def shard(self) -> int:
        """Bytes of one float32 shard."""
        return self.elements // self.shards * FLOAT32


def step_memory(spec: StepSpec) -> MemoryBreakdown:
    """Return the peak memory of a rank over the phases of a step.

    With gradient accumulation, the last micro-batch is the fullest.
    """
    step = _DistributedStep(spec) if spec.mesh.world_size > 1 else _SingleProcessStep(spec)
    last = spec.model.n_layers - 1
    phases = [step.head(), step.block_backward(0), step.root_backward(), step.update()]
    if spec.accelerator == "cpu":
        phases.append(step.last_norm_backward())
    if last:
        phases += [step.block_backward(1), step.block_backward(last)]
    return _fullest(*phases)


class _DistributedStep:
    """Phases of a step under FSDP2."""

    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        model, mesh = spec.model, spec.mesh
        self.shards = mesh.dp_shard * mesh.cp
        dim, tp, layers = model.dim, mesh.tp, model.n_layers
        block, root = block_matrices(model, tp), root_matrices(model, tp)
        self.block, self.root = self._group(block), self._group(root)
        self.head_elements = model.vocab_size // tp * dim
        self.head_weight = self.head_elements * spec.param_bytes
        self.ffn_weight = dim * model.ffn_dim // tp * spec.param_bytes
        self.elements = self._shard_elements(block) * layers + self._shard_elements(root)
        self.vectors = (2 * layers + 1) * -(-dim // self.shards)
        reshard = spec.parallel.reshard_after_forward
        # Blocks whose weights remain gathered between forward and backward.
        self.kept_blocks = 0 if reshard else layers
        if reshard is None and self.shards > 1:
            self.kept_blocks = 1
        # Reduce-scatter input still alive during the next block's backward (none with one shard).
        self.reduced = self.block.to_reduce(spec) if self.shards > 1 else 0
        accumulating = spec.micro_batches > 1
        self.accumulates = accumulating and spec.parallel.reduce_gradients == "step"
        self.accumulates_shards = accumulating and not self.accumulates

    def _shard_elements(self, matrices: list[tuple[int, int]]) -> int:
        """Return the elements in the shards of rank 0, which are the largest."""
        return sum(-(-rows // self.shards) * columns for rows, columns in matrices)

    def _group(self, matrices: list[tuple[int, int]]) -> _Group:
        return _Group(self._shard_elements(matrices) * self.shards, self.shards)

    # ------------------------------------------------------------ persistent state

    def _gradients(self, blocks: int) -> int:
        """Return reduced shards of `blocks` blocks, or of all if micro-batches reduce into them."""
        if self.accumulates_shards:
            return self.spec.model.n_layers * self.block.shard + self.root.shard
        return blocks * self.block.shard

    def _accumulated(self, blocks: int) -> int:
        """Return gradients of `blocks` blocks and the root accumulated before reduction."""
        if not self.accumulates:
            return 0
        return blocks * self.block.to_reduce(self.spec) + self.root.to_reduce(self.spec)

    def _memory(self, phase: str, **parts: int) -> MemoryBreakdown:
        moment = MOMENT_BYTES[self.spec.precision.optimizer_state]
        matrices = self.elements - self.vectors
        return MemoryBreakdown(
            parameters=self.elements * FLOAT32,
            optimizer=int(2 * (moment * matrices + FLOAT32 * self.vectors)),
            phase=phase,
            **parts,
        )

    # ------------------------------------------------------------ phases

    def head(self) -> MemoryBreakdown:
        """Return the memory in the forward of a chunk of the head, with all activations alive."""
        spec, model = self.spec, self.spec.model
        rows = min(spec.step.head_chunk, spec.local_tokens)
        vocab = model.vocab_size // spec.mesh.tp
        logits = rows * vocab * spec.param_bytes
        logits_vocab = vocab
        if spec.mesh.tp > 1 and not spec.parallel.loss_parallel:
            logits_vocab = model.vocab_size
            logits += 2 * rows * logits_vocab * spec.param_bytes
        block = HEAD_BLOCK[spec.accelerator]
        float32_rows = 0 if spec.parallel.compile else min(max(1, block // logits_vocab), rows)
        float32_logits = float32_rows * logits_vocab
        return self._memory(
            "head",
            activations=self._activations(model.n_layers) + head_saved_bytes(spec),
            logits=logits,
            temporary=spec.local_tokens * model.dim * spec.param_bytes + float32_logits * FLOAT32,
            **self._during_head(),
        )

    def _during_head(self) -> dict[str, int]:
        """Return weights and gradients during the head; the last all-gather is still alive."""
        last_gather = self.block.gathered(self.spec) if self.shards > 1 else 0
        after = self._after_head()
        return after | {"gathered": after["gathered"] + last_gather}

    def _after_head(self) -> dict[str, int]:
        """Return weights and gradients between the head and the backward of the blocks."""
        spec = self.spec
        gathered = self.root.gathered(spec) + self.kept_blocks * self.block.gathered(spec)
        gathered += self.head_weight + self._accumulated(spec.model.n_layers)
        return {"gradients": self._gradients(0), "gathered": gathered}

    def _activations(self, blocks: int) -> int:
        return batch_bytes(self.spec) + blocks * block_saved_bytes(self.spec)

    def last_norm_backward(self) -> MemoryBreakdown:
        """Return the memory in the backward of the last norm, if it is not one fused kernel."""
        saved, temporaries = last_norm_backward_bytes(self.spec)
        return self._memory(
            "backward",
            activations=self._activations(self.spec.model.n_layers) + saved,
            temporary=temporaries,
            **self._after_head(),
        )

    def block_backward(self, done: int) -> MemoryBreakdown:
        """Return the peak of a block's backward (FFN, end or reduction) after `done` others."""
        spec, layers = self.spec, self.spec.model.n_layers
        gathered = self.root.gathered(spec) + self.head_weight
        weights = self.block.gathered(spec)
        pending_blocks = layers - done - 1  # blocks with a pending backward
        kept = self.kept_blocks - done if self.kept_blocks == layers else 0
        gathered += max(kept, 1) * weights
        if self.shards > 1 and pending_blocks and not kept > 1:
            gathered += weights  # prefetched
        if done:
            gathered += self.reduced  # the previous block's, freed by this block's reduction
        accumulated = self._accumulated(layers - done)
        gradients = self._gradients(done)
        middle = self._memory(
            "backward",
            activations=self._activations(layers - done) + block_recomputed_bytes(spec),
            gathered=gathered + accumulated + self.ffn_weight,
            temporary=backward_buffer_bytes(spec),
            gradients=gradients,
        )
        end = self._memory(
            "reduction",
            activations=self._activations(pending_blocks) + block_input_bytes(spec),
            gathered=gathered + accumulated + weights,
            temporary=2 * block_input_bytes(spec),
            gradients=gradients,
        )
        reduced = self._memory(
            "reduction",
            activations=self._activations(pending_blocks),
            gathered=gathered - weights + self._reduction(self.block, accumulated, done > 0),
            temporary=block_input_bytes(spec),
            gradients=gradients,
        )
        return _fullest(middle, end, reduced)

    def _reduction(self, group: _Group, accumulated: int, old: bool) -> int:
        """Return gradients of a group before and after reduction, plus `accumulated` ones."""
        spec = self.spec
        before = 0 if self.accumulates else group.gathered(spec)
        buffers = group.to_reduce(spec) - (self.reduced if old else 0)
        if self.shards > 1 or spec.mesh.dp_replicate > 1:  # else reduced in place
            buffers += group.to_reduce(spec) // self.shards
        return accumulated + before + buffers

    def root_backward(self) -> MemoryBreakdown:
        """Return the memory while gradients of embedding, head and last norm are reduced."""
        spec, layers = self.spec, self.spec.model.n_layers
        accumulated = self._accumulated(0)
        before = self._memory(
            "reduction",
            gradients=self._gradients(layers),
            gathered=2 * self.root.gathered(spec) + self.reduced + accumulated,
            activations=batch_bytes(spec),
            temporary=block_input_bytes(spec),
        )
        after = self._memory(
            "reduction",
            gradients=self._gradients(layers),
            gathered=self._reduction(self.root, accumulated, old=False),
            activations=batch_bytes(spec),
        )
        return _fullest(before, after)

    def update(self) -> MemoryBreakdown:
        """Return the memory in the optimizer step; low-precision moments are updated in chunks."""
        spec, layers = self.spec, self.spec.model.n_layers
        chunk = MOMENT_CHUNK[spec.accelerator]
        largest = max(self.root.elements, self.block.elements) // self.shards
        narrow = spec.precision.optimizer_state != "fp32"
        return self._memory(
            "update",
            gradients=layers * self.block.shard + self.root.shard,
            temporary=2 * min(chunk, largest) * FLOAT32 if narrow else 0,
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
        pending = blocks * self.block.elements + self.head_elements
        if head and not spec.model.tie_embeddings:
            pending += self.head_elements
        existing = self.elements - (0 if spec.micro_batches > 1 else pending)
        copies = pending * spec.param_bytes if spec.param_bytes < FLOAT32 else 0
        return {"gradients": existing * FLOAT32, "gathered": copies + in_flight}

    def _accumulation(self) -> int:
        """Return the bytes of a gradient of head or embedding, and of its float32 copy if any."""
        widens = self.spec.param_bytes < FLOAT32 and self.spec.micro_batches == 1
        return self.head_weight + widens * self.head_elements * FLOAT32

    def head(self) -> MemoryBreakdown:
        """Return the memory of the head's logits or gradient accumulation, whichever is larger."""
        layers = self.spec.model.n_layers
        accumulation = self._memory(
            "head",
            activations=self._activations(layers) + head_saved_bytes(self.spec),
            **self._grads_and_copies(layers, head=True, in_flight=self._accumulation()),
        )
        logits = super().head()
        return logits if self.spec.model.tie_embeddings else _fullest(logits, accumulation)

    def _during_head(self) -> dict[str, int]:
        layers = self.spec.model.n_layers
        return self._grads_and_copies(layers, head=True, in_flight=self.head_weight)

    def _after_head(self) -> dict[str, int]:
        """Return weights and gradients after the head, whose gradient stays alive if it is tied."""
        head_grad = self.head_weight if self.spec.model.tie_embeddings else 0
        return self._grads_and_copies(self.spec.model.n_layers, in_flight=head_grad)

    def block_backward(self, done: int) -> MemoryBreakdown:
        spec, pending_blocks = self.spec, self.spec.model.n_layers - done - 1
        head_grad = self.head_weight if spec.model.tie_embeddings else 0
        middle = self._memory(
            "backward",
            activations=self._activations(pending_blocks + 1) + block_recomputed_bytes(spec),
            temporary=backward_buffer_bytes(spec),
            **self._grads_and_copies(pending_blocks + 1, in_flight=head_grad + self.ffn_weight),
        )
        end = self._memory(
            "backward",
            activations=self._activations(pending_blocks) + block_input_bytes(spec),
            temporary=2 * block_input_bytes(spec),
            **self._grads_and_copies(pending_blocks, in_flight=head_grad),
        )
        return _fullest(middle, end)

    def root_backward(self) -> MemoryBreakdown:
        """Return the memory in the backward of the embedding, which adds to the head's if tied."""
        n_grads = 3 if self.spec.model.tie_embeddings else 1
        computed = self._memory(
            "backward",
            activations=batch_bytes(self.spec),
            temporary=block_input_bytes(self.spec),
            **self._grads_and_copies(0, in_flight=n_grads * self.head_weight),
        )
        in_flight = self._accumulation()
        accumulation = self._memory("backward", **self._grads_and_copies(0, in_flight=in_flight))
        return _fullest(computed, accumulation)
