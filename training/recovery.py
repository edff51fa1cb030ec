"""Initial position of a launch, actions after each step, and rewinds.

Only rank 0 reads and writes `rewinds.json`; it broadcasts the result, so that all ranks resume
from the same checkpoint, exclude the same batches and stop after the same step.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resilience.exit_codes import ExitCode
from resilience.rewinds import (
    FILE_NAME,
    last_step_before,
    merge_ranges,
    open_rewinds,
    unfinished_rewind,
    write_rewinds,
)
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoint.position import Position
    from data.dataset import WindowDataset
    from data.stream import StreamDataset
    from resilience.loss_monitor import StepStats
    from resilience.replica_check import ReplicaCheck
    from resilience.rewinds import BatchRange


Report = Callable[[str], None]
MAX_RERUNS = 3  # in a launch; each takes two forward passes


class Decision(NamedTuple):
    """What all ranks do after a step.

    Attributes:
        rewind: Rewind and exclude these batches.
        reload: Restore the newest checkpoint, because the state is corrupted.
        save: Save a checkpoint.
        stop: Stop with this exit code, for `reason`.
    """

    rewind: "BatchRange | None" = None
    reload: bool = False
    save: bool = False
    stop: ExitCode | None = None
    reason: str = ""

    def merge(self, later: "Decision") -> "Decision":
        """Return this decision, with fields that are not set taken from a later one."""
        return Decision(
            rewind=self.rewind or later.rewind,
            reload=self.reload or later.reload,
            save=self.save or later.save,
            stop=self.stop or later.stop,
            reason=self.reason or later.reason,
        )


def initial_position(
    config: JobConfig,
    llama: Any,
    optimizer: Any,
    dataset: "WindowDataset | StreamDataset",
    report: Report,
) -> "Position":
    """Load or initialize model and optimizer for this launch, and return its position.

    Raises:
        RewindsError: The batches that earlier rewinds excluded are unknown.
        RunFolderError: Checkpoints exist, and none of those to resume from is valid.
        FormatError: The initial weights cannot be read.
    """
    from checkpoint.writer import on_rank_0

    def read() -> "tuple[list[BatchRange], int | None, str | None]":
        rewinds, message = open_rewinds(folder, FILE_NAME in config.run.allow_changes)
        return rewinds, unfinished_rewind(folder, rewinds), message

    folder = RunFolder(Path(config.run.dir))
    rewinds, before, message = on_rank_0(read, wrap=lambda error: error, catch=(RunFolderError,))
    if message is not None:
        report(message)
    position = _load_or_initialize(config, llama, optimizer, dataset, report, before)
    return _with_rewinds(position, rewinds)


def _with_rewinds(position: "Position", rewinds: "Sequence[BatchRange]") -> "Position":
    """Return the position with the rewinds of this run, without those of the run it started from.

    Batches that the other run excluded remain in `skips`.
    """
    skips = merge_ranges([*position.skips, *rewinds])
    return dataclasses.replace(position, skips=skips, rewinds=tuple(rewinds))


def _load_or_initialize(
    config: JobConfig, llama: Any, optimizer: Any, dataset: Any, report: Report, before: int | None
) -> "Position":
    """Load the newest valid checkpoint, of step `before` at most, or initialize the weights."""
    import torch.distributed as dist

    from checkpoint.position import Position
    from checkpoint.restore import restore
    from checkpoint.retention import remove_beyond
    from parallel.data_parallel import free_gathered_weights
    from parallel.parallelize import initialize_weights
    from resilience.run_identity import establish_identity

    folder = RunFolder(Path(config.run.dir))
    source: str | None = folder.resume_source(config.run.resume)
    position = None
    if before is not None or source in ("auto", "never"):
        position = restore(folder, "auto", llama, optimizer, report, before)
        source = folder.origin(config.run.resume)
    if position is None and source is not None:
        position = restore(folder, source, llama, optimizer, report)
    if position is None:
        optimizer.state.clear()
        free_gathered_weights(llama)  # DCP does it in loading
        if config.run.init_from is None:
            initialize_weights(llama, config.model, config.run.seed)
        else:
            from formats.detection import agreed_weights
            from formats.weights import load_weights

            load_weights(llama, agreed_weights(Path(config.run.init_from)))
        position = Position(step=0, samples=0, tokens=0, data_hash=dataset.hash)
    if before is not None and dist.get_rank() == 0:
        run_id = establish_identity(folder, config.run.adopt).id
        for error in remove_beyond(folder, run_id, position.step):
            report(error)
    return position.with_data(dataset.hash)


def check_step(run: Run, batch: int, scalars: "Tensor", saves: bool) -> Decision:
    """Return the action agreed by all ranks after this step: continue, save, rewind or stop.

    Args:
        batch: Index of the batch of the step in the sample order.
        scalars: (2 + n_requests) the step's scalars, on the device.
        saves: Whether a checkpoint is due. All pending steps are then checked first, so that no
            checkpoint contains an unchecked step; also after the first step, which ends the set-up.
    """
    samples = run.stages.first_sample(batch), run.stages.first_sample(batch + 1)
    decision = _decide(run, run.reader.read(run.position.step, batch, samples, scalars))
    if saves or decision.save or decision.stop or not run.first_step_done:
        decision = decision.merge(_decide(run, run.reader.flush()))
    if run.replica_check is not None and decision.rewind is None:
        step = run.position.step
        if run.replica_check.is_due(step) or saves or decision.save or decision.stop:
            decision = _compare_replicas(run, run.replica_check, decision)
        run.replica_check.prepare(step + 1)
    return decision


def _compare_replicas(run: Run, check: "ReplicaCheck", decision: Decision) -> Decision:
    """Return the decision if the state is equal on all ranks that hold copies of it.

    Otherwise the state is restored; the run stops if a host is named again or was to stop anyway.
    """
    difference = check.compare()
    if difference is None:
        return decision
    code = int(ExitCode.CORRUPTION)
    fields = {"ranks": difference.ranks, "hosts": difference.hosts, "code": code}
    run.record("fault", step=run.position.step, reason=str(difference), **fields)
    run.console.note(str(difference))
    again = check.reported_hosts & set(difference.hosts)
    check.reported_hosts |= set(difference.hosts)
    if again or decision.stop:
        return Decision(stop=ExitCode.CORRUPTION, reason=difference.advice())
    return Decision(reload=True)


def _decide(run: Run, steps: "Iterable[StepStats]") -> Decision:
    """Check steps, log the monitor's messages, and combine its action with the requests."""
    from resilience.signals import agree

    decision = Decision()
    for stats in steps:
        action = run.monitor.check(stats)
        if action.message is not None:
            run.console.note(action.message)
        if action.event is not None:
            run.record(action.event, **dict(action.fields or {}))
        if action.event in ("skip", "spike") and run.n_reruns < MAX_RERUNS:
            from training.rerun import rerun

            run.n_reruns += 1
            if reason := rerun(run, stats):
                return Decision(stop=ExitCode.CORRUPTION, reason=reason)
        if action.abort is not None:
            return Decision(stop=ExitCode.DIVERGED, reason=action.abort)
        if action.rewind is not None:
            return Decision(rewind=action.rewind)
        stop, save = agree(stats.requests)
        decision = Decision(save=decision.save or save, stop=decision.stop or stop)
    return decision


def rewind(run: Run, skip: "BatchRange") -> None:
    """Restore the newest checkpoint before batch `skip[0]` and exclude the batches in `skip`.

    The decision is durable before anything changes, so that a kill cannot undo it.

    Raises:
        RunFolderError: No checkpoint before it is valid, or `rewinds.json` cannot be written.
    """
    before = last_step_before(skip[0], run.position.skips)
    _finish_pending(run)
    previous_step = run.position.step
    rewinds = [*run.position.rewinds, skip]
    _record_rewind(run, rewinds)
    fields = {"step": previous_step, "skip": list(skip), "before": before}
    run.record("rewind", number=len(rewinds), **fields)
    _restore(run, before, rewinds)
    run.console.note(
        f"Rewound to step {run.position.step}; excluding batches {skip[0]} to {skip[1] - 1}."
    )


def reload(run: Run) -> None:
    """Restore the newest checkpoint, whose state was equal on all ranks when it was saved.

    Raises:
        RunFolderError: Checkpoints exist, and none is valid.
    """
    _finish_pending(run)
    _restore(run, None, run.position.rewinds)
    run.console.note(f"Restored step {run.position.step}, and repeating the steps after it.")


def _finish_pending(run: Run) -> None:
    """Discard the values of the steps that are repeated, and finish the running save."""
    with run.clock.drain():
        run.reader.flush()
    run.saver.finish()
    run.poll_checkpoints()


def _restore(run: Run, before: int | None, rewinds: "Sequence[BatchRange]") -> None:
    """Restore the newest checkpoint, of step `before` at most, or initialize the weights."""
    previous_step, report = run.position.step, run.console.note
    model, optimizer = run.model.module, run.optimizer.optimizer
    position = _load_or_initialize(run.config, model, optimizer, run.dataset, report, before)
    run.position = _with_rewinds(position, rewinds)
    run.monitor.restore(position.monitor_state, len(rewinds))
    run.record("rewound", step=previous_step, to=position.step, **run.clock.spent())
    if run.metrics is not None:
        run.metrics.truncate(position.step)


def _record_rewind(run: Run, rewinds: "list[BatchRange]") -> None:
    """Write `rewinds.json`; if rank 0 cannot, all ranks raise RunFolderError."""
    from checkpoint.writer import on_rank_0

    on_rank_0(
        lambda: write_rewinds(run.folder, rewinds),
        wrap=lambda error: error,
        catch=(RunFolderError,),
    )
