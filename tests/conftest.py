"""Fixtures and helpers of all tests: a small corpus, and the programs run as real processes."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import fork_server as fork_servers
import pytest
from fork_server import ForkServer

from parallel.mesh import AXES

ROOT = Path(__file__).parent.parent
SHOWN_LINES = 12  # of each rank, where a test fails
STEPS = 16  # of the run of `command`
FAULT_STEPS = 24  # of the run of `train_arguments`
# Files of half a minute and more, longest first.
LONGEST = (
    *("test_train_launch", "test_train_watchdog", "test_parallel_grid", "test_slurm", "test_storm"),
    *("test_cuda_covering", "test_cuda_compiled", "test_cuda_steps", "test_cuda_sensitivity"),
    *("test_planning_memory", "test_parallel_activation_checkpoint", "test_train_mesh"),
    *(
        "test_faults_phases",
        "test_data_preparation_pool",
        "test_faults",
        "test_bench_training_step",
    ),
    *("test_train_data", "test_parallel_optimizer_state", "test_generate", "test_train_stream"),
    *("test_faults_damage", "test_planning_calibration", "test_data_preparation_resume"),
    *(
        "test_evaluation_lm_eval",
        "test_convert",
        "test_resilience_host_memory",
        "test_parallel_mixed_precision",
    ),
    *("test_readme", "test_sweep"),
)
# Unit tests of ten seconds and more: they compile, or read a large vocabulary.
LONG_UNIT_TESTS = {
    "test_flex_matches_reference_attention",
    "test_compiled_stages_match_eager_and_compile_once_for_each_shape",
    "test_compiled_rope_matches_eager_rope_and_its_gradient",
    "test_compiled_functions_equal_eager_ones_with_at_most_two_graphs_each",
    "test_exported_tokenizer_is_read_back_unchanged",
    "test_temporary_memory_is_bounded_by_the_chunk_size",
}
# Names and fixtures by which a test module starts processes.
LAUNCHING_NAMES = {"start_program", "start_python", "on_ranks", "subprocess", "Cluster"}
LAUNCHING_NAMES |= {"on_fake_device"}
LAUNCHING_FIXTURES = {"fork_server", "smoke_run", "command", "uninterrupted", "train_modules"}
REPRODUCIBLE_KEYS = ("batch_hash", "samples", "tokens", "loss", "grad_norm", "lr")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storm", type=int, default=15, help="number of kills in test_storm.py")
    parser.addoption("--storm-seed", type=int, default=None, help="seed printed by a failed storm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the unit tests `quick`, and order the files longest first.

    The last file to finish then does not run alone for long.
    """
    for item in items:
        if is_quick(item):
            item.add_marker(pytest.mark.quick)
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def is_quick(item: pytest.Item) -> bool:
    """Return whether a test starts no process and is not among the long ones."""
    assert isinstance(item, pytest.Function)
    return not (
        item.path.stem in LONGEST
        or item.originalname in LONG_UNIT_TESTS
        or item.path.parent.name == "bench"
        or LAUNCHING_NAMES & vars(item.module).keys()
        or LAUNCHING_FIXTURES & {*item.fixturenames}
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the end of what the launches of a failed test have printed to its report."""
    report = yield
    if fork_servers.shared.cache_info().currsize:
        launches = fork_servers.shared().launches
        for number, launch in enumerate(launches, start=1) if report.failed else ():
            for rank, code in launch.exit_codes.items():
                title = f"Launch {number} of {len(launches)}, rank {rank}, exit code {code}"
                lines = launch.output(rank).splitlines()[-SHOWN_LINES:]
                report.sections.append((title, "\n".join(lines)))
        if report.when == "teardown":
            launches.clear()
    return report


def pytest_sessionfinish() -> None:
    if fork_servers.shared.cache_info().currsize:
        fork_servers.shared().close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of thirty text files: standard library source code, about 400 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("json/*.py")) + sorted(library.glob("email/*.py"))
    for file in files[:30]:
        (folder / f"{file.parent.name}-{file.stem}.txt").write_text(file.read_text())
    return folder


@pytest.fixture(scope="session")
def data_overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides to train on `corpus`, with one dataset folder per session."""
    return [
        "data=text",
        "data.name=corpus",
        f"data.sources.text.path={corpus}",
        f"data.folder={tmp_path_factory.mktemp('shards') / 'corpus'}",
        "data.validation_fraction=0.2",
    ]


# ---------------------------------------------------------------- running programs


def start_program(
    arguments: list[str],
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    world_size: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a fork of the fork server and wait for it.

    A test of the start-up itself, or of options of Python, uses `start_python`.

    Args:
        world_size: Number of ranks, launched as by torchrun if above 1.
    """
    assert arguments[0].endswith(".py"), "options of Python itself need start_python"
    # One thread per process: two tests run at a time, and results must not depend on the machine.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return fork_servers.shared().run_program(arguments, cwd, variables, world_size)


def start_python(
    arguments: list[str],
    cwd: Path = ROOT,
    timeout: float = 600,  # reached only by a hang
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a new interpreter and wait for it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def world_size_of(overrides: Sequence[str]) -> int:
    """Return the number of ranks of the mesh that a list of overrides describes."""
    pairs = [override.split("=") for override in overrides if override.startswith("parallel.")]
    axes = [f"parallel.{axis}" for axis in AXES]
    return math.prod(int(value) for key, value in pairs if key in axes)


@pytest.fixture(scope="session")
def fork_server() -> ForkServer:
    return fork_servers.shared()


@pytest.fixture(scope="session")
def smoke_run(data_overrides: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`smoke_run(folder, "parallel.tp=2", …)` trains the smoke model on CPU.

    The ranks of a larger mesh are launched as by torchrun.
    """

    def run(
        folder: Path, *overrides: str, succeeds: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = start_program(
            [
                "train.py",
                "experiment=smoke",
                *data_overrides,
                f"run.dir={folder}",
                "parallel.accelerator=cpu",
                "log.tensorboard=false",
                *overrides,
            ],
            world_size=world_size_of(overrides),
        )
        if succeeds:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def command(data_overrides: list[str]) -> Callable[[Path], list[str]]:
    """`command(folder)` returns the arguments of a run of `STEPS` steps on prepared data.

    The run saves checkpoints at steps 6, 12 and 16 and generates text at steps 9 and 16.
    """
    prepared = start_program(["prepare.py", *data_overrides, "tokenizer=byte"])
    assert prepared.returncode == 0, prepared.stderr
    short = [f"train.max_steps={STEPS}", "checkpoint.interval=6", "validation.interval=9"]

    def arguments(folder: Path) -> list[str]:
        start = ["train.py", "experiment=smoke", *data_overrides, *short]
        return [*start, "parallel.accelerator=cpu", f"run.dir={folder}"]

    return arguments


@pytest.fixture(scope="session")
def train_arguments(data_overrides: list[str]) -> Callable[..., list[str]]:
    """`train_arguments(folder, "key=value", …)` returns train.py's arguments for fault tests.

    The run has `FAULT_STEPS` steps and saves every fourth.
    """

    def arguments(folder: Path, *overrides: str) -> list[str]:
        return [
            "experiment=smoke",
            *data_overrides,
            f"run.dir={folder}",
            f"train.max_steps={FAULT_STEPS}",
            "checkpoint.interval=4",
            "checkpoint.keep_last=2",
            "validation.interval=null",
            "validation.sample_tokens=0",
            "parallel.accelerator=cpu",
            "log.tensorboard=false",
            *overrides,
        ]

    return arguments


@pytest.fixture(scope="session")
def uninterrupted(
    fork_server: ForkServer,
    train_arguments: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[dict[str, Any]]]:
    """`uninterrupted(2, "parallel.tp=2")` returns `reproducible_metrics` of a clean run."""
    cached: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def metrics(world_size: int, *overrides: str) -> list[dict[str, Any]]:
        key = (world_size, *overrides)
        if key not in cached:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            launch = fork_server.run(train_arguments(folder, *overrides), world_size)
            assert set(launch.exit_codes.values()) == {0}, launch.output()
            cached[key] = reproducible_metrics(folder)
        return cached[key]

    return metrics


# ---------------------------------------------------------------- reading run folders


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def reproducible_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step that two equal runs share; assert that no step is missing."""
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{key: line[key] for key in REPRODUCIBLE_KEYS} for line in lines]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's event log."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def checkpoint_errors(folder: Path) -> list[str]:
    """Return the errors found in a run's committed checkpoints."""
    from checkpoint.files import find_file_damage, verify_manifest

    errors = []
    for committed in (folder / "checkpoints").glob("step-*/COMMITTED"):
        try:
            manifest = verify_manifest(committed.parent)
        except ValueError as error:
            errors.append(f"{committed.parent.name}: {error}")
            continue
        for name, entry in manifest["files"].items():
            damage = find_file_damage(committed.parent / name, entry, manifest["algorithm"])
            errors += [f"{committed.parent.name}: {damage}"] if damage else []
    return errors
