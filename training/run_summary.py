"""What a person is told of a run: the rows of header and summary, and the meter of its speed.

How they look is `training.console`'s.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from cli.config import JobConfig
from parallel.mesh import MeshShape, Processes
from training.resume_policy import Changes

if TYPE_CHECKING:
    import torch

    from checkpoint.position import Position
    from data.dataset import Dataset
    from data.stages import Stage
    from data.stream import StreamDataset
    from training.metrics import Throughput


def header(
    config: JobConfig,
    mesh: MeshShape,
    processes: Processes,
    dataset: "Dataset | StreamDataset",
    position: "Position",
    changes: Changes,
) -> tuple[str, list[tuple[str, str]]]:
    """Title and rows that tell what is about to be trained, on what."""
    from model.flops import parameter_count
    from training.console import compact

    model, train = config.model, config.train
    stages = config.stages()
    tokens = stages.first_token(train.max_steps)
    begin = f"from step {position.step}" if position.step else "from scratch"
    if not position.step and config.run.init_from is not None:
        begin = f"from the weights of {config.run.init_from}"
    batch_rows = [
        (
            f"from step {stage.first_step + 1}" if place else "batch",
            f"{stage.global_batch_size} sequences of {stage.seq_len} tokens a step"
            + (f", weights {_weights(stage)}" if len(stage.weights) > 1 else ""),
        )
        for place, stage in enumerate(stages.all)
    ]
    return f"Llamesh: {config.run.name}", [
        (
            "model",
            f"{model.name}, {compact(parameter_count(model))} parameters: {model.n_layers} layers, "
            f"dim {model.dim}, {model.n_heads} heads ({model.n_kv_heads} kv)",
        ),
        ("mesh", f"{mesh} on {processes.accelerator}, launched by {processes.launcher}"),
        *_data_rows(config, dataset),
        *batch_rows,
        (
            "to come",
            f"{max(train.max_steps - position.step, 0)} steps {begin}, "
            f"{compact(max(tokens - position.tokens, 0))} tokens",
        ),
        ("folder", config.run.dir),
        *(("changed", row) for row in changes.rows()),
    ]


def _data_rows(config: JobConfig, dataset: "Dataset | StreamDataset") -> list[tuple[str, str]]:
    """Which tokens, and how often a run goes through each source; of a stream nobody knows."""
    from data.dataset import Dataset
    from training.console import compact

    names = ", ".join(config.data.sources)
    vocabulary = f"{config.tokenizer.name} vocabulary of {config.tokenizer.vocab_size:,}"
    if not isinstance(dataset, Dataset):
        files = f"{dataset.n_files} files of {dataset.source.path} in {dataset.lanes} lanes"
        return [("data", f"{names}, streamed from {files}, {vocabulary}")]
    stages = config.stages()
    order = dataset.order(stages, config.run.seed, config.data.shuffle_block_tokens)
    epochs = order.epochs(stages.first_sample(config.train.max_steps))
    n_tokens = compact(dataset.manifest.n_tokens("train"))
    return [
        ("data", f"{names} in {config.data.folder}: {n_tokens} tokens, {vocabulary}"),
        ("epochs", ", ".join(f"{name} {count:.3g}" for name, count in epochs.items())),
    ]


def _weights(stage: "Stage") -> str:
    """The shares of the sources in a stage."""
    total = sum(stage.weights.values())
    return ", ".join(f"{name} {weight / total:.3g}" for name, weight in stage.weights.items())


def meter(config: JobConfig, mesh: MeshShape, device: "torch.device", seq_len: int) -> "Throughput":
    """The meter that turns tokens of sequences of a length, and seconds, into figures of speed."""
    import torch

    from model.flops import flops_per_token
    from parallel.data_parallel import mixed_precision
    from training.metrics import Throughput, peak_flops

    dtype = mixed_precision(config.precision, device.type).param_dtype or torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Throughput(
        flops_per_token(config.model, seq_len, causal=True),
        flops_per_token(config.model, seq_len, causal=False),
        mesh.world_size,
        # A share of the bf16 peak would say nothing about products in 8 bits.
        None if config.precision.fp8 else peak_flops(name, dtype),
        device,
    )


def summary(
    config: JobConfig, processes: Processes, position: "Position", figures: dict[str, Any]
) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]]]:
    """Title, rows and commands that tell what came out, where it lies and how to go on."""
    from training.console import compact

    folder = config.run.dir
    checkpoint = f"{folder}/checkpoints/step-{position.step:08d}"
    evaluate, generate = (
        Path(sys.argv[0]).with_name(f"{name}.py") for name in ("evaluate", "generate")
    )
    named = f"checkpoint={shlex.quote(checkpoint)}"
    rows = [("tokens", f"{compact(position.tokens)} in {position.step} steps")]
    for name, key in (("training loss", "loss"), ("validation loss", "val_loss")):
        if key in figures:
            rows.append((name, f"{figures[key]:.4f} nats a token"))
    rows += [
        ("checkpoint", checkpoint),
        ("loss curve", f"{folder}/loss.png"),
        ("text samples", f"{folder}/samples.txt"),
        ("figures", f"{folder}/metrics.jsonl"),
    ]
    words = _words()
    further = [word for word in words if not word.startswith("train.max_steps=")]
    commands = [
        ("resume, should it be stopped", start_again(processes)),
        *(
            [("evaluate", f"python {evaluate} evaluation.{named}")]
            if config.data.stream_shards is None
            else []
        ),  # holds text out
        ("let it write", f"python {generate} {named}"),
        ("go further", _started(processes, [*further, f"train.max_steps={2 * position.step}"])),
    ]
    if config.log.tensorboard:
        commands.append(("watch", f"tensorboard --logdir {shlex.quote(folder)}/tensorboard"))
    return (
        # The last step of a start is always logged: without figures there was none.
        f"{'Finished' if figures else 'Finished already'}: {config.run.name}",
        rows,
        commands,
    )


def start_again(processes: Processes) -> str:
    """The command that goes on with this run, as a person types it."""
    return _started(processes, _words())


def _started(processes: Processes, words: list[str]) -> str:
    """`train.py` with these words, by what started it this time."""
    nodes, each = processes.num_nodes, processes.per_node
    launcher = {
        "self": "python",
        "torchrun": f"torchrun --nnodes={nodes} --nproc-per-node={each}",
        "srun": f"srun --nodes={nodes} --ntasks-per-node={each} python",
    }[processes.launcher]
    return " ".join([launcher, os.path.relpath(sys.argv[0]), *words])


def _words() -> list[str]:
    """The overrides of this start that the next one needs too, as a person types them.

    A checkpoint that the run began with lies before its own, from which it goes on; a change that
    was allowed has been made.
    """
    once = ("run.resume=", "run.allow_changes=")
    typed = map(_as_typed, HydraConfig.get().overrides.task)
    return [word for word in typed if not word.startswith(once)]


def _as_typed(override: str) -> str:
    """An override as a person types it in a shell."""
    return shlex.quote(override.removeprefix("++"))
