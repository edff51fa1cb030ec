"""sweep.py expands Hydra's grid and rejects it as a unit or submits each run."""

import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from cluster import Cluster, missing_commands, wait_for
from conftest import ROOT, read_events, reproducible_metrics, start_program
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from resilience.standard_streams import ResultFile

STEPS = 12
PAUSE_STEP = 5  # the text sample of this step is written to a pipe without a reader
TINY = ("experiment=smoke", "parallel.accelerator=cpu", "log.tensorboard=false")


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """Import slurm/sweep.py, whose folder is not a package."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "slurm/sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=1e-3,2e-3", "run.seed=0,1", "train.max_steps=7"],
        ["optim.betas=[0.9,0.95],[0.9,0.99]", "run.seed=range(3)"],
        ["model=llama3_8b,llama3_70b", "data.stages=[{at: 1, seq_len: 2}]"],
        ["run.seed=0,1", "optim.lr=1,2", "run.seed=5,6,7"],
        ["run.seed=0,1", "run.seed=5", "validation.prompt='a,b','c d'"],
        ["train.max_steps=7"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_grid_equals_that_of_hydras_basic_sweeper(sweep: ModuleType, overrides: list[str]) -> None:
    parser = OverridesParser.create()
    [batch] = BasicSweeper.split_arguments(parser.parse_overrides(overrides), max_batch_size=None)
    jobs = sweep.grid(overrides)
    parsed = [parser.parse_overrides(list(job.overrides)) for job in jobs]
    expected = [parser.parse_overrides(list(job)) for job in batch]
    for ours, theirs in zip(parsed, expected, strict=True):
        assert [(o.key_or_group, o.value()) for o in ours] == [
            (o.key_or_group, o.value()) for o in theirs
        ]
    assert len({job.suffix for job in jobs}) == len(jobs)


def test_runs_are_named_after_their_values_of_the_swept_keys(sweep: ModuleType) -> None:
    jobs = sweep.grid(
        ["train.max_steps=7", "optim.lr=1e-3,2e-3", "optim.betas=[0.9,0.95],[0.8,0.9]"]
    )
    assert [job.suffix for job in jobs] == [
        "-lr_0.001-betas_0.9_0.95",
        "-lr_0.001-betas_0.8_0.9",
        "-lr_0.002-betas_0.9_0.95",
        "-lr_0.002-betas_0.8_0.9",
    ]
    # If two keys have the same last part, the full keys are used.
    [first, *_] = sweep.grid(["checkpoint.interval=1,2", "log.interval=1,2", "run.seed=3,4"])
    assert first.suffix == "-checkpoint.interval_1-log.interval_1-seed_3"


# ---------------------------------------------------------------- validation and dry runs


def run_sweep(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of sweep.py."""
    code = sweep.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_prints_commands_that_train_each_run(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dry-run", "--nodes=2", "--time=60", "--sbatch=constraint=h100")
    code, out, _ = run_sweep(sweep, capsys, *options, *TINY, "optim.lr=1e-3,2e-3", "run.name=a")
    assert code == 0
    title, *commands = out.splitlines()
    for option in ("2 jobs", "--nodes=2", "--ntasks-per-node=1", "--time=60", "--constraint=h100"):
        assert option in title
    assert commands == [
        f"python train.py {' '.join(TINY)} optim.lr={rate} run.name=a-lr_{rate}"
        for rate in ("0.001", "0.002")
    ]


def test_commands_that_cannot_be_printed_are_an_error(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        file = io.BufferedWriter(ResultFile(full.fileno()))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
        with pytest.raises(OSError, match="No space left"):
            sweep.main(["--dry-run", *TINY, "optim.lr=1e-3", "run.name=a"])


def test_sweeps_in_the_documentation_are_valid(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/slurm.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python slurm/sweep.py")]
    commands = [shlex.split(line) for line in lines]
    assert len(commands) == 2
    for command in commands:
        code, out, err = run_sweep(sweep, capsys, "--dry-run", *command[2:])
        assert code == 0, err
        assert out.count("python train.py ") in (4, 6)


def test_every_error_is_reported_with_the_runs_it_occurs_in(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_sweep(
        sweep, capsys, *TINY, "optim.lr=1e-3,-1", "parallel.tp=1,2", "run.sed=0"
    )
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == "No job submitted:" and len(lines) == 4
    [unknown] = [line for line in lines if "Unknown key run.sed" in line]
    assert "(in " not in unknown  # it occurs in every run
    [rate] = [line for line in lines if "optim.lr=-1 " in line]
    assert rate.endswith("(in lr_-1-tp_1, lr_-1-tp_2)")
    [mesh] = [line for line in lines if "needs 2 processes, not 1" in line]
    assert mesh.endswith("(in lr_0.001-tp_2, lr_-1-tp_2)")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiment=smoke,smokey"], "experiment=smokey"),
        (["run.seed==1"], "run.seed==1 is neither"),
        (["optim.lr=interval(1,2)"], "optim.lr=interval(1,2) is neither"),
        (["run.name=a,b"], "run.name=a,b: run.name cannot be swept"),
        (["run.seed=0,1", "run.dir=one"], "run.dir=one is the folder of 2 runs"),
        (["run.seed=0,0"], "list no value twice"),
        (
            ["parallel.num_nodes=2", "run.seed=0,1"],
            "parallel.num_nodes=2 does not match srun, which started",
        ),
        (
            ["run.seed=0,1", "data.folder=nowhere"],
            "data.folder=nowhere is not prepared, and 2 runs",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_invalid_sweep_is_rejected(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    code, out, err = run_sweep(sweep, capsys, *TINY, *overrides)
    assert (code, out) == (1, "") and message in err


def test_run_folder_in_use_rejects_the_whole_sweep(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "smoke-seed_1"
    folder.mkdir()
    (folder / "ledger.jsonl").write_text('{"event": "save", "step": 5}\n')
    code, out, err = run_sweep(
        sweep, capsys, *TINY, "run.seed=0,1", f"run.dir={tmp_path}/${{run.name}}"
    )
    assert (code, out) == (1, "")
    assert "records saved checkpoints" in err and "(in seed_1)" in err


# ---------------------------------------------------------------- with a SLURM cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(missing_commands()), reason=f"SLURM is not installed: {', '.join(missing_commands())}"
)
def test_sweep_trains_each_run_in_a_job_that_is_requeued_after_usr1(
    cluster: Cluster, data_overrides: list[str], tmp_path: Path
) -> None:
    prepared = start_program(["prepare.py", *data_overrides, "tokenizer=byte"])
    assert prepared.returncode == 0, prepared.stderr
    folders = [tmp_path / f"smoke-seed_{seed}" for seed in (0, 1)]
    folders[1].mkdir()
    os.mkfifo(folders[1] / "samples.txt")
    output = cluster.run(
        *(sys.executable, "slurm/sweep.py", *TINY, *data_overrides, "run.seed=0,1"),
        *(f"run.dir={tmp_path}/${{run.name}}", f"train.max_steps={STEPS}"),
        *(f"validation.interval={PAUSE_STEP}", "validation.sample_tokens=1"),
    ).stdout
    jobs = re.findall(r"job (\d+): smoke-seed_([01]), log (.*)", output)
    assert [seed for _, seed, _ in jobs] == ["0", "1"], output
    untouched, signalled = (number for number, _, _ in jobs)
    log = Path(jobs[1][2])

    wait_for(lambda: lines(folders[1] / "metrics.jsonl") == PAUSE_STEP, f"step {PAUSE_STEP}")
    assert cluster.job(signalled)["JobName"] == "smoke-seed_1"
    cluster.run("scancel", "--signal=USR1", signalled)
    (folders[1] / "samples.txt").read_text()  # lets the run continue
    (folders[1] / "samples.txt").unlink()
    cluster.start_requeued(signalled, restarts=1)
    for number, restarts in ((signalled, "1"), (untouched, "0")):
        assert cluster.wait_for_state(number, "COMPLETED")["Restarts"] == restarts

    for seed, folder in enumerate(folders):
        assert len(reproducible_metrics(folder)) == STEPS
        assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["seed"] == seed
    assert reproducible_metrics(folders[0]) != reproducible_metrics(folders[1])
    codes = [event["code"] for event in read_events(folders[1]) if event["event"] == "stop"]
    assert codes == [75, 0]
    # Both launches append to one log.
    assert log.read_text().count("launched by srun") == 2


def lines(path: Path) -> int:
    """Return the number of complete lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
