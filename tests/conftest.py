"""What tests share: a small corpus made on the spot, and the real programs as real processes."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zygote as zygotes
from zygote import Zygote

ROOT = Path(__file__).parent.parent
STEPS = 16  # of the short run
FAULT_STEPS = 24  # of the run that faults befall
# The files that take half a minute and more, the longest first.
LONGEST = (
    *("test_parallel_grid", "test_train_launch", "test_slurm", "test_train_watchdog"),
    *("test_parallel_optimizer_state", "test_faults", "test_storm", "test_train_mesh"),
    *("test_parallel_activation_checkpoint", "test_train_stream", "test_faults_phases"),
    *("test_train_data", "test_data_preparation_pool", "test_data_preparation_resume"),
    *("test_faults_damage", "test_sweep", "test_readme"),
)
FIGURES = ("batch_hash", "samples", "tokens", "loss", "grad_norm", "lr")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How hard the storm of tests/faults/test_storm.py is, and which."""
    parser.addoption("--storm", type=int, default=6, help="strikes")
    parser.addoption("--storm-seed", type=int, default=None, help="the one that was told")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of thirty text files: source code of the standard library, about 400 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("json/*.py")) + sorted(library.glob("email/*.py"))
    for file in files[:30]:
        (folder / f"{file.parent.name}-{file.stem}.txt").write_text(file.read_text())
    return folder


@pytest.fixture(scope="session")
def data_overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for training on `corpus` in one folder of shards that the session shares."""
    return [
        "data=text",
        "data.name=corpus",
        f"data.sources.text.path={corpus}",
        f"data.folder={tmp_path_factory.mktemp('shards') / 'corpus'}",
        "data.validation_fraction=0.2",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest files: each is one worker's, and the last one has no other beside."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_sessionfinish() -> None:
    """Ends what programs were forked from."""
    if zygotes.shared.cache_info().currsize:
        zygotes.shared().close()


def start_program(
    arguments: list[str],
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
    ranks: int = 1,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` in a process of its own, and waits for it.

    Its libraries are imported already: see `zygote`. Where the start itself is what a test is
    about, there is `start_python`.

    Args:
        ranks: How many processes run it, as torchrun would start them.
    """
    assert arguments[0].endswith(".py"), "options of Python itself need start_python"
    # One thread a process: two tests run at a time, and results must not hang on the machine.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return zygotes.shared().run_program(arguments, cwd, variables, ranks)


def start_python(
    arguments: list[str],
    cwd: Path = ROOT,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` as a person would, and waits for it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def places(overrides: Sequence[str]) -> int:
    """How many processes a mesh has, from the words of a command."""
    words = [override.split("=") for override in overrides if override.startswith("parallel.")]
    axes = ("parallel.dp_replicate", "parallel.dp_shard", "parallel.cp", "parallel.tp")
    return math.prod(int(value) for key, value in words if key in axes)


@pytest.fixture(scope="session")
def smoke_run(data_overrides: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`smoke_run(folder, "parallel.tp=2", …)` trains the smoke model into a folder on CPU.

    A mesh of several processes has them from torchrun, so to speak.
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
            ranks=places(overrides),
        )
        if succeeds:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def command(data_overrides: list[str]) -> Callable[[Path], list[str]]:
    """`command(folder)`: the arguments of a short run on prepared data in a folder.

    It has checkpoints at steps 6, 12 and 16, text samples at 9 and 16.
    """
    prepared = start_program(["prepare.py", *data_overrides, "tokenizer=byte"])
    assert prepared.returncode == 0, prepared.stderr
    short = [f"train.max_steps={STEPS}", "checkpoint.interval=6", "validation.interval=9"]

    def arguments(folder: Path) -> list[str]:
        start = ["train.py", "experiment=smoke", *data_overrides, *short]
        return [*start, "parallel.accelerator=cpu", f"run.dir={folder}"]

    return arguments


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- faults


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    return zygotes.shared()


@pytest.fixture(scope="session")
def run_of(data_overrides: list[str]) -> Callable[..., list[str]]:
    """`run_of(folder, "key=value", …)`: the arguments of a run of `FAULT_STEPS` steps."""

    def arguments(folder: Path, *more: str) -> list[str]:
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
            *more,
        ]

    return arguments


@pytest.fixture(scope="session")
def undisturbed(
    zygote: Zygote, run_of: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, Any]]]:
    """`undisturbed(2, "parallel.tp=2")`: the figures of each step of a run that nothing befell."""
    known: dict[tuple[Any, ...], list[dict[str, Any]]] = {}

    def figures_of(ranks: int, *more: str) -> list[dict[str, Any]]:
        if (ranks, *more) not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            start = zygote.run(run_of(folder, *more), ranks)
            assert set(start.codes.values()) == {0}, start.told()
            known[ranks, *more] = figures(folder)
        return known[ranks, *more]

    return figures_of


def figures(folder: Path) -> list[dict[str, Any]]:
    """What must be equal between two runs, for each step in turn without a gap."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{key: line[key] for key in FIGURES} for line in lines]


def ledger(folder: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def damages(folder: Path) -> list[str]:
    """What is wrong with any of a run's committed checkpoints, whatever was killed when."""
    from checkpoint.files import damage_of, read_manifest

    found = []
    for committed in (folder / "checkpoints").glob("step-*/COMMITTED"):
        try:
            manifest = read_manifest(committed.parent)
        except ValueError as error:
            found.append(f"{committed.parent.name}: {error}")
            continue
        for name, entry in manifest["files"].items():
            damage = damage_of(committed.parent / name, entry, manifest["algorithm"])
            found += [f"{committed.parent.name}: {damage}"] if damage else []
    return found
