"""Compile the training steps of recipes to machine code of GPU generations, without a GPU.

A case is one rank's view of a recipe of conf/experiment, as configured or, for some, with
FlexAttention or fp8, on one architecture: widths and lengths are the recipe's, with two layers and
one micro-batch of each stage. A stage with another sequence length compiles kernels for any length.
Other ranks have equal shapes, and a pipeline stage has the blocks of a run without stages.
`fake_triton` compiles the kernels in every configuration that
Inductor would choose from.
"""

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from recipes import MACHINES, load_recipe

from cli.arguments import CONF
from parallel.mesh import MeshShape
from training.config import JobConfig

ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}
VARIANTS: dict[str, list[str]] = {
    "as configured": [],
    "flex": ["model.attention=flex"],
    "fp8 rowwise": ["precision.fp8=rowwise"],
    "fp8 tensorwise": ["precision.fp8=tensorwise"],
}
# Heads of 64 and 128 elements, and weights sharded by tensor parallelism.
VARIED = ("h200_1b", "h200_8b", "h100x256_70b")
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# Bytes of registers that each thread of a kernel may keep in local memory, by a part of its name;
# other kernels may keep none. FlexAttention has one configuration for each head_dim and
# architecture; for sm_100, two reductions of RMSNorm's backward keep two registers.
MAX_STACK = {"flex_attention_backward": 768, "flex_attention": 192, "fused_rms_norm": 8}


@dataclass(frozen=True)
class Step:
    """A step to compile.

    Attributes:
        shapes: Sizes of a micro-batch and of its sequences, of each stage.
    """

    case: Any  # step.Case, whose module needs a fake device
    shapes: tuple[tuple[int, int], ...]


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield recipe, variant and architecture of each case."""
    for variant, overrides in VARIANTS.items():
        for recipe in VARIED if overrides else RECIPES:
            for architecture in ARCHITECTURES:
                yield recipe, variant, architecture


@cache
def load(recipe: str, variant: str) -> tuple[JobConfig, MeshShape]:
    """Return a recipe with the overrides of a variant, and its mesh."""
    return load_recipe(recipe, *VARIANTS[variant])


def rejection(recipe: str, variant: str, architecture: str) -> str | None:
    """Return the error with which training rejects a case, or None."""
    from training import config_rules as rules

    config, mesh = load(recipe, variant)
    capability = ARCHITECTURES[architecture]
    precision, parallel = config.precision, config.parallel
    errors = [
        *rules.fp8_errors("cuda", precision, capability),
        *rules.device_errors("cuda", mesh, parallel, precision, config.model, capability),
    ]
    return errors[0] if errors else None


def make_step(recipe: str, variant: str) -> Step:
    """Return a step of a recipe on one of its ranks."""
    from step import Case

    config, mesh = load(recipe, variant)
    sizes = config.train
    shapes = []
    for stage in (None, *(config.data.stages or [])):
        for name in ("seq_len", "global_batch_size", "micro_batch_size"):
            if stage is not None and (value := getattr(stage, name)) is not None:
                sizes = replace(sizes, **{name: value})
        batch = sizes.micro_batch_size or sizes.global_batch_size // mesh.dp
        shapes.append((batch, sizes.seq_len))
    mesh = replace(mesh, pp=1)
    case = Case(
        mesh=tuple(vars(mesh).values()),
        rank=MACHINES[recipe][2] % mesh.world_size,
        model=replace(config.model, n_layers=2),
        parallel=replace(config.parallel, compile=True, pp=1, pp_parts=1, pp_layers=None),
        precision=config.precision,
        micro_batches=1,
    )
    return Step(case, tuple(dict.fromkeys(shapes)))


def compile_steps(steps: list[Step]) -> list[dict[str, Any] | str]:
    """Return the kernels of each step as `summary` does, or the traceback; on a fake device."""
    return [_compile(step) for step in steps]


def _compile(step: Step) -> dict[str, Any] | str:
    import fake_triton
    import torch._dynamo
    import torch.distributed as dist
    from step import batches, build
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    import train

    fake_triton.reset()
    try:
        run = build(step.case)
        fake_triton.install()
        for batch, seq in step.shapes:
            train.train_step(run, batches(replace(step.case, batch=batch, seq=seq)), 1e-3)
        return summary(fake_triton.kernels())
    except Exception:
        return traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _clear_sharding_prop_cache()
        torch._dynamo.reset()


def summary(kernels: list[Any]) -> dict[str, Any]:
    """Return the resources of `fake_triton.Kernel`s.

    Returns:
        Numbers of kernels and configurations; largest shared memory per block in bytes and
        registers per thread; of kernels that spill in every configuration, the fewest bytes.
    """
    stacks: dict[str, list[int]] = {}
    for kernel in kernels:
        stacks.setdefault(kernel.name, []).append(kernel.stack)
    return {
        "kernels": len(stacks),
        "configurations": len(kernels),
        "max_shared_memory": max(kernel.shared_memory for kernel in kernels),
        "max_registers": max(kernel.registers for kernel in kernels),
        "spilled_bytes": {name: min(each) for name, each in stacks.items() if min(each)},
        "flex_kernels": sum("flex_attention" in name for name in stacks),
    }


def excess(result: dict[str, Any]) -> dict[str, int]:
    """Return the kernels that spill more bytes than `MAX_STACK` in every configuration."""
    return {
        name: stack
        for name, stack in result["spilled_bytes"].items()
        if stack > max([size for part, size in MAX_STACK.items() if part in name], default=0)
    }
