"""How long a step takes, in closed form: what is computed, what is passed over, what is waited for.

Products take what a large product's rate gives them, or the time to read and write their matrices;
other operations their bytes over the bandwidth of a copy; collectives what their ring sends
(Patarasuk and Yuan 2009) over the slower link that they cross. FSDP2 gathers and sums beside the
computation, tensor and context parallelism wait. docs/planning.md tells how well this holds.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from parallel.mesh import AXES, MeshShape
from parallel.traffic import Collective, block_matrices, root_matrices
from planning.hardware import Hardware
from planning.job import Job

IN_STEP = 0.80
"""Share of a large product's rate that products keep inside a step, where clocks fall and waves of
blocks do not fill the device: fitted to published runs that the back-tests leave out."""

BESIDE = 0.10
"""Share of the time of a collective that runs beside the computation by which it slows it."""

FLOAT32 = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: computing, waiting, updating.

    `elementwise` is all that moves bytes and multiplies little: norms, RoPE, SiLU, casts, the
    softmax, copies of weights. `exposed` are the parts of `communication`, by axis.
    """

    matrix: float
    attention: float
    elementwise: float
    optimizer: float
    communication: float
    exposed: dict[str, float]

    @property
    def compute(self) -> float:
        """Forward and backward."""
        return self.matrix + self.attention + self.elementwise

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.optimizer + self.communication


def step_time(job: Job, hardware: Hardware) -> StepTime:
    """The parts of a step of the job."""
    rank = _Rank(job, hardware)
    micro = job.micro_batches
    matrix, attention = micro * rank.matrix(), micro * rank.attention()
    elementwise = micro * rank.elementwise()
    exposed = rank.exposed(job.traffic(), matrix + attention + elementwise)
    return StepTime(
        matrix=matrix,
        attention=attention,
        elementwise=elementwise,
        optimizer=rank.optimizer(),
        communication=sum(exposed.values()),
        exposed=exposed,
    )


class _Rank:
    """One rank's share of the hardware, and of the model."""

    def __init__(self, job: Job, hardware: Hardware) -> None:
        self.job, self.hardware = job, hardware
        model, mesh = job.model, job.mesh
        tp = mesh.tp
        self.width, self.kv = model.dim // tp, model.n_kv_heads * model.head_dim // tp
        self.ffn, self.vocab = model.ffn_dim // tp, model.vocab_size // tp
        self.tokens = job.local_tokens
        self.between = self.tokens // tp if job.parallel.sequence_parallel else self.tokens
        self.shards = mesh.dp_shard * mesh.cp
        on_cpu = job.accelerator == "cpu"
        self.sharing = min(mesh.world_size, hardware.devices_per_node) if on_cpu else 1
        self.in_step = 1.0 if on_cpu else IN_STEP
        self.bandwidth = hardware.bandwidth_gb_s * 1e9 / self.sharing
        block, root = block_matrices(model, tp), root_matrices(model, tp)
        self.elements = model.n_layers * _elements(block) + _elements(root)

    # ------------------------------------------------------------ of a micro-batch

    def recomputed(self) -> tuple[float, float]:
        """Shares of a block's forward that are repeated: of products and kernels, of the rest."""
        mode = self.job.parallel.activation_checkpoint
        if isinstance(mode, float):
            return 1 - mode, 1 - mode
        return {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[mode]

    def product(self, m: int, k: int, n: int, precision: str) -> float:
        """Seconds of (m, k) x (k, n)."""
        size = {"fp32": 4, "bf16": 2, "fp8": 1}[precision]
        rate = self.hardware.matrix_tflops[precision] * 1e12 * self.in_step / self.sharing
        moved = size * (m * k + k * n) + self.job.param_bytes * m * n
        return max(2 * m * k * n / rate, moved / self.bandwidth)

    def matrix(self) -> float:
        """Products of forward and backward, two for each of the forward's, and recomputed ones."""
        model, job = self.job.model, self.job
        inside = "fp8" if job.precision.fp8 is not None else job.precision.param
        shapes = [
            (model.dim, self.width),
            (model.dim, self.kv),
            (model.dim, self.kv),
            (self.width, model.dim),
            (model.dim, self.ffn),
            (model.dim, self.ffn),
            (self.ffn, model.dim),
        ]
        products = [self.product(self.tokens, k, n, inside) for k, n in shapes]
        again = sum(products[:-1])  # nothing that follows the last one is needed
        block = 3 * sum(products) + self.recomputed()[0] * again
        head = self.product(self.tokens, model.dim, self.vocab, job.precision.param)
        return model.n_layers * block + 3 * head

    def attention(self) -> float:
        """The kernel, of which a third is the forward; half the work where it skips what is masked.

        On CPU it does so where rows are plainly causal, and not under a mask of documents (our own
        backward in bf16 does, which is not counted).
        """
        model, job = self.job.model, self.job
        rate = self.hardware.attention_tflops[job.precision.param] * 1e12 / self.sharing
        heads = model.n_heads // job.mesh.tp
        flops = 6 * self.tokens * heads * model.head_dim * job.seq_len
        if job.accelerator == "cpu" and (job.document_mask or job.mesh.cp > 1):
            flops *= 2
        return model.n_layers * flops / rate * (1 + self.recomputed()[0] / 3)

    def elementwise(self) -> float:
        """Bytes read and written outside of products, over the bandwidth."""
        job, model = self.job, self.job.model
        p, dim = job.param_bytes, model.dim
        rope = self.tokens * (self.width + self.kv)
        hidden, ffn = self.between * dim, self.tokens * self.ffn
        logits = self.tokens * self.vocab
        if job.parallel.compile:  # one pass over what is read and what is written
            forward = p * (8 * hidden + 2 * rope + 3 * ffn)
            backward = p * (20 * hidden + 2 * rope + 6 * ffn)
            head = (3 * p + 2) * logits
        else:  # an operation, a pass; RoPE's is in float32, with casts around it
            turned = (8 if p == 4 else 16 + 2 * p) * rope
            forward = p * (10 * hidden + 5 * ffn) + turned
            backward = p * (21 * hidden + 9 * ffn) + turned
            head = (4 * p + 40) * logits
        if job.precision.fp8 is not None:  # each operand is read for its scale, read, and written
            operands = 3 * (4 * self.tokens * dim + 3 * ffn)
            backward += operands * (2 * p + 1)
        moved = model.n_layers * (forward * (1 + self.recomputed()[1]) + backward) + head
        return (moved + self.weights()) / self.bandwidth

    def weights(self) -> float:
        """Bytes of FSDP2's copies: cast and gathered, twice copied out; gradients summed.

        One shard is cast and copied, once a step, as what stays gathered is gathered once. One
        process casts weights where formats differ.
        """
        p, first = self.job.param_bytes, 1 / self.job.micro_batches
        if self.job.mesh.world_size == 1:
            cast = 0 if p == FLOAT32 else (FLOAT32 + p) * first
            return self.elements * (cast + self.sums())
        gathers = (FLOAT32 + p) / self.shards + (4 if self.shards > 1 else 2) * p
        if self.shards == 1 or self.job.parallel.reshard_after_forward is False:
            gathers *= first
        return self.elements * (gathers + self.sums())

    def sums(self) -> float:
        """Bytes that the gradients of an element move from a backward to the step's sum.

        The first are cast where formats differ, the next added to them. FSDP2 copies that sum into
        the buffer it reduces; or what each micro-batch has, whose shards are added then.
        """
        p, first = self.job.param_bytes, 1 / self.job.micro_batches
        alone = self.job.mesh.world_size == 1
        reduce = FLOAT32 if alone else self.job.reduce_bytes
        if not alone and self.job.parallel.reduce_gradients == "micro_batch":
            return p + reduce + 3 * FLOAT32 / self.shards * (1 - first)
        if not alone and first == 1:
            return p + reduce
        cast = 0 if p == reduce else p + reduce
        copied = 0 if alone else 2 * reduce
        return (cast + copied) * first + (p + 2 * reduce) * (1 - first)

    # ------------------------------------------------------------ of a step

    def optimizer(self) -> float:
        """AdamW and clipping, over this rank's shards."""
        moments = {"fp32": 16, "bf16": 8 + 24, "int8": 4 + 40}[self.job.precision.optimizer_state]
        clipping, update = 3 * FLOAT32, 3 * FLOAT32 + moments
        return self.elements / self.shards * (clipping + update) / self.bandwidth

    def exposed(self, traffic: Iterable[Collective], compute: float) -> dict[str, float]:
        """Seconds that nothing is computed in, by axis.

        What FSDP2 sends hides behind the computation: what remains is what exceeds it, the first
        gather and the last sum, and by how much the two disturb each other.
        """
        beside: dict[str, float] = defaultdict(float)
        waited: dict[str, float] = defaultdict(float)
        overlaps = self.job.accelerator == "cuda"
        for each in traffic:
            seconds = self.collective(each)
            hidden = overlaps and each.part in ("weights", "gradients") and each.axis != "tp"
            (beside if hidden else waited)[each.axis] += seconds
        if self.job.parallel.async_tp and "tp" in waited:
            waited["tp"] /= 2  # the products that feed a scatter and follow a gather hide it
        together = sum(beside.values())
        if together:
            ends = 1 / (self.job.model.n_layers * self.job.micro_batches)
            left = max(together - compute, together * ends) + BESIDE * min(together, compute)
            for axis, seconds in beside.items():
                waited[axis] += left * seconds / together
        return dict(waited)

    def collective(self, each: Collective) -> float:
        """Seconds of `count` collectives together."""
        reach, inside = span(each.axis, self.job.mesh, self.hardware.devices_per_node)
        hardware = self.hardware
        speed, latency = hardware.link_gb_s, hardware.link_latency_us
        if reach > hardware.devices_per_node:
            # A ring for every adapter of the group's ranks in a node.
            speed, latency = min(speed, hardware.network_gb_s * inside), hardware.network_latency_us
        sending = float(each.sent) * self.sharing / (speed * 1e9)
        return sending + each.count * latency * 1e-6


def span(axis: str, mesh: MeshShape, devices_per_node: int) -> tuple[int, int]:
    """From first to last rank of a group that spans these axes, and how many of it a node has.

    Neighbours in rank share a node, tp innermost.
    """
    spanned = axis.split("+")
    stride, reach, inside = 1, 1, 1
    for name, size in zip(reversed(AXES), reversed(mesh.sizes), strict=True):
        if name in spanned:
            reach = stride * size
            inside *= max(min(size, devices_per_node // stride), 1)
        stride *= size
    return reach, inside


def _elements(matrices: list[tuple[int, int]]) -> int:
    """Of all of them, by rows and columns."""
    return sum(rows * columns for rows, columns in matrices)
