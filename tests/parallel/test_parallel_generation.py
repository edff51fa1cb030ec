"""Generation on a mesh returns the tokens of single-process generation."""

import pytest
import torch
from distributed import on_ranks
from small_run import VOCAB, Case, build
from torch import Tensor

from evaluation.generation import Completion, GenerationSync, SamplingParams, generate

# The logits are large, so that attention is far from uniform.
SAMPLING = [SamplingParams(), SamplingParams(temperature=40.0, top_k=20, top_p=0.9, seed=3)]
PROMPTS = [[5, 50, 7], [1, 2, 3, 4, 5, 6, 7], [57], [9, 9, 8, 30, 31]]
N_TOKENS = 16

Completions = list[list[Completion]]  # by sampling setting, then by prompt


class DivergingSync(GenerationSync):
    """Simulate a rank that would choose a different token than rank 0 at every step."""

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        return super().broadcast_tokens((tokens + 1) % VOCAB)


@pytest.fixture(scope="module")
def one_process() -> Completions:
    (results,) = on_ranks(1, completions, Case(n_layers=2))
    assert len({tuple(each.tokens) for by_prompt in results for each in by_prompt}) == 8
    return results


def test_tensor_parallel_ranks_generate_the_tokens_of_one_process(
    one_process: Completions,
) -> None:
    """All ranks use the choice of the first one, even if another rank's choice differs."""
    case = Case(tp=2, sequence_parallel=False, n_layers=2)
    assert on_ranks(2, completions, case) == [one_process] * 2


def test_gathered_logits_generate_the_tokens_of_one_process(one_process: Completions) -> None:
    case = Case(tp=2, sequence_parallel=False, loss_parallel=False, n_layers=2)
    assert on_ranks(2, completions, case) == [one_process] * 2


def test_pipeline_stages_generate_the_tokens_of_one_process(one_process: Completions) -> None:
    assert on_ranks(2, completions, Case(pp=2, n_layers=2)) == [one_process] * 2


def test_data_ranks_complete_separate_prompts(one_process: Completions) -> None:
    """The second rank needs half as many tokens and keeps running until the first one is done."""
    first, second = on_ranks(2, completions, Case(dp=2, n_layers=2))
    for setting, expected in enumerate(one_process):
        assert first[setting] == expected[:2]
        assert second[setting] == [
            Completion(each.tokens[: N_TOKENS // 2], False) for each in expected[2:]
        ]


def completions(case: Case) -> Completions:
    """Complete this data rank's prompts with each sampling setting."""
    run = build(case)
    with torch.no_grad():
        for parameter in run.llama.parameters():
            parameter.mul_(20)  # an untrained model tends to repeat one token
    diverges = run.fabric.global_rank > 0 and case.tp > 1
    sync = (DivergingSync if diverges else GenerationSync)(run.strategy.device_mesh)
    n_prompts = len(PROMPTS) // case.dp
    return [
        generate(
            run.model,
            PROMPTS[run.data_rank * n_prompts :][:n_prompts],
            max_new_tokens=N_TOKENS // (run.data_rank + 1),
            sampling=sampling,
            stop=[],
            device=run.fabric.device,
            sync=sync,
            first_prompt=run.data_rank * n_prompts,
        )
        for sampling in SAMPLING
    ]
