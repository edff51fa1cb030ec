"""What a step sends: how many collectives of which kind on which axis, in closed form.

One function for each part of the plan; each formula counts what `parallelize` makes the processes
do, and a test holds it against a traced step (`parallel.trace`), exactly. Integers alone, so that a
mesh of any size costs nothing. Left out is what is not of every step (logging, validation, saving),
what the compiler decides (what it sends again to recompute), and the scales
that fp8 products agree on over tp, a number for a tensor or a row.

Bytes are a collective's payload: the whole tensor, of which a rank of an all-gather holds one part
before, and of a reduce-scatter after. What a rank sends of it is the ring algorithms' bound
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms"), see `Collective.sent`.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.mesh import DATA_AXES, MeshShape
from parallel.step_scalars import N_EXTRA_SCALARS

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]

FLOAT32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Collective:
    """`count` collectives of one kind in a group of `ranks` processes.

    `axis` names the mesh axes that the group spans, those of size 1 left out: "tp", "dp_shard+cp".
    `payload` is the sum over them of the whole tensors, in bytes; `part` says what they are for.
    """

    axis: str
    ranks: int
    kind: Kind
    count: int
    payload: int
    part: str = ""

    @property
    def sent(self) -> Fraction:
        """Bytes that a rank sends: S·(n-1)/n of S over n ranks, to reduce to all twice as many."""
        times = 2 if self.kind == "all_reduce" else 1
        return Fraction(times * self.payload * (self.ranks - 1), self.ranks)


@dataclass(frozen=True)
class Step:
    """What a rank computes in a step, and in which number formats.

    `micro_batch_size` counts sequences of `seq_len` tokens, `head_chunk` the tokens whose logits
    exist at once (`model.loss.CHUNK`). `param_bytes` is an element's size in forward and backward,
    `reduce_bytes` in the sum of gradients, `norm_bytes` in the sum of their squares and of
    what travels with it (8 on CPU, else 4).
    """

    micro_batches: int
    micro_batch_size: int
    seq_len: int
    param_bytes: int
    reduce_bytes: int
    head_chunk: int
    norm_bytes: int = FLOAT32


@dataclass(frozen=True)
class _Plan:
    """The whole configuration, as every part below reads it."""

    model: ModelConfig
    mesh: MeshShape
    parallel: ParallelConfig
    step: Step

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank and its tp peers compute."""
        return self.step.micro_batch_size * self.step.seq_len // self.mesh.cp

    @property
    def hidden(self) -> int:
        """Bytes of the activations between two blocks, (batch, local seq of cp, dim)."""
        return self.tokens * self.model.dim * self.step.param_bytes

    @property
    def reductions(self) -> int:
        """How often in a step gradients are summed over the shards."""
        every = self.parallel.reduce_gradients == "micro_batch"
        return self.step.micro_batches if every else 1

    def over(
        self, axes: Iterable[str], kind: Kind, count: int, payload: int, part: str
    ) -> Collective:
        """`count` collectives of `payload` bytes together in a group that spans `axes`."""
        spanned = [axis for axis in axes if getattr(self.mesh, axis) > 1]
        ranks = 1
        for axis in spanned:
            ranks *= getattr(self.mesh, axis)
        return Collective("+".join(spanned), ranks, kind, count, payload, part)


def step_traffic(
    model: ModelConfig, mesh: MeshShape, parallel: ParallelConfig, step: Step
) -> list[Collective]:
    """The collectives that each rank takes part in during a step; all ranks send alike.

    Groups of one process are left out: they send nothing.
    """
    plan = _Plan(model, mesh, parallel, step)
    parts = [_weights, _activations, _norm_gradients, _head, _context, _scalars]
    collectives = [each for part in parts for each in part(plan)]
    return [each for each in collectives if each.ranks > 1 and each.count]


def totals(collectives: Iterable[Collective]) -> dict[tuple[str, Kind], tuple[int, int]]:
    """Count and payload in bytes by axis and kind."""
    found: dict[tuple[str, Kind], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for each in collectives:
        count, payload = found[each.axis, each.kind]
        found[each.axis, each.kind] = count + each.count, payload + each.payload
    return dict(found)


# ---------------------------------------------------------------- weights and their gradients


def block_matrices(model: ModelConfig, tp: int) -> list[tuple[int, int]]:
    """Rows and columns of a block's parameters, cut over tp: norms whole, wo and w2 by columns."""
    dim, ffn, kv = model.dim, model.ffn_dim // tp, model.n_kv_heads * model.head_dim // tp
    attention = [(dim // tp, dim), (kv, dim), (kv, dim), (dim, dim // tp)]
    return [*attention, (ffn, dim), (ffn, dim), (dim, ffn), (dim, 1), (dim, 1)]


def root_matrices(model: ModelConfig, tp: int) -> list[tuple[int, int]]:
    """Rows and columns of what lies around the blocks: embedding, head unless tied, last norm."""
    embeddings = 1 if model.tie_embeddings else 2
    return [(model.vocab_size // tp, model.dim)] * embeddings + [(model.dim, 1)]


def _weights(plan: _Plan) -> list[Collective]:
    """FSDP2: groups are each block and the root; a group is one tensor, padded to equal shards.

    A micro-batch gathers the blocks that are freed in between, by default all but the last, in its
    forward and in its backward; what stays gathered is gathered once a step. The last micro-batch,
    or each, sums the gradients: a reduce-scatter of each group; the last all-reduces what it leaves
    of it where there are replicas.
    """
    mesh, step, sharded = plan.mesh, plan.step, ("dp_shard", "cp")
    ranks = mesh.dp_shard * mesh.cp

    def elements(matrices: list[tuple[int, int]]) -> int:
        return sum(-(-rows // ranks) * ranks * columns for rows, columns in matrices)

    layers, reshard = plan.model.n_layers, plan.parallel.reshard_after_forward
    again = layers - 1 if reshard is None else layers * reshard
    groups = [  # (how many, elements of each, how many are freed in between)
        (layers, elements(block_matrices(plan.model, mesh.tp)), again),
        (1, elements(root_matrices(plan.model, mesh.tp)), 0),
    ]
    found = []
    for count, size, freed in groups:
        gathers = 2 * step.micro_batches * freed + count - freed
        weights, gradients = size * step.param_bytes, size * step.reduce_bytes
        sums = count * plan.reductions
        found += [
            plan.over(sharded, "all_gather", gathers, gathers * weights, "weights"),
            plan.over(sharded, "reduce_scatter", sums, sums * gradients, "gradients"),
            plan.over(
                ["dp_replicate"], "all_reduce", count, count * gradients // ranks, "gradients"
            ),
        ]
    return found


def _norm_gradients(plan: _Plan) -> list[Collective]:
    """The weights of the norms are whole on every tp rank, their gradients are parts of a sum.

    With each sum of gradients, a vector of dim for each norm: in the sum's format where several
    micro-batches have been added up in it, in the activations' where there is one. Without
    sequence parallelism the last norm's gradient comes from a sum and is whole already.
    """
    step = plan.step
    element = step.reduce_bytes if step.micro_batches > plan.reductions else step.param_bytes
    norms = (2 * plan.model.n_layers + plan.parallel.sequence_parallel) * plan.reductions
    return [plan.over(["tp"], "all_reduce", norms, norms * plan.model.dim * element, "gradients")]


# ---------------------------------------------------------------- activations


def _activations(plan: _Plan) -> list[Collective]:
    """Tensor parallelism around the products of a block, and behind the embedding.

    With sequence parallelism (arXiv:2205.05198) the forward gathers before attention and before
    feed-forward and reduce-scatters behind each, and the backward does the opposite in each place;
    the embedding reduce-scatters, and its backward gathers. Without, an all-reduce takes the
    place of each pair, and the embedding's backward sends nothing.

    Recomputation sends again what led to a tensor that the backward needs and was not kept: both
    gathers, and under `full` what comes behind attention; behind feed-forward nothing is needed.
    """
    kept = plan.parallel.activation_checkpoint
    gathered = 2 if kept in ("full", "selective") else 0
    summed = 1 if kept == "full" else 0

    def collectives(kind: Kind, again: int) -> Collective:
        count = plan.step.micro_batches * (plan.model.n_layers * (4 + again) + 1)
        return plan.over(["tp"], kind, count, count * plan.hidden, "activations")

    if not plan.parallel.sequence_parallel:
        return [collectives("all_reduce", summed)]
    return [collectives("all_gather", gathered), collectives("reduce_scatter", summed)]


def _head(plan: _Plan) -> list[Collective]:
    """The head's input and its gradient, and the loss.

    With loss parallelism each token's maximum travels, and together its sum of exponentials and
    its target's logit, in float32; without, the logits are gathered. Chunk by chunk of tokens.
    """
    step, tp, micro = plan.step, ["tp"], plan.step.micro_batches
    hidden = micro * plan.hidden
    if plan.parallel.sequence_parallel:
        found = [
            plan.over(tp, "all_gather", micro, hidden, "head"),
            plan.over(tp, "reduce_scatter", micro, hidden, "head"),
        ]
    else:
        found = [plan.over(tp, "all_reduce", micro, hidden, "head")]
    chunks, tokens = micro * -(-plan.tokens // step.head_chunk), micro * plan.tokens
    if plan.parallel.loss_parallel:
        return [*found, plan.over(tp, "all_reduce", 2 * chunks, 3 * tokens * FLOAT32, "loss")]
    logits = tokens * plan.model.vocab_size * step.param_bytes
    return [*found, plan.over(tp, "all_gather", chunks, logits, "loss")]


def _context(plan: _Plan) -> list[Collective]:
    """Context parallelism: a block gathers K and V of the whole sequence, in one tensor.

    The backward reduce-scatters their gradient; recomputation gathers once more. The loss of a
    micro-batch, a float32, is summed.
    """
    model, step, cp = plan.model, plan.step, ["cp"]
    width = 2 * model.n_kv_heads // plan.mesh.tp * model.head_dim
    whole = step.micro_batch_size * step.seq_len * width * step.param_bytes
    sums = model.n_layers * step.micro_batches
    gathers = sums * (2 if plan.parallel.activation_checkpoint in ("full", "selective") else 1)
    return [
        plan.over(cp, "all_gather", gathers, gathers * whole, "context"),
        plan.over(cp, "reduce_scatter", sums, sums * whole, "context"),
        plan.over(cp, "all_reduce", step.micro_batches, step.micro_batches * FLOAT32, "loss"),
    ]


# ---------------------------------------------------------------- once a step


def _scalars(plan: _Plan) -> list[Collective]:
    """Squared norm, loss, requests over all processes; targets and hash over each data axis."""
    everyone = ("dp_replicate", "dp_shard", "cp", "tp")
    counts = [plan.over([axis], "all_reduce", 1, 2 * INT64, "scalars") for axis in DATA_AXES]
    size = (1 + N_EXTRA_SCALARS) * plan.step.norm_bytes
    return [plan.over(everyone, "all_reduce", 1, size, "scalars"), *counts]
