"""Host memory of asynchronous saves: closed forms against real copies, and the remedy."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from torch.utils._pytree import tree_leaves

from checkpoint.host_copy import copy_to_host
from checkpoint.writer import tensors_of
from cli.arguments import CONF, hydra_arguments, plan_arguments
from cli.config import load_plan_config, load_train_config
from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning import fit_check
from planning.fit_check import check_plan, machine_memory
from planning.hardware import FOLDER, known_hardware, load_hardware
from planning.host import checkpoint_bytes, converted_bytes, copied_bytes, host_bytes
from planning.memory import GIB, size_text, step_memory
from planning.plan import memory_limit, plan_run
from planning.remedies import nearest_fit, remedy
from planning.request import PlanRequest, configured_choice
from planning.search import search
from planning.step_spec import StepSpec
from resilience.processes import Processes
from training.config import JobConfig, OptimConfig
from training.config_validation import ConfigError
from training.optimizer import build_optimizer

MODEL = ModelConfig("small", 96, 2, 12, 6, 120, 240, tie_embeddings=False)
LARGE = ("experiment=h200_8b", "hardware=h200")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def make_spec(state: Any, accelerator: Any = "cpu", mesh: MeshShape | None = None) -> StepSpec:
    return StepSpec(
        model=MODEL,
        mesh=mesh or MeshShape(1, 1, 1, 1),
        parallel=ParallelConfig(),
        precision=PrecisionConfig("fp32", "fp32", state),
        accelerator=accelerator,
        seq_len=8,
        global_batch_size=4,
        micro_batch_size=1,
        async_save=True,
    )


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_planned_checkpoint_has_the_size_of_the_real_one(state: Any) -> None:
    """Moments in bf16 are converted to float32 for a checkpoint."""
    llama = Llama(MODEL)
    optimizer = build_optimizer(llama, OptimConfig(lr=1e-3), state)
    for parameter in llama.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = tensors_of(llama, optimizer)
    copied = copy_to_host(tensors_of(llama, optimizer, deferred=True), None)
    spec = make_spec(state)
    assert copied_bytes(spec) == checkpoint_bytes(spec) == state_bytes(copied)
    assert state_bytes(saved) == checkpoint_bytes(spec)
    new = state_bytes(saved["optimizer"]) if state == "bf16" else 0
    assert converted_bytes(spec) == new


def state_bytes(state: Any) -> int:
    """Return the size of all tensors except step counts."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_only_asynchronous_saves_copy_and_pinned_copies_are_powers_of_two(state: Any) -> None:
    spec = make_spec(state, "cuda")
    synchronous = replace(spec, async_save=False)
    size = checkpoint_bytes(spec)
    assert host_bytes(synchronous) == (0 if state == "fp32" else size * 2 / 3)
    assert size < copied_bytes(spec) < 2 * size
    ahead = host_bytes(replace(spec, prefetch=2)) - host_bytes(spec)
    assert ahead == 3 * 4 * 8 * 3 * 8  # steps, sequences, tokens, tensors, bytes
    odd = replace(spec, seq_len=24, micro_batch_size=2)  # 384 bytes, pinned as 512
    ahead = host_bytes(replace(odd, prefetch=2)) - host_bytes(odd)
    assert ahead == 3 * 2 * 512 * 3  # steps, micro-batches, bytes, tensors
    sharded = make_spec(state, "cuda", MeshShape(2, 7, 1, 2))
    assert checkpoint_bytes(sharded) == size  # without FSDP's padding


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_copy_is_part_of_the_memory_of_a_rank_on_cpu(state: Any) -> None:
    spec = make_spec(state)
    step = step_memory(replace(spec, async_save=False))
    memory = step_memory(spec)
    assert memory.peak >= step.peak + copied_bytes(spec) - converted_bytes(spec)
    if state == "fp32":
        assert (memory.phase, memory.host) == (step.phase, copied_bytes(spec))
    else:  # a small batch: converting the moments needs more than the activations
        assert memory.phase == "save" and memory.host == host_bytes(spec)
    assert memory.peak == sum(memory.by_part().values())


@pytest.mark.parametrize("name", known_hardware())
def test_published_gpu_nodes_have_a_host_memory(name: str) -> None:
    hardware = load_hardware(name)
    assert (hardware.host_memory_gib is None) == (hardware.accelerator == "cpu")


# ---------------------------------------------------------------- programs


def trained(*arguments: str) -> JobConfig:
    return load_train_config(compose("train", hydra_arguments(list(arguments), "train")))


def test_plan_rejects_a_run_whose_nodes_lack_host_memory(tmp_path: Path) -> None:
    """With a hardware file of a node of eight H200 and 600 GiB of memory."""
    values = yaml.safe_load((FOLDER / "h200.yaml").read_text()) | {"host_memory_gib": 600}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    overrides = [*LARGE[:1], f"hardware={path}", "parallel.dp_replicate=8", "parallel.devices=8"]

    def plan(*more: str) -> Any:
        config = load_plan_config(compose("plan", plan_arguments([*overrides, *more])))
        choice = configured_choice(config, config.mesh)
        return config, plan_run(config.request.stages(choice), config.hardware)

    config, run = plan()
    assert not run.fits and run.bottleneck.startswith("host memory (12")
    assert run.fullest.memory.peak <= run.fullest.capacity
    limit = partial(memory_limit, hardware=config.hardware)
    nearest = nearest_fit(config.request, configured_choice(config, config.mesh), limit)
    assert nearest is not None and nearest.mesh.dp_shard > 1  # sharded copies are smaller
    _, synchronous = plan("checkpoint.async_save=false")
    assert synchronous.fits and 0 < synchronous.fullest.host_peak < 600 * GIB


@pytest.mark.parametrize(("accelerator", "when_busy"), [("cpu", "wait"), ("cuda", "skip")])
def test_train_names_a_remedy_that_works(
    accelerator: str, when_busy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with host memory for the processes only, or on CPU with memory for a step only."""
    processes, mesh = Processes(accelerator, 1, 1, "self"), MeshShape(1, 1, 1, 1)
    words = [f"checkpoint.when_busy={when_busy}"]
    config = trained(*words)
    request = PlanRequest(config, accelerator, 1)
    [(spec, _)] = request.stages(configured_choice(config, mesh))
    memory = step_memory(spec).peak - copied_bytes(spec) // 2
    available = memory if accelerator == "cpu" else 2**37
    monkeypatch.setattr(fit_check, "this_machine", lambda _: (None, available))
    monkeypatch.setattr(fit_check, "machine_memory", lambda: 2 * GIB + 2**20)
    with pytest.raises(ConfigError) as error:
        check_plan(config, processes, mesh)
    [message] = error.value.errors
    remedy_words = message.partition("; use ")[2].partition(" (")[0].split()
    assert "checkpoint.async_save=false" in remedy_words
    report = check_plan(trained(*words, *remedy_words), processes, mesh)
    assert report is not None and "(fits)" in report
    assert ("host memory" in report) == (accelerator == "cuda")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (("experiment=h100x8_8b", "hardware.host_memory_gib=100"), "checkpoint.async_save=false"),
        (
            ("experiment=h200_8b", "precision.optimizer_state=fp32", "tokenizer=byte"),
            "precision.optimizer_state=bf16",
        ),
    ],
)
def test_search_that_finds_nothing_names_a_change_before_more_devices(
    words: tuple[str, ...], change: str
) -> None:
    def search_with(*more: str) -> tuple[Any, Any]:
        config = load_plan_config(compose("plan", plan_arguments([*words, *more, "search=true"])))
        result = search(config.request, config.n_devices, config.hardware, keep=1)
        limit = partial(memory_limit, hardware=config.hardware)
        return result.best, remedy(config.request, limit, config.n_devices, 8)

    best, found = search_with()
    assert not best and found.overrides == change and f"use {change} (" in found.text
    assert search_with(change)[0]


def test_remedy_combines_synchronous_saves_with_other_changes_only_if_necessary() -> None:
    config = load_plan_config(compose("plan", plan_arguments(["hardware=cpu"])))
    request, choice = config.request, configured_choice(config, config.mesh)
    [(spec, _)] = request.stages(choice)
    peak = step_memory(spec).peak

    def advice(limit: int) -> str:
        return str(remedy(request, lambda _: limit, 1, 1, choice))

    assert advice(peak - 1).startswith("use checkpoint.async_save=false (")
    smaller = advice(peak - host_bytes(spec) - 1)
    assert smaller.startswith("use train.micro_batch_size=") and "async_save" not in smaller


def test_sizes_are_never_shown_as_zero() -> None:
    assert [size_text(n) for n in (2**20, 2**30 // 10, 2**30)] == [
        "1.0 MiB",
        "102.4 MiB",
        "1.00 GiB",
    ]


def test_memory_of_the_cgroup_of_a_job_limits_the_machine(tmp_path: Path) -> None:
    [line] = [x for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::")]
    folder = tmp_path / line[3:].lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("123456789\n")
    assert machine_memory(tmp_path) == 123456789
