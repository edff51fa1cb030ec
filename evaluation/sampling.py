"""Text from a model while it trains: a few tokens, each from a whole forward, on any mesh."""

from typing import Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class Tokenizer(Protocol):
    """What sampling asks of a tokenizer."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@torch.no_grad()
def sample_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    n_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    multiple_of: int = 1,
) -> str:
    """Generates `n_tokens` tokens after the prompt; the text ends where the document does.

    Every rank calls it with the same arguments and draws from the same generator, so that all
    agree on each token without being told. All `n_tokens` forwards run even where the text ends
    earlier: ranks whose rounding differs must never differ in how often they meet.

    Args:
        model: Called as `model(tokens)`, returns logits (1, seq, vocab), maybe a DTensor.
        temperature: 0 takes the likeliest token.
        multiple_of: The length of the sequence is padded to a multiple of this.

    Returns:
        Prompt and continuation.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    length = -(-(len(ids) + n_tokens) // multiple_of) * multiple_of
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)  # (batch, seq)
    tokens[0, : len(ids)] = torch.tensor(ids)
    generator = torch.Generator().manual_seed(seed)
    for place in range(len(ids), len(ids) + n_tokens):
        # Of another shape than training's batches: not worth a compilation.
        with torch.compiler.set_stance("force_eager"):
            logits = model(tokens)[:, place - 1]  # (batch, vocab); causal: padding is not seen
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        scores = logits[0].float().cpu()
        if temperature == 0:
            chosen = int(scores.argmax())
        else:
            probabilities = torch.softmax(scores / temperature, dim=-1)
            chosen = int(torch.multinomial(probabilities, 1, generator=generator))
        tokens[0, place] = chosen
    generated = tokens[0, len(ids) : len(ids) + n_tokens].tolist()
    if tokenizer.eos_id in generated:
        generated = generated[: generated.index(tokenizer.eos_id)]
    return prompt + tokenizer.decode(generated)
