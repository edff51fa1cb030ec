"""Log-probabilities of chosen tokens, without the logits of all the others.

The head is the largest part of a short answer's cost and by far the largest tensor, so it is
computed where a token is asked for and nowhere else, a chunk of tokens at a time. The layer that
holds the loss already knows what a parallel plan has made of the head; this one stands in for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.llama import Llama
from model.loss import CrossEntropySum


class TargetScores(nn.Module):
    """In the place of a model's loss: a score of each target instead of the sum over all.

    Args:
        loss: The layer whose place it takes.
    """

    def __init__(self, loss: CrossEntropySum) -> None:
        super().__init__()
        self.chunk, self.vocabulary = loss.chunk, loss.vocabulary
        self.nll = loss.nll

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Scores of the logits hidden · weightᵀ.

        Args:
            hidden: (batch, seq, dim); under tensor parallelism a DTensor, as `weight` is.
            weight: (vocab, dim).
            targets: (3, targets) int64: row and column where the token is predicted, and the token.

        Returns: (2, targets) float32: the log-probability in nats, and 1 where no other token is
            likelier.
        """
        if isinstance(hidden, DTensor):
            hidden = hidden.full_tensor()
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        scores = torch.empty(2, targets.shape[1], device=hidden.device)
        for first in range(0, targets.shape[1], self.chunk):
            chunk = slice(first, first + self.chunk)
            rows, columns, tokens = targets[:, chunk]
            own = hidden[rows, columns] @ weight.t()  # (rows, local vocab)
            logits = self.vocabulary.gather(own)  # (rows, vocab)
            scores[0, chunk] = -self.nll(logits, tokens, with_gradient=False)
            scores[1, chunk] = self._is_likeliest(logits, tokens)
        return scores

    def _is_likeliest(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """(rows, vocab), (rows) -> (rows) bool; of equally likely ones the lowest id counts."""
        values, places = logits.max(dim=-1)  # (rows)
        highest = values.to(torch.float32, copy=True)
        self.vocabulary.maximum_(highest)
        # An id is exact in float32, whose negative makes the maximum the lowest of them.
        lowest = -(places + self.vocabulary.first).float()
        lowest = torch.where(values.float() == highest, lowest, -torch.inf)
        self.vocabulary.maximum_(lowest)
        return lowest == -tokens.float()


@contextmanager
def scoring(llama: Llama) -> Iterator[None]:
    """Within it `llama(tokens, None, targets)` yields the scores of `TargetScores`."""
    loss = llama.loss
    llama.loss = TargetScores(loss)  # type: ignore[assignment]
    try:
        yield
    finally:
        llama.loss = loss
