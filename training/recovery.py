"""Where a run begins, what it heeds from step to step, and how it goes back.

Rank 0 alone reads and writes the ledger; what it finds all ranks learn, so that each of them goes
on from the same checkpoint, leaves out the same batches and stops after the same step.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resilience.exit_codes import ExitCode
from resilience.run_folder import RunFolder, RunFolderError
from training.config import JobConfig
from training.run import Run

if TYPE_CHECKING:
    from checkpoint.position import Position
    from data.dataset import Dataset
    from data.stream import StreamDataset
    from resilience.loss_monitor import Range, StepStats


class Decision(NamedTuple):
    """What all ranks do after a step: go back and leave batches out, save, stop, or nothing."""

    rewind: "Range | None" = None
    save: bool = False
    stop: ExitCode | None = None
    why: str = ""


class History(NamedTuple):
    """What the ledger tells of the rewinds of a run's earlier starts."""

    rewinds: "list[Range]"
    unfinished: int | None = None
    """Where a kill came between a rewind's decision and its end: the step to be before."""


def history(folder: RunFolder) -> History:
    """The rewinds so far, the same on every rank; rank 0 reads them."""
    import torch.distributed as dist

    from resilience.event_log import Ledger
    from resilience.loss_monitor import rewinds_of

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        events = Ledger(folder.ledger).read()
        # A start after a rewind has finished it, before it wrote its line.
        ways = [event for event in events if event.get("event") in ("rewind", "rewound", "start")]
        unfinished = ways and ways[-1]["event"] == "rewind"
        found[0] = History(rewinds_of(events), ways[-1]["before"] if unfinished else None)
    dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def starting_position(
    config: JobConfig, llama: Any, adamw: Any, dataset: "Dataset | StreamDataset", note: Any
) -> "tuple[Position, History]":
    """Fills model and optimizer for a start of the run; where it stands then.

    Raises:
        RunFolderError: there are checkpoints, and none that it may go on from is whole.
        FormatError: the weights to begin from cannot be read.
    """
    from resilience.loss_monitor import union

    past = history(RunFolder(Path(config.run.dir)))
    position = _fill(config, llama, adamw, dataset, note, past.unfinished)
    return dataclasses.replace(position, skips=union([*position.skips, *past.rewinds])), past


def _fill(
    config: JobConfig, llama: Any, adamw: Any, dataset: Any, note: Any, before: int | None
) -> "Position":
    """Loads the newest whole checkpoint, of step `before` at most, or makes the first weights."""
    import torch.distributed as dist

    from checkpoint.position import Position
    from checkpoint.restore import restore
    from checkpoint.retention import remove_beyond
    from evaluation.inference import fill_together
    from formats.recognition import open_weights
    from parallel.parallelize import initialize_weights

    folder = RunFolder(Path(config.run.dir))
    asked = folder.resume_from(config.run.resume)
    elsewhere = asked not in ("auto", "never")
    position = None
    if before is not None or not elsewhere:
        position = restore(folder, "auto", llama, adamw, note, before)
    if position is None and elsewhere:
        position = restore(folder, asked, llama, adamw, note)
    if position is None:
        adamw.state.clear()
        if config.run.init_from is None:
            initialize_weights(llama, config.model, config.run.seed)
        else:
            fill_together(llama, open_weights(Path(config.run.init_from)))
        position = Position(step=0, samples=0, tokens=0, data_hash=dataset.hash)
    if before is not None and dist.get_rank() == 0:
        for problem in remove_beyond(folder, position.step):
            note(problem)
    return position.on(dataset.hash)


def check_step(run: Run, batch: int, values: Any, saves: bool) -> Decision:
    """What follows from the steps whose values have arrived, agreed by all ranks.

    Args:
        batch: The place in the order of the batch of the step just taken.
        values: Its vitals, on the device.
        saves: A checkpoint is due now: it must not be of a step that nobody has looked at.
    """
    samples = run.stages.first_sample(batch), run.stages.first_sample(batch + 1)
    run.poll_checkpoints()
    decision = _decide(run, run.reader.read(run.position.step, batch, samples, values))
    if saves or decision.save or decision.stop:
        later = _decide(run, run.reader.flush())
        decision = Decision(
            decision.rewind or later.rewind,
            decision.save or later.save,
            decision.stop or later.stop,
            decision.why or later.why,
        )
    return decision


def _decide(run: Run, arrived: "Iterable[StepStats]") -> Decision:
    """Tells what is bad about steps, and what the ranks asked for with them."""
    from resilience.signals import agreed

    decision = Decision()
    for vitals in arrived:
        verdict = run.monitor.check(vitals)
        if verdict.told is not None:
            run.console.note(verdict.told)
        if verdict.event is not None:
            run.record(verdict.event, **dict(verdict.fields or {}))
        if verdict.abort is not None:
            return Decision(stop=ExitCode.DIVERGED, why=verdict.abort)
        if verdict.rewind is not None:
            return Decision(rewind=verdict.rewind)
        asked = agreed(vitals.requests)
        decision = Decision(None, decision.save or asked.save, decision.stop or asked.stop)
    return decision


def rewind(run: Run, skip: "Range") -> None:
    """Goes back to the newest checkpoint before batch `skip[0]`; `skip` is left out from now on.

    The decision is on the disk before anything changes, so that no kill can undo it.

    Raises:
        RunFolderError: no checkpoint before it is whole, or the ledger cannot be written.
    """
    from resilience.loss_monitor import union

    first, _ = skip
    left_out = sum(min(stop, first) - begin for begin, stop in run.position.skips if begin < first)
    before = first - left_out  # steps that had been done when that batch was taken
    run.saver.finish()
    run.poll_checkpoints()
    reached = run.position.step
    _agree(run, {"step": reached, "skip": list(skip), "before": before})
    run.reader.clear()
    skips = union([*run.position.skips, skip])
    model, adamw = run.model.module, run.optimizer.optimizer
    position = _fill(run.config, model, adamw, run.dataset, run.console.note, before)
    run.position = dataclasses.replace(position, skips=skips)
    run.monitor.reset_after_rewind(position.vitals)
    run.record("rewound", step=reached, to=position.step, **run.clock.spent())
    run.console.note(f"Back at step {position.step}; batches {skip[0]} to {skip[1] - 1} left out.")
    run.truncate_metrics()


def _agree(run: Run, fields: dict[str, Any]) -> None:
    """Writes the rewind to the ledger; where rank 0 cannot, every rank raises."""
    import torch.distributed as dist

    failure: list[Any] = [None]
    if run.ledger is not None:
        try:
            run.ledger.append("rewind", required=True, **fields)
        except OSError as error:
            failure[0] = f"{run.ledger.path} cannot be written ({error.strerror})"
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RunFolderError(
            f"{failure[0]}, and a rewind must be kept there before it is made: make room, then "
            "start again"
        )
