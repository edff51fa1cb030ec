"""`plan.py` answers for any mesh of any size, and `train.py` asks it before it allocates."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, start_program
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cli.arguments import CONF, hydra_arguments, plan_arguments
from cli.config import load_plan_config, load_train_config
from parallel.mesh import MeshShape, Processes, resolve_mesh
from planning import fit_check as planning
from planning.config import PlanJobConfig, planned_errors
from planning.fit_check import PlanRequest, check_plan, given_choice, machine_memory
from planning.hardware import load_hardware
from planning.memory import step_memory
from planning.plan import GIB, PARTS, Plan, capacity, link, plan_run
from planning.search import (
    KEPT,
    REDUCTIONS,
    Choice,
    SearchSpace,
    choices,
    divisors,
    fewest_devices,
    meshes,
    remedy,
    search,
)
from training.config import JobConfig
from training.config_validation import ConfigError
from training.throughput import Throughput

REAL = ("data=fineweb_edu", "tokenizer=llama3", "train.seq_len=8192")
LLAMA_8B = ("model=llama3_8b", *REAL, "train.global_batch_size=64")
LLAMA_70B = ("model=llama3_1_70b", *REAL, "train.global_batch_size=64")
ONE = Processes("cpu", 1, 1, "self")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def planned(*arguments: str) -> PlanJobConfig:
    """As `python plan.py ARGUMENTS` reads it."""
    return load_plan_config(compose("plan", plan_arguments(list(arguments))))


def trained(*arguments: str) -> JobConfig:
    """As `python train.py ARGUMENTS` reads it."""
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        planned(*arguments)
    return error.value.errors


def question(config: PlanJobConfig) -> SearchSpace:
    accelerator = config.hardware.accelerator
    return PlanRequest(config, accelerator, config.budget, config.is_hopper).search_space()


def plans_of(config: PlanJobConfig) -> tuple[Plan, ...]:
    jobs = question(config).jobs(given_choice(config, config.mesh))
    return plan_run(jobs, config.hardware).stages


# ---------------------------------------------------------------- what is asked


def test_plan_takes_every_key_and_group_of_train() -> None:
    words = ["experiment=smoke", "model.n_layers=3", "parallel.tp=2"]
    whole = OmegaConf.to_container(compose("plan", plan_arguments(words)))
    train = OmegaConf.to_container(compose("train", hydra_arguments(words, "train")))
    assert isinstance(whole, dict) and isinstance(train, dict)
    own = {field.name for field in fields(PlanJobConfig)} - {f.name for f in fields(JobConfig)}
    assert {key: value for key, value in whole.items() if key not in own} == train
    assert own == set(whole) - set(train)


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        ((), 8),  # a node of h100
        (("devices=3", "train.global_batch_size=3"), 3),
        (("parallel.dp_shard=2", "parallel.tp=2"), 4),
        (("parallel.num_nodes=2",), 16),
        (("parallel.devices=2", "parallel.num_nodes=2"), 4),
        (("parallel.dp_replicate=16",), 16),  # more than a node
        (("hardware=cpu",), 1),
        (("hardware=cpu", "parallel.tp=2"), 2),
    ],
)
def test_devices_are_those_asked_for_or_a_node(words: tuple[str, ...], devices: int) -> None:
    config = planned(*words)
    assert config.n_devices == config.mesh.world_size == devices


def test_the_budget_is_asked_for_or_that_of_the_steps_over_all_stages() -> None:
    stages = "data.stages=[{from_sample:32,seq_len:128},{from_sample:64,global_batch_size:32}]"
    sizes = ["train.seq_len=64", "train.global_batch_size=16", "train.max_steps=6", stages]
    # Two steps of each stage: 16 × 64, 16 × 128 and 32 × 128 tokens.
    parts = [2 * 1024, 2 * 2048, 2 * 4096]
    config = planned(*sizes)
    assert config.budget == sum(parts) and [p.tokens for p in plans_of(config)] == parts
    longer = [p.tokens for p in plans_of(planned(*sizes, "tokens=1e6"))]
    assert longer == [*parts[:2], 1_000_000 - sum(parts[:2])]
    short = plans_of(planned(*sizes, "tokens=3000"))  # ends in the second stage
    assert [plan.tokens for plan in short] == [2048, 952]


def test_stages_fit_together_and_their_days_add_up() -> None:
    longer = "data.stages=[{from_sample:6400,seq_len:8192}]"
    sizes = ["model=llama3_1_8b", *REAL, "train.seq_len=512", "train.global_batch_size=64", longer]
    config = planned(*sizes, "train.max_steps=300")
    run = plan_run(question(config).jobs(given_choice(config, config.mesh)), config.hardware)
    first, second = run.stages
    assert first.fits and not second.fits and not run.fits  # the longer one decides
    assert run.fullest is second
    assert run.seconds == pytest.approx(100 * first.time.total + 200 * second.time.total)
    hours = run.seconds / 3600 if run.seconds else 0
    price = config.hardware.price_per_hour
    assert price is not None and run.cost == pytest.approx(hours * price * 8)


# ---------------------------------------------------------------- what is refused


def test_everything_wrong_is_told_at_once_with_its_remedy() -> None:
    found = problems("hardwar.x=1", "devices=0", "tokens=0", "parallel.accelerator=cpu")
    assert any("hardwar is not a key: did you mean hardware?" in each for each in found)
    assert any(each.startswith("devices (0) is below 1: use at least 1") for each in found)
    assert any(each.startswith("tokens (0) is below 1: use") for each in found)
    assert any("parallel.accelerator (cpu) is not that of hardware h100" in each for each in found)


def test_a_mesh_is_held_to_the_rules_of_train() -> None:
    found = problems("parallel.tp=3", "devices=6")
    assert any("parallel.tp (3) does not divide model.n_kv_heads (2)" in each for each in found)
    [places] = problems("devices=6", "parallel.dp_shard=4")
    assert "4 places for 6 processes" in places
    [fp8] = problems("hardware=a100", "precision.fp8=tensorwise", *LLAMA_8B)
    assert "precision.fp8 (tensorwise)" in fp8 and "hardware a100" in fp8
    [asynchronous] = problems(
        "hardware=a100", "parallel.async_tp=true", "parallel.compile=true", "parallel.tp=2"
    )
    assert "from Hopper on" in asynchronous
    # A card that this machine does not have is planned all the same.
    planned("parallel.async_tp=true", "parallel.compile=true", "parallel.tp=2")
    planned("precision.fp8=rowwise", "precision.optimizer_state=int8", *LLAMA_8B)


def test_unknown_hardware_names_those_known(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"h1000.*a100.*b200.*cpu.*h100.*h200"):
        plan_arguments(["hardware=h1000"])
    (tmp_path / "odd.yaml").write_text("- 1\n")
    with pytest.raises(SystemExit, match=r"odd\.yaml"):
        plan_arguments([f"hardware={tmp_path / 'odd.yaml'}"])


def test_a_budget_without_steps_is_named() -> None:
    [problem] = problems("train.max_steps=null", "optim.schedule_steps=1")
    assert problem.startswith("train.max_steps (None)")


def test_a_hardware_file_is_planned_on_like_a_known_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONF / "hardware" / "h100.yaml").read_text().replace("name: h100", "name: m"))
    config = planned(f"hardware={path}", "hardware.price_per_hour=7")
    assert config.hardware == replace(load_hardware("h100"), name="m", price_per_hour=7)
    assert planned("hardware=h200").hardware == load_hardware("h200")


# ---------------------------------------------------------------- what is answered


def test_rates_are_those_that_a_run_would_log() -> None:
    config = planned(*LLAMA_8B, "parallel.activation_checkpoint=full")
    [plan] = plans_of(config)
    throughput = Throughput(
        flops_per_token_causal=plan.tflops() * 1e12 / plan.tokens_per_second_per_device,
        flops_per_token_full=plan.tflops(False) * 1e12 / plan.tokens_per_second_per_device,
        world_size=8,
        peak_flops=config.hardware.peak_tflops["bf16"] * 1e12,
        device=torch.device("cpu"),
    )
    logged = throughput.metrics(plan.job.tokens, plan.time.total, 0.0, 1)
    assert logged["tokens_per_second"] == pytest.approx(plan.tokens_per_second)
    assert logged["mfu_causal"] == pytest.approx(plan.mfu())
    assert logged["mfu_full"] == pytest.approx(plan.mfu(causal=False))
    [in_8_bits] = plans_of(planned(*LLAMA_8B, "precision.fp8=tensorwise"))
    assert in_8_bits.mfu() is None and in_8_bits.tflops() > 0


@pytest.mark.parametrize(
    ("mesh", "axis", "where"),
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
def test_an_axis_stays_inside_a_node_where_its_ranks_do(
    mesh: MeshShape, axis: str, where: str
) -> None:
    """Held against the ranks of every group: neighbours in rank, eight to a node."""
    config = planned(f"devices={mesh.world_size}")
    [(job, _)] = question(config).jobs(replace(given_choice(config, mesh)))
    grid = torch.arange(mesh.world_size).view(mesh.sizes)
    axes = [["dp_replicate", "dp_shard", "cp", "tp"].index(name) for name in axis.split("+")]
    groups = grid.movedim(axes, list(range(-len(axes), 0))).reshape(
        -1, math.prod(mesh.sizes[axis] for axis in axes)
    )
    spread = any(len({int(rank) // 8 for rank in group}) > 1 for group in groups)
    assert link(axis, job, config.hardware) == where
    assert spread == (where == "between nodes")


def test_the_room_of_a_rank_is_what_tensors_can_have() -> None:
    """A GPU's without what is reserved; on CPU the ranks of a node share its memory."""

    def room(name: str, ranks: int, **given: float) -> float:
        config = planned(f"hardware={name}", f"devices={ranks}", "train.global_batch_size=64")
        hardware = replace(config.hardware, **given)  # type: ignore[arg-type]
        [(job, _)] = question(config).jobs(given_choice(config, config.mesh))
        return capacity(job, hardware) / GIB

    sizes = {"memory_gib": 80.0, "reserved_gib": 3.0, "devices_per_node": 4}
    assert [room("h100", ranks, **sizes) for ranks in (1, 4, 8)] == [77, 77, 77]
    assert [room("cpu", ranks, **sizes) for ranks in (1, 4, 8)] == [77, 17, 17]


def test_the_limit_is_the_largest_part() -> None:
    [full] = plans_of(planned(*LLAMA_8B, "train.micro_batch_size=8"))
    assert not full.fits and full.limit.startswith("memory, of which activations are most")
    [plan] = plans_of(planned(*LLAMA_8B, "parallel.activation_checkpoint=full"))
    assert plan.limit.startswith("matrix products (")
    [tiny] = plans_of(planned("parallel.dp_shard=64", "train.global_batch_size=64"))
    assert tiny.limit.startswith("exposed communication on dp_shard")


# ---------------------------------------------------------------- the search


def test_search_finds_the_fastest_of_all_that_train_would_take() -> None:
    """Another way to the same answer: every configuration there is, held to the rules by itself."""
    config = planned("experiment=smoke", "devices=4", "hardware=cpu")
    found = search(question(config), 4, config.hardware)
    speeds = {}
    places = [mesh for mesh in itertools.product((1, 2, 4), repeat=4) if math.prod(mesh) == 4]
    reshards = (None, True, False)
    for sizes, size, kept, reshard, reduced in itertools.product(
        places, (1, 2, 4, 8), KEPT, reshards, REDUCTIONS
    ):
        choice = Choice(MeshShape(*sizes), size, kept, reshard, reduced)
        parallel = choice.parallel(config.parallel)
        train = replace(config.train, micro_batch_size=size)
        mesh, wrong = resolve_mesh(parallel, 4)
        sections = (parallel, config.precision, config.model, train, config.data)
        if wrong or planned_errors("cpu", mesh, *sections, hopper=False):
            continue
        [plan] = plans_of(replace(config, parallel=parallel, train=train))
        if plan.fits:
            speeds[choice] = plan.tokens_per_second
    fastest, best = found.best[0]
    assert best.tokens_per_second == speeds[fastest] == max(speeds.values())
    # What has no effect is not tried: resharding on one shard, reducing one micro-batch apart.
    telling = [
        choice
        for choice in speeds
        if (choice.reshard_after_forward is None or choice.mesh.dp_shard * choice.mesh.cp > 1)
        and (choice.reduce_gradients == "step" or choice.mesh.dp * choice.mesh.cp > 1)
        and (choice.reduce_gradients == "step" or choice.micro_batch_size != 8 // choice.mesh.dp)
    ]
    assert found.fitting == len(telling) < len(speeds)


def test_the_words_of_a_search_make_train_do_what_was_planned() -> None:
    config = planned(*LLAMA_8B, "devices=16", "search=true")
    found = search(question(config), config.n_devices, config.hardware)
    assert len(found.best) == 10 and found.fitting > 100
    speeds = [plan.tokens_per_second for _, plan in found.best]
    assert speeds == sorted(speeds, reverse=True)
    for choice, plan in found.best:
        pasted = trained(*LLAMA_8B, *choice.overrides)
        mesh, problems = resolve_mesh(pasted.parallel, 16)
        assert not problems
        asked = PlanRequest(pasted, "cuda", config.budget)
        [(job, _)] = asked.jobs(given_choice(pasted, mesh))
        assert job == plan.fullest.job and plan.fits
        again = planned(*LLAMA_8B, "devices=16", *choice.overrides)
        assert plans_of(again)[0].tokens_per_second == plan.tokens_per_second


def test_search_tells_why_not_for_each_that_is_not_among_the_best() -> None:
    config = planned(
        "model=llama3_1_70b", *REAL, "train.global_batch_size=24", "devices=64", "search=true"
    )
    found = search(question(config), 64, config.hardware)
    assert found.candidates == len(found.best) + sum(one.count for one in found.reasons.values())
    reasons = "\n".join(f"{why}: {one.example}" for why, one in found.reasons.items())
    assert "the rules: train.global_batch_size is not a multiple of the data ranks" in reasons
    assert "the rules: parallel.tp does not divide model.n_kv_heads" in reasons
    assert "does not fit, for its activations: parallel." in reasons
    assert "GiB of" in reasons and "fits, and is slower" in reasons


def test_a_thousand_candidates_take_under_two_seconds() -> None:
    """Of processor time, which others on the machine hardly change."""
    config = planned(*LLAMA_8B, "devices=8", "search=true")
    asked = question(config)
    begin = time.process_time()
    found = search(asked, 8, config.hardware)
    seconds = time.process_time() - begin
    assert found.candidates >= 1000
    assert seconds * 1000 / found.candidates < 2


def test_the_smallest_number_of_devices_is_told_and_no_smaller_one_would_do() -> None:
    config = planned(*LLAMA_70B, "devices=8", "search=true")
    asked, hardware = question(config), config.hardware
    assert not search(asked, 8, hardware).best

    def room(job: Any) -> int:
        return capacity(job, hardware)

    found = fewest_devices(asked, room, 8, 8)
    assert found is not None
    devices, choice = found
    [(job, _)] = asked.jobs(choice)
    assert step_memory(job).peak <= room(job) and choice.mesh.world_size == devices
    for fewer in range(16, devices, 8):
        assert not search(asked, fewer, hardware).best, fewer
    # With one sequence to share, and little memory, no number of devices does.
    small = question(planned(*LLAMA_70B, "devices=8", "train.global_batch_size=1", "search=true"))
    assert fewest_devices(small, lambda job: GIB // 4, 8, 8) is None


def test_what_would_fit_is_the_nearest_choice_that_does() -> None:
    config = planned(*LLAMA_8B, "train.micro_batch_size=4")
    asked = question(config)
    given = given_choice(config, config.mesh)

    def remedied(room_gib: float) -> Choice | None:
        return remedy(asked, given, lambda job: int(room_gib * GIB))

    def peak(choice: Choice) -> float:
        return step_memory(asked.jobs(choice)[0][0]).peak / GIB

    whole = peak(given)
    assert remedied(whole) == given
    smaller = remedied(whole * 0.9)
    assert smaller is not None and peak(smaller) <= whole * 0.9
    assert smaller.mesh == given.mesh and smaller.activation_checkpoint == "none"
    on_same = list(choices(given.mesh, asked))
    least = min(peak(each) for each in on_same if each.activation_checkpoint == "selective")
    assert least < min(peak(each) for each in on_same if each.activation_checkpoint == "none")
    recomputed = remedied(least)  # where full recomputation would do with larger micro-batches
    assert recomputed is not None and peak(recomputed) <= least
    assert recomputed.mesh == given.mesh and recomputed.activation_checkpoint == "selective"
    assert remedied(1) is None


# ---------------------------------------------------------------- the program


def test_the_program_tells_writes_and_draws(tmp_path: Path) -> None:
    """Ends with 1 where nothing fits: a script may go by it."""
    words = ["hardware=h100", "output=plans/p.json", *LLAMA_8B, "train.micro_batch_size=4"]
    done = start_program([str(ROOT / "plan.py"), *words], cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    assert "Fits on as many devices with" in done.stdout
    record = json.loads((tmp_path / "plans/p.json").read_text())
    [stage] = record["stages"]
    memory = stage["memory"]["analytic"]
    assert sum(memory[part] for part in PARTS) == memory["peak"] > stage["capacity"]
    assert record["fits"] is False and f"{memory['peak'] / GIB:.2f}" in done.stdout
    times = stage["step_seconds"]
    assert sum(times.values()) == pytest.approx(2 * times["all"])
    assert (tmp_path / "plans/p.png").read_bytes().startswith(b"\x89PNG")
    fits = [*words, "parallel.activation_checkpoint=full", "train.micro_batch_size=1"]
    done = start_program([str(ROOT / "plan.py"), *fits, "output=null", "search=true"], cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    small = ["experiment=smoke", "hardware=cpu", "trace=true", "output=t.json"]
    small += ["parallel.compile=true", "parallel.activation_checkpoint=0.5"]
    traced = start_program([str(ROOT / "plan.py"), *small], cwd=tmp_path)
    assert traced.returncode == 0 and "traced" in traced.stdout, traced.stderr
    [stage] = json.loads((tmp_path / "t.json").read_text())["stages"]
    peaks = [stage["memory"][tier]["peak"] for tier in ("analytic", "traced")]
    assert f"{peaks[1] / 2**20:.2f}" in traced.stdout  # how near they are is told elsewhere
    line = next(line for line in done.stdout.splitlines() if "python train.py" in line)
    pasted = trained(*line.split()[2:])  # as a person pastes it
    assert pasted.train.global_batch_size == 64 and pasted.model.name == "llama3_8b"


# ---------------------------------------------------------------- before a run


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "machine_memory", lambda: 2**30)
    words = ("train.micro_batch_size=16", "train.seq_len=4096", "model.max_seq_len=4096")
    config = trained(*words)
    with pytest.raises(ConfigError) as error:
        check_plan(config, ONE, MeshShape(1, 1, 1, 1))
    [problem] = error.value.errors
    assert problem.startswith("the run does not fit, a step needs ")
    remedy_words = problem.partition(": use ")[2].partition(";")[0].split()
    verdict = check_plan(trained(*words, *remedy_words), ONE, MeshShape(1, 1, 1, 1))
    assert verdict is not None and verdict.startswith("plan: fits")
    warned = check_plan(trained(*words, "run.plan_check=warn"), ONE, MeshShape(1, 1, 1, 1))
    assert warned is not None and "does not fit" in warned
    off = check_plan(trained(*words, "run.plan_check=off"), ONE, MeshShape(1, 1, 1, 1))
    assert off is None
    # Sixteen times the memory holds it, and two ranks of a node share what there is.
    monkeypatch.setattr(planning, "machine_memory", lambda: 2**34)
    [told] = [check_plan(config, ONE, MeshShape(1, 1, 1, 1))]
    shared = check_plan(config, Processes("cpu", 2, 1, "self"), MeshShape(1, 2, 1, 1))
    assert told is not None and "of 15.55 GiB a rank" in told
    assert shared is not None and "of 7.55 GiB a rank" in shared


def test_on_a_gpu_its_own_memory_counts_and_a_known_card_has_a_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = trained(*LLAMA_8B, "parallel.activation_checkpoint=full")
    processes, mesh = Processes("cuda", 8, 1, "torchrun"), MeshShape(1, 8, 1, 1)
    monkeypatch.setattr(planning, "LOCAL", "never measured")

    def verdict(name: str, gib: int) -> str | None:
        card = SimpleNamespace(name=name, total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        return check_plan(config, processes, mesh)

    known = verdict("NVIDIA H100 80GB HBM3", 80)
    reserved = load_hardware("h100").reserved_gib
    assert known is not None and f"of {80 - reserved:.2f} GiB a rank" in known
    speed = plans_of(planned(*LLAMA_8B, "parallel.activation_checkpoint=full"))[0]
    assert known.endswith(f"about {speed.tokens_per_second:,.0f} tokens/s")
    unknown = verdict("Some Card", 80)
    assert unknown is not None and "of 79.50 GiB" in unknown and "tokens/s" not in unknown
    with pytest.raises(ConfigError, match="the run does not fit"):
        verdict("Some Card", 12)


def test_train_refuses_what_cannot_fit_and_tells_its_verdict(
    tmp_path: Path, smoke_run: Callable[..., Any]
) -> None:
    words = ["model=llama3_1_405b", *REAL, "parallel.accelerator=cpu"]
    done = start_program([str(ROOT / "train.py"), *words], cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert "the run does not fit" in done.stderr and "devices at least, with" in done.stderr
    told = smoke_run(tmp_path / "run", "parallel.tp=2", "train.max_steps=1").stdout
    assert told.count("plan: fits, ") == 1  # of two ranks one tells
    assert told.index("plan: fits") < told.index("Llamesh: smoke")


def test_the_memory_of_a_machine_is_the_least_that_limits_it(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1024 kB\nMemFree:  1 kB\n")
    assert machine_memory(tmp_path) == 2**20
    limit = tmp_path / "sys/fs/cgroup/memory.max"
    limit.write_text("max\n")
    assert machine_memory(tmp_path) == 2**20
    limit.write_text("4096\n")
    assert machine_memory(tmp_path) == 4096
    assert machine_memory() <= machine_memory(tmp_path / "nothing")


def test_meshes_are_all_there_are() -> None:
    for devices in (1, 6, 8, 12):
        found = list(meshes(devices))
        every = itertools.product(divisors(devices), repeat=4)
        assert len(found) == len(set(found))
        assert {mesh.sizes for mesh in found} == {
            (a, b, c, d) for a, b, c, d in every if a * b * c * d == devices
        }
