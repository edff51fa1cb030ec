"""W&B beside the training loop: a thread of its own talks to it, so that no network stops a step.

What it does not take in time is left out; a failure ends it, and is told with the next figures.
"""

import importlib.util
import queue
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_WAITING = 10_000  # records kept while W&B does not answer
FINISH_SECONDS = 60.0  # for what is still to be sent when a run ends


def tracker_errors(wandb: str | None) -> list[str]:
    """What a run should refuse before its launch: a tracker that is asked for, not installed."""
    spec = importlib.util.find_spec("wandb") if wandb is not None else None
    # W&B leaves a folder `wandb` where it runs, which Python takes for a package without origin.
    if wandb is not None and (spec is None or spec.origin is None):
        return [
            f"log.wandb ({wandb}) needs the package wandb, which is not installed: "
            "pip install 'llamesh[wandb]', or set log.wandb=null"
        ]
    return []


class Tracker:
    """One start of a run in W&B; no method raises, waits for long, or talks to the network."""

    def __init__(
        self, folder: Path, project: str, run_name: str, config: dict[str, Any], first_step: int
    ) -> None:
        self._folder, self._project, self._run_name = folder, project, run_name
        self._config, self._first_step = config, first_step
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_WAITING)
        self._failure: object = None
        self._thread = threading.Thread(target=self._talk, name="W&B", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands over the figures of a step."""
        try:
            self._records.put_nowait({k: v for k, v in record.items() if v is not None})
        except queue.Full:
            self._failure = self._failure or "it does not answer"

    def failure(self) -> object:
        """Why it failed, or None."""
        return self._failure

    def finish(self, seconds: float | None = None) -> None:
        """Ends it, once it has taken everything, or after `seconds` (default: a minute)."""
        seconds = FINISH_SECONDS if seconds is None else seconds
        if not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._records.put(None, timeout=seconds)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._failure = self._failure or f"it did not end within {seconds:g} seconds"

    def _talk(self) -> None:
        """What the thread does."""
        try:
            run = self._begin()
            while (record := self._records.get()) is not None:
                run.log(record)
            run.finish()
        except Exception as error:
            self._failure = error

    def _begin(self) -> Any:
        """Opens the run in W&B."""
        if problems := tracker_errors(self._project):
            raise ImportError(problems[0])
        import wandb

        run = wandb.init(
            project=self._project,
            name=self._run_name,
            config=self._config,
            dir=str(self._folder),
            id=self._id(),
            resume="allow",
            # Standard output is the console's; half a minute is what a start may wait for.
            settings=wandb.Settings(console="off", quiet=True, init_timeout=30, login_timeout=30),
        )
        # Our own step as the axis: W&B's must only grow, ours goes back after a kill.
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        """The W&B run that this run goes on with: kept in the folder, new for a new run."""
        path = self._folder / "wandb" / "run_id"
        if self._first_step > 0 and path.exists():
            return path.read_text().strip()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
        return path.read_text()
