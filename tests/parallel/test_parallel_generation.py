"""Generation on a mesh: every mesh chooses the tokens that one process does."""

import pytest
import torch
from distributed import on_ranks
from small_run import VOCAB, Case, build
from torch import Tensor

from evaluation.generation import Completion, Sampling, generate
from evaluation.generation_sync import GenerationSync

# The logits are large, so that attention is far from uniform.
SAMPLING = [Sampling(), Sampling(temperature=40.0, top_k=20, top_p=0.9, seed=3)]
PROMPTS = [[5, 50, 7], [1, 2, 3, 4, 5, 6, 7], [57], [9, 9, 8, 30, 31]]
N_TOKENS = 16

Found = list[list[Completion]]  # for each way of sampling, for each prompt


class Contrary(GenerationSync):
    """That of a rank whose logits are far from its peer's."""

    def chosen(self, tokens: Tensor) -> Tensor:
        return super().chosen((tokens + 1) % VOCAB)


@pytest.fixture(scope="module")
def one_process() -> Found:
    (found,) = on_ranks(1, completions, Case(n_layers=2))
    assert len({tuple(each.tokens) for way in found for each in way}) == 8
    return found


def test_tensor_parallel_peers_choose_as_one_process_does(one_process: Found) -> None:
    """By what the first of them chooses: the other one wants another token each time."""
    case = Case(tp=2, sequence_parallel=False, n_layers=2)
    assert on_ranks(2, completions, case) == [one_process] * 2


def test_gathered_logits_do_as_well(one_process: Found) -> None:
    case = Case(tp=2, sequence_parallel=False, loss_parallel=False, n_layers=2)
    assert on_ranks(2, completions, case) == [one_process] * 2


def test_data_ranks_complete_prompts_of_their_own(one_process: Found) -> None:
    """The second one is done after half as many tokens, and goes on for the first one's sake."""
    first, second = on_ranks(2, completions, Case(dp=2, n_layers=2))
    for way, expected in enumerate(one_process):
        assert first[way] == expected[:2]
        assert second[way] == [
            Completion(each.tokens[: N_TOKENS // 2], False) for each in expected[2:]
        ]


def completions(case: Case) -> Found:
    """Of this data rank's share of the prompts."""
    run = build(case)
    with torch.no_grad():
        for parameter in run.llama.parameters():
            parameter.mul_(20)  # an untrained model likes to repeat one token
    contrary = run.fabric.global_rank > 0 and case.tp > 1
    agreement = (Contrary if contrary else GenerationSync)(
        run.strategy.device_mesh, run.fabric.device
    )
    share = len(PROMPTS) // case.dp
    return [
        generate(
            run.model,
            PROMPTS[run.data_rank * share :][:share],
            max_new_tokens=N_TOKENS // (run.data_rank + 1),
            sampling=sampling,
            stop=[],
            device=run.fabric.device,
            agree=agreement,
            first_prompt=run.data_rank * share,
        )
        for sampling in SAMPLING
    ]
