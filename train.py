"""Train a Llama 3 model: `python train.py key=value …`.

`main` parses and validates the configuration before any process is launched, `set_up` builds the
run on its mesh, `train` is the loop, and `train_step` is one step. Heavy imports are inside
functions, so that `--help` and configuration errors are fast.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cli.composition import compose_config
from cli.config import check_config
from cli.errors import exit_on_user_error
from cli.start_up import start_up
from parallel.mesh import MeshShape
from parallel.step_scalars import NO_REQUESTS, StepRequests
from resilience import flight_recorder
from resilience.exit_codes import ExitCode
from resilience.lock import RunLock
from resilience.processes import Processes, is_first_process
from resilience.run_folder import RunFolder
from resilience.signals import Requests
from resilience.slurm_time_limit import slurm_time_left
from resilience.standard_streams import continue_in
from resilience.watchdog import Watchdog
from training.config import JobConfig
from training.metrics import step_metrics
from training.preflight import abandoned_on_error, acquire_run_lock, check_folder, prepare_data
from training.recovery import check_step, initial_position, reload, rewind
from training.resume_policy import Changes
from training.run import Run, build_replica_check, build_saver
from training.run_summary import header
from training.schedule import learning_rate
from training.shutdown import (
    abort,
    exit_early,
    finish,
    published_on_error,
    record_fault,
    record_setup_fault,
    report_signal,
    stop_run,
)
from training.validation import validate, write_sample

if TYPE_CHECKING:
    from torch import Tensor

    from data.dataset import WindowDataset
    from data.loader import StepBatches
    from data.stream import StreamDataset


def main(arguments: list[str]) -> None:
    """Validate, launch and train."""
    from planning.fit_check import check_plan, watchdog_limits
    from planning.out_of_memory import memory_advice

    with exit_on_user_error("Interrupted before the first step."):
        config, processes, mesh = check_config(compose_config("train", arguments))
        changes = check_folder(config)
        memory_plan = check_plan(config, processes, mesh)
        dataset = prepare_data(config)
        lock = acquire_run_lock(config)
        continue_in(Path(config.run.dir), is_first_process())
        if memory_plan and is_first_process():
            print(memory_plan, flush=True)
        watchdog = Watchdog(watchdog_limits(config, processes, mesh))
        folder = RunFolder(Path(config.run.dir))
        watchdog.on_abort = partial(record_setup_fault, folder, watchdog)
        with (
            abandoned_on_error(lock),
            published_on_error(watchdog),
            memory_advice(config, processes, mesh),
        ):
            run = set_up(config, processes, mesh, dataset, changes, lock, watchdog)
    try:
        with memory_advice(config, processes, mesh):
            train(run)
    except Exception as error:
        abort(run, error)
    finish(run)


def set_up(
    config: JobConfig,
    processes: Processes,
    mesh: MeshShape,
    dataset: WindowDataset | StreamDataset,
    changes: Changes,
    lock: RunLock | None = None,
    watchdog: Watchdog | None = None,
) -> Run:
    """Launch the processes, build the model and restore the newest checkpoint, if any."""
    import torch

    from model.llama import Llama
    from planning.fit_check import plan_comparison, watchdog_limits
    from resilience.launch import launch
    from resilience.loss_monitor import AsyncStatsReader, LossMonitor
    from training.console import Console
    from training.optimizer import build_optimizer

    watchdog = watchdog or Watchdog(watchdog_limits(config, processes, mesh))
    flight_recorder.configure(Path(config.run.dir), watchdog.limits)
    first = is_first_process()
    requests = Requests(
        config.run.time_limit,
        slurm_time_left(os.environ, time.time()) if first else None,
        config.checkpoint.interval_minutes if first else None,
    )
    requests.catch_signals(on_early_signal=partial(exit_early, lock))
    if config.train.deterministic and processes.accelerator == "cuda":
        from training.deterministic import make_deterministic

        make_deterministic()
    fabric, strategy = launch(processes, mesh, config.parallel, config.precision, watchdog)
    console = Console(enabled=fabric.is_global_zero)
    if fabric.device.type == "cuda":
        from training.flash_attention import activate_flash_attention

        activate_flash_attention(config.model.head_dim, config.train.deterministic, console.note)
    with torch.device("meta"):
        llama = Llama(config.model)
    model = fabric.setup_module(llama)  # sharded in place
    adamw = build_optimizer(llama, config.optim, config.precision.optimizer_state)
    optimizer = fabric.setup_optimizers(adamw)
    position = initial_position(config, llama, adamw, dataset, console.note)
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
        saver=build_saver(config, dataset, console.note),
        reader=AsyncStatsReader(fabric.device.type),
        monitor=LossMonitor(config.faults, len(position.rewinds), position.monitor_state),
        replica_check=build_replica_check(config, mesh, llama, adamw),
        lock=lock,
        comparison=plan_comparison(config, processes, mesh) if first else None,
    )
    run.open_logs(changes)
    watchdog.on_abort = partial(record_fault, run)
    watchdog.background_save = run.saver.running
    if strategy.pipeline is not None:
        watchdog.waits_for = strategy.pipeline.links.waits_for
    with run.optional("the header"):
        console.header(*header(run, changes))
    return run


def train(run: Run) -> None:
    """Run the training loop: steps, and periodically metrics, validation and checkpoints."""
    config, stages = run.config, run.stages
    batches = run.batches()
    clock = run.clock
    run.console.start(run.position.step, config.train.max_steps)
    run.requests.start_training(partial(report_signal, run))
    run.garbage.disable()
    while run.position.step < config.train.max_steps:
        step = run.position.step + 1
        saves = is_due(config.checkpoint.interval, step, config)
        validates = is_due(config.validation.interval, step, config)
        with profiled(run, step), clock.step():
            with clock.data():
                batch = next(batches)
            lr = learning_rate(step - 1, config.optim)
            tensors = train_step(run, batch, lr, run.requests.current())
            stage = stages.at(batch.number)
            logs = validates or step == 1 or is_due(config.log.interval, step, config)
            logs = logs or stages.at(batch.number + 1) != stage  # throughput of one sequence length
            run.advance(batch)
            metrics = step_metrics(run.position, tensors, lr, run.compiled) if logs else {}
            decision = check_step(run, batch.number, tensors["scalars"], saves)
            saves = saves and decision.stop != ExitCode.CORRUPTION
        run.watchdog.enter("step", step + 1)
        run.record_progress()
        run.poll_checkpoints()
        if decision.rewind is not None or decision.reload:
            batches.close()
            rewind(run, decision.rewind) if decision.rewind else reload(run)
            batches = run.batches()
            continue
        with clock.stall():
            if validates and config.validation.samples:
                metrics["val_loss"] = validate(run)
            if logs:
                run.log_metrics(metrics, stage)
            if validates:
                write_sample(run)
                run.draw()
            run.garbage.run(step)
        if saves or decision.save:
            save(run, wait=step == config.train.max_steps)
        if decision.stop is not None:
            if decision.stop in (ExitCode.DIVERGED, ExitCode.CORRUPTION):
                run.saver.finish()  # the save of an earlier step
                run.poll_checkpoints()
            else:
                save(run, wait=True)
            code = ExitCode.SAVE_FAILED if run.save_failed else decision.stop
            stop_run(run, code, decision.reason)
    batches.close()
    run.garbage.enable()
    if run.save_failed:
        stop_run(run, ExitCode.SAVE_FAILED)
    run.console.stop()


def train_step(
    run: Run, batches: StepBatches, lr: float, requests: StepRequests = NO_REQUESTS
) -> dict[str, Tensor]:
    """Run one optimizer step on this rank's micro-batches of the global batch.

    The summed loss of each micro-batch is divided by the number of targets in the global
    batch, so the gradient does not depend on how the batch is split. If loss or gradient norm is
    not finite on any rank, all ranks keep weights and optimizer state unchanged, bit for bit.

    Args:
        requests: Requests of this rank, from `Requests.current`.

    Returns:
        Tensors on the device, identical on all ranks, without waiting for them: `scalars`
        (2 + n_requests), the layout of `StepScalars`, and `batch_hash` of the global batch.
    """
    import torch

    from parallel.gradients import clip_grad_norm
    from resilience.loss_monitor import not_finite

    fabric, model, optimizer = run.fabric, run.model, run.optimizer
    n_targets, batch_hash = run.strategy.sum_over_data(fabric.to_device(batches.counts))
    micro_batches = list(zip(batches.micro_batches, batches.n_documents, strict=True))
    losses = run.strategy.accumulate(model, micro_batches, fabric.to_device, n_targets)
    # Ranks that read the same samples have the same loss; each adds its fraction of it to the sum.
    local_loss = losses.sum(dtype=torch.float64) / run.strategy.ranks_per_loss
    extra_scalars = torch.cat([local_loss.view(1), requests.to_tensor(fabric.device)])
    max_norm = run.config.train.max_grad_norm or math.inf
    grad_norm, (loss, *summed_requests) = clip_grad_norm(
        model, max_norm, extra_scalars, run.strategy.tied_weight
    )
    scalars = torch.stack([loss, grad_norm, *summed_requests])  # (2 + n_requests)
    optimizer.optimizer.skip_if(not_finite(scalars))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {"scalars": scalars, "batch_hash": batch_hash}


# ---------------------------------------------------------------- helpers of the loop


def is_due(interval: int | None, step: int, config: JobConfig) -> bool:
    """Return whether a periodic action is due: every `interval` steps and after the last one."""
    return step == config.train.max_steps or (interval is not None and step % interval == 0)


def profiled(run: Run, step: int) -> AbstractContextManager[None]:
    """Return a context that profiles the step on rank 0 if `log.profile` lists it."""
    if step not in (run.config.log.profile or ()) or not run.fabric.is_global_zero:
        return nullcontext()
    from training.profile import profile_step

    return profile_step(run, step)


def save(run: Run, wait: bool = False) -> None:
    """Save a checkpoint in the background, or wait for it."""
    run.record_progress(now=True)
    with run.clock.stall(), run.watchdog.during("checkpoint", run.position.step):
        position = dataclasses.replace(run.position, monitor_state=run.monitor.state_dict())
        run.saver.save(run.model.module, run.optimizer.optimizer, position, wait)
        if wait:
            run.saver.finish()
    run.poll_checkpoints()


if __name__ == "__main__":
    start_up("Loading …")
    main(sys.argv[1:])
