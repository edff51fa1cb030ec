"""Log-probabilities of selected target tokens, without materializing all logits.

For short answers the output head dominates both time and memory, so it is computed only at the
positions of targets, in chunks. `TargetScores` replaces the model's loss layer, which already
implements the head under tensor parallelism.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.llama import Llama
from model.loss import CrossEntropySum


class TargetScores(nn.Module):
    """Replacement for a model's loss layer that returns one score per target instead of a sum.

    Args:
        loss: The layer to replace, without loss parallelism.
    """

    def __init__(self, loss: CrossEntropySum) -> None:
        super().__init__()
        self.chunk, self.vocabulary = loss.chunk, loss.vocabulary
        self.nll = loss.nll

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Score the targets under the logits hidden · weightᵀ.

        Args:
            hidden: (batch, seq, dim), like `weight` a DTensor under tensor parallelism.
            weight: (vocab, dim).
            targets: (3, targets) int64: row, column of the prediction, token id.

        Returns:
            (2, targets) float32: the log-probability in nats, and 1 where the target is the most
            likely token.
        """
        if isinstance(hidden, DTensor):
            hidden = hidden.full_tensor()
        if isinstance(weight, DTensor):
            weight = weight.to_local()
        scores = torch.empty(2, targets.shape[1], device=hidden.device)
        for first in range(0, targets.shape[1], self.chunk):
            chunk = slice(first, first + self.chunk)
            rows, columns, tokens = targets[:, chunk]
            local = hidden[rows, columns] @ weight.t()  # (rows, local vocab)
            logits = self.vocabulary.gather(local)  # (rows, vocab)
            scores[0, chunk] = -self.nll(logits, tokens, with_gradient=False)
            scores[1, chunk] = logits.argmax(dim=-1) == tokens
        return scores


@contextmanager
def target_scoring(llama: Llama) -> Iterator[None]:
    """Make `llama(tokens, None, targets)` return the scores of `TargetScores`."""
    loss = llama.loss
    llama.loss = TargetScores(loss)  # type: ignore[assignment]
    try:
        yield
    finally:
        llama.loss = loss
