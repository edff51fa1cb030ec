"""Ranks that compute more slowly than the others are named, although all steps are equally long."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import on_ranks
from small_run import Case, batch, build, local_batches
from torch import nn

from train import train_step
from training.stragglers import STEPS, StragglerMonitor, describe, find_stragglers

TIMES = 5  # of the other rank's seconds: larger than what other processes of the machine add


def slow(block: nn.Module) -> None:
    """Multiply the seconds of a block's forward by `TIMES`."""
    forward = block.forward

    def slowed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        time.sleep((TIMES - 1) * (time.perf_counter() - start))
        return result

    block.forward = slowed


def warnings(case: Case, slow_rank: int) -> list[Any]:
    """Train twice as many steps as are compared; return the warnings."""
    run: Any = build(case)
    monitor = StragglerMonitor(run.llama.layers, torch.device("cpu"))
    if dist.get_rank() == slow_rank:
        for block in run.llama.layers:
            slow(block)
    found = []
    for step in range(1, 2 * STEPS + 1):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        train_step(run, batches, lr=1e-3)
        monitor.end_step()
        if step % 10 == 0:
            found.append(monitor.warning())
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case(dp=2, n_layers=2, n_micro=1),
        Case(pp=2, n_layers=5),  # unequal numbers of layers
        Case(pp=2, pp_parts=2, n_layers=4),
    ],
    ids=str,
)
def test_slow_rank_is_named_once(case: Case) -> None:
    found = on_ranks(2, warnings, case, 1)
    assert found[0] == found[1]
    first, second, *later = found[0]
    assert first is None and second.startswith("Warning: rank 1 on ")
    assert later == [None, None]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([[1.0, 1.0, 1.0], [1.05, 1.02, 1.09]], []),
        ([[1.0, 1.0, 1.0], [1.2, 1.3, 1.2]], [1]),
        ([[1.0, 2.0, 1.0], [1.2, 2.4, 1.2], [1.0, 2.0, 1.0]], [1]),  # longer sequences
        ([[0.01, 0.01, 0.01], [0.05, 0.05, 0.05]], []),  # far more, but little of a step
        ([[1.0, 1.0, 1.0], [1.0, 9.0, 1.0], [1.0, 1.0, 1.0]], []),  # in one step only
        ([[1.2, 1.2, 1.2], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.5, 1.5, 1.5]], [0, 3]),
    ],
)
def test_rank_is_slow_if_most_of_its_steps_are(
    seconds: Sequence[Sequence[float]], expected: list[int]
) -> None:
    layers = torch.ones(len(seconds))
    assert list(find_stragglers(torch.tensor(seconds), layers, torch.full((3,), 3.0))) == expected


def test_pipeline_stages_are_compared_by_layer_and_the_head_alone_is_not() -> None:
    layers = torch.tensor([2.0, 3.0, 3.0, 0.0])
    equal = 0.1 * layers.unsqueeze(1).expand(-1, 3)
    steps = torch.full((3,), 2.0)
    assert find_stragglers(equal, layers, steps) == {}
    slowed = equal * torch.tensor([[1.5], [1.0], [1.0], [1.0]])  # as long as stages 1 and 2
    # 0.1 s more forward, and twice that in the backward, of a step of 2 s.
    assert find_stragglers(slowed, layers, steps) == {0: pytest.approx(0.15)}


def test_every_slow_host_is_named_slowest_first() -> None:
    hosts = ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert describe({}, hosts) is None
    text = describe({2: 0.12, 3: 0.2, 4: 0.3}, hosts)
    assert text is not None
    assert text.startswith("Warning: rank 4 on n3; ranks 2-3 on n2: slower than the other ranks")
    assert "cost 30% of" in text
