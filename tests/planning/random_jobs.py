"""Random jobs that `train.py` admits, to compare the tiers of the memory plan.

A job is a list of command-line overrides. The rules of `train.py` reject what it would reject on
the mesh of the job; another job is drawn then.
"""

import random
from collections.abc import Iterator
from typing import Any

import yaml
from run_config import changed

from parallel.mesh import MeshShape
from planning.request import Choice, PlanRequest, in_yaml
from planning.step_spec import StepSpec
from resilience.processes import Processes
from training.config import JobConfig
from training.config_rules import CONFIG_RULES, HOPPER, launch_rule
from training.config_validation import ConfigError, validate

Settings = dict[str, Any]


def random_jobs(count: int, seed: int, **bounds: Any) -> Iterator[tuple[Settings, StepSpec]]:
    """Yield `count` admissible jobs, as settings by dotted key and as the step to plan.

    Args:
        bounds: As for `draw`.
    """
    rng = random.Random(seed)
    while count:
        settings = draw(rng, **bounds)
        try:
            yield settings, step_of(settings)
        except ConfigError:
            continue
        count -= 1


def step_of(settings: Settings) -> StepSpec:
    """Return the step of a job.

    Raises:
        ConfigError: `train.py` rejects the job.
    """
    accelerator = settings["parallel.accelerator"]
    mesh = MeshShape(*(settings[f"parallel.{axis}"] for axis in MeshShape.__dataclass_fields__))
    capability = HOPPER if accelerator == "cuda" else None
    processes = Processes(accelerator, mesh.world_size, 1, "srun", capability)
    items = [each for item in settings.items() for each in item]
    config = validate(changed(*items), JobConfig, (*CONFIG_RULES, launch_rule(processes)))
    request = PlanRequest(config, accelerator, config.train.max_steps)
    if errors := request.mesh_errors(mesh):
        raise ConfigError(errors)
    return request.stages(Choice(config.parallel, config.train.micro_batch_size))[0][0]


def overrides(settings: Settings) -> list[str]:
    """Return the command-line arguments of a job."""
    return [f"{key}={in_yaml(value)}" for key, value in settings.items()]


def settings_of(arguments: list[str]) -> Settings:
    """Return the settings of command-line arguments."""
    pairs = (argument.split("=", 1) for argument in arguments)
    return {key: yaml.safe_load(value) for key, value in pairs}


def draw(
    rng: random.Random,
    accelerators: tuple[str, ...] = ("cpu", "cuda"),
    axis_sizes: tuple[int, ...] = (1, 1, 1, 2, 2, 4, 8),
    pipeline_sizes: tuple[int, ...] = (1, 1, 1, 2, 3, 4),
    head_dims: tuple[int, ...] = (16, 32, 64, 80, 96, 128, 192, 256),
    widths: tuple[int, int] = (96, 4096),
    vocabularies: tuple[int, ...] = (512, 2048, 8192, 32_000, 65_536, 128_256, 200_064, 262_144),
    depths: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 12, 32),
    sequences: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192),
    max_tokens: int = 16_384,
    max_processes: int = 256,
    compiled: float = 0.4,
    optimizer_states: tuple[str, ...] = ("fp32", "fp32", "bf16", "int8"),
) -> Settings:
    """Return settings of a job, which need not be admissible.

    Args:
        widths: Bounds of `model.dim`.
        max_tokens: Most tokens of a micro-batch.
        compiled: Fraction of jobs with `parallel.compile`.
    """
    accelerator = rng.choice(accelerators)
    sizes = [rng.choice(axis_sizes) for _ in range(4)] + [rng.choice(pipeline_sizes)]
    while MeshShape(*sizes).world_size > max_processes:
        sizes[rng.randrange(5)] = 1
    mesh = MeshShape(*sizes)
    dim = 0
    while not widths[0] <= dim <= widths[1]:
        head_dim, group = rng.choice(head_dims), rng.randint(1, 8)
        kv_heads = mesh.tp * rng.randint(1, max(1, 8 // mesh.tp))
        dim = head_dim * kv_heads * group
    seq_len = rng.choice(sequences)
    micro_batch_size = rng.choice([1, 1, 2, 3, 4, 8])
    seq_len = min(seq_len, max_tokens)
    micro_batch_size = min(micro_batch_size, max_tokens // seq_len)
    vocabulary = rng.choice(vocabularies)
    pp_parts = 1 if mesh.pp == 1 else rng.choice([1, 1, 2])
    micro_batches = rng.choice([1, 1, 2, 3]) * (mesh.pp if pp_parts > 1 else 1)
    if mesh.pp > 1 and pp_parts == 1:
        micro_batches = rng.choice([1, 2, 4, 7])
    param = rng.choice(["fp32", "bf16"])
    is_compiled = rng.random() < compiled
    checkpoints: list[Any] = ["none", "none", "selective", "full"]
    if is_compiled:
        checkpoints += [round(rng.random(), 2)]
    ffn_unit = mesh.tp * rng.choice([1, 8, 64])
    model = {
        "name": "random",
        "dim": dim,
        "n_layers": rng.choice(depths),
        "n_heads": kv_heads * group,
        "n_kv_heads": kv_heads,
        "ffn_dim": -(-round(dim * rng.uniform(1.5, 4)) // ffn_unit) * ffn_unit,
        "vocab_size": -(-vocabulary // mesh.tp) * mesh.tp,
        "tie_embeddings": rng.random() < 0.4,
        "max_seq_len": max(sequences),
        "attention": rng.choice(["auto", "auto", "sdpa", "flex", "varlen"]),
    }
    parallel = {
        **vars(mesh),
        "pp_parts": pp_parts,
        "accelerator": accelerator,
        "sequence_parallel": rng.random() < 0.7,
        "loss_parallel": rng.random() < 0.6,
        "activation_checkpoint": rng.choice(checkpoints),
        "compile": is_compiled,
        "reshard_after_forward": rng.choice([None, None, True, False]),
        "reduce_gradients": rng.choice(["step", "micro_batch"]),
    }
    precision = {
        "param": param,
        "reduce": rng.choice(["fp32", "fp32", "bf16"]),
        "optimizer_state": rng.choice(optimizer_states),
    }
    train = {
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size * micro_batches * mesh.dp,
    }
    sections = {"model": model, "parallel": parallel, "precision": precision, "train": train}
    settings = {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.items()
    }
    return settings | {
        "tokenizer.name": "byte",
        "tokenizer.vocab_size": 272,
        "data.document_mask": rng.random() < 0.7,
        "checkpoint.async_save": False,
        "optim.betas": [0.9, 0.95],
    }
