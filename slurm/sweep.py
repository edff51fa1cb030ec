"""Sweeps on SLURM: each run of a grid as a job of its own.

    python slurm/sweep.py [--nodes=1 --ntasks-per-node=8 …] optim.lr=1e-3,2e-3 run.seed=0,1 …

A key with several values is swept, as under Hydra's multirun, whose grammar this is: `a=1,2`,
`a=range(3)`; a list in brackets is one value. A run is named after its values of the swept keys.
Nothing is submitted before every run of the grid has passed train.py's own checks, but for those of
the machine. A job goes back into the queue for the same reasons as that of slurm/train.sbatch; its
log is in the run's folder. Needs the extra `sweep`; run it from the checkout, with the environment
active that the jobs shall have.
"""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a program of a subfolder does not see the house otherwise

from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from cli.arguments import CONF, hydra_arguments  # noqa: E402
from cli.config import check_for_tasks  # noqa: E402
from resilience.exit_codes import ExitCode  # noqa: E402
from resilience.run_folder import RunFolderError  # noqa: E402
from training.config import JobConfig  # noqa: E402
from training.config_validation import ConfigError  # noqa: E402
from training.preflight import check_folder, needs_preparation  # noqa: E402

SHOWN = 3  # runs that have a problem, of those that have it
# Options of sbatch that most clusters ask for; --sbatch takes any other.
OPTIONS = ("gpus-per-node", "cpus-per-task", "mem", "partition", "account", "qos", "time")
SIGNAL = "USR1@300"  # as in train.sbatch: five minutes before the limit, to the tasks alone


class SweepError(ValueError):
    """The words typed do not make a grid; the message says which and why."""


@dataclass(frozen=True)
class Job:
    """One run of the grid: its name's end, and its words for train.py but for `run.name`."""

    suffix: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """One run that train.py would start: all its words, and what they configure."""

    words: tuple[str, ...]
    config: JobConfig


def main(arguments: Sequence[str]) -> int:
    """Checks the whole grid, then submits it; returns the exit code."""
    options = parse(arguments)
    try:
        jobs = grid(options.overrides)
        runs = check(jobs, options.nodes, options.ntasks_per_node)
        if not options.dry_run:
            refuse_unprepared(runs)
    except SweepError as error:
        print(f"Not submitted:\n{error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if options.dry_run:
        told = " ".join(f"--{key}={value}" for key, value in sbatch_options(options).items())
        print(f"{len(runs)} jobs with {told}:")
        for run in runs:
            print(shlex.join(["python", "train.py", *run.words]))
        return ExitCode.FINISHED
    return submit(runs, options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of SLURM and the words for train.py, in any order."""
    usage, text = (__doc__ or "").split("\n\n")[1:3]
    parser = argparse.ArgumentParser(
        prog="python slurm/sweep.py",
        usage=usage.strip(),
        description=text,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="train.py's overrides")
    parser.add_argument("--nodes", type=int, default=1, help="of each job")
    parser.add_argument("--ntasks-per-node", type=int, default=1, help="processes, one a GPU")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", help="as sbatch takes it")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of it"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, and print the commands")
    return parser.parse_intermixed_args(arguments)


def sbatch_options(options: argparse.Namespace) -> dict[str, str]:
    """What was asked of sbatch, by its own names."""
    given = {name: getattr(options, name.replace("-", "_")) for name in OPTIONS}
    given = {"nodes": options.nodes, "ntasks-per-node": options.ntasks_per_node, **given}
    given |= {name: value for name, _, value in (each.partition("=") for each in options.sbatch)}
    return {name: str(value) for name, value in given.items() if value is not None}


# ---------------------------------------------------------------- the grid


def grid(words: Sequence[str]) -> list[Job]:
    """Every combination of the swept keys' values, the last key's changing fastest.

    Raises:
        SweepError: words that Hydra cannot read or cannot list the values of.
    """
    parser = OverridesParser.create()
    values: dict[str, list[str]] = {}  # of each key that is swept
    choices: dict[str, list[str]] = {}  # of each key its words; the last word for a key counts
    problems = []
    for word in words:
        try:
            override = parser.parse_override(word)
            key = override.get_key_element()
            sweeps = override.is_sweep_override()
            values[key] = list(override.sweep_string_iterator()) if sweeps else []
        except HydraException as error:
            problems.append(f"{word} is neither key=value nor key=value,value: {error}")
            continue
        if values[key] and key.lstrip("+") in ("run.name", "run.dir"):
            problems.append(f"{word}: runs are named after the other keys' values, use one value")
        choices[key] = [f"{key}={value}" for value in values[key]] or [word]
    if problems:
        raise SweepError("\n".join(f"  - {problem}" for problem in problems))
    swept = [key for key in choices if values[key]]
    names = dict(zip(swept, short_names(swept), strict=True))
    ends = {key: [f"-{names[key]}_{as_name(value)}" for value in values[key]] for key in swept}
    return [
        Job("".join(end for end, _ in run), tuple(word for _, word in run))
        for run in itertools.product(
            *(zip(ends.get(key, [""]), choices[key], strict=True) for key in choices)
        )
    ]


def short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or the whole key where two end alike."""
    last = [key.rpartition(".")[2].lstrip("+") for key in keys]
    return [
        name if last.count(name) == 1 else key.lstrip("+")
        for key, name in zip(keys, last, strict=True)
    ]


def as_name(value: str) -> str:
    """A value as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", value).strip("_")


# ---------------------------------------------------------------- checks


def check(jobs: Sequence[Job], nodes: int, tasks_per_node: int) -> list[Checked]:
    """For each job its words for train.py and the configuration that they make.

    Raises:
        SweepError: everything that train.py would refuse of any run, and of which.
    """
    problems: dict[str, list[str]] = {}  # each with the runs that have it
    runs = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs:
            found: list[str] = []
            try:
                composed = compose("train", hydra_arguments(list(job.words), "train"))
                # What the run is called without a sweep begins its name.
                name = composed.run.name = as_name(f"{composed.run.name}{job.suffix}")
                config = check_for_tasks(composed, tasks_per_node, nodes)
                check_folder(config)
            except ConfigError as error:
                found = error.errors
            except (HydraException, OmegaConfBaseException, RunFolderError) as error:
                found = [str(error)]
            else:
                words = [word for word in job.words if not re.match(r"\+*run\.name=", word)]
                runs.append(Checked((*words, f"run.name={name}"), config))
            for problem in found:
                problems.setdefault(problem, []).append(job.suffix.removeprefix("-"))
    told = [
        f"  - {problem}" + (in_runs(names) if len(names) < len(jobs) else "")
        for problem, names in problems.items()
    ]
    for folder, count in Counter(run.config.run.dir for run in runs).items():
        if count > 1:
            told.append(
                f"  - run.dir ({folder}) is the folder of {count} runs: let it have "
                "'${run.name}' in it, and give no value twice"
            )
    if told:
        raise SweepError("\n".join(told))
    return runs


def in_runs(names: Sequence[str]) -> str:
    """Of which runs something is told: the first few."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f" (in {', '.join(names[:SHOWN])}{more})"


def refuse_unprepared(runs: Sequence[Checked]) -> None:
    """Raises SweepError for data that several runs would prepare at once, which only one may."""
    fresh = Counter(run.config.data.folder for run in runs if needs_preparation(run.config))
    told = [
        f"  - data.folder ({folder}) is not prepared, and {count} runs would all prepare it: "
        "run prepare.py with the same data and tokenizer first"
        for folder, count in fresh.items()
        if count > 1
    ]
    if told:
        raise SweepError("\n".join(told))


# ---------------------------------------------------------------- SLURM


def submit(runs: Sequence[Checked], options: argparse.Namespace) -> int:
    """Hands every run to SLURM and tells its job and its log; returns the exit code."""
    try:
        import submitit
    except ImportError:
        print("Not submitted: submitit is not installed: pip install '.[sweep]'", file=sys.stderr)
        return ExitCode.USER_ERROR
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        print("Not submitted: there is no SLURM here (sbatch, srun)", file=sys.stderr)
        return ExitCode.USER_ERROR
    for number, run in enumerate(runs):
        executor = submitit.SlurmExecutor(Path(run.config.run.dir) / "slurm")
        executor.update_parameters(**parameters(run.config.run.name, options))
        command = [sys.executable, str(ROOT / "train.py"), *run.words]
        try:
            # The task becomes train.py: its signals, its exit code, nothing of submitit's left.
            job = executor.submit(os.execv, sys.executable, command)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            print(
                f"SLURM did not take {run.config.run.name}: {' '.join(str(error).split())}\n"
                f"Submitted: {number} of {len(runs)}.",
                file=sys.stderr,
            )
            return ExitCode.USER_ERROR
        print(f"job {job.job_id}: {run.config.run.name}, log {job.paths.stdout}", flush=True)
    return ExitCode.FINISHED


def parameters(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What submitit is told of a job: the same as in slurm/train.sbatch."""
    asked = sbatch_options(options)
    more = {key: value for key, value in asked.items() if key not in ("nodes", "ntasks-per-node")}
    cpus = asked.get("cpus-per-task")
    return {
        "job_name": name,
        "nodes": options.nodes,
        "ntasks_per_node": options.ntasks_per_node,
        # No limit and no wckey of submitit's own: the partition's and the account's.
        "time": None,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "signal": SIGNAL, **more},
        "setup": ["trap : TERM USR1"],
        "srun_args": [
            *("--kill-on-bad-exit=0", "--wait=60"),
            *([f"--cpus-per-task={cpus}"] if cpus else []),
        ],
        "teardown": [f"source {shlex.quote(str(ROOT / 'slurm' / 'requeue.sh'))} $?"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
