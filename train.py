"""Trains a Llama 3 model: `python train.py key=value …`.

Read from top to bottom it tells what the program does: `main` refuses what can be refused before a
process is launched, `set_up` builds the run on its mesh, `train` is the loop, `train_step` one
step. Heavy imports come inside functions, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from omegaconf import DictConfig

from data.errors import DataError
from parallel.mesh import MeshShape, Processes
from program.command_line import hydra_arguments
from program.config import TrainProgram, plain
from program.preflight import check_config, check_folder, prepare_data, refusals
from program.report import header, meter, summary
from program.run import Run
from training.clock import Clock
from training.run_folder import RunFolder
from training.schedule import learning_rate

if TYPE_CHECKING:
    from torch import Tensor

    from data.dataset import Dataset
    from data.loader import StepBatches
    from data.stages import Stage
    from data.stream import StreamDataset


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(composed: DictConfig) -> None:
    """Checks, launches, trains."""
    with refusals():
        config, processes, mesh = check_config(composed)
        changed = check_folder(config)
        dataset = prepare_data(config)
        run = set_up(config, processes, mesh, dataset, changed)
    try:
        train(run)
    except (KeyboardInterrupt, DataError) as error:
        give_up(run, error)
    finish(run)


def set_up(
    config: TrainProgram,
    processes: Processes,
    mesh: MeshShape,
    dataset: Dataset | StreamDataset,
    changed: dict[str, Any],
) -> Run:
    """Launches the processes, builds the model and goes on from the newest checkpoint, if any."""
    import torch

    from model.llama import Llama
    from parallel.parallelize import initialize_weights
    from program.launch import launch
    from training.checkpoint.restoring import restore
    from training.console import Console
    from training.optimizer import build_optimizer
    from training.position import Position

    fabric, strategy = launch(processes, mesh, config.parallel, config.precision)
    console = Console(enabled=fabric.is_global_zero)
    with torch.device("meta"):
        llama = Llama(config.model)
    model = fabric.setup_module(llama)  # sharded in place
    adamw = build_optimizer(llama, config.optim, config.precision.optimizer_state)
    optimizer = fabric.setup_optimizers(adamw)

    folder = RunFolder(Path(config.run.dir))
    position = restore(folder, config.run.resume, llama, adamw, console.note)
    if position is None:
        position = Position(step=0, samples=0, tokens=0, data_hash=dataset.hash)
        initialize_weights(llama, config.model, config.run.seed)
    position = position.on(dataset.hash)

    stages = config.stages()
    run = Run(config, mesh, fabric, strategy, model, optimizer, dataset, position, console, stages)
    if fabric.is_global_zero:
        run.open_logs(changed)
    console.header(*header(config, mesh, processes, dataset, position))
    return run


def train(run: Run) -> None:
    """The loop: one step after another, and now and then figures, validation, a checkpoint."""
    config, stages = run.config, run.stages
    batches = run.batches()
    clock = Clock()
    run.console.start(run.position.step, config.train.max_steps)
    while run.position.step < config.train.max_steps:
        step, stage = run.position.step + 1, stages.at(run.position.step)
        validates = is_due(config.validation.interval, step, config)
        logs = validates or step == 1 or is_due(config.log.interval, step, config)
        logs = logs or stages.at(step) != stage  # the figures of speed are those of one length
        with clock.step():
            with clock.data():
                step_batches = next(batches)
            rate = learning_rate(step - 1, config.optim)
            tensors = train_step(run, step_batches, rate)
            run.position = run.position.after(
                batches=step,
                samples=stages.first_sample(step),
                tokens=stage.global_batch_size * stage.seq_len,
                lanes=step_batches.lanes,
            )
            figures = read_figures(run, tensors, rate) if logs else {}
        if validates and config.validation.samples:
            figures["val_loss"] = validate(run)
        if logs:
            log(run, figures, clock, stage)
        if validates:
            write_sample(run)
            if run.metrics is not None:
                run.metrics.draw()
        if is_due(config.checkpoint.interval, step, config):
            save(run)
    batches.close()
    run.console.stop()


def train_step(run: Run, batches: StepBatches, rate: float) -> dict[str, Tensor]:
    """One optimizer step on this rank's micro-batches of the global batch.

    Each micro-batch's summed loss is divided by the number of targets in the whole global batch,
    so the gradient does not depend on how the batch was cut.

    Returns:
        Scalars on the device, not waited for: `loss`, this rank's share of the mean; `grad_norm`
        before clipping; `batch_hash` of the whole global batch.
    """
    fabric, model, optimizer = run.fabric, run.model, run.optimizer
    n_targets, batch_hash = run.strategy.sum_over_data(fabric.to_device(batches.counts))
    shares = []
    for place, micro_batch in enumerate(batches.micro_batches, start=1):
        tokens, positions, labels = fabric.to_device(micro_batch)
        with fabric.no_backward_sync(model, enabled=place < len(batches.micro_batches)):
            share = model(tokens, positions, labels) / n_targets
            fabric.backward(share)
        shares.append(share.detach())
    grad_norm = fabric.clip_gradients(
        model,
        optimizer,
        max_norm=run.config.train.max_grad_norm or math.inf,
        error_if_nonfinite=False,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": sum(shares), "grad_norm": grad_norm, "batch_hash": batch_hash}


# ---------------------------------------------------------------- around the loop


def is_due(interval: int | None, step: int, config: TrainProgram) -> bool:
    """Whether something that happens every `interval` steps, and at the end, happens now."""
    return step == config.train.max_steps or (interval is not None and step % interval == 0)


def read_figures(run: Run, tensors: dict[str, Tensor], rate: float) -> dict[str, Any]:
    """The figures of the step just done, waited for; the loss summed over the data ranks."""
    from parallel.compilation import compiled_graphs

    loss = run.strategy.sum_over_data(tensors["loss"].double())
    compiled = {"compiled_graphs": compiled_graphs()} if run.config.parallel.compile else {}
    return {
        "step": run.position.step,
        "samples": run.position.samples,
        "tokens": run.position.tokens,
        "loss": loss.item(),
        "grad_norm": tensors["grad_norm"].item(),
        "lr": rate,
        "batch_hash": f"{tensors['batch_hash'].item() % 2**32:08x}",
    } | compiled


def log(run: Run, figures: dict[str, Any], clock: Clock, stage: Stage) -> None:
    """Adds the speed since the last logged step, and tells the figures to console and files."""
    steps, seconds, data_seconds = clock.read()
    tokens = steps * stage.global_batch_size * stage.seq_len
    throughput = meter(run.config, run.mesh, run.fabric.device, stage.seq_len)
    figures |= throughput.figures(tokens, seconds, data_seconds, steps)
    run.last_figures |= figures
    run.console.log(figures)
    if run.metrics is not None:
        run.metrics.write(figures)


def validate(run: Run) -> float:
    """Mean loss over the held-out windows, the same figure on every mesh."""
    from data.dataset import Dataset
    from data.loader import validation_batches
    from evaluation.perplexity import mean_loss

    assert isinstance(run.dataset, Dataset)  # a stream holds nothing out, and is not validated on
    batches = validation_batches(
        run.dataset,
        samples=run.config.validation.samples,
        seq_len=run.config.train.seq_len,
        micro_batch_size=run.validation_batch_size,
        rank=run.data_rank,
        size=run.mesh.dp,
    )
    return mean_loss(run.model, batches, run.fabric.device, run.strategy.sum_over_data)


def write_sample(run: Run) -> None:
    """Generates a little text, all ranks together; rank 0 appends it to `samples.txt`."""
    from evaluation.sampling import sample_text

    config = run.config.validation
    if config.sample_tokens == 0:
        return
    text = sample_text(
        run.model,
        run.dataset.tokenizer(),
        config.prompt,
        n_tokens=config.sample_tokens,
        temperature=config.temperature,
        seed=run.position.step,
        device=run.fabric.device,
        multiple_of=run.mesh.seq_multiple,
    )
    if run.fabric.is_global_zero:
        run.folder.append_sample(run.position.step, text)


def save(run: Run) -> None:
    """Commits a checkpoint of this position, then removes the oldest beyond `keep_last`."""
    from training.checkpoint import retention, saving

    begin = time.perf_counter()
    saved = saving.save(
        run.folder, run.model.module, run.optimizer.optimizer, run.position, plain(run.config)
    )
    if run.ledger is not None:
        seconds = round(time.perf_counter() - begin, 3)
        run.ledger.append("save", step=run.position.step, path=saved.name, seconds=seconds)
        keep = run.config.checkpoint.keep_last, run.config.checkpoint.keep_every
        retention.remove_old(run.folder, *keep)


def give_up(run: Run, error: KeyboardInterrupt | DataError) -> NoReturn:
    """Ends the program on Ctrl-C, or where its data cannot be read on: tells what is kept."""
    run.console.stop()
    saved = run.folder.committed_steps()
    kept = f"the same command goes on from step {saved[-1]}" if saved else "nothing is saved yet"
    interrupted = isinstance(error, KeyboardInterrupt)
    if run.ledger is not None:
        reason = "interrupted" if interrupted else str(error)
        run.ledger.append("stop", step=run.position.step, reason=reason)
    if interrupted:  # all processes at once; a fault of the data is told by whoever met it
        run.console.note(f"Interrupted at step {run.position.step}: {kept}.")
    else:
        told = f"Stopped at step {run.position.step}, {kept}: {error}"
        print(told, file=sys.stderr, flush=True)
    os._exit(130 if interrupted else 1)  # peers may wait for us: no orderly end of the group


def finish(run: Run) -> None:
    """Closes the logs, and says what came out and how to go on."""
    if run.ledger is not None and run.metrics is not None:
        run.ledger.append("stop", step=run.position.step, reason="finished")
        run.metrics.close()
    run.console.summary(*summary(run.config, run.position, run.last_figures))


if __name__ == "__main__":
    sys.argv[1:] = hydra_arguments(sys.argv[1:], "train")
    main()
