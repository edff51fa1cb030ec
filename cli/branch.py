"""Branch the decay of the learning rate from a checkpoint of a `wsd` run: `run.branch=CHECKPOINT`.

The branch is a run in a folder of its own. It has the configuration of the checkpoint, starts from
its weights, optimizer state and samples, and decays the learning rate from there. The other run is
unchanged. Once the branch has checkpoints, the same command resumes from those.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.run_folder import RunFolder, checkpoints_in, read_manifest
from training.config import OptimConfig
from training.config_validation import ConfigError
from training.schedule import decay_steps


@dataclass(frozen=True)
class Branch:
    """A checkpoint from which a new run decays the learning rate.

    Attributes:
        source: Folder of the run that saved it.
        config: Configuration of the checkpoint, with `run.resume` and `run.branch`.
        step: Number of steps that it has trained.
    """

    source: RunFolder
    config: dict[str, Any]
    step: int

    def set_decay(self, config: dict[str, Any], typed: set[str]) -> None:
        """Let the learning rate decay from this step to the end of the run, in place.

        Unless `train.max_steps` is typed, the decay is `optim.decay_ratio` of the run.

        Args:
            config: Of the new run, with typed values.

        Raises:
            ConfigError: The run ends at this step or before.
        """
        train, optim = config["train"], config["optim"]
        shortest = self.step + 1
        if "train.max_steps" not in typed:
            ratio = min(float(optim["decay_ratio"]), 0.5)
            train["max_steps"] = max(math.ceil(self.step / (1 - ratio)), shortest)
            train["max_tokens"] = None
        steps = train["max_steps"]
        if isinstance(steps, int) and steps < shortest:
            longer = max(math.ceil(self.step / 0.8), shortest)
            raise ConfigError(
                [
                    f"train.max_steps={steps} is not above {self.step}, the step from which "
                    f"run.branch decays the learning rate; use train.max_steps={longer}"
                ]
            )
        optim["decay_start"] = self.step
        if "optim.schedule_steps" not in typed:
            optim["schedule_steps"] = steps


CONFLICTS = {
    "run.resume": "starts from its checkpoint; omit run.resume",
    "run.init_from": "starts from its checkpoint; omit run.init_from",
    "optim.decay_start": "decays from its checkpoint on; omit optim.decay_start",
    "train.max_tokens": "ends after a number of steps; use train.max_steps=N",
}
"""Keys that contradict `run.branch`, with the reason and the remedy."""


def open_branch(text: str, folder: RunFolder, typed: set[str]) -> tuple[RunFolder, Branch | None]:
    """Return the folder of a branch, and its start unless it has checkpoints of its own.

    Args:
        text: `run.branch`: a checkpoint, or a run folder, whose newest checkpoint is used.
        folder: `run.dir`. If it is not typed, the folder of the branch is `RUN-decay`.

    Raises:
        ConfigError: It is no checkpoint of another run with a constant learning rate, or
            contradicts another key.
    """
    if conflicts := CONFLICTS.keys() & typed:
        raise ConfigError(
            [
                f"{key} contradicts run.branch={text}: a branch {CONFLICTS[key]}"
                for key in sorted(conflicts)
            ]
        )
    path = Path(text)
    run = next((each.parent for each in (path, path.parent) if each.name == "checkpoints"), path)
    own = run.parent / f"{run.name}-decay"
    if not typed & {"run.dir", "run.name"}:
        folder = RunFolder(own)
    if run.resolve() == folder.path.resolve():
        raise ConfigError(
            [
                f"run.branch={text} is in run.dir={folder.path}, and a branch is a run of its own; "
                f"use run.dir={own}"
            ]
        )
    if folder.committed_steps():
        last = (folder.last_config() or {}).get("run", {}).get("branch")
        if last != text:
            raise ConfigError(
                [
                    f"run.dir={folder.path} has a run with run.branch={last or 'null'}, not "
                    f"{text}; use another run.dir for this branch"
                ]
            )
        return folder, None
    checkpoint = next(iter(checkpoints_in(path)), None)
    manifest = read_manifest(checkpoint) if checkpoint else None
    if checkpoint is None or manifest is None or "train" not in manifest["config"]:
        raise ConfigError(
            [
                f"run.branch={text} is not a committed checkpoint or a run folder with one; use a "
                "folder like runs/NAME or runs/NAME/checkpoints/step-00000100"
            ]
        )
    config, step = dict(manifest["config"]), int(manifest["position"]["step"])
    if error := _schedule_error(OptimConfig(**config["optim"]), step):
        raise ConfigError([f"run.branch={text} is at step {step} of a run {error}"])
    config["run"] = {**config["run"], "resume": str(checkpoint), "branch": text}
    return folder, Branch(RunFolder(run), config, step)


def _schedule_error(optim: OptimConfig, step: int) -> str:
    """Return an error if the learning rate is not constant at a step, else an empty text."""
    if optim.schedule != "wsd":
        return (
            f"with optim.schedule={optim.schedule}, whose learning rate is never constant; use "
            "run.resume instead, in another run.dir, to continue it with its schedule"
        )
    start = math.floor(decay_steps(optim)[0])
    if optim.warmup_steps <= step <= start:
        return ""
    return (
        f"whose learning rate is constant from step {optim.warmup_steps} to {start}; use a "
        "checkpoint of these steps"
    )
