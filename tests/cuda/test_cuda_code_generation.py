"""Machine code of compiled training steps for GPUs of four generations, without a GPU.

Inductor, Triton and ptxas compile the kernels of the first and last block of recipes for one GPU,
at their widths and sequence length. What does not fit into shared memory
fails as it would on the GPU (`fake_triton._load`).
"""

from dataclasses import replace
from typing import Any

import pytest
from fake_device import on_fake_device
from step import Case

from training.config import JobConfig

pytestmark = pytest.mark.slow

CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
# Bytes of registers that a thread may keep in local memory instead. FlexAttention's backward is
# known to spill at head_dim 128; no other kernel does.
MAX_STACK = {"flex_attention_backward": 768}
# Recipe and changes: capabilities.
CASES: dict[str, tuple[list[str], tuple[int, ...]]] = {
    "h200_1b": ([], (90, 80)),
    "h200_3b": ([], (90,)),
    "h200_8b": ([], (90, 100, 120)),
    "h200_8b flex": (["model.attention=flex"], (80, 90, 120)),
}


def recipe_case(name: str) -> Case:
    """Return a step of a recipe for one GPU with two layers and one micro-batch."""
    from hydra import compose, initialize_config_dir

    from cli.arguments import CONF, hydra_arguments
    from cli.config import check_for_tasks

    recipe, overrides = name.split()[0], CASES[name][0]
    words = [f"experiment={recipe}", "data=mock", "parallel.compile=true", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments(words, "train"))
    config: JobConfig = check_for_tasks(composed, 1, 1)
    assert config.train.micro_batch_size is not None
    return Case(
        model=replace(config.model, n_layers=2),
        parallel=config.parallel,
        precision=config.precision,
        micro_batches=1,
        batch=config.train.micro_batch_size,
        seq=config.train.seq_len,
    )


def compile_step(case: Case) -> list[tuple[Any, ...]]:
    """Return the kernels of a step: name, configuration, shared memory, registers, stack."""
    import fake_triton
    from step import batches, build

    import train

    run = build(case)
    fake_triton.install()  # after the launch, which sets the number of compile workers
    train.train_step(run, batches(case), 1e-3)
    return [tuple(vars(kernel).values()) for kernel in fake_triton.kernels()]


@pytest.mark.parametrize(
    ("name", "capability"), [(name, each) for name in CASES for each in CASES[name][1]]
)
def test_kernels_of_a_recipe_fit_into_shared_memory_and_registers(
    name: str, capability: int, record_property: Any
) -> None:
    kernels = on_fake_device(
        compile_step,
        recipe_case(name),
        capability=CAPABILITIES[capability],
        generates_code=True,
    )
    assert len(kernels) > 10
    spilling: dict[str, list[Any]] = {}
    for kernel, configuration, _, _, stack, *_ in kernels:
        limit = next((each for part, each in MAX_STACK.items() if part in kernel), 0)
        if stack > limit:
            spilling.setdefault(kernel, []).append((configuration, stack))
    # Inductor does not choose a configuration that spills where it has another one.
    configurations = {kernel: sum(each[0] == kernel for each in kernels) for kernel in spilling}
    assert {k: v for k, v in spilling.items() if len(v) == configurations[k]} == {}
    names = " ".join(kernel for kernel, *_ in kernels)
    assert ("flex_attention" in names) == ("flex" in name)
