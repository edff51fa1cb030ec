"""Rewinds of a run: the batches that each one excluded, in `rewinds.json`.

They determine the sample order, so they are written atomically and durably before a rewind takes
effect, and damage stops the run. The manifest of each checkpoint has a copy in its position. The
copy shows whether the file is missing or older than the checkpoint, and with the event log it
restores the file. Imports nothing heavy: the file is read before any process is launched.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import parse_json, read_file, set_aside, write_atomically, write_problem
from resilience.event_log import read_json_lines, scan_json_lines
from resilience.exit_codes import ExitCode
from resilience.run_folder import (
    COMMITTED,
    MANIFEST,
    RunFolder,
    RunFolderError,
    not_writable,
    read_manifest,
)
from resilience.run_identity import read_identity

BatchRange = tuple[int, int]
"""Half-open range of batch indices or sample indices."""

FILE_NAME = "rewinds.json"  # also the name in `run.allow_changes` that replaces a damaged file
MAX_BYTES = 2**20


class RewindsError(RunFolderError):
    """The batches that earlier rewinds excluded are unknown."""

    code = ExitCode.REWINDS


def load_rewinds(folder: RunFolder) -> list[BatchRange]:
    """Return the batches excluded by each rewind of a run, in order.

    A run of an earlier version has them in its event log only.

    Raises:
        RewindsError: `rewinds.json` is damaged, or the newest checkpoint has rewinds that it lacks.
    """
    path, (checkpoint, saved) = folder.rewinds, _newest_copy(folder)
    if os.path.lexists(path):
        rewinds = _read(path, _run_id(folder))
        if rewinds[: len(saved)] != saved:
            raise _error(path, f"lacks rewinds that {checkpoint} has")
        return rewinds
    events = _rewind_events(folder)
    if saved:
        raise _error(path, f"is missing, but {checkpoint} has rewinds")
    if any("number" in event for event in events):  # versions without the file do not count them
        raise _error(path, f"is missing, but {folder.event_log.name} has rewinds")
    return _extend([], events)


def open_rewinds(folder: RunFolder, rebuild: bool) -> tuple[list[BatchRange], str | None]:
    """Return the rewinds, and a message if `rewinds.json` was written or rewinds may be lost.

    Args:
        rebuild: Replace a damaged file by the rewinds of the newest checkpoint and those that only
            the event log has.

    Raises:
        RewindsError: As `load_rewinds`.
        RunFolderError: The file cannot be written.
    """
    path = folder.rewinds
    try:
        rewinds = load_rewinds(folder)
        lost = "" if path.exists() else _damaged_events(folder)
        if not rewinds or path.exists():
            return rewinds, lost or None
        origin = f"from {folder.event_log.name} of an earlier version"
    except RewindsError:
        if not rebuild:
            raise
        rewinds = _extend(_newest_copy(folder)[1], _rewind_events(folder))
        origin = "from the newest checkpoint and the event log"
        try:
            aside = set_aside(path)
        except OSError as error:
            raise RunFolderError(f"{path} {not_writable(error, folder.path)}") from None
        lost = f"The damaged file is kept as {aside.name}." if aside else ""
    write_rewinds(folder, rewinds)
    batches = [f"{first} to {stop - 1}" for first, stop in rewinds]
    excluded = f"excluding batches {', '.join(batches)}" if batches else "no rewinds"
    return rewinds, f"Wrote {path} {origin}: {excluded}. {lost}".rstrip()


def _damaged_events(folder: RunFolder) -> str:
    """Return a message if a run of an earlier version may have lost a rewind, "" otherwise.

    The run is consistent nevertheless: a checkpoint excludes the batches of all rewinds before it.
    """
    position = _newest_position(folder)
    try:
        n_damaged = scan_json_lines(folder.event_log).n_damaged
    except OSError:
        n_damaged = 0
    if position is None or "rewinds" in position or not n_damaged:
        return ""
    return (
        f"{folder.event_log} of an earlier version is damaged (invalid lines: {n_damaged}). "
        "If one recorded a rewind after the newest checkpoint, its batches are not excluded."
    )


def write_rewinds(folder: RunFolder, rewinds: Sequence[BatchRange]) -> None:
    """Write `rewinds.json` atomically and durably.

    Raises:
        RunFolderError: It cannot be written.
    """
    try:
        write_atomically(folder.rewinds, _content(rewinds, _run_id(folder)))
    except OSError as error:
        raise RunFolderError(
            f"{folder.rewinds} cannot be written ({write_problem(error, folder.path)}), but a "
            "rewind must be recorded before it is executed; free space, then resume"
        ) from None


def last_step_before(batch: int, skips: Iterable[BatchRange]) -> int:
    """Return the number of steps done when a batch was taken.

    Args:
        skips: Ascending ranges of batches that were excluded before it was taken.
    """
    return batch - sum(min(stop, batch) - first for first, stop in skips if first < batch)


def unfinished_rewind(folder: RunFolder, rewinds: Sequence[BatchRange]) -> int | None:
    """Return the highest step that the last rewind may restore, if it did not take effect.

    A rewind deletes all checkpoints after the step that it restores, so it was interrupted if the
    newest valid one is after that step and does not exclude its batches.
    """
    position = _newest_position(folder)
    if not rewinds or position is None:
        return None
    skips = merge_ranges(position.get("skips") or ())
    if merge_ranges([*skips, rewinds[-1]]) == skips:
        return None
    before = last_step_before(rewinds[-1][0], merge_ranges([*skips, *rewinds[:-1]]))
    return before if position["step"] > before else None


def merge_ranges(ranges: Iterable[Sequence[int]]) -> tuple[BatchRange, ...]:
    """Return the same indices as ascending ranges that neither touch nor overlap."""
    merged: list[BatchRange] = []
    for first, stop in sorted((first, stop) for first, stop in ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((first, stop))
    return tuple(merged)


def _content(rewinds: Sequence[BatchRange], run_id: str | None) -> bytes:
    """Return the only valid content of the file for these rewinds."""
    values: dict[str, Any] = {"run_id": run_id, "rewinds": [list(each) for each in rewinds]}
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    return json.dumps(values | {"sha256": digest}).encode() + b"\n"


def _run_id(folder: RunFolder) -> str | None:
    identity = read_identity(folder)
    return identity.id if identity else None


def _read(path: Path, run_id: str | None) -> list[BatchRange]:
    if not path.is_file():  # reading a named pipe would block
        raise _error(path, "is not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror})") from None
    try:
        values = parse_json(content)
        rewinds: list[BatchRange] = []
        for value in values["rewinds"]:
            if not _follows(rewinds, value):
                raise _error(path, f"is damaged ({value!r} cannot be batches of a rewind)")
            rewinds.append((value[0], value[1]))
        if _content(rewinds, values["run_id"]) != content:
            raise _error(path, "is damaged (its hash differs from its content)")
        if None not in (values["run_id"], run_id) and values["run_id"] != run_id:
            raise _error(path, f"belongs to another run ({values['run_id']})")
    except (ValueError, TypeError, KeyError):
        raise _error(path, "is damaged (not JSON in the format of a run)") from None
    return rewinds


def _follows(rewinds: Sequence[BatchRange], value: Any) -> bool:
    """Return whether a value is the range of a rewind after these.

    Its first and last batch were trained on, so no earlier rewind had excluded them.
    """
    if not (isinstance(value, list | tuple) and [*map(type, value)] == [int, int]):
        return False
    first, stop = value
    ends = (first, stop - 1)
    return 0 <= first < stop and not any(a <= end < b for a, b in rewinds for end in ends)


def _extend(rewinds: Sequence[BatchRange], events: Iterable[Mapping[str, Any]]) -> list[BatchRange]:
    """Return the rewinds, followed by those of the event log that can follow them."""
    extended = list(rewinds)
    for event in events:
        skip: Any = event.get("skip")
        if _follows(extended, skip):
            extended.append((skip[0], skip[1]))
    return extended


def _rewind_events(folder: RunFolder) -> list[dict[str, Any]]:
    events = read_json_lines(folder.event_log)
    return [event for event in events if event.get("event") == "rewind"]


def _newest_copy(folder: RunFolder) -> tuple[str, list[BatchRange]]:
    """Return name and rewinds of the newest checkpoint; no rewinds if there is none."""
    position = _newest_position(folder)
    if position is None:
        return "", []
    rewinds = [(first, stop) for first, stop in position.get("rewinds") or ()]
    return folder.step_folder(position["step"]).name, rewinds


def _newest_position(folder: RunFolder) -> dict[str, Any] | None:
    """Return the position of the newest checkpoint whose manifest has the committed hash.

    None if it is one of another run, which `run.adopt` has made part of this run.
    """
    for step in reversed(folder.committed_steps()):
        checkpoint = folder.step_folder(step)
        try:
            content = read_file(checkpoint / MANIFEST)
            committed = read_file(checkpoint / COMMITTED)
        except OSError:
            continue
        if committed.strip() == hashlib.sha256(content).hexdigest().encode():
            manifest = read_manifest(checkpoint)
            if manifest is None:
                continue
            identity, run_id = read_identity(folder), manifest.get("run_id")
            is_own = identity is None or run_id in (None, identity.id)
            return manifest["position"] if is_own else None
    return None


def _error(path: Path, problem: str) -> RewindsError:
    return RewindsError(
        f"{path} {problem}. It lists the batches that rewinds exclude from training. Restore it "
        f"from a backup, or add run.allow_changes=[{FILE_NAME}] to the command to rebuild it from "
        "the newest checkpoint and the event log"
    )
