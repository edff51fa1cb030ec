"""Header and summary of a run: the rows and commands that `training.console` prints."""

import math
import os
import shlex
import sys
from pathlib import Path

from data.stages import Stage
from resilience.processes import Processes
from training.config import JobConfig
from training.resume_policy import Changes
from training.run import Run

Rows = list[tuple[str, str]]


def header(run: Run, changes: Changes) -> tuple[str, Rows]:
    """Return title and rows of the header: model, mesh, data, batch sizes and steps."""
    from model.flops import parameter_count
    from training.console import compact

    config, position, processes, stages = run.config, run.position, run.processes, run.stages
    model, max_steps = config.model, config.train.max_steps
    origin = f"from step {position.step}" if position.step else "from scratch"
    if not position.step and config.run.init_from is not None:
        origin = f"from the weights of {config.run.init_from}"
    steps = max(max_steps - position.step, 0)
    tokens = max(stages.first_token(max_steps) - position.tokens, 0)
    batch_rows = []
    for stage in stages.all:
        name = f"from step {stage.first_step + 1}" if stage.first_step else "batch"
        batch = f"{stage.global_batch_size} sequences of {stage.seq_len} tokens per step"
        weights = f", weights {_weights(stage)}" if len(stage.weights) > 1 else ""
        batch_rows.append((name, batch + weights))
    return f"Llamesh: {config.run.name}", [
        (
            "model",
            f"{model.name}, {compact(parameter_count(model))} parameters: {model.n_layers} "
            f"layer{'s' * (model.n_layers > 1)}, dim {model.dim}, {model.n_heads} heads "
            f"({model.n_kv_heads} kv)",
        ),
        ("mesh", f"{run.mesh} on {processes.accelerator}, launched by {processes.launcher}"),
        *_pipeline_rows(run),
        ("compute", _compute(run)),
        *_data_rows(run),
        *batch_rows,
        ("steps", f"{steps} ({compact(tokens)} tokens), {origin}"),
        ("folder", config.run.dir),
        ("time limits", str(run.watchdog.limits)),
        *(("changed", row) for row in changes.rows()),
        *_rate_rows(run, changes),
    ]


def _pipeline_rows(run: Run) -> Rows:
    """Return a row with schedule, cut and number of micro-batches of a pipeline."""
    from parallel.pipeline_schedule import describe_pipeline, stage_layers

    mesh, parallel, model = run.mesh, run.config.parallel, run.config.model
    if mesh.pp == 1:
        return []
    stage = run.stages.all[0]
    local = stage.global_batch_size // mesh.dp
    count = local // (stage.micro_batch_size or local)
    text = describe_pipeline(stage_layers(model, parallel, mesh.pp), mesh.pp, count)
    schedule, _, rest = text.partition("; ")
    batches = f"{count} micro-batch{'es' * (count > 1)} per step"
    return [("pipeline", f"{schedule}, {batches}; {rest}")]


def _compute(run: Run) -> str:
    """Return data type, compilation and attention kernel of the training step."""
    import torch

    from model.attention import select_kernel
    from parallel.data_parallel import mixed_precision_policy

    config, device = run.config, run.fabric.device
    dtype = mixed_precision_policy(config.precision, device.type).param_dtype or torch.float32
    is_split = config.parallel.cp > 1
    masked = config.data.document_mask or is_split
    kernel = "sdpa"  # plain causal rows
    if masked:
        head_dim, complete = config.model.head_dim, not is_split
        kernel = select_kernel(config.model.attention, head_dim, device, dtype, complete)
    if device.type == "cuda" and kernel != "flex":
        from training.flash_attention import active_flash_attention, selected_sdpa

        if kernel == "varlen":
            kernel += f" ({active_flash_attention()})"
        else:
            selected = selected_sdpa(config.model, config.parallel.tp, dtype, device, masked)
            kernel += f" ({selected})"
    formats = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    fp8 = f" with {config.precision.fp8} fp8 products" if config.precision.fp8 else ""
    compiled = ", compiled" if run.compiled else ""
    return f"{formats[dtype]}{fp8}{compiled}, {kernel} attention"


def _rate_rows(run: Run, changes: Changes) -> Rows:
    """Return a row if a change of the schedule raises the learning rate."""
    from training.schedule import rate_jump_warning

    former, _ = changes.free.get("optim.schedule_steps", (None, None))
    if former is None or "optim.lr" in changes.free:
        return []
    warning = rate_jump_warning(run.position.step, former, run.config.optim)
    return [("warning", warning)] if warning else []


def _data_rows(run: Run) -> Rows:
    """Return rows about the tokens and, for prepared data, the epochs of each source."""
    from data.dataset import Dataset, WindowDataset
    from training.console import compact

    config, dataset, stages = run.config, run.dataset, run.stages
    if config.data.is_mock:
        return [("data", f"mock, token ids by formula, vocabulary of {config.model.vocab_size:,}")]
    names = ", ".join(config.data.sources)
    vocabulary = f"{config.tokenizer.name} vocabulary of {config.tokenizer.vocab_size:,}"
    if not isinstance(dataset, WindowDataset):
        files = f"{dataset.n_files} files of {dataset.source.path}"
        shards = f"{dataset.n_stream_shards} stream shards"
        return [("data", f"{names}, streamed from {files} in {shards}, {vocabulary}")]
    assert isinstance(dataset, Dataset)
    order = dataset.order(stages, config.run.seed, config.data.shuffle_block_tokens)
    epochs = order.epochs(stages.first_sample(config.train.max_steps))
    n_tokens = compact(dataset.manifest.n_tokens("train"))
    return [
        ("data", f"{names} in {config.data.folder}: {n_tokens} tokens, {vocabulary}"),
        ("epochs", ", ".join(f"{name} {count:.3g}" for name, count in epochs.items())),
    ]


def _weights(stage: Stage) -> str:
    """Return the normalized mixture weights of a stage."""
    total = sum(stage.weights.values())
    return ", ".join(f"{name} {weight / total:.3g}" for name, weight in stage.weights.items())


def summary(run: Run) -> tuple[str, Rows, Rows]:
    """Return title, result rows and follow-up commands of a finished run."""
    from training.console import compact

    config, position, processes, metrics = run.config, run.position, run.processes, run.last_metrics
    folder = config.run.dir
    checkpoint = f"{folder}/checkpoints/step-{position.step:08d}"
    checkpoint_override = f"checkpoint={shlex.quote(checkpoint)}"
    rows = [("tokens", f"{compact(position.tokens)} in {position.step} steps")]
    for name, key in (("training loss", "loss"), ("validation loss", "val_loss")):
        if math.isfinite(metrics.get(key, math.nan)):
            rows.append((name, f"{metrics[key]:.4f} nats per token"))
    rows.append(("checkpoint", checkpoint))
    files = {"loss curve": "loss.png", "text samples": "samples.txt", "metrics": "metrics.jsonl"}
    rows += [
        (name, f"{folder}/{file}") for name, file in files.items() if Path(folder, file).exists()
    ]
    resume = resume_command(config, processes)
    commands: Rows = []
    if not config.data.is_mock:  # no text, and no tokenizer
        if config.data.stream_shards is None:  # streams have no validation split
            commands.append(("Evaluate", f"{_program('evaluate')} {checkpoint_override}"))
        commands.append(("Generate text", f"{_program('generate')} {checkpoint_override}"))
    commands.append(("Train longer", f"{resume} train.max_steps={2 * position.step}"))
    if config.log.tensorboard:
        logdir = f"{shlex.quote(folder)}/tensorboard"
        commands.append(("View in TensorBoard", f"tensorboard --logdir {logdir}"))
    title = "Finished" if metrics else "Finished already"  # no step was left to train
    return f"{title}: {config.run.name}", rows, commands


def resume_command(config: JobConfig, processes: Processes) -> str:
    """Return the shell command that resumes this run, using the launcher of this launch.

    The run resumes with the configuration of its last launch (`cli.last_launch`).
    """
    nodes, per_node = processes.num_nodes, processes.per_node
    launcher = {
        "torchrun": f"torchrun --nnodes={nodes} --nproc-per-node={per_node}",
        "srun": f"srun --nodes={nodes} --ntasks-per-node={per_node} python",
    }.get(processes.launcher, "python")
    folder = shlex.quote(f"run.dir={config.run.dir}")
    return f"{launcher} {os.path.relpath(sys.argv[0])} {folder}"


def _program(name: str) -> str:
    """Return the shell command for a program in the folder of `train.py`."""
    return f"python {Path(sys.argv[0]).with_name(name)}.py"
