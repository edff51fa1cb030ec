"""Output head and training loss, computed by chunks of tokens without materializing all logits.

The gradients of a chunk are computed together with its loss, in the buffer of its logits, which the
next chunk reuses; only the gradients of the hidden states and of the weight are saved. The loss is
a sum; the caller divides it. Tensor parallelism passes a `Vocabulary` that describes this rank's
shard of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.compiled import compile_for_any_shape

IGNORE = -100
"""Label of a token without a target."""

CHUNK = 2048
"""Tokens per chunk of logits."""

BLOCK = {"cpu": 2**18, "cuda": 2**23}
"""Elements per float32 temporary in eager mode, sized for the device's cache."""


class Vocabulary:
    """Communication between vocabulary shards; this base class has one shard."""

    first = 0
    """Token id of the first column of `gather`'s result."""

    def gather(self, logits: Tensor) -> Tensor:
        """Return the logits of the loss: (rows, local vocab) -> (rows, vocab)."""
        return logits

    def local(self, gradient: Tensor) -> Tensor:
        """Return this rank's columns of `gather`'s result: (rows, vocab) -> (rows, local vocab)."""
        return gradient

    def maximum_(self, values: Tensor) -> None:
        """Replace by the elementwise maximum over the shards of the vocabulary."""

    def sum_(self, values: Tensor) -> None:
        """Replace by the elementwise sum over the shards of the vocabulary."""


def sum_exponentials(logits: Tensor, maximum: Tensor) -> Tensor:
    """Return sum(exp(logits - maximum)) in float32: (rows, vocab), (rows) -> (rows)."""
    return (logits - maximum.unsqueeze(-1)).exp_().sum(dim=-1)


def exponentiate_(logits: Tensor, maximum: Tensor, factor: Tensor) -> None:
    """Replace logits by factor · exp(logits - maximum), computed in float32."""
    exponentials = (logits - maximum.unsqueeze(-1)).exp_()
    logits.copy_(exponentials.mul_(factor.unsqueeze(-1)))


class CrossEntropySum(nn.Module):
    """Output head and negative log-likelihood in nats, summed over all targets, in float32.

    Args:
        chunk: Tokens per chunk of logits.
        vocabulary: Communication between shards of the vocabulary; None: there is one shard.
    """

    def __init__(self, chunk: int = CHUNK, vocabulary: Vocabulary | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.block = BLOCK
        self.vocabulary = vocabulary or Vocabulary()
        self.compiled = False
        self.sum_exponentials = sum_exponentials
        self.exponentiate_ = exponentiate_

    def compile_stages(self) -> None:
        """Compile each pass over a chunk's logits into one kernel, for any number of rows."""
        self.compiled = True
        self.sum_exponentials = compile_for_any_shape(sum_exponentials)
        self.exponentiate_ = compile_for_any_shape(exponentiate_)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the logits hidden · weightᵀ.

        Args:
            hidden: (batch, seq, dim).
            weight: (vocab, dim) in the dtype of `hidden`, in which its gradient is accumulated.
            labels: (batch, seq) int64 with IGNORE.

        Returns: float32 scalar, which supports one backward.
        """
        tokens = hidden.flatten(0, 1)  # (batch * seq, dim)
        return _HeadAndLoss.apply(tokens, weight, labels.flatten(), self, torch.is_grad_enabled())

    def nll(self, logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
        """Return the loss per row: (rows, vocab), (rows) -> (rows) float32, 0 without a target.

        `with_gradient` overwrites the logits with the gradient of the sum of the rows.
        """
        vocab = logits.shape[-1]
        # Compiled stages have no float32 temporary.
        block = len(logits) if self.compiled else max(1, self.block[logits.device.type] // vocab)
        column = labels - self.vocabulary.first  # (rows)
        is_local = (column >= 0) & (column < vocab)  # False for IGNORE
        column = column.clamp(0, vocab - 1).unsqueeze(-1)  # (rows, 1)
        has_target = labels != IGNORE

        maximum = logits.amax(dim=-1).float()  # (rows)
        self.vocabulary.maximum_(maximum)

        blocks = list(zip(logits.split(block), maximum.split(block), strict=True))
        total = torch.cat([self.sum_exponentials(*each) for each in blocks])  # (rows)
        target = torch.where(is_local, logits.gather(-1, column).squeeze(-1) - maximum, 0.0)
        totals = torch.stack([total, target])  # (2, rows)
        self.vocabulary.sum_(totals)
        total, target = totals

        if with_gradient:
            for each, factor in zip(blocks, (has_target / total).split(block), strict=True):
                self.exponentiate_(*each, factor)
            # In float32, because a probability close to 1 would round to 1.
            at_target = (target.exp() / total - 1).to(logits.dtype).unsqueeze(-1)
            values = torch.where(is_local.unsqueeze(-1), at_target, logits.gather(-1, column))
            # On CPU scatter_ would copy all 16-bit logits to float32 and back.
            rows = torch.arange(len(logits), device=logits.device)
            logits.index_put_((rows, column.squeeze(-1)), values.squeeze(-1))
        return torch.where(has_target, total.log() - target, 0.0)


class _HeadAndLoss(torch.autograd.Function):
    """Loss and gradients by chunks: hidden (tokens, dim), weight (vocab, dim) -> scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss: CrossEntropySum,
        grad_enabled: bool,
    ) -> Tensor:
        needs_grad = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        d_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        d_weight = torch.empty_like(weight) if needs_grad[1] else None
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        buffer = hidden.new_empty(min(loss.chunk, len(hidden)), len(weight))
        for first in range(0, len(hidden), loss.chunk):
            rows = slice(first, first + loss.chunk)
            chunk = hidden[rows]  # (rows, dim)
            local = torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])  # (rows, local vocab)
            logits = loss.vocabulary.gather(local)  # (rows, vocab)
            nll[rows] = loss.nll(logits, labels[rows], any(needs_grad))
            gradient = loss.vocabulary.local(logits)  # (rows, local vocab)
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[rows])
            if d_weight is not None:
                beta = 0 if first == 0 else 1
                torch.addmm(d_weight, gradient.t(), chunk, beta=beta, out=d_weight)
            del logits, gradient  # before the next chunk's logits are gathered
        ctx.gradients, ctx.block = (d_hidden, d_weight), loss.block[hidden.device.type]
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward was called twice on the loss; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                _scale_(gradient, grad, ctx.block)
        return (*gradients, None, None, None)


def _scale_(gradient: Tensor, factor: Tensor, block: int) -> None:
    """Multiply in place by a float32 scalar, without rounding it to the gradient's dtype."""
    for rows in gradient.split(max(1, block // gradient.shape[-1])):  # (rows, columns)
        rows.mul_(factor.view(1))
