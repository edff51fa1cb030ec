"""Metrics of a run: their definitions, their values at a logged step, and the log writers.

A metric is a row in `METRICS` with its value in `step_metrics` (rates and memory: in
`training.throughput`). It appears in `metrics.jsonl`, TensorBoard and W&B, and on the console if it
has a column.
`MetricsLog` exists on rank 0 only and never stops training: a full disk, a missing package or an
unreachable server is reported once.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import set_aside_other_kind
from parallel.step_scalars import StepScalars
from resilience.event_log import RetryingWriter, json_line
from resilience.failed_outputs import FailedOutputs
from training.metrics_file import truncate_records

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoint.position import Position


@dataclass(frozen=True)
class Metric:
    """A field of a metrics record.

    Attributes:
        key: Name in `metrics.jsonl`, TensorBoard and W&B.
        column: Console heading, or None to omit the metric from the console.
        spec: Format specification on the console; "compact" gives 12.3k.
        optional: Whether the console leaves a missing value blank instead of printing "-".
        of_pipeline: Whether only runs with pipeline stages have it; others have no column.
    """

    key: str
    column: str | None = None
    spec: str = ""
    optional: bool = False
    of_pipeline: bool = False


METRICS = (
    Metric("step"),
    Metric("samples"),
    Metric("tokens"),
    Metric("loss", "loss", ".4f"),
    Metric("grad_norm", "grad norm", ".3f"),
    Metric("lr", "lr", ".2e"),
    Metric("tokens_per_second", "tokens/s", "compact"),
    Metric("tflops"),
    Metric("mfu_causal"),
    Metric("mfu_full"),
    Metric("peak_memory_gib"),
    Metric("step_seconds"),
    Metric("data_wait_seconds"),
    Metric("batch_hash"),
    Metric("bubble_share", "bubble", ".1%", of_pipeline=True),
    Metric("slowest_stage", "slowest", "d", of_pipeline=True),
    Metric("peak_memory_gib_by_stage", of_pipeline=True),
    Metric("val_loss", "val loss", ".4f", optional=True),
)

TENSORBOARD_RETRY_SECONDS = 60.0


def step_metrics(
    position: "Position", tensors: "dict[str, Tensor]", lr: float, compiled: bool
) -> dict[str, Any]:
    """Return the metrics of the step that reached `position`, waiting for the device."""
    from parallel.compilation import compiled_graphs

    scalars = StepScalars.from_tensor(tensors["scalars"])
    return {
        "step": position.step,
        "samples": position.samples,
        "tokens": position.tokens,
        "loss": scalars.loss,
        "grad_norm": scalars.grad_norm,
        "lr": lr,
        "batch_hash": f"{tensors['batch_hash'].item() % 2**32:08x}",
    } | ({"compiled_graphs": compiled_graphs()} if compiled else {})


class MetricsLog:
    """Write metrics to the run folder and to trackers.

    No method raises because of a disk or a tracker, or waits for one; failures are passed to
    `failed`. After a failure of `metrics.jsonl`, records are kept and written once the
    disk has space again; TensorBoard is reopened after `TENSORBOARD_RETRY_SECONDS`.

    Args:
        wandb: W&B project, or None to disable it.
        first_step: Steps completed before this launch. Records beyond it are removed.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        wandb: str | None,
        run_name: str,
        run_config: dict[str, Any],
        first_step: int,
        failed: FailedOutputs,
    ) -> None:
        self.folder, self.path, self.run_name = folder, folder / "metrics.jsonl", run_name
        self.failed = failed
        self._lines = RetryingWriter(self.path)
        self._use_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._tensorboard_retry_at = 0.0
        self._wandb: Any = None
        if tensorboard:
            threading.excepthook = partial(_drop_tensorboard_error, threading.excepthook)
        for name, is_folder in (("samples.txt", False), ("loss.png", False), ("tensorboard", True)):
            with self._warn_on_error(name):
                if name == "samples.txt" and (folder / name).is_fifo():
                    continue  # a program that the user runs reads the samples
                if (aside := set_aside_other_kind(folder / name, is_folder)) is not None:
                    kind = "folder" if is_folder else "regular file"
                    failed.warn(f"{folder / name} is not a {kind} and is kept as {aside.name}.")
        self.truncate(first_step)
        if wandb is not None:
            with self._warn_on_error("W&B"):
                from training.wandb_logger import WandbLogger

                self._wandb = WandbLogger(folder, wandb, run_name, run_config, first_step)

    def truncate(self, last_step: int) -> None:
        """Remove records beyond `last_step`, when a run resumes or rewinds."""
        with self._warn_on_error("metrics.jsonl"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if (message := truncate_records(self.path, last_step)) is not None:
                self.failed.warn(message)
        self._close_tensorboard()
        if self._use_tensorboard:
            self._open_tensorboard(last_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the metrics of one step; only `step` is required.

        Keys follow the order of `METRICS`; others come last.
        """
        record = {m.key: record[m.key] for m in METRICS if m.key in record} | dict(record)
        with self._warn_on_error("metrics.jsonl"):
            self._lines.append(json_line(record))
        # Trackers draw NaN and infinity as points or refuse them; metrics.jsonl records them.
        record = {
            key: value
            for key, value in record.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        if self._use_tensorboard:
            self._write_tensorboard(record)
        if self._wandb is not None:
            self._wandb.log(record)
            self._check_wandb()

    def write_sample(self, step: int, text: str) -> None:
        """Append generated text to `samples.txt` under a line with its step."""
        with (
            self._warn_on_error("samples.txt"),
            open(
                self.folder / "samples.txt", "a", encoding="utf-8", opener=_open_without_waiting
            ) as file,
        ):
            file.write(f"--- step {step} ---\n{text}\n\n")

    def plot(self) -> None:
        """Redraw `loss.png` from `metrics.jsonl`."""
        with self._warn_on_error("loss.png"):
            from training.loss_plot import plot_loss

            plot_loss(self.path, self.folder / "loss.png", self.run_name)

    def close(self) -> None:
        """Close the trackers. Calling it twice, or never (after a kill), loses nothing."""
        self._use_tensorboard = False
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
            self._check_wandb()
        self._wandb = None

    def _open_tensorboard(self, last_step: int) -> None:
        """Open a new event file, which hides events of older files past `last_step`."""
        with self._warn_on_error("TensorBoard"):
            from torch.utils.tensorboard import SummaryWriter

            purge = last_step + 1 if last_step > 0 else 0
            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)

    def _write_tensorboard(self, record: Mapping[str, Any]) -> None:
        # While the disk rejects metrics.jsonl, TensorBoard would fail as well.
        retry = not self._lines.pending and time.monotonic() >= self._tensorboard_retry_at
        if self._tensorboard is None and retry:
            self._open_tensorboard(record["step"] - 1)
        if self._tensorboard is None:
            return
        with self._warn_on_error("TensorBoard"):
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, record["step"])
            self._tensorboard.flush()  # a kill loses no event, and write errors surface here

    def _close_tensorboard(self) -> None:
        writer, self._tensorboard = self._tensorboard, None
        if writer is not None:
            with self._warn_on_error("TensorBoard"):
                writer.close()

    @contextmanager
    def _warn_on_error(self, target: str) -> Iterator[None]:
        """Report an error once per target and continue; TensorBoard is closed for a while."""
        try:
            yield
        except Exception as error:
            if target == "TensorBoard":
                self._tensorboard = None
                self._tensorboard_retry_at = time.monotonic() + TENSORBOARD_RETRY_SECONDS
            self.failed.report(target, error)

    def _check_wandb(self) -> None:
        if self._wandb.failure is not None:
            self.failed.report("W&B", self._wandb.failure)
            self._wandb = None


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe without a reader is an error instead of blocking the run."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _drop_tensorboard_error(report: Callable[[Any], object], error: Any) -> None:
    """Report an error of a thread, unless it is TensorBoard's, whose `flush` raises it again."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        report(error)
