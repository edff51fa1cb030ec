"""Rules that tie keys of the configuration together, and to mesh, device and installed packages.

Each function yields error messages with key, value, rule and remedy. `CONFIG_RULES` apply to every
program except conversion, `INSTALLATION_RULES` to training (`saving_errors` also to planning):
they depend on its sections `checkpoint`, `faults` and `log`, or on the installed packages.
`training.config_validation` passes the sections that their parameters name. The remaining functions
belong to particular programs, or need a mesh or a device. Imports nothing heavy.
"""

import importlib.util
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from checkpoint.config import CheckpointConfig
from data.config import (
    BYTE_VOCAB_SIZE,
    LLAMA3_VOCAB_SIZE,
    N_SPECIALS,
    DataConfig,
    SourceConfig,
    TokenizerConfig,
)
from model.config import ModelConfig, attention_kernel, flex_head_dims, varlen_supports
from parallel.config import BF16_CAPABILITY, FP8_MULTIPLE, ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, resolve_mesh
from parallel.pipeline_schedule import split_layers
from resilience.accelerator import resolve_processes, world_size_errors
from resilience.config import FaultsConfig
from resilience.launcher_variables import launcher_errors
from resilience.processes import Processes
from training.config import LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig

HOPPER = (9, 0)
"""Compute capability of the first GPUs with the symmetric memory that async TP needs."""
# Above this beta2, a bf16 second moment no longer decays: the change is below half a unit (2**-8).
MAX_BETA2_BF16 = 1 - 2**-8


# ---------------------------------------------------------------- one section


def run_errors(run: RunConfig) -> Iterator[str]:
    if not run.name or "/" in run.name or run.name.startswith("."):
        yield f"run.name={run.name!r} is not a folder name; use letters, digits, - and _"
    if run.init_from is not None and run.resume not in ("auto", "never"):
        yield (
            f"run.resume={run.resume} loads a checkpoint with its optimizer and "
            f"run.init_from={run.init_from} loads weights only; use run.resume=auto or "
            "run.init_from=null"
        )


def parallel_errors(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.compile is False:
        yield from _budget_errors(parallel, "parallel.compile=false")
    mode, modes = parallel.activation_checkpoint, parallel.pp_checkpoint
    if modes is not None and mode != "none":
        yield (
            f"parallel.activation_checkpoint={mode} is replaced by parallel.pp_checkpoint="
            f"{_in_brackets(modes)}; use parallel.activation_checkpoint=none or "
            "parallel.pp_checkpoint=null"
        )


def _budget_errors(parallel: ParallelConfig, reason: str) -> Iterator[str]:
    """Yield errors for memory budgets, which the compiler alone can keep."""
    mode, modes = parallel.activation_checkpoint, parallel.pp_checkpoint
    if isinstance(mode, float):
        yield (
            f"parallel.activation_checkpoint={mode} is a memory budget of the compiler, but "
            f"{reason}; use parallel.compile=true, or parallel.activation_checkpoint=none, "
            "selective or full"
        )
    if modes is not None and any(isinstance(each, float) for each in modes):
        yield (
            f"parallel.pp_checkpoint={_in_brackets(modes)} has a memory budget of the compiler, "
            f"but {reason}; use parallel.compile=true, or none, selective or full for each rank"
        )


def precision_errors(precision: PrecisionConfig) -> Iterator[str]:
    if precision.fp8 is not None and precision.param == "fp32":
        yield (
            f"precision.fp8={precision.fp8} multiplies bf16 activations, but "
            "precision.param=fp32; use precision.param=bf16 or precision.fp8=null"
        )


def faults_errors(faults: FaultsConfig) -> Iterator[str]:
    if faults.rewind_on_spike and faults.spike_threshold is None:
        yield (
            "faults.rewind_on_spike=true needs a threshold, but faults.spike_threshold=null; "
            "use faults.spike_threshold=8"
        )


def tokenizer_errors(tokenizer: TokenizerConfig) -> Iterator[str]:
    name, size = tokenizer.name, tokenizer.vocab_size
    fixed = {"llama3": LLAMA3_VOCAB_SIZE, "byte": BYTE_VOCAB_SIZE}.get(name, size)
    if size != fixed:
        yield f"tokenizer.vocab_size={size} does not match tokenizer {name}; use {fixed}"
    if name == "bpe" and size < BYTE_VOCAB_SIZE:
        yield (
            f"tokenizer.vocab_size={size} is too small for 256 bytes and {N_SPECIALS} special "
            f"tokens; use at least {BYTE_VOCAB_SIZE}"
        )
    if name == "byte" and tokenizer.path is not None:
        yield f"tokenizer.path={tokenizer.path} does not apply to tokenizer byte; use null"


def data_errors(data: DataConfig) -> Iterator[str]:
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            yield f"{key} is not a folder name; use letters, digits, '_', '-' and '.'"
        yield from _source_errors(key, source)
    if data.packing and not data.document_mask:
        yield (
            f"data.packing={data.packing} packs several documents into a window, but "
            "data.document_mask=false lets them attend to each other; use data.document_mask=true "
            "or data.packing=null"
        )
    yield from _mock_errors(data)
    yield from _stage_order_errors(data)
    if data.stream_shards is None:
        return
    key = f"data.stream_shards={data.stream_shards}"
    if [source.format for source in data.sources.values()] != ["huggingface"]:
        yield f"{key} needs exactly one source, of format huggingface; use data.stream_shards=null"
    for name in ("packing", "shuffle_block_tokens", "stages"):
        if getattr(data, name):
            yield (
                f"{key} cannot be combined with data.{name}; use data.stream_shards=null or "
                f"data.{name}=null"
            )


def _mock_errors(data: DataConfig) -> Iterator[str]:
    """Yield errors for what needs text or shards if a source has none."""
    if not data.is_mock:
        return
    name = next(name for name, source in data.sources.items() if source.format == "mock")
    key = f"data.sources.{name}.format=mock"
    if others := [other for other in data.sources if other != name]:
        yield (
            f"{key} has no text to mix with that of {', '.join(others)}; use data=mock, or remove "
            f"the source with ~data.sources.{name}"
        )
    if data.packing:
        yield f"{key} has no shards to pack for data.packing={data.packing}; use data.packing=null"


def _source_errors(key: str, source: SourceConfig) -> Iterator[str]:
    kind = source.format
    if kind in ("stdlib", "mock") and source.path is not None:
        yield f"{key}.path={source.path} does not apply to format {kind}; use null"
    if kind not in ("stdlib", "mock") and not source.path:
        path = "the name of a dataset" if kind == "huggingface" else "a file, a folder or a glob"
        yield f"{key}.path={source.path or 'null'} is missing for format {kind}; use {path}"
    if source.filter and kind in ("stdlib", "text", "mock"):
        rule = f"does not apply to format {kind}, which has no columns"
        yield f"{key}.filter {rule}; use {key}.filter=null"
    for column, operator, value in source.filter or []:
        compares_list = operator in ("in", "not in")
        if compares_list != isinstance(value, list):
            yield (
                f"{key}.filter ({column} {operator} {value}) has the wrong operand; use "
                f"{'a list' if compares_list else 'one value'} with {operator}"
            )
    if kind in ("stdlib", "mock") and source.split not in ("train", "all"):
        yield f"{key}.split={source.split} does not apply to format {kind}; use train"
    elif kind != "huggingface" and not re.fullmatch(r"\w[\w.-]*(\+\w[\w.-]*)*", source.split):
        yield (
            f"{key}.split={source.split or 'null'} is not the name of a split; use a name like "
            "validation, several like train+validation, or all"
        )
    for name, unset in (("name", "null"), ("revision", "null"), ("streaming", "false")):
        if kind != "huggingface" and (value := getattr(source, name)):
            shown = "true" if value is True else value
            yield f"{key}.{name}={shown} does not apply to format {kind}; use {unset}"


def _stage_order_errors(data: DataConfig) -> Iterator[str]:
    previous = 0
    at_first = {name for name, source in data.sources.items() if source.weight}
    weighted = set(at_first)
    for index, stage in enumerate(data.stages or []):
        key, weights = f"data.stages[{index}]", stage.weights or {}
        for name in weights:
            if name not in data.sources:
                yield f"{key}.weights.{name} is not a source; use {', '.join(sorted(data.sources))}"
        if stage.from_sample <= previous:
            yield (
                f"{key}.from_sample={stage.from_sample} is not after the previous stage "
                f"({previous}); list the stages in order"
            )
        previous = stage.from_sample
        weighted |= {name for name, weight in weights.items() if weight}
    for name, source in data.sources.items():
        if name not in weighted:
            key = f"data.sources.{name}"
            yield (
                f"{key}.weight={source.weight} is 0 in every stage; use {key}.weight=1, or remove "
                f"the source with ~{key}"
            )
    if weighted and not at_first:
        weight = f"data.sources.{min(weighted)}.weight"
        yield f"data.sources: all weights are 0 at the first sample; use {weight}=1"


# ---------------------------------------------------------------- several sections


def stage_errors(train: TrainConfig, data: DataConfig) -> Iterable[str]:
    """Return errors for stages that do not start at a step boundary or have no source."""
    return [] if any(data_errors(data)) else train.plan_stages(data)[1]


def for_every_stage(
    train: TrainConfig, data: DataConfig, rule: Callable[[TrainConfig], Iterable[str]]
) -> list[str]:
    """Return the errors of `rule` for the sizes of each stage, under the key that set the size."""
    errors = dict.fromkeys(rule(train))  # without duplicates
    keys = {}  # key of train: key of the stage that replaced its value
    for index, stage in enumerate(data.stages or []):
        for name in ("seq_len", "global_batch_size", "micro_batch_size"):
            if (value := getattr(stage, name)) is not None:
                train = replace(train, **{name: value})
                keys[f"train.{name}"] = f"data.stages[{index}].{name}"
        for error in rule(train):
            for key, stage_key in keys.items():
                error = error.replace(key, stage_key)
            errors[error] = None
    return list(errors)


def size_errors(
    train: TrainConfig, data: DataConfig, model: ModelConfig, tokenizer: TokenizerConfig
) -> Iterator[str]:
    """Yield errors for sequence lengths and vocabulary that exceed the model's."""
    longest, size = model.max_seq_len, tokenizer.vocab_size

    def length_errors(sizes: TrainConfig) -> Iterator[str]:
        if sizes.seq_len > longest:
            key = f"train.seq_len={sizes.seq_len}"
            yield f"{key} is above model.max_seq_len={longest}; use at most {longest}"

    yield from for_every_stage(train, data, length_errors)
    if size > model.vocab_size:
        key = f"model.vocab_size={model.vocab_size}"
        yield (
            f"{key} is below tokenizer.vocab_size={size}; use model.vocab_size={size} (or omit "
            "tokenizer= if the run starts from run.init_from)"
        )


def stream_errors(
    data: DataConfig, tokenizer: TokenizerConfig, validation: ValidationConfig
) -> Iterator[str]:
    """Yield errors for validation without held-out text, and for streams with a new tokenizer."""
    key = f"data.stream_shards={data.stream_shards}"
    if data.stream_shards is not None and validation.samples:
        yield (
            f"validation.samples={validation.samples} needs held-out text, but {key} holds out "
            "none; use validation.samples=0 or data.stream_shards=null"
        )
    elif data.validation_fraction == 0 and validation.samples:
        yield (
            f"validation.samples={validation.samples} needs held-out text, but "
            "data.validation_fraction=0 holds out none; use validation.samples=0 or a fraction "
            "such as data.validation_fraction=0.02"
        )
    if data.stream_shards is not None and tokenizer.name == "bpe" and tokenizer.path is None:
        yield (
            f"tokenizer.path=null of tokenizer bpe trains a tokenizer, but {key} prepares no "
            "data; use tokenizer=llama3 or byte, or tokenizer.path=FILE with a tokenizer.model"
        )


def auto_errors(run: RunConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield an error if the planner is to choose without its check."""
    if parallel.auto and run.plan_check == "off":
        yield (
            "parallel.auto=true chooses by the memory plan, which run.plan_check=off disables; use "
            "run.plan_check=refuse or parallel.auto=false"
        )


def schedule_errors(optim: OptimConfig) -> Iterator[str]:
    """Yield an error if the decay never reaches its end, or is outside of the schedule."""
    start, warmup, end = optim.decay_start, optim.warmup_steps, optim.schedule_steps
    if start is not None and optim.schedule != "wsd":
        yield (
            f"optim.decay_start={start} is for optim.schedule=wsd, not {optim.schedule}; use "
            "optim.decay_start=null or optim.schedule=wsd"
        )
    elif start is not None and not warmup <= start < end:
        yield (
            f"optim.decay_start={start} is not between the end of the warm-up, step {warmup}, and "
            f"optim.schedule_steps={end}; use optim.decay_start=null"
        )
    if (optim.schedule, optim.decay_type, optim.min_lr_ratio) == ("wsd", "exponential", 0.0):
        yield (
            "optim.decay_type=exponential multiplies the learning rate in each step by the same "
            "factor, which does not lead to optim.min_lr_ratio=0; use optim.min_lr_ratio=0.01 or "
            "optim.decay_type=linear"
        )


def moment_errors(precision: PrecisionConfig, optim: OptimConfig) -> Iterator[str]:
    """Yield an error if the second moment cannot decay in its storage format."""
    if precision.optimizer_state == "bf16" and optim.betas[1] > MAX_BETA2_BF16:
        yield (
            f"optim.betas={list(optim.betas)} keeps bf16 second moments from decaying, because the "
            f"second is above {MAX_BETA2_BF16:.3f}; use precision.optimizer_state=fp32 or int8"
        )


def saving_errors(checkpoint: CheckpointConfig, faults: FaultsConfig) -> Iterator[str]:
    """Yield errors for checkpoint settings that contradict each other."""
    interval, kept = checkpoint.interval, checkpoint.keep_every
    if kept is not None and interval is None:
        yield (
            f"checkpoint.keep_every={kept} counts steps, but checkpoint.interval=null saves none "
            f"by steps; use checkpoint.interval={kept} or checkpoint.keep_every=null"
        )
    elif kept is not None and interval is not None and kept % interval:
        yield (
            f"checkpoint.keep_every={kept} is not a multiple of checkpoint.interval={interval} and "
            f"would keep only every {math.lcm(kept, interval)}th step; use checkpoint.keep_every="
            f"{_nearest_multiples(kept, interval)}"
        )
    if checkpoint.when_busy == "skip" and not checkpoint.async_save:
        yield (
            "checkpoint.when_busy=skip has no effect with checkpoint.async_save=false; use "
            "checkpoint.when_busy=wait or checkpoint.async_save=true"
        )
    if faults.rewind_on_spike and interval is None and checkpoint.interval_minutes is None:
        yield (
            "faults.rewind_on_spike=true rewinds to a checkpoint, but none is saved before the "
            "end; use checkpoint.interval=500, checkpoint.interval_minutes=30 or "
            "faults.rewind_on_spike=false"
        )


def profile_errors(log: LogConfig, train: TrainConfig) -> Iterator[str]:
    last = train.max_steps
    if any(step > last for step in log.profile or []):
        key = f"log.profile={log.profile}"
        yield f"{key} lists steps after train.max_steps={last}; use steps up to {last}"


def wandb_errors(log: LogConfig) -> Iterator[str]:
    """Yield an error if W&B is requested and not installed, or the project is a boolean."""
    if str(log.wandb).lower() in ("true", "false"):
        yield f"log.wandb={log.wandb} is not the name of a project; use log.wandb=llamesh, or null"
        return
    spec = importlib.util.find_spec("wandb") if log.wandb is not None else None
    # A folder `wandb`, which W&B creates in its working directory, is a package without an origin.
    if log.wandb is not None and (spec is None or spec.origin is None):
        yield (
            f"log.wandb={log.wandb} needs the package wandb; install the extra `wandb` "
            "(pip install '.[wandb]') or use log.wandb=null"
        )


def torchao_errors(precision: PrecisionConfig) -> Iterator[str]:
    """Yield errors for number formats that need torchao if it is not installed."""
    if importlib.util.find_spec("torchao") is not None:
        return
    install = "install the extra `torchao` (pip install '.[torchao]')"
    if precision.fp8 is not None:
        key = f"precision.fp8={precision.fp8}"
        yield f"{key} needs the package torchao; {install} or use precision.fp8=null"
    if precision.optimizer_state == "int8":
        key = "precision.optimizer_state=int8"
        yield f"{key} needs the package torchao; {install} or use precision.optimizer_state=bf16"


def inference_errors(precision: PrecisionConfig, parallel: ParallelConfig) -> Iterator[str]:
    """Yield errors for settings of training only."""
    if parallel.auto:
        yield "parallel.auto=true plans training steps; use parallel.auto=false"
    if parallel.pp > 1:
        yield (
            f"parallel.pp={parallel.pp} is for training only, and its checkpoints load on any "
            "mesh; use parallel.pp=1"
        )
    if parallel.pp_parts > 1:
        yield (
            f"parallel.pp_parts={parallel.pp_parts} is for training only; use parallel.pp_parts=1"
        )
    for key in ("pp_layers", "pp_checkpoint"):
        if values := getattr(parallel, key):
            yield (
                f"parallel.{key}={_in_brackets(values)} is for training only; use "
                f"parallel.{key}=null"
            )
    if precision.fp8 is not None:
        yield f"precision.fp8={precision.fp8} is for training only; use precision.fp8=null"


CONFIG_RULES = (
    run_errors,
    parallel_errors,
    precision_errors,
    faults_errors,
    tokenizer_errors,
    data_errors,
    stage_errors,
    size_errors,
    stream_errors,
    auto_errors,
    schedule_errors,
    moment_errors,
)
INSTALLATION_RULES = (saving_errors, wandb_errors, torchao_errors, profile_errors)


# ---------------------------------------------------------------- mesh


def mesh_errors(
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
) -> Iterator[str]:
    """Yield errors for model, batches and data that do not divide over the mesh."""

    def stage_size_errors(sizes: TrainConfig) -> Iterator[str]:
        yield from model_errors(mesh, parallel, model, sizes.seq_len)
        yield from batch_errors(mesh, sizes)
        yield from interleaving_errors(mesh, parallel, sizes, batches)
        yield from fp8_size_errors(mesh, precision, model, sizes)

    batches = [each.global_batch_size or train.global_batch_size for each in data.stages or []]
    batches.append(train.global_batch_size)
    yield from pipeline_errors(mesh, parallel, model)
    yield from stream_shard_errors(mesh, train, data)
    yield from for_every_stage(train, data, stage_size_errors)


def model_errors(
    mesh: MeshShape, parallel: ParallelConfig, model: ModelConfig, seq_len: int
) -> Iterator[str]:
    """Yield errors for model sizes and sequence length that do not divide over the mesh."""
    tp, cp, local_len = mesh.tp, mesh.cp, seq_len // mesh.cp
    for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size = getattr(model, key)
        if size % tp:
            yield f"parallel.tp={tp} does not divide model.{key}={size}; use {_divisors(size)}"
    if cp > 1 and seq_len % (2 * cp):
        sizes = "1" if seq_len % 2 else _divisors(seq_len // 2)
        yield (
            f"parallel.cp={cp} splits a sequence into {2 * cp} chunks, but train.seq_len={seq_len} "
            f"is not a multiple of that; use {sizes}, or a multiple of {2 * cp} for train.seq_len"
        )
    elif parallel.sequence_parallel and local_len % tp:
        length = f"train.seq_len={seq_len}"
        if cp > 1:
            length = f"train.seq_len / parallel.cp = {local_len}"
        yield (
            f"parallel.tp={tp} does not divide {length}; use {_divisors(local_len)}, or "
            "parallel.sequence_parallel=false"
        )


def pipeline_errors(mesh: MeshShape, parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Yield errors for layers that cannot be distributed over the pipeline stages."""
    parts, n_layers, given = parallel.pp_parts, model.n_layers, parallel.pp_layers
    stages = mesh.pp * parts
    key = f"parallel.pp={mesh.pp}" + (f" × parallel.pp_parts={parts}" if parts > 1 else "")
    if mesh.pp == 1 and parts > 1:
        yield (
            f"parallel.pp_parts={parts} divides the model of each pipeline rank, but "
            "parallel.pp=1; use parallel.pp_parts=1 or parallel.pp=2"
        )
    elif mesh.pp == 1 and given is not None:
        yield f"parallel.pp_layers={_in_brackets(given)} does not apply to parallel.pp=1; use null"
    elif stages > n_layers + 1:  # the last one may be the head alone
        use = (
            f"parallel.pp={max(each for each in _factors(mesh.world_size) if each <= n_layers + 1)}"
        )
        if parts > 1:
            use = "parallel.pp_parts=1" if mesh.pp <= n_layers + 1 else f"{use} parallel.pp_parts=1"
        yield (
            f"{key} are {stages} stages, but the model has {n_layers} layers and the head; "
            f"use {use}"
        )
    elif given is not None and (len(given) != stages or sum(given) != n_layers or 0 in given[:-1]):
        yield (
            f"parallel.pp_layers={_in_brackets(given)} must list the layers of the {stages} stages "
            f"of {key}, {n_layers} together, and none but the last may be 0; use "
            f"{_in_brackets(split_layers(model, stages))} or null"
        )

    modes = parallel.pp_checkpoint
    if modes is not None and mesh.pp == 1:
        yield (
            f"parallel.pp_checkpoint={_in_brackets(modes)} does not apply to parallel.pp=1; "
            "use null"
        )
    elif modes is not None and len(modes) != mesh.pp:
        yield (
            f"parallel.pp_checkpoint={_in_brackets(modes)} must list the activation checkpointing "
            f"of each of the {mesh.pp} ranks of parallel.pp={mesh.pp}; use "
            f"{_in_brackets([*modes, *['none'] * mesh.pp][: mesh.pp])} or null"
        )


def _in_brackets(values: Sequence[object]) -> str:
    """Return a list in command-line syntax."""
    return f"[{','.join(map(str, values))}]"


def interleaving_errors(
    mesh: MeshShape, parallel: ParallelConfig, train: TrainConfig, batches: Sequence[int] = ()
) -> Iterator[str]:
    """Yield an error if the interleaved schedule cannot distribute the micro-batches.

    Args:
        batches: Global batch sizes of other stages, in which the remedy must be valid too.
    """
    local, remainder = divmod(train.global_batch_size, mesh.dp)
    size = train.micro_batch_size or local
    if parallel.pp_parts == 1 or mesh.pp == 1 or remainder or local % size:
        return
    count = local // size
    if count % mesh.pp:
        common = math.gcd(local, *(batch // mesh.dp for batch in batches))
        sizes = [each for each in _factors(common) if common // each % mesh.pp == 0]
        words = f"train.micro_batch_size={_nearest(size, sizes)} or " if sizes else ""
        yield (
            f"parallel.pp_parts={parallel.pp_parts} interleaves groups of parallel.pp={mesh.pp} "
            f"micro-batches, but each rank has {count} per step; use {words}parallel.pp_parts=1"
        )


def _nearest(number: int, choices: list[int]) -> int:
    return min(choices, key=lambda each: (abs(each - number), each))


def batch_errors(mesh: MeshShape, train: TrainConfig) -> Iterator[str]:
    """Yield errors for batch sizes that do not divide over the data ranks."""
    batch, size = train.global_batch_size, train.micro_batch_size
    per_rank, remainder = divmod(batch, mesh.dp)
    if remainder:
        yield _data_rank_error(f"train.global_batch_size={batch}", batch, mesh)
    elif size and per_rank % size:
        yield (
            f"train.micro_batch_size={size} does not divide the {per_rank} sequences of each of "
            f"the {mesh.dp} data ranks; use {_divisors(per_rank)}"
        )


def other_axes_errors(
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
) -> Iterator[str]:
    """Yield an error that names other meshes of these processes if the batch does not divide.

    Of those that divide batch, heads and sequence, the three with the most data ranks, then the
    fewest changes.
    """
    batches = [train.global_batch_size, *(s.global_batch_size for s in data.stages or [])]
    if all(batch is None or batch % mesh.dp == 0 for batch in batches):
        return
    number, found = mesh.world_size, []
    per_stage = number // mesh.pp
    for tp in _factors(per_stage):
        for cp in _factors(per_stage // tp):
            dp, replicas = per_stage // tp // cp, mesh.dp_replicate
            replicas = replicas if dp % replicas == 0 else 1
            other = MeshShape(replicas, dp // replicas, cp, tp, mesh.pp)
            if not any(mesh_errors(other, parallel, precision, model, train, data)):
                found.append(other)
    if not found:
        return

    def changes(other: MeshShape) -> list[str]:
        return [
            f"parallel.{axis}={size}"
            for axis, size in vars(other).items()
            if getattr(parallel, axis) not in (-1, size)
        ]

    nearest = sorted(found, key=lambda other: (other.ranks_per_sample, len(changes(other))))[:3]
    words = ", or ".join(" ".join(changes(other)) for other in nearest)
    yield (
        f"parallel.dp_shard={parallel.dp_shard} makes {mesh.dp} data ranks of {number} processes, "
        f"but other meshes divide batch, heads and sequence; use {words}"
    )


def _factors(number: int) -> list[int]:
    low = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*low, *(number // each for each in low)})


def stream_shard_errors(mesh: MeshShape, train: TrainConfig, data: DataConfig) -> Iterator[str]:
    """Yield errors for stream shards that do not divide over the batch and the data ranks."""
    shards, batch = data.stream_shards, train.global_batch_size
    key = f"data.stream_shards={shards}"
    if shards is not None and batch % shards:
        yield (
            f"train.global_batch_size={batch} is not a multiple of {key}; use "
            f"{_nearest_multiples(batch, shards)}, or {_divisors(batch)} stream shards"
        )
    if shards is not None and shards % mesh.dp:
        yield _data_rank_error(key, shards, mesh)


def _data_rank_error(key: str, number: int, mesh: MeshShape) -> str:
    return (
        f"{key} is not a multiple of the {mesh.dp} data ranks (dp_replicate × dp_shard); use "
        f"{_nearest_multiples(number, mesh.dp)}, or {_divisors(number)} data ranks"
    )


def fp8_size_errors(
    mesh: MeshShape, precision: PrecisionConfig, model: ModelConfig, train: TrainConfig
) -> Iterator[str]:
    """Yield errors for sizes that fp8 matrix products do not support on any device."""
    if precision.fp8 is None:
        return
    widths = {"dim": model.dim, "ffn_dim": model.ffn_dim}
    widths["n_kv_heads × head_dim"] = model.n_kv_heads * model.head_dim
    for key, width in widths.items():
        if width % mesh.tp == 0 and width // mesh.tp % FP8_MULTIPLE:
            yield (
                f"precision.fp8={precision.fp8} needs widths that are multiples of {FP8_MULTIPLE}, "
                f"but model.{key}={width} over parallel.tp={mesh.tp} is {width // mesh.tp}; use a "
                f"multiple of {FP8_MULTIPLE * mesh.tp}, or precision.fp8=null"
            )
    micro_batch_size = train.micro_batch_size or train.global_batch_size // mesh.dp
    if micro_batch_size * train.seq_len // mesh.cp % FP8_MULTIPLE:
        yield (
            f"precision.fp8={precision.fp8} needs micro-batches of a multiple of {FP8_MULTIPLE} "
            f"tokens, but a rank has {micro_batch_size} × train.seq_len={train.seq_len} / "
            f"parallel.cp={mesh.cp}; use a train.seq_len that is a multiple of "
            f"{FP8_MULTIPLE * mesh.cp}, or precision.fp8=null"
        )


# ---------------------------------------------------------------- device


def device_errors(
    accelerator: str,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    capability: tuple[int, int] = BF16_CAPABILITY,
) -> Iterator[str]:
    """Yield errors for attention kernels and async TP that the device does not support.

    Args:
        capability: Lowest compute capability of the GPUs.
    """
    kernel = model.attention
    key = f"model.attention={kernel}"
    if kernel in ("flex", "varlen") and accelerator != "cuda":
        yield f"{key} has no backward on CPU; use model.attention=auto or sdpa"
    elif accelerator == "cuda" and capability < BF16_CAPABILITY:
        yield from bf16_errors(capability, precision, model)
    elif kernel == "varlen" and precision.param == "fp32":
        yield (
            f"{key} computes in 16 bits, but precision.param=fp32; use precision.param=bf16, "
            "or model.attention=auto, sdpa or flex"
        )
    if kernel == "varlen" and not varlen_supports(model.head_dim, capability):
        yield (
            f"{key} needs model.dim / model.n_heads to be a multiple of 8 and at most 256 (and not "
            "193 to 224 on GPUs other than A100, H100, H200 and B200), but it is "
            f"{model.head_dim}; use model.attention=auto or sdpa"
        )
    smallest, largest = flex_head_dims(capability)
    if kernel == "flex" and not smallest <= model.head_dim <= largest:
        yield (
            f"{key} needs model.dim / model.n_heads to be {smallest} to {largest} on GPUs of "
            f"compute capability {_shown(capability)}, but it is {model.head_dim}; use "
            "model.attention=auto or sdpa"
        )
    if kernel == "varlen" and mesh.cp > 1:
        yield (
            f"{key} needs complete documents, but parallel.cp={mesh.cp} splits them; use "
            "model.attention=auto, sdpa or flex"
        )
    if parallel.compile == "auto" and accelerator != "cuda":
        yield from _budget_errors(parallel, "parallel.compile=auto compiles on GPUs only")
    if not parallel.async_tp:
        return
    if accelerator != "cuda" or capability < HOPPER:
        yield (
            "parallel.async_tp=true needs the symmetric memory of Hopper or newer NVIDIA GPUs; "
            "use parallel.async_tp=false"
        )
    if mesh.tp == 1:
        yield (
            "parallel.async_tp=true has nothing to overlap with parallel.tp=1; use parallel.tp=2 "
            "or parallel.async_tp=false"
        )
    if not parallel.resolved(accelerator).compile:
        yield (
            "parallel.async_tp=true is implemented by the compiler, but blocks are not compiled; "
            "use parallel.compile=true or parallel.async_tp=false"
        )
    if not parallel.sequence_parallel:
        yield (
            "parallel.async_tp=true overlaps gathers along the sequence, but "
            "parallel.sequence_parallel=false; use parallel.sequence_parallel=true or "
            "parallel.async_tp=false"
        )


def bf16_errors(
    capability: tuple[int, int], precision: PrecisionConfig, model: ModelConfig
) -> Iterator[str]:
    """Yield errors for what GPUs without bf16 tensor cores do not support."""
    if capability >= BF16_CAPABILITY:
        return
    rule = f"needs GPUs of compute capability 8.0 (Ampere), but this one has {_shown(capability)}"
    if precision.param == "bf16":
        yield f"precision.param=bf16 {rule}; use precision.param=auto or fp32"
    if model.attention == "varlen":
        yield f"model.attention=varlen {rule}; use model.attention=auto or sdpa"


def _shown(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def compiler_errors(
    accelerator: str,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    document_mask: bool,
    capability: tuple[int, int],
) -> Iterator[str]:
    """Yield an error if the compiler of the kernels does not exist.

    FlexAttention and the update of int8 moments are compiled in eager steps too.
    """
    missing = _missing_compiler(accelerator)
    if missing is None:
        return
    compiled, changes = [], []
    if parallel.resolved(accelerator).compile:
        compiled.append(f"parallel.compile={str(parallel.compile).lower()}")
        changes.append("parallel.compile=false")
        if isinstance(parallel.activation_checkpoint, float):
            changes.append("parallel.activation_checkpoint=selective")
        if parallel.async_tp:
            changes.append("parallel.async_tp=false")
    is_16_bit = precision.param != "fp32" and capability >= BF16_CAPABILITY
    on_gpu = capability if accelerator == "cuda" else None
    kernel = attention_kernel(
        model.attention, model.head_dim, on_gpu, is_16_bit, complete=mesh.cp == 1
    )
    if kernel == "flex" and (document_mask or mesh.cp > 1):
        compiled.append(f"model.attention={model.attention}")
        changes.append("model.attention=sdpa")
    if precision.optimizer_state == "int8":
        compiled.append("precision.optimizer_state=int8")
        changes.append("precision.optimizer_state=fp32")
    if compiled:
        yield (
            f"{' and '.join(compiled)}: the kernels are compiled, but {missing}, or use "
            f"{' '.join(changes)}"
        )


def _missing_compiler(accelerator: str) -> str | None:
    """Return why there is no compiler, and a remedy; None if there is one.

    Triton uses CC, gcc or clang (triton/runtime/build.py, `_build`), Inductor on CPU CXX or g++
    (torch/_inductor/config.py, `cpp.cxx`). A variable holds one word, the path of an executable.
    """
    if accelerator == "cuda":
        variable, kind, names = "CC", "C", ["gcc", "clang"]
    else:
        variable, kind = "CXX", "C++"
        names = ["clang++" if sys.platform == "darwin" else "g++"]
    given = os.environ.get(variable)
    if given is not None:
        rule = f"{variable}={given} is not an executable file; run: unset {variable}"
        return None if shutil.which(given) else rule
    if any(shutil.which(name) for name in names):
        return None
    return f"there is no {kind} compiler ({', '.join([variable, *names])}); install {names[0]}"


def fp8_errors(
    accelerator: str, precision: PrecisionConfig, capability: tuple[int, int] | None = None
) -> Iterator[str]:
    """Yield an error if the device does not support fp8.

    Args:
        capability: Lowest compute capability of the GPUs; None if unknown.
    """
    recipe = precision.fp8
    if recipe is None:
        return
    if accelerator != "cuda":
        yield (
            f"precision.fp8={recipe} needs a GPU, but the run uses "
            f"parallel.accelerator={accelerator}; use precision.fp8=null"
        )
        return
    from parallel.float8 import CAPABILITY

    if capability is not None and capability < CAPABILITY[recipe]:
        lesser = "precision.fp8=tensorwise or " if capability >= CAPABILITY["tensorwise"] else ""
        yield (
            f"precision.fp8={recipe} needs GPUs of compute capability "
            f"{_shown(CAPABILITY[recipe])}, but this one has {_shown(capability)}; use "
            f"{lesser}precision.fp8=null"
        )


def launch_rule(tasks: Processes | None = None) -> Callable[..., Iterator[str]]:
    """Return the rule for a launch on this machine, or for `tasks` on other machines."""

    def launch_errors(
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        model: ModelConfig,
        train: TrainConfig,
        data: DataConfig,
    ) -> Iterator[str]:
        if tasks is None:
            processes, errors = resolve_processes(parallel)
            errors += launcher_errors(parallel, processes.accelerator)
        else:
            processes, errors = tasks, world_size_errors(parallel, tasks)
        mesh, unresolved = resolve_mesh(parallel, processes.world_size)
        yield from errors
        if parallel.auto and tasks is not None:
            return  # each run chooses on its machines
        if tasks is None:
            accelerator, capability = processes.accelerator, processes.capability
            lowest = capability or HOPPER  # without a GPU, `errors` has the error
            yield from device_errors(accelerator, mesh, parallel, precision, model, lowest)
            yield from fp8_errors(accelerator, precision, capability)
            yield from compiler_errors(
                accelerator, mesh, parallel, precision, model, data.document_mask, lowest
            )
        yield from unresolved or mesh_errors(mesh, parallel, precision, model, train, data)
        has_fixed_number = processes.launcher != "self" or processes.accelerator == "cuda"
        if not unresolved and (has_fixed_number or parallel.devices is not None):
            yield from other_axes_errors(mesh, parallel, precision, model, train, data)

    return launch_errors


# ---------------------------------------------------------------- other programs


def prepare_errors(
    pack: int | list[int] | None, verify: bool, inspect: str | None, data: DataConfig
) -> Iterator[str]:
    """Yield errors for actions of `prepare.py` that exclude each other or have nothing to do."""
    if data.is_mock and inspect is None:
        yield "data=mock has nothing to prepare; run train.py with it, or use data=stdlib"
    actions = {"pack": pack is not None, "verify": verify, "inspect": inspect is not None}
    names = [name for name, requested in actions.items() if requested]
    if len(names) > 1:
        yield f"{' and '.join(names)} are mutually exclusive; use one per command"


def inspect_errors(
    inspect: str | None, sample: int, seq_len: int | None, seed: int | None
) -> Iterator[str]:
    """Yield errors for keys of `prepare.py` that apply only to `inspect`."""
    for key, value in (("sample", sample or None), ("seq_len", seq_len), ("seed", seed)):
        if inspect is None and value is not None:
            yield f"{key}={value} has no effect without inspect; add inspect=FOLDER"


PREPARE_RULES = (*CONFIG_RULES, prepare_errors, inspect_errors)


def generate_errors(
    prompt: str | None,
    prompts: str | None,
    chat: bool,
    system: str | None,
    tokenizer_path: str | None,
    parallel: ParallelConfig,
) -> Iterator[str]:
    for axis in ("dp_replicate", "dp_shard", "cp"):
        if (size := getattr(parallel, axis)) != 1:
            yield (
                f"parallel.{axis}={size} is not supported for generation; use parallel.{axis}=1, "
                "and parallel.tp to shard the model"
            )
    if prompt is not None and prompts is not None:
        yield f"prompts={prompts} and prompt={prompt!r} are both given; omit one of them"
    is_json = prompts is not None and prompts.lower().endswith(".jsonl")
    if system is not None and not (chat or is_json):
        yield f"system={system!r} has no effect without chat=true; add chat=true"
    if chat and tokenizer_path is None:
        yield "tokenizer_path=null cannot encode the messages of chat=true; use tokenizer_path=auto"
    if chat and prompt == "":
        yield "prompt='' is empty, but chat=true needs a message; use at least one character"
    if tokenizer_path is None and not is_json and not chat:
        yield (
            "tokenizer_path=null cannot encode text; use prompts=FILE.jsonl with token ids as "
            'prompts ({"prompt": [1, 2]}), or tokenizer_path=auto'
        )


def task_errors(
    tasks: list[str],
    tokenizer_path: str | None,
    num_fewshot: int | None,
    limit: int | None,
    apply_chat_template: bool,
    log_samples: bool,
) -> Iterator[str]:
    options = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template or None,
        "log_samples": log_samples or None,
    }
    for key, value in options.items() if not tasks else ():
        if value is not None:
            shown = str(value).lower()
            yield f"{key}={shown} has no effect without tasks; add tasks=[NAME], or omit {key}"
    if tasks and tokenizer_path is None:
        yield (
            f"tokenizer_path=null has no tokenizer for tasks={tasks}; use tokenizer_path=auto or "
            "the path of a tokenizer.model or tokenizer.json, or tasks=[]"
        )


def convert_errors(format: str | None, parts: int) -> Iterator[str]:
    if parts != 1 and format != "meta":
        yield f"parts={parts} applies to Meta folders only; use parts=1 or format=meta"


def _nearest_multiples(number: int, unit: int) -> str:
    """Return the multiples of `unit` next to `number`, as text."""
    below = number - number % unit
    return f"{below} or {below + unit}" if below else str(unit)


def _divisors(number: int, limit: int = 1024) -> str:
    """Return the divisors of `number` up to `limit`, as text."""
    *most, last = [str(d) for d in range(1, min(number, limit) + 1) if number % d == 0]
    return f"{', '.join(most)} or {last}" if most else last
