"""The head and the training loss in one, chunk by chunk of tokens: a batch's logits never exist.

A chunk's gradients are computed together with its loss, in the buffer of its logits, and the next
chunk takes the same buffer: what stays are the gradients of the hidden states and of the weight.
The loss is a sum, so that only the caller decides what to divide by. A parallel plan tells by a
`Vocabulary` of its own which part of the vocabulary a process holds.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100
"""The label of a token that has no target."""

CHUNK = 2048
"""Tokens whose logits exist at once."""

BLOCK = {"cpu": 2**18, "cuda": 2**23}
"""Elements that eager stages hold in float32 at once: what the device's cache holds."""


class Vocabulary:
    """Which entries of the vocabulary this process computes the logits of: here, all of them."""

    first = 0
    """The entry of the first column of the logits that the loss sees."""

    def gather(self, logits: Tensor) -> Tensor:
        """This process's logits (rows, local vocab) -> those that the loss sees (rows, vocab)."""
        return logits

    def own(self, gradient: Tensor) -> Tensor:
        """The columns of `gather`'s result that this process computed."""
        return gradient

    def maximum_(self, values: Tensor) -> None:
        """In place, the elementwise maximum over the parts of the vocabulary."""

    def sum_(self, values: Tensor) -> None:
        """In place, the elementwise sum over the parts of the vocabulary."""


def sum_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    """Sum over vocab of exp(logits - maximum): (rows, vocab), (rows) -> (rows), in float32."""
    return (logits - maximum.unsqueeze(-1)).exp_().sum(dim=-1)


def exponentiate_(logits: Tensor, maximum: Tensor, factor: Tensor) -> None:
    """In place, factor · exp(logits - maximum), in float32 until it is stored."""
    exponentials = (logits - maximum.unsqueeze(-1)).exp_()
    logits.copy_(exponentials.mul_(factor.unsqueeze(-1)))


class CrossEntropySum(nn.Module):
    """Negative log-likelihood in nats of the head's logits, summed over all targets, in float32.

    Args:
        chunk: Tokens whose logits exist at once.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        super().__init__()
        self.chunk = chunk
        self.block = BLOCK
        self.vocabulary = Vocabulary()
        self.compiled = False
        self.sum_exponentials = sum_exponentials
        self.exponentiate_ = exponentiate_

    def compile_stages(self) -> None:
        """Fuses each pass over a chunk's logits into one kernel, compiled once for each shape."""
        self.compiled = True
        self.sum_exponentials = torch.compile(sum_exponentials, fullgraph=True, dynamic=False)
        self.exponentiate_ = torch.compile(exponentiate_, fullgraph=True, dynamic=False)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """The loss of the logits hidden · weightᵀ.

        Args:
            hidden: (batch, seq, dim).
            weight: (vocab, dim), of the same dtype; its gradient adds up over the chunks in it.
            labels: (batch, seq) int64 with IGNORE.

        Returns:
            float32 scalar, through which one backward may go.
        """
        tokens = hidden.flatten(0, 1)  # (batch * seq, dim)
        return _HeadAndLoss.apply(tokens, weight, labels.flatten(), self, torch.is_grad_enabled())

    def nll(self, logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
        """(rows, vocab), (rows) -> (rows) float32, 0 where there is no target.

        With gradient, the logits become the gradient of the rows' sum with respect to them.
        """
        vocab = logits.shape[-1]
        # A compiled stage holds nothing in float32.
        block = len(logits) if self.compiled else max(1, self.block[logits.device.type] // vocab)
        place = labels - self.vocabulary.first
        here = (place >= 0) & (place < vocab)  # never where the label is IGNORE
        place = place.clamp(0, vocab - 1).unsqueeze(-1)  # (rows, 1)
        wanted = labels != IGNORE

        maximum = logits.amax(dim=-1).float()  # (rows)
        self.vocabulary.maximum_(maximum)

        blocks = list(zip(logits.split(block), maximum.split(block), strict=True))
        total = torch.cat([self.sum_exponentials(*each) for each in blocks])  # (rows)
        target = torch.where(here, logits.gather(-1, place).squeeze(-1) - maximum, 0.0)
        totals = torch.stack([total, target])  # (2, rows)
        self.vocabulary.sum_(totals)
        total, target = totals

        if with_gradient:
            for each, factor in zip(blocks, (wanted / total).split(block), strict=True):
                self.exponentiate_(*each, factor)
            # From float32: where the model is sure of the target, its probability rounds to 1.
            at_target = (target.exp() / total - 1).to(logits.dtype).unsqueeze(-1)
            at_place = torch.where(here.unsqueeze(-1), at_target, logits.gather(-1, place))
            # Not scatter_, which on CPU copies all 16-bit logits to float32 and back.
            rows = torch.arange(len(logits), device=logits.device)
            logits.index_put_((rows, place.squeeze(-1)), at_place.squeeze(-1))
        return torch.where(wanted, total.log() - target, 0.0)


class _HeadAndLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk; hidden (tokens, dim), weight (vocab, dim) to a scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss: CrossEntropySum,
        grad_enabled: bool,
    ) -> Tensor:
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.empty_like(weight) if wanted[1] else None
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        buffer = hidden.new_empty(min(loss.chunk, len(hidden)), len(weight))
        for first in range(0, len(hidden), loss.chunk):
            rows = slice(first, first + loss.chunk)
            chunk = hidden[rows]  # (rows, dim)
            own = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])  # (rows, local vocab)
            logits = loss.vocabulary.gather(own)  # (rows, vocab)
            nll[rows] = loss.nll(logits, labels[rows], any(wanted))
            gradient = loss.vocabulary.own(logits)  # (rows, local vocab)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[rows])
            if d_weight is not None:
                beta = 0 if first == 0 else 1
                torch.addmm(d_weight, gradient.t(), chunk, beta=beta, out=d_weight)
        ctx.gradients = d_hidden, d_weight
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss was called backward on twice: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, grad)
        return (*gradients, None, None, None)


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    """In place, by a float32 scalar that is not rounded to the gradient's dtype before."""
    for rows in gradient.split(max(1, BLOCK[gradient.device.type] // gradient.shape[-1])):
        rows.mul_(factor.view(1))
