"""Token sampling: the next token of each row from its logits.

The filters and their order are those of transformers' `generate`: repetition penalty, temperature,
top-k, top-p. With a vocabulary of 128,256, a sort or a float64 softmax of all logits takes longer
than the forward of a small model, so only candidates are ranked, and sums run over blocks.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

NON_FINITE = -1
"""Returned as the token of a row whose logits contain NaN or infinity."""

MIN_TEMPERATURE = 1e-30  # below, logits overflow; they differ by more, so that decoding is greedy
NUCLEUS_CANDIDATES = 1024  # a nucleus with more tokens is found by sorting the vocabulary
BLOCK = 512  # tokens per partial sum of the unfiltered distribution


@dataclass(frozen=True)
class SamplingParams:
    """Repetition penalty, temperature, top-k and top-p filtering; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float | None = None


class TokenSampler:
    """Sample the next token of each row with an independent random stream per prompt index.

    The streams are Python's, on the CPU: CUDA does not guarantee that another release or device
    reproduces its random numbers.

    Args:
        prompt_indices: Index of each row's prompt among all prompts of the program.
        prompts: Token ids of each row, which a repetition penalty applies to.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_indices: range,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self.sampling, self.prompts = sampling, prompts
        # String seeds are hashed with SHA-512, so neighboring indices give unrelated streams.
        self.streams = [random.Random(f"{sampling.seed}/{index}") for index in prompt_indices]
        self._seen: Tensor | None = None  # (batch, vocab) bool: tokens of prompt and completion

    def __call__(self, logits: Tensor) -> Tensor:
        """Map logits (batch, vocab), possibly a DTensor, to tokens (batch,) or `NON_FINITE`."""
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        logits = logits.float()
        largest = logits.amax(dim=-1)  # (batch,); NaN if any logit is
        if self.sampling.repetition_penalty is not None:
            logits = self._penalized(logits, self.sampling.repetition_penalty)
        if self.sampling.temperature < MIN_TEMPERATURE:
            tokens = logits.argmax(dim=-1)
        else:
            draws = [stream.random() for stream in self.streams]
            uniform = torch.tensor(draws, dtype=torch.float64, device=logits.device)
            tokens = sample_tokens(logits, self.sampling, uniform)
        tokens = tokens.where(largest.isfinite(), NON_FINITE)
        if self._seen is not None:
            self._seen.scatter_(1, tokens.clamp(min=0).unsqueeze(1), True)
        return tokens

    def _penalized(self, logits: Tensor, penalty: float) -> Tensor:
        """Return the logits with lower probabilities for tokens that occurred before."""
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(self.prompts):
                self._seen[row, torch.tensor(prompt, device=logits.device)] = True
        return torch.where(
            self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits
        )


def sample_tokens(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> Tensor:
    """Sample tokens by inverting the cumulative distribution, in the order of ids, after filtering.

    Args:
        logits: (batch, vocab), finite.
        sampling: Has a temperature above 0.
        uniform: Random numbers in [0, 1), (batch,) float64.

    Returns:
        Tokens (batch,) int64.
    """
    scores = logits / sampling.temperature
    vocab = scores.shape[-1]
    top_k = sampling.top_k if sampling.top_k is not None and sampling.top_k < vocab else None
    if top_k is None and sampling.top_p is None:
        return _draw_from_all(scores, uniform)
    n_candidates = top_k or min(NUCLEUS_CANDIDATES, vocab)
    values, ids = scores.topk(min(n_candidates + 1, vocab), dim=-1)  # (batch, candidates + 1)
    # The smallest value outside the candidates; equal values could not be told apart by id.
    outside = values[:, -1:] if values.shape[1] > n_candidates else values[:, -1:] - 1
    ids = ids[:, :n_candidates].sort(dim=-1).values  # (batch, candidates)
    candidates = scores.gather(1, ids).double()
    largest = values[:, :1].double()
    weights = (candidates - largest).exp()
    smallest, is_complete = candidates, torch.tensor(True)
    if sampling.top_p is not None:
        total = weights.sum(dim=-1, keepdim=True)
        if top_k is None:
            total = (scores - values[:, :1]).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
        # Stable: tokens of equal probability are ordered by id on every device.
        ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
        cumulative = ((ranked - largest).exp() / total).cumsum(dim=-1)  # (batch, candidates)
        # Drop tokens whose predecessors already reach top_p; the most likely one is always kept.
        dropped = F.pad(cumulative[:, :-1] >= sampling.top_p, (1, 0))
        dropped = dropped.scatter(1, order, dropped)
        weights = weights.masked_fill(dropped, 0.0)
        smallest = candidates.masked_fill(dropped, torch.inf)
        if top_k is None and n_candidates < vocab:
            is_complete = (cumulative[:, -1] >= sampling.top_p).all()
    if not (is_complete and (smallest.amin(dim=-1, keepdim=True) > outside).all()):
        return _draw_from_all(_filtered(scores, top_k, sampling.top_p), uniform)
    cumulative = weights.cumsum(dim=-1)
    cumulative = cumulative / cumulative[:, -1:]  # the last entry is 1, above every random number
    index = (cumulative <= uniform.unsqueeze(1)).sum(dim=-1, keepdim=True)
    return ids.gather(1, index.clamp(max=n_candidates - 1)).squeeze(1)


def _filtered(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Return the scores (batch, vocab) with -inf for filtered tokens, by sorting the vocabulary."""
    if top_k is not None:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]  # (batch, 1)
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if top_p is not None:
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        cumulative = ranked.double().softmax(dim=-1).cumsum(dim=-1)  # (batch, vocab)
        dropped = F.pad(cumulative[:, :-1] >= top_p, (1, 0))
        scores = scores.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return scores


def _draw_from_all(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the distribution of all scores (batch, vocab): first a block, then its token."""
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    weights = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = weights.sum(dim=-1, dtype=torch.float64)  # (batch, blocks)
    ends = sums.cumsum(dim=-1)
    target = uniform.unsqueeze(1) * ends[:, -1:]  # (batch, 1)
    block = (ends <= target).sum(dim=-1, keepdim=True).clamp(max=ends.shape[1] - 1)  # (batch, 1)
    index = block.unsqueeze(-1).expand(-1, 1, BLOCK)
    within = weights.gather(1, index).squeeze(1).double().cumsum(dim=-1)  # (batch, BLOCK)
    start = (ends - sums).gather(1, block)
    # Rounding may place the target after the block: take its last token with a probability.
    position = (within + start <= target).sum(dim=-1).minimum(within.argmax(dim=-1))
    return block.squeeze(1) * BLOCK + position
