"""Log-likelihoods and greedy flags for lm-eval on a mesh match those of one process."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import on_ranks
from small_run import VOCAB, Case, build

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from evaluation.lm_eval_model import LlameshLM

CONTEXTS = [[5, 50, 7], [1], [57, 57], [8, 30, 31, 2]]
# Every token after each context, so that exactly one is the greedy choice; then texts of several
# lengths, whose number is not a multiple of the batch size.
REQUESTS = [(None, context, [token]) for context in CONTEXTS for token in range(VOCAB)] + [
    (None, [1] * n, [2, 57, 30][: 1 + n % 3]) for n in range(3, 12)
]

Likelihoods = list[tuple[float, bool]]


@pytest.fixture(scope="module")
def one_process() -> Likelihoods:
    (results,) = on_ranks(1, likelihoods, Case(n_layers=2))
    greedy_tokens = []
    for first in range(0, VOCAB * len(CONTEXTS), VOCAB):
        by_token = results[first : first + VOCAB]
        assert math.fsum(math.exp(value) for value, _ in by_token) == pytest.approx(1, rel=1e-5)
        assert [greedy for _, greedy in by_token].count(True) == 1
        greedy_tokens.append(by_token.index(max(by_token)))
        assert by_token[greedy_tokens[-1]][1]
    # Both tensor-parallel ranks hold at least one of the greedy tokens.
    assert min(greedy_tokens) < VOCAB // 2 <= max(greedy_tokens)
    return results


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, sequence_parallel=False, loss_parallel=False, n_layers=2),
        Case(dp=2, n_layers=2),
        Case(dp_replicate=2, n_layers=2),
    ],
    ids=["tp", "dp_shard", "dp_replicate"],
)
def test_mesh_returns_the_log_likelihoods_of_one_process(
    one_process: Likelihoods, case: Case
) -> None:
    """The tolerance covers float32 rounding of logits of about 100, summed in another order."""
    for results in on_ranks(2, likelihoods, case):
        assert [greedy for _, greedy in results] == [greedy for _, greedy in one_process]
        values = [value for value, _ in one_process]
        assert [value for value, _ in results] == pytest.approx(values, rel=1e-5, abs=1e-4)


def likelihoods(case: Case) -> Likelihoods:
    run = build(case)
    with torch.no_grad():
        for parameter in run.llama.parameters():
            parameter.mul_(20)  # makes the distribution far from uniform
    tokenizer = ready_tokenizer(TokenizerConfig("byte", vocab_size=272))
    assert tokenizer is not None

    context: Any = SimpleNamespace(
        fabric=run.fabric,
        mesh=case.mesh,
        llama=run.llama,
        model=run.model,
        data_rank=run.data_rank,
        weights=SimpleNamespace(model=run.llama.config, folder=Path()),
    )
    return LlameshLM(context, tokenizer, batch_size=4)._loglikelihood_tokens(REQUESTS)
