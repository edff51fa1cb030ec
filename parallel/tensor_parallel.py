"""The tensor axis: weight matrices cut across ranks, activations cut along seq between them.

The plan of Megatron-LM with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198):
column-wise products, then row-wise ones, so that a block needs one gather and one scatter around
attention and one around the feed-forward. The loss is computed on shards of the vocabulary.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model.llama import Llama
from model.loss import CrossEntropySum, Vocabulary
from model.norm import RMSNorm


def apply_tensor_parallel(
    model: Llama, mesh: DeviceMesh, *, sequence_parallel: bool, loss_parallel: bool
) -> None:
    """Shards every parameter of `model` over the one-axis `mesh`, in place.

    Args:
        model: On the meta device or with its weights.
        mesh: The `tp` axis; its size divides heads, kv heads, ffn_dim and vocab.
        sequence_parallel: Activations between the products are local shards along seq; else whole.
        loss_parallel: The logits stay local shards of the vocabulary; else every rank gathers them,
            in the loss those of a chunk.
    """
    between = Shard(1) if sequence_parallel else Replicate()  # of (batch, seq, dim)

    def gathered_input(other_inputs: int = 0) -> ParallelStyle:
        plain = (None,) * other_inputs
        return PrepareModuleInput(
            input_layouts=(between, *plain), desired_input_layouts=(Replicate(), *plain)
        )

    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": _VocabParallelEmbedding(between),
            "norm": _Norm(between),
            "output": ColwiseParallel(
                input_layouts=between,
                output_layouts=Shard(-1) if loss_parallel else Replicate(),
                use_local_output=not loss_parallel,
            ),
        },
    )
    for block in model.layers:
        parallelize_module(
            block,
            mesh,
            {
                "attention_norm": _Norm(between),
                "attention": gathered_input(other_inputs=2),  # rotations, mask
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=between),
                "ffn_norm": _Norm(between),
                "feed_forward": gathered_input(),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=between),
            },
        )
    model.tie_weights()
    model.loss = VocabParallelCrossEntropySum(
        ShardedVocabulary(mesh, model.config.vocab_size)
        if loss_parallel
        else GatheredVocabulary(mesh)
    )


class _Norm(SequenceParallel):
    """A norm whose weight is a DTensor, as clipping and saving expect.

    Args:
        layout: Of what it reads and writes.
    """

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.sequence_sharding = (layout,)  # type: ignore[assignment]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        module.function = F.rms_norm  # which DTensors know
        return super()._apply(module, device_mesh)


class _VocabParallelEmbedding(ParallelStyle):
    """Each rank looks up the tokens of its part of the vocabulary; the parts are summed.

    Not DTensor's own way, in whose backward every rank makes a gradient of the whole vocabulary.

    Args:
        layout: Of the result (batch, seq, dim).
    """

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        module.weight = nn.Parameter(distribute_tensor(module.weight, device_mesh, [Shard(0)]))
        module.forward = partial(self._look_up, module, device_mesh)  # type: ignore[method-assign]
        return module

    def _look_up(self, module: nn.Embedding, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
        """(batch, seq) -> (batch, seq, dim) in the layout, local."""
        assert isinstance(module.weight, DTensor)
        weight = module.weight.to_local()  # (local vocab, dim)
        row = tokens - mesh.get_local_rank() * len(weight)
        elsewhere = (row < 0) | (row >= len(weight))  # (batch, seq)
        part = F.embedding(row.masked_fill(elsewhere, 0), weight)  # (batch, seq, dim)
        part = part.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        whole = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        return whole.redistribute(placements=[self.layout]).to_local()


class VocabParallelCrossEntropySum(CrossEntropySum):
    """`CrossEntropySum` where each rank holds a shard of the head's weight.

    Args:
        vocabulary: Says what the ranks tell each other about a chunk.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The sum over all targets, the same on every rank.

        Args:
            hidden: (batch, seq, dim), sharded over seq or whole on each rank.
            weight: (vocab, dim), sharded over vocab, a multiple of the ranks.
            labels: (batch, seq), the same on every rank.
        """
        assert isinstance(hidden, DTensor) and isinstance(weight, DTensor)
        whole = hidden.redistribute(placements=[Replicate()])
        # A rank's gradient is the part that comes through its shard of the vocabulary.
        return super().forward(
            whole.to_local(grad_placements=[Partial()]), weight.to_local(), labels
        )


class ShardedVocabulary(Vocabulary):
    """Each rank sees its local logits; only float32 scalars of each token travel.

    These are the maximum, and together the sum of exponentials and the target's logit.
    """

    def __init__(self, mesh: DeviceMesh, vocab_size: int) -> None:
        self.group = mesh.get_group()
        self.first = mesh.get_local_rank() * (vocab_size // mesh.size())

    def maximum_(self, values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.group)


class GatheredVocabulary(Vocabulary):
    """Each rank sees the whole logits of a chunk."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def gather(self, logits: Tensor) -> Tensor:
        shards = [torch.empty_like(logits) for _ in range(self.ranks)]
        dist.all_gather(shards, logits, group=self.group)
        return torch.cat(shards, dim=-1)

    def local(self, gradient: Tensor) -> Tensor:
        return gradient.chunk(self.ranks, dim=-1)[self.rank]
