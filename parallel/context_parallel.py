"""The context axis: the tokens of each sequence dealt to the ranks, as in the Llama 3 paper.

A sequence is cut into 2·cp chunks, and each rank takes one from the head and its mirror image from
the tail, so that all do as much causal work (arXiv:2407.21783, section 3.3.2). Keys and values are
gathered over the axis, queries stay local. What goes in and comes out is whole: peers read the
same samples and get the same loss, as tensor-parallel peers do.
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

# PyTorch 2.12 renamed it.
_all_gather: Any = (
    functional.all_gather_single_autograd
    if hasattr(functional, "all_gather_single_autograd")
    else functional.all_gather_tensor_autograd
)


def apply_context_parallel(model: Llama, mesh: DeviceMesh) -> None:
    """Makes `model` compute on its part of each sequence, over the one-axis `mesh`, in place.

    The length of the sequences it is called with is a multiple of twice the axis.
    """
    context = _Context(mesh)
    model.kernel = _GatheringKernel(model.kernel, context)
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = model.kernel
    model.register_forward_pre_hook(context.cut, with_kwargs=True)
    model.register_forward_hook(context.put_together)


class _Context:
    """This rank's place on the axis, and which columns of a sequence are its own."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()

    def token_indices(self, seq: int, device: torch.device) -> Tensor:
        """(cp, seq / cp): the columns of each rank, head chunk and tail chunk, each ascending."""
        chunks = torch.arange(seq, device=device).unflatten(0, (2 * self.size, -1))
        heads, tails = chunks[: self.size], chunks[self.size :].flip(0)  # (cp, chunk) each
        return torch.cat([heads, tails], dim=1)

    def cut(self, _: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """From the arguments of `Llama.forward` on whole sequences to those on local ones."""
        names = ("tokens", "positions", "labels")
        whole = dict(zip(names, arguments, strict=False)) | named
        whole.pop("n_documents", None)  # no kernel for parts of documents asks for it
        seq = whole["tokens"].shape[1]
        own = self.token_indices(seq, whole["tokens"].device)[self.rank]  # (local seq,)
        local = {
            name: value if value is None else value[:, own]  # (batch, local seq)
            for name, value in whole.items()
        }
        return (), local | {"token_indices": own}

    def put_together(self, _: Any, __: Any, out: Tensor) -> Tensor:
        """From a local loss to that of whole sequences, or from local logits to whole ones."""
        if out.ndim == 0:
            return _SumOverContext.apply(out, self.group)
        # Logits are asked for by sampling alone, which needs no gradient.
        logits = out.full_tensor() if isinstance(out, DTensor) else out  # (batch, local seq, vocab)
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.group)
        places = self.token_indices(logits.shape[1] * self.size, logits.device)
        return torch.cat(parts, dim=1)[:, places.flatten().argsort()]  # (batch, seq, vocab)


class _GatheringKernel(AttentionKernel):
    """An attention kernel whose keys and values come from all ranks of the axis.

    They stay in the order of the ranks; the mask knows where in the sequence each of them lies.
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
        key_indices: Tensor | None = None,
        n_documents: int | None = None,
    ) -> Mask:
        assert token_indices is not None and key_indices is None
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
    """The sum of a scalar over the ranks; each rank's gradient is that of its own share."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = share.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
