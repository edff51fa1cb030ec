"""The tensor axis: weight matrices cut across ranks, activations cut along seq between them.

The plan of Megatron-LM with sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198):
column-wise products, then row-wise ones, so that a block needs one gather and one scatter around
attention and one around the feed-forward. The loss is computed on shards of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from model.llama import Llama
from model.loss import IGNORE


def apply_tensor_parallel(
    model: Llama, mesh: DeviceMesh, *, sequence_parallel: bool, loss_parallel: bool
) -> None:
    """Shards every parameter of `model` over the one-axis `mesh`, in place.

    Args:
        model: On the meta device or with its weights.
        mesh: The `tp` axis; its size divides heads, kv heads, ffn_dim and vocab.
        sequence_parallel: Activations between the products are local shards along seq; else whole.
        loss_parallel: The logits stay local shards of the vocabulary; else every rank gathers them.
    """
    between = Shard(1) if sequence_parallel else Replicate()  # of (batch, seq, dim)

    def norm() -> ParallelStyle:
        return SequenceParallel() if sequence_parallel else _ReplicatedNorm()

    def gathered_input(other_inputs: int = 0) -> ParallelStyle:
        plain = (None,) * other_inputs
        return PrepareModuleInput(
            input_layouts=(between, *plain), desired_input_layouts=(Replicate(), *plain)
        )

    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "norm": norm(),
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
                "attention_norm": norm(),
                "attention": gathered_input(other_inputs=3),  # cos, sin, mask
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=between),
                "ffn_norm": norm(),
                "feed_forward": gathered_input(),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w3": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=between),
            },
        )
    model.tie_weights()
    if loss_parallel:
        model.loss = VocabParallelCrossEntropySum(mesh)


class _ReplicatedNorm(SequenceParallel):
    """A norm on whole activations whose weight is a DTensor, as clipping and saving expect."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence_sharding = (Replicate(),)  # type: ignore[assignment]


class VocabParallelCrossEntropySum(nn.Module):
    """`CrossEntropySum` on logits that are sharded over the vocabulary.

    Each rank sees its local part; only per-token scalars travel: the maximum, and together the
    sum of exponentials and the target's logit.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group = mesh.get_group()
        self.rank = mesh.get_local_rank()

    def forward(self, logits: DTensor, labels: Tensor) -> Tensor:
        """Sum over the targets of their negative log-likelihood.

        Args:
            logits: (batch, seq, vocab), sharded over vocab; vocab is a multiple of the ranks.
            labels: (batch, seq), the same on every rank; -100 where there is no target.

        Returns:
            float32 scalar, the same on every rank.
        """
        local = logits.to_local()  # (batch, seq, local vocab)
        first = self.rank * local.shape[-1]
        return _VocabParallelNLL.apply(local, labels, first, self.group)


class _VocabParallelNLL(torch.autograd.Function):
    """-log softmax at the label, summed; local logits (batch, seq, local vocab) to a scalar."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: Tensor,
        labels: Tensor,
        first: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        exponentials = logits.float()
        maximum = exponentials.amax(dim=-1)  # (batch, seq)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        exponentials = exponentials - maximum.unsqueeze(-1)
        place = labels - first
        here = (place >= 0) & (place < logits.shape[-1])
        place = place.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)  # (batch, seq, 1)
        target = exponentials.gather(-1, place).squeeze(-1) * here
        exponentials.exp_()
        totals = torch.stack([exponentials.sum(dim=-1), target])  # (2, batch, seq)
        dist.all_reduce(totals, group=group)
        wanted = labels != IGNORE
        loss = ((totals[0].log() - totals[1]) * wanted).sum()
        probabilities = exponentials.div_(totals[0].unsqueeze(-1))
        ctx.save_for_backward(probabilities, place, here, wanted)
        ctx.dtype = logits.dtype  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        probabilities, place, here, wanted = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = probabilities.scatter_add(-1, place, -here.unsqueeze(-1).to(probabilities.dtype))
        gradient.mul_((wanted * grad).unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None, None  # type: ignore[attr-defined]
