"""The training loss: a sum, so that only the caller decides what to divide by.

A module of its own without parameters, so that a parallel plan can replace it with one that works
on vocabulary shards.
"""

import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100
"""The label of a token that has no target."""


class CrossEntropySum(nn.Module):
    """Negative log-likelihood in nats, summed over all targets, in float32."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (batch, seq, vocab), labels (batch, seq) int64 with IGNORE -> float32 scalar."""
        return F.cross_entropy(
            logits.flatten(0, 1).float(),  # (batch * seq, vocab)
            labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
