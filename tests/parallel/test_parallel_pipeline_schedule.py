"""The pipeline's cut of the model and its schedule, in a simulation of all ranks.

In the simulation nothing is buffered: a transfer takes place when its sender and its receiver have
both started it. Each link is a communicator of its own, which carries one direction of one kind and
runs one transfer at a time, in the order in which its operations were started.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product

import pytest
from model_configs import FILES, read

from model.config import ModelConfig
from model.flops import parameter_count
from parallel.pipeline_schedule import (
    Operation,
    Transfer,
    bubble,
    max_in_flight,
    model_parts,
    operations,
    schedule,
    split_layers,
)

GRID = [
    (ranks, parts, micro_batches)
    for ranks, parts, micro_batches in product((2, 3, 4, 5, 8), (1, 2, 3, 4), range(1, 17))
    if parts == 1 or micro_batches % ranks == 0
]
FORWARD, BACKWARD = 1, 2  # durations of a stage
SMALL = ModelConfig("small", 64, 9, 4, 2, 192, 512)

Programs = list[list[Operation]]


def programs_of(ranks: int, parts: int, micro_batches: int) -> Programs:
    return [list(operations(rank, ranks, parts, micro_batches)) for rank in range(ranks)]


class Deadlock(Exception):
    """No rank and no link can proceed."""


def simulate(programs: Programs, parts: int) -> list[float]:
    """Return the time at which each rank finishes.

    Raises:
        Deadlock: As its message, the operation that each rank waits in.
    """
    ranks = len(programs)
    clocks, positions = [0.0] * ranks, [0] * ranks
    # By link: transfers that were started and not completed, with their start, at both ends.
    started: dict[tuple[str, int, bool], deque[tuple[Transfer, float]]] = defaultdict(deque)
    done: dict[Transfer, float] = {}
    last_sent: dict[tuple[int, bool], Transfer] = {}

    def link(side: str, transfer: Transfer) -> tuple[str, int, bool]:
        return side, transfer.source % ranks, transfer.forward

    def complete_transfers() -> bool:
        found = False
        for (side, rank, forward), sends in list(started.items()):
            receives = started[("receive", rank, forward)]
            while side == "send" and sends and receives and sends[0][0] == receives[0][0]:
                (transfer, at), (_, ready) = sends.popleft(), receives.popleft()
                done[transfer] = max(at, ready)
                found = True
        return found

    def advance(rank: int) -> bool:
        if positions[rank] == len(programs[rank]):
            return False
        kind, transfer, action = programs[rank][positions[rank]]
        if action is not None:
            clocks[rank] += (FORWARD if action.forward else BACKWARD) / parts
        else:
            assert transfer is not None
            if kind == "send":
                previous = last_sent.get((rank, transfer.forward))
                if previous is not None and previous not in done:
                    return False
                clocks[rank] = max(clocks[rank], done.get(previous, 0.0) if previous else 0.0)
                last_sent[rank, transfer.forward] = transfer
            if kind == "wait":
                if transfer not in done:
                    return False
                clocks[rank] = max(clocks[rank], done[transfer])
            else:
                started[link(kind, transfer)].append((transfer, clocks[rank]))
        positions[rank] += 1
        return True

    while any(position < len(each) for position, each in zip(positions, programs, strict=True)):
        moved = [advance(rank) for rank in range(ranks)]
        if not (any(moved) | complete_transfers()):
            waiting = [
                program[p]
                for p, program in zip(positions, programs, strict=True)
                if p < len(program)
            ]
            raise Deadlock(waiting)
    return clocks


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), GRID)
def test_schedule_runs_each_computation_once_without_deadlock(
    ranks: int, parts: int, micro_batches: int
) -> None:
    """In the time of the formula, of which `bubble` is idle."""
    for rank in range(ranks):
        order = schedule(rank, ranks, parts, micro_batches)
        expected = set(product((True, False), range(parts), range(micro_batches)))
        assert len(order) == len(expected)
        assert set(order) == expected
    step = max(simulate(programs_of(ranks, parts, micro_batches), parts))
    busy = (FORWARD + BACKWARD) * micro_batches
    assert 1 - busy / step == pytest.approx(bubble(ranks, parts, micro_batches))


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), GRID)
def test_no_more_micro_batches_are_in_flight_than_stated(
    ranks: int, parts: int, micro_batches: int
) -> None:
    for rank in range(ranks):
        alive = most = 0
        for action in schedule(rank, ranks, parts, micro_batches):
            alive += 1 if action.forward else -1
            most = max(most, alive)
        assert most == max_in_flight(rank, ranks, parts, micro_batches)


@pytest.mark.parametrize("kind", ["send", "receive"])
def test_two_transfers_in_another_order_deadlock(kind: str) -> None:
    """The simulation finds it for each pair of neighboring operations of one kind and direction."""
    for ranks, parts, micro_batches in [(2, 1, 4), (3, 1, 4), (4, 1, 5), (2, 2, 4), (4, 2, 8)]:
        for rank in range(ranks):
            programs = programs_of(ranks, parts, micro_batches)
            same = [
                index
                for index, (each, transfer, _) in enumerate(programs[rank])
                if each == kind and transfer is not None and transfer.forward
            ]
            for first, second in pairwise(same):
                swapped = list(programs[rank])
                swapped[first], swapped[second] = swapped[second], swapped[first]
                with pytest.raises(Deadlock):
                    simulate([*programs[:rank], swapped, *programs[rank + 1 :]], parts)


def test_a_deadlock_across_links_is_found() -> None:
    """A rank waits for a gradient before it sends the hidden states; each link keeps its order."""
    programs = programs_of(2, 1, 4)
    late = sorted(programs[0], key=lambda each: each.kind != "wait" and each.kind != "receive")
    with pytest.raises(Deadlock):
        simulate([late, programs[1]], 1)


def test_interleaved_schedule_needs_a_multiple_of_the_ranks() -> None:
    with pytest.raises(ValueError, match="6 micro-batches are not a multiple of 4 ranks"):
        schedule(0, 4, 2, 6)


# ---------------------------------------------------------------- the cut


def test_cut_of_405b_is_the_published_one() -> None:
    config = next(read(file) for file in FILES if file.stem == "llama3_1_405b")
    assert split_layers(replace(config, vocab_size=128_256), 16) == [7, *[8] * 14, 7]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("vocab_size", [64, 4096, 128_256])
def test_no_cut_has_a_faster_slowest_stage(stages: int, vocab_size: int) -> None:
    """Every cut of nine layers is tried, with the products of a layer and of the head as time."""
    config = replace(SMALL, vocab_size=vocab_size)
    weights = parameter_count(replace(config, n_layers=1)) - parameter_count(
        replace(config, n_layers=0)
    )
    layer, head = weights - 2 * config.dim, config.dim * vocab_size

    def slowest(layers: Sequence[int]) -> int:
        return max(*(n * layer for n in layers[:-1]), layers[-1] * layer + head, 0)

    cuts = product(range(config.n_layers + 1), repeat=stages - 1)
    complete = ((*cut, config.n_layers - sum(cut)) for cut in cuts if sum(cut) <= config.n_layers)
    possible = [cut for cut in complete if min(cut[:-1], default=1) >= 1]
    chosen = split_layers(config, stages)
    assert slowest(chosen) == min(map(slowest, possible))


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 4), (3, 3)])
def test_parts_of_all_ranks_are_the_model(ranks: int, parts: int) -> None:
    layers = split_layers(SMALL, ranks * parts)
    of_ranks = [model_parts(layers, rank, ranks) for rank in range(ranks)]
    stages = [of_ranks[stage % ranks][stage // ranks] for stage in range(ranks * parts)]
    assert [layer for part in stages for layer in part.layers] == list(range(SMALL.n_layers))
    assert [part.has_embedding for part in stages] == [True] + [False] * (len(stages) - 1)
    assert [part.has_head for part in stages] == [False] * (len(stages) - 1) + [True]


def test_parts_of_a_rank_are_every_ppth_stage() -> None:
    parts = model_parts([2, 3, 3, 1], 1, 2)
    assert [list(part.layers) for part in parts] == [[2, 3, 4], [8]]
    assert [part.has_head for part in parts] == [False, True]
