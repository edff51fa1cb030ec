"""Context parallelism: the tokens of each sequence sharded over ranks, as in the Llama 3 paper.

A sequence is split into 2·cp chunks; each rank takes one chunk from the first half and its mirror
image from the second half, which balances causal attention (arXiv:2407.21783, section 3.3.2). Keys
and values are gathered over the axis, queries stay local. The model's inputs and outputs remain
complete: all ranks of the axis read the same samples and return the same loss.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from model.attention import AttentionKernel, Mask
from model.llama import Attention, Llama

# Renamed in PyTorch 2.12.
_all_gather: Any = (
    functional.all_gather_single_autograd
    if hasattr(functional, "all_gather_single_autograd")
    else functional.all_gather_tensor_autograd
)


def apply_context_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Shard sequences over the one-axis `mesh`, in place.

    The model must be called with a sequence length that is a multiple of twice the axis size.
    """
    context = _Context(mesh)
    model.kernel = _GatheringKernel(model.kernel, context)
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = model.kernel
    model.register_forward_pre_hook(context.shard, with_kwargs=True)
    model.register_forward_hook(context.combine, with_kwargs=True)


class _Context:
    """Sharding of a sequence over the ranks of the axis."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def token_indices(self, seq: int, device: torch.device) -> Tensor:
        """Return the columns of each rank, first and mirrored chunk: (cp, seq / cp)."""
        chunks = torch.arange(seq, device=device).unflatten(0, (2 * self.size, -1))
        first, mirrored = chunks[: self.size], chunks[self.size :].flip(0)  # each (cp, chunk)
        return torch.cat([first, mirrored], dim=1)  # (cp, seq / cp)

    def shard(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the arguments of `Llama.forward` by the local columns."""
        inputs = dict(zip(("tokens", "positions", "labels"), args, strict=False)) | kwargs
        inputs.pop("n_documents", None)  # only needed by varlen, which needs complete documents
        # The output of another pipeline stage is local already.
        others = {name: inputs.pop(name) for name in ("hidden", "part") if name in inputs}
        tokens = inputs["tokens"]
        columns = self.token_indices(tokens.shape[1], tokens.device)[self.rank]  # (local seq,)
        local = {
            name: value if value is None else value[:, columns]  # (batch, local seq)
            for name, value in inputs.items()
        }
        return (), local | others | {"token_indices": columns}

    def combine(self, _: Any, __: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        """Sum the local losses, or gather the local logits."""
        if (part := kwargs.get("part")) is not None and not part.has_head:
            return out
        if out.ndim == 0:
            return _SumOverContext.apply(out, self.group)
        # Only sampling needs logits; it needs no gradient.
        logits = out.full_tensor() if isinstance(out, DTensor) else out  # (batch, local seq, vocab)
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        columns = self.token_indices(logits.shape[1] * self.size, logits.device).flatten()
        return torch.cat(parts, dim=1)[:, columns.argsort()]  # (batch, seq, vocab)


class _GatheringKernel(AttentionKernel):
    """An attention kernel that gathers keys and values from all ranks of the axis.

    They stay in the order of the ranks; the mask is built from their indices in the sequence.
    """

    def __init__(self, kernel: AttentionKernel, context: _Context) -> None:
        super().__init__(kernel.choice)
        self.kernel = kernel
        self.context = context

    def mask(
        self,
        positions: Tensor | None,
        token_indices: Tensor | None,
        like: Tensor,
        *_: Any,
        **__: Any,
    ) -> Mask:
        assert token_indices is not None
        seq = len(token_indices) * self.context.size
        keys = self.context.token_indices(seq, token_indices.device).flatten()  # (seq,)
        return self.kernel.mask(positions, token_indices, like, keys)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        local = torch.stack([k, v])  # (2, batch, local seq, kv_heads, head_dim)
        gathered = _all_gather(local, 0, self.context.group)  # (cp * 2, batch, local seq, …)
        gathered = gathered.unflatten(0, (self.context.size, 2))  # (cp, 2, batch, local seq, …)
        k, v = gathered.movedim(0, 2).flatten(2, 3)  # each (batch, seq, kv_heads, head_dim)
        return self.kernel(q, k, v, mask)


class _SumOverContext(torch.autograd.Function):
    """Sum of a scalar over the ranks; each local term has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
