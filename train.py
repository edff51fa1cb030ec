"""Trains a Llama 3 model: `python train.py key=value …`.

Read from top to bottom it tells what the program does: `main` refuses what can be refused before a
process is launched, `set_up` builds the run on its mesh, `train` is the loop, `train_step` one
step. Heavy imports come inside functions, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig

from cli.arguments import hydra_arguments
from cli.config import check_config
from cli.errors import exit_on_user_error
from parallel.mesh import MeshShape, Processes, is_first_process
from parallel.slurm import slurm_time_left
from parallel.step_scalars import NO_REQUESTS, StepRequests
from planning.fit_check import check_plan, print_fit_check
from resilience.exit_codes import ExitCode
from resilience.lock import RunLock
from resilience.signals import Requests
from training.config import JobConfig
from training.metrics import log_metrics, step_metrics
from training.preflight import acquire_run_lock, check_folder, prepare_data
from training.recovery import Decision, check_step, rewind, starting_position
from training.resume_policy import Changes
from training.run import Run, saver_of
from training.run_summary import header
from training.schedule import learning_rate
from training.shutdown import abort, end_early, finish, record_fault, stop_run
from training.validation import validate, write_sample

if TYPE_CHECKING:
    from torch import Tensor

    from data.dataset import Dataset
    from data.loader import StepBatches
    from data.stream import StreamDataset


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    """Checks, launches, trains."""
    with exit_on_user_error():
        config, processes, mesh = check_config(composed)
        changes = check_folder(config)
        verdict = check_plan(config, processes, mesh)
        dataset = prepare_data(config)
        lock = acquire_run_lock(config)
        print_fit_check(verdict)
        run = set_up(config, processes, mesh, dataset, changes, lock)
    try:
        train(run)
    except Exception as error:
        abort(run, error)
    finish(run)


def set_up(
    config: JobConfig,
    processes: Processes,
    mesh: MeshShape,
    dataset: Dataset | StreamDataset,
    changes: Changes,
    lock: RunLock | None = None,
) -> Run:
    """Launches the processes, builds the model and goes on from the newest checkpoint, if any."""
    import torch

    from model.llama import Llama
    from parallel.launch import launch
    from resilience.loss_monitor import AsyncStatsReader, LossMonitor
    from resilience.watchdog import Watchdog
    from training.console import Console
    from training.optimizer import build_optimizer

    watchdog = Watchdog(config.watchdog)
    first = is_first_process()
    requests = Requests(
        config.run.time_limit,
        slurm_time_left(os.environ, time.time()) if first else None,
        config.checkpoint.interval_minutes if first else None,
    )
    requests.catch_signals(early=end_early)
    fabric, strategy = launch(processes, mesh, config.parallel, config.precision, watchdog)
    console = Console(enabled=fabric.is_global_zero)
    with torch.device("meta"):
        llama = Llama(config.model)
    model = fabric.setup_module(llama)  # sharded in place
    adamw = build_optimizer(llama, config.optim, config.precision.optimizer_state)
    optimizer = fabric.setup_optimizers(adamw)
    position, past = starting_position(config, llama, adamw, dataset, console.note)
    run = Run(
        config=config,
        processes=processes,
        mesh=mesh,
        fabric=fabric,
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        dataset=dataset,
        position=position,
        console=console,
        stages=config.stages(),
        requests=requests,
        watchdog=watchdog,
        saver=saver_of(config, dataset, console.note),
        reader=AsyncStatsReader(fabric.device.type),
        monitor=LossMonitor(config.faults, len(past.rewinds), position.vitals),
        lock=lock,
    )
    run.open_logs(changes)
    watchdog.on_verdict = partial(record_fault, run)
    console.header(*header(config, mesh, processes, dataset, position, changes))
    return run


def train(run: Run) -> None:
    """The loop: one step after another, and now and then metrics, validation, a checkpoint."""
    config, stages = run.config, run.stages
    batches = run.batches()
    clock = run.clock
    run.console.start(run.position.step, config.train.max_steps)
    run.requests.begin()
    run.garbage.disable()
    while run.position.step < config.train.max_steps:
        step = run.position.step + 1
        saves = is_due(config.checkpoint.interval, step, config)
        validates = is_due(config.validation.interval, step, config)
        with profiled(run, step), clock.step():
            with clock.data():
                batch = next(batches)
            rate = learning_rate(step - 1, config.optim)
            tensors = train_step(run, batch, rate, StepRequests(*map(round, run.requests.values())))
            stage = stages.at(batch.number)
            logs = validates or step == 1 or is_due(config.log.interval, step, config)
            logs = logs or stages.at(batch.number + 1) != stage  # speed is of one length
            run.advance(batch)
            metrics = step_metrics(run, tensors, rate) if logs else {}
        run.watchdog.enter("step", step + 1)
        run.tell_progress()
        decision = check_step(run, batch.number, tensors["vitals"], saves)
        if decision.rewind is not None:
            batches.close()
            rewind(run, decision.rewind)
            batches = run.batches()
            continue
        with clock.stall():
            if validates and config.validation.samples:
                metrics["val_loss"] = validate(run)
            if logs:
                log_metrics(run, metrics, stage)
            if validates:
                write_sample(run)
                run.draw()
            run.garbage.run(step)
        if saves or decision.save:
            save(run, wait=step == config.train.max_steps)
        if decision.stop is not None:
            stop(run, decision)
    batches.close()
    run.garbage.enable()
    if run.unsaved:
        stop_run(run, ExitCode.SAVE_FAILED)
    run.console.stop()


def train_step(
    run: Run, batches: StepBatches, rate: float, requests: StepRequests = NO_REQUESTS
) -> dict[str, Tensor]:
    """One optimizer step on this rank's micro-batches of the global batch.

    Each micro-batch's summed loss is divided by the number of targets in the whole global batch,
    so the gradient does not depend on how the batch was cut. Where loss or norm is not finite on
    any rank, weights and moments stay on all of them as they were, bit for bit.

    Args:
        requests: Requests of this rank.

    Returns:
        Tensors on the device, not waited for, the same on every rank: `vitals`, the loss of the
        global batch, the norm before clipping, and how many ranks made each request; `batch_hash`
        of the whole global batch.
    """
    import torch

    from parallel.gradients import clip_grad_norm
    from resilience.loss_monitor import not_finite

    fabric, model, optimizer = run.fabric, run.model, run.optimizer
    n_targets, batch_hash = run.strategy.sum_over_data(fabric.to_device(batches.counts))
    shares = []
    pieces = zip(batches.micro_batches, batches.n_documents, strict=True)
    for place, (micro_batch, n_documents) in enumerate(pieces, start=1):
        tokens, positions, labels = fabric.to_device(micro_batch)
        with fabric.no_backward_sync(model, enabled=place < len(batches.micro_batches)):
            share = model(tokens, positions, labels, n_documents=n_documents) / n_targets
            fabric.backward(share)
        shares.append(share.detach())
    # Peers that read the same samples have the same loss: of each the part that makes one whole.
    own = torch.stack(shares).sum(dtype=torch.float64) / run.strategy.shape.ranks_per_sample
    max_norm = run.config.train.max_grad_norm or math.inf
    norm, (loss, *asking) = clip_grad_norm(
        model, max_norm, torch.cat([own.view(1), requests.to_tensor(fabric.device)])
    )
    vitals = torch.stack([loss, norm, *asking])
    optimizer.optimizer.skip_if(not_finite(vitals))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"vitals": vitals, "batch_hash": batch_hash}


# ---------------------------------------------------------------- around the loop


def is_due(interval: int | None, step: int, config: JobConfig) -> bool:
    """Whether something that happens every `interval` steps, and at the end, happens now."""
    return step == config.train.max_steps or (interval is not None and step % interval == 0)


def profiled(run: Run, step: int) -> AbstractContextManager[None]:
    """Return a context that profiles the step on rank 0 if `log.profile` lists it."""
    if step not in (run.config.log.profile or ()) or not run.fabric.is_global_zero:
        return nullcontext()
    from training.profile import profile_step

    return profile_step(run, step)


def save(run: Run, wait: bool = False) -> None:
    """Saves a checkpoint of this position: in the background, unless it is the last one."""
    run.tell_progress(now=True)
    with run.clock.stall(), run.watchdog.during("checkpoint", run.position.step):
        position = dataclasses.replace(run.position, vitals=run.monitor.state_dict())
        run.saver.save(run.model.module, run.optimizer.optimizer, position, wait)
        if wait:
            run.saver.finish()
    run.poll_checkpoints()


def stop(run: Run, decision: Decision) -> NoReturn:
    """Ends the run after this step, on every rank: saved, unless its losses are what is wrong."""
    assert decision.stop is not None
    if decision.stop != ExitCode.DIVERGED:
        save(run, wait=True)
    stop_run(run, ExitCode.SAVE_FAILED if run.unsaved else decision.stop, decision.why)


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "train")
    main()
