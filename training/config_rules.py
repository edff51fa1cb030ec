"""Rules that tie keys of the configuration together, and to mesh, device and installed packages.

Each function returns error messages with key, value, rule and remedy. `CONFIG_RULES` apply to a
configuration alone, `INSTALLATION_RULES` also to the packages of this machine;
`training.config_validation` passes the sections that their parameters name. The other functions
need a mesh or a device. Imports nothing heavy.
"""

import importlib.util
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from checkpoint.config import CheckpointConfig
from data.config import (
    BYTE_VOCAB_SIZE,
    LLAMA3_VOCAB_SIZE,
    N_SPECIALS,
    DataConfig,
    SourceConfig,
    TokenizerConfig,
)
from data.stages import plan_stages
from model.config import ModelConfig
from parallel.config import FP8_MULTIPLE, ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from resilience.config import FaultsConfig
from training.config import LogConfig, OptimConfig, RunConfig, TrainConfig, ValidationConfig

# Above this beta2, a bf16 second moment no longer decays: the change is below half a unit (2**-8).
MAX_BETA2_BF16 = 1 - 2**-8


# ---------------------------------------------------------------- one section


def run_errors(run: RunConfig) -> list[str]:
    errors = []
    if not run.name or "/" in run.name or run.name.startswith("."):
        errors.append(f"run.name={run.name!r} is not a folder name; use letters, digits, - and _")
    if run.init_from is not None and run.resume not in ("auto", "never"):
        errors.append(
            f"run.resume={run.resume} loads a checkpoint with its optimizer and "
            f"run.init_from={run.init_from} loads weights only; use one of them"
        )
    return errors


def parallel_errors(parallel: ParallelConfig) -> list[str]:
    budget = parallel.activation_checkpoint
    if isinstance(budget, float) and not parallel.compile:
        return [
            f"parallel.activation_checkpoint={budget} is a memory budget of the compiler, but "
            "parallel.compile=false; use parallel.compile=true, or none, selective or full"
        ]
    return []


def precision_errors(precision: PrecisionConfig) -> list[str]:
    if precision.fp8 is not None and precision.param == "fp32":
        return [
            f"precision.fp8={precision.fp8} multiplies bf16 activations, but "
            "precision.param=fp32; use precision.param=bf16 or precision.fp8=null"
        ]
    return []


def faults_errors(faults: FaultsConfig) -> list[str]:
    if faults.rewind_on_spike and faults.spike_threshold is None:
        return [
            "faults.rewind_on_spike=true needs a threshold, but faults.spike_threshold=null; "
            "use faults.spike_threshold=8"
        ]
    return []


def tokenizer_errors(tokenizer: TokenizerConfig) -> list[str]:
    errors = []
    size = tokenizer.vocab_size
    fixed = {"llama3": LLAMA3_VOCAB_SIZE, "byte": BYTE_VOCAB_SIZE}.get(tokenizer.name)
    if fixed is not None and size != fixed:
        errors.append(
            f"tokenizer.vocab_size={size} does not match tokenizer {tokenizer.name}; use {fixed}"
        )
    if tokenizer.name == "bpe" and size < BYTE_VOCAB_SIZE:
        errors.append(
            f"tokenizer.vocab_size={size} is too small for 256 bytes and {N_SPECIALS} special "
            f"tokens; use at least {BYTE_VOCAB_SIZE}"
        )
    if tokenizer.name == "byte" and tokenizer.path is not None:
        errors.append(f"tokenizer.path={tokenizer.path} does not apply to tokenizer byte; use null")
    return errors


def data_errors(data: DataConfig) -> list[str]:
    errors = []
    for name, source in data.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            errors.append(
                f"data.sources.{name} is not a folder name; use letters, digits, '_', '-' and '.'"
            )
        errors += _source_errors(f"data.sources.{name}", source)
    if data.packing and not data.document_mask:
        errors.append(
            f"data.packing={data.packing} packs several documents into a window, but "
            "data.document_mask=false lets them attend to each other; use data.document_mask=true "
            "or data.packing=null"
        )
    return errors + _stage_order_errors(data) + _stream_source_errors(data)


def _source_errors(key: str, source: SourceConfig) -> list[str]:
    errors = []
    kind = source.format
    if kind == "stdlib" and source.path is not None:
        errors.append(f"{key}.path={source.path} does not apply to format stdlib; use null")
    if kind != "stdlib" and not source.path:
        needed = "a dataset name" if kind == "huggingface" else "a file, folder or glob"
        errors.append(f"{key}.path={source.path or 'null'} is missing for format {kind}; {needed}")
    if source.filter and kind in ("stdlib", "text"):
        errors.append(
            f"{key}.filter does not apply to format {kind}, whose rows are plain text; use null"
        )
    for column, operator, value in source.filter or []:
        if (operator in ("in", "not in")) != isinstance(value, list):
            needed = "a list" if operator in ("in", "not in") else "one value"
            errors.append(
                f"{key}.filter ({column} {operator} {value}) has the wrong operand; {operator} "
                f"compares with {needed}"
            )
    if kind != "huggingface":
        for name, unset in (("name", "null"), ("revision", "null"), ("streaming", "false")):
            if value := getattr(source, name):
                errors.append(f"{key}.{name}={value} does not apply to format {kind}; use {unset}")
    return errors


def _stage_order_errors(data: DataConfig) -> list[str]:
    errors = []
    previous = 0
    for index, stage in enumerate(data.stages or []):
        key = f"data.stages[{index}]"
        errors += [
            f"{key}.weights.{name} is not a source; use {', '.join(sorted(data.sources))}"
            for name in stage.weights or {}
            if name not in data.sources
        ]
        if stage.from_sample <= previous:
            errors.append(
                f"{key}.from_sample={stage.from_sample} is not after the previous stage "
                f"({previous}); list the stages in order"
            )
        previous = stage.from_sample
    weighted = {
        name for stage in data.stages or [] for name, w in (stage.weights or {}).items() if w
    }
    weighted |= {name for name, source in data.sources.items() if source.weight}
    errors += [
        f"data.sources.{name}.weight={source.weight} is 0 in every stage; give it a weight or "
        "remove the source"
        for name, source in data.sources.items()
        if name not in weighted
    ]
    if weighted and not any(source.weight for source in data.sources.values()):
        errors.append("data.sources: all weights are 0 at the first sample; give one a weight")
    return errors


def _stream_source_errors(data: DataConfig) -> list[str]:
    if data.stream_shards is None:
        return []
    key = f"data.stream_shards={data.stream_shards}"
    errors = []
    if [source.format for source in data.sources.values()] != ["huggingface"]:
        errors.append(f"{key} needs exactly one source, of format huggingface; use one or null")
    for name in ("packing", "shuffle_block_tokens", "stages"):
        if getattr(data, name):
            errors.append(f"{key} cannot be combined with data.{name}; set one of them to null")
    return errors


# ---------------------------------------------------------------- several sections


def stage_errors(train: TrainConfig, data: DataConfig) -> list[str]:
    """Return errors for stages that do not start at a step boundary or have no source."""
    if data_errors(data):
        return []
    return plan_stages(
        data,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )[1]


def for_every_stage(
    train: TrainConfig, data: DataConfig, rule: Callable[[TrainConfig], list[str]]
) -> list[str]:
    """Return the errors of `rule` for the sizes of each stage, under the key that set the size."""
    errors = rule(train)
    sizes = train
    keys = {}  # key of train: key of the stage that replaced its value
    for index, stage in enumerate(data.stages or []):
        for name in ("seq_len", "global_batch_size", "micro_batch_size"):
            if (value := getattr(stage, name)) is not None:
                sizes = replace(sizes, **{name: value})
                keys[f"train.{name}"] = f"data.stages[{index}].{name}"
        for error in rule(sizes):
            for key, stage_key in keys.items():
                error = error.replace(key, stage_key)
            if error not in errors:
                errors.append(error)
    return errors


def size_errors(
    train: TrainConfig, data: DataConfig, model: ModelConfig, tokenizer: TokenizerConfig
) -> list[str]:
    """Return errors for sequence lengths and vocabulary that exceed the model's."""

    def length_errors(sizes: TrainConfig) -> list[str]:
        if sizes.seq_len <= model.max_seq_len:
            return []
        return [
            f"train.seq_len={sizes.seq_len} is above model.max_seq_len={model.max_seq_len}; use at "
            f"most {model.max_seq_len}"
        ]

    errors = for_every_stage(train, data, length_errors)
    if tokenizer.vocab_size > model.vocab_size:
        errors.append(
            f"model.vocab_size={model.vocab_size} is below "
            f"tokenizer.vocab_size={tokenizer.vocab_size}; use "
            f"model.vocab_size={tokenizer.vocab_size}"
        )
    return errors


def stream_errors(
    data: DataConfig, tokenizer: TokenizerConfig, validation: ValidationConfig
) -> list[str]:
    """Return errors for settings that streams do not support: validation, a new tokenizer."""
    if data.stream_shards is None:
        return []
    errors = []
    key = f"data.stream_shards={data.stream_shards}"
    if validation.samples:
        errors.append(
            f"validation.samples={validation.samples} needs held-out text, but {key} holds out "
            "none; use validation.samples=0 or data.stream_shards=null"
        )
    if tokenizer.name == "bpe" and tokenizer.path is None:
        errors.append(
            f"tokenizer.path=null of tokenizer bpe trains a tokenizer, but {key} prepares no "
            "data; use tokenizer=llama3 or byte, or set tokenizer.path to a tokenizer.model"
        )
    return errors


def moment_errors(precision: PrecisionConfig, optim: OptimConfig) -> list[str]:
    """Return an error if the second moment cannot decay in its storage format."""
    if precision.optimizer_state != "bf16" or optim.betas[1] <= MAX_BETA2_BF16:
        return []
    return [
        f"optim.betas={optim.betas} keeps bf16 second moments from decaying, because the second is "
        f"above {MAX_BETA2_BF16:.3f}; use precision.optimizer_state=fp32 or int8"
    ]


def saving_errors(checkpoint: CheckpointConfig, faults: FaultsConfig) -> list[str]:
    """Return errors for checkpoint settings that contradict each other."""
    errors = []
    interval, kept = checkpoint.interval, checkpoint.keep_every
    if kept is not None and interval is None:
        errors.append(
            f"checkpoint.keep_every={kept} counts steps, but checkpoint.interval=null saves none "
            f"by steps; use checkpoint.interval={kept} or checkpoint.keep_every=null"
        )
    elif kept is not None and interval is not None and kept % interval:
        both = math.lcm(kept, interval)
        errors.append(
            f"checkpoint.keep_every={kept} is not a multiple of checkpoint.interval={interval} and "
            f"would keep only every {both}th step; use checkpoint.keep_every="
            f"{_nearest_multiples(kept, interval)}"
        )
    if checkpoint.when_busy == "skip" and not checkpoint.async_save:
        errors.append(
            "checkpoint.when_busy=skip has no effect with checkpoint.async_save=false; use "
            "checkpoint.when_busy=wait or checkpoint.async_save=true"
        )
    if faults.rewind_on_spike and interval is None and checkpoint.interval_minutes is None:
        errors.append(
            "faults.rewind_on_spike=true rewinds to a checkpoint, but none is saved before the "
            "end; set checkpoint.interval or checkpoint.interval_minutes"
        )
    return errors


def profile_errors(log: LogConfig, train: TrainConfig) -> list[str]:
    if all(step <= train.max_steps for step in log.profile or []):
        return []
    return [
        f"log.profile={log.profile} lists steps after train.max_steps={train.max_steps}; use steps "
        f"up to {train.max_steps}"
    ]


def wandb_package_errors(log: LogConfig) -> list[str]:
    """Return an error if W&B is requested and not installed."""
    if log.wandb is None:
        return []
    from training.wandb_logger import wandb_errors

    return wandb_errors(log.wandb)


def torchao_errors(precision: PrecisionConfig) -> list[str]:
    """Return errors for number formats that need torchao if it is not installed."""
    if importlib.util.find_spec("torchao") is not None:
        return []
    requested: list[tuple[str, str, str]] = []  # key, value, remedy
    if precision.fp8 is not None:
        requested.append(("fp8", precision.fp8, "null"))
    if precision.optimizer_state == "int8":
        requested.append(("optimizer_state", "int8", "bf16"))
    return [
        f"precision.{key}={value} needs the package torchao; install the extra `torchao` "
        f"(pip install '.[torchao]') or use precision.{key}={remedy}"
        for key, value, remedy in requested
    ]


def inference_errors(precision: PrecisionConfig) -> list[str]:
    """Return an error for fp8 outside of training."""
    if precision.fp8 is None:
        return []
    return [f"precision.fp8={precision.fp8} is for training only; use precision.fp8=null"]


CONFIG_RULES = (
    *(run_errors, parallel_errors, precision_errors, faults_errors, tokenizer_errors, data_errors),
    *(stage_errors, size_errors, stream_errors, moment_errors),
)
INSTALLATION_RULES = (saving_errors, wandb_package_errors, torchao_errors, profile_errors)


# ---------------------------------------------------------------- mesh


def mesh_errors(
    mesh: MeshShape,
    parallel: ParallelConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
) -> list[str]:
    """Return errors for model, batches and data that do not divide over the mesh."""

    def stage_sizes(sizes: TrainConfig) -> list[str]:
        return model_errors(mesh, parallel, model, sizes.seq_len) + batch_errors(mesh, sizes)

    return stream_shard_errors(mesh, train, data) + for_every_stage(train, data, stage_sizes)


def model_errors(
    mesh: MeshShape, parallel: ParallelConfig, model: ModelConfig, seq_len: int
) -> list[str]:
    """Return errors for model sizes and sequence length that do not divide over the mesh."""
    errors = []
    tp = mesh.tp
    for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size = getattr(model, key)
        if size % tp:
            errors.append(
                f"parallel.tp={tp} does not divide model.{key}={size}; use {_divisors(size)}"
            )
    if mesh.cp > 1 and seq_len % (2 * mesh.cp):
        sizes = "1" if seq_len % 2 else _divisors(seq_len // 2)
        errors.append(
            f"parallel.cp={mesh.cp} splits a sequence into {2 * mesh.cp} chunks, but "
            f"train.seq_len={seq_len} is not a multiple of that; use {sizes}, or a multiple of "
            f"{2 * mesh.cp} for train.seq_len"
        )
    elif parallel.sequence_parallel and seq_len // mesh.cp % tp:
        length = f"train.seq_len={seq_len}"
        if mesh.cp > 1:
            length = f"train.seq_len / parallel.cp = {seq_len // mesh.cp}"
        errors.append(
            f"parallel.tp={tp} does not divide {length}; use {_divisors(seq_len // mesh.cp)}, or "
            "parallel.sequence_parallel=false"
        )
    return errors


def batch_errors(mesh: MeshShape, train: TrainConfig) -> list[str]:
    """Return errors for batch sizes that do not divide over the data ranks."""
    batch = train.global_batch_size
    per_rank, remainder = divmod(batch, mesh.dp)
    if remainder:
        return [
            f"train.global_batch_size={batch} is not a multiple of the {mesh.dp} data ranks "
            f"(dp_replicate × dp_shard); use {_nearest_multiples(batch, mesh.dp)}, or "
            f"{_divisors(batch)} data ranks"
        ]
    if train.micro_batch_size and per_rank % train.micro_batch_size:
        return [
            f"train.micro_batch_size={train.micro_batch_size} does not divide the {per_rank} "
            f"sequences of each of the {mesh.dp} data ranks; use {_divisors(per_rank)}"
        ]
    return []


def stream_shard_errors(mesh: MeshShape, train: TrainConfig, data: DataConfig) -> list[str]:
    """Return errors for stream shards that do not divide over the batch and the data ranks."""
    shards, batch = data.stream_shards, train.global_batch_size
    if shards is None:
        return []
    errors = []
    if batch % shards:
        errors.append(
            f"train.global_batch_size={batch} is not a multiple of data.stream_shards={shards}; "
            f"use {_nearest_multiples(batch, shards)}, or {_divisors(batch)} stream shards"
        )
    if shards % mesh.dp:
        errors.append(
            f"data.stream_shards={shards} is not a multiple of the {mesh.dp} data ranks "
            f"(dp_replicate × dp_shard); use {_nearest_multiples(shards, mesh.dp)}, or "
            f"{_divisors(shards)} data ranks"
        )
    return errors


# ---------------------------------------------------------------- device


def device_errors(
    accelerator: str,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    is_hopper: Callable[[], bool] | None = None,
) -> list[str]:
    """Return errors for attention kernels and async TP that the device does not support.

    Args:
        is_hopper: Whether the GPU is Hopper or newer; by default, checks this machine.
    """
    errors = []
    on_gpu = accelerator == "cuda"
    key = f"model.attention={model.attention}"
    if model.attention in ("flex", "varlen") and not on_gpu:
        errors.append(f"{key} has no backward on CPU; use model.attention=auto or sdpa")
    elif model.attention == "varlen" and precision.param == "fp32":
        errors.append(
            f"{key} computes in 16 bits, but precision.param=fp32; use precision.param=bf16, "
            "or model.attention=auto, sdpa or flex"
        )
    if model.attention == "varlen" and mesh.cp > 1:
        errors.append(
            f"{key} needs complete documents, but parallel.cp={mesh.cp} splits them; use "
            "model.attention=auto, sdpa or flex"
        )
    if not parallel.async_tp:
        return errors
    off = "parallel.async_tp=false"
    for broken, reason, remedy in (
        (
            not (on_gpu and (is_hopper or _is_hopper)()),
            "needs the symmetric memory of Hopper or newer NVIDIA GPUs",
            off,
        ),
        (
            mesh.tp == 1,
            f"has nothing to overlap with parallel.tp={mesh.tp}",
            f"parallel.tp=8 or {off}",
        ),
        (
            not parallel.compile,
            "is implemented by the compiler, but parallel.compile=false",
            f"parallel.compile=true or {off}",
        ),
        (
            not parallel.sequence_parallel,
            "overlaps gathers along the sequence, but parallel.sequence_parallel=false",
            f"parallel.sequence_parallel=true or {off}",
        ),
    ):
        if broken:
            errors.append(f"parallel.async_tp=true {reason}; use {remedy}")
    return errors


def _is_hopper() -> bool:
    import torch

    # parallel.accelerator=cuda may be set without a GPU; `plan_processes` reports that.
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def fp8_errors(
    accelerator: str,
    mesh: MeshShape,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
    data: DataConfig,
) -> list[str]:
    """Return errors if the device or a size does not support fp8."""
    recipe = precision.fp8
    if recipe is None:
        return []
    if accelerator != "cuda":
        return [
            f"precision.fp8={recipe} needs a GPU, but the run uses parallel.accelerator="
            f"{accelerator}; use precision.fp8=null"
        ]
    import torch

    from parallel.float8 import CAPABILITY, lacking_capability

    errors = []
    capability = lacking_capability(recipe) if torch.cuda.is_available() else None
    if capability is not None:
        least = CAPABILITY[recipe]
        remedy = "precision.fp8=null"
        if capability >= CAPABILITY["tensorwise"]:
            remedy = f"precision.fp8=tensorwise or {remedy}"
        errors.append(
            f"precision.fp8={recipe} needs GPUs of compute capability {least[0]}.{least[1]}, but "
            f"this one has {capability[0]}.{capability[1]}; use {remedy}"
        )
    return errors + for_every_stage(train, data, partial(fp8_size_errors, mesh, precision, model))


def fp8_size_errors(
    mesh: MeshShape, precision: PrecisionConfig, model: ModelConfig, train: TrainConfig
) -> list[str]:
    """Return errors for sizes that fp8 matrix products do not support on any device."""
    recipe = precision.fp8
    if recipe is None:
        return []
    errors = []
    widths = {
        "model.dim": model.dim,
        "model.n_kv_heads × head_dim": model.n_kv_heads * model.head_dim,
        "model.ffn_dim": model.ffn_dim,
    }
    for key, width in widths.items():
        if width % mesh.tp == 0 and width // mesh.tp % FP8_MULTIPLE:
            errors.append(
                f"precision.fp8={recipe} needs widths that are multiples of {FP8_MULTIPLE}, but "
                f"{key}={width} over parallel.tp={mesh.tp} is {width // mesh.tp}; use a multiple "
                f"of {FP8_MULTIPLE * mesh.tp}, or precision.fp8=null"
            )
    micro_batch_size = train.micro_batch_size or train.global_batch_size // mesh.dp
    if micro_batch_size * train.seq_len // mesh.cp % FP8_MULTIPLE:
        errors.append(
            f"precision.fp8={recipe} needs micro-batches of a multiple of {FP8_MULTIPLE} tokens, "
            f"but a rank has {micro_batch_size} × train.seq_len={train.seq_len} / "
            f"parallel.cp={mesh.cp}; use a train.seq_len that is a multiple of "
            f"{FP8_MULTIPLE * mesh.cp}, or precision.fp8=null"
        )
    return errors


# ---------------------------------------------------------------- other programs


def prepare_errors(
    pack: int | list[int] | None,
    verify: bool,
    inspect: str | None,
    sample: int,
    seq_len: int | None,
    seed: int | None,
) -> list[str]:
    """Return errors for keys of `prepare.py` that contradict each other."""
    errors = []
    jobs = {"pack": pack is not None, "verify": verify, "inspect": inspect is not None}
    if sum(jobs.values()) > 1:
        names = " and ".join(name for name, requested in jobs.items() if requested)
        errors.append(f"{names} are mutually exclusive; use one per command")
    if inspect is None:
        given = {"sample": sample or None, "seq_len": seq_len, "seed": seed}
        errors += [
            f"{key}={value} has no effect without inspect; add inspect=FOLDER"
            for key, value in given.items()
            if value is not None
        ]
    return errors


def generate_errors(prompt: str | None, prompts: str | None, parallel: ParallelConfig) -> list[str]:
    errors = [
        f"parallel.{axis}={size} is not supported for generation; use parallel.{axis}=1, and "
        "parallel.tp to shard the model"
        for axis in ("dp_replicate", "dp_shard", "cp")
        if (size := getattr(parallel, axis)) != 1
    ]
    if prompt is not None and prompts is not None:
        errors.append(f"prompts={prompts} and prompt={prompt!r} are both given; use one of them")
    return errors


def convert_errors(format: str | None, parts: int) -> list[str]:
    if parts == 1 or format == "meta":
        return []
    return [f"parts={parts} applies to Meta folders only; use parts=1 or format=meta"]


def _nearest_multiples(number: int, unit: int) -> str:
    """Return the multiples of `unit` next to `number`, as text."""
    below = number - number % unit
    return f"{below} or {below + unit}" if below else str(unit)


def _divisors(number: int, limit: int = 1024) -> str:
    """Return the divisors of `number` up to `limit`, as text."""
    *most, last = [str(d) for d in range(1, min(number, limit) + 1) if number % d == 0]
    return f"{', '.join(most)} or {last}" if most else last
