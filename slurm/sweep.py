"""Submit a grid of runs to SLURM, one job per run.

    python slurm/sweep.py [--nodes=1 --ntasks-per-node=8 …] optim.lr=1e-3,2e-3 run.seed=0,1 …

Keys with several values are swept, in the syntax of Hydra's multirun: `a=1,2`, `a=range(3)`; a list
in brackets is one value. Each run is named after its values of the swept keys. No job is submitted
until every run of the grid has passed train.py's validation, except for checks of the machine. Jobs
are requeued under the same conditions as with slurm/train.sbatch, and log to the run folder.
Requires the extra `sweep`. Run it from the checkout, in the environment that the jobs are to use.
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
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(ROOT))  # a script in a subfolder cannot import the packages otherwise

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from cli.arguments import parse_options, schema_of  # noqa: E402
from cli.composition import compose_config, compose_words  # noqa: E402
from cli.config import check_for_tasks  # noqa: E402
from cli.errors import exit_on_user_error  # noqa: E402
from formats.errors import FormatError  # noqa: E402
from resilience.exit_codes import ExitCode  # noqa: E402
from resilience.run_folder import RunFolderError  # noqa: E402
from resilience.standard_streams import print_result, protect_streams  # noqa: E402
from training.config import JobConfig  # noqa: E402
from training.config_validation import ConfigError, takes_text  # noqa: E402
from training.preflight import check_folder, needs_preparation  # noqa: E402

MAX_RUNS_SHOWN = 3  # per error
# Common options of sbatch; --sbatch takes any other.
OPTIONS = (
    "gpus-per-node",
    "gpus-per-task",
    "cpus-per-task",
    "mem",
    "partition",
    "account",
    "qos",
    "time",
)
SIGNAL = "USR1@300"  # as in train.sbatch: five minutes before the limit, to the tasks only


class SweepError(Exception):
    """The arguments are not a valid grid of runs, or jobs cannot be submitted."""


def reject(errors: Sequence[str]) -> None:
    """Raise SweepError with all errors, if any."""
    if errors:
        raise SweepError("\n".join(["No job submitted:", *(f"  - {error}" for error in errors)]))


class SweepJob(NamedTuple):
    """One run of the grid.

    Attributes:
        suffix: End of the run's name.
        overrides: Overrides for train.py, without the final `run.name`.
    """

    suffix: str
    overrides: tuple[str, ...]


class ValidRun(NamedTuple):
    """One run that passed validation, with all overrides and its configuration."""

    overrides: tuple[str, ...]
    config: JobConfig


def main(arguments: Sequence[str]) -> int:
    """Validate the grid, submit it and return the exit code."""
    options = parse(arguments)
    try:
        jobs = grid(options.overrides)
        runs = validate(jobs, options.nodes, options.ntasks_per_node)
        if not options.dry_run:
            require_prepared_data(runs)
            submit(runs, options)
            return ExitCode.FINISHED
    except SweepError as error:
        print(error, file=sys.stderr)
        return ExitCode.USER_ERROR
    shown = " ".join(f"--{key}={value}" for key, value in sbatch_options(options).items())
    commands = [shlex.join(["python", "train.py", *run.overrides]) for run in runs]
    print_result("\n".join([f"{len(runs)} jobs with {shown}:", *commands]))
    return ExitCode.FINISHED


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options of SLURM and the overrides for train.py, in any order."""
    usage, text = (__doc__ or "").split("\n\n")[1:3]
    parser = argparse.ArgumentParser(
        prog="python slurm/sweep.py", usage=usage.strip(), description=text, allow_abbrev=False
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="train.py's overrides")
    add("--nodes", type=int, default=1, help="nodes per job")
    add("--ntasks-per-node", type=int, default=1, help="processes per node, one per GPU")
    for name in OPTIONS:
        add(f"--{name}", help="see sbatch")
    other = "any other option of sbatch"
    add("--sbatch", action="append", default=[], metavar="NAME=VALUE", help=other)
    add("--dry-run", action="store_true", help="validate and print the commands")
    return parser.parse_intermixed_args(arguments)


def sbatch_options(options: argparse.Namespace) -> dict[str, str]:
    """Return the requested options by their sbatch names."""
    names = ("nodes", "ntasks-per-node", *OPTIONS)
    given = {name: getattr(options, name.replace("-", "_")) for name in names}
    given |= {name: value for name, _, value in (each.partition("=") for each in options.sbatch)}
    return {name: str(value) for name, value in given.items() if value is not None}


# ---------------------------------------------------------------- the grid


def grid(overrides: Sequence[str]) -> list[SweepJob]:
    """Return every combination of the swept keys' values; the last key changes fastest.

    Raises:
        SweepError: for overrides that Hydra cannot parse or enumerate.
    """
    parser = OverridesParser.create()
    values: dict[str, list[str]] = {}  # by key; the last override for a key counts
    plain: dict[str, str] = {}  # overrides that are not swept
    errors = []
    schema = schema_of("train")
    for override in overrides:
        name, _, text = override.partition("=")
        if "," not in text and "(" not in text and takes_text(schema, name.lstrip("+-")):
            values[name] = []  # literal text
            plain[name] = override
            continue
        try:
            parsed = parser.parse_override(override)
            key = parsed.get_key_element()
            swept = parsed.is_sweep_override()
            values[key] = list(parsed.sweep_string_iterator()) if swept else []
        except HydraException as error:
            errors.append(f"{override} is neither key=value nor key=value,value: {error}")
            continue
        if values[key] and key.lstrip("+") in ("run.name", "run.dir"):
            errors.append(
                f"{override}: {key} cannot be swept because runs are named after the other swept "
                "keys; use one value"
            )
        plain[key] = override
    reject(errors)
    names = short_names([key for key in values if values[key]])
    choices = [  # (suffix, override) of each value
        [(f"-{names[key]}_{as_name(value)}", f"{key}={value}") for value in values[key]]
        or [("", plain[key])]
        for key in values
    ]
    return [
        SweepJob("".join(suffix for suffix, _ in run), tuple(override for _, override in run))
        for run in itertools.product(*choices)
    ]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the full key if two have the same last part."""
    last = {key: key.rpartition(".")[2].lstrip("+") for key in keys}
    counts = Counter(last.values())
    return {key: name if counts[name] == 1 else key.lstrip("+") for key, name in last.items()}


def as_name(value: str) -> str:
    """Return a value as part of a folder name."""
    return re.sub(r"[^\w.-]+", "_", value).strip("_")


# ---------------------------------------------------------------- validation


def validate(jobs: Sequence[SweepJob], nodes: int, tasks_per_node: int) -> list[ValidRun]:
    """Return the overrides and the configuration of each job.

    Raises:
        SweepError: Lists every validation error of train.py with the runs that have it.
    """
    runs_by_error: dict[str, list[str]] = {}
    runs = []
    for job in jobs:
        errors = []
        try:
            # The suffix follows the name that the run would have without a sweep.
            composed = compose_words(parse_options(job.overrides, "train"))
            name = as_name(f"{composed.run.name}{job.suffix}")
            kept = [each for each in job.overrides if not re.match(r"[+-]*run\.name=", each)]
            overrides = (*kept, f"run.name={name}")
            config = check_for_tasks(compose_config("train", overrides), tasks_per_node, nodes)
            check_folder(config)
            runs.append(ValidRun(overrides, config))
        except ConfigError as error:
            errors = error.errors
        except (OmegaConfBaseException, RunFolderError, FormatError) as error:
            errors = [str(error)]
        for message in errors:
            runs_by_error.setdefault(message, []).append(job.suffix.removeprefix("-"))
    folders = Counter(run.config.run.dir for run in runs)
    reject(
        [
            message + (in_runs(names) if len(names) < len(jobs) else "")
            for message, names in runs_by_error.items()
        ]
        + [
            f"run.dir={folder} is the folder of {count} runs; include '${{run.name}}' in it and "
            "list no value twice"
            for folder, count in folders.items()
            if count > 1
        ]
    )
    return runs


def in_runs(names: Sequence[str]) -> str:
    """Return the names of the first few runs as a suffix of an error."""
    more = f" and {len(names) - MAX_RUNS_SHOWN} more" if len(names) > MAX_RUNS_SHOWN else ""
    return f" (in {', '.join(names[:MAX_RUNS_SHOWN])}{more})"


def require_prepared_data(runs: Sequence[ValidRun]) -> None:
    """Raise SweepError for datasets that several runs would prepare at the same time."""
    unprepared = Counter(run.config.data.folder for run in runs if needs_preparation(run.config))
    reject(
        [
            f"data.folder={folder} is not prepared, and {count} runs would prepare it at the same "
            "time; run prepare.py with the same data and tokenizer first"
            for folder, count in unprepared.items()
            if count > 1
        ]
    )


# ---------------------------------------------------------------- SLURM


def submit(runs: Sequence[ValidRun], options: argparse.Namespace) -> None:
    """Submit every run, and print its job number and log."""
    try:
        import submitit
    except ImportError:
        reject(["submitit is not installed; run pip install '.[sweep]'"])
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        reject(["sbatch or srun not found; run this on a SLURM login node"])
    for number, run in enumerate(runs):
        executor = submitit.SlurmExecutor(Path(run.config.run.dir) / "slurm")
        executor.update_parameters(**parameters(run, options))
        command = [sys.executable, str(ROOT / "train.py"), *run.overrides]
        try:
            # exec replaces submitit's process, so train.py gets the signals and sets the exit code.
            job = executor.submit(os.execv, sys.executable, command)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise SweepError(
                f"SLURM rejected {run.config.run.name}: {' '.join(str(error).split())}\n"
                f"Submitted: {number} of {len(runs)}."
            ) from None
        print(f"job {job.job_id}: {run.config.run.name}, log {job.paths.stdout}", flush=True)


def parameters(run: ValidRun, options: argparse.Namespace) -> dict[str, Any]:
    """Return submitit's parameters for the same job as slurm/train.sbatch."""
    others = sbatch_options(options)
    del others["nodes"], others["ntasks-per-node"]  # submitit's own parameters
    return {
        "job_name": run.config.run.name,
        "nodes": options.nodes,
        "ntasks_per_node": options.ntasks_per_node,
        # None disables submitit's defaults: the partition's and the account's apply.
        "time": None,
        "wckey": None,
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "signal": SIGNAL, **others},
        "setup": [
            "trap : TERM USR1",
            shlex.join(["export", f"LLAMESH_PYTHON={sys.executable}"]),
            shlex.join(["source", str(SCRIPTS / "environment.sh")]),
            shlex.join(["source", str(SCRIPTS / "cpus_per_task.sh")]),
        ],
        "srun_args": ["--kill-on-bad-exit=0", "--wait=60"],
        "teardown": [
            f"source {shlex.quote(str(SCRIPTS / 'requeue.sh'))} $? {shlex.join(run.overrides)}"
        ],
    }


if __name__ == "__main__":
    protect_streams(is_run=True)  # `| head` must not end the submission halfway
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
