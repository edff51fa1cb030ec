"""What a rank holds at the fullest moment of a step, in closed form.

Integers alone, some microseconds a call. Each function counts what `parallelize`, FSDP2 and
autograd make a rank keep at one moment of a step; the fullest moment is the answer. A test holds
the sum against the traced tier, which follows the tensors themselves. What a block keeps for its
backward is in `planning.activations`.
"""

from dataclasses import dataclass, fields

from parallel.traffic import block_matrices, root_matrices
from planning.activations import (
    backward_buffers,
    block_input,
    inputs,
    kept_by_block,
    kept_by_head,
    last_norm_backward,
    recomputed_by_block,
)
from planning.job import Job

FLOAT32 = 4
HEAD_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # `model.loss.BLOCK`: elements in float32 at once
MOMENT_BLOCK = 256  # 8-bit values that share a float32 scale
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + FLOAT32 / MOMENT_BLOCK}  # of a matrix's element
MOMENT_PIECE = {"cpu": 2**16, "cuda": 2**25}  # values of a narrow moment that are widened at once


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step at which it holds most, by what they are for.

    `parameters`, `gradients` and `optimizer` are the rank's shards, at rest; `activations` what the
    forward keeps for the backward; `gathered` the weights that FSDP2 has gathered, or one process's
    copies in the format of forward and backward, and gradients before they are reduced or handed
    over; `logits` the head's chunk; `temporary` the rest. `moment` names it.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    logits: int
    temporary: int
    moment: str = ""

    @property
    def peak(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


@dataclass(frozen=True)
class _Group:
    """What FSDP2 gathers and reduces together: a block, or what lies around the blocks."""

    elements: int  # of this rank's tp peer's part, padded to equal shards
    shards: int

    def gathered(self, job: Job) -> int:
        """Bytes in the format of forward and backward."""
        return self.elements * job.param_bytes

    def to_reduce(self, job: Job) -> int:
        """Bytes in the format of the gradients' sum, all shards together."""
        return self.elements * job.reduce_bytes

    @property
    def shard(self) -> int:
        """Bytes of the rank's own part in float32."""
        return self.elements // self.shards * FLOAT32


def step_memory(job: Job) -> Memory:
    """The fullest of a step's moments, of its last micro-batch where there are several."""
    step = _Step(job) if job.mesh.world_size > 1 else _StepAlone(job)
    last = job.model.n_layers - 1
    moments = [step.head(), step.block_backward(0), step.root_backward(), step.update()]
    if job.accelerator == "cpu":
        moments.append(step.last_norm_backward())
    if last:
        moments += [step.block_backward(1), step.block_backward(last)]
    return max(moments, key=lambda memory: memory.peak)


class _Step:
    """The moments of a step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        model, mesh = job.model, job.mesh
        self.shards = mesh.dp_shard * mesh.cp
        dim, tp, layers = model.dim, mesh.tp, model.n_layers
        block, root = block_matrices(model, tp), root_matrices(model, tp)
        self.block, self.root = self._group(block), self._group(root)
        self.head_elements = model.vocab_size // tp * dim
        self.head_weight = self.head_elements * job.param_bytes
        self.ffn_weight = dim * model.ffn_dim // tp * job.param_bytes
        self.elements = self._owned(block) * layers + self._owned(root)
        self.vectors = (2 * layers + 1) * -(-dim // self.shards)
        reshard = job.parallel.reshard_after_forward
        # Blocks whose weights stay gathered between forward and backward.
        self.kept_blocks = 0 if reshard else layers
        if reshard is None and self.shards > 1:
            self.kept_blocks = 1
        # What a block's sum of gradients leaves behind; one shard's is the gradients themselves.
        self.reduced = self.block.to_reduce(job) if self.shards > 1 else 0
        several = job.micro_batches > 1
        self.accumulates = several and job.parallel.reduce_gradients == "step"
        self.accumulates_shards = several and not self.accumulates

    def _owned(self, matrices: list[tuple[int, int]]) -> int:
        """Elements of the shards of the first rank, which has the most of each."""
        return sum(-(-rows // self.shards) * columns for rows, columns in matrices)

    def _group(self, matrices: list[tuple[int, int]]) -> _Group:
        return _Group(self._owned(matrices) * self.shards, self.shards)

    # ------------------------------------------------------------ at rest

    def _parameters(self) -> int:
        return self.elements * FLOAT32

    def _optimizer(self) -> int:
        moment = MOMENT_BYTES[self.job.precision.optimizer_state]
        return int(2 * (moment * (self.elements - self.vectors) + FLOAT32 * self.vectors))

    def _gradients(self, blocks: int) -> int:
        """Reduced shards of so many blocks, or of all where those of earlier micro-batches are."""
        if self.accumulates_shards:
            return self.job.model.n_layers * self.block.shard + self.root.shard
        return blocks * self.block.shard

    def _accumulated(self, blocks: int) -> int:
        """Sums over the micro-batches before, of blocks and root, that are not reduced yet."""
        if not self.accumulates:
            return 0
        return blocks * self.block.to_reduce(self.job) + self.root.to_reduce(self.job)

    def _memory(self, moment: str, **parts: int) -> Memory:
        rest = dict.fromkeys(("gradients", "activations", "gathered", "logits", "temporary"), 0)
        return Memory(
            parameters=self._parameters(),
            optimizer=self._optimizer(),
            moment=moment,
            **(rest | parts),
        )

    # ------------------------------------------------------------ moments

    def head(self) -> Memory:
        """A chunk of the head: every block's activations are there."""
        job, model = self.job, self.job.model
        rows = min(job.step.head_chunk, job.local_tokens)
        vocab = model.vocab_size // job.mesh.tp
        logits = rows * vocab * job.param_bytes
        seen = vocab
        if job.mesh.tp > 1 and not job.parallel.loss_parallel:
            seen = model.vocab_size
            logits += 2 * rows * seen * job.param_bytes
        block = HEAD_BLOCK[job.accelerator]
        in_float32 = 0 if job.parallel.compile else min(max(1, block // seen), rows) * seen
        return self._memory(
            "head",
            activations=self._activations(model.n_layers) + kept_by_head(job),
            logits=logits,
            temporary=job.local_tokens * model.dim * job.param_bytes + in_float32 * FLOAT32,
            **self._at_head(),
        )

    def _at_head(self) -> dict[str, int]:
        """Weights and gradients while the head is computed; the last all-gather is freed late."""
        late = self.block.gathered(self.job) if self.shards > 1 else 0
        behind = self._behind_head()
        return behind | {"gathered": behind["gathered"] + late}

    def _behind_head(self) -> dict[str, int]:
        """Weights and gradients before the backward of the blocks."""
        job = self.job
        gathered = self.root.gathered(job) + self.kept_blocks * self.block.gathered(job)
        gathered += self.head_weight + self._accumulated(job.model.n_layers)
        return {"gradients": self._gradients(0), "gathered": gathered}

    def _activations(self, blocks: int) -> int:
        return inputs(self.job) + blocks * kept_by_block(self.job)

    def last_norm_backward(self) -> Memory:
        """Behind the head and before the blocks, where no kernel takes a norm's steps in one."""
        left, steps = last_norm_backward(self.job)
        return self._memory(
            "backward",
            activations=self._activations(self.job.model.n_layers) + left,
            temporary=steps,
            **self._behind_head(),
        )

    def block_backward(self, done: int) -> Memory:
        """The backward of a block with `done` blocks behind it, in the middle or at its end."""
        job, layers = self.job, self.job.model.n_layers
        gathered = self.root.gathered(job) + self.head_weight
        weights = self.block.gathered(job)
        ahead = layers - done - 1  # blocks whose backward is still to come
        kept = self.kept_blocks - done if self.kept_blocks == layers else 0
        gathered += max(kept, 1) * weights
        if self.shards > 1 and ahead and not kept > 1:
            gathered += weights  # prefetched
        if done:
            gathered += self.reduced  # of the block before, until this one's is there
        accumulated = self._accumulated(layers - done)
        rest = {"gradients": self._gradients(done)}
        middle = self._memory(
            "backward",
            activations=self._activations(layers - done) + recomputed_by_block(job),
            gathered=gathered + accumulated + self.ffn_weight,
            temporary=backward_buffers(job),
            **rest,
        )
        end = self._memory(
            "reduction",
            activations=self._activations(ahead) + block_input(job),
            gathered=gathered + accumulated + weights,
            temporary=2 * block_input(job),
            **rest,
        )
        reduced = self._memory(
            "reduction",
            activations=self._activations(ahead),
            gathered=gathered - weights + self._reduction(self.block, accumulated, done > 0),
            temporary=block_input(job),
            **rest,
        )
        return max(middle, end, reduced, key=lambda memory: memory.peak)

    def _reduction(self, group: _Group, accumulated: int, old: bool) -> int:
        """Gradients of a group before and after they are reduced, above `accumulated` ones."""
        job = self.job
        before = 0 if self.accumulates else group.gathered(job)
        buffers = group.to_reduce(job) - (self.reduced if old else 0)
        if self.shards > 1 or job.mesh.dp_replicate > 1:  # else input and result are one
            buffers += group.to_reduce(job) // self.shards
        return accumulated + before + buffers

    def root_backward(self) -> Memory:
        """The sum of the gradients of embedding, head and last norm, when all else is done."""
        job, layers = self.job, self.job.model.n_layers
        accumulated = self._accumulated(0)
        before = self._memory(
            "reduction",
            gradients=self._gradients(layers),
            gathered=2 * self.root.gathered(job) + self.reduced + accumulated,
            activations=inputs(job),
            temporary=block_input(job),
        )
        after = self._memory(
            "reduction",
            gradients=self._gradients(layers),
            gathered=self._reduction(self.root, accumulated, old=False),
            activations=inputs(job),
        )
        return max(before, after, key=lambda memory: memory.peak)

    def update(self) -> Memory:
        """The optimizer's step: all gradients are there, and moments in few bits are widened."""
        job, layers = self.job, self.job.model.n_layers
        piece = MOMENT_PIECE[job.accelerator]
        largest = max(self.root.elements, self.block.elements) // self.shards
        narrow = job.precision.optimizer_state != "fp32"
        return self._memory(
            "update",
            gradients=layers * self.block.shard + self.root.shard,
            temporary=2 * min(piece, largest) * FLOAT32 if narrow else 0,
        )


class _StepAlone(_Step):
    """Of one process, which gathers and reduces nothing: each gradient goes to its weight at once.

    Where forward and backward are in fewer bits, weights have copies until their gradients come.
    """

    def _held(self, blocks: int, head: bool = False, moving: int = 0) -> dict[str, int]:
        """Gradients that are there, and copies of the weights whose gradients are still to come.

        Args:
            blocks: Those whose gradients are still to come; the embedding's is.
            head: Whether the head's is.
            moving: Bytes of gradients on their way.
        """
        job = self.job
        waiting = blocks * self.block.elements + self.head_elements
        if head and not job.model.tie_embeddings:
            waiting += self.head_elements
        there = self.elements - (0 if job.micro_batches > 1 else waiting)
        copies = waiting * job.param_bytes if job.param_bytes < FLOAT32 else 0
        return {"gradients": there * FLOAT32, "gathered": copies + moving}

    def _handed_over(self) -> int:
        """The largest gradient, head's or embedding's, on its way and as its weight gets it."""
        widens = self.job.param_bytes < FLOAT32 and self.job.micro_batches == 1
        return self.head_weight + widens * self.head_elements * FLOAT32

    def head(self) -> Memory:
        """Its logits, or what becomes of its gradient when the loss is done."""
        job, layers = self.job, self.job.model.n_layers
        behind = self._memory(
            "head",
            activations=self._activations(layers) + kept_by_head(job),
            **self._held(layers, head=True, moving=self._handed_over()),
        )
        logits = super().head()
        return logits if job.model.tie_embeddings else max(logits, behind, key=lambda m: m.peak)

    def _at_head(self) -> dict[str, int]:
        return self._held(self.job.model.n_layers, head=True, moving=self.head_weight)

    def _behind_head(self) -> dict[str, int]:
        """Where the two ends are one weight, what the head makes of its gradient waits."""
        tied = self.job.model.tie_embeddings
        return self._held(self.job.model.n_layers, moving=self.head_weight if tied else 0)

    def block_backward(self, done: int) -> Memory:
        job, ahead = self.job, self.job.model.n_layers - done - 1
        tied = self.head_weight if job.model.tie_embeddings else 0
        middle = self._memory(
            "backward",
            activations=self._activations(ahead + 1) + recomputed_by_block(job),
            temporary=backward_buffers(job),
            **self._held(ahead + 1, moving=tied + self.ffn_weight),
        )
        end = self._memory(
            "backward",
            activations=self._activations(ahead) + block_input(job),
            temporary=2 * block_input(job),
            **self._held(ahead, moving=tied),
        )
        return max(middle, end, key=lambda memory: memory.peak)

    def root_backward(self) -> Memory:
        """The embedding's gradient when all else is done; to a tied one the head's is added."""
        made = self._memory(
            "backward",
            activations=inputs(self.job),
            temporary=block_input(self.job),
            **self._held(0, moving=(3 if self.job.model.tie_embeddings else 1) * self.head_weight),
        )
        handed_over = self._memory("backward", **self._held(0, moving=self._handed_over()))
        return max(made, handed_over, key=lambda memory: memory.peak)
