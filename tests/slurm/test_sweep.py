"""A sweep is the grid that Hydra would make, refused as a whole or submitted run by run."""

import importlib.util
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

STEPS = 12
STANDS = 5  # the text sample of this step goes into a pipe that nobody reads
TINY = ("experiment=smoke", "parallel.accelerator=cpu", "log.tensorboard=false")


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    """slurm/sweep.py as a module; its folder is no package."""
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "slurm/sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    "words",
    [
        ["optim.lr=1e-3,2e-3", "run.seed=0,1", "train.max_steps=7"],
        ["optim.betas=[0.9,0.95],[0.9,0.99]", "run.seed=range(3)"],
        ["model=llama3_8b,llama3_70b", "data.stages=[{at: 1, seq_len: 2}]"],
        ["run.seed=0,1", "optim.lr=1,2", "run.seed=5,6,7"],
        ["run.seed=0,1", "run.seed=5", "validation.prompt='a,b','c d'"],
        ["train.max_steps=7"],
    ],
    ids=lambda words: words[0],
)
def test_grid_is_that_of_hydras_own_sweeper(sweep: ModuleType, words: list[str]) -> None:
    parser = OverridesParser.create()
    [batch] = BasicSweeper.split_arguments(parser.parse_overrides(words), max_batch_size=None)
    jobs = sweep.grid(words)
    read = [[parser.parse_override(word) for word in job.words] for job in jobs]
    as_hydra = [parser.parse_overrides(list(job)) for job in batch]
    for ours, theirs in zip(read, as_hydra, strict=True):
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
    # Where two keys end alike their last part would not tell which is which.
    [first, *_] = sweep.grid(["checkpoint.interval=1,2", "log.interval=1,2", "run.seed=3,4"])
    assert first.suffix == "-checkpoint.interval_1-log.interval_1-seed_3"


# ---------------------------------------------------------------- refused, or shown


def in_process(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    code = sweep.main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_dry_run_prints_commands_that_train_each_run(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dry-run", "--nodes=2", "--time=60", "--sbatch=constraint=h100")
    code, out, _ = in_process(sweep, capsys, *options, *TINY, "optim.lr=1e-3,2e-3", "run.name=a")
    assert code == 0
    title, *commands = out.splitlines()
    for option in ("2 jobs", "--nodes=2", "--ntasks-per-node=1", "--time=60", "--constraint=h100"):
        assert option in title
    assert commands == [
        f"python train.py {' '.join(TINY)} optim.lr={rate} run.name=a-lr_{rate}"
        for rate in ("0.001", "0.002")
    ]


def test_sweeps_of_the_documentation_pass_the_gate(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs/slurm.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python slurm/sweep.py")]
    commands = [shlex.split(line) for line in lines]
    assert len(commands) == 2
    for words in commands:
        code, out, err = in_process(sweep, capsys, "--dry-run", *words[2:])
        assert code == 0, err
        assert out.count("python train.py ") in (4, 6)


def test_every_problem_of_every_run_is_told_and_of_which(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = in_process(
        sweep, capsys, *TINY, "optim.lr=1e-3,-1", "parallel.tp=1,2", "run.sed=0"
    )
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0] == "Not submitted:" and len(lines) == 4
    [unknown] = [line for line in lines if "Unknown key run.sed" in line]
    assert "(in " not in unknown  # every run has it
    [rate] = [line for line in lines if "optim.lr (-1.0)" in line]
    assert rate.endswith("(in lr_-1-tp_1, lr_-1-tp_2)")
    [mesh] = [line for line in lines if "2 places for 1 processes" in line]
    assert mesh.endswith("(in lr_0.001-tp_2, lr_-1-tp_2)")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["experiment=smoke,smokey"], "experiment/smokey"),
        (["run.seed==1"], "run.seed==1 is neither"),
        (["optim.lr=interval(1,2)"], "optim.lr=interval(1,2) is neither"),
        (["run.name=a,b"], "run.name=a,b: runs are named after"),
        (["run.seed=0,1", "run.dir=one"], "run.dir (one) is the folder of 2 runs"),
        (["run.seed=0,0"], "give no value twice"),
        (
            ["parallel.num_nodes=2", "run.seed=0,1"],
            "parallel.num_nodes (2) is not what srun started",
        ),
        (
            ["run.seed=0,1", "data.folder=nowhere"],
            "data.folder (nowhere) is not prepared, and 2 runs",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_sweeps_that_cannot_work_are_refused(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    code, out, err = in_process(sweep, capsys, *TINY, *words)
    assert (code, out) == (1, "") and told in err


def test_run_that_its_folder_refuses_is_refused_before_the_others_are_submitted(
    sweep: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "smoke-seed_1"
    folder.mkdir()
    (folder / "ledger.jsonl").write_text('{"event": "save", "step": 5}\n')
    code, out, err = in_process(
        sweep, capsys, *TINY, "run.seed=0,1", f"run.dir={tmp_path}/${{run.name}}"
    )
    assert (code, out) == (1, "")
    assert "records saved checkpoints" in err and "(in seed_1)" in err


# ---------------------------------------------------------------- on a real SLURM


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.skipif(
    bool(missing_commands()), reason=f"SLURM is not installed: {', '.join(missing_commands())}"
)
def test_sweep_trains_each_run_in_a_job_that_comes_back_when_it_is_told_to_stop(
    cluster: Cluster, data_overrides: list[str], tmp_path: Path
) -> None:
    prepared = start_program(["prepare.py", *data_overrides, "tokenizer=byte"])
    assert prepared.returncode == 0, prepared.stderr
    folders = [tmp_path / f"smoke-seed_{seed}" for seed in (0, 1)]
    folders[1].mkdir()
    os.mkfifo(folders[1] / "samples.txt")
    told = cluster.run(
        *(sys.executable, "slurm/sweep.py", *TINY, *data_overrides, "run.seed=0,1"),
        *(f"run.dir={tmp_path}/${{run.name}}", f"train.max_steps={STEPS}"),
        *(f"validation.interval={STANDS}", "validation.sample_tokens=1"),
    ).stdout
    jobs = re.findall(r"job (\d+): smoke-seed_([01]), log (.*)", told)
    assert [seed for _, seed, _ in jobs] == ["0", "1"], told
    calm, asked = (number for number, _, _ in jobs)
    log = Path(jobs[1][2])

    wait_for(lambda: lines(folders[1] / "metrics.jsonl") == STANDS, f"step {STANDS}")
    assert cluster.job(asked)["JobName"] == "smoke-seed_1"
    cluster.run("scancel", "--signal=USR1", asked)
    (folders[1] / "samples.txt").read_text()  # which lets the run go on
    (folders[1] / "samples.txt").unlink()
    cluster.start_requeued(asked, restarts=1)
    for number, restarts in ((asked, "1"), (calm, "0")):
        assert cluster.wait_for_state(number, "COMPLETED")["Restarts"] == restarts

    for seed, folder in enumerate(folders):
        assert len(reproducible_metrics(folder)) == STEPS
        assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["seed"] == seed
    assert reproducible_metrics(folders[0]) != reproducible_metrics(folders[1])
    codes = [event["code"] for event in read_events(folders[1]) if event["event"] == "stop"]
    assert codes == [75, 0]
    # Both starts are in one log, the first one's lines kept.
    assert log.read_text().count("launched by srun") == 2


def lines(path: Path) -> int:
    """How many lines are whole."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
