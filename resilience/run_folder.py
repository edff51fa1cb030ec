"""Paths of a run folder, its configuration file and its committed checkpoints.

Reads names and small files only and imports nothing heavy, so that a run can be rejected before
any process is launched. Whether a configuration may resume a run is checked in `training`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.files import write_atomically
from resilience.exit_codes import ExitCode
from resilience.renamed_keys import rename_keys

COMMITTED = "COMMITTED"  # marker file of a committed checkpoint
MANIFEST = "manifest.json"


class RunFolderError(RuntimeError):
    """A run cannot use its folder; the message gives reason and remedy."""

    code: ExitCode = ExitCode.USER_ERROR


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration of the newest launch."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder with one subfolder per committed checkpoint."""
        return self.path / "checkpoints"

    @property
    def event_log(self) -> Path:
        """Event log; see `resilience.event_log`."""
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics of each logged step."""
        return self.path / "metrics.jsonl"

    def profile_folder(self, step: int) -> Path:
        """Return the folder of a profiled step (`log.profile`)."""
        return self.path / "profile" / f"step-{step:08d}"

    def step_folder(self, step: int) -> Path:
        """Return the folder of the committed checkpoint of a step."""
        return self.checkpoints / f"step-{step:08d}"

    def committed_steps(self) -> list[int]:
        """Return the steps with a committed checkpoint, ascending; reads names only."""
        found = []
        for folder in self.checkpoints.glob("step-*"):
            digits = folder.name.removeprefix("step-")
            if digits.isdigit() and (folder / COMMITTED).exists():
                found.append(int(digits))
        return sorted(found)

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.yaml` atomically and durably.

        Raises:
            RunFolderError: The file cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, yaml.safe_dump(config, sort_keys=False).encode())
        except OSError as error:
            raise RunFolderError(
                f"{self.config} cannot be written ({error.strerror}); free space or fix the "
                "permissions, or choose another folder with run.dir=…"
            ) from None

    def read_config(self) -> dict[str, Any] | None:
        """Return the configuration of the previous launch, with today's keys; None without one.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not self.config.exists():
            return None
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            assert isinstance(config, dict)
        except (OSError, yaml.YAMLError, UnicodeDecodeError, AssertionError) as error:
            raise RunFolderError(
                f"{self.config} cannot be read ({error}); restore it, or choose another folder "
                "with run.name=…"
            ) from None
        rename_keys(config)
        return config

    def newest_manifest(self) -> dict[str, Any] | None:
        """Return the newest checkpoint manifest that can be read, without verifying its hash."""
        manifests = (
            read_manifest(self.step_folder(step)) for step in reversed(self.committed_steps())
        )
        return next((manifest for manifest in manifests if manifest), None)

    def newest_position(self) -> dict[str, Any] | None:
        """Return `step`, `samples` and `data_hash` of the newest readable checkpoint, or None."""
        manifest = self.newest_manifest()
        if manifest is None:
            return None
        return {key: manifest["position"][key] for key in ("step", "samples", "data_hash")}

    def resume_source(self, resume: str) -> str:
        """Return the current meaning of `run.resume`: `auto`, `never` or the path of a checkpoint.

        A path is where the run started from. Once the run has later checkpoints of its own, the
        same command (as repeated by a requeued job) resumes from those.
        """
        steps = self.committed_steps()
        if resume in ("auto", "never") or not steps:
            return resume
        previous = ((self.read_config() or {}).get("run") or {}).get("resume")
        manifest = read_manifest(Path(resume))
        started = manifest is not None and steps[-1] > manifest["position"]["step"]
        return "auto" if previous == resume and started else resume


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest if it holds a position and a configuration, else None.

    Renamed configuration keys have their new names. The hash is not verified;
    `checkpoint.files.verify_manifest` does that.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        position, config = manifest["position"], manifest["config"]
        valid = isinstance(position["step"], int) and isinstance(position["samples"], int)
        if not (valid and "data_hash" in position and isinstance(config, dict)):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    rename_keys(config)
    return manifest
