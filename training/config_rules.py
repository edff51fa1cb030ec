"""The rules that tie sections of the configuration together, to the mesh and to the device.

Each function returns every broken rule as a message that names key, value, rule and remedy, with
every value that would do. Imports nothing heavy.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from data.config import DataConfig, TokenizerConfig
from data.stages import plan_stages
from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from training.config import CheckpointConfig, FaultsConfig, TrainConfig, ValidationConfig

MAX_PACK = 2**24  # tokens; far beyond any context, far below what would fill the memory
MAX_SAMPLE = 2**60  # up to which the order counts without overflow


def model_errors(
    mesh: MeshShape, parallel: ParallelConfig, model: ModelConfig, seq_len: int
) -> list[str]:
    """The rules that tie the model and its sequences to the mesh."""
    found = []
    tp = mesh.tp
    for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"):
        size = getattr(model, key)
        if size % tp:
            found.append(
                f"parallel.tp ({tp}) does not divide model.{key} ({size}): use {_divisors(size)}"
            )
    if mesh.cp > 1 and seq_len % (2 * mesh.cp):
        found.append(
            f"parallel.cp ({mesh.cp}) cuts a sequence into {2 * mesh.cp} chunks, and train.seq_len "
            f"({seq_len}) is not a multiple of that: use {_axis_sizes(seq_len)}, or a multiple of "
            f"{2 * mesh.cp} for train.seq_len"
        )
    elif parallel.sequence_parallel and seq_len // mesh.cp % tp:
        of = (
            f"train.seq_len / parallel.cp ({seq_len // mesh.cp})"
            if mesh.cp > 1
            else (f"train.seq_len ({seq_len})")
        )
        found.append(
            f"parallel.tp ({tp}) does not divide {of}: "
            f"use {_divisors(seq_len // mesh.cp)}, or parallel.sequence_parallel=false"
        )
    return found


def device_errors(
    accelerator: str,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    model: ModelConfig,
    hopper: Callable[[], bool] | None = None,
) -> list[str]:
    """What the device, the precision or an axis lacks for what is asked.

    `hopper` tells whether the GPU is one, or newer; by default this machine's is asked.
    """
    found = []
    on_gpu = accelerator == "cuda"
    if model.attention in ("flex", "varlen") and not on_gpu:
        found.append(
            f"model.attention ({model.attention}) has no backward on CPU: "
            "use model.attention=auto or sdpa"
        )
    elif model.attention == "varlen" and precision.param == "fp32":
        found.append(
            "model.attention (varlen) computes in 16 bits, and precision.param is fp32: "
            "use precision.param=bf16, or model.attention=auto, sdpa or flex"
        )
    if model.attention == "varlen" and mesh.cp > 1:
        found.append(
            "model.attention (varlen) needs whole documents, and parallel.cp "
            f"({mesh.cp}) cuts them: use model.attention=auto, sdpa or flex"
        )
    if parallel.async_tp:
        off = "parallel.async_tp=false"
        for lacks, reason, remedy in (
            (
                not (on_gpu and (hopper or _has_hopper)()),
                "needs the symmetric memory of NVIDIA GPUs from Hopper on",
                off,
            ),
            (
                mesh.tp == 1,
                f"has nothing to overlap at parallel.tp ({mesh.tp})",
                f"parallel.tp=8 or {off}",
            ),
            (
                not parallel.compile,
                "is done by the compiler, and parallel.compile is false",
                f"parallel.compile=true or {off}",
            ),
            (
                not parallel.sequence_parallel,
                "overlaps gathers along seq, and parallel.sequence_parallel is false",
                f"parallel.sequence_parallel=true or {off}",
            ),
        ):
            if lacks:
                found.append(f"parallel.async_tp (true) {reason}: use {remedy}")
    return found


def _has_hopper() -> bool:
    """Whether there is a GPU, of compute capability 9.0 or above."""
    import torch

    # parallel.accelerator=cuda does not make a GPU be there; `plan_processes` tells of that.
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def batch_errors(mesh: MeshShape, train: TrainConfig) -> list[str]:
    """The rules that tie the global batch to the mesh."""
    found = []
    share, rest = divmod(train.global_batch_size, mesh.dp)
    if rest:
        below = train.global_batch_size - rest
        nearest = f"{below} or {below + mesh.dp}" if below else str(mesh.dp)
        found.append(
            f"train.global_batch_size ({train.global_batch_size}) is not a multiple of the "
            f"{mesh.dp} data ranks (dp_replicate × dp_shard): use {nearest}, or "
            f"{_divisors(train.global_batch_size)} data ranks"
        )
    elif train.micro_batch_size and share % train.micro_batch_size:
        found.append(
            f"train.micro_batch_size ({train.micro_batch_size}) does not divide the {share} "
            f"sequences of each of the {mesh.dp} data ranks: use {_divisors(share)}"
        )
    return found


def lane_errors(mesh: MeshShape, train: TrainConfig, data: DataConfig) -> list[str]:
    """The rules that tie the lanes of a stream to the global batch and the data ranks."""
    lanes, batch = data.stream_shards, train.global_batch_size
    if lanes is None or lanes < 1:
        return []
    found = []
    if batch % lanes:
        below = batch - batch % lanes
        nearest = f"{below} or {below + lanes}" if below else str(lanes)
        found.append(
            f"train.global_batch_size ({batch}) is not a multiple of data.stream_shards ({lanes}): "
            f"use {nearest}, or {_divisors(batch)} lanes"
        )
    if lanes % mesh.dp:
        below = lanes - lanes % mesh.dp
        nearest = f"{below} or {below + mesh.dp}" if below else str(mesh.dp)
        found.append(
            f"data.stream_shards ({lanes}) is not a multiple of the {mesh.dp} data ranks "
            f"(dp_replicate × dp_shard): use {nearest}, or {_divisors(lanes)} data ranks"
        )
    return found


def stream_errors(
    data: DataConfig, tokenizer: TokenizerConfig, validation: ValidationConfig
) -> list[str]:
    """What a stream has not: text held out, and a preparation that trains a tokenizer."""
    if data.stream_shards is None:
        return []
    found = []
    key = f"data.stream_shards ({data.stream_shards})"
    if validation.samples:
        found.append(
            f"validation.samples ({validation.samples}) needs text held out, and {key} holds out "
            "none: use validation.samples=0, or data.stream_shards=null"
        )
    if tokenizer.name == "bpe" and tokenizer.path is None:
        found.append(
            f"tokenizer.path (null) of tokenizer bpe asks for training, and {key} prepares "
            "nothing: use tokenizer=llama3 or byte, or set tokenizer.path to a tokenizer.model"
        )
    return found


def saving_errors(checkpoint: CheckpointConfig, faults: FaultsConfig) -> list[str]:
    """What is asked of checkpoints that would not be there, or not be written that way."""
    found = []
    interval, kept = checkpoint.interval, checkpoint.keep_every
    if checkpoint.problems():
        return []
    if kept is not None and interval is None:
        found.append(
            f"checkpoint.keep_every ({kept}) counts steps, and checkpoint.interval (null) saves "
            f"none by steps: use checkpoint.interval={kept}, or checkpoint.keep_every=null"
        )
    elif kept is not None and interval is not None and kept % interval:
        both = math.lcm(kept, interval)
        below = kept - kept % interval
        nearest = f"{below} or {below + interval}" if below else str(interval)
        found.append(
            f"checkpoint.keep_every ({kept}) is not a multiple of checkpoint.interval ({interval}),"
            f" and would keep every {both}th step alone: use {nearest} for checkpoint.keep_every"
        )
    if checkpoint.when_busy == "skip" and not checkpoint.async_save:
        found.append(
            "checkpoint.when_busy (skip) has no meaning where checkpoint.async_save is false and "
            "no save is ever under way: use checkpoint.when_busy=wait or checkpoint.async_save=true"
        )
    if faults.rewind_on_spike and interval is None and checkpoint.interval_minutes is None:
        found.append(
            "faults.rewind_on_spike (true) rewinds to a checkpoint, and none is saved before the "
            "end: set checkpoint.interval or checkpoint.interval_minutes"
        )
    return found


def stage_errors(train: TrainConfig, data: DataConfig) -> list[str]:
    """The rules that tie the stages of the data to the steps."""
    if train.global_batch_size < 1 or data.problems():
        return []
    return plan_stages(
        data,
        seq_len=train.seq_len,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
    )[1]


def of_every_stage(
    train: TrainConfig, data: DataConfig, problems: Callable[[TrainConfig], list[str]]
) -> list[str]:
    """What `problems` finds in the sizes of any stage, told by the key that gave the number."""

    def found_in(sizes: TrainConfig) -> list[str]:
        # What is below 1 is told as such, and nothing divides it.
        below_1 = min(sizes.seq_len, sizes.global_batch_size, sizes.micro_batch_size or 1) < 1
        return [] if below_1 else problems(sizes)

    found = found_in(train)
    sizes = train
    keys = {}  # which key gave a number that is not the first stage's
    for place, change in enumerate(data.stages or []):
        for name in ("seq_len", "global_batch_size", "micro_batch_size"):
            if (value := getattr(change, name)) is not None:
                sizes = replace(sizes, **{name: value})
                keys[f"train.{name}"] = f"data.stages[{place}].{name}"
        for problem in found_in(sizes):
            for key, given in keys.items():
                problem = problem.replace(key, given)
            if problem not in found:
                found.append(problem)
    return found


def size_errors(train: TrainConfig, model: ModelConfig, tokenizer: TokenizerConfig) -> list[str]:
    """The rules that tie the sizes of batch, model and tokenizer together, whatever the mesh."""
    found = []
    if train.seq_len > model.max_seq_len:
        found.append(
            f"train.seq_len ({train.seq_len}) is over model.max_seq_len ({model.max_seq_len}): "
            f"use at most {model.max_seq_len}"
        )
    if tokenizer.vocab_size > model.vocab_size:
        found.append(
            f"model.vocab_size ({model.vocab_size}) is smaller than tokenizer.vocab_size "
            f"({tokenizer.vocab_size}): use model.vocab_size={tokenizer.vocab_size}"
        )
    return found


def _axis_sizes(seq_len: int) -> str:
    """The sizes of `cp` whose double divides the length of a sequence, and 1."""
    if seq_len % 2:
        return "1"
    return _divisors(seq_len // 2)


def _pack_errors(pack: int | list[int] | None) -> list[str]:
    """The lengths that documents cannot be packed for."""
    if pack == []:
        return ["pack ([]) names no length: use for example pack=8192, or null"]
    return [
        f"pack ({length}) is not a length from 1 to {MAX_PACK}: use the train.seq_len, and the "
        "lengths of data.stages, of a run to come"
        for length in (pack if isinstance(pack, list) else [pack])
        if length is not None and not 1 <= length <= MAX_PACK
    ]


def task_number_errors(num_fewshot: int | None, limit: int | None) -> list[str]:
    """The rules of how benchmarks are run."""
    found = []
    if num_fewshot is not None and num_fewshot < 0:
        found.append(f"num_fewshot ({num_fewshot}) is below 0: use null for what the tasks have")
    if limit is not None and limit < 1:
        found.append(f"limit ({limit}) is below 1: use null for all of a task's samples")
    return found


def convert_errors(format: str | None, parts: int, file_gb: float) -> list[str]:
    """The rules of what `convert.py` writes."""
    found = []
    if parts < 1:
        found.append(f"parts ({parts}) is below 1: use 1, or what the model is to be cut into")
    elif parts > 1 and format != "meta":
        found.append(
            f"parts ({parts}) has a meaning for Meta's folders alone: use parts=1, or format=meta"
        )
    if not file_gb > 0:
        found.append(f"file_gb ({file_gb}) is not above 0: use 5")
    return found


def prepare_errors(
    pack: int | list[int] | None,
    verify: bool,
    inspect: str | None,
    sample: int,
    seq_len: int | None,
    seed: int | None,
) -> list[str]:
    """What contradicts what among `prepare.py`'s own keys, and their bounds."""
    found = _pack_errors(pack)
    asked = {"pack": pack is not None, "verify": verify, "inspect": inspect is not None}
    if sum(asked.values()) > 1:
        names = " and ".join(name for name, is_asked in asked.items() if is_asked)
        found.append(f"{names} are different jobs: use one of them a command")
    if inspect is None:
        given = {"sample": sample or None, "seq_len": seq_len, "seed": seed}
        found += [
            f"{key} ({value}) has no meaning without inspect: add inspect=FOLDER"
            for key, value in given.items()
            if value is not None
        ]
    if not 0 <= sample <= MAX_SAMPLE:
        found.append(f"sample ({sample}) is not in [0, 2**60]: samples count from 0")
    if seq_len is not None and not 1 <= seq_len <= MAX_PACK:
        found.append(
            f"seq_len ({seq_len}) is not a length from 1 to {MAX_PACK}: use for example 256"
        )
    if seed is not None and not 0 <= seed < 2**63:
        found.append(f"seed ({seed}) is not in [0, 2**63): use a run's run.seed")
    return found


def _divisors(number: int, limit: int = 1024) -> str:
    """The divisors of `number` up to `limit`, as a person would list them."""
    *most, last = [str(d) for d in range(1, min(number, limit) + 1) if number % d == 0]
    return f"{', '.join(most)} or {last}" if most else last
