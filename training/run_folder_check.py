"""Check before launch whether a configuration may start or resume a run in its folder."""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resilience.event_log import read_json_lines
from resilience.rewinds import FILE_NAME as REWINDS_FILE
from resilience.rewinds import load_rewinds
from resilience.run_folder import (
    COMMITTED,
    MANIFEST,
    RunFolder,
    RunFolderError,
    checkpoints_in,
    read_manifest,
)
from training.resume_policy import Changes, check_changes, differences, override_errors

AddDefaults = Callable[[dict[str, Any]], dict[str, Any]]


def check_run_folder(
    folder: RunFolder, config: dict[str, Any], add_defaults: AddDefaults = lambda config: config
) -> Changes:
    """Check a configuration against the previous launch; reads names and small files only.

    Args:
        config: Resolved configuration, as plain dictionaries.
        add_defaults: Adds the keys that the configuration of an older version lacks.

    Returns:
        Changes since the previous launch or, if the run starts from another run's checkpoint, since
        that one was saved.

    Raises:
        RewindsError: The batches that earlier rewinds excluded are unknown.
        RunFolderError: The path is not that of a run folder, a change is not allowed, saved
            checkpoints are missing, or `run.resume=never` although the folder has checkpoints.
    """
    check_path(folder.path)
    steps = folder.committed_steps()
    newest = folder.newest_manifest()
    previous = folder.last_config()
    previous = add_defaults(previous) if previous else {}
    if errors := list(override_errors(previous, config)):
        raise RunFolderError("\n".join(errors))
    changes = Changes()
    if previous and steps:
        heading = f"{folder.path} holds a run with a different configuration"
        samples = newest["position"]["samples"] if newest else 0
        changes = check_changes(heading, previous, config, samples)
    elif previous:  # all changes are free before the first checkpoint
        changes = Changes(free=differences(previous, config))
    if REWINDS_FILE not in config["run"]["allow_changes"]:
        load_rewinds(folder)
    resume = folder.resume_source(config["run"]["resume"])
    if resume == "never" and steps:
        raise RunFolderError(
            f"run.resume=never, but {folder.checkpoints} has checkpoints, which are never "
            "overwritten; use run.resume=auto to resume, or another run.dir"
        )
    if resume not in ("auto", "never"):
        start_changes = _check_checkpoint(folder, Path(resume), config, add_defaults)
        changes = changes if steps else start_changes
    if resume == "auto" and not steps and _saved_names(folder):
        lost = "".join(f"{text}\n" for text in _lost_markers(folder))
        raise RunFolderError(
            f"{lost}{folder.event_log} records saved checkpoints, but {folder.checkpoints} has "
            "none; restore them to resume, or use another run.dir to start from scratch"
        )
    return changes


def checkpoint_warnings(folder: RunFolder) -> Iterator[str]:
    """Yield warnings about a newest checkpoint without run, and newer ones without `COMMITTED`.

    A folder without `COMMITTED` is neither used nor deleted.
    """
    newest = folder.newest_manifest()
    if newest is not None and newest.get("run_id") is None:
        yield (
            f"{folder.step_folder(newest['position']['step'])} was saved by an earlier version, "
            "which did not record the run of a checkpoint. It is taken as one of this run."
        )
    last = max(folder.committed_steps(), default=0)
    for text in _lost_markers(folder):
        yield f"{text} Otherwise the run resumes from step {last}, and the folder is kept."


def _saved_names(folder: RunFolder) -> set[str]:
    """Return the names of the checkpoints that the event log knows."""
    events = read_json_lines(folder.event_log)
    return {str(event.get("path")) for event in events if event.get("event") == "save"}


def _lost_markers(folder: RunFolder) -> Iterator[str]:
    """Yield a message for each saved folder without `COMMITTED` after the newest checkpoint."""
    last = max(folder.committed_steps(), default=0)
    uncommitted = [folder.step_folder(step) for step in folder.uncommitted_steps() if step > last]
    saved = _saved_names(folder) if uncommitted else set()
    for path in uncommitted:
        if path.name in saved and not path.is_dir():
            yield (
                f"{path} is a link or file instead of the folder that {folder.event_log} records. "
                "To use the checkpoint, restore the folder."
            )
        elif path.name in saved:
            command = f"sha256sum {MANIFEST} | cut -d' ' -f1 > {COMMITTED}"
            yield (
                f"{path} has no {COMMITTED}, but {folder.event_log} records that it was saved. To "
                f"use it, restore the file: (cd {shlex.quote(str(path))} && {command}). All files "
                "are verified before they are used."
            )


def check_path(path: Path) -> None:
    """Check that `run.dir` is no file, no checkpoint of a run and no folder of other runs.

    Raises:
        RunFolderError: It is.
    """
    existing = next((each for each in (path, *path.parents) if each.exists()), path)
    if existing.exists() and not existing.is_dir():
        within = "is" if existing == path else f"is below {existing},"
        raise RunFolderError(f"run.dir={path} {within} a file; use a folder, such as runs/NAME")
    run = path.parent.parent if (path / COMMITTED).exists() else path.parent
    if (path / COMMITTED).exists() or (path.name == "checkpoints" and checkpoints_in(run)):
        raise RunFolderError(
            f"run.dir={path} is in the run folder {run}; use run.dir={run} to resume that run, or "
            f"another folder with run.resume={path if path.parent != run else run} to branch from "
            "it"
        )
    if path.is_dir() and not RunFolder(path).config.exists():
        runs = [each.parent for each in sorted(path.glob("*/checkpoints")) if checkpoints_in(each)]
        if runs:
            names = ", ".join(run.name for run in runs[:5])
            raise RunFolderError(
                f"run.dir={path} has run folders in it ({names}); "
                f"use run.dir={runs[0]} to resume that run, or run.dir={path}/NAME for a new one"
            )


def _check_checkpoint(
    folder: RunFolder, checkpoint: Path, config: dict[str, Any], add_defaults: AddDefaults
) -> Changes:
    """Check that this run can start or resume from the checkpoint named by `run.resume`."""
    candidates = checkpoints_in(checkpoint)
    if not candidates:
        raise RunFolderError(
            f"run.resume={checkpoint} is not a committed checkpoint or a run folder with one; use "
            "auto, never, or a folder like runs/NAME or runs/NAME/checkpoints/step-00000100"
        )
    checkpoint = candidates[0]
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise RunFolderError(
            f"run.resume={checkpoint} is damaged: its manifest.json has no position and "
            "configuration; use another checkpoint"
        )
    if "train" not in manifest["config"]:
        raise RunFolderError(
            f"run.resume={checkpoint} has weights only, without optimizer state and position; use "
            f"run.init_from={checkpoint} to start from its weights"
        )
    step, samples = manifest["position"]["step"], manifest["position"]["samples"]
    steps = folder.committed_steps()
    if steps and steps[-1] > step:
        raise RunFolderError(
            f"run.resume={checkpoint} is before step {steps[-1]} of {folder.checkpoints}, and "
            "checkpoints are never overwritten; use run.resume=auto to resume this run, or another "
            "run.dir to branch from the checkpoint"
        )
    if checkpoint.resolve().parent == folder.checkpoints.resolve():
        return Changes()  # a checkpoint of this run: compared with its previous launch
    heading = f"run.resume={checkpoint} does not match this configuration"
    return check_changes(heading, add_defaults(manifest["config"]), config, samples, on_load=True)
