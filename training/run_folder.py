"""A run's folder: what is in it, and whether a run may go on in it.

Looks at names and small files alone, before any process is launched and anything is written.
Imports nothing heavy.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMMITTED = "COMMITTED"  # the file that makes a checkpoint's folder a checkpoint

# What may change from one start of a run to the next: it alters neither the samples nor the model.
FREE_KEYS = (
    "run.name",
    "run.dir",
    "run.resume",
    "run.allow_changes",
    "run.time_limit",
    "model.attention",
    "parallel.",
    "precision.optimizer_state",
    "train.max_steps",
    "train.micro_batch_size",
    "optim.lr",
    "optim.schedule",
    "optim.schedule_steps",
    "optim.warmup_steps",
    "optim.min_lr_ratio",
    "optim.decay_ratio",
    "data.folder",
    "data.workers",
    "data.loader_threads",
    "data.prefetch",
    "data.verify_reads",
    "tokenizer.path",
    "checkpoint.",
    "faults.",
    "watchdog.",
    "validation.",
    "log.",
)


class RunFolderError(RuntimeError):
    """A run cannot go on in its folder; the message says why and what to do."""


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

    def append_sample(self, step: int, text: str) -> None:
        """Adds generated text under a line that tells its step."""
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n\n")

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes `config.yaml` whole or not at all.

        Raises:
            RunFolderError: it cannot be written.
        """
        fresh = self.config.with_suffix(".tmp")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fresh.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
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

    def check(self, config: dict[str, Any]) -> dict[str, Any]:
        """Whether a start with this configuration may go on in this folder.

        Args:
            config: The resolved configuration, as plain dictionaries.

        Returns:
            The free keys that changed since the last start, as `{key: [before, now]}`.

        Raises:
            RunFolderError: a key that is not free changed, `run.resume=never` meets checkpoints,
                or checkpoints that were saved are gone.
        """
        committed_steps = self.committed_steps()
        before = self.read_config()
        changed = _differences(before, config) if before else {}
        samples = (self.newest_position() or {"samples": 0})["samples"]
        fixed = {
            key: both
            for key, both in changed.items()
            if not _is_free(key)
            and not (key == "data.stages" and _same_past(both[0], both[1], samples))
        }
        if fixed and committed_steps:
            rows = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in fixed.items())
            raise RunFolderError(
                f"{self.path} holds a run whose configuration differs in what must not change:\n"
                f"{rows}\nSet these keys back to go on with that run, or give the new one a name "
                "of its own with run.name=…"
            )
        resume = config["run"]["resume"]
        if resume == "never" and committed_steps:
            raise RunFolderError(
                f"run.resume (never) meets checkpoints in {self.checkpoints}, and nothing is ever "
                "written over one: use run.resume=auto to go on, or another run.name"
            )
        if resume not in ("auto", "never"):
            self._check_checkpoint(Path(resume), committed_steps)
        if resume == "auto" and not committed_steps and self._saved_once():
            raise RunFolderError(
                f"{self.ledger} tells of saved checkpoints, and {self.checkpoints} holds none: "
                "restore them to go on, or use another run.name to start from scratch"
            )
        return changed

    def _check_checkpoint(self, checkpoint: Path, committed_steps: list[int]) -> None:
        """Whether `run.resume` names a checkpoint, and this folder holds none beyond it."""
        if not (checkpoint / COMMITTED).exists():
            raise RunFolderError(
                f"run.resume ({checkpoint}) is not a committed checkpoint: use auto, never, or a "
                "folder like runs/NAME/checkpoints/step-00000100"
            )
        try:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            step = int(manifest["position"]["step"])
        except (OSError, ValueError, KeyError, TypeError):
            raise RunFolderError(
                f"run.resume ({checkpoint}) is damaged, its manifest.json tells no step: "
                "use another checkpoint"
            ) from None
        if committed_steps and committed_steps[-1] > step:
            raise RunFolderError(
                f"run.resume ({checkpoint}) lies before step {committed_steps[-1]} of "
                f"{self.checkpoints}, and nothing is ever written over a checkpoint: "
                "use run.resume=auto to go on with this run, or another run.name for the branch"
            )

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


def _is_free(key: str) -> bool:
    """Whether a dotted key may change between two starts of a run."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_KEYS)


def _same_past(before: Any, now: Any, samples: int) -> bool:
    """Whether two lists of stages give the same first `samples` samples: the rest is to come.

    `micro_batch_size` is as free as that of `train`: another mesh may need another one.
    """

    def past(stages: Any) -> Any:
        if not isinstance(stages, list):
            return stages or []
        return [
            stage | {"micro_batch_size": None} for stage in stages if stage["from_sample"] < samples
        ]

    return past(before) == past(now)


def _differences(before: Any, now: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf at which two nested dictionaries differ, as `{dotted key: [before, now]}`."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {prefix.removesuffix("."): [before, now]}
    found: dict[str, Any] = {}
    for key in [*before, *(key for key in now if key not in before)]:
        found |= _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    return found
