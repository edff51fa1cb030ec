"""Closed forms of the duration of a training step.

A matrix product takes its FLOPs at the rate of large products, plus the part of its memory traffic
that prologue and epilogue do not overlap. Attention takes the rate of its kernel, other operations
their memory traffic over the bandwidth of a copy, and collectives the time of a ring
(`planning.collectives`). FSDP2 overlaps with the computation of the same pass, async TP with the
products next to it; other communication is exposed. Where the host issues kernels more slowly than
the device runs them, the device waits. In a pipeline, the times of all stages are replayed in the
order of the schedule (`planning.pipeline_time`). docs/planning.md reports the accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import ModelPart
from parallel.traffic import block_matrices
from planning.exposed import exposed_communication, hop_seconds, reshards
from planning.frameworks import FRAMEWORKS
from planning.hardware import Hardware
from planning.pipeline_time import pipeline_seconds
from planning.step_spec import DTYPE_BYTES, StepSpec

THROUGHPUT_INTERVAL = (0.84, 1.12)
"""Published tokens/s relative to the plan, of eight in ten runs on GPUs to which no constant was
fitted (tests/planning/test_planning_back_tests.py)."""

LARGE_PRODUCT = 8192
"""Size of the square products whose rate the hardware files have (`planning.calibration`)."""

EXPOSED_TRAFFIC = 0.5
"""Part of a product's memory traffic that its tiles do not overlap: the first loads and the writes.
Narrow products have little to overlap it with. torchao's table of linear layers on an H100
gives 0.4 to 0.65 (github.com/pytorch/ao/pull/2185: 527 TFLOP/s at a width of 1,280, 585 at
7,168)."""

ROWWISE_RATE = 0.9
"""Rate of fp8 products with one scale per row relative to one per tensor: most shapes reach 90% to
100% (github.com/pytorch/pytorch/issues/147971)."""

HALF_RATE_LENGTH = 350
"""Sequence length at which attention reaches half its rate: the published rates of FlashAttention-2
and -3 by length (arXiv:2407.08608, forward and backward) give 230 to 400."""

FORWARD_ATTENTION = 0.26
"""The forward's part of the time of attention: two of seven products, at a higher rate (same)."""

EAGER_KERNELS, COMPILED_KERNELS = (45, 100), (15, 35)
"""Kernels of a block's forward and backward."""
EAGER_US, COMPILED_US, DTENSOR_US = 7.0, 4.0, 40.0
"""Time of the host per kernel: dispatch and autograd, a compiled launch, and for DTensors. Usual
values on servers; not fitted, and not measured for this table."""
FSDP_HOOKS_US = 400.0
"""Time of the host per block and pass for FSDP2's gather and reduction."""

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; in a pipeline on the rank of the slowest stage.

    Attributes:
        elementwise: All memory-bound operations: norms, RoPE, SiLU, casts, softmax, weight copies.
        exposed: Communication that is not overlapped, by axis.
        host: Time in which the device waits for the host to launch kernels.
        bubble: Time in which the slowest stage waits for micro-batches of the others.
        stage_seconds: Of the micro-batches of a step, by pipeline rank; empty without a pipeline.
    """

    matrix: float
    attention: float
    elementwise: float
    optimizer: float
    exposed: dict[str, float]
    host: float = 0.0
    bubble: float = 0.0
    stage_seconds: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        compute = self.matrix + self.attention + self.elementwise
        waiting = self.host + self.bubble
        return compute + self.optimizer + waiting + sum(self.exposed.values())

    @property
    def slowest_stage(self) -> int:
        """The pipeline rank whose micro-batches take longest."""
        return max(range(len(self.stage_seconds)), key=self.stage_seconds.__getitem__, default=0)

    def by_part(self) -> dict[str, float]:
        """Return the seconds of a step by the name of the part in reports."""
        return {
            "matrix products": self.matrix,
            "attention": self.attention,
            "elementwise": self.elementwise,
            "optimizer": self.optimizer,
            "waiting for the host": self.host,
            **({"pipeline bubble": self.bubble} if self.stage_seconds else {}),
            **{f"exposed communication, {axis}": time for axis, time in self.exposed.items()},
        }


def ranks_per_device(spec: StepSpec, hardware: Hardware) -> int:
    """Return the ranks that share the resources in `hardware`: all of a node on CPU, one on GPU."""
    on_cpu = spec.accelerator == "cpu"
    return min(spec.mesh.world_size, hardware.devices_per_node) if on_cpu else 1


def step_time(spec: StepSpec, hardware: Hardware) -> StepTime:
    """Return the duration of a step by part."""
    return _pipeline_time(spec, hardware) if spec.mesh.pp > 1 else _rank_time(spec, hardware).step


def repeated_seconds(spec: StepSpec, hardware: Hardware) -> float:
    """Return the seconds of a micro-batch on one rank, without FSDP2's communication."""
    return sum(map(sum, _rank_time(spec, hardware).passes))


@dataclass(frozen=True)
class _RankTime:
    """Times of one pipeline rank.

    Attributes:
        step: Seconds of a step without waiting for other ranks.
        once: Of these, exposed communication of FSDP2 with the first forward and the last backward.
        passes: Seconds of a micro-batch, forward and backward, with its communication, by part.
    """

    step: StepTime
    once: float
    passes: list[tuple[float, float]]


def _rank_time(spec: StepSpec, hardware: Hardware) -> _RankTime:
    """Return the times of the pipeline rank `spec.stage`."""
    costs = RankCosts(spec, hardware)
    micro = spec.micro_batches
    matrix, attention = micro * costs.matrix(), micro * costs.attention()
    elementwise = micro * costs.elementwise()
    exposed = exposed_communication(spec, hardware, costs.sharing, costs.passes(), attention)
    compute = matrix + attention + elementwise
    communication = sum(exposed.by_axis.values())
    host = max(0.0, micro * costs.host() - compute - communication)
    step = StepTime(matrix, attention, elementwise, costs.optimizer(), exposed.by_axis, host)
    # Communication and waiting of a micro-batch are distributed over the parts like computation.
    repeated = compute + host + communication - exposed.once - exposed.at_end
    parts = (
        [costs] if len(spec.parts) == 1 else [RankCosts(spec, hardware, [p]) for p in spec.parts]
    )
    passes = [each.passes() for each in parts]
    ratio = repeated / micro / sum(map(sum, passes))
    return _RankTime(step, exposed.once, [(ratio * f, ratio * b) for f, b in passes])


def _pipeline_time(spec: StepSpec, hardware: Hardware) -> StepTime:
    """Return the duration of a step in a pipeline, with the parts of its slowest stage.

    A rank gathers its weights once its first hidden states have arrived, and sends its last
    gradient once its own gradients are reduced: what is exposed of these adds up over the ranks,
    except in frameworks that do so while the ranks wait (`Framework.fills_bubble`).
    """
    known: dict[object, _RankTime] = {}
    ranks = []
    for stage in spec.stages:
        parts = tuple((len(layers), *ends) for layers, *ends in stage.parts)
        key = parts, stage.parallel.activation_checkpoint
        if key not in known:
            known[key] = _rank_time(stage, hardware)
        ranks.append(known[key])
    n_ranks, micro = len(ranks), spec.micro_batches
    passes = [each.passes[part] for part in range(len(spec.parts)) for each in ranks]
    forward, backward = zip(*passes, strict=True)
    hop = hop_seconds(spec, hardware, ranks_per_device(spec, hardware))
    seconds = [micro * sum(map(sum, each.passes)) for each in ranks]
    slowest = ranks[seconds.index(max(seconds))]
    total = pipeline_seconds(forward, backward, hop, n_ranks, micro)
    idle = total - max(seconds)
    if not FRAMEWORKS[spec.framework].fills_bubble:
        idle += sum(each.once for each in ranks) - slowest.once
    hops = min(2 * (n_ranks - 1) * hop, idle)
    exposed = slowest.step.exposed
    return replace(
        slowest.step,
        exposed=exposed | {"pp": exposed.get("pp", 0.0) + hops},
        optimizer=max(each.step.optimizer for each in ranks),
        bubble=idle - hops,
        stage_seconds=tuple(seconds),
    )


class RankCosts:
    """Times of one rank's operations; the methods from `matrix` to `sums` are per micro-batch.

    Args:
        parts: Of the rank, whose operations are meant; None: all.
    """

    def __init__(
        self, spec: StepSpec, hardware: Hardware, parts: Sequence[ModelPart] | None = None
    ) -> None:
        self.spec, self.hardware = spec, hardware
        self.framework = FRAMEWORKS[spec.framework]
        model, mesh = spec.model, spec.mesh
        tp = mesh.tp
        self.width, self.kv_width = model.dim // tp, model.n_kv_heads * model.head_dim // tp
        self.ffn, self.vocab = model.ffn_dim // tp, model.vocab_size // tp
        self.tokens = spec.local_tokens
        self.norm_tokens = self.tokens // tp if spec.parallel.sequence_parallel else self.tokens
        self.shards = mesh.dp_shard * mesh.cp
        self.sharing = ranks_per_device(spec, hardware)
        self.on_gpu = spec.accelerator == "cuda"
        self.efficiency = self.framework.efficiency if self.on_gpu else 1.0
        self.bandwidth = hardware.bandwidth_gb_s * 1e9 / self.sharing
        parts = spec.parts if parts is None else parts
        self.n_layers = sum(len(part.layers) for part in parts)
        self.n_heads = sum(part.has_head for part in parts)
        self.block = block_matrices(model, tp)
        root = _root_elements(spec, parts)
        self.elements = self.n_layers * _elements(self.block) + root
        self.fp8_elements = self.n_layers * _elements(spec.fp8_gathered)

    # ------------------------------------------------------------ per micro-batch

    def recomputed(self) -> tuple[float, float, float]:
        """Return the recomputed fractions of a block's products, elementwise passes, attention."""
        mode = self.spec.parallel.activation_checkpoint
        if isinstance(mode, float):
            return 1 - mode, 1 - mode, 1 - mode
        if mode == "selective":
            return self.framework.selective
        return (1.0, 1.0, 1.0) if mode == "full" else (0.0, 0.0, 0.0)

    def passes(self) -> tuple[float, float]:
        """Return the seconds of computation in the forward and in the backward."""
        total = self.matrix() + self.attention() + self.elementwise()
        products, others, _ = self.recomputed()
        recomputation = (2 * products + others) / 3  # as a fraction of the forward
        forward = total / (3 + recomputation)
        return forward, total - forward

    def product(self, m: int, k: int, n: int, dtype: str) -> float:
        """Return the seconds of an (m, k) × (k, n) product.

        Hardware without fp8 emulates it in bf16, hardware without a rate of TF32 uses float32.
        """
        kind = "fp8" if dtype.startswith("fp8") else dtype
        size = 1 if kind == "fp8" else DTYPE_BYTES[kind.replace("tf32", "fp32")]
        rates = self.hardware.matrix_tflops
        other = rates["fp32" if dtype == "tf32" else "bf16"]
        rate = rates.get(kind, other) * 1e12 / self.sharing
        if dtype == "fp8_rowwise" and "fp8" in rates and self.on_gpu:
            rate *= ROWWISE_RATE
        moved = (size * (m * k + k * n) + self.spec.param_bytes * m * n) / self.bandwidth
        flops = 2 * m * k * n
        if not self.on_gpu:
            return max(flops / rate, moved)
        # The rate of large products includes their own exposed traffic.
        large, own = 2 * LARGE_PRODUCT**3, (2 * size + self.spec.param_bytes) * LARGE_PRODUCT**2
        per_flop = 1 / rate - EXPOSED_TRAFFIC * own / self.bandwidth / large
        seconds = flops * max(per_flop, 0.5 / rate) + EXPOSED_TRAFFIC * moved
        return max(seconds, moved) / self.efficiency

    def matrix(self) -> float:
        """Return the seconds of products: forward, two per product in backward, recomputation."""
        model, spec = self.spec.model, self.spec
        fp8 = spec.precision.fp8
        dtype = {None: spec.matrix_dtype, "tensorwise": "fp8", "rowwise": "fp8_rowwise"}[fp8]
        matrices = self.block[:-2]  # without norms
        products = [self.product(self.tokens, k, n, dtype) for n, k in matrices]
        # w2's output is not needed, but a checkpoint recomputes until the last tensor is saved,
        # which torchao's fp8 layer does after its product.
        repeats_w2 = fp8 is not None and not spec.parallel.compile
        recomputed = sum(products if repeats_w2 else products[:-1])
        block = 3 * sum(products) + self.recomputed()[0] * recomputed
        head = self.product(self.tokens, model.dim, self.vocab, spec.matrix_dtype)
        return self.n_layers * block + 3 * self.n_heads * head

    def attention(self) -> float:
        """Return the seconds of attention.

        Kernels that skip masked blocks do half the work; with a dense mask there are none (except
        for our bf16 backward on CPU, which is not counted).
        """
        model, spec = self.spec.model, self.spec
        tflops = self.hardware.attention_tflops[spec.precision.param]
        if spec.runs_flash_attention:
            tflops = self.hardware.flash_attention_tflops.get(spec.flash_attention, tflops)
        rate = tflops * 1e12 / self.sharing
        heads = model.n_heads // spec.mesh.tp
        flops = 6 * self.tokens * heads * model.head_dim * spec.seq_len
        if spec.has_dense_mask:
            flops *= 2
        if self.on_gpu:
            rate *= spec.seq_len / (spec.seq_len + HALF_RATE_LENGTH)
        again = FORWARD_ATTENTION if self.on_gpu else 1 / 3
        return self.n_layers * flops / rate * (1 + again * self.recomputed()[2])

    def elementwise(self) -> float:
        """Return the seconds of memory traffic outside matrix products."""
        spec, model = self.spec, self.spec.model
        p, dim = spec.param_bytes, model.dim
        rope = self.tokens * (self.width + self.kv_width)
        hidden, ffn = self.norm_tokens * dim, self.tokens * self.ffn
        logits = self.tokens * self.vocab
        if spec.parallel.compile:  # fused: each input is read once, each output written once
            forward: float = p * (8 * hidden + 2 * rope + 3 * ffn)
            backward: float = p * (20 * hidden + 2 * rope + 6 * ffn)
            head = (3 * p + 2) * logits
        else:  # one pass per operation; RoPE is computed in float32 between casts
            rotation = (8 if p == 4 else 16 + 2 * p) * rope
            forward = p * (10 * hidden + 5 * ffn) + rotation
            backward = p * (21 * hidden + 9 * ffn) + rotation
            head = (4 * p + 40) * logits
            if not self.framework.fused_norms:
                # Two norms of a block: seven operations in float32 between casts, and their
                # backward (torch.nn.functional.rms_norm before it was one kernel).
                forward += 2 * (6 * p + 6 * FLOAT32) * hidden
                backward += 2 * (10 * p + 12 * FLOAT32) * hidden
        added = spec.expanded_kv_heads - model.n_kv_heads
        if added:  # keys and values are read and written; their gradients are read and summed
            heads = (added + 2 * model.n_kv_heads) // spec.mesh.tp
            expansion = 2 * p * self.tokens * spec.mesh.cp * heads * model.head_dim
            forward, backward = forward + expansion, backward + expansion
        if self.framework.merges_eagerly:  # of outputs, then of gradients of queries, keys, values
            merged = (spec.mesh.cp - 1) * self.tokens * self.width
            forward += (p + 9 * FLOAT32) * merged
            backward += 3 * (p + 4 * FLOAT32) * merged
        fp8_forward, fp8_backward = self.fp8_casts()
        forward, backward = forward + fp8_forward, backward + fp8_backward
        moved = self.n_layers * (forward * (1 + self.recomputed()[1]) + backward)
        moved += self.n_heads * head
        return (moved + self.weights()) / self.bandwidth

    def fp8_casts(self) -> tuple[float, float]:
        """Return the bytes moved to cast a block's operands, in the forward and in the backward.

        Each product has its inputs and output gradients cast, in rows for one product and in
        columns for the other. Separate kernels read a tensor for its scale and for each cast;
        `tensorwise` shares the scale. `rowwise` finds the scales of rows in the same kernel, not
        those of columns, and rescales the outputs of the backward (torchao's float8_ops.py).
        Weights that are not gathered in fp8 are cast in each micro-batch.
        """
        spec, p = self.spec, self.spec.param_bytes
        if spec.precision.fp8 is None:
            return 0.0, 0.0
        dim, tokens = spec.model.dim, self.tokens
        inputs = tokens * (2 * dim + self.width + self.ffn)
        gradients = tokens * (self.width + 2 * self.kv_width + 2 * self.ffn + 2 * dim)
        weights = 0 if spec.fp8_gathered else _elements(self.block[:-2])
        if self.framework.fused_casts:  # written by the kernel that computes the tensor
            return inputs + weights * (p + 2), inputs + 2 * gradients
        if spec.precision.fp8 == "tensorwise":
            row, both = 2 * p + 1, 3 * p + 2
            return row * (inputs + weights), (p + 1) * inputs + both * gradients
        row, column = p + 1, 2 * p + 1  # bytes per element
        rescaled = 2 * p * (inputs + _elements(self.block[:-2]))
        forward = row * (inputs + weights)
        return forward, column * (inputs + weights) + (row + column) * gradients + rescaled

    def weights(self) -> float:
        """Return the bytes moved to cast, gather and copy out weights and to sum gradients.

        With one shard, FSDP2 casts and copies once per step, as it does for weights that stay
        gathered. A single process casts weights in mixed precision only. The cast of a shard to fp8
        is four more operations, in float32.
        """
        p, per_step = self.spec.param_bytes, 1 / self.spec.micro_batches
        if self.spec.mesh.world_size == 1:
            cast = 0 if p == FLOAT32 else (FLOAT32 + p) * per_step
            return self.elements * (cast + self.sums())
        casts = (FLOAT32 + p) * self.elements + (p + 6 * FLOAT32 + 1) * self.fp8_elements
        gathered = p * self.elements - (p - 1) * self.fp8_elements
        gathers = casts / self.shards + (4 if self.shards > 1 else 2) * gathered
        if self.shards == 1 or not reshards(self.spec):
            gathers *= per_step
        return gathers + self.elements * self.sums()

    def sums(self) -> float:
        """Return the bytes moved per gradient element between a backward and the step's sum.

        The first micro-batch's gradients are cast if the data types differ, later ones are added.
        FSDP2 copies the sum into its reduction buffer; with `reduce_gradients=micro_batch` it
        copies each micro-batch's gradients and adds the reduced shards.
        """
        p, per_step = self.spec.param_bytes, 1 / self.spec.micro_batches
        single_process = self.spec.mesh.world_size == 1
        reduce = FLOAT32 if single_process else self.spec.reduce_bytes
        if not single_process and self.spec.parallel.reduce_gradients == "micro_batch":
            return p + reduce + 3 * FLOAT32 / self.shards * (1 - per_step)
        if not single_process and per_step == 1:
            return p + reduce
        cast = 0 if p == reduce else p + reduce
        copied = 0 if single_process else 2 * reduce
        return (cast + copied) * per_step + (p + 2 * reduce) * (1 - per_step)

    def host(self) -> float:
        """Return the seconds in which the host issues the kernels of a micro-batch on a GPU."""
        spec = self.spec
        if not self.on_gpu or self.framework.graphs:
            return 0.0
        (forward, backward), each = EAGER_KERNELS, EAGER_US
        if spec.parallel.compile:
            (forward, backward), each = COMPILED_KERNELS, COMPILED_US
        elif spec.mesh.tp > 1:
            each = DTENSOR_US
        if not spec.parallel.compile:
            forward_again = spec.parallel.activation_checkpoint != "none"
            backward += forward * forward_again
        hooks = 2 * FSDP_HOOKS_US if spec.mesh.world_size > 1 else 0
        return self.n_layers * ((forward + backward) * each + hooks) * 1e-6

    # ------------------------------------------------------------ per step

    def optimizer(self) -> float:
        """Return the seconds of gradient clipping and AdamW over this rank's shards."""
        moments = {"fp32": 16, "bf16": 8 + 24, "int8": 4 + 40}[self.spec.precision.optimizer_state]
        clipping, update = 3 * FLOAT32, 3 * FLOAT32 + moments
        return self.elements / self.shards * (clipping + update) / self.bandwidth


def _root_elements(spec: StepSpec, parts: Sequence[ModelPart]) -> int:
    """Return the elements of embedding, head and last norm on a rank with these parts."""
    has_embedding, has_head = (any(part[end] for part in parts) for end in (1, 2))
    shared = has_embedding and has_head and spec.model.tie_embeddings
    embeddings = has_embedding + has_head - shared
    vocabulary, dim = spec.model.vocab_size // spec.mesh.tp, spec.model.dim
    return embeddings * vocabulary * dim + has_head * dim


def _elements(matrices: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)
