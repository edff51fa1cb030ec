"""Text from a model: prompts in, the tokens that follow out, one column of the cache at a time.

What is drawn for a prompt depends on the seed, the prompt and its number alone: not on the prompts
beside it, the device or the mesh. Which prompts there are and what becomes of their text is for
others to say.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from evaluation.kv_cache import cached
from model.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from the `top_k` likeliest, and of them the fewest that reach `top_p`.

    A temperature of 0 takes the likeliest one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What follows a prompt; `stopped` where it ended by itself, before its limit."""

    tokens: list[int]
    stopped: bool


class Agreement(Protocol):
    """What the processes of a mesh tell each other while they generate."""

    def chosen(self, tokens: Tensor) -> Tensor:
        """The tokens (batch,) that the first of the ranks with the same prompts has chosen."""

    def any_left(self, left: bool) -> bool:
        """Whether any rank still has a row to go on with: sharded weights are gathered by all."""


class SingleProcessSync:
    """The agreement of one process."""

    def chosen(self, tokens: Tensor) -> Tensor:
        return tokens

    def any_left(self, left: bool) -> bool:
        return left


SINGLE_PROCESS = SingleProcessSync()


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int],
    device: torch.device,
    agree: Agreement = SINGLE_PROCESS,
    on_token: Callable[[int, int], bool | None] | None = None,
    first_prompt: int = 0,
) -> list[Completion]:
    """Completes a batch of prompts.

    A row ends at a token of `stop`, after `max_new_tokens`, or where the model's context does; the
    batch ends when all rows have.

    Args:
        model: A Llama, or Fabric's wrapper of one, whole along seq (`kv_cache.cached`).
        prompts: Token ids, at least one and at most `max_seq_len` each.
        max_new_tokens: At least 1.
        stop: Ids that end a text and are no part of it.
        device: Where the model is.
        agree: With the other processes, which all call this at the same time.
        on_token: Called as `on_token(row, token)` with each token as it is chosen, rows in order;
            where it returns True, the row ends after this token.
        first_prompt: The number of the first prompt among all those that a run completes.

    Returns: One for each prompt.
    """
    llama = model if isinstance(model, Llama) else model.module
    assert isinstance(llama, Llama)
    lengths = [len(prompt) for prompt in prompts]
    limit = llama.config.max_seq_len
    assert prompts and min(lengths) >= 1 and max(lengths) <= limit and max_new_tokens >= 1
    rooms = [min(max_new_tokens, limit + 1 - length) for length in lengths]
    # The last token of a row is chosen and never fed.
    places = max(length + room - 1 for length, room in zip(lengths, rooms, strict=True))
    rows = [_Row(room, frozenset(stop)) for room in rooms]
    draw = _Draws(sampling, first_prompt, len(prompts))
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)  # (batch, seq)
    for number, prompt in enumerate(prompts):
        tokens[number, : len(prompt)] = torch.tensor(prompt)
    tokens, positions = tokens.to(device), torch.tensor(lengths, device=device).unsqueeze(1)
    # Of other shapes than training's batches: not worth a compilation.
    with torch.compiler.set_stance("force_eager"), cached(llama, lengths, places):
        logits = model(tokens)  # (batch, 1, vocab)
        while True:
            chosen = agree.chosen(draw(logits))  # (batch,)
            for number, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if row.takes(token) and on_token is not None and on_token(number, token):
                    row.is_open, row.stopped = False, True
            if not agree.any_left(any(row.is_open for row in rows)):
                return [Completion(row.tokens, row.stopped) for row in rows]
            # A row that has ended is fed on, into its last places, which nobody reads any more.
            logits = model(chosen.unsqueeze(1), positions.clamp(max=places - 1))
            positions = positions + 1


class _Row:
    """A completion on its way."""

    def __init__(self, room: int, stop: frozenset[int]) -> None:
        self.room, self.stop = room, stop
        self.tokens: list[int] = []
        self.is_open, self.stopped = True, False

    def takes(self, token: int) -> bool:
        """Whether the token belongs to the text."""
        if not self.is_open:
            return False
        if token in self.stop:
            self.is_open, self.stopped = False, True
            return False
        self.tokens.append(token)
        self.is_open = len(self.tokens) < self.room
        return True


class _Draws:
    """Chooses the tokens of a batch, with a stream of random numbers for each row.

    The streams are Python's own, on the CPU: of a graphics card's nobody promises that the next
    release, or another card, repeats them.
    """

    def __init__(self, sampling: Sampling, first_prompt: int, batch: int) -> None:
        self.sampling = sampling
        numbers = range(first_prompt, first_prompt + batch)
        # A string is hashed by SHA-512: neighbouring numbers have nothing in common.
        self.streams = [random.Random(f"{sampling.seed}/{number}") for number in numbers]

    def __call__(self, logits: Tensor) -> Tensor:
        """(batch, 1, vocab), maybe a DTensor -> (batch,)."""
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        scores = logits[:, 0].float()  # (batch, vocab)
        if self.sampling.temperature == 0:
            return scores.argmax(dim=-1)
        uniform = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64)
        return drawn(scores, self.sampling, uniform.to(scores.device))


def drawn(scores: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Tokens by the inverse of the distribution function over those that the filters leave.

    The filters are those of transformers' `generate`, in its order: temperature, top-k, top-p.

    Args:
        scores: Logits, (batch, vocab).
        sampling: Of a temperature above 0.
        uniform: (batch,) float64 in [0, 1).

    Returns: (batch,) int64.
    """
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]  # (batch, 1)
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p is not None:
        # Stable: of equally likely tokens the lower id comes first, on every device.
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        reached = ranked.double().softmax(dim=-1).cumsum(dim=-1)  # (batch, vocab)
        # What comes before a kept token does not reach top_p; the likeliest one is always kept.
        beyond = F.pad(reached[:, :-1] >= sampling.top_p, (1, 0))
        scores = scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)  # (batch, vocab)
    cumulative = cumulative / cumulative[:, -1:]  # so that the last is 1, above every number drawn
    return (cumulative <= uniform.unsqueeze(1)).sum(dim=-1)
