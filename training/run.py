"""State of one launch: everything that the training loop in `train.py` works with."""

import socket
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.stages import Stage, Stages
from parallel.mesh import MeshShape
from resilience.exit_codes import ExitCode
from resilience.failed_outputs import FailedOutputs
from resilience.processes import Processes
from resilience.run_folder import RunFolder
from training.clock import Clock
from training.config import JobConfig
from training.config_validation import plain
from training.garbage import GarbageCollector
from training.plan_comparison import PlanComparison, comparison_text
from training.resume_policy import Changes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from checkpoint.position import Position
    from checkpoint.saver import Saver
    from data.dataset import WindowDataset
    from data.loader import StepBatches
    from data.stream import StreamDataset
    from parallel.strategy import MeshStrategy
    from resilience.event_log import EventLog
    from resilience.lock import RunLock
    from resilience.loss_monitor import AsyncStatsReader, LossMonitor
    from resilience.replica_check import ReplicaCheck
    from resilience.signals import Requests
    from resilience.watchdog import Watchdog
    from training.console import Console
    from training.metrics import MetricsLog
    from training.stragglers import StragglerMonitor
    from training.throttling import Throttling


@dataclass
class Run:
    """State of one launch.

    Attributes:
        model: Fabric's wrapper of the sharded Llama.
        optimizer: Fabric's wrapper of AdamW.
        lock, event_log, metrics: On rank 0 only.
        replica_check, stragglers: With several processes.
        throttling: On a GPU, from the first logged step on.
        comparison: On rank 0, on hardware that the planner knows.
        n_reruns: Bad steps that were recomputed on other ranks.
        first_step_done: Whether this launch has completed a step.
        save_failed: Whether the last save failed.
        last_metrics: Latest value of each metric.
        failed_outputs: Reports the outputs that cannot be written.
    """

    config: JobConfig
    processes: Processes
    mesh: MeshShape
    fabric: "Fabric"
    strategy: "MeshStrategy"
    model: Any
    optimizer: Any
    dataset: "WindowDataset | StreamDataset"
    position: "Position"
    console: "Console"
    stages: Stages
    requests: "Requests"
    watchdog: "Watchdog"
    saver: "Saver"
    reader: "AsyncStatsReader"
    monitor: "LossMonitor"
    replica_check: "ReplicaCheck | None" = None
    lock: "RunLock | None" = None
    event_log: "EventLog | None" = None
    metrics: "MetricsLog | None" = None
    throttling: "Throttling | None" = None
    comparison: PlanComparison | None = None
    stragglers: "StragglerMonitor | None" = None
    n_reruns: int = 0
    first_step_done: bool = False
    save_failed: bool = False
    clock: Clock = field(init=False)
    garbage: GarbageCollector = field(default_factory=GarbageCollector)
    last_metrics: dict[str, Any] = field(default_factory=dict)
    failed_outputs: FailedOutputs = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.fabric.device.type)
        self.failed_outputs = FailedOutputs(self.folder.path, self.console.note)
        if self.mesh.world_size > 1:
            from training.stragglers import StragglerMonitor

            self.stragglers = StragglerMonitor(self.model.module.layers, self.fabric.device)

    @property
    def folder(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder(Path(self.config.run.dir))

    @property
    def compiled(self) -> bool:
        """Whether the blocks are compiled; `config` keeps `auto`, to resume on another device."""
        return bool(self.config.parallel.resolved(self.fabric.device.type).compile)

    @property
    def data_rank(self) -> int:
        """Index of the part of each batch, out of `mesh.dp`, that this process reads."""
        return self.mesh.data_rank(self.fabric.global_rank)

    @contextmanager
    def optional(self, output: str) -> Iterator[None]:
        """Report an error in output that training does not need, once, and continue."""
        try:
            yield
        except Exception as error:
            with suppress(Exception):  # of the console
                self.failed_outputs.report(output, error)

    def batches(self) -> Generator["StepBatches", None, None]:
        """Iterate over this process's batches from the current position, with prefetching."""
        return self.loader(self.data_rank).steps(self.position.batches, self.position.skips)

    def loader(self, data_rank: int) -> Any:
        """Create the loader of one part of each batch."""
        from data.dataset import WindowDataset
        from data.loader import TrainLoader

        dataset = self.dataset
        data = self.config.data
        options: dict[str, Any] = {
            "rank": data_rank,
            "size": self.mesh.dp,
            "pin_memory": self.fabric.device.type == "cuda",
            "threads": data.loader_threads,
            "prefetch": data.prefetch,
        }
        if isinstance(dataset, WindowDataset):
            options["shuffle_block_tokens"] = data.shuffle_block_tokens
            seed = self.config.run.seed
            return TrainLoader(dataset, self.stages, seed=seed, **options)
        from data.stream import StreamLoader

        positions = self.position.stream_shards
        return StreamLoader(dataset, self.stages.at(0), positions=positions, **options)

    def advance(self, batch: "StepBatches") -> None:
        """Move the position past the step just taken."""
        stage, n_batches = self.stages.at(batch.number), batch.number + 1
        self.position = replace(
            self.position,
            step=self.position.step + 1,
            samples=self.stages.first_sample(n_batches),
            tokens=self.position.tokens + stage.global_batch_size * stage.seq_len,
            stream_shards=batch.stream_positions,
            batches=n_batches,
            monitor_state=None,
        )
        if self.stragglers is not None:
            self.stragglers.end_step()

    def poll_checkpoints(self) -> None:
        """Log the saves that have ended; after a failed one, request a stop if configured."""
        for result in self.saver.poll():
            failed_before, self.save_failed = self.save_failed, result.error is not None
            self.requests.record_save(result.write_seconds)
            if self.comparison is not None:
                self.comparison.save_stall_seconds = result.stall_seconds
            seconds, write_seconds = round(result.stall_seconds, 3), round(result.write_seconds, 3)
            fields = {"step": result.step, "seconds": seconds, "write_seconds": write_seconds}
            if result.error is None:
                self.watchdog.has_saved = True
                self.record("save", path=result.path.name, bytes=result.bytes, **fields)
                continue
            self.record("save_failed", error=result.error, **fields)
            stops = self.config.checkpoint.on_failure == "stop"
            action = "Stopping." if stops else "Continuing (checkpoint.on_failure=continue)."
            if not (stops and failed_before):  # else it was the last save of a run that stops
                self.console.note(
                    f"Could not save a checkpoint at step {result.step}: {result.error}. {action}"
                )
            if stops:
                self.requests.request_stop(ExitCode.SAVE_FAILED)

    def open_logs(self, changes: Changes) -> None:
        """On rank 0, write the configuration and open event log and metrics."""
        from resilience.event_log import EventLog
        from resilience.goodput import launch_times
        from training.metrics import MetricsLog

        if not self.fabric.is_global_zero:
            return
        folder = self.folder
        config = self.config
        step = self.position.step
        note = self.console.note
        last_heartbeat = self.lock.last_heartbeat if self.lock else None
        times: dict[str, Any] = {}
        with self.optional("the times of the last launch"):
            times = launch_times(folder.event_log, folder.metrics, last_heartbeat)
        if (message := folder.write_config(plain(config))) is not None:
            note(message)
        self.event_log = EventLog(folder.event_log, self.failed_outputs)
        self.event_log.repair()
        earlier = self.event_log.read()
        origin = {} if step else {"init_from": config.run.init_from}
        changed = {"changed": changes.free, "allowed": changes.allowed}
        limits = {"time_limits": str(self.watchdog.limits)}
        auto = {"auto": config.parallel.auto_record} if config.parallel.auto else {}
        fields = {**origin, **changed, **times, **limits, **auto}
        self.record("start", step=step, mesh=str(self.mesh), **fields)
        with self.optional("metrics"):
            self.metrics = MetricsLog(
                folder.path,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                run_name=config.run.name,
                run_config=plain(config),
                first_step=step,
                failed=self.failed_outputs,
            )
        with self.optional("missing metrics"):
            self._report_missing_events(earlier)
            self._report_missing_metrics(earlier)

    def _report_missing_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Report an event log without the start of a run that has checkpoints."""
        started = any(event["event"] == "start" for event in events)
        if not started and self.folder.committed_steps():
            self.console.note(
                f"{self.folder.event_log} has no event of earlier launches; goodput is computed "
                "from this launch on. Training is not affected."
            )

    def _report_missing_metrics(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Report once the steps that `metrics.jsonl` has lost.

        Args:
            events: Events of earlier launches.
        """
        from training.metrics_file import newly_missing

        metrics, interval = self.folder.metrics, self.config.log.interval
        missing = newly_missing(metrics, events, self.position.step, interval)
        if missing:
            shown = [f"{first} to {last}" for first, last in missing[:5]]
            more = f" and {len(missing) - 5} other ranges" if len(missing) > 5 else ""
            self.console.note(
                f"{metrics} has lost the metrics of steps {', '.join(shown)}{more}. Training is "
                "not affected."
            )
            self.record("metrics_missing", ranges=missing)

    def draw(self) -> None:
        """On rank 0, redraw the loss curve."""
        if self.metrics is not None:
            self.metrics.plot()

    def log_metrics(self, metrics: dict[str, Any], stage: Stage) -> None:
        """Add the throughput since the last logged step; write to console, files and trackers.

        All ranks call it.
        """
        from training.throughput import build_throughput, pipeline_metrics

        steps, seconds, data_wait_seconds = self.clock.read()
        tokens = steps * stage.global_batch_size * stage.seq_len
        with self.optional("the throughput"):
            throughput = build_throughput(self.config, self.mesh, self.fabric.device, stage.seq_len)
            metrics |= throughput.metrics(tokens, seconds, data_wait_seconds, steps)
        if self.strategy.pipeline is not None:
            metrics |= pipeline_metrics(self.strategy.pipeline, self.fabric.device)
        compared: dict[str, float] = {}
        if self.comparison is not None:
            compared = self.comparison.fields(stage, steps, self.clock.newest_steps)
            metrics |= compared
        self.last_metrics |= metrics
        with self.optional("metrics on the console"):
            self.console.log(metrics)
            if compared and self.comparison is not None:
                self.console.note(comparison_text(metrics, stage, self.comparison.process_gib))
        if self.metrics is not None:
            with self.optional("metrics"):
                self.metrics.write(metrics)
        if self.fabric.device.type == "cuda":
            with self.optional("warnings about clocks"):
                self.warn_about_clocks()
        if self.stragglers is not None and (warning := self.stragglers.warning()):
            self.console.note(warning)

    def warn_about_clocks(self) -> None:
        """Print a warning of this rank, which may be any, if the clocks of its GPU are reduced."""
        from training.throttling import Throttling

        self.throttling = self.throttling or Throttling(self.fabric.device)
        warning = self.throttling.warning(self.fabric.global_rank, socket.gethostname())
        if warning is not None and self.fabric.is_global_zero:
            self.console.note(warning)
        elif warning is not None:
            print(warning, file=sys.stderr, flush=True)

    def record_progress(self, now: bool = False) -> None:
        """On rank 0, record step and time spent: after the first step, periodically, or `now`."""
        is_first, self.first_step_done = not self.first_step_done, True
        if self.event_log is None:
            return
        if is_first:
            self.record("trained", step=self.position.step, **self.clock.spent())
        else:
            self.event_log.progress(self.position.step, self.clock.spent(), now=now)

    def record(self, event: str, **fields: Any) -> None:
        """On rank 0, write an event to the event log."""
        if self.event_log is not None:
            self.event_log.append(event, **fields)


def build_saver(
    config: JobConfig, dataset: "WindowDataset | StreamDataset", report: Callable[[str], None]
) -> "Saver":
    """Create the saver of a run; every checkpoint includes the tokenizer of the data, if any.

    Raises:
        RunFolderError: On rank 0: the identity of the run cannot be written.
    """
    import torch.distributed as dist

    from checkpoint.saver import Saver
    from resilience.run_identity import establish_identity

    folder = RunFolder(Path(config.run.dir))
    tokenizer = dataset.tokenizer()
    files = {} if tokenizer is None else tokenizer.files()
    run_id = establish_identity(folder, config.run.adopt).id if dist.get_rank() == 0 else ""
    return Saver(folder, run_id, config.checkpoint, plain(config), report, files)


def build_replica_check(
    config: JobConfig, mesh: MeshShape, model: Any, optimizer: Any
) -> "ReplicaCheck | None":
    """Create the comparison of replicated state, which one process does not have."""
    interval = config.faults.replica_check_interval
    if mesh.world_size == 1 or interval is None:
        return None
    from resilience.replica_check import ReplicaCheck

    return ReplicaCheck(model, optimizer, interval, mesh)
