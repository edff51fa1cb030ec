"""Loss on held-out text, the same figure whatever the mesh and the batch size."""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn


class Windows(Protocol):
    """A batch of windows, each field (micro_batch, seq) int64."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[Windows],
    device: torch.device,
    sum_over_data: Callable[[Tensor], Tensor],
) -> float:
    """Mean negative log-likelihood in nats over every target of all ranks' batches.

    Args:
        model: Called as `model(tokens, positions, labels)`, returns the sum over the targets.
        batches: This data rank's share, as many batches on each rank.
        device: Where the model is.
        sum_over_data: Sums a tensor over the data ranks in place.

    Raises:
        ValueError: there is not one target.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets
    for batch in batches:
        labels = batch.labels.to(device)
        totals[0] += model(batch.tokens.to(device), batch.positions.to(device), labels)
        totals[1] += (labels >= 0).sum()
    loss, targets = sum_over_data(totals).tolist()
    if targets == 0:
        raise ValueError("the held-out windows have no target to predict: use more of them")
    return loss / targets


def bits_per_byte(
    loss: float,
    batches: Iterable[Windows],
    byte_lengths: Tensor,
    sum_over_data: Callable[[Tensor], Tensor],
    device: torch.device,
) -> float:
    """Mean loss in nats a token as bits a byte of text, which compares across tokenizers.

    Args:
        loss: What `mean_loss` returned for these batches.
        byte_lengths: int64 (vocab,), the bytes that each token stands for; 0 for special ones.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # targets, bytes
    for batch in batches:
        targets = batch.labels[batch.labels >= 0]
        totals += torch.tensor([targets.numel(), byte_lengths[targets].sum().item()], device=device)
    n_targets, n_bytes = sum_over_data(totals).tolist()
    return loss / math.log(2) * n_targets / n_bytes
