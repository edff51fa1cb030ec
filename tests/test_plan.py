"""`plan.py` on any mesh, the search for the best mesh, and the memory check of `train.py`."""

import itertools
import json
import math
import re
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed.distributed_c10d import _world

from cli.arguments import CONF, explicit_keys, hydra_arguments, plan_arguments
from cli.config import load_plan_config, load_train_config
from model.config import ModelConfig
from model.flops import flops_per_token
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import AXES, MeshShape, resolve_mesh
from plan import PLANNER_KEYS
from plan import search as plan_search
from planning import fit_check, plan_json, report
from planning.communicators import COMMUNICATOR_BYTES, n_communicators
from planning.config import PlanJobConfig
from planning.config_warnings import currency_warnings
from planning.failures import ExpectedGoodput
from planning.fake_model import fake_model
from planning.fit_check import check_plan, machine_memory, plan_comparison
from planning.hardware import PROCESS_GIB, load_hardware
from planning.memory import GIB, PARTS, MemoryBreakdown, step_memory
from planning.memory_plot import memory_figure
from planning.plan import Plan, RunPlan, capacity, link, memory_limit, plan_run
from planning.remedies import fewest_devices, nearest_fit, remedy
from planning.request import Choice, PlanRequest, configured_choice
from planning.search import (
    CHECKPOINT_MODES,
    REDUCE_MODES,
    choices,
    divisors,
    meshes,
    options_not_searched,
    search,
)
from resilience.processes import Processes
from training.config import JobConfig
from training.config_rules import device_errors, fp8_errors, mesh_errors
from training.config_validation import ConfigError
from training.console import Console
from training.throughput import Throughput

REAL = ("data=fineweb_edu", "tokenizer=llama3", "train.seq_len=8192")
LLAMA_8B = ("model=llama3_8b", *REAL, "train.global_batch_size=64")
LLAMA_70B = ("model=llama3_1_70b", *REAL, "train.global_batch_size=64")
ONE_PROCESS = Processes("cpu", 1, 1, "self")
ONE_RANK = MeshShape(1, 1, 1, 1)


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def planned(*arguments: str) -> PlanJobConfig:
    """Load the configuration of `python plan.py ARGUMENTS`."""
    return load_plan_config(compose("plan", plan_arguments(list(arguments))))


def trained(*arguments: str) -> JobConfig:
    """Load the configuration of `python train.py ARGUMENTS`."""
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        planned(*arguments)
    return error.value.errors


def plans_of(config: PlanJobConfig) -> tuple[Plan, ...]:
    """Plan the configured mesh and return one plan per stage."""
    return run_of(config).stages


def run_of(config: PlanJobConfig) -> RunPlan:
    """Plan the configured mesh."""
    return plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)


# ---------------------------------------------------------------- request


def test_plan_accepts_every_key_and_group_of_train() -> None:
    overrides = ["experiment=smoke", "model.n_layers=3", "parallel.tp=2"]
    plan = OmegaConf.to_container(compose("plan", plan_arguments(overrides)))
    train = OmegaConf.to_container(compose("train", hydra_arguments(overrides, "train")))
    assert isinstance(plan, dict) and isinstance(train, dict)
    assert train.pop("hardware") == plan["hardware"]  # of the recipe; train.py ignores it
    added = {field.name for field in fields(PlanJobConfig)} - {f.name for f in fields(JobConfig)}
    assert {key: value for key, value in plan.items() if key not in added} == train
    assert added == set(plan) - set(train) == set(PLANNER_KEYS)


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ((), 8),  # a node of h100
        (("devices=3", "train.global_batch_size=3"), 3),
        (("parallel.dp_shard=2", "parallel.tp=2"), 4),
        (("parallel.num_nodes=2",), 16),
        (("parallel.devices=2", "parallel.num_nodes=2"), 4),
        (("parallel.dp_replicate=16",), 16),  # more than one node
        (("hardware=cpu",), 1),
        (("hardware=cpu", "parallel.tp=2"), 2),
    ],
)
def test_number_of_devices_is_configured_or_one_node(
    overrides: tuple[str, ...], devices: int
) -> None:
    config = planned(*overrides)
    assert config.n_devices == config.mesh.world_size == devices


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("experiment=llama3_405b_paper", "8: devices is not given, so one node is planned"),
        ("parallel.dp_replicate=16", "16: devices is not given, so 2 nodes are planned"),
        ("experiment=h100x8_8b parallel.devices=null parallel.num_nodes=null", "8"),
        ("experiment=llama3_405b_paper devices=4096", "4,096"),
        ("parallel.devices=8", "8"),
        ("parallel.num_nodes=2", "16"),
        ("hardware=cpu", "1"),
        ("search=true parallel.dp_shard=8", "8: devices is not given, so one node is planned"),
    ],
)
def test_plan_prints_whether_its_devices_are_given(
    words: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planned(*words.split())
    run = run_of(config)
    report.print_plan(Console(enabled=True), config, run)
    assert re.search(rf"^  devices +{text}$", capsys.readouterr().out, re.MULTILINE)


def test_devices_must_be_those_of_the_nodes() -> None:
    [error] = problems("parallel.num_nodes=2", "devices=8")
    assert error.startswith("devices=8 does not match parallel.num_nodes=2 with 8 devices each")
    for words in (("parallel.num_nodes=2", "devices=16"), ("parallel.num_nodes=1", "devices=8")):
        assert planned(*words).n_devices == int(words[1].partition("=")[2])
        assert words[0] in error or words[1] in error
    planned("parallel.num_nodes=2", "parallel.devices=4", "devices=8")
    planned("hardware=cpu", "parallel.num_nodes=2", "devices=4")
    assert problems("hardware=cpu", "parallel.num_nodes=2", "devices=3")


def test_size_of_the_mesh_is_changed_by_keys_of_the_planner() -> None:
    recipe = ("experiment=h100x8_8b", "parallel.num_nodes=null")
    [error] = problems(*recipe, "devices=16")
    assert error.endswith("; use devices=8, or parallel.dp_shard=-1, which resolves to 16")
    for words in (("devices=8",), ("devices=16", "parallel.dp_shard=-1")):
        planned(*recipe, *words)
    [error] = problems("parallel.tp=2", "devices=3")
    assert "; use devices=4, or let" in error
    planned("parallel.tp=2", "devices=4")


def test_token_budget_is_configured_or_that_of_max_steps_over_all_stages() -> None:
    stages = "data.stages=[{from_sample:32,seq_len:128},{from_sample:64,global_batch_size:32}]"
    sizes = ["train.seq_len=64", "train.global_batch_size=16", "train.max_steps=6", stages]
    # Two steps per stage: 16 × 64, 16 × 128 and 32 × 128 tokens.
    parts = [2 * 1024, 2 * 2048, 2 * 4096]
    config = planned(*sizes)
    assert config.token_budget == sum(parts) and [p.tokens for p in plans_of(config)] == parts
    longer = [p.tokens for p in plans_of(planned(*sizes, "tokens=1e6"))]
    assert longer == [*parts[:2], 1_000_000 - sum(parts[:2])]
    short = plans_of(planned(*sizes, "tokens=3000"))  # ends in the second stage
    assert [plan.tokens for plan in short] == [2048, 952]


def test_run_fits_if_every_stage_does_and_durations_add_up() -> None:
    longer = "data.stages=[{from_sample:6400,seq_len:8192}]"
    sizes = ["model=llama3_1_8b", *REAL, "train.seq_len=512", "train.global_batch_size=64", longer]
    config = planned(*sizes, "train.max_steps=300")
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    first, second = run.stages
    assert first.fits and not second.fits and not run.fits  # the longer stage decides
    assert run.fullest is second
    assert run.seconds == pytest.approx(100 * first.time.total + 200 * second.time.total)
    hours = run.seconds / 3600 if run.seconds else 0
    price = config.hardware.price_per_hour
    assert price is not None and run.cost == pytest.approx(hours * price * 8)


def test_rates_of_a_run_are_those_of_all_its_stages() -> None:
    """A short first stage must not decide: FLOPs and tokens over the duration of all stages."""
    later = "data.stages=[{from_sample:640,seq_len:8192}]"
    sizes = ["model=llama3_1_8b", *REAL, "train.seq_len=512", "train.global_batch_size=64", later]
    config = planned(*sizes, "train.max_steps=300", "parallel.activation_checkpoint=full")
    run = run_of(config)
    seconds = 10 * run.stages[0].time.total + 290 * run.stages[1].time.total
    assert run.tokens_per_second_per_device == pytest.approx(run.tokens / seconds / 8)
    for causal in (True, False):
        flops = [
            stage.tokens * flops_per_token(config.model, stage.spec.seq_len, causal)
            for stage in run.stages
        ]
        assert run.tflops(causal) == pytest.approx(sum(flops) / seconds / 8 / 1e12)
        assert run.mfu(causal) == pytest.approx(run.tflops(causal) / 989)
    matrix = 10 * run.stages[0].time.matrix + 290 * run.stages[1].time.matrix
    assert run.bottleneck == f"matrix products ({matrix / seconds:.0%} of a step)"
    assert run.largest_mesh == 64  # a sequence per rank
    record = plan_json.plan_record(config, run)
    assert record["tokens_per_second_per_device"] == run.tokens_per_second_per_device
    assert dict(report._summary_rows(config, run))["per device"].startswith(
        f"{run.tokens_per_second_per_device:,.0f} "
    )


# ---------------------------------------------------------------- validation errors


def test_all_errors_are_reported_together_with_remedies() -> None:
    found = problems("hardwar.x=1", "devices=0", "tokens=0", "parallel.accelerator=cpu")
    assert any("Unknown key hardwar.x. Did you mean hardware?" in each for each in found)
    assert any(each.startswith("devices=0 is below 1; use at least 1") for each in found)
    assert any(each.startswith("tokens=0 is below 1; use") for each in found)
    assert any("parallel.accelerator=cpu does not match hardware h100" in each for each in found)


def test_keys_of_the_planner_without_effect_are_rejected(tmp_path: Path) -> None:
    [error] = problems("search_fp8=true")
    assert error.startswith("search_fp8=true has no effect without a search")
    for words in (("search=true",), ("smallest=true",), ("parallel.auto=true",)):
        planned("search_fp8=true", *words)
    [error] = problems("output=plans/x.png")
    assert "is the name of the plot next to the plan; use output=plans/x.json, " in error
    planned("output=plans/x.json")
    [error] = problems("hardware=h100", "hardware.oversubscription=8")
    assert error.startswith("hardware.oversubscription=8 applies between pods, but ")
    for word in re.findall(r"use (\S+)|, or (\S+)$", error):
        planned("hardware=h100", "hardware.oversubscription=8", *filter(None, word))


def test_mesh_is_validated_by_the_rules_of_train() -> None:
    found = problems("parallel.tp=3", "devices=6")
    assert any("parallel.tp=3 does not divide model.n_kv_heads=2" in each for each in found)
    [size] = problems("devices=6", "parallel.dp_shard=4")
    assert "needs 4 processes, not 6" in size
    [fp8] = problems("hardware=a100", "precision.fp8=tensorwise", *LLAMA_8B)
    assert "precision.fp8=tensorwise" in fp8 and "hardware a100" in fp8
    [async_tp] = problems(
        "hardware=a100", "parallel.async_tp=true", "parallel.compile=true", "parallel.tp=2"
    )
    assert "Hopper or newer" in async_tp
    # Devices that this machine does not have can be planned for.
    planned("parallel.async_tp=true", "parallel.compile=true", "parallel.tp=2")
    planned("precision.fp8=rowwise", "precision.optimizer_state=int8", *LLAMA_8B)


def test_rejected_batch_names_meshes_of_the_same_devices_that_fit() -> None:
    recipe = ("experiment=llama3_405b_paper", "devices=16384")
    message = problems(*recipe)[-1]
    assert "4096 data ranks of 16384 processes" in message
    remedies = message.rpartition("; use ")[2].split(", or ")
    assert remedies[0] == "parallel.cp=4" and len(remedies) == 3
    for words in remedies:
        config = planned(*recipe, *words.split())
        assert config.mesh.world_size == 16384
        assert plan_run(
            config.request.stages(configured_choice(config, config.mesh)), config.hardware
        ).stages


def test_unknown_hardware_lists_known_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"h1000.*a100.*b200.*cpu.*h100.*h200"):
        plan_arguments(["hardware=h1000"])
    (tmp_path / "odd.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        plan_arguments([f"hardware={tmp_path / 'odd.yaml'}"])


def test_missing_max_steps_is_reported() -> None:
    [problem] = problems("train.max_steps=null", "optim.schedule_steps=1")
    assert problem.startswith("train.max_steps=null ")


def test_hardware_file_is_equivalent_to_known_hardware(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONF / "hardware" / "h100.yaml").read_text().replace("name: h100", "name: m"))
    config = planned(f"hardware={path}", "hardware.price_per_hour=7")
    assert config.hardware == replace(load_hardware("h100"), name="m", price_per_hour=7)
    assert planned("hardware=h200").hardware == load_hardware("h200")


# ---------------------------------------------------------------- plan


def test_rates_are_computed_as_a_run_logs_them() -> None:
    config = planned(*LLAMA_8B, "parallel.activation_checkpoint=full")
    [plan] = plans_of(config)
    throughput = Throughput(
        flops_per_token_causal=plan.tflops() * 1e12 / plan.tokens_per_second_per_device,
        flops_per_token_full=plan.tflops(False) * 1e12 / plan.tokens_per_second_per_device,
        world_size=8,
        peak_flops=config.hardware.peak_tflops["bf16"] * 1e12,
        device=torch.device("cpu"),
    )
    logged = throughput.metrics(plan.spec.tokens, plan.time.total, 0.0, 1)
    assert logged["tokens_per_second"] == pytest.approx(plan.tokens_per_second)
    assert logged["mfu_causal"] == pytest.approx(plan.mfu())
    assert logged["mfu_full"] == pytest.approx(plan.mfu(causal=False))
    [fp8] = plans_of(planned(*LLAMA_8B, "precision.fp8=tensorwise"))
    assert fp8.mfu() is None and fp8.tflops() > 0


@pytest.mark.parametrize(
    ("mesh", "axis", "expected"),
    [
        (MeshShape(1, 2, 1, 8), "tp", "inside a node"),
        (MeshShape(1, 2, 1, 8), "dp_shard", "between nodes"),
        (MeshShape(1, 2, 2, 2), "dp_shard+cp", "inside a node"),
        (MeshShape(1, 2, 4, 2), "dp_shard+cp", "between nodes"),
        (MeshShape(1, 2, 4, 2), "cp", "inside a node"),
        (MeshShape(1, 1, 2, 8), "cp", "between nodes"),
        (MeshShape(2, 4, 1, 1), "dp_replicate", "inside a node"),
        (MeshShape(4, 4, 1, 1), "dp_replicate", "between nodes"),
        (MeshShape(4, 4, 1, 1), "dp_replicate+dp_shard", "between nodes"),
    ],
)
def test_axis_uses_node_link_if_every_group_is_inside_a_node(
    mesh: MeshShape, axis: str, expected: str
) -> None:
    """Compared with the ranks of every group, eight consecutive ranks per node."""
    config = planned(f"devices={mesh.world_size}")
    [(spec, _)] = config.request.stages(configured_choice(config, mesh))
    grid = torch.arange(mesh.world_size).view(mesh.sizes)
    axes = [AXES.index(name) for name in axis.split("+")]
    groups = grid.movedim(axes, list(range(-len(axes), 0))).reshape(
        -1, math.prod(mesh.sizes[axis] for axis in axes)
    )
    spread = any(len({int(rank) // 8 for rank in group}) > 1 for group in groups)
    assert link(axis, spec, config.hardware) == expected
    assert spread == (expected == "between nodes")


def test_capacity_excludes_reserved_memory_and_is_shared_by_cpu_ranks() -> None:
    def capacity_gib(name: str, ranks: int, **changes: float) -> float:
        config = planned(f"hardware={name}", f"devices={ranks}", "train.global_batch_size=64")
        hardware = replace(config.hardware, **changes)  # type: ignore[arg-type]
        [(spec, _)] = config.request.stages(configured_choice(config, config.mesh))
        return capacity(spec, hardware) / GIB

    nccl = COMMUNICATOR_BYTES / GIB  # the communicator of all ranks
    sizes = {"memory_gib": 80.0, "reserved_gib": 3.0, "devices_per_node": 4}
    assert [capacity_gib("h100", ranks, **sizes) for ranks in (1, 4, 8)] == [
        77,
        77 - nccl,
        77 - nccl,
    ]
    assert [capacity_gib("cpu", ranks, **sizes) for ranks in (1, 4, 8)] == [77, 17, 17]


@pytest.mark.parametrize(
    "sizes",
    [
        *[(1, 1, 1, 1), (1, 8, 1, 1), (2, 4, 1, 1), (1, 4, 1, 2), (1, 1, 8, 1), (1, 2, 4, 1)],
        *[(2, 1, 2, 1), (1, 1, 4, 2), (2, 2, 2, 2)],
    ],
)
def test_communicators_are_the_process_groups_of_a_run(sizes: tuple[int, int, int, int]) -> None:
    """Each with several ranks; one of all ranks is created once."""
    shape = MeshShape(*sizes)
    model = ModelConfig("small", 64, 1, 8, 8, 64, 64, tie_embeddings=False)
    precision = PrecisionConfig("fp32", "fp32", "fp32")
    with fake_model(model, shape, ParallelConfig(), precision):
        groups = [group for group in _world.pg_map if group.size() > 1]
    assert n_communicators(shape) == len(groups)


def test_bottleneck_is_the_largest_part() -> None:
    [full] = plans_of(planned(*LLAMA_8B, "train.micro_batch_size=8"))
    assert not full.fits and full.bottleneck.startswith("memory (largest part: activations")
    [plan] = plans_of(planned(*LLAMA_8B, "parallel.activation_checkpoint=full"))
    assert plan.bottleneck.startswith("matrix products (")
    [tiny] = plans_of(planned("parallel.dp_shard=64", "train.global_batch_size=64"))
    assert tiny.bottleneck.startswith("exposed communication, dp_shard")


# ---------------------------------------------------------------- search


def brute_force(config: PlanJobConfig, devices: int) -> dict[Choice, tuple[float, int]]:
    """Return the tokens/s and the memory of every valid configuration that fits.

    Each is validated separately by the rules of `train.py`. Settings without effect are skipped:
    resharding of one shard, and reducing one micro-batch separately.
    """
    found = {}
    accelerator, capability = config.hardware.accelerator, config.hardware.compute_capability
    recipes = (None, "tensorwise", "rowwise") if config.search_fp8 else (config.precision.fp8,)
    values = {
        "activation_checkpoint": CHECKPOINT_MODES,
        "reshard_after_forward": (None, True, False),
        "reduce_gradients": REDUCE_MODES,
        "compile": ("auto", accelerator == "cpu"),
        "async_tp": (False, True),
    }
    batches: Any = itertools.product(recipes, *values.values())
    for mesh, each in itertools.product(meshes(devices), list(batches)):
        named: dict[str, Any] = dict(zip(values, each[1:], strict=True))
        parallel = replace(config.parallel, **asdict(mesh), **named)
        precision = replace(config.precision, fp8=each[0])
        device = (accelerator, mesh, parallel, precision, config.model, capability)
        if any(device_errors(*device)) or any(fp8_errors(accelerator, precision, capability)):
            continue
        if parallel.reshard_after_forward is not None and mesh.dp_shard * mesh.cp == 1:
            continue
        sizes_of_mesh = [*divisors(max(config.train.global_batch_size // mesh.dp, 1))]
        for size in [*sizes_of_mesh, *([None] if config.data.stages else [])]:
            train = replace(config.train, micro_batch_size=size)
            sizes = (mesh, parallel, precision, config.model, train, config.data)
            if any(mesh_errors(*sizes)):
                continue
            tried = replace(config, parallel=parallel, train=train, precision=precision)
            stages = tried.request.stages(configured_choice(tried, mesh))
            accumulates = any(spec.micro_batches > 1 for spec, _ in stages)
            if parallel.reduce_gradients == "micro_batch" and (
                not accumulates or mesh.dp * mesh.cp == 1
            ):
                continue
            run = plan_run(stages, config.hardware)
            if run.fits:
                speed, peak = run.tokens_per_second, run.fullest.memory.peak
                found[Choice(parallel, size, each[0])] = speed, peak
    return found


TINY = ("experiment=smoke", "tokenizer=byte")
SEARCHES = {
    "cpu": (*TINY, "hardware=cpu", "devices=4"),
    "gpu": (*TINY, "hardware=h100", "devices=4", "train.global_batch_size=4"),
    "fp8": (*TINY, "hardware=h100", "devices=2", "search_fp8=true", "train.global_batch_size=2"),
    "one device": (*TINY, "hardware=a100", "devices=1"),
    "little memory": (
        *("model=llama3_8b", *REAL, "hardware=a100", "devices=8", "train.global_batch_size=8"),
        "hardware.memory_gib=60",
    ),
    "tight": (
        *("model=llama3_8b", *REAL, "hardware=h100", "devices=8", "train.global_batch_size=16"),
        *("parallel.tp=1", "parallel.cp=1"),
    ),
    "one layer": (*TINY, "hardware=h100", "devices=2", "model.n_layers=1"),
    "stages": (
        *(*TINY, "hardware=h100", "devices=2", "train.max_steps=9"),
        "data.stages=[{from_sample:32,seq_len:128},{from_sample:64,global_batch_size:16}]",
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_search_finds_what_a_brute_force_enumeration_finds(name: str) -> None:
    config = planned(*SEARCHES[name], "search=true")
    request, devices, hardware = config.request, config.n_devices, config.hardware
    everything = brute_force(config, devices)
    complete = search(request, devices, hardware, keep=10**9).best

    def sizes(choice: Choice) -> tuple[int, ...]:
        return tuple(spec.micro_batch_size for spec, _ in request.stages(choice))

    def is_fuller(choice: Choice) -> bool:
        """Return whether another resharding has no more memory at a speed within 0.1%."""
        speed, peak = everything[choice]
        for reshard in (None, True, False):
            parallel = replace(choice.parallel, reshard_after_forward=reshard)
            other = everything.get(replace(choice, parallel=parallel), (0.0, 0))
            if other[1] < peak and speed <= 1.001 * other[0]:
                return True
            if other[1] == peak and speed < other[0] * (1 - 1e-9):
                return True
        return False

    # Choices of one mesh and micro-batch with equal time and memory are one row.
    distinct = {
        (choice.mesh, sizes(choice), f"{speed:.9g}", peak)
        for choice, (speed, peak) in everything.items()
        if not is_fuller(choice)
    }
    found = {
        (choice.mesh, sizes(choice), f"{run.tokens_per_second:.9g}", run.fullest.memory.peak)
        for choice, run in complete
    }
    assert found == distinct and len(complete) == len(found)
    # The first is the fastest, or the fastest within 1% of it that leaves 5% of memory free.
    (_, first), *rest = complete
    speeds = [run.tokens_per_second for _, run in rest]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=1e-12)  # ties
    fastest = max(run.tokens_per_second for _, run in complete)
    roomy = [
        run.tokens_per_second
        for _, run in complete
        if all(plan.memory.peak <= 0.95 * plan.capacity for plan in run.stages)
        and 1.01 * run.tokens_per_second >= fastest
    ]
    assert first.tokens_per_second == pytest.approx(max(roomy, default=fastest), rel=1e-12)
    assert all(everything[choice][0] == run.tokens_per_second for choice, run in complete)
    assert name != "tight" or (first.tokens_per_second < fastest and not first.is_tight)
    for keep in (1, 10):
        best = search(request, devices, hardware, keep=keep).best
        assert [choice for choice, _ in best] == [choice for choice, _ in complete[:keep]]


@pytest.mark.parametrize(("hardware", "column"), [("h100", "cost"), ("cpu", "tokens/s")])
def test_search_prints_cost_in_dollars_where_the_price_is_known(
    hardware: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planned("experiment=smoke", "devices=2", f"hardware={hardware}", "tokens=1e9")
    result = search(config.request, 2, config.hardware)
    report.print_search(
        Console(enabled=True), config, config.request, result, [""] * len(result.best)
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    header = next(number for number, line in enumerate(lines) if "micro-batch" in line)
    assert lines[header].endswith(column)
    assert " MiB " in lines[header]  # a small model, whose sizes in GiB would be zero
    cost = result.best[0][1].cost
    assert cost is None or lines[header + 1].endswith(f" {report.money(cost, 'USD')}")
    record = plan_json.search_record(config, config.request, result, [""] * len(result.best))
    assert record["best"][0]["cost_usd"] == cost
    assert ("$" in "".join(lines)) == (cost is not None) == (hardware == "h100")


@pytest.mark.parametrize(
    ("cost", "currency", "text"),
    [
        *((0.001, "USD", "under $0.01"), (1.234, "USD", "$1.23"), (99.99, "USD", "$99.99")),
        *((7440.4, "USD", "$7,440"), (0, "USD", "$0.00"), (0, "EUR", "0.00 EUR")),
        *((7440.4, "EUR", "7,440 EUR"), (0.001, "JPY", "under 0.01 JPY")),
    ],
)
def test_cost_has_its_currency_and_is_zero_only_if_devices_are_free(
    cost: float, currency: str, text: str
) -> None:
    assert report.money(cost, currency) == text


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        ("hardware.currency=EUR", True),
        ("hardware.currency=EUR hardware.price_per_hour=2.1", False),
        ("hardware.currency=EUR hardware.price_per_hour=0", False),
        ("hardware=cpu hardware.currency=EUR", False),  # without a price
        ("hardware=h100", False),
    ],
)
def test_currency_without_a_price_is_reported(words: str, warns: bool) -> None:
    given = explicit_keys(words.split())
    warnings = list(currency_warnings(planned(*words.split()).hardware, given))
    assert bool(warnings) == warns
    if warns:
        assert warnings[0].startswith("hardware.currency=EUR does not convert ")
        assert warnings[0].endswith("add hardware.price_per_hour=… in EUR")


@pytest.mark.parametrize(
    ("hardware", "text", "usd"),
    [
        (["hardware.currency=EUR"], "EUR at 2.5 EUR per device-hour", False),
        (["hardware.price_per_hour=0"], "$0.00 at $0 per device-hour", True),
        (["hardware.price_per_hour=3"], "at $3 per device-hour", True),
    ],
)
def test_plan_reports_cost_in_the_currency_of_the_hardware_and_energy(
    hardware: list[str], text: str, usd: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planned("experiment=smoke", "devices=2", "hardware=h100", "tokens=1e12", *hardware)
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    report.print_plan(Console(enabled=True), config, run)
    printed = capsys.readouterr().out
    record = plan_json.plan_record(config, run)
    assert text in printed
    assert record["cost"] == run.cost and record["currency"] == config.hardware.currency
    assert record["cost_usd"] == (run.cost if usd else None)
    # 700 W of the data sheet for each of two devices.
    assert record["energy_kwh"] == pytest.approx(0.7 * 2 * run.seconds / 3600)
    assert re.search(r"energy +[\d,.]+ [kM]Wh at most, 700 W per device without hosts", printed)


def test_tables_of_a_run_with_stages_name_their_stage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("train.seq_len=64", "train.global_batch_size=16", "train.max_steps=9")
    for stages, name in (("[{from_sample:64,seq_len:128}]", ", stage 2"), ("[]", "")):
        config = planned(*words, f"data.stages={stages}", "parallel.dp_shard=2")
        run = run_of(config)
        report.print_plan(Console(enabled=True), config, run)
        printed = capsys.readouterr().out
        assert f"\nCommunication per rank and step{name}\n" in printed
        assert f"\nStep time{name}\n" in printed
        mesh = dict(report._summary_rows(config, run))["largest mesh"]
        assert mesh == "16 devices with cp=1 and tp=1"


def test_micro_batch_proposed_for_interleaved_parts_is_valid_in_all_stages() -> None:
    words = ["model.n_layers=4", "parallel.pp=2", "parallel.pp_parts=2", "parallel.dp_shard=1"]
    words += ["train.global_batch_size=12", "train.micro_batch_size=4"]
    words += ["data.stages=[{from_sample:48,global_batch_size:8}]"]
    with pytest.raises(ConfigError, match=r"has 3 per step; use train\.micro_batch_size=2 or"):
        planned(*words)
    planned(*words, "train.micro_batch_size=2")


def test_largest_mesh_of_interleaved_parts_has_a_micro_batch_for_each_pipeline_rank() -> None:
    """A mesh twice as large would be rejected: its data ranks have fewer micro-batches."""
    axes = ("model.n_layers=4", "parallel.pp=2", "train.global_batch_size=16")
    for parts, largest in ((1, 32), (2, 16)):
        words = (f"parallel.pp_parts={parts}", "train.micro_batch_size=1")
        assert run_of(planned(*axes, *words)).largest_mesh == largest


def test_slow_runs_and_long_limits_are_printed_as_plain_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = planned("experiment=h100x8_8b", "hardware=cpu")
    report.print_plan(Console(enabled=True), config, run_of(config))
    printed = capsys.readouterr().out
    assert re.search(r"per device +0\.\d+ tokens/s", printed)
    assert re.search(r"time limits +set-up \d,\d{3},\d{3} s", printed)
    assert "; 1 micro-batch of" in report._batch(run_of(planned("parallel.dp_shard=2")).stages[0])


@pytest.mark.parametrize(
    ("planned_part", "best_part", "text"),
    [
        (0.974, 0.996, "97.4% (lost steps 1.3%, restarts 0.0%, saves 1.3%); best 99.6%"),
        (0.9996, 0.9999, "99.96% (lost steps 0.02%, restarts 0.00%, saves 0.02%); best 99.99%"),
        (0.9998, 0.9998, "99.98% (lost steps 0.01%, restarts 0.00%, saves 0.01%); best 99.98%"),
    ],
)
def test_goodput_has_the_decimals_that_differ(
    planned_part: float, best_part: float, text: str
) -> None:
    lost = (1 - planned_part) / 2
    goodput = ExpectedGoodput(planned_part, lost, lost, 0.0)
    best = ExpectedGoodput(best_part, 1 - best_part, 0.0, 0.0)
    assert report.goodput_text(goodput, best) == text


@pytest.mark.parametrize(
    ("kwh", "text"), [(0.01234, "0.0123 kWh"), (999, "999 kWh"), (21_500, "21.5 MWh")]
)
def test_energy_has_a_unit_of_its_size(kwh: float, text: str) -> None:
    assert report.energy(kwh) == text


def test_plan_of_an_amd_gpu_says_that_it_is_only_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = planned("experiment=smoke", "devices=2", "hardware=mi300x", "precision.fp8=tensorwise")
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    report.print_plan(Console(enabled=True), config, run)
    assert re.search(r"note +planned only; train\.py has not run on AMD", capsys.readouterr().out)


def test_contradictions_of_overridden_hardware_are_reported() -> None:
    found = problems("hardware=h100", "hardware.reserved_gib=100", "hardware.currency=usd")
    assert any("hardware.reserved_gib=100 is not below" in each for each in found)
    assert any("hardware.currency='usd' is not a code" in each for each in found)
    # Also if other keys of the hardware are invalid.
    words = ("price_per_hour=-3", "memory_gib=10", "reserved_gib=20", "foo=3", "currency=usd")
    found = problems("hardware=h100", *(f"hardware.{word}" for word in words))
    for text in (
        "price_per_hour=-3",
        "reserved_gib=20 is not below",
        "foo. Known",
        "currency='usd'",
    ):
        assert sum(f"hardware.{text}" in each for each in found) == 1
    assert len(found) == 4


def test_overrides_of_a_search_result_reproduce_its_plan() -> None:
    config = planned(*LLAMA_8B, "devices=16", "search=true")
    result = search(config.request, config.n_devices, config.hardware)
    assert len(result.best) == 10
    speeds = [plan.tokens_per_second for _, plan in result.best]
    assert speeds == sorted(speeds, reverse=True)
    for choice, plan in result.best:
        pasted = trained(*LLAMA_8B, *choice.overrides)
        mesh, problems = resolve_mesh(pasted.parallel, 16)
        assert not problems
        request = PlanRequest(pasted, "cuda", config.token_budget)
        [(spec, _)] = request.stages(configured_choice(pasted, mesh))
        assert spec == plan.fullest.spec and plan.fits
        again = planned(*LLAMA_8B, "devices=16", *choice.overrides)
        assert plans_of(again)[0].tokens_per_second == plan.tokens_per_second


@pytest.mark.parametrize(
    ("words", "is_recipe_size"),
    [
        ((*LLAMA_8B, "devices=16", "parallel.devices=8", "parallel.num_nodes=2"), False),
        (("experiment=h100x8_8b",), True),
        (("experiment=h100x8_8b", "devices=16", "parallel.num_nodes=2"), False),
        (("experiment=h100x8_8b", "smallest=true"), False),
    ],
)
def test_command_of_a_search_starts_the_processes_of_its_mesh(
    words: tuple[str, ...], is_recipe_size: bool, tmp_path: Path
) -> None:
    """Neither typed numbers of processes nor those of an experiment contradict the mesh."""
    overrides = [*words, "search=true", f"output={tmp_path / 'plan.json'}"]
    assert plan_search(planned(*overrides), overrides)
    for best in json.loads((tmp_path / "plan.json").read_text())["best"]:
        parallel = trained(*shlex.split(best["command"])[2:]).parallel
        launched = parallel.devices, parallel.num_nodes
        assert launched == ((8, 1) if is_recipe_size else (None, None))
        n_processes = math.prod(getattr(parallel, axis) for axis in MeshShape.__annotations__)
        assert (n_processes == 8) == is_recipe_size


def test_search_warns_about_the_micro_batch_that_it_chooses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*LLAMA_8B, "devices=8", "parallel.tp=8", "parallel.async_tp=true", "output=null"]
    words += ["parallel.compile=true", "train.micro_batch_size=1"]
    planned(*words)
    assert "parallel.async_tp=true overlaps 2 of the 8" in capsys.readouterr().err
    config = planned(*words, "search=true")
    assert capsys.readouterr().err == ""
    plan_search(config, [*words, "search=true"])
    assert "parallel.async_tp=true overlaps 2 of the 8" in capsys.readouterr().err
    searched = [word for word in words if not word.startswith("train.micro")]
    plan_search(config, [*searched, "search=true"])
    assert capsys.readouterr().err == ""


def test_search_gives_a_reason_for_every_rejected_candidate() -> None:
    config = planned(
        "model=llama3_1_70b", *REAL, "train.global_batch_size=24", "devices=64", "search=true"
    )
    result = search(config.request, 64, config.hardware)
    rejected = sum(each.count for each in result.rejections.values())
    assert result.candidates == len(result.best) + rejected
    reasons = "\n".join(f"{why}: {each.example}" for why, each in result.rejections.items())
    assert "invalid: train.global_batch_size is not a multiple of the data ranks" in reasons
    assert "invalid: parallel.tp does not divide model.n_kv_heads" in reasons
    assert "out of memory, largest part activations: parallel." in reasons
    assert re.search(r": [\d.]+ of [\d.]+ GiB", reasons)
    assert "slower than the choices listed: parallel." in reasons


def test_search_marks_tight_choices_and_recommends_one_that_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["model=llama3_8b", *REAL, "hardware=h100", "devices=8", "train.global_batch_size=16"]
    words += ["search=true", "output=null"]
    config = planned(*words)
    assert plan_search(config, [*words, "parallel.auto=true"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if re.match(r"  \d+  ", line)][:10]
    best = search(config.request, 8, config.hardware).best
    assert ["tight" in row for row in rows] == [
        run.fullest.memory.peak > 0.95 * run.fullest.capacity for _, run in best
    ]
    assert "tight" not in rows[0] and "tight" in rows[1]
    (choice, first), (_, second) = best[:2]
    slower = 1 - first.tokens_per_second / second.tokens_per_second
    free = (first.fullest.capacity - first.fullest.memory.peak) / GIB
    recommended, command = lines[-1].split(": python train.py ")
    assert recommended == (
        f"Recommended: choice 1 ({choice.mesh}), {slower:.1%} slower than the next, which is "
        f"tight, {free:.2f} GiB of {first.fullest.capacity / GIB:.2f} GiB free"
    )
    pasted = trained(*command.split())
    assert not pasted.parallel.auto and "parallel.auto" not in command
    only_tight = planned(*LLAMA_70B, "devices=16", "search=true")
    result = search(only_tight.request, 16, only_tight.hardware, keep=1)
    line = report.recommendation(result, 1, result.best[0][1], [])
    assert result.best[0][1].is_tight and line.endswith(" GiB free (tight)")
    assert configured_choice(pasted, resolve_mesh(pasted.parallel, 8)[0]) == choice


def test_search_for_another_framework_prints_no_commands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "plan.json"
    words = ["experiment=smoke", "hardware=h100", "devices=2", "search=true", f"output={output}"]
    for framework in ("torchtitan", "llamesh"):
        arguments = [*words, f"framework={framework}"]
        assert plan_search(planned(*arguments), arguments)
        printed = capsys.readouterr().out
        best = json.loads(output.read_text())["best"]
        has_commands = framework == "llamesh"
        assert ("train.py" in printed) == ("Commands:" in printed) == has_commands
        assert all((each["command"] is not None) == has_commands for each in best)
        assert "Recommended: choice 1" in printed


def test_search_reports_duration_and_cost_with_failures() -> None:
    config = planned(*LLAMA_8B, "devices=8", "search=true")
    result = search(config.request, 8, config.hardware, keep=1)
    [record] = plan_json.search_record(config, config.request, result, [""])["best"]
    complete = plan_json.plan_record(config, result.best[0][1])
    assert record["days"] == complete["days"] < record["failures"]["days"]
    for key, value in record["failures"].items():
        assert value == complete["failures"][key]


def test_search_of_405b_on_16384_devices_takes_under_10_seconds() -> None:
    """CPU time, which is almost independent of other load on the machine."""
    config = planned("experiment=llama3_405b_paper", "devices=16384", "search=true")
    start = time.process_time()
    result = search(config.request, 16384, config.hardware)
    assert time.process_time() - start < 10
    assert len(result.best) == 10 and result.candidates > 10_000


def test_search_keeps_given_options_and_lists_those_not_searched(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = planned(*LLAMA_8B, "devices=8", "parallel.tp=2", "parallel.compile=false")
    request = config.request.keeping("parallel.tp", "parallel.compile", "train.seq_len")
    result = search(request, 8, config.hardware)
    for choice, _ in result.best:
        assert choice.mesh.tp == 2 and choice.parallel.compile is False
    assert not any(choice.parallel.async_tp for choice, _ in result.best)  # needs compilation
    report.print_search(Console(enabled=True), config, request, result, [""] * len(result.best))
    lines = capsys.readouterr().out
    assert "\n\n\n" not in lines
    printed = " ".join(lines.split())
    assert "given parallel.tp=2, parallel.compile=false" in printed
    assert "not searched precision.fp8 (search_fp8=true), train.global_batch_size" in printed
    assert "Commands: 1: " in printed
    given = planned(*LLAMA_8B, "precision.fp8=rowwise", "search=true", "search_fp8=true").request
    assert not any("fp8" in each for each in options_not_searched(given.keeping("precision.fp8")))
    on_all = search(request.keeping("parallel.dp_shard"), 8, config.hardware)  # -1 is no choice
    assert on_all.best == result.best


def test_traced_search_prints_the_fastest_choice_whose_traced_memory_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planning import tracing

    arguments = ["experiment=smoke", "hardware=h100", "search=true", "trace=true", "output=null"]
    arguments.append("devices=2")
    traced: list[Any] = []

    def trace(spec: Any) -> Any:
        traced.append(spec)
        memory = step_memory(spec)
        return replace(memory, activations=2**40) if len(traced) == 1 else memory

    monkeypatch.setattr(tracing, "trace_memory", trace)
    config = planned(*arguments)
    assert plan_search(config, arguments) and len(traced) == 2
    best = search(config.request, 2, config.hardware).best
    assert [spec.parallel for spec in traced] == [
        run.stages[0].spec.parallel for _, run in best[:2]
    ]
    printed = capsys.readouterr().out
    assert "Traced memory of choice 1 does not fit." in printed and "Plan of choice 2" in printed


SMALLEST = {
    "8b": ("model=llama3_1_8b", *REAL, "train.global_batch_size=72"),
    "odd batch": ("model=llama3_1_8b", *REAL, "train.global_batch_size=45"),
    "one sequence": ("model=llama3_2_3b", *REAL, "train.global_batch_size=1"),
    "two nodes": ("model=llama3_1_8b", *REAL, "train.global_batch_size=64"),
    "kept": ("model=llama3_1_8b", *REAL, "train.global_batch_size=64", "parallel.tp=2"),
}


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("gib", [30, 60, 80])
def test_smallest_number_of_devices_is_that_of_a_brute_force_search(name: str, gib: int) -> None:
    """All numbers of devices up to a node of four, then complete nodes."""
    config = planned(
        *SMALLEST[name],
        "smallest=true",
        f"hardware.memory_gib={gib}",
        "hardware.devices_per_node=4",
    )
    request, hardware = config.request, config.hardware
    if name == "kept":
        request = request.keeping("parallel.tp")
    choice = fewest_devices(request, partial(memory_limit, hardware=hardware), 4)
    numbers = [1, 2, 3, 4, 8, 12, 16, 20, 24]
    fitting = (number for number in numbers if search(request, number, hardware, keep=1).best)
    assert (choice.mesh.world_size if choice else None) == next(fitting, None)
    if choice is not None:
        assert plan_run(request.stages(choice), hardware).fits


def test_remedy_names_fewer_devices_if_only_fewer_fit() -> None:
    """No mesh of nine devices divides a batch of eight; eight devices do."""
    config = planned(*LLAMA_8B, "train.global_batch_size=8", "devices=9", "search=true")
    assert not search(config.request, 9, config.hardware).best
    limit = partial(memory_limit, hardware=config.hardware)
    found = remedy(config.request, limit, 9, 8).text
    number = found.partition("use ")[2].partition(" devices")[0]
    assert int(number) < 9
    choice = fewest_devices(config.request, limit, 8)
    assert choice is not None and choice.mesh.world_size == int(number)


def test_remedy_with_more_processes_on_cpu_names_their_nodes() -> None:
    config = planned("experiment=h100x8_8b", "hardware=cpu", "hardware.memory_gib=128")
    limit = partial(memory_limit, hardware=config.hardware)
    found = remedy(config.request, limit, 8, 8, configured_choice(config, config.mesh)).text
    devices, nodes, words = re.findall(
        r"(\d+) devices on (\d+) nodes, such as with (.*?) \(", found
    )[0]
    assert int(nodes) == int(devices) / 8 > 1
    recipe = ("experiment=h100x8_8b", "parallel.num_nodes=null", "hardware=cpu")
    fits = planned(*recipe, "hardware.memory_gib=128", f"devices={devices}", *words.split())
    assert run_of(fits).fits


def test_remedy_with_more_devices_refers_to_the_search_for_the_fastest_choice() -> None:
    config = planned(*LLAMA_70B, "devices=8")
    limit = partial(memory_limit, hardware=config.hardware)
    found = remedy(config.request, limit, 8, 8, configured_choice(config, config.mesh)).text
    number, words = re.fullmatch(
        r"use at least (\d+) devices, such as with (.*) \(plan\.py smallest=true finds the fastest "
        r"choice on the fewest devices\)",
        found,
    ).groups()  # type: ignore[union-attr]
    example = run_of(planned(*LLAMA_70B, f"devices={number}", *words.split()))
    smallest = planned(*LLAMA_70B, "smallest=true")
    least = fewest_devices(smallest.request, limit, 8)
    assert least is not None and least.mesh.world_size == int(number) and example.fits
    [(_, fastest)] = search(smallest.request, int(number), smallest.hardware, keep=1).best
    assert fastest.tokens_per_second > example.tokens_per_second


def test_fewest_devices_is_none_if_no_number_suffices() -> None:
    small = planned(*LLAMA_70B, "devices=8", "train.global_batch_size=1", "search=true").request
    assert fewest_devices(small, lambda spec: GIB // 4, 8) is None


def test_nearest_fit_changes_as_little_as_possible() -> None:
    config = planned(*LLAMA_8B, "train.micro_batch_size=4")
    request = config.request
    current = configured_choice(config, config.mesh)

    def nearest(limit_gib: float) -> Choice | None:
        return nearest_fit(request, current, lambda spec: int(limit_gib * GIB))

    def peak(choice: Choice) -> float:
        return step_memory(request.stages(choice)[0][0]).peak / GIB

    needed = peak(current)
    assert nearest(needed) == current
    smaller = nearest(needed * 0.9)
    assert smaller is not None and peak(smaller) <= needed * 0.9
    assert smaller.mesh == current.mesh and smaller.parallel.activation_checkpoint == "none"
    on_same = list(choices(current.mesh, request))
    least = min(
        peak(each) for each in on_same if each.parallel.activation_checkpoint == "selective"
    )
    assert least < min(
        peak(each) for each in on_same if each.parallel.activation_checkpoint == "none"
    )
    recomputed = nearest(least)  # although `full` would fit with larger micro-batches
    assert recomputed is not None and peak(recomputed) <= least
    assert (
        recomputed.mesh == current.mesh and recomputed.parallel.activation_checkpoint == "selective"
    )
    assert nearest(1) is None


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("train.micro_batch_size=2",), {"parallel.activation_checkpoint=full"}),
        (("train.micro_batch_size=null",), None),
        (("train.micro_batch_size=1",), None),
    ],
)
def test_nearest_fit_keeps_the_micro_batch_or_makes_it_smaller(
    words: tuple[str, ...], changed: set[str] | None
) -> None:
    config = planned("experiment=h100x8_8b", "hardware=l40s", *words)
    request, current = config.request, configured_choice(config, config.mesh)
    limit = partial(memory_limit, hardware=config.hardware)
    assert not run_of(config).fits
    nearest = nearest_fit(request, current, limit)
    assert nearest is not None
    if changed is not None:
        assert {*nearest.overrides} - {*current.overrides} == changed
    sizes = [request.stages(each)[0][0].micro_batch_size for each in (nearest, current)]
    assert sizes[0] <= sizes[1]
    same = replace(nearest, micro_batch_size=current.micro_batch_size)
    if sizes[0] == sizes[1]:  # null stays null
        assert nearest == same
    found = remedy(request, limit, 8, 8, current)
    fixed = planned("experiment=h100x8_8b", "hardware=l40s", *words, *found.overrides.split())
    assert run_of(fixed).fits


# ---------------------------------------------------------------- plan.json


VARIABLE = {"stages[].memory": "TIER", "stages[].memory.TIER": "PART"}
VARIABLE |= {"stages[].step_seconds": "PART", "rejections": "REASON"}
FIXED = {"peak", "phase", "total"}


def keys_of(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all leaves of a record as docs/planning.md writes them."""
    if isinstance(value, list):
        for each in value:
            yield from keys_of(each, f"{path}[]")
    elif isinstance(value, dict):
        for name, each in value.items():
            known = VARIABLE.get(path.removeprefix("best_plan."), name)
            shown = name if name in FIXED else known
            yield from keys_of(each, f"{path}.{shown}".lstrip("."))
    else:
        yield path


def documented_keys() -> set[str]:
    """Return the keys in the tables of the section plan.json; … is the parent of the one before."""
    text = (ROOT / "docs" / "planning.md").read_text()
    section = text.partition("\n## plan.json\n")[2].partition("\n## ")[0]
    found: list[str] = []
    for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        for key in re.findall("`(.*?)`", row):
            parent = found[-1].rpartition(".")[0] if found else ""
            found.append(key.replace("…", parent))
    assert len(found) == len(set(found))
    return set(found)


def test_every_key_of_plan_json_is_documented(tmp_path: Path) -> None:
    several = planned(*LLAMA_8B, "data.stages=[{from_sample:640,seq_len:4096}]")
    pipeline = planned(*LLAMA_8B, "parallel.pp=2")
    found = {
        key
        for config in (several, pipeline)
        for key in keys_of(plan_json.plan_record(config, run_of(config)))
    }
    words = ["experiment=smoke", "devices=4", "hardware=cpu", "search=true", "parallel.tp=1"]
    words.append(f"output={tmp_path / 'plan.json'}")
    assert plan_search(planned(*words), words)
    searched = json.loads((tmp_path / "plan.json").read_text())
    assert searched["best"] and searched["rejections"]
    plan_of_best = {f"best_plan.{key}" for key in found}  # documented for a plan
    found |= {"best_plan" if key in plan_of_best else key for key in keys_of(searched)}
    assert found | {"remedy"} == documented_keys()


def test_every_key_of_the_planner_is_in_a_table() -> None:
    text = (ROOT / "docs" / "planning.md").read_text()
    rows = "\n".join(re.findall(r"^\|.*", text, re.MULTILINE))
    assert [key for key in PLANNER_KEYS if not re.search(f"`{key}[`=]", rows)] == []


# ---------------------------------------------------------------- plot


def test_bars_of_a_search_have_different_names() -> None:
    config = planned(*LLAMA_8B, "devices=8", "search=true")
    best = [choice for choice, _ in search(config.request, 8, config.hardware).best]
    names = [name.partition(": ")[2] for name in report.choice_names(best)]
    assert len(set(names)) == len(best) > len({choice.mesh for choice in best})
    for choice, name in zip(best, names, strict=True):
        assert name.partition("\n")[0] == str(choice.mesh)


def test_plot_has_the_unit_of_its_sizes_and_the_available_memory_of_each_bar() -> None:
    def axes_of(sizes: list[int], limits: list[int]) -> Any:
        bars = [(f"bar {size}", MemoryBreakdown(activations=size)) for size in sizes]
        return memory_figure(bars, limits, "title").axes[0]

    large = axes_of([60 * GIB, 70 * GIB], [75 * GIB, 76 * GIB])
    assert large.get_xlabel() == "peak memory per rank (GiB)"
    assert [line.get_xdata()[0] for line in large.get_lines()] == [75, 76]
    assert large.get_title(loc="right") == "available: 75.00 to 76.00"
    small = axes_of([3 * 2**20], [15 * GIB])  # whose bar the axis would hide
    assert small.get_xlabel() == "peak memory per rank (MiB)"
    assert [text.get_text() for text in small.texts] == ["3.0"]
    assert not small.get_lines() and 3 < small.get_xlim()[1] < 4
    assert small.get_title(loc="right") == "available: 15.00 GiB"


# ---------------------------------------------------------------- program


def test_program_prints_writes_and_plots(tmp_path: Path) -> None:
    """The exit code is 1 if nothing fits, for use in scripts."""
    overrides = ["hardware=h100", "output=plans/p.json", *LLAMA_8B, "train.micro_batch_size=4"]
    done = start_program([str(ROOT / "plan.py"), *overrides], cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "Does not fit on 8 × h100: use " in done.stdout
    record = json.loads((tmp_path / "plans/p.json").read_text())
    [stage] = record["stages"]
    memory = stage["memory"]["analytic"]
    assert sum(memory[part] for part in PARTS) == memory["peak"] > stage["capacity"]
    assert record["fits"] is False and f"{memory['peak'] / GIB:.2f}" in done.stdout
    times = stage["step_seconds"]
    assert sum(times.values()) == pytest.approx(2 * times["total"])
    assert (tmp_path / "plans/p.png").read_bytes().startswith(b"\x89PNG")
    fits = [*overrides, "parallel.activation_checkpoint=full", "train.micro_batch_size=1"]
    done = start_program([str(ROOT / "plan.py"), *fits, "output=null", "search=true"], cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    small = ["experiment=smoke", "hardware=cpu", "trace=true", "output=t.json"]
    small += ["parallel.compile=true", "parallel.activation_checkpoint=0.5"]
    traced = start_program([str(ROOT / "plan.py"), *small], cwd=tmp_path)
    assert traced.returncode == 0 and "traced" in traced.stdout, traced.stderr
    [stage] = json.loads((tmp_path / "t.json").read_text())["stages"]
    peaks = [stage["memory"][tier]["peak"] for tier in ("analytic", "traced")]
    assert f"{peaks[1] / 2**20:.2f}" in traced.stdout  # accuracy is tested elsewhere
    line = next(line for line in done.stdout.splitlines() if "python train.py" in line)
    pasted = trained(*line.split()[2:])  # as pasted from the console
    assert pasted.train.global_batch_size == 64 and pasted.model.name == "llama3_8b"


def test_remedy_stores_moments_in_bf16_before_it_asks_for_more_devices() -> None:
    def plan(*more: str) -> tuple[PlanRequest, Choice, RunPlan]:
        words = ("experiment=h200_8b", "precision.optimizer_state=fp32", "tokenizer=byte", *more)
        config = planned(*words)
        choice = configured_choice(config, config.mesh)
        return config.request, choice, plan_run(config.request.stages(choice), config.hardware)

    request, choice, run = plan()
    limit = partial(memory_limit, hardware=load_hardware("h200"))
    found = remedy(request, limit, 1, 8, choice)
    assert "precision.optimizer_state=bf16" in found.overrides
    assert "bf16 moments change results slightly" in found.text
    assert not run.fits and plan(*found.overrides.split())[2].fits
    for more in ("optim.betas=[0.9,0.999]", "precision.optimizer_state=int8"):
        assert plan(more)[0].with_bf16_moments() is None


# ---------------------------------------------------------------- memory check of train.py


def check(config: JobConfig, processes: Processes = ONE_PROCESS, mesh: MeshShape = ONE_RANK) -> str:
    message = check_plan(config, processes, mesh)
    assert message is not None
    return message


def test_run_that_does_not_fit_is_rejected_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**30)
    overrides = ("train.micro_batch_size=16", "train.seq_len=4096", "model.max_seq_len=4096")
    config = trained(*overrides)
    with pytest.raises(ConfigError, match=r"\(does not fit\).*; use .* to start anyway") as error:
        check(config)
    assert "torch finds no GPU here" in str(error.value)
    with pytest.raises(ConfigError) as error_of_cpu:
        check(trained(*overrides, "parallel.accelerator=cpu"))
    assert "GPU" not in str(error_of_cpu.value)
    remedy = str(error.value).partition("; use ")[2].partition(" (")[0].split()
    accepted = check(trained(*overrides, *remedy))
    assert accepted.startswith("Memory plan: ") and "(fits)" in accepted
    assert "(does not fit)" in check(trained(*overrides, "run.plan_check=warn"))
    assert check_plan(trained(*overrides, "run.plan_check=off"), ONE_PROCESS, ONE_RANK) is None
    # Without a change that fits on this machine, the remedy is another one.
    recipe = ["experiment=h200_1b", "tokenizer=byte"]
    with pytest.raises(ConfigError, match="; start it on a machine with GPUs, or plan it here"):
        check(trained(*recipe))
    config_of_plan = planned(*recipe)
    request, on_gpu = config_of_plan.request, configured_choice(config_of_plan, ONE_RANK)
    assert plan_run(request.stages(on_gpu), config_of_plan.hardware).fits
    # It fits into 16 times the memory, which two ranks of a node share.
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**34)
    assert "of 15.55 GiB per rank (fits)" in check(config)
    half = trained(*overrides, "train.micro_batch_size=8")
    shared = check(half, Processes("cpu", 2, 1, "self"), MeshShape(1, 2, 1, 1))
    assert "of 7.55 GiB per rank" in shared


def test_gpu_memory_is_queried_and_known_devices_have_a_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = trained(*LLAMA_8B, "parallel.activation_checkpoint=full")
    processes, mesh = Processes("cuda", 8, 1, "torchrun"), MeshShape(1, 8, 1, 1)
    monkeypatch.setattr(fit_check, "LOCAL", "never measured")
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2**41)

    def check_on(name: str, gib: int) -> str:
        device = SimpleNamespace(name=name, major=8, minor=0, total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: processes.per_node)
        return check(config, processes, mesh)

    known = check_on("NVIDIA H100 80GB HBM3", 80)
    nccl = COMMUNICATOR_BYTES / GIB
    reserved = load_hardware("h100").reserved_gib + nccl
    assert f"of {80 - reserved:.2f} GiB per rank (fits)" in known
    plan = plans_of(planned(*LLAMA_8B, "parallel.activation_checkpoint=full"))[0]
    assert known.endswith(f"about {plan.tokens_per_second:,.0f} tokens/s")
    config = replace(config, train=replace(config.train, max_steps=10**7))
    config = replace(config, checkpoint=replace(config.checkpoint, interval=None))
    warned = check_on("NVIDIA H100 80GB HBM3", 80)  # one of eight fails in nine months
    assert "\nWarning: checkpoint.interval=null saves every " in warned
    unknown = check_on("Some Card", 80)
    assert f"of {79.5 - nccl:.2f} GiB per rank (fits)" in unknown and "tokens/s" not in unknown
    with pytest.raises(ConfigError, match=r"\(does not fit\)"):
        check_on("Some Card", 12)


@pytest.mark.parametrize("hardware", ["cpu", None])
def test_run_is_compared_with_its_plan_on_known_hardware(
    hardware: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = None if hardware is None else load_hardware(hardware)
    monkeypatch.setattr(fit_check, "this_machine", lambda _: (known, 2**34))
    stages = "data.stages=[{from_sample:64,seq_len:128}]"
    config = trained("train.seq_len=64", "train.max_steps=100", stages)
    found = plan_comparison(config, ONE_PROCESS, ONE_RANK)
    assert plan_comparison(trained("run.plan_check=off"), ONE_PROCESS, ONE_RANK) is None
    if hardware is None:
        assert found is None
        return
    assert found is not None and found.planned_stall > 0 and found.process_gib == PROCESS_GIB
    run = run_of(planned("hardware=cpu", "train.seq_len=64", "train.max_steps=100", stages))
    for plan in run.stages:
        step = found.steps[plan.spec.seq_len, plan.spec.global_batch_size]
        assert step.seconds == plan.time.total
        # The resident set of a process includes its libraries.
        assert step.peak_memory_gib == pytest.approx(plan.memory.peak / GIB + PROCESS_GIB)


def test_train_prints_memory_plan_and_rejects_a_run_that_does_not_fit(
    tmp_path: Path, smoke_run: Callable[..., Any]
) -> None:
    overrides = ["model=llama3_1_405b", *REAL, "parallel.accelerator=cpu"]
    done = start_program([str(ROOT / "train.py"), *overrides], cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "Loading …\n"
    assert list(tmp_path.iterdir()) == []
    assert "(does not fit)" in done.stderr
    assert "use parallel.accelerator=auto and start it on a machine with GPUs" in done.stderr
    output = smoke_run(tmp_path / "run", "parallel.tp=2", "train.max_steps=1").stdout
    assert output.count("Memory plan: ") == 1  # only the first of two ranks prints it
    assert output.index("Memory plan: ") < output.index("Llamesh: smoke")


def test_machine_memory_is_the_smallest_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open("/proc/meminfo") as file:
        total_kib = int(file.readline().split()[1])
    assert machine_memory(tmp_path) == total_kib * 1024
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 256}.get)
    assert machine_memory(tmp_path) == 2**20
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    assert machine_memory(tmp_path) == 2**20
    limit.write_text("4096\n")
    assert machine_memory(tmp_path) == 4096


def test_meshes_yields_every_factorization_once() -> None:
    for devices in (1, 6, 8, 12):
        found = list(meshes(devices))
        every = itertools.product(divisors(devices), repeat=4)
        assert len(found) == len(set(found))
        assert {(mesh.dp_replicate, mesh.dp_shard, mesh.cp, mesh.tp) for mesh in found} == {
            (a, b, c, d) for a, b, c, d in every if a * b * c * d == devices
        }
