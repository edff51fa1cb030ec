"""What tests share: a small corpus made on the spot, and the real programs as real processes."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 16  # of the short run


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


def start_program(
    arguments: list[str],
    cwd: Path = ROOT,
    timeout: float = 240,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` as a person would, and waits for it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        # One thread a process: two tests run at a time, and results must not hang on the machine.
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def smoke_run(data_overrides: list[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`smoke_run(folder, "parallel.tp=2", …)` trains the smoke model into a folder on CPU."""

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
            ]
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
