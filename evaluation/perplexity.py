"""Loss on held-out text, the same figure whatever the mesh and the batch size."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Windows(Protocol):
    """A batch of windows, each field (micro_batch, seq) int64; no positions: one document a row."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor | None: ...
    @property
    def labels(self) -> Tensor: ...


@dataclass(frozen=True)
class Measured:
    """What a model makes of a text: the summed loss in nats, over how many targets and bytes."""

    nats: float
    targets: int
    n_bytes: int

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.nats + other.nats, self.targets + other.targets, self.n_bytes + other.n_bytes
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats a token.

        Raises:
            ValueError: there is not one target.
        """
        if self.targets == 0:
            raise ValueError("the held-out windows have no target to predict: use more of them")
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits a byte of text, which compares across tokenizers."""
        return self.nats / math.log(2) / self.n_bytes


NOTHING = Measured(0.0, 0, 0)


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Mapping[str, Iterable[Windows]],
    device: torch.device,
    sum_over_data: Callable[[Tensor], Tensor],
    byte_lengths: Tensor | None = None,
) -> dict[str, Measured]:
    """The loss over every target of all ranks' batches, by source.

    Args:
        model: Called as `model(tokens, positions, labels)`, returns the sum over the targets.
        batches: This data rank's share, as many batches of each source on each rank.
        device: Where the model is.
        sum_over_data: Sums a tensor over the data ranks in place.
        byte_lengths: int64 (vocab,), the bytes that each token stands for, 0 for special ones;
            without it no bytes are counted.
    """
    totals = torch.zeros(len(batches), 3, dtype=torch.float64, device=device)  # (source, figure)
    for total, of_source in zip(totals, batches.values(), strict=True):
        for batch in of_source:
            labels, positions = batch.labels.to(device), batch.positions
            if positions is not None:
                positions = positions.to(device)
            total[0] += model(batch.tokens.to(device), positions, labels)
            total[1] += (labels >= 0).sum()
            if byte_lengths is not None:
                total[2] += byte_lengths[batch.labels[batch.labels >= 0]].sum()
    return {
        name: Measured(nats, int(targets), int(n_bytes))
        for name, (nats, targets, n_bytes) in zip(
            batches, sum_over_data(totals).tolist(), strict=True
        )
    }
