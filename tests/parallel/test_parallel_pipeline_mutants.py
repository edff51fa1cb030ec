"""The comparison with one process detects errors in the runtime of pipelines.

Each mutant changes the runtime in the processes of a run; tests of `test_parallel_train_step` must
fail on it, and pass on the run without a mutant.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_parallel_train_step as train_step_tests
from distributed import on_ranks
from small_run import Case

import parallel.pipeline_parallel
from parallel.pipeline_parallel import Pipeline
from parallel.pipeline_schedule import Operation, operations
from parallel.strategy import MeshStrategy

CASE = Case(pp=2, pp_parts=2, tied=True, n_layers=5, n_micro=4)


def keep_tied_gradients_apart() -> None:
    Pipeline._sum_tied_gradients = lambda self: None  # type: ignore[method-assign]


def count_tied_gradients_twice() -> None:
    MeshStrategy.tied_weight = None  # type: ignore[assignment, method-assign]


def never_release_gradients() -> None:
    """The gradients stay unsharded, and the sharded weights have none."""
    release = parallel.pipeline_parallel.hold_gradients

    def hold(model: Any, hold: bool, replicas_only: bool) -> None:
        if hold:
            release(model, hold, replicas_only)

    parallel.pipeline_parallel.hold_gradients = hold


def scale_loss_by_stages() -> None:
    MeshStrategy.ranks_per_loss = 2  # type: ignore[assignment, method-assign]


def divide_by_micro_batches() -> None:
    accumulate = Pipeline.accumulate

    def scaled(self: Any, module: Any, micro_batches: Any, to_device: Any, n_targets: Any) -> Any:
        return accumulate(self, module, micro_batches, to_device, n_targets * len(micro_batches))

    Pipeline.accumulate = scaled  # type: ignore[method-assign]


def swap_micro_batches(forward: bool, part: int) -> None:
    """Let rank 0 exchange its first two micro-batches in one direction of one part.

    What it sends for one is received as the other, and what it receives for one is used for the
    other; both ranks still agree on the order of transfers.
    """

    def swapped(rank: int, ranks: int, parts: int, micro_batches: int) -> Iterator[Operation]:
        for each in operations(rank, ranks, parts, micro_batches):
            action = each.action
            if rank == 0 and action and (action.forward, action.part) == (forward, part):
                index = {0: 1, 1: 0}.get(action.micro_batch, action.micro_batch)
                action = action._replace(micro_batch=index)
            yield each._replace(action=action)

    parallel.pipeline_parallel.operations = swapped


def swap_hidden_states() -> None:
    swap_micro_batches(forward=True, part=0)


def swap_gradients() -> None:
    swap_micro_batches(forward=False, part=1)


def run_mutant(mutate: Callable[[], None] | None) -> dict[str, Any]:
    if mutate is not None:
        mutate()
    return train_step_tests.run_case(CASE)


def failing_tests(mutate: Callable[[], None] | None) -> list[str]:
    """Return the comparisons that fail, or the error of the first rank that fails."""
    try:
        results = {CASE: on_ranks(2, run_mutant, mutate)}
    except RuntimeError as error:
        return [str(error).strip().splitlines()[-1]]
    failing = []
    for test in (
        train_step_tests.test_initial_weights_are_bit_identical_to_one_process,
        train_step_tests.test_loss_and_norm_match_one_process,
        train_step_tests.test_clipped_gradients_match_one_process,
        train_step_tests.test_weights_after_adamw_steps_match_one_process,
        train_step_tests.test_validation_loss_and_logits_match_one_process,
    ):
        try:
            test(results, CASE)
        except AssertionError:
            failing.append(test.__name__)
    return failing


def test_comparison_passes_without_a_mutant() -> None:
    assert failing_tests(None) == []


# The first test that fails, or the error of a rank.
EXPECTED: dict[Callable[[], None], str] = {
    keep_tied_gradients_apart: "AssertionError: tok_embeddings.weight",  # the copies differ
    count_tied_gradients_twice: "test_loss_and_norm_match_one_process",
    never_release_gradients: "AttributeError: 'Tensor' object has no attribute 'to_local'",
    scale_loss_by_stages: "test_loss_and_norm_match_one_process",
    divide_by_micro_batches: "test_loss_and_norm_match_one_process",
    swap_hidden_states: "test_loss_and_norm_match_one_process",
    swap_gradients: "test_loss_and_norm_match_one_process",
}


@pytest.mark.parametrize("mutate", EXPECTED, ids=lambda mutate: mutate.__name__)
def test_comparison_fails_on_a_mutant(mutate: Callable[[], None]) -> None:
    assert failing_tests(mutate)[0] == EXPECTED[mutate]
