"""Tensor parallelism: weight matrices sharded over ranks, activations sharded along seq in between.

The scheme of Megatron-LM with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198):
column-wise products followed by row-wise ones, so that attention and feed-forward need one
all-gather and one reduce-scatter each. The loss is computed on shards of the vocabulary.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
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

Layout = Shard | Replicate
"""Placement of hidden states (batch, seq, dim)."""


def apply_tensor_parallel(
    model: Llama, mesh: DeviceMesh, sequence_parallel: bool, loss_parallel: bool
) -> None:
    """Shard every parameter of `model` over the one-axis `mesh`, in place.

    Args:
        model: On the meta device or with weights.
        mesh: The `tp` axis; its size divides n_heads, n_kv_heads, ffn_dim and vocab_size.
        sequence_parallel: Shard activations between the products along seq; else replicate them.
        loss_parallel: Keep logits as shards of the vocabulary; else every rank gathers them, in the
            loss by chunks.
    """
    hidden_layout: Layout = Shard(1) if sequence_parallel else Replicate()

    def gathered_input(n_plain_inputs: int = 0) -> ParallelStyle:
        plain = (None,) * n_plain_inputs
        return PrepareModuleInput(
            input_layouts=(hidden_layout, *plain), desired_input_layouts=(Replicate(), *plain)
        )

    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": _VocabParallelEmbedding(hidden_layout),
        "layers.*.attention_norm": _Norm(hidden_layout),
        "layers.*.attention": gathered_input(n_plain_inputs=2),  # rotations, mask
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=hidden_layout),
        "layers.*.ffn_norm": _Norm(hidden_layout),
        "layers.*.feed_forward": gathered_input(),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=hidden_layout),
        "norm": _Norm(hidden_layout),
        "output": ColwiseParallel(
            input_layouts=hidden_layout,
            output_layouts=Shard(-1) if loss_parallel else Replicate(),
            use_local_output=not loss_parallel,
        ),
    }
    # A pipeline stage may lack the modules around the blocks, or all blocks.
    here = {
        name for name, child in model.named_children() if name != "layers" or [*child.children()]
    }
    plan = {name: style for name, style in plan.items() if name.split(".")[0] in here}
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    vocabulary: Vocabulary = GatheredVocabulary(mesh)
    if loss_parallel:
        vocabulary = ShardedVocabulary(mesh, model.config.vocab_size)
    model.loss = VocabParallelCrossEntropySum(vocabulary=vocabulary)


class _Norm(SequenceParallel):
    """A norm whose weight is a DTensor, as gradient clipping and checkpoints require.

    Args:
        layout: Placement of input and output.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.sequence_sharding = (layout,)  # type: ignore[assignment]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, RMSNorm)
        module.function = F.rms_norm  # supported by DTensor
        return super()._apply(module, device_mesh)


class _VocabParallelEmbedding(ParallelStyle):
    """Each rank looks up the tokens of its vocabulary shard; the results are summed.

    DTensor's own implementation allocates a gradient of the complete vocabulary on every rank.

    Args:
        layout: Placement of the result (batch, seq, dim).
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding)
        module.weight = nn.Parameter(distribute_tensor(module.weight, device_mesh, [Shard(0)]))
        module.forward = partial(self._lookup, module, device_mesh)  # type: ignore[method-assign]
        return module

    def _lookup(self, module: nn.Embedding, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
        """(batch, seq) -> local shard of (batch, seq, dim) in the layout."""
        assert isinstance(module.weight, DTensor)
        weight = module.weight.to_local()  # (local vocab, dim)
        row = tokens - mesh.get_local_rank() * len(weight)  # (batch, seq)
        not_local = (row < 0) | (row >= len(weight))  # (batch, seq)
        partial_sum = F.embedding(row.masked_fill(not_local, 0), weight)  # (batch, seq, dim)
        partial_sum = partial_sum.masked_fill(not_local.unsqueeze(-1), 0.0)
        output = DTensor.from_local(partial_sum, mesh, [Partial()], run_check=False)
        return output.redistribute(placements=[self.layout]).to_local()


class VocabParallelCrossEntropySum(CrossEntropySum):
    """`CrossEntropySum` with the head's weight sharded over the ranks."""

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over all targets, equal on all ranks.

        Args:
            hidden: (batch, seq, dim), sharded over seq or replicated.
            weight: (vocab, dim), sharded evenly over vocab.
            labels: (batch, seq), equal on all ranks.
        """
        assert isinstance(hidden, DTensor) and isinstance(weight, DTensor)
        gathered = hidden.redistribute(placements=[Replicate()])
        # The local gradient is the term of this rank's vocabulary shard.
        local = gathered.to_local(grad_placements=[Partial()])
        return super().forward(local, weight.to_local(), labels)


class ShardedVocabulary(Vocabulary):
    """Each rank computes on its local logits; only float32 scalars per token are reduced.

    These are the maximum and, in one all-reduce, the sum of exponentials and the target's logit.
    """

    def __init__(self, mesh: DeviceMesh, vocab_size: int) -> None:
        self.group = mesh.get_group()
        self.first = mesh.get_local_rank() * (vocab_size // mesh.size())

    def maximum_(self, values: Tensor) -> None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)

    def sum_(self, values: Tensor) -> None:
        dist.all_reduce(values, group=self.group)


class GatheredVocabulary(Vocabulary):
    """Each rank gathers the logits of a chunk over the complete vocabulary."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def gather(self, logits: Tensor) -> Tensor:
        shards = [torch.empty_like(logits) for _ in range(self.ranks)]
        dist.all_gather(shards, logits, group=self.group)
        return torch.cat(shards, dim=-1)

    def local(self, gradient: Tensor) -> Tensor:
        return gradient.chunk(self.ranks, dim=-1)[self.rank]
