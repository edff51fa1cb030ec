"""Generation: neither the KV cache nor the batch changes a token.

The models are small and random, with weights large enough for attention to cover the full text, so
a cache that lost or misplaced a single key would soon change a token.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from model_configs import FILES
from reference_models import paired_models, scaled_down
from torch import nn
from transformers.generation import logits_process

from evaluation.generation import Completion, SamplingParams, generate
from evaluation.kv_cache import kv_cache
from evaluation.sampling import _filtered, sample_tokens
from model.config import ModelConfig, RopeScaling
from model.llama import Llama

CPU = torch.device("cpu")
VOCAB, CONTEXT, STOP = 61, 48, 60
BASE = ModelConfig("small", 32, 2, 4, 2, 48, VOCAB, max_seq_len=CONTEXT)
CONFIGS = {
    "grouped heads": BASE,
    "one kv head per head": dataclasses.replace(BASE, n_kv_heads=4),
    "one kv head": dataclasses.replace(BASE, n_kv_heads=1),
    "tied": dataclasses.replace(BASE, tie_embeddings=True),
    "RoPE scaling": dataclasses.replace(BASE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
}
GREEDY = SamplingParams()
WARM = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=3)


def random_llama(config: ModelConfig) -> Llama:
    llama = Llama(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in llama.parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.normal_(mean, 0.3, generator=generator)
    return llama


@pytest.fixture(scope="module")
def llama() -> Llama:
    return random_llama(BASE)


def random_prompts(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def complete(model: nn.Module, prompts: Sequence[Sequence[int]], **changed: Any) -> Any:
    arguments = {"max_new_tokens": 16, "sampling": GREEDY, "stop": [], "device": CPU, **changed}
    return generate(model, prompts, **arguments)


@torch.no_grad()
def without_cache(llama: Llama, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy generation with a full forward per token."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(int(llama(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- KV cache


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_generation_equals_full_forwards(kind: str) -> None:
    llama = random_llama(CONFIGS[kind])
    prompts = random_prompts(9, 1, 17, 30)
    together = complete(llama, prompts)
    for prompt, completion in zip(prompts, together, strict=True):
        expected = without_cache(llama, prompt, 16)
        assert completion == Completion(expected, stopped=False)
        assert complete(llama, [prompt]) == [completion]
        assert len(set(expected)) > 3  # not a single repeated token


def test_rows_of_equal_length_are_generated_without_mask(llama: Llama) -> None:
    prompts = random_prompts(11, 11, 11)
    expected = [without_cache(llama, prompt, 16) for prompt in prompts]
    assert [each.tokens for each in complete(llama, prompts)] == expected


def test_cache_has_the_shape_of_the_kv_heads_and_the_compute_dtype(llama: Llama) -> None:
    """The model has 4 heads and 2 kv heads."""
    halved = random_llama(BASE).bfloat16()
    for model, dtype in ((llama, torch.float32), (halved, torch.bfloat16)):
        with torch.no_grad(), kv_cache(model, [3, 5], 20):
            model(torch.ones(2, 5, dtype=torch.int64))
            kernels = [cast(Any, layer).attention.kernel for layer in model.layers]
            tensors = [tensor for kernel in kernels for tensor in (kernel.k, kernel.v)]
        assert {tuple(tensor.shape) for tensor in tensors} == {(2, 20, 2, BASE.head_dim)}
        assert {tensor.dtype for tensor in tensors} == {dtype}


def test_head_computes_one_column_per_row(llama: Llama) -> None:
    shapes = []
    handle = llama.output.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    complete(llama, random_prompts(9, 30), max_new_tokens=3)
    handle.remove()
    assert shapes == [(2, 1, VOCAB)] * 3


def test_model_is_restored_after_an_error(llama: Llama) -> None:
    kernel, tokens = llama.kernel, torch.tensor(random_prompts(12))
    with torch.no_grad():
        before = llama(tokens)
        with pytest.raises(KeyError), kv_cache(llama, [3], 8):
            raise KeyError
        assert llama.kernel is kernel
        assert torch.equal(llama(tokens), before)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_completion_does_not_depend_on_the_batch(llama: Llama, sampling: SamplingParams) -> None:
    prompts = random_prompts(5, 21, 2, 13)
    together = complete(llama, prompts, sampling=sampling)
    pairs = [
        *complete(llama, prompts[:2], sampling=sampling),
        *complete(llama, prompts[2:], sampling=sampling, first_prompt=2),
    ]
    single = [
        complete(llama, [prompt], sampling=sampling, first_prompt=index)[0]
        for index, prompt in enumerate(prompts)
    ]
    assert together == pairs == single


def test_draws_depend_on_prompt_index_and_seed(llama: Llama) -> None:
    """Four copies of a prompt get different completions, reproducible with the same seed."""
    prompts = random_prompts(7) * 4
    first = complete(llama, prompts, sampling=WARM)
    assert len({tuple(each.tokens) for each in first}) == 4
    assert complete(llama, prompts, sampling=WARM) == first
    other = complete(llama, prompts, sampling=dataclasses.replace(WARM, seed=4))
    assert not {tuple(each.tokens) for each in other} & {tuple(each.tokens) for each in first}


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.6),
        SamplingParams(temperature=1.0, top_k=1000, top_p=1.0),
        SamplingParams(temperature=1.0, top_p=1e-9),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_filtered_by_transformers(sampling: SamplingParams) -> None:
    """On a grid of uniform numbers, frequencies equal the probabilities to one grid point."""
    generator = torch.Generator().manual_seed(1)
    scores = 2 * torch.randn(1, VOCAB, generator=generator)
    scores[0, 7] = scores[0, 8] = scores.topk(5).values[0, -1]  # ties with the fifth
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = sample_tokens(scores.expand(n, -1), sampling, uniform)
    warped = logits_process.TemperatureLogitsWarper(sampling.temperature)(cast(Any, None), scores)
    if sampling.top_k is not None:
        warped = logits_process.TopKLogitsWarper(sampling.top_k)(cast(Any, None), warped)
    if sampling.top_p is not None:
        warped = logits_process.TopPLogitsWarper(sampling.top_p)(cast(Any, None), warped)
    expected = warped.softmax(-1)[0]
    frequencies = torch.bincount(tokens, minlength=VOCAB) / n
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=1.5 / n)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=0.8, top_k=50),
        SamplingParams(temperature=0.7, top_k=40, top_p=0.95),
        SamplingParams(
            temperature=0.8, top_p=0.9
        ),  # a nucleus within the candidates, or a larger one
        SamplingParams(temperature=3.0, top_p=0.99),
    ],
    ids=str,
)
def test_draws_from_a_large_vocabulary_equal_those_from_all_sorted_tokens(
    sampling: SamplingParams,
) -> None:
    """Without a sort of 32,000 tokens, except for a nucleus of more than 1,024."""
    generator = torch.Generator().manual_seed(2)
    for scale in (1, 2, 8):
        logits = scale * torch.randn(8, 32_000, generator=generator)
        uniform = torch.rand(8, generator=generator, dtype=torch.float64)
        filtered = _filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        cumulative = filtered.double().softmax(-1).cumsum(-1)
        expected = (cumulative / cumulative[:, -1:] <= uniform.unsqueeze(1)).sum(-1)
        assert sample_tokens(logits, sampling, uniform).tolist() == expected.tolist()


def test_repetition_penalty_equals_transformers() -> None:
    ours, theirs = paired_models(BASE)
    prompt = random_prompts(9)[0]
    for penalty in (1.3, 0.7):
        sampling = SamplingParams(repetition_penalty=penalty)
        (found, _) = complete(ours, [prompt, prompt[:4]], sampling=sampling)
        expected = cast(Any, theirs).generate(
            torch.tensor([prompt]),
            max_new_tokens=16,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
        )
        assert found.tokens == expected[0, len(prompt) :].tolist()
    assert found != complete(ours, [prompt])[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_row_ends_at_logits_that_are_not_finite(
    llama: Llama, sampling: SamplingParams, value: float
) -> None:
    """The other row is unchanged."""
    prompts, calls = random_prompts(5, 3), [0]
    expected = complete(llama, prompts, sampling=sampling)

    def spoil(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:
            out[0, 0, 7] = value
        return out

    handle = llama.register_forward_hook(spoil)
    try:
        found = complete(llama, prompts, sampling=sampling)
    finally:
        handle.remove()
    assert found[0] == Completion(expected[0].tokens[:3], stopped=True, finite=False)
    assert found[1] == expected[1]


def test_draws_follow_the_distribution_of_the_model() -> None:
    """1000 rows with probabilities (0.8, 0.2); tolerance: four standard deviations."""
    llama = random_llama(dataclasses.replace(BASE, vocab_size=2))
    coin = torch.tensor([0.8, 0.2])
    llama.register_forward_hook(lambda _, __, out: coin.log().expand_as(out))
    found = complete(
        llama, [[0]] * 1000, max_new_tokens=2, sampling=SamplingParams(temperature=1.0)
    )
    for index in range(2):
        count = Counter(each.tokens[index] for each in found)
        assert abs(count[0] / 1000 - 0.8) < 4 * (0.8 * 0.2 / 1000) ** 0.5


# ---------------------------------------------------------------- end of a row


def test_row_ends_at_stop_token_while_others_continue(llama: Llama) -> None:
    prompts = random_prompts(5, 21, 2)
    free = [each.tokens for each in complete(llama, prompts)]
    # A token that occurs early in one row and later or never in the others.
    stop = free[1][2]
    ends = [tokens.index(stop) if stop in tokens else None for tokens in free]
    assert ends[1] is not None and ends != [ends[1]] * 3
    received: list[tuple[int, int]] = []
    found = complete(llama, prompts, stop=[stop], on_token=lambda *token: received.append(token))
    for row, completion in enumerate(found):
        assert completion == Completion(free[row][: ends[row]], stopped=ends[row] is not None)
        assert [token for index, token in received if index == row] == completion.tokens


def test_batch_ends_when_all_rows_have_ended(llama: Llama) -> None:
    prompts = random_prompts(5, 21)
    free = [each.tokens for each in complete(llama, prompts)]
    calls: list[Any] = []
    handle = llama.register_forward_pre_hook(lambda *call: calls.append(call))
    complete(llama, prompts, stop=[free[0][3], free[1][2]])
    handle.remove()
    assert len(calls) <= 4


def test_on_token_can_end_a_row(llama: Llama) -> None:
    prompts = random_prompts(5, 21)
    free = complete(llama, prompts)
    seen = Counter[int]()

    def is_third_of_first_row(row: int, token: int) -> bool:
        seen[row] += 1
        return row == 0 and seen[row] == 3

    first, second = complete(llama, prompts, on_token=is_third_of_first_row)
    assert first == Completion(free[0].tokens[:3], stopped=True)
    assert second == free[1]


def test_row_ends_at_the_context_length(llama: Llama) -> None:
    """The last token is predicted from a full context."""
    prompts = random_prompts(CONTEXT - 3, CONTEXT, 4)
    found = complete(llama, prompts, max_new_tokens=100)
    assert [len(each.tokens) for each in found] == [4, 1, CONTEXT - 3]
    assert not any(each.stopped for each in found)
    assert [each.tokens for each in found] == [
        without_cache(llama, prompt, n) for prompt, n in zip(prompts, (4, 1, 45), strict=True)
    ]


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_2_1b"])
def test_greedy_text_equals_transformers(name: str) -> None:
    """An untied model, and a tied one with RoPE scaling; some texts end with a stop token."""
    config = scaled_down(next(path for path in FILES if path.stem == name))
    ours, theirs = paired_models(config)
    stop, ends = theirs.config.eos_token_id, []
    for prompt in random_prompts(5, 20, 9, vocab=config.vocab_size):
        expected = cast(Any, theirs).generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        (found,) = complete(ours, [prompt], max_new_tokens=40, stop=[stop])
        assert found.tokens + [stop] * found.stopped == expected[0, len(prompt) :].tolist()
        ends.append(found.stopped)
        assert len(set(found.tokens)) > 5
    assert not all(ends)
