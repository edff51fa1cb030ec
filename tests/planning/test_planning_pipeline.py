"""Planned step time of a pipeline against a simulation of all ranks, and its search.

The simulation runs the operations of the runtime: a transfer takes place once its sender and its
receiver have started it, and a send waits for the one before it.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
from hydra import compose, initialize_config_dir
from published_plans import planned_tokens_per_second
from published_runs import load_runs

from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from parallel.pipeline_schedule import Transfer, bubble, operations
from planning.config import PlanJobConfig
from planning.memory import stage_memory
from planning.pipeline_time import pipeline_seconds
from planning.plan import Plan, plan_run
from planning.report import print_plan
from planning.request import configured_choice
from planning.search import search
from training.console import Console

LLAMA_8B = ("model=llama3_8b", "data=fineweb_edu", "tokenizer=llama3", "hardware=h100")
LLAMA_405B = ("model=llama3_1_405b", *LLAMA_8B[1:], "train.seq_len=8192")
GRID = [
    (ranks, parts, micro_batches)
    for ranks, parts, micro_batches in product((2, 4, 8), (1, 2, 4), (1, 3, 8, 16, 24, 64))
    if parts == 1 or micro_batches % ranks == 0
]
TOLERANCE = 0.02
"""Of the step, as the runtime's measured steps are compared."""


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def planned(*words: str) -> PlanJobConfig:
    return load_plan_config(compose("plan", plan_arguments(list(words))))


def plan_of(*words: str) -> Plan:
    config = planned(*words)
    [stage] = plan_run(
        config.request.stages(configured_choice(config, config.mesh)), config.device
    ).stages
    return stage


def simulate(
    forward: Sequence[float],
    backward: Sequence[float],
    hop: float,
    ranks: int,
    micro_batches: int,
) -> float:
    """Return the seconds of a step with these durations of each stage."""
    parts = len(forward) // ranks
    programs = [list(operations(rank, ranks, parts, micro_batches)) for rank in range(ranks)]
    clocks, positions = [0.0] * ranks, [0] * ranks
    sent: dict[Transfer, float] = {}
    received: dict[Transfer, float] = {}
    last: dict[tuple[int, bool], Transfer] = {}

    def arrival(transfer: Transfer) -> float | None:
        if transfer not in sent or transfer not in received:
            return None
        return max(sent[transfer], received[transfer]) + hop

    def advance(rank: int) -> bool:
        """Run the next operation of a rank, unless it waits for another one."""
        if positions[rank] == len(programs[rank]):
            return False
        kind, transfer, action = programs[rank][positions[rank]]
        if action is not None:
            times = forward if action.forward else backward
            clocks[rank] += times[action.part * ranks + rank]
        else:
            assert transfer is not None
            direction = rank, transfer.forward
            needed = last.get(direction) if kind == "send" else transfer
            if kind != "receive" and needed is not None:
                ready = arrival(needed)
                if ready is None:
                    return False
                clocks[rank] = max(clocks[rank], ready)
            if kind == "send":
                sent[transfer], last[direction] = clocks[rank], transfer
            elif kind == "receive":
                received[transfer] = clocks[rank]
        positions[rank] += 1
        return True

    while any(map(len, (program[p:] for program, p in zip(programs, positions, strict=True)))):
        assert any([advance(rank) for rank in range(ranks)])
    return max(clocks)


@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), GRID)
def test_equal_stages_idle_for_the_bubble(ranks: int, parts: int, micro_batches: int) -> None:
    times = [1 / parts] * (ranks * parts), [2 / parts] * (ranks * parts)
    seconds = pipeline_seconds(*times, 0.0, ranks, micro_batches)
    assert 1 - 3 * micro_batches / seconds == pytest.approx(bubble(ranks, parts, micro_batches))


@pytest.mark.parametrize("hop", [0.0, 0.02])
@pytest.mark.parametrize(("ranks", "parts", "micro_batches"), GRID)
def test_replayed_schedule_takes_as_long_as_all_operations(
    ranks: int, parts: int, micro_batches: int, hop: float
) -> None:
    """Stages differ by up to a half, as with one and two layers; the last one has the head."""
    stages = ranks * parts
    lengths = [(2 if stage > stages // 2 else 1.5) / parts for stage in range(stages)]
    lengths[-1] += 0.2 / parts
    forward, backward = lengths, [2 * each for each in lengths]
    simulated = simulate(forward, backward, hop, ranks, micro_batches)
    seconds = pipeline_seconds(forward, backward, hop, ranks, micro_batches)
    assert seconds == pytest.approx(simulated, rel=TOLERANCE)


def test_step_is_that_of_the_simulation_with_the_times_of_its_ranks() -> None:
    """One process per data group: no FSDP2 and no other communication than hops."""
    plan = plan_of(
        *LLAMA_405B, "parallel.tp=8", "parallel.pp=16", "train.micro_batch_size=1",
        "parallel.activation_checkpoint=full", "train.global_batch_size=32", "devices=128",
    )  # fmt: skip
    time, micro = plan.time, plan.spec.micro_batches
    forward = [seconds / micro / 4 for seconds in time.stage_seconds]
    backward = [3 * each for each in forward]
    simulated = simulate(forward, backward, 0.0, 16, micro)
    others = time.optimizer + sum(
        seconds for axis, seconds in time.exposed.items() if axis not in ("tp", "pp")
    )
    assert time.total - others == pytest.approx(simulated, rel=TOLERANCE)
    assert time.total == pytest.approx(sum(time.by_part().values()))
    assert time.bubble / time.total == pytest.approx(bubble(16, 1, micro), abs=TOLERANCE)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("devices", [512, 1024, 2048])
def test_published_pipeline_is_planned_as_the_same_layers_without(
    devices: int, precision: str
) -> None:
    """The error of 405B with pp=8 is that of eight of its layers without, within 3 points: the
    pipeline adds less than the kernels, which are the same.
    """
    runs = {run.id: run for run in load_runs()}
    names = f"405b-{devices}-{precision}", f"405b-8-layers-{precision}"
    with_pp, without = (runs[f"dgxc-25.04-{name}"] for name in names)
    errors = [
        planned_tokens_per_second(run) / run.tokens_per_second - 1 for run in (with_pp, without)
    ]
    print(f"{with_pp.id}: {errors[0]:+.1%}, {without.id}: {errors[1]:+.1%}")
    assert errors[0] == pytest.approx(errors[1], abs=0.03)


def test_cut_of_405b_is_balanced_in_time_and_memory() -> None:
    """A layer less on the first rank saves memory, on the last one time (arXiv:2407.21783, 3.3.2).

    With the same number on both and one more in between.
    """
    words = ("parallel.tp=8", "parallel.pp=16", "parallel.dp_shard=128", "devices=16384")
    run = (*LLAMA_405B, *words, "train.global_batch_size=2048", "train.micro_batch_size=1")
    balanced = plan_of(*run)
    even = plan_of(*run, f"parallel.pp_layers=[{','.join(['8'] * 14)},6,8]")
    assert balanced.time.total < even.time.total
    assert even.time.slowest_stage == 15
    first, head = (stage_memory(each.spec).peak for each in (balanced, even))
    assert first < head


def test_rank_that_recomputes_is_slower() -> None:
    sizes = ("train.micro_batch_size=1", "train.global_batch_size=16")
    words = (*LLAMA_8B, "parallel.pp=2", "devices=8", "parallel.pp_layers=[17,15]", *sizes)
    same, first = plan_of(*words), plan_of(*words, "parallel.pp_checkpoint=[full,none]")
    assert first.time.stage_seconds[0] > 1.2 * same.time.stage_seconds[0]
    assert first.time.stage_seconds[1] == same.time.stage_seconds[1]


def test_plan_reports_cut_schedule_and_busiest_rank(capsys: pytest.CaptureFixture[str]) -> None:
    words = (*LLAMA_8B, "parallel.pp=2", "parallel.pp_parts=2", "devices=8")
    config = planned(*words, "train.micro_batch_size=1", "train.global_batch_size=16")
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.device)
    print_plan(Console(enabled=True), config, run)
    printed = " ".join(capsys.readouterr().out.split())
    assert "interleaved 1F1B, 2 parts per rank" in printed
    assert "layers of the stages: 8, 2 × 9, 6, of the ranks: 17, 15" in printed
    assert "pipeline bubble" in printed and "Step time, slowest pipeline rank" in printed
    [plan] = run.stages
    sent = [each.sent for stage in plan.spec.stages for each in stage.traffic()
            if each.part == "pipeline"]  # fmt: skip
    [row] = [row for row in plan.traffic() if row[3] == "pipeline"]
    assert row[-1] == max(sent)
    few = planned(*words, "parallel.pp_parts=1", "train.global_batch_size=4")
    run = plan_run(few.request.stages(configured_choice(few, few.mesh)), few.device)
    print_plan(Console(enabled=True), few, run)
    assert "fewer micro-batches than stages" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------- search


def test_search_finds_a_pipeline_where_nothing_fits_without() -> None:
    """Weights that stay gathered take 94 GiB with tp=8, and a sixteenth of it in a pipeline."""
    gathered = ("parallel.tp=8", "parallel.reshard_after_forward=false")
    words = (*LLAMA_405B, "train.global_batch_size=256", "devices=512", *gathered)
    config = planned(*words, "search=true")
    request = config.request.keeping("parallel.tp", "parallel.reshard_after_forward")
    assert not search(request.keeping("parallel.pp"), 512, config.hardware).best
    (choice, run), *_ = search(request, 512, config.hardware).best
    assert choice.mesh.pp > 1 and run.fits
    again = planned(*words, *choice.overrides)
    assert configured_choice(again, again.mesh) == choice


def test_search_tries_no_pipeline_inside_a_node() -> None:
    words = (*LLAMA_8B, "train.global_batch_size=16", "devices=8")
    config = planned(*words, "search=true")
    best = search(config.request, 8, config.hardware).best
    assert best and all(choice.mesh.pp == 1 for choice, _ in best)
    given = planned(*words, "parallel.pp=2", "search=true")
    best = search(given.request.keeping("parallel.pp"), 8, given.hardware).best
    assert best and all(choice.mesh.pp == 2 for choice, _ in best)


def test_given_layers_of_stages_are_kept_by_the_search() -> None:
    words = (*LLAMA_8B, "train.global_batch_size=16", "devices=8", "search=true")
    config = planned(*words, "parallel.pp=2", "parallel.pp_layers=[17,15]")
    best = search(config.request.keeping("parallel.pp"), 8, config.hardware).best
    layers = {(choice.parallel.pp_parts, choice.parallel.pp_layers) for choice, _ in best}
    assert layers <= {(1, (17, 15)), (2, None), (4, None)}
    kept = config.request.keeping("parallel.pp", "parallel.pp_layers")
    best = search(kept, 8, config.hardware).best
    assert best and {choice.parallel.pp_layers for choice, _ in best} == {(17, 15)}
