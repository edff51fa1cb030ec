"""Text generation: batched generation with a KV cache, and samples while training.

The tokens drawn for a prompt depend only on the seed, the prompt and its index, not on the batch,
the device or the mesh. Reading prompts and printing text are left to the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from data.tokenizer import Tokenizer
from evaluation.detokenizer import detokenize
from evaluation.sampling import NON_FINITE, SamplingParams, TokenSampler
from model.llama import Llama
from parallel.mesh import DATA_AXES


@dataclass
class Completion:
    """Generated tokens of one prompt.

    Attributes:
        stopped: False if a length limit ended them.
        finite: False if NaN or infinite logits ended them.
    """

    tokens: list[int]
    stopped: bool
    finite: bool = True


class GenerationSync:
    """Synchronization of generation between the processes of a mesh.

    Logits of tensor-parallel ranks may differ by rounding, so the first rank chooses the tokens.
    Data ranks have different prompts but gather sharded weights together, so all run a step while
    any has an unfinished row.

    Args:
        mesh: The mesh; None for a single process.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        def groups(*axes: str) -> list[dist.ProcessGroup]:
            if mesh is None:
                return []
            return [mesh[axis].get_group() for axis in axes if mesh[axis].size() > 1]

        self.tensor_groups, self.data_groups = groups("tp"), groups(*DATA_AXES)

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens (batch,) of the first tensor-parallel rank."""
        for group in self.tensor_groups:
            dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    def any_active(self, active: bool, device: torch.device) -> bool:
        """Return whether any data rank has an unfinished row."""
        if not self.data_groups:
            return active
        count = torch.tensor(int(active), device=device)
        for group in self.data_groups:
            dist.all_reduce(count, group=group)
        return bool(count)


# ---------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingParams,
    stop: Sequence[int],
    device: torch.device,
    sync: GenerationSync | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    first_prompt: int = 0,
) -> list[Completion]:
    """Complete a batch of prompts with a KV cache.

    A row ends at a token in `stop`, after `max_new_tokens`, at the end of the context, or at logits
    that are not finite; the batch ends when all rows have ended. Bad logits are no exception here:
    the other processes would wait for this one.

    Args:
        model: A Llama or Fabric's wrapper of one, without context or sequence parallelism.
        prompts: Token ids, 1 to `max_seq_len` per prompt.
        max_new_tokens: At least 1.
        stop: Token ids that end a row; not part of its completion.
        device: Device of the model.
        sync: Synchronizes the processes of a mesh, which all call `generate` together; None for a
            single process.
        on_token: Called as `on_token(row, token)` for each generated token; returning True ends the
            row after this token.
        first_prompt: Index of the first prompt among all prompts of the program.

    Returns:
        One completion per prompt.
    """
    from evaluation.kv_cache import kv_cache  # not needed by `sample_text`

    llama = model if isinstance(model, Llama) else model.module
    assert isinstance(llama, Llama)
    lengths = [len(prompt) for prompt in prompts]
    context = llama.config.max_seq_len
    if not (prompts and min(lengths) >= 1 and max(lengths) <= context and max_new_tokens >= 1):
        raise ValueError(f"prompts of {lengths} tokens do not fit a context of {context} tokens")
    limits = [min(max_new_tokens, context + 1 - length) for length in lengths]
    # The last token of a row is sampled but never fed to the model.
    capacity = max(length + limit - 1 for length, limit in zip(lengths, limits, strict=True))
    completions = [Completion([], stopped=False) for _ in prompts]
    sync = sync or GenerationSync()
    indices = range(first_prompt, first_prompt + len(prompts))
    sampler = TokenSampler(sampling, indices, prompts)
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)  # (batch, seq)
    for index, prompt in enumerate(prompts):
        tokens[index, : len(prompt)] = torch.tensor(prompt)
    tokens, positions = tokens.to(device), torch.tensor(lengths, device=device).unsqueeze(1)
    # Shapes differ from training batches; compiling them does not pay off.
    with torch.compiler.set_stance("force_eager"), kv_cache(llama, lengths, capacity):
        logits = model(tokens)  # (batch, 1, vocab)
        while True:
            sampled = sync.broadcast_tokens(sampler(logits[:, 0]))  # (batch,)
            active = False
            rows = zip(completions, limits, sampled.tolist(), strict=True)
            for index, (row, limit, token) in enumerate(rows):
                if row.stopped or len(row.tokens) == limit:
                    continue
                row.finite = token != NON_FINITE
                row.stopped = token in stop or not row.finite
                if not row.stopped:
                    row.tokens.append(token)
                    row.stopped = on_token is not None and bool(on_token(index, token))
                active |= not row.stopped and len(row.tokens) < limit
            if not sync.any_active(active, device):
                return completions
            # Finished rows still take part; what they add to the cache does not affect other rows.
            columns = sampled.clamp(min=0).unsqueeze(1)  # (batch, 1)
            logits = model(columns, positions.clamp(max=capacity - 1))
            positions = positions + 1


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
    seq_multiple: int = 1,
) -> str:
    """Return the prompt with a continuation of up to `n_tokens` tokens, on any mesh.

    Used during training: works under every parallelism by running a full forward per token instead
    of a KV cache. All ranks pass the same arguments and draw the same random numbers. All forwards
    run even if the text ends earlier, so that ranks whose rounding differs join the same number of
    collectives.

    Args:
        model: Called as `model(tokens)`; returns logits (1, seq, vocab), possibly a DTensor.
        seq_multiple: The sequence is padded to a multiple of this.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    seq_len = -(-(len(ids) + n_tokens) // seq_multiple) * seq_multiple
    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=device)  # (batch, seq)
    tokens[0, : len(ids)] = torch.tensor(ids)
    sampler = TokenSampler(SamplingParams(temperature, seed=seed), range(1))
    with torch.compiler.set_stance("force_eager"):
        for index in range(len(ids), len(ids) + n_tokens):
            # Attention is causal: padding and later tokens do not affect these logits.
            tokens[:, index] = sampler(model(tokens)[:, index - 1]).clamp(min=0)
    generated = tokens[0, len(ids) : len(ids) + n_tokens].tolist()
    if tokenizer.eos_id in generated:
        generated = generated[: generated.index(tokenizer.eos_id)]
    return prompt + detokenize(tokenizer, generated)
