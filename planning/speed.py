"""Closed forms of the duration of a training step.

A matrix product takes the larger of its FLOPs at the rate of large products and its memory traffic;
other operations take their memory traffic over the bandwidth of a copy; a collective takes the
bytes of its ring algorithm (Patarasuk and Yuan 2009) over the slowest link it uses. On GPUs FSDP2
overlaps communication with computation, and async TP half of that of tensor parallelism (a sixth
with one sequence per micro-batch); all other communication is exposed. docs/planning.md reports the
accuracy.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.mesh import AXES, MeshShape
from parallel.traffic import Collective, block_matrices, root_matrices
from planning.hardware import Hardware
from planning.step_spec import DTYPE_BYTES, StepSpec

MATMUL_EFFICIENCY = 0.80
"""Rate of matrix products inside a step relative to large products alone, due to lower clocks and
wave quantization. Fitted to published runs that the back-tests exclude."""

OVERLAP_SLOWDOWN = 0.10
"""Slowdown of the computation by overlapped communication, as a fraction of the latter's time."""

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part.

    Attributes:
        elementwise: All memory-bound operations: norms, RoPE, SiLU, casts, softmax, weight copies.
        exposed: Communication that is not overlapped, by axis.
    """

    matrix: float
    attention: float
    elementwise: float
    optimizer: float
    exposed: dict[str, float]

    @property
    def total(self) -> float:
        compute = self.matrix + self.attention + self.elementwise
        return compute + self.optimizer + sum(self.exposed.values())

    def by_part(self) -> dict[str, float]:
        """Return the seconds of a step by the name of the part in reports."""
        return {
            "matrix products": self.matrix,
            "attention": self.attention,
            "elementwise": self.elementwise,
            "optimizer": self.optimizer,
            **{f"exposed communication, {axis}": time for axis, time in self.exposed.items()},
        }


def ranks_per_device(spec: StepSpec, hardware: Hardware) -> int:
    """Return the ranks that share the resources in `hardware`: all of a node on CPU, one on GPU."""
    on_cpu = spec.accelerator == "cpu"
    return min(spec.mesh.world_size, hardware.devices_per_node) if on_cpu else 1


def step_time(spec: StepSpec, hardware: Hardware) -> StepTime:
    """Return the duration of a step by part."""
    costs = RankCosts(spec, hardware)
    micro = spec.micro_batches
    matrix, attention = micro * costs.matrix(), micro * costs.attention()
    elementwise = micro * costs.elementwise()
    exposed = costs.exposed(spec.traffic(), matrix + attention + elementwise)
    return StepTime(matrix, attention, elementwise, costs.optimizer(), exposed)


class RankCosts:
    """Times of one rank's operations; the methods from `matrix` to `sums` are per micro-batch."""

    def __init__(self, spec: StepSpec, hardware: Hardware) -> None:
        self.spec, self.hardware = spec, hardware
        model, mesh = spec.model, spec.mesh
        tp = mesh.tp
        self.width, self.kv_width = model.dim // tp, model.n_kv_heads * model.head_dim // tp
        self.ffn, self.vocab = model.ffn_dim // tp, model.vocab_size // tp
        self.tokens = spec.local_tokens
        self.norm_tokens = self.tokens // tp if spec.parallel.sequence_parallel else self.tokens
        self.shards = mesh.dp_shard * mesh.cp
        self.sharing = ranks_per_device(spec, hardware)
        self.efficiency = 1.0 if spec.accelerator == "cpu" else MATMUL_EFFICIENCY
        self.bandwidth = hardware.bandwidth_gb_s * 1e9 / self.sharing
        block, root = block_matrices(model, tp), root_matrices(model, tp)
        self.elements = model.n_layers * _elements(block) + _elements(root)
        self.fp8_elements = model.n_layers * _elements(spec.fp8_gathered)

    # ------------------------------------------------------------ per micro-batch

    def recomputed(self) -> tuple[float, float]:
        """Return the recomputed fractions of a block's matrix products and elementwise passes."""
        mode = self.spec.parallel.activation_checkpoint
        if isinstance(mode, float):
            return 1 - mode, 1 - mode
        return {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[mode]

    def product(self, m: int, k: int, n: int, dtype: str) -> float:
        """Return the seconds of an (m, k) × (k, n) product.

        Hardware without fp8 emulates it in bf16, hardware without a rate of TF32 uses float32.
        """
        size = 1 if dtype == "fp8" else DTYPE_BYTES[dtype.replace("tf32", "fp32")]
        rates = self.hardware.matrix_tflops
        other = rates["fp32" if dtype == "tf32" else "bf16"]
        rate = rates.get(dtype, other) * 1e12 * self.efficiency / self.sharing
        moved = size * (m * k + k * n) + self.spec.param_bytes * m * n
        return max(2 * m * k * n / rate, moved / self.bandwidth)

    def matrix(self) -> float:
        """Return the seconds of products: forward, two per product in backward, recomputation."""
        model, spec = self.spec.model, self.spec
        dtype = "fp8" if spec.precision.fp8 is not None else spec.matrix_dtype
        matrices = block_matrices(model, spec.mesh.tp)[:-2]  # without norms
        products = [self.product(self.tokens, k, n, dtype) for n, k in matrices]
        # w2's output is not needed, but a checkpoint recomputes until the last tensor is saved,
        # which torchao's fp8 layer does after its product.
        repeats_w2 = dtype == "fp8" and not spec.parallel.compile
        recomputed = sum(products if repeats_w2 else products[:-1])
        block = 3 * sum(products) + self.recomputed()[0] * recomputed
        head = self.product(self.tokens, model.dim, self.vocab, spec.matrix_dtype)
        return model.n_layers * block + 3 * head

    def attention(self) -> float:
        """Return the seconds of attention; a third is the forward.

        Kernels that skip masked blocks do half the work; with a dense mask there are none (except
        for our bf16 backward on CPU, which is not counted).
        """
        model, spec = self.spec.model, self.spec
        tflops = self.hardware.attention_tflops[spec.precision.param]
        if spec.attention == "varlen":
            tflops = self.hardware.flash_attention_tflops.get(spec.flash_attention, tflops)
        rate = tflops * 1e12 / self.sharing
        heads = model.n_heads // spec.mesh.tp
        flops = 6 * self.tokens * heads * model.head_dim * spec.seq_len
        if spec.has_dense_mask:
            flops *= 2
        return model.n_layers * flops / rate * (1 + self.recomputed()[0] / 3)

    def elementwise(self) -> float:
        """Return the seconds of memory traffic outside matrix products."""
        spec, model = self.spec, self.spec.model
        p, dim = spec.param_bytes, model.dim
        rope = self.tokens * (self.width + self.kv_width)
        hidden, ffn = self.norm_tokens * dim, self.tokens * self.ffn
        logits = self.tokens * self.vocab
        if spec.parallel.compile:  # fused: each input is read once, each output written once
            forward = p * (8 * hidden + 2 * rope + 3 * ffn)
            backward = p * (20 * hidden + 2 * rope + 6 * ffn)
            head = (3 * p + 2) * logits
        else:  # one pass per operation; RoPE is computed in float32 between casts
            rotation = (8 if p == 4 else 16 + 2 * p) * rope
            forward = p * (10 * hidden + 5 * ffn) + rotation
            backward = p * (21 * hidden + 9 * ffn) + rotation
            head = (4 * p + 40) * logits
        added = spec.expanded_kv_heads - model.n_kv_heads
        if added:  # keys and values are read and written; their gradients are read and summed
            heads = (added + 2 * model.n_kv_heads) // spec.mesh.tp
            expansion = 2 * p * self.tokens * spec.mesh.cp * heads * model.head_dim
            forward, backward = forward + expansion, backward + expansion
        if spec.precision.fp8 is not None:  # each operand is read for its scale, read and written
            operands = 3 * (4 * self.tokens * dim + 3 * ffn)
            backward += operands * (2 * p + 1)
        moved = model.n_layers * (forward * (1 + self.recomputed()[1]) + backward) + head
        return (moved + self.weights()) / self.bandwidth

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
        if self.shards == 1 or self.spec.parallel.reshard_after_forward is False:
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

    # ------------------------------------------------------------ per step

    def optimizer(self) -> float:
        """Return the seconds of gradient clipping and AdamW over this rank's shards."""
        moments = {"fp32": 16, "bf16": 8 + 24, "int8": 4 + 40}[self.spec.precision.optimizer_state]
        clipping, update = 3 * FLOAT32, 3 * FLOAT32 + moments
        return self.elements / self.shards * (clipping + update) / self.bandwidth

    def exposed(self, traffic: Iterable[Collective], compute: float) -> dict[str, float]:
        """Return the seconds of communication that is not overlapped, by axis.

        FSDP2 communication overlaps with computation, except for any excess over it, the first
        gather and the last reduction, and a mutual slowdown.
        """
        overlapped: dict[str, float] = defaultdict(float)
        exposed: dict[str, float] = defaultdict(float)
        on_cuda = self.spec.accelerator == "cuda"
        for each in traffic:
            fsdp = each.part in ("weights", "gradients") and each.axis != "tp"
            target = overlapped if on_cuda and fsdp else exposed
            target[each.axis] += self.collective(each)
        if self.spec.parallel.async_tp and "tp" in exposed:
            # Overlapped with the products before a scatter or after a gather: of a block's 8
            # collectives the compiler fuses 6, with one sequence 2 (tests/cuda).
            exposed["tp"] *= 1 / 2 if self.spec.micro_batch_size > 1 else 5 / 6
        total = sum(overlapped.values())
        if total:
            ends = 1 / (self.spec.model.n_layers * self.spec.micro_batches)
            remaining = max(total - compute, total * ends) + OVERLAP_SLOWDOWN * min(total, compute)
            for axis, seconds in overlapped.items():
                exposed[axis] += remaining * seconds / total
        return dict(exposed)

    def collective(self, each: Collective) -> float:
        """Return the seconds of all `count` collectives."""
        hardware = self.hardware
        reach, ranks_per_node = span(each.axis, self.spec.mesh, hardware.devices_per_node)
        speed, latency = hardware.link_gb_s, hardware.link_latency_us
        if reach > hardware.devices_per_node:
            # One ring per network adapter of the group's ranks in a node.
            speed = min(speed, hardware.network_gb_s * ranks_per_node)
            latency = hardware.network_latency_us
        sending = float(each.sent) * self.sharing / (speed * 1e9)
        return sending + each.count * latency * 1e-6


def span(axis: str, mesh: MeshShape, devices_per_node: int) -> tuple[int, int]:
    """Return the distance from first to last rank of a group, and its number of ranks per node.

    Consecutive ranks share a node; tp is the innermost axis.

    Args:
        axis: Axes of the group, joined by "+".
    """
    axes = axis.split("+")
    stride, reach, ranks_per_node = 1, 1, 1
    for name, size in zip(reversed(AXES), reversed(mesh.sizes), strict=True):
        if name in axes:
            reach = stride * size
            ranks_per_node *= max(min(size, devices_per_node // stride), 1)
        stride *= size
    return reach, ranks_per_node


def _elements(matrices: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)
