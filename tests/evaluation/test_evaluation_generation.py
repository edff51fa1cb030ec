"""Generation: neither the cache nor the batch changes a token.

The models are small and random, with weights large enough that attention looks at all of a text; so
a cache that lost or misplaced a single key would soon choose another token.
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

from evaluation.generation import Completion, Sampling, drawn, generate
from evaluation.kv_cache import cached
from model.config import ModelConfig, RopeScaling
from model.llama import Llama

CPU = torch.device("cpu")
VOCAB, CONTEXT, STOP = 61, 48, 60
BASE = ModelConfig("small", 32, 2, 4, 2, 48, VOCAB, max_seq_len=CONTEXT)
CONFIGS = {
    "grouped heads": BASE,
    "a head of keys for each": dataclasses.replace(BASE, n_kv_heads=4),
    "one head of keys": dataclasses.replace(BASE, n_kv_heads=1),
    "tied": dataclasses.replace(BASE, tie_embeddings=True),
    "scaled positions": dataclasses.replace(BASE, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
}
GREEDY = Sampling()
WARM = Sampling(temperature=0.9, top_k=20, top_p=0.9, seed=3)


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
    """The likeliest token each time, of a forward over all of the text."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        tokens.append(int(llama(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_tokens_equal_those_without_a_cache_one_by_one(kind: str) -> None:
    llama = random_llama(CONFIGS[kind])
    prompts = random_prompts(9, 1, 17, 30)
    together = complete(llama, prompts)
    for prompt, completion in zip(prompts, together, strict=True):
        expected = without_cache(llama, prompt, 16)
        assert completion == Completion(expected, stopped=False)
        assert complete(llama, [prompt]) == [completion]
        assert len(set(expected)) > 3  # more than the one token that a dead model repeats


def test_rows_of_one_length_need_no_mask_and_get_the_same_tokens(llama: Llama) -> None:
    prompts = random_prompts(11, 11, 11)
    expected = [without_cache(llama, prompt, 16) for prompt in prompts]
    assert [each.tokens for each in complete(llama, prompts)] == expected


def test_what_is_cached_has_the_size_of_the_heads_of_keys(llama: Llama) -> None:
    """Of 2 heads of keys for 4 of queries; the numbers are those that the model computes in."""
    halved = random_llama(BASE).bfloat16()
    for model, dtype in ((llama, torch.float32), (halved, torch.bfloat16)):
        with torch.no_grad(), cached(model, [3, 5], 20):
            model(torch.ones(2, 5, dtype=torch.int64))
            kernels = [cast(Any, layer).attention.kernel for layer in model.layers]
            tensors = [tensor for kernel in kernels for tensor in (kernel.k, kernel.v)]
        assert {tuple(tensor.shape) for tensor in tensors} == {(2, 20, 2, BASE.head_dim)}
        assert {tensor.dtype for tensor in tensors} == {dtype}


def test_the_head_computes_one_column_a_row(llama: Llama) -> None:
    shapes = []
    handle = llama.output.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    complete(llama, random_prompts(9, 30), max_new_tokens=3)
    handle.remove()
    assert shapes == [(2, 1, VOCAB)] * 3


def test_the_model_is_as_before_also_after_a_failure(llama: Llama) -> None:
    kernel, tokens = llama.kernel, torch.tensor(random_prompts(12))
    with torch.no_grad():
        before = llama(tokens)
        with pytest.raises(KeyError), cached(llama, [3], 8):
            raise KeyError
        assert llama.kernel is kernel
        assert torch.equal(llama(tokens), before)


# ---------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_prompt_gets_the_same_text_in_any_batch(llama: Llama, sampling: Sampling) -> None:
    prompts = random_prompts(5, 21, 2, 13)
    together = complete(llama, prompts, sampling=sampling)
    pairs = [
        *complete(llama, prompts[:2], sampling=sampling),
        *complete(llama, prompts[2:], sampling=sampling, first_prompt=2),
    ]
    single = [
        complete(llama, [prompt], sampling=sampling, first_prompt=number)[0]
        for number, prompt in enumerate(prompts)
    ]
    assert together == pairs == single


def test_the_number_of_a_prompt_and_the_seed_decide_what_is_drawn(llama: Llama) -> None:
    """The same prompt four times over is completed in four ways; a seed repeats."""
    prompts = random_prompts(7) * 4
    first = complete(llama, prompts, sampling=WARM)
    assert len({tuple(each.tokens) for each in first}) == 4
    assert complete(llama, prompts, sampling=WARM) == first
    other = complete(llama, prompts, sampling=dataclasses.replace(WARM, seed=4))
    assert not {tuple(each.tokens) for each in other} & {tuple(each.tokens) for each in first}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=0.9, top_k=12, top_p=0.6),
        Sampling(temperature=1.0, top_k=1000, top_p=1.0),
        Sampling(temperature=1.0, top_p=1e-9),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities_that_transformers_leaves(sampling: Sampling) -> None:
    """A grid of uniform numbers gives each token its share of the grid, to one point of it."""
    generator = torch.Generator().manual_seed(1)
    scores = 2 * torch.randn(1, VOCAB, generator=generator)
    scores[0, 7] = scores[0, 8] = scores.topk(5).values[0, -1]  # three as likely as the fifth
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = drawn(scores.expand(n, -1), sampling, uniform)
    warped = logits_process.TemperatureLogitsWarper(sampling.temperature)(cast(Any, None), scores)
    if sampling.top_k is not None:
        warped = logits_process.TopKLogitsWarper(sampling.top_k)(cast(Any, None), warped)
    if sampling.top_p is not None:
        warped = logits_process.TopPLogitsWarper(sampling.top_p)(cast(Any, None), warped)
    expected = warped.softmax(-1)[0]
    shares = torch.bincount(tokens, minlength=VOCAB) / n
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.5 / n)


def test_text_follows_the_probabilities_of_the_model() -> None:
    """1000 rows of a coin (0.8, 0.2); four standard deviations are allowed."""
    llama = random_llama(dataclasses.replace(BASE, vocab_size=2))
    coin = torch.tensor([0.8, 0.2])
    llama.register_forward_hook(lambda _, __, out: coin.log().expand_as(out))
    found = complete(llama, [[0]] * 1000, max_new_tokens=2, sampling=Sampling(temperature=1.0))
    for place in range(2):
        count = Counter(each.tokens[place] for each in found)
        assert abs(count[0] / 1000 - 0.8) < 4 * (0.8 * 0.2 / 1000) ** 0.5


# ---------------------------------------------------------------- where a text ends


def test_a_row_ends_at_its_stop_and_the_others_go_on(llama: Llama) -> None:
    prompts = random_prompts(5, 21, 2)
    free = [each.tokens for each in complete(llama, prompts)]
    # A token that one row has early and the others have late or never.
    stop = free[1][2]
    ends = [tokens.index(stop) if stop in tokens else None for tokens in free]
    assert ends[1] is not None and ends != [ends[1]] * 3
    told: list[tuple[int, int]] = []
    found = complete(llama, prompts, stop=[stop], on_token=lambda *token: told.append(token))
    for row, completion in enumerate(found):
        assert completion == Completion(free[row][: ends[row]], stopped=ends[row] is not None)
        assert [token for number, token in told if number == row] == completion.tokens


def test_a_batch_ends_when_all_its_rows_have(llama: Llama) -> None:
    prompts = random_prompts(5, 21)
    free = [each.tokens for each in complete(llama, prompts)]
    calls: list[Any] = []
    handle = llama.register_forward_pre_hook(lambda *call: calls.append(call))
    complete(llama, prompts, stop=[free[0][3], free[1][2]])
    handle.remove()
    assert len(calls) <= 4


def test_the_listener_can_end_a_row(llama: Llama) -> None:
    prompts = random_prompts(5, 21)
    free = complete(llama, prompts)
    seen = Counter[int]()

    def third_of_the_first(row: int, token: int) -> bool:
        seen[row] += 1
        return row == 0 and seen[row] == 3

    first, second = complete(llama, prompts, on_token=third_of_the_first)
    assert first == Completion(free[0].tokens[:3], stopped=True)
    assert second == free[1]


def test_a_text_ends_with_the_context(llama: Llama) -> None:
    """The last token that the context has room to predict is predicted from all of it."""
    prompts = random_prompts(CONTEXT - 3, CONTEXT, 4)
    found = complete(llama, prompts, max_new_tokens=100)
    assert [len(each.tokens) for each in found] == [4, 1, CONTEXT - 3]
    assert not any(each.stopped for each in found)
    assert [each.tokens for each in found] == [
        without_cache(llama, prompt, n) for prompt, n in zip(prompts, (4, 1, 45), strict=True)
    ]


# ---------------------------------------------------------------- other programs


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_2_1b"])
def test_greedy_text_equals_that_of_transformers(name: str) -> None:
    """One untied and one tied twin, this one with scaled positions; a text may end."""
    config = scaled_down(next(path for path in FILES if path.stem == name))
    ours, theirs = paired_models(config)
    stop, ends = theirs.config.eos_token_id, []
    for prompt in random_prompts(5, 20, 9, vocab=config.vocab_size):
        told = cast(Any, theirs).generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        (found,) = complete(ours, [prompt], max_new_tokens=40, stop=[stop])
        assert found.tokens + [stop] * found.stopped == told[0, len(prompt) :].tolist()
        ends.append(found.stopped)
        assert len(set(found.tokens)) > 5
    assert not all(ends)
