"""Initial position of a launch, actions after each step, and rewinds.

Only rank 0 reads and writes the event log; it broadcasts the result, so that all ranks resume
from the same checkpoint, exclude the same batches and stop after the same step.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import write_problem
from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from checkpoint.position import Position
    from data.dataset import WindowDataset
    from data.stream import StreamDataset
    from resilience.loss_monitor import BatchRange, StepStats


Report = Callable[[str], None]


class Decision(NamedTuple):
    """What all ranks do after a step: rewind and exclude batches, save, stop, or continue."""

    rewind: "BatchRange | None" = None
    save: bool = False
    stop: ExitCode | None = None
    reason: str = ""

    def merge(self, later: "Decision") -> "Decision":
        """Return this decision, with fields that are not set taken from a later one."""
        return Decision(
            rewind=self.rewind or later.rewind,
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
) -> "tuple[Position, list[BatchRange]]":
    """Load or initialize model and optimizer for this launch.

    Returns:
        Its position, and the batches excluded by each rewind of earlier launches.

    Raises:
        RunFolderError: Checkpoints exist, and none of those to resume from is valid.
        FormatError: The initial weights cannot be read.
    """
    import torch.distributed as dist

    from resilience.event_log import read_json_lines
    from resilience.loss_monitor import merge_ranges, read_rewinds

    history: list[Any] = [[], None]  # rewinds, and the last step an unfinished one may restore
    if dist.get_rank() == 0:
        events = read_json_lines(RunFolder(Path(config.run.dir)).event_log)
        # A `start` after a rewind means that the rewind was completed before it was recorded.
        kinds = ("rewind", "rewound", "start")
        relevant = [event for event in events if event.get("event") in kinds]
        unfinished = relevant and relevant[-1]["event"] == "rewind"
        history = [read_rewinds(events), relevant[-1]["before"] if unfinished else None]
    dist.broadcast_object_list(history)
    rewinds, before = history
    position = _load_or_initialize(config, llama, optimizer, dataset, report, before)
    skips = merge_ranges([*position.skips, *rewinds])
    return dataclasses.replace(position, skips=skips), rewinds


def _load_or_initialize(
    config: JobConfig, llama: Any, optimizer: Any, dataset: Any, report: Report, before: int | None
) -> "Position":
    """Load the newest valid checkpoint, of step `before` at most, or initialize the weights."""
    import torch.distributed as dist

    from checkpoint.position import Position
    from checkpoint.restore import restore
    from checkpoint.retention import remove_beyond
    from parallel.parallelize import initialize_weights

    folder = RunFolder(Path(config.run.dir))
    source = folder.resume_source(config.run.resume)
    is_path = source not in ("auto", "never")
    position = None
    if before is not None or not is_path:
        position = restore(folder, "auto", llama, optimizer, report, before)
    if position is None and is_path:
        position = restore(folder, source, llama, optimizer, report)
    if position is None:
        optimizer.state.clear()
        if config.run.init_from is None:
            initialize_weights(llama, config.model, config.run.seed)
        else:
            from formats.detection import agreed_weights
            from formats.weights import load_weights

            load_weights(llama, agreed_weights(Path(config.run.init_from)))
        position = Position(step=0, samples=0, tokens=0, data_hash=dataset.hash)
    if before is not None and dist.get_rank() == 0:
        for error in remove_beyond(folder, position.step):
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
    return decision


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
        RunFolderError: No checkpoint before it is valid, or the event log cannot be written.
    """
    from resilience.loss_monitor import merge_ranges

    first, _ = skip
    excluded = (min(stop, first) - start for start, stop in run.position.skips if start < first)
    before = first - sum(excluded)  # steps done when that batch was taken
    with run.clock.drain():
        run.reader.flush()  # discards the steps that are rewound
    run.saver.finish()
    run.poll_checkpoints()
    previous_step = run.position.step
    _record_rewind(run, {"step": previous_step, "skip": list(skip), "before": before})
    skips = merge_ranges([*run.position.skips, skip])
    model, optimizer = run.model.module, run.optimizer.optimizer
    note = run.console.note
    position = _load_or_initialize(run.config, model, optimizer, run.dataset, note, before)
    run.position = dataclasses.replace(position, skips=skips)
    run.monitor.reset_after_rewind(position.monitor_state)
    run.record("rewound", step=previous_step, to=position.step, **run.clock.spent())
    note(f"Rewound to step {position.step}; excluding batches {skip[0]} to {skip[1] - 1}.")
    if run.metrics is not None:
        run.metrics.truncate(position.step)


def _record_rewind(run: Run, fields: dict[str, Any]) -> None:
    """Write the rewind to the event log; if rank 0 cannot, all ranks raise RunFolderError."""
    import torch.distributed as dist

    failure: list[Any] = [None]
    if run.event_log is not None:
        try:
            run.event_log.append("rewind", required=True, **fields)
        except OSError as error:
            failure[0] = (
                f"{run.event_log.path} cannot be written ({write_problem(error, run.folder.path)})"
            )
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RunFolderError(
            f"{failure[0]}, but a rewind must be recorded before it is executed; free space, then "
            "resume"
        )
