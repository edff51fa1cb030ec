"""Log-probabilities of chosen tokens on a mesh: those of one process, and the same choices."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from small_run import VOCAB, Case, build

from data.config import TokenizerConfig
from data.tokenizer import ready_tokenizer
from evaluation.language_model import LlameshModel

CONTEXTS = [[5, 50, 7], [1], [57, 57], [8, 30, 31, 2]]
# Every token after each context, so that one of them is the likeliest; texts of several lengths, in
# batches that do not come out even.
ASKED = [(None, context, [token]) for context in CONTEXTS for token in range(VOCAB)] + [
    (None, [1] * n, [2, 57, 30][: n % 4]) for n in range(3, 12)
]

Found = list[tuple[float, bool]]


@pytest.fixture(scope="module")
def one_process() -> Found:
    (found,) = on_ranks(1, answers, Case(n_layers=2))
    likeliest = []
    for first in range(0, VOCAB * len(CONTEXTS), VOCAB):
        each = found[first : first + VOCAB]
        assert math.fsum(math.exp(value) for value, _ in each) == pytest.approx(1, rel=1e-5)
        assert [greedy for _, greedy in each].count(True) == 1
        likeliest.append(each.index(max(each)))
        assert each[likeliest[-1]][1]
    assert min(likeliest) < VOCAB // 2 <= max(likeliest)  # both tensor-parallel ranks have some
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, n_layers=2),
        Case(tp=2, sequence_parallel=False, loss_parallel=False, n_layers=2),
        Case(dp=2, n_layers=2),
        Case(dp_replicate=2, n_layers=2),
    ],
    ids=["tp, sharded head", "tp, gathered head", "dp_shard", "dp_replicate"],
)
def test_a_mesh_answers_as_one_process(one_process: Found, case: Case) -> None:
    """To float32's rounding of logits of about 100, whose sums are in another order."""
    for found in on_ranks(2, answers, case):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in one_process]
        values = [value for value, _ in one_process]
        assert [value for value, _ in found] == pytest.approx(values, rel=1e-5, abs=1e-4)


def answers(case: Case) -> Found:
    run = build(case)
    with torch.no_grad():
        for parameter in run.llama.parameters():
            parameter.mul_(20)  # far from uniform
    tokenizer = ready_tokenizer(TokenizerConfig("byte", vocab_size=272))
    assert tokenizer is not None

    def gather(own: list[object]) -> list[list[object]]:
        shares: list[list[object]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, own)
        return shares[:: case.mesh.ranks_per_sample]

    return LlameshModel(
        run.model,
        tokenizer,
        device=run.fabric.device,
        batch_size=4,
        stop=[],
        data_rank=run.data_rank,
        data_size=case.mesh.dp,
        gather=gather,
        multiple_of=case.tp,
        is_first=False,
    )._loglikelihood_tokens(ASKED)
