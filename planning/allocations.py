"""Closed forms of a step's memory: the tensors that a step allocates and frees, in order.

Replays what `parallelize` and autograd do, with a size instead of each tensor. Blocks in the middle
of a deep model repeat the change of the block before them, so that a replay takes a fraction of a
millisecond. Weights and gradients are those of `planning.sharded_step`. `planning.tracing` runs the
real operators instead; a test compares both.
"""

from collections.abc import Iterator

from model.config import ModelPart
from parallel.traffic import block_matrices, root_matrices
from planning.activations import (
    batch_bytes,
    block_input_bytes,
    full_hidden_bytes,
    mask_bytes,
    norm_is_decomposed,
    tokens_between_matmuls,
    uses_sequence_parallel,
)
from planning.frameworks import FRAMEWORKS, Framework
from planning.phases import Heap
from planning.step_spec import MOMENT_BLOCK, StepSpec

FLOAT32 = 4  # bytes
HEAD_BLOCK = {"cpu": 2**18, "cuda": 2**23}  # `model.loss.BLOCK`: logits in float32 at a time
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1 + FLOAT32 / MOMENT_BLOCK}  # per matrix element
MOMENT_CHUNK = {"cpu": 2**16, "cuda": 2**25}  # low-precision values converted to float32 at a time


class Group:
    """Sizes of an FSDP2 parameter group: one block, or the root (embedding, head, last norm).

    They count one tensor-parallel rank. The shards of rank 0 are the largest; all are padded to
    the same size.

    Attributes:
        elements: Elements of the gathered weights.
        shard_elements: Elements of a shard.
        sizes, exact, largest: Elements of each matrix, of all and of the largest one.
        gathered: Bytes of the gathered weights.
        to_reduce: Bytes of the unsharded gradients in the reduction's data type.
    """

    def __init__(self, matrices: list[tuple[int, int]], shards: int, spec: StepSpec) -> None:
        self.shard_elements = sum(-(-rows // shards) * columns for rows, columns in matrices)
        self.elements = self.shard_elements * shards
        self.sizes = [rows * columns for rows, columns in matrices]
        self.exact, self.largest = sum(self.sizes), max(self.sizes, default=0)
        self.gathered = self.elements * spec.param_bytes
        self.to_reduce = self.elements * spec.reduce_bytes


class Step:
    """A step; subclasses define how weights are provided and gradients accumulated."""

    def __init__(self, spec: StepSpec) -> None:
        self.spec, self.heap = spec, Heap()
        model, mesh = spec.model, spec.mesh
        p, tokens, tp = spec.param_bytes, spec.local_tokens, mesh.tp
        self.on_cpu, self.wide = spec.accelerator == "cpu", p < FLOAT32
        self.compiled = bool(spec.parallel.compile)
        self.mode = spec.parallel.activation_checkpoint
        self.lazy = self.compiled and self.mode == "selective"
        self.sp = uses_sequence_parallel(spec)
        self.layers, self.shards = spec.n_layers, mesh.dp_shard * mesh.cp
        self.depth = self.layers  # of the part of the model that is replayed
        self.keeps_input = False  # whether something else than autograd holds a block's input
        self.block = Group(block_matrices(model, tp), self.shards, spec)
        root = root_matrices(model, tp, spec.has_embedding, spec.has_head)
        self.root = Group(root, self.shards, spec)
        in_fp8 = sum(rows * columns for rows, columns in spec.fp8_gathered)
        self.block.gathered -= in_fp8 * (p - 1)
        self.head_elements = model.vocab_size // tp * model.dim
        names = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
        sizes = [rows * columns for rows, columns in block_matrices(model, tp)[:-2]]
        self.weights = dict(zip(names, sizes, strict=True))
        # Sizes of activations: hidden states, unsharded and between products, in `param` and in
        # float32; queries; keys; rotated keys that attention reads; hidden states of the FFN.
        self.h, self.s = full_hidden_bytes(spec), block_input_bytes(spec)
        self.s32 = tokens_between_matmuls(spec) * model.dim * FLOAT32
        self.rms = tokens_between_matmuls(spec) * FLOAT32
        self.q = tokens * model.dim // tp * p
        self.kv = tokens * (model.n_kv_heads * model.head_dim // tp) * p
        expanded = 1 if self.compiled else spec.expanded_kv_heads // model.n_kv_heads
        self.expands = expanded > 1
        self.keys = self.kv * mesh.cp * expanded
        self.lse = tokens * (model.n_heads // tp) * FLOAT32
        self.f = tokens * (model.ffn_dim // tp) * p
        rows = tokens // (1 if spec.document_mask else spec.micro_batch_size)
        self.rotations = rows * model.head_dim * FLOAT32
        self.integers = batch_bytes(spec) - mask_bytes(spec) - self.rotations
        # Products of a block that another framework recomputes under `selective`.
        framework = FRAMEWORKS[spec.framework]
        products = self.q + 2 * self.kv + 2 * self.f + self.s
        self.recomputed = framework.selective[0] * products * (self.mode == "selective")
        self.accumulates = spec.micro_batches > 1
        each = spec.parallel.reduce_gradients == "micro_batch" and mesh.world_size > 1
        self.reduces_each = self.accumulates and each
        # Whether an earlier micro-batch is replayed before the last one, whether this micro-batch
        # follows another one, and whether another one follows.
        self.replays_earlier = self.reduces_each
        self.continues = spec.micro_batches > 2
        self.holds = False

    def run(self) -> None:
        """Replay the fullest micro-batches of a step and the update."""
        heap = self.heap
        self.allocate_state()
        self.start()
        for holds in [True, False] if self.replays_earlier else [False]:
            self.holds = holds
            self.micro_batch()
            self.continues = True
        self.update()
        heap.phase("")

    def allocate_state(self) -> None:
        """Allocate parameters and moments."""
        heap, layers = self.heap, self.layers
        elements = self.block.shard_elements * layers + self.root.shard_elements
        vectors = (2 * layers + self.spec.has_head) * -(-self.spec.model.dim // self.shards)
        moment = MOMENT_BYTES[self.spec.precision.optimizer_state]
        heap.add("parameters", elements * FLOAT32)
        moments = moment * (elements - vectors) + FLOAT32 * vectors
        heap.add("optimizer", int(2 * moments))

    def update(self) -> None:
        """Replay the optimizer's step."""
        heap = self.heap
        heap.phase("update")
        if self.spec.precision.optimizer_state != "fp32":
            largest = max(self._largest_shard(self.root), self._largest_shard(self.block))
            chunk = min(MOMENT_CHUNK[self.spec.accelerator], largest)
            heap.use(4 * chunk * FLOAT32)

    def micro_batch(self) -> None:
        """Replay forward and backward, in phases as in `planning.tracing`."""
        (part,) = self.spec.parts
        self.forward(part)
        self.backward(part)
        self.heap.free("activations", self.integers)

    def forward(self, part: ModelPart) -> None:
        """Replay the forward of a part; its output is in `activations`, unless it has the head."""
        heap, layers = self.heap, self.depth
        heap.phase("forward")
        self.enter_root()
        mask = mask_bytes(self.spec)
        heap.add("activations", batch_bytes(self.spec) - mask)
        if part.has_embedding:
            self.embed()
        if mask:  # built from two bool tensors and their conjunction
            each = mask // self.spec.param_bytes
            heap.use(each * max(3, 1 + self.spec.param_bytes))
            heap.add("activations", mask)
        for index in self._indices(range(layers)):
            self.enter_forward(index)
            self.block_forward(recomputing=False)
            heap.free("activations", self.recomputed)
            self.leave_forward(index)
        if part.has_head:
            self.head()

    def backward(self, part: ModelPart) -> None:
        """Replay the backward of a part.

        Without the head, the gradient of its output is in `temporary`; without the embedding, the
        gradient of its input is left there.
        """
        heap, layers = self.heap, self.depth
        names = {0: "first block", 1: "second block", layers - 2: "last block but one"}
        names[layers - 1] = "last block"
        heap.phase(names[layers - 1])
        self.root_backward()
        if part.has_head:
            self.head_backward()
        for index in self._indices(range(layers - 1, -1, -1)):
            heap.phase(names.get(index, "a block"))
            self.enter_backward(index)
            self.block_backward()
            heap.phase("embedding" if index == 0 else names.get(index - 1, "a block"))
            self.leave_backward(index)
        heap.free("activations", mask_bytes(self.spec))
        if part.has_embedding:
            self.embed_backward()
        heap.free("activations", self.rotations)
        self.leave_root()

    def _largest_shard(self, group: Group) -> int:
        return -(-group.largest // self.shards)

    def _indices(self, indices: range) -> Iterator[int]:
        """Yield the first two and the last two; the others repeat the change of the second."""
        yield from indices[:1]
        before = dict(self.heap.held)
        yield from indices[1:2]
        if len(indices) > 4:
            self.heap.repeat(before, len(indices) - 4)
        yield from indices[max(2, len(indices) - 2) :]

    # ------------------------------------------------------------ weights and gradients

    def start(self) -> None:
        """Allocate what earlier micro-batches leave."""

    def enter_root(self) -> None: ...
    def enter_forward(self, index: int) -> None: ...
    def leave_forward(self, index: int) -> None: ...
    def root_backward(self) -> None: ...
    def enter_backward(self, index: int) -> None: ...
    def leave_backward(self, index: int) -> None: ...
    def leave_root(self) -> None: ...

    def accumulate(self, elements: int) -> None:
        """Accumulate a gradient that was just added to `gathered`."""

    # ------------------------------------------------------------ tensor parallelism

    def communicate(self, kind: str, size: float) -> None:
        """Add what gloo allocates during a collective: a copy of the complete tensor."""
        if self.on_cpu and kind != "all_reduce":
            self.heap.use(size)

    def gather_hidden(self) -> None:
        """(batch, seq / tp, dim) -> (batch, seq, dim)."""
        if self.sp:
            self.heap.add("temporary", self.h)
            self.communicate("all_gather", self.h)
            if self.spec.micro_batch_size > 1:  # copied into the order of the sequence
                self.heap.use(self.h)

    def reduce_hidden(self) -> None:
        """Replace partial sums of hidden states by their sum or its shard."""
        heap = self.heap
        if self.sp:
            heap.add("temporary", self.h)  # a chunk for each rank
            heap.add("temporary", self.s)
            self.communicate("reduce_scatter", self.h)
            heap.free("temporary", 2 * self.h)
        elif self.spec.mesh.tp > 1:
            heap.add("temporary", self.h)
            heap.free("temporary", self.h)

    # ------------------------------------------------------------ embedding and head

    def embed(self) -> None:
        heap, tp = self.heap, self.spec.mesh.tp
        if tp > 1:
            heap.add("temporary", 2 * self.h)
            heap.free("temporary", self.h)
        else:
            heap.add("temporary", self.h)
        self.reduce_hidden()
        heap.move("temporary", "activations", self.s)

    def embed_backward(self) -> None:
        heap, tp = self.heap, self.spec.mesh.tp
        size = self.head_elements * self.spec.param_bytes
        heap.phase("embedding")
        if self.sp:
            self.gather_hidden()
            heap.free("temporary", self.s)
        if tp > 1:
            heap.add("temporary", self.h)
            heap.free("temporary", self.h)
        heap.add("gathered", size)
        heap.free("temporary", self.h)
        if self.spec.ties_on_rank:  # autograd adds it to that of the head, in place unless DTensors
            heap.add("gathered", size if tp > 1 else 0)
            heap.free("gathered", (2 if tp > 1 else 1) * size)
        self.accumulate(self.head_elements)

    def head(self) -> None:
        """Last norm, and the loss by chunks with its gradients."""
        spec, heap = self.spec, self.heap
        kind = self.norm_kind(last=True)
        self.norm_forward(kind, True)
        if self.input_is_widened(kind) and not self.keeps_input:
            heap.free("activations", self.s)
        heap.phase("head")
        p, tp = spec.param_bytes, spec.mesh.tp
        if self.sp:
            self.gather_hidden()
        heap.add("activations", self.h)  # gradient of the hidden states
        heap.add("gathered", self.head_elements * p)
        heap.add("temporary", spec.local_tokens * FLOAT32)
        rows = min(spec.step.head_chunk, spec.local_tokens)
        vocab = spec.model.vocab_size // tp
        if FRAMEWORKS[spec.framework].whole_logits is not None:
            self.whole_logits(FRAMEWORKS[spec.framework])
        local = complete = rows * vocab * p
        heap.add("logits", local)
        if tp > 1 and not spec.parallel.loss_parallel:
            vocab, complete = spec.model.vocab_size, local * tp
            heap.add("logits", complete)
            self.communicate("all_gather", complete)
            heap.add("logits", complete)
            heap.free("logits", complete)
        if not self.compiled:
            block = min(max(1, HEAD_BLOCK[spec.accelerator] // vocab), rows)
            heap.use(block * vocab * FLOAT32)
        heap.use(7 * rows * 4)  # vectors
        heap.free("logits", local + (complete if complete != local else 0))
        heap.free("temporary", spec.local_tokens * FLOAT32 + (self.h if self.sp else 0))
        heap.free("temporary", self.s)  # output of the norm

    def whole_logits(self, framework: Framework) -> None:
        """Replay the cross entropy of all logits of a micro-batch, as other frameworks compute it.

        PyTorch holds the logits, their float32 copy, its log-softmax and the gradient of that; one
        more under loss parallelism (torch.distributed.tensor.parallel.loss). Compiled: the logits,
        their gradient, and one buffer.
        """
        heap, spec = self.heap, self.spec
        p, tp = spec.param_bytes, spec.mesh.tp
        each = 3.0 * p
        if framework.whole_logits == "eager":
            each = p + FLOAT32 * (4.0 if tp > 1 and spec.parallel.loss_parallel else 3.0)
        vocab = spec.model.vocab_size // (tp if spec.parallel.loss_parallel else 1)
        heap.use(spec.local_tokens * vocab * each, "logits")

    def head_backward(self) -> None:
        heap = self.heap
        heap.move("activations", "temporary", self.h)
        if not self.spec.ties_on_rank:
            self.accumulate(self.head_elements)
        self.reduce_hidden()
        self.norm_backward(self.norm_kind(last=True), last=True)

    # ------------------------------------------------------------ norm

    def norm_kind(self, last: bool = False) -> str:
        """Return how RMSNorm runs: as one kernel, our function, or separate operations."""
        if not self.on_cpu or (self.compiled and not last):
            return "kernel"
        return "decomposed" if norm_is_decomposed(self.spec) else "function"

    def norm_forward(self, kind: str, saves: bool) -> None:
        """Add the output to `temporary`, and what is saved besides the input to `activations`."""
        heap, s, wide = self.heap, self.s, self.s32
        if kind == "function" and self.wide:
            heap.add("temporary", 2 * wide + s)
            heap.free("temporary", 2 * wide)
        elif kind == "decomposed":
            copy = wide if self.wide else 0  # of the input, in float32
            heap.add("temporary", copy + wide)
            heap.free("temporary", wide)
            heap.add("temporary", wide + wide)
            if self.wide:
                heap.add("temporary", s)
                heap.free("temporary", wide)
            if saves:
                heap.move("temporary", "activations", copy + wide)
            else:
                heap.free("temporary", copy + wide)
        else:
            heap.add("temporary", s)
        if saves:
            heap.add("activations", self.rms)

    def norm_backward(self, kind: str, last: bool = False) -> None:
        """Replace the gradient in `temporary` by that of the input; free what was saved."""
        heap, s, wide = self.heap, self.s, self.s32
        if kind == "decomposed":
            if self.wide:
                heap.add("temporary", wide)
                heap.free("temporary", s)
            heap.add("temporary", 2 * wide)
            heap.free("temporary", 2 * wide)
            heap.free("activations", wide)  # the normalized input
            heap.add("temporary", 4 * wide)
            heap.free("temporary", 4 * wide)
            heap.free("activations", wide if self.wide else 0)
            if self.wide:
                heap.add("temporary", s)
                heap.free("temporary", wide)
        elif kind == "function" and self.wide:
            heap.add("temporary", 3 * wide)
            heap.free("temporary", wide)
            heap.add("temporary", wide + s)
            heap.free("temporary", 3 * wide + s)
        else:
            heap.add("temporary", s)
            heap.free("temporary", s)
        heap.free("activations", self.rms + (0 if self.input_is_widened(kind) else s))

    def input_is_widened(self, kind: str) -> bool:
        """Return whether the norm saves its input in float32 instead of the input itself."""
        return kind == "decomposed" and self.wide

    # ------------------------------------------------------------ block

    def block_forward(self, recomputing: bool) -> None:
        """Replay a block whose input is in `activations`, and add its output there.

        A recomputation ends at the input of w2 and adds no output. Under `selective` it takes the
        results that were kept.
        """
        heap = self.heap
        keeps = self.mode == "selective" and not recomputing
        takes = self.mode == "selective" and recomputing
        saves = recomputing or self.mode == "none"
        kind, s = self.norm_kind(), self.s
        self.norm_forward(kind, saves)
        self.gather_hidden()
        self.attention_forward(keeps, takes, saves)
        heap.add("temporary", s)  # sum with the input
        self._result(s, keeps)
        self._normed(saves)
        if self.input_is_widened(kind) and self.mode == "none" and not self.keeps_input:
            heap.free("activations", s)  # nothing saves the input
        self.norm_forward(kind, saves)
        self.gather_hidden()
        self.feed_forward_forward(keeps, takes, saves)
        if not recomputing:
            heap.add("temporary", s)
            self._result(s, keeps and not self.lazy)
        self._normed(saves)
        if saves and not self.input_is_widened(kind):
            heap.move("temporary", "activations", s)
        else:
            heap.free("temporary", s)
        if not recomputing:
            heap.move("temporary", "activations", s)

    def attention_forward(self, keeps: bool, takes: bool, saves: bool) -> None:
        """Replay attention up to its reduced output, which is in `temporary`."""
        heap, q, kv = self.heap, self.q, self.kv
        if not takes:
            heap.add("temporary", q + 2 * kv)
        for size in (q, kv):  # rotation, in float32
            heap.add("temporary", size + 4 * size * self.wide)
            heap.free("temporary", 4 * size * self.wide)
        if takes:
            heap.free("activations", q + kv)
            heap.move("activations", "temporary", kv)
        elif keeps:
            heap.move("temporary", "activations", q + 2 * kv)
        else:
            heap.free("temporary", q + kv)
        keys = kv if keeps else 2 * kv  # of what attention reads, what is in `temporary`
        replaced = 0.0
        if self.spec.mesh.cp > 1:
            full = 2 * kv * self.spec.mesh.cp
            heap.add("temporary", 2 * kv + full)
            self.communicate("all_gather", full)
            heap.add("temporary", full)
            heap.free("temporary", full + 2 * kv)
            keys, replaced = full, keys
        if self.expands:
            heap.add("temporary", 2 * self.keys)
            keys, replaced = 2 * self.keys, replaced + keys
        out = q + self.lse
        if not takes:
            heap.add("temporary", out)
        heap.free("temporary", replaced)
        if saves:
            heap.move("temporary", "activations", q + keys + (0 if takes else out))
            left = 0.0
        else:
            left = q + keys + (0 if keeps else out)  # local variables
            heap.move("temporary", "activations", out if keeps else 0)
        self.row_wise(keeps, takes)
        heap.free("temporary", left)

    def row_wise(self, keeps: bool, takes: bool) -> None:
        """Replay wo or w2 and the reduction of its output, which is in `temporary`."""
        partial = self.h if self.spec.mesh.tp > 1 and not self.lazy else 0
        if takes:
            self.heap.use(self.h if self.sp else 0)  # the chunks for each rank are copied again
            self.heap.free("activations", partial)
            self.heap.move("activations", "temporary", self.s)
            return
        self.heap.add("temporary", self.h)
        self.reduce_hidden()
        if keeps:
            self.heap.add("activations", partial)

    def feed_forward_forward(self, keeps: bool, takes: bool, saves: bool) -> None:
        """Replay the feed-forward layer; a recomputation ends before w2."""
        heap, f = self.heap, self.f
        recomputing = takes or (saves and self.mode != "none")
        results = 0 if takes else 2 * f  # of w1 and w3
        others = f if self.compiled else 2 * f  # silu and the product
        if saves:
            heap.add("activations", results + others)
        elif keeps:
            heap.add("activations", results)
            heap.add("temporary", others)
            heap.free("temporary", others - f)
        else:
            heap.add("temporary", 2 * f)
            heap.free("temporary", 0 if self.compiled else f)
            heap.add("temporary", f if self.compiled else 2 * f)
            heap.free("temporary", 2 * f)
        if recomputing:
            return
        self.row_wise(keeps and not self.lazy, False)
        heap.free("temporary", 0 if saves else f)

    def _result(self, size: float, keeps: bool) -> None:
        if keeps:
            self.heap.move("temporary", "activations", size)
        else:
            self.heap.free("temporary", size)

    def _normed(self, saves: bool) -> None:
        """Save or free the output of a norm, and what was gathered from it."""
        self._result(self.h, saves)
        if self.sp:
            self.heap.free("temporary", self.s)

    def product(
        self, name: str, out: float, frees: float = 0, saved: float = 0, recomputed: float = 0
    ) -> None:
        """Replay the backward of a product.

        Args:
            out: Size of the input's gradient.
            frees: Size of the output's gradient.
            saved: Size of the saved input, if this is its last use.
            recomputed: Size of the input if the compiler recomputes it.
        """
        heap, elements = self.heap, self.weights[name]
        heap.add("temporary", recomputed)
        heap.add("gathered", elements * self.spec.param_bytes)
        heap.add("temporary", out)
        heap.free("temporary", frees + recomputed)
        heap.free("activations", saved)
        self.accumulate(elements)

    def block_backward(self) -> None:
        """Replay the backward of a block, with the gradient of its output in `temporary`."""
        heap, s = self.heap, self.s
        heap.add("activations", self.recomputed)
        self.gather_hidden()
        if self.mode in ("full", "selective") and not self.lazy:  # w2 asks for its saved input
            self.block_forward(recomputing=True)
        self._feed_forward_backward()
        self._branch_backward(s + self.rms)
        self.add_residual()
        self._attention_backward()
        self._branch_backward(self.rms)
        if self.lazy:  # what was kept
            heap.free("activations", 2 * self.q + 2 * self.kv + self.lse + s + 2 * self.f)
        elif self.mode == "selective":  # the result of w2
            heap.free("activations", s + (self.h if self.spec.mesh.tp > 1 else 0))
        if self.input_is_widened(self.norm_kind()) and self.mode != "none":
            heap.free("activations", s)  # the input, saved by the checkpoint
        self.add_residual()

    def _branch_backward(self, recomputed: float) -> None:
        """Replay the backward of a norm and of what gathered its output."""
        self.add_gradients()
        self.reduce_hidden()
        if self.lazy:
            self.heap.add("activations", recomputed)
        self.norm_backward(self.norm_kind())

    def _feed_forward_backward(self) -> None:
        heap, lazy, h, f = self.heap, self.lazy, self.h, self.f
        gathered, normed = h if self.sp else 0, h if lazy else 0
        self.product("w2", f, gathered, 0 if lazy else f, f if lazy else 0)
        if self.compiled:  # silu is recomputed
            recomputes = self.mode != "none"
            product = recomputes * (f + gathered)
            heap.add("temporary", 2 * f + product)
            heap.free("temporary", f + product)
            heap.free("activations", 0 if lazy else 2 * f)
        else:
            heap.add("temporary", 2 * f)
            heap.free("temporary", f)
            heap.free("activations", 2 * f)
        self.product("w3", h, f, recomputed=normed)
        if not self.compiled:  # silu
            heap.add("temporary", f)
            heap.free("temporary", f)
            heap.free("activations", f)
        self.product("w1", h, f, h - normed, normed)

    def _attention_backward(self) -> None:
        heap, lazy, h, q, kv = self.heap, self.lazy, self.h, self.q, self.kv
        gathered, normed = h if self.sp else 0, h if lazy else 0
        self.gather_hidden()
        self.product("wo", q, gathered)
        rotated = q + 2 * self.keys if self.keys != kv else q + kv
        if lazy:
            heap.add("temporary", rotated)
        heap.add("temporary", q + 2 * self.keys)
        heap.free("temporary", q + (rotated if lazy else 0))
        heap.free("activations", 0 if lazy else 2 * q + 2 * self.keys + self.lse)
        self._keys_backward()
        for size in (kv, q):  # rotation, in float32
            if self.wide:
                heap.add("temporary", 2 * size)
                heap.free("temporary", size)
            rotation = self.rotations + size * (1 + self.wide)
            heap.add("temporary", rotation)
            heap.free("temporary", rotation)
            if self.wide:
                heap.add("temporary", size)
                heap.free("temporary", 2 * size)
        self.product("wv", h, kv, recomputed=normed)
        self.product("wk", h, kv, recomputed=normed)
        self.add_gradients()
        self.product("wq", h, q, h - normed, normed)

    def _keys_backward(self) -> None:
        """Replay the backward of expanding and gathering keys and values."""
        heap, kv = self.heap, self.kv
        full = 2 * kv * self.spec.mesh.cp
        if self.expands:
            heap.add("temporary", full)
            heap.free("temporary", 2 * self.keys)
        if self.spec.mesh.cp > 1:
            heap.add("temporary", full)
            heap.free("temporary", full)
            heap.add("temporary", 2 * kv)
            self.communicate("reduce_scatter", full)
            heap.free("temporary", full)

    def add_residual(self) -> None:
        self.heap.free("temporary", self.s)  # autograd adds in place

    def add_gradients(self) -> None:
        """Replay the sum of two gradients of hidden states, which is in place unless DTensors."""
        self.heap.add("temporary", self.h if self.spec.mesh.tp > 1 else 0)
        self.heap.free("temporary", (2 if self.spec.mesh.tp > 1 else 1) * self.h)
