"""A non-finite loss or gradient on one rank makes all ranks skip the update.

A run with a bad batch between good ones ends bit-identical to a run without it: weights, moments
and step counts of each shard. The bad value is injected into the local loss of one rank and
propagates as a real one would, through backward and gradient norm.
"""

import math
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from small_run import OPTIM, Case, batch, build, local_batches
from torch import Tensor
from torch.distributed.tensor import DTensor

from parallel.parallelize import local_block
from parallel.step_scalars import StepRequests
from train import train_step
from training.optimizer import StateFormat, build_optimizer

CASES: list[tuple[Case, StateFormat]] = [
    (Case(dp=2), "fp32"),
    (Case(dp=2), "bf16"),
    (Case(tp=2), "fp32"),
    (Case(tp=2), "int8"),
    (Case(cp=2, n_micro=1), "fp32"),
    (Case(dp_replicate=2), "fp32"),
    (Case(pp=2), "fp32"),
    (Case(pp=2, n_micro=3), "int8"),
]
FAULTS = ("loss_and_gradient", "loss_only", "gradient_only")
BAD_RANK = 1


class _ScaleLossAndGradient(torch.autograd.Function):
    """Multiply the local loss and its gradient by one factor each."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, loss_factor: float, gradient_factor: float) -> Tensor:
        ctx.factor = gradient_factor
        return loss * loss_factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None


def inject_fault(run: Any, fault: str) -> Any:
    """Make this rank's loss, its gradient or both non-finite; return the handle of the hook."""
    factors = {
        "loss_and_gradient": (math.nan, math.nan),
        "loss_only": (math.inf, 1.0),
        "gradient_only": (1.0, math.inf),
    }[fault]
    return run.llama.register_forward_hook(
        lambda _, __, loss: _ScaleLossAndGradient.apply(loss, *factors)
    )


def build_run(case: Case, state: StateFormat) -> Any:
    run = build(case)
    run.adamw = build_optimizer(run.llama, OPTIM, state)
    run.optimizer = run.fabric.setup_optimizers(run.adamw)
    return run


def shards(run: Any) -> list[Tensor]:
    """Return copies of the local shards of parameters and optimizer state."""
    tensors = [local_block(parameter)[0] for parameter in run.llama.parameters()]
    for state in run.adamw.state_dict()["state"].values():
        tensors += [v.to_local() if isinstance(v, DTensor) else v for v in state.values()]
    return [tensor.detach().clone() for tensor in tensors]


def take_step(run: Any, case: Case, number: int, fault: str | None = None) -> list[float]:
    """Run one step, optionally with a fault on one rank; return loss, norm and requests."""
    batches = local_batches(batch(number), run.data_rank, case.mesh.dp, case.n_micro)
    rank = run.fabric.global_rank
    hook = inject_fault(run, fault) if fault is not None and rank == BAD_RANK else None
    scalars = train_step(run, batches, OPTIM.lr, requests=StepRequests(rank, 1, 0))["scalars"]
    if hook is not None:
        hook.remove()
    return cast(list[float], scalars.tolist())


def run_case(case: Case, state: StateFormat) -> dict[str, Any]:
    """Return the statistics of each step and whether bad steps changed the state of this rank."""
    clean = build_run(case, state)
    results: dict[str, Any] = {"clean": [take_step(clean, case, number) for number in (0, 1)]}
    expected = shards(clean)
    for fault in FAULTS:
        run = build_run(case, state)
        bad = [take_step(run, case, 2, fault)]  # already at the first step
        good = [take_step(run, case, 0)]
        before = shards(run)
        bad.append(take_step(run, case, 2, fault))
        unchanged = all(map(torch.equal, shards(run), before))
        good.append(take_step(run, case, 1))
        results[fault] = {
            "bad": bad,
            "good": good,
            "unchanged_by_bad_step": unchanged,
            "final_state_equal": all(map(torch.equal, shards(run), expected)),
            "changed_by_good_step": not all(map(torch.equal, before, expected)),
        }
    return results


def run_cases() -> list[dict[str, Any]]:
    return [run_case(case, state) for case, state in CASES]


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    """Return the result of `run_case` by rank, then by case."""
    return on_ranks(2, run_cases)


every_case = pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{case.mesh}-{state}" for case, state in CASES]
)


@every_case
@pytest.mark.parametrize("fault", FAULTS)
def test_non_finite_value_on_one_rank_skips_the_update_on_all_ranks(
    results: Any, number: int, fault: str
) -> None:
    for rank in results:
        result = rank[number][fault]
        for loss, norm, *_ in result["bad"]:
            assert not (math.isfinite(loss) and math.isfinite(norm))
            assert fault != "loss_only" or (not math.isfinite(loss) and math.isfinite(norm))
            assert fault != "gradient_only" or (math.isfinite(loss) and not math.isfinite(norm))
        assert result["unchanged_by_bad_step"] and result["changed_by_good_step"]


@every_case
@pytest.mark.parametrize("fault", FAULTS)
def test_good_steps_around_skipped_ones_match_a_run_without_them(
    results: Any, number: int, fault: str
) -> None:
    for rank in results:
        assert rank[number][fault]["good"] == rank[number]["clean"]
        assert rank[number][fault]["final_state_equal"]


@every_case
def test_all_ranks_read_the_same_step_statistics(results: Any, number: int) -> None:
    """Only rank 1 makes the first request; both ranks make the second."""
    first, second = (rank[number] for rank in results)
    assert str(first) == str(second)  # as text, because NaN is not equal to itself
    assert all(requests == [1, 2, 0, 0, 0] for _, _, *requests in first["clean"])


def one_process() -> list[float]:
    return take_step(build_run(Case(), "fp32"), Case(), 0)[:2]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Return loss and norm of the first step on one process."""
    (stats,) = on_ranks(1, one_process)
    return cast(list[float], stats)


@every_case
def test_loss_and_norm_match_one_process_on_every_mesh(
    results: Any, expected: list[float], number: int
) -> None:
    """A sum in a different order rounds differently: a few float32 ulps of 1e-7."""
    assert results[0][number]["clean"][0][:2] == pytest.approx(expected, rel=3e-6)
