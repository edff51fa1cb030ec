"""Weights & Biases logging in a background thread, so that the network never delays a step.

Records that W&B does not accept in time are dropped. A failure stops the logging and is kept in
`WandbLogger.failure`; `training.metrics` reports it.
"""

import queue
import re
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.files import read_file, set_aside_other_kind

MAX_QUEUED = 10_000  # records kept while W&B does not respond
TIMEOUTS = {"init_timeout": 30, "login_timeout": 30}  # seconds
FINISH_SECONDS = 60.0  # time to send the remaining records at the end of a run


class WandbLogger:
    """W&B logging of one launch. No method raises or accesses the network."""

    def __init__(
        self, folder: Path, project: str, run_name: str, config: dict[str, Any], first_step: int
    ) -> None:
        self._folder, self._project, self._run_name = folder, project, run_name
        self._config, self._first_step = config, first_step
        self._records: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self.failure: BaseException | str | None = None
        """Reason of the first failure, or None."""
        self._thread = threading.Thread(target=self._send, name="W&B", daemon=True)
        self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue the metrics of one step, without those that are None."""
        try:
            self._records.put_nowait({k: v for k, v in record.items() if v is not None})
        except queue.Full:
            self.failure = self.failure or "it does not respond"

    def finish(self) -> None:
        """Send the remaining records and finish, within `FINISH_SECONDS`."""
        if not self._thread.is_alive():
            return
        with suppress(queue.Full):
            self._records.put(None, timeout=FINISH_SECONDS)
        self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self.failure = self.failure or f"it did not finish within {FINISH_SECONDS:g} seconds"

    def _send(self) -> None:
        try:
            import wandb

            run = wandb.init(
                project=self._project,
                name=self._run_name,
                config=self._config,
                dir=str(self._folder),
                id=self._run_id(),
                resume="allow",
                settings=wandb.Settings(console="off", quiet=True, **TIMEOUTS),
            )
            # The x-axis is our step, which may decrease after a kill or rewind; W&B's may not.
            run.define_metric("*", step_metric="step")
            while (record := self._records.get()) is not None:
                run.log(record)
            run.finish()
        except Exception as error:
            self.failure = error

    def _run_id(self) -> str:
        """Return the W&B run ID from the run folder when resuming, otherwise a new one.

        A damaged ID, or what is not a file, is replaced. If the disk is full, the ID is not kept.
        """
        path = self._folder / "wandb" / "run_id"
        with suppress(OSError, ValueError):  # ValueError: not UTF-8
            saved = read_file(path).decode().strip()
            if self._first_step > 0 and re.fullmatch(r"[\w-]{1,64}", saved, re.ASCII):
                return saved
        new = secrets.token_hex(4)
        with suppress(OSError):
            set_aside_other_kind(path.parent, is_folder=True)
            set_aside_other_kind(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, encoding="utf-8")
        return new
