"""Communication volume of one training step in closed form: collectives by axis and kind.

Each function counts what one transform of `parallelize` communicates; a test compares the result
exactly with a step on fake tensors. Integer arithmetic only, so meshes of any size are cheap.
Excluded: logging, validation and checkpoints, communication that the compiler adds by
recomputation, and the scales of fp8 products, one number per tensor or row.

Payload bytes count the complete tensor: the output of an all-gather, the input of a
reduce-scatter. Sent bytes are the bound of ring algorithms (Patarasuk and Yuan 2009, "Bandwidth
optimal all-reduce algorithms").
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Literal

from model.config import ModelConfig, ModelPart
from parallel.config import ParallelConfig
from parallel.mesh import AXES, DATA_AXES, MeshShape
from parallel.pipeline_schedule import parts_of_rank
from parallel.step_scalars import N_EXTRA_SCALARS

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "send"]

FLOAT32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Collective:
    """`count` collectives of one kind in a group of `ranks` processes.

    Attributes:
        axis: Mesh axes larger than 1 that the group spans, as in "tp" or "dp_shard+cp".
        payload: Total bytes of the complete tensors of all `count` collectives.
        part: Purpose, for reports.
    """

    axis: str
    ranks: int
    kind: Kind
    count: int
    payload: int
    part: str = ""

    @property
    def sent(self) -> Fraction:
        """Bytes sent per rank: S·(n-1)/n for payload S over n ranks, twice that for all-reduce.

        A send goes to one other rank.
        """
        if self.kind == "send":
            return Fraction(self.payload)
        times = 2 if self.kind == "all_reduce" else 1
        return Fraction(times * self.payload * (self.ranks - 1), self.ranks)


@dataclass(frozen=True)
class Step:
    """Batch and element sizes of one step on one rank.

    Attributes:
        micro_batch_size: Sequences of `seq_len` tokens per micro-batch.
        param_bytes: Element size in forward and backward.
        reduce_bytes: Element size in the reduction of gradients.
        head_chunk: Tokens per chunk of logits (`model.loss.CHUNK`).
        norm_bytes: Element size of the all-reduce of the gradient norm (8 on CPU, else 4).
        fp8_gather: Gather the blocks' matrices in fp8 (`parallel.float8.gather_in_float8`).
    """

    micro_batches: int
    micro_batch_size: int
    seq_len: int
    param_bytes: int
    reduce_bytes: int
    head_chunk: int
    norm_bytes: int = FLOAT32
    fp8_gather: bool = False


@dataclass(frozen=True)
class _Plan:
    """Configuration from which all functions below compute."""

    model: ModelConfig
    mesh: MeshShape
    parallel: ParallelConfig
    step: Step
    stage: int

    @cached_property
    def parts(self) -> list[ModelPart]:
        """What the pipeline rank has of the model."""
        return parts_of_rank(self.model, self.parallel, self.mesh.pp, self.stage)

    @property
    def layers(self) -> int:
        return sum(len(part.layers) for part in self.parts)

    @property
    def has_embedding(self) -> bool:
        return self.parts[0].has_embedding

    @property
    def has_head(self) -> bool:
        return self.parts[-1].has_head

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch per tensor-parallel group."""
        return self.step.micro_batch_size * self.step.seq_len // self.mesh.cp

    @property
    def hidden(self) -> int:
        """Bytes of the activations between two blocks, (batch, seq / cp, dim)."""
        return self.tokens * self.model.dim * self.step.param_bytes

    @property
    def reductions(self) -> int:
        """Reductions of the gradients over the shards per step."""
        every = self.parallel.reduce_gradients == "micro_batch"
        return self.step.micro_batches if every else 1

    def over(
        self, axes: Iterable[str], kind: Kind, count: int, payload: int, part: str
    ) -> Collective:
        """Return `count` collectives of `payload` bytes in total in the group of `axes`."""
        sizes = {axis: getattr(self.mesh, axis) for axis in axes if getattr(self.mesh, axis) > 1}
        return Collective("+".join(sizes), prod(sizes.values()), kind, count, payload, part)


def step_traffic(
    model: ModelConfig, mesh: MeshShape, parallel: ParallelConfig, step: Step, stage: int = 0
) -> list[Collective]:
    """Return the collectives of one step on one rank, which are the same on all ranks of a stage.

    Groups of one process are omitted.

    Args:
        stage: Index of the pipeline rank.
    """
    plan = _Plan(model, mesh, parallel.of_stage(stage), step, stage)
    parts = [_weights, _activations, _norm_gradients, _head, _context, _pipeline, _scalars]
    collectives = [each for part in parts for each in part(plan)]
    return [each for each in collectives if each.ranks > 1 and each.count]


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, Kind], tuple[int, int]]:
    """Return count and payload in bytes by axis and kind."""
    found: dict[tuple[str, Kind], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for each in collectives:
        count, payload = found[each.axis, each.kind]
        found[each.axis, each.kind] = count + each.count, payload + each.payload
    return dict(found)


# ---------------------------------------------------------------- weights and their gradients


def block_matrices(model: ModelConfig, tp: int) -> list[tuple[int, int]]:
    """Return the local shapes of a block's parameters; norms as (dim, 1)."""
    dim, ffn, kv = model.dim, model.ffn_dim // tp, model.n_kv_heads * model.head_dim // tp
    attention = [(dim // tp, dim), (kv, dim), (kv, dim), (dim, dim // tp)]
    return [*attention, (ffn, dim), (ffn, dim), (dim, ffn), (dim, 1), (dim, 1)]


def root_matrices(
    model: ModelConfig, tp: int, has_embedding: bool = True, has_head: bool = True
) -> list[tuple[int, int]]:
    """Return the local shapes of embedding, head unless it is the same weight, and last norm."""
    weights = has_embedding + has_head
    if model.tie_embeddings:
        weights = min(weights, 1)
    return [(model.vocab_size // tp, model.dim)] * weights + [(model.dim, 1)] * has_head


def _weights(plan: _Plan) -> list[Collective]:
    """Return the weight gathers and gradient reductions of FSDP2.

    Each block and the root are one flat tensor each, padded to equal shards. Blocks that are
    resharded after forward, by default all but the last, are gathered in the forward and in the
    backward of each micro-batch, others once per step. In a pipeline no block is by default.
    Gradients are reduce-scattered in the last
    or in every micro-batch, and with replicas their shards are all-reduced in the last one.
    """
    mesh, step = plan.mesh, plan.step
    sharded = ("dp_shard", "cp")
    ranks = mesh.dp_shard * mesh.cp

    def elements(matrices: list[tuple[int, int]]) -> int:
        return sum(-(-rows // ranks) * ranks * columns for rows, columns in matrices)

    layers, reshard = plan.layers, plan.parallel.reshard_after_forward
    resharded = (layers - 1) * (mesh.pp == 1) if reshard is None else layers * reshard
    block = block_matrices(plan.model, mesh.tp)
    in_fp8 = [each for each in block[:-2] if step.fp8_gather and each[0] % ranks == 0]
    root = root_matrices(plan.model, mesh.tp, plan.has_embedding, plan.has_head)
    groups = [  # (count, elements of each, elements in fp8, count of resharded ones)
        (layers, elements(block), elements(in_fp8), resharded),
        (bool(root), elements(root), 0, 0),
    ]
    found = []
    for count, size, narrow, freed in groups:
        gathers = 2 * step.micro_batches * freed + count - freed
        weights, gradients = (size - narrow) * step.param_bytes + narrow, size * step.reduce_bytes
        reduced = count * plan.reductions
        replicated = count * gradients // ranks
        found += [
            plan.over(sharded, "all_gather", gathers, gathers * weights, "weights"),
            plan.over(sharded, "reduce_scatter", reduced, reduced * gradients, "gradients"),
            plan.over(["dp_replicate"], "all_reduce", count, replicated, "gradients"),
        ]
    return found


def _norm_gradients(plan: _Plan) -> list[Collective]:
    """Return the all-reduces of norm gradients over tp.

    Norm weights are replicated over tp, so their gradients are partial sums. Each reduction
    of gradients sums a vector of dim per norm, in the dtype of the reduction if it accumulates
    several micro-batches, else in the activations' dtype. Without sequence parallelism the gradient
    of the last norm is already complete.
    """
    step = plan.step
    element = step.reduce_bytes if step.micro_batches > plan.reductions else step.param_bytes
    last = plan.has_head and plan.parallel.sequence_parallel
    norms = (2 * plan.layers + last) * plan.reductions
    return [plan.over(["tp"], "all_reduce", norms, norms * plan.model.dim * element, "gradients")]


# ---------------------------------------------------------------- activations


def _activations(plan: _Plan) -> list[Collective]:
    """Return the collectives of tensor parallelism in the blocks and after the embedding.

    With sequence parallelism (arXiv:2205.05198) the forward all-gathers before attention and before
    feed-forward and reduce-scatters after each; the backward does the reverse. The embedding
    reduce-scatters, and all-gathers in its backward. Without sequence parallelism an all-reduce
    replaces each pair, and the embedding's backward does not communicate.

    Recomputation repeats collectives whose results the backward needs: both all-gathers, and with
    `full` the reduction after attention; none after feed-forward.
    """
    checkpoint = plan.parallel.activation_checkpoint
    gathered = 2 if checkpoint in ("full", "selective") else 0
    summed = 1 if checkpoint == "full" else 0

    def collectives(kind: Kind, recomputed: int) -> Collective:
        count = plan.step.micro_batches * (plan.layers * (4 + recomputed) + plan.has_embedding)
        return plan.over(["tp"], kind, count, count * plan.hidden, "activations")

    if not plan.parallel.sequence_parallel:
        return [collectives("all_reduce", summed)]
    return [collectives("all_gather", gathered), collectives("reduce_scatter", summed)]


def _head(plan: _Plan) -> list[Collective]:
    """Return the collectives of the head's input and its gradient, and of the loss.

    Loss parallelism all-reduces, per chunk of tokens in float32, the maximum, and together the sum
    of exponentials and the target's logit. Without it the logits of each chunk are gathered.
    """
    if not plan.has_head:
        return []
    step = plan.step
    n_micro = step.micro_batches
    kinds: tuple[Kind, ...] = ("all_gather", "reduce_scatter")
    if not plan.parallel.sequence_parallel:
        kinds = ("all_reduce",)
    found = [plan.over(["tp"], kind, n_micro, n_micro * plan.hidden, "head") for kind in kinds]
    chunks = n_micro * -(-plan.tokens // step.head_chunk)
    tokens = n_micro * plan.tokens
    if plan.parallel.loss_parallel:
        return [*found, plan.over(["tp"], "all_reduce", 2 * chunks, 3 * tokens * FLOAT32, "loss")]
    logits = tokens * plan.model.vocab_size * step.param_bytes
    return [*found, plan.over(["tp"], "all_gather", chunks, logits, "loss")]


def _context(plan: _Plan) -> list[Collective]:
    """Return the collectives of context parallelism.

    Each block all-gathers keys and values of the sequence in one tensor. The backward
    reduce-scatters their gradient; recomputation gathers again. The float32 loss of each
    micro-batch is summed.
    """
    model, step = plan.model, plan.step
    width = 2 * model.n_kv_heads // plan.mesh.tp * model.head_dim
    keys_values = step.micro_batch_size * step.seq_len * width * step.param_bytes
    n_reductions, losses = plan.layers * step.micro_batches, plan.has_head * step.micro_batches
    recomputes = plan.parallel.activation_checkpoint in ("full", "selective")
    gathers = n_reductions * (2 if recomputes else 1)
    return [
        plan.over(["cp"], "all_gather", gathers, gathers * keys_values, "context"),
        plan.over(["cp"], "reduce_scatter", n_reductions, n_reductions * keys_values, "context"),
        plan.over(["cp"], "all_reduce", losses, losses * FLOAT32, "loss"),
    ]


def _pipeline(plan: _Plan) -> list[Collective]:
    """Return the sends of hidden states to the next stage and of their gradients back.

    They are as between two blocks. The first and the last rank sum the gradient of a tied weight.
    """
    if plan.mesh.pp == 1:
        return []
    shards = plan.mesh.tp if plan.parallel.sequence_parallel else 1
    sends = sum((not part.has_embedding) + (not part.has_head) for part in plan.parts)
    sends *= plan.step.micro_batches
    found = [plan.over(["pp"], "send", sends, sends * plan.hidden // shards, "pipeline")]
    if plan.model.tie_embeddings and (plan.has_embedding or plan.has_head):
        rows = -(-plan.model.vocab_size // plan.mesh.tp // (plan.mesh.dp_shard * plan.mesh.cp))
        gradient = rows * plan.model.dim * FLOAT32
        found.append(Collective("pp", 2, "all_reduce", 1, gradient, "gradients"))
    return found


# ---------------------------------------------------------------- once per step


def _scalars(plan: _Plan) -> list[Collective]:
    """Return the reductions of squared norm, loss, requests, targets and batch hash."""
    counts = [plan.over([axis], "all_reduce", 1, 2 * INT64, "scalars") for axis in DATA_AXES]
    size = (1 + N_EXTRA_SCALARS) * plan.step.norm_bytes
    return [plan.over(AXES, "all_reduce", 1, size, "scalars"), *counts]
