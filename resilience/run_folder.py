"""Paths of a run folder, its configuration file and its committed checkpoints.

Reads names and small files only and imports nothing heavy, so that a run can be rejected before
any process is launched. Whether a configuration may resume a run is checked in `training`.
"""

import errno
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from data.errors import shortened
from data.files import parse_json, read_file, set_aside, write_atomically, write_problem
from resilience.exit_codes import ExitCode
from resilience.renamed_keys import rename_keys
from resilience.safe_yaml import parse_yaml

COMMITTED = "COMMITTED"  # marker file of a committed checkpoint
MANIFEST = "manifest.json"
_STEP_NAME = re.compile(r"step-(\d{8,})")
# Errors of the process or the file system; the file may be intact.
_UNREADABLE = (
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
SECTIONS = ("run", "model", "data", "tokenizer", "train", "optim")  # of every version


class RunFolderError(RuntimeError):
    """A run cannot use its folder; the message gives reason and remedy."""

    code: ExitCode = ExitCode.USER_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class RunFolder:
    """Paths and small files of a run.

    Attributes:
        config: Resolved configuration of the newest launch.
        checkpoints: Folder with one subfolder per committed checkpoint.
        event_log: Event log; see `resilience.event_log`.
        identity: UUID of the run; see `resilience.run_identity`.
        metrics: Metrics of each logged step.
        rewinds: Batches excluded by rewinds; see `resilience.rewinds`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.checkpoints = path / "config.yaml", path / "checkpoints"
        self.event_log, self.metrics = path / "ledger.jsonl", path / "metrics.jsonl"
        self.rewinds = path / "rewinds.json"
        self.identity = path / "run.json"

    def step_folder(self, step: int) -> Path:
        """Return the folder of the committed checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def committed_steps(self) -> list[int]:
        """Return the steps with a committed checkpoint, ascending; reads names only.

        Raises:
            RunFolderError: A folder cannot be read.
        """
        return [step for step, committed in self._steps() if committed]

    def uncommitted_steps(self) -> list[int]:
        """Return the steps whose folder has no `COMMITTED`, ascending; reads names only.

        Raises:
            RunFolderError: A folder cannot be read.
        """
        return [step for step, committed in self._steps() if not committed]

    def _steps(self) -> list[tuple[int, bool]]:
        """Return each step that has a folder, and whether it is committed."""
        try:
            names = os.listdir(self.checkpoints)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise unreadable(self.checkpoints, error) from None
            if os.path.lexists(self.checkpoints):
                if self.checkpoints.is_dir():  # created in the meantime by a save
                    return self._steps()
                raise RunFolderError(
                    f"{self.checkpoints} is neither a folder nor a link to one that exists; mount "
                    "or restore the folder, or move the file or link away to start from scratch"
                ) from None
            return []
        matches = filter(None, map(_STEP_NAME.fullmatch, names))
        steps = sorted(int(match[1]) for match in matches)
        # `step-000000012` would not be found again by its number.
        return [
            (step, self._is_committed(step))
            for step in steps
            if self.step_folder(step).name in names
        ]

    def _is_committed(self, step: int) -> bool:
        marker = self.step_folder(step) / COMMITTED
        try:
            return marker.exists()
        except OSError:
            return True  # only reading it shows why it cannot be read

    def write_config(self, config: dict[str, Any]) -> str | None:
        """Write `config.yaml` atomically and durably.

        Returns:
            A message if the file was damaged and is kept under another name, else None.

        Raises:
            RunFolderError: The file cannot be written.
        """
        message = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self.read_config()
            except RunFolderError:
                if (aside := set_aside(self.config)) is not None:
                    message = (
                        f"{self.config} is damaged and is kept as {aside.name}. The configuration "
                        "of the newest checkpoint is used."
                    )
            write_atomically(self.config, yaml.safe_dump(config, sort_keys=False).encode())
        except OSError as error:
            raise RunFolderError(f"{self.config} {not_writable(error, self.path)}") from None
        return message

    def read_config(self) -> dict[str, Any] | None:
        """Return the configuration of the previous launch, with today's keys; None without one.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not self.config.exists():
            return None
        try:
            config = parse_yaml(read_file(self.config).decode())
            if not isinstance(config, dict):
                raise ValueError("it holds no keys" if config is None else "it is not a mapping")
        except (OSError, ValueError) as error:  # ValueError: also not UTF-8
            raise self._unreadable_config(" ".join(str(error).split())) from None
        rename_keys(config)
        return config

    def _unreadable_config(self, reason: str) -> RunFolderError:
        remedy = "restore it, or choose another folder with run.dir=…"
        return RunFolderError(f"{self.config} cannot be read ({reason}); {remedy}")

    def last_config(self) -> dict[str, Any] | None:
        """Return the configuration of the last launch, None if there was none.

        If `config.yaml` is missing or damaged, it is the one of the newest readable checkpoint.

        Raises:
            RunFolderError: The file is damaged and no checkpoint has a configuration.
        """
        manifest = self.newest_manifest()
        saved = manifest["config"] if manifest and "train" in manifest["config"] else None
        try:
            config = self.read_config() or saved
            lost = [name for name in SECTIONS if config and not isinstance(config.get(name), dict)]
            if lost:
                raise self._unreadable_config(f"it has no section {' and no '.join(lost)}")
            return config
        except RunFolderError:
            if saved is None:
                raise
            return saved

    def newest_manifest(self) -> dict[str, Any] | None:
        """Return the newest checkpoint manifest that can be read, without verifying its hash."""
        manifests = (read_manifest(self.step_folder(n)) for n in reversed(self.committed_steps()))
        return next(filter(None, manifests), None)

    def newest_position(self) -> dict[str, Any] | None:
        """Return the position in the newest readable checkpoint, or None."""
        manifest = self.newest_manifest()
        return manifest["position"] if manifest else None

    def resume_source(self, resume: str) -> str:
        """Return the current meaning of `run.resume`: `auto`, `never` or a path.

        A path, of a checkpoint or another run folder, is where the run started from. Once the run
        has later checkpoints of its own, the same command (as repeated by a requeued job) resumes
        from those.
        """
        steps = self.committed_steps()
        if resume in ("auto", "never"):
            return resume
        if Path(resume).resolve() in (self.path.resolve(), self.checkpoints.resolve()):
            return "auto"
        if not steps:
            return resume
        previous = ((self.last_config() or {}).get("run") or {}).get("resume")
        if not (Path(resume) / COMMITTED).exists() and checkpoints_in(Path(resume)):
            started = True  # a run folder, whose newest step may have changed since
        else:
            manifest = read_manifest(Path(resume))
            started = manifest is not None and steps[-1] > manifest["position"]["step"]
        return "auto" if previous == resume and started else resume

    def origin(self, resume: str) -> str | None:
        """Return the path in `run.resume` if it is where this run started from, else None."""
        if resume in ("auto", "never"):
            return None
        path, own = Path(resume).resolve(), self.checkpoints.resolve()
        return None if path in (self.path.resolve(), own) or path.parent == own else resume


def checkpoints_in(path: Path) -> list[Path]:
    """Return the committed checkpoints of a run folder or its `checkpoints` folder, newest first.

    A path that is a committed checkpoint itself is the only result.
    """
    if (path / COMMITTED).exists():
        return [path]
    run = RunFolder(path.parent if path.name == "checkpoints" else path)
    return [run.step_folder(step) for step in reversed(run.committed_steps())]


def not_writable(error: OSError, folder: Path) -> str:
    """Return the reason and the remedy if a file of a run cannot be written."""
    remedy = "free space or fix the permissions, or choose another folder with run.dir=…"
    return f"cannot be written ({write_problem(error, folder)}); {remedy}"


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest if it holds a position and a configuration, else None.

    Renamed configuration keys have their new names. The hash is not verified;
    `checkpoint.files.verify_manifest` does that.

    Raises:
        RunFolderError: The file may be intact, but this process cannot read it.
    """
    try:
        manifest = parse_json(read_file(checkpoint / MANIFEST))
        position, config = manifest["position"], manifest["config"]
        ranges = [*(position.get("skips") or ()), *(position.get("rewinds") or ())]
        numbers = [position["step"], position["samples"], *chain.from_iterable(ranges)]
        valid = all(type(each) is int for each in numbers) and all(
            len(each) == 2 for each in ranges
        )
        valid = valid and "data_hash" in position and isinstance(config, dict)
        if not valid or has_name_of_other_step(checkpoint, position["step"]):
            return None
    except OSError as error:
        if is_unreadable(error):
            raise unreadable(checkpoint / MANIFEST, error) from None
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    rename_keys(config)
    return manifest


def has_name_of_other_step(checkpoint: Path, step: int) -> bool:
    """Return whether a folder in a run's `checkpoints` has the name of a step other than its own.

    Such a copy, made by hand, would pass for a newer checkpoint. Converted weights, of step 0, may
    have any name.
    """
    named = _STEP_NAME.fullmatch(checkpoint.name)
    if named is None or checkpoint.parent.name != "checkpoints":
        return False
    return step not in (0, int(named[1]))


def is_unreadable(error: OSError) -> bool:
    """Return whether an error says nothing about the content of a file, such as a permission."""
    return error.errno in _UNREADABLE


def unreadable(path: Path, error: OSError) -> RunFolderError:
    """Return the error about a file that this process cannot read, although it may be intact."""
    return RunFolderError(
        f"{path} cannot be read ({error.strerror}); make it readable for this user on every node. "
        "Nothing was changed, and no older checkpoint was used instead"
    )
