"""Compiled functions run with any number of shapes, with a bounded number of graphs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from evaluation.generation import sample_text
from model import attention
from model.attention import AttentionKernel
from model.compiled import GRAPHS, compile_for_any_shape
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from model.loss import CrossEntropySum
from parallel.compilation import apply_compile, compiled_graphs
from training import moments
from training.deterministic import nondeterministic

# Batch and sequence length: stages, last micro-batches, validation, a single row.
SHAPES = [(4, 32), (4, 64), (2, 48), (1, 48), (3, 40), (5, 33), (1, 100), (7, 20), (2, 130), (6, 7)]

BYTES = TokenizerConfig("byte", 272)

Run = Callable[[int, int], None]


@pytest.fixture(autouse=True)
def _without_code_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The shapes of a graph are Dynamo's decision; code generation would take minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    caches = (attention._compiled_flex, moments._compiled)
    with torch._dynamo.config.patch(recompile_limit=8):
        for reset in (torch.compiler.reset, *(cache.cache_clear for cache in caches)):
            reset()
        torch._dynamo.utils.counters.clear()
        yield
        for reset in (torch.compiler.reset, *(cache.cache_clear for cache in caches)):
            reset()


def attention_of_a_block() -> Run:
    """Return the part of a block whose shapes vary, compiled as a block, without and with grad."""
    kernel = AttentionKernel("sdpa")
    compiled = compile_for_any_shape(lambda x, mask: x + kernel(x, x, x, mask))

    def run(batch: int, seq: int) -> None:
        x = torch.ones(batch, seq, 2, 8, requires_grad=True)  # (batch, seq, heads, head_dim)
        mask = kernel.mask((torch.arange(seq) % 7).repeat(batch, 1), None, x)
        compiled(x, mask).sum().backward()
        with torch.no_grad():
            compiled(x, mask)
            compiled(x, None)

    return run


def loss() -> Run:
    module = CrossEntropySum(chunk=48)
    module.compile_stages()

    def run(batch: int, seq: int) -> None:
        labels = torch.ones(batch, seq, dtype=torch.int64)
        hidden = torch.ones(batch, seq, 4, requires_grad=True)
        module(hidden, torch.ones(10, 4, requires_grad=True), labels).backward()

    return run


def flex() -> Run:
    kernel = AttentionKernel("flex")

    def run(batch: int, seq: int) -> None:
        q: Tensor = torch.ones(batch, seq, 2, 16)
        kernel(q, q, q, kernel.mask((torch.arange(seq) % 7).repeat(batch, 1), None, q))

    return run


def int8_moments() -> Run:
    levels = torch.linspace(-1, 1, 256)

    def run(batch: int, seq: int) -> None:
        values = torch.ones(batch * seq, moments.BLOCK)
        codes, scales = moments._compiled(moments._quantize)(values, levels)
        moments._compiled(moments._dequantize)(codes, scales, levels)

    return run


@pytest.mark.parametrize("function", [attention_of_a_block, loss, flex, int8_moments])
def test_number_of_graphs_is_bounded(function: Callable[[], Run]) -> None:
    """No function has a graph per shape; a graph more than the limit would end a run."""
    run = function()
    for batch, seq in SHAPES:
        run(batch, seq)
    found = compiled_graphs()
    assert found < GRAPHS / 2
    for batch, seq in ((3, 51), (9, 77), (1, 30)):
        run(batch, seq)
    assert compiled_graphs() == found


def test_text_sample_of_a_deterministic_run_adds_no_graphs() -> None:
    """It leaves deterministic mode, which Dynamo's guards of the graphs include."""
    llama = Llama(ModelConfig("small", 16, 1, 2, 1, 24, 272))
    initialize(llama, llama.config, seed=0)
    apply_compile(llama)
    tokens, tokenizer = torch.ones(2, 8, dtype=torch.int64), ready_tokenizer(BYTES)
    assert tokenizer is not None

    def step() -> int:
        llama(tokens, labels=tokens).backward()
        return compiled_graphs()

    torch.use_deterministic_algorithms(True)
    try:
        first = step()
        with nondeterministic():
            arguments: dict[str, Any] = {"temperature": 1.0, "seed": 0, "device": tokens.device}
            sample_text(llama, tokenizer, "ab", n_tokens=2, **arguments)
        assert step() == first > 0
    finally:
        torch.use_deterministic_algorithms(False)
