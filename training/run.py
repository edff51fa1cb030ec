"""One start of a run: everything that the loop in `train.py` works with."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.stages import Stages
from parallel.mesh import MeshShape, Processes
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder
from training.clock import Clock
from training.config import JobConfig
from training.config_validation import plain
from training.garbage import GarbageCollector
from training.resume_policy import Changes

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from checkpoint.position import Position
    from checkpoint.saver import Saver
    from data.dataset import Dataset
    from data.loader import StepBatches
    from data.stream import StreamDataset
    from parallel.strategy import MeshStrategy
    from resilience.event_log import Ledger
    from resilience.goodput import Goodput
    from resilience.lock import RunLock
    from resilience.loss_monitor import AsyncStatsReader, LossMonitor
    from resilience.signals import Requests
    from resilience.watchdog import Watchdog
    from training.console import Console
    from training.metrics import MetricsLog


@dataclass
class Run:
    """Everything that one start of a run works with."""

    config: JobConfig
    processes: Processes
    mesh: MeshShape
    fabric: "Fabric"
    strategy: "MeshStrategy"
    model: Any  # Fabric's wrapper around the sharded Llama
    optimizer: Any  # Fabric's wrapper around AdamW
    dataset: "Dataset | StreamDataset"
    position: "Position"
    console: "Console"
    stages: Stages
    requests: "Requests"
    watchdog: "Watchdog"
    saver: "Saver"
    reader: "AsyncStatsReader"
    monitor: "LossMonitor"
    lock: "RunLock | None" = None  # rank 0 alone holds it
    ledger: "Ledger | None" = None  # rank 0 alone writes ledger and figures
    metrics: "MetricsLog | None" = None
    trained: bool = False  # the first step of this start is done
    unsaved: bool = False  # the last save failed
    clock: Clock = field(default_factory=Clock)
    garbage: GarbageCollector = field(default_factory=GarbageCollector)
    last_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> RunFolder:
        """Where everything of the run lies."""
        return RunFolder(Path(self.config.run.dir))

    @property
    def validation_batch_size(self) -> int:
        """Held-out sequences that a data rank computes at a time."""
        train = self.config.train
        return train.micro_batch_size or train.global_batch_size // self.mesh.dp

    @property
    def data_rank(self) -> int:
        """Which of the mesh's `dp` shares of a batch this process reads."""
        return self.mesh.data_rank(self.fabric.global_rank)

    def batches(self) -> Generator["StepBatches", None, None]:
        """This process's batches of every step from the run's position on, read ahead."""
        from data.loader import TrainLoader
        from data.stream import StreamDataset, StreamLoader

        data, rank, size = self.config.data, self.data_rank, self.mesh.dp
        on_gpu = self.fabric.device.type == "cuda"
        if isinstance(self.dataset, StreamDataset):
            return StreamLoader(
                self.dataset,
                self.stages.at(0),
                rank=rank,
                size=size,
                places=self.position.lanes,
                pin_memory=on_gpu,
                threads=data.loader_threads,
                prefetch=data.prefetch,
            ).steps(self.position.batches, self.position.skips)
        return TrainLoader(
            self.dataset,
            self.stages,
            seed=self.config.run.seed,
            rank=rank,
            size=size,
            shuffle_block_tokens=data.shuffle_block_tokens,
            pin_memory=on_gpu,
            threads=data.loader_threads,
            prefetch=data.prefetch,
        ).steps(self.position.batches, self.position.skips)

    def advance(self, taken: "StepBatches") -> None:
        """Moves the position past the step just taken."""
        stage, behind = self.stages.at(taken.number), taken.number + 1
        self.position = self.position.after(
            batches=behind,
            samples=self.stages.first_sample(behind),
            tokens=stage.global_batch_size * stage.seq_len,
            lanes=taken.lanes,
        )

    def poll_checkpoints(self) -> None:
        """Takes notice of the saves that have ended since; a failed one may ask the run to stop."""
        for saved in self.saver.poll():
            self.unsaved = saved.error is not None
            self.requests.note_save(saved.write_seconds)
            seconds = {"seconds": saved.stall_seconds, "write_seconds": saved.write_seconds}
            seconds = {key: round(value, 3) for key, value in seconds.items()}
            if saved.error is None:
                self.watchdog.has_saved = True
                named = {"path": saved.path.name, "bytes": saved.bytes}
                self.record("save", step=saved.step, **named, **seconds)
                continue
            self.record("save_failed", step=saved.step, error=saved.error, **seconds)
            stops = self.config.checkpoint.on_failure == "stop"
            then = "stopping" if stops else "training goes on (checkpoint.on_failure=continue)"
            self.console.note(f"Step {saved.step} could not be saved: {saved.error}; {then}")
            if stops:
                self.requests.ask(ExitCode.SAVE_FAILED)

    def open_logs(self, changes: Changes) -> None:
        """Writes the configuration and opens ledger and figures, on rank 0."""
        from resilience.event_log import Ledger
        from resilience.goodput import signs_of_life
        from training.metrics import MetricsLog

        if not self.fabric.is_global_zero:
            return
        metrics = self.folder.path / "metrics.jsonl"
        last_beat = self.lock.last_beat if self.lock else None
        life = signs_of_life(self.folder.ledger, metrics, last_beat)
        self.folder.write_config(plain(self.config))
        self.ledger = Ledger(self.folder.ledger, self.console.note)
        self.record(
            "start",
            step=self.position.step,
            mesh=str(self.mesh),
            **({} if self.position.step else {"init_from": self.config.run.init_from}),
            changed=changes.free,
            allowed=changes.allowed,
            **life,
        )
        self.metrics = MetricsLog(
            self.folder.path,
            self.config.log.tensorboard,
            self.config.log.wandb,
            run_name=self.config.run.name,
            run_config=plain(self.config),
            first_step=self.position.step,
            warn=self.console.note,
        )

    def truncate_metrics(self) -> None:
        """Drops what the figures tell beyond the run's position, on rank 0."""
        if self.metrics is not None:
            self.metrics.truncate(self.position.step)

    def draw(self) -> None:
        """Redraws the loss curve, on rank 0."""
        if self.metrics is not None:
            self.metrics.plot()

    def tell_progress(self, now: bool = False) -> None:
        """Tells the ledger how far this start is, and where its time went: rank 0, now and then."""
        if self.ledger is None:
            return
        if not self.trained:
            self.trained = True
            self.record("trained", step=self.position.step, **self.clock.spent())
        else:
            self.ledger.progress(self.position.step, self.clock.spent(), now=now)

    def goodput(self) -> "Goodput | None":
        """Where the time of the run went until now, over all its starts; on rank 0."""
        from resilience.goodput import account

        if self.ledger is None:
            return None
        return account(self.ledger.read(), alive_until=datetime.now(UTC))

    def record(self, event: str, **fields: Any) -> None:
        """Writes an event to the ledger, on rank 0."""
        if self.ledger is not None:
            self.ledger.append(event, **fields)


def saver_of(
    config: JobConfig, dataset: "Dataset | StreamDataset", note: Callable[[str], None]
) -> "Saver":
    """What saves the checkpoints of a run, each with the tokenizer of its data."""
    from checkpoint.saver import Saver

    folder, beside = RunFolder(Path(config.run.dir)), dataset.tokenizer().files()
    return Saver(folder, config.checkpoint, plain(config), note, beside)
