"""A run's folder: what is in it, and whether a run may go on in it.

Looks at names and small files alone, before any process is launched and anything is written.
Imports nothing heavy.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resilience.exit_codes import ExitCode
from training.resume_policy import (
    Changes,
    changes_error,
    compare,
    compare_on_load,
    differences,
    load_error,
    override_errors,
)

COMMITTED = "COMMITTED"  # the file that makes a checkpoint's folder a checkpoint


class RunFolderError(RuntimeError):
    """A run cannot go on in its folder; the message says why and what to do."""

    code: ExitCode = ExitCode.USER_ERROR


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest start."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """One folder a committed checkpoint."""
        return self.path / "checkpoints"

    @property
    def ledger(self) -> Path:
        """Every start, save and stop."""
        return self.path / "ledger.jsonl"

    @property
    def samples(self) -> Path:
        """Text generated as the run goes on."""
        return self.path / "samples.txt"

    def profile_folder(self, step: int) -> Path:
        """Where what `log.profile` saw of a step lies."""
        return self.path / "profile" / f"step-{step:08d}"

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes `config.yaml` whole or not at all, a node's power cut included.

        Raises:
            RunFolderError: it cannot be written.
        """
        fresh = self.config.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with fresh.open("w", encoding="utf-8") as file:
                yaml.safe_dump(config, file, sort_keys=False)
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(self.config)
        except OSError as error:
            raise RunFolderError(
                f"{self.config} cannot be written ({error.strerror}): make room there or set the "
                "permissions, or name another folder with run.dir=…"
            ) from None

    def step_folder(self, step: int) -> Path:
        """Where the committed checkpoint of a step lies."""
        return self.checkpoints / f"step-{step:08d}"

    def committed_steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending; reads names alone."""
        found = []
        for folder in self.checkpoints.glob("step-*"):
            digits = folder.name.removeprefix("step-")
            if digits.isdigit() and (folder / COMMITTED).exists():
                found.append(int(digits))
        return sorted(found)

    def newest_position(self) -> dict[str, Any] | None:
        """The position of the newest checkpoint whose manifest can be read."""
        for step in reversed(self.committed_steps()):
            try:
                manifest = json.loads((self.step_folder(step) / "manifest.json").read_text())
                position = manifest["position"]
                return {key: position[key] for key in ("step", "samples", "data_hash")}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def check(
        self,
        config: dict[str, Any],
        complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda before: before,
    ) -> Changes:
        """Whether a start with this configuration may go on in this folder.

        Args:
            config: The resolved configuration, as plain dictionaries.
            complete: Adds the keys that an older version's configuration lacks, at their defaults.

        Returns:
            What changed since the last start or, where a run begins with another's checkpoint,
            since that one was saved.

        Raises:
            RunFolderError: a change that the contract does not admit, `run.resume=never` meets
                checkpoints, or checkpoints that were saved are gone.
        """
        committed_steps = self.committed_steps()
        before = self.read_config() or self._saved_config()
        before = complete(before) if before else {}
        if problems := override_errors(before, config):
            raise RunFolderError("\n".join(problems))
        changes = self._check_changes(before, config, committed_steps)
        resume = self.resume_from(config["run"]["resume"])
        if resume == "never" and committed_steps:
            raise RunFolderError(
                f"run.resume (never) meets checkpoints in {self.checkpoints}, and nothing is ever "
                "written over one: use run.resume=auto to go on, or another run.name"
            )
        if resume not in ("auto", "never"):
            begun = self._check_checkpoint(Path(resume), committed_steps, config, complete)
            changes = changes if committed_steps else begun
        if resume == "auto" and not committed_steps and self._saved_once():
            raise RunFolderError(
                f"{self.ledger} tells of saved checkpoints, and {self.checkpoints} holds none: "
                "restore them to go on, or use another run.name to start from scratch"
            )
        return changes

    def resume_from(self, resume: str) -> str:
        """What `run.resume` means by now: `auto`, `never` or the path of a checkpoint.

        A path is where a run begins. A job that is requeued gives the same command again, when the
        run has checkpoints of its own beyond that one; it goes on from those then.
        """
        if resume in ("auto", "never") or not self.committed_steps():
            return resume
        last = ((self.read_config() or {}).get("run") or {}).get("resume")
        step = (read_manifest(Path(resume)) or {}).get("position", {}).get("step")
        begun = last == resume and step is not None and self.committed_steps()[-1] > step
        return "auto" if begun else resume

    def _check_changes(
        self, before: dict[str, Any], config: dict[str, Any], committed_steps: list[int]
    ) -> Changes:
        """What changed since the last start, all of it free before the first checkpoint."""
        samples = (self.newest_position() or {"samples": 0})["samples"]
        if not before:
            return Changes()
        if not committed_steps:
            return Changes(free=differences(before, config))
        changes = compare(before, config, samples)
        if told := changes_error(changes, config, samples):
            raise RunFolderError(
                f"{self.path} holds a run whose configuration differs from this one (key: there "
                f"-> now).\n{told}"
            )
        return changes

    def _check_checkpoint(
        self,
        checkpoint: Path,
        committed_steps: list[int],
        config: dict[str, Any],
        complete: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> Changes:
        """Whether `run.resume` names a checkpoint that this run can begin with or go on from."""
        if not (checkpoint / COMMITTED).exists():
            raise RunFolderError(
                f"run.resume ({checkpoint}) is not a committed checkpoint: use auto, never, or a "
                "folder like runs/NAME/checkpoints/step-00000100"
            )
        manifest = read_manifest(checkpoint)
        if manifest is None:
            raise RunFolderError(
                f"run.resume ({checkpoint}) is damaged, its manifest.json tells no position and no "
                "configuration: use another checkpoint"
            )
        if "train" not in manifest["config"]:
            raise RunFolderError(
                f"run.resume ({checkpoint}) holds weights alone, and no optimizer and position to "
                f"go on from: begin with them by run.init_from={checkpoint}"
            )
        step, samples = manifest["position"]["step"], manifest["position"]["samples"]
        if committed_steps and committed_steps[-1] > step:
            raise RunFolderError(
                f"run.resume ({checkpoint}) lies before step {committed_steps[-1]} of "
                f"{self.checkpoints}, and nothing is ever written over a checkpoint: "
                "use run.resume=auto to go on with this run, or another run.name for the branch"
            )
        if checkpoint.resolve().parent == self.checkpoints.resolve():
            return Changes()  # of this very run: compared with its last start
        changes = compare_on_load(complete(manifest["config"]), config, samples)
        if told := load_error(changes, config, samples):
            raise RunFolderError(
                f"run.resume ({checkpoint}) does not fit this configuration (key: there -> now).\n"
                f"{told}"
            )
        return changes

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the last start, or None when there was none."""
        if not self.config.exists():
            return None
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            assert isinstance(before, dict)
            return before
        except (OSError, yaml.YAMLError, UnicodeDecodeError, AssertionError) as error:
            raise RunFolderError(
                f"{self.config} cannot be read ({error}): restore it, or use another run.name"
            ) from None

    def _saved_config(self) -> dict[str, Any] | None:
        """The configuration that the newest checkpoint tells, for where `config.yaml` is lost."""
        newest_first = reversed(self.committed_steps())
        manifests = (read_manifest(self.step_folder(step)) for step in newest_first)
        return next((manifest["config"] for manifest in manifests if manifest), None)

    def _saved_once(self) -> bool:
        """Whether the ledger tells of a save."""
        if not self.ledger.exists():
            return False
        for line in self.ledger.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line).get("event") == "save":
                    return True
            except (ValueError, AttributeError):
                continue
        return False


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, where it tells position and configuration."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        position, config = manifest["position"], manifest["config"]
        told = isinstance(position["step"], int) and isinstance(position["samples"], int)
        return manifest if told and isinstance(config, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
