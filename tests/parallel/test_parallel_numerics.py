"""A value that is not finite on one rank alone: no rank makes the update, and all know of it.

One run sees a bad batch between good ones, the other never saw it: they end bit for bit alike,
weights, moments and step counts, shard by shard. The bad value stands in one sample's share of the
loss on one rank, from where it takes the way that a real one takes: through backward and norm.
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
]
WAYS = ("loss_and_gradient", "loss_alone", "gradient_alone")
BAD_RANK = 1


class _Spoiled(torch.autograd.Function):
    """A share of the loss, and its gradient, times one factor each."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, of_loss: float, of_gradient: float) -> Tensor:
        ctx.factor = of_gradient
        return share * of_loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None


def spoil(run: Any, way: str) -> Any:
    """From here on this rank's loss, its gradient or both are not finite; gives back a handle."""
    factors = {
        "loss_and_gradient": (math.nan, math.nan),
        "loss_alone": (math.inf, 1.0),
        "gradient_alone": (1.0, math.inf),
    }[way]
    return run.llama.register_forward_hook(lambda _, __, loss: _Spoiled.apply(loss, *factors))


def run_with(case: Case, state: StateFormat) -> Any:
    run = build(case)
    run.adamw = build_optimizer(run.llama, OPTIM, state)
    run.optimizer = run.fabric.setup_optimizers(run.adamw)
    return run


def shards(run: Any) -> list[Tensor]:
    """Copies of everything that a step changes, as this rank holds it."""
    found = [local_block(parameter)[0] for parameter in run.llama.parameters()]
    for state in run.adamw.state_dict()["state"].values():
        found += [v.to_local() if isinstance(v, DTensor) else v for v in state.values()]
    return [tensor.detach().clone() for tensor in found]


def take(run: Any, case: Case, number: int, way: str | None = None) -> list[float]:
    """One step, in a bad way on one rank if told so: loss, norm, requests."""
    batches = local_batches(batch(number), run.data_rank, case.mesh.dp, case.n_micro)
    rank = run.fabric.global_rank
    spoiled = spoil(run, way) if way is not None and rank == BAD_RANK else None
    scalars = train_step(run, batches, OPTIM.lr, requests=StepRequests(rank, 1, 0))["scalars"]
    if spoiled is not None:
        spoiled.remove()
    return cast(list[float], scalars.tolist())


def run_case(case: Case, state: StateFormat) -> dict[str, Any]:
    """The scalars of each step, and whether a bad step changed anything, here and afterwards."""
    clean = run_with(case, state)
    found: dict[str, Any] = {"clean": [take(clean, case, number) for number in (0, 1)]}
    expected = shards(clean)
    for way in WAYS:
        run = run_with(case, state)
        bad = [take(run, case, 2, way)]  # the very first step
        good = [take(run, case, 0)]
        before = shards(run)
        bad.append(take(run, case, 2, way))
        kept = all(map(torch.equal, shards(run), before))
        good.append(take(run, case, 1))
        found[way] = {
            "bad": bad,
            "good": good,
            "kept": kept,
            "same": all(map(torch.equal, shards(run), expected)),
            "changes": not all(map(torch.equal, before, expected)),
        }
    return found


def run_cases() -> list[dict[str, Any]]:
    return [run_case(case, state) for case, state in CASES]


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    """By rank, then by case."""
    return on_ranks(2, run_cases)


every_case = pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{case.mesh}-{state}" for case, state in CASES]
)


@every_case
@pytest.mark.parametrize("way", WAYS)
def test_what_is_bad_on_one_rank_is_skipped_on_all_bit_for_bit(
    found: Any, number: int, way: str
) -> None:
    for rank in found:
        seen = rank[number][way]
        for loss, norm, *_ in seen["bad"]:
            assert not (math.isfinite(loss) and math.isfinite(norm))
            assert way != "loss_alone" or (not math.isfinite(loss) and math.isfinite(norm))
            assert way != "gradient_alone" or (math.isfinite(loss) and not math.isfinite(norm))
        assert seen["kept"] and seen["changes"]


@every_case
@pytest.mark.parametrize("way", WAYS)
def test_good_steps_around_it_are_those_of_a_run_that_never_saw_it(
    found: Any, number: int, way: str
) -> None:
    for rank in found:
        assert rank[number][way]["good"] == rank[number]["clean"]
        assert rank[number][way]["same"]


@every_case
def test_all_ranks_read_the_same_scalars(found: Any, number: int) -> None:
    """Loss, norm and requests: rank 1 asks for the first, both for the second."""
    first, second = (rank[number] for rank in found)
    assert str(first) == str(second)  # nan is nan
    assert all(requests == [1, 2, 0, 0, 0] for _, _, *requests in first["clean"])


def one_process() -> list[float]:
    return take(run_with(Case(), "fp32"), Case(), 0)[:2]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """Loss and norm of the first step on one process."""
    (found,) = on_ranks(1, one_process)
    return cast(list[float], found)


@every_case
def test_the_loss_is_that_of_one_process_however_peers_share_it(
    found: Any, alone: list[float], number: int
) -> None:
    """A sum in another order rounds differently: a few float32 units, 1e-7 each."""
    assert found[0][number]["clean"][0][:2] == pytest.approx(alone, rel=3e-6)
