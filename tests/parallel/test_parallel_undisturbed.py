"""Nothing stands in a step's way: no collection of garbage, and no wait of host for device."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import on_ranks
from hydra import compose, initialize_config_dir
from small_run import OPTIM, Case, batch, build, local_batches
from torch.utils._python_dispatch import TorchDispatchMode

import train
from cli.arguments import CONF, hydra_arguments
from cli.config import check_config
from model.attention import AttentionKernel
from training import garbage
from training.optimizer import StateFormat, build_optimizer
from training.preflight import prepare_data
from training.resume_policy import Changes

STATES: tuple[StateFormat, ...] = ("fp32", "bf16", "int8")
STEPS, EVERY = 7, 3
# Operators whose result the host has to wait for, and what reads values without one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique")
READS = ("tolist", "numpy")


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for the values of a tensor, in forward and backward."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waits() -> Iterator[None]:
    """Where no tensor's values may be waited for."""
    with NoWaits(), pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, None)
        yield


def take_steps(case: Case, state: StateFormat, around: Any, accelerator: str = "cpu") -> None:
    """Three steps; the first is free, as it makes what is made once: states, groups, tables."""
    run: Any = build(case, accelerator)
    run.adamw = build_optimizer(run.llama, OPTIM, state)
    run.optimizer = run.fabric.setup_optimizers(run.adamw)
    for step in range(3):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        with around() if step else nullcontext():
            train.train_step(run, batches, 1e-3)


def take_steps_without_waits(cases: list[Case]) -> None:
    for case in cases:
        for state in STATES if case is cases[0] else STATES[:1]:
            take_steps(case, state, no_waits)


def test_a_process_alone_waits_for_nothing() -> None:
    on_ranks(1, take_steps_without_waits, [Case(param="bf16"), Case(n_micro=1)])


def test_documents_are_told_apart_without_waiting_for_the_device() -> None:
    """The way of GPUs, where their number came with the batch."""
    _, positions, _ = batch(0)
    with NoWaits():
        AttentionKernel("varlen").mask(positions, None, positions, n_documents=positions.numel())
        with pytest.raises(AssertionError, match="waits for the device"):
            AttentionKernel("varlen").mask(positions, None, positions)


def collections_of_a_run(words: list[str]) -> dict[str, Any]:
    """A real run, eager to collect: where it does, and what a step leaves to collect."""
    garbage.INTERVAL = EVERY
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments(words, "train"))
    config, processes, mesh = check_config(composed)
    run = train.set_up(config, processes, mesh, prepare_data(config), Changes())
    found: dict[str, Any] = {"inside": 0, "after": [], "tensors": 0}
    inside = False
    step = run.clock.step

    @contextmanager
    def watched() -> Iterator[None]:
        nonlocal inside
        with step():
            inside = True
            yield
            inside = False

    def on_collection(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            found["inside"] += inside
            found["after"].append(run.position.step)
        else:
            found["tensors"] += sum(isinstance(each, torch.Tensor) for each in gc.garbage)
            gc.garbage.clear()

    run.clock.step = watched  # type: ignore[method-assign]
    gc.collect()
    gc.callbacks.append(on_collection)
    gc.set_threshold(1, 1, 1)  # left to itself, the collector would run all the time
    gc.set_debug(gc.DEBUG_SAVEALL)
    train.train(run)
    gc.set_debug(0)
    gc.callbacks.remove(on_collection)
    return found | {"enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}


def on_both_ranks(words: list[str]) -> dict[str, Any]:
    take_steps_without_waits([Case(dp=2), Case(tp=2), Case(cp=2)])
    return collections_of_a_run(words)


@pytest.fixture(scope="module")
def found(data_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found, which wait for nothing within their steps."""
    folder: Path = tmp_path_factory.mktemp("run")
    words = [
        *("experiment=smoke", *data_overrides, f"run.dir={folder}", "parallel.dp_shard=2"),
        *("parallel.accelerator=cpu", f"train.max_steps={STEPS}", "validation.samples=0"),
        *("log.tensorboard=false", "validation.sample_tokens=0"),
    ]
    return on_ranks(2, on_both_ranks, words)


def test_no_garbage_is_collected_within_a_step_and_on_all_ranks_after_the_same_ones(
    found: Any,
) -> None:
    for rank in found:
        assert rank["inside"] == 0
        assert sorted({*rank["after"]} - {0}) == [3, 6]  # every third


def test_a_step_leaves_no_tensor_to_the_collector(found: Any) -> None:
    # It would be held for all the steps until the next collection.
    assert [rank["tensors"] for rank in found] == [0, 0]


def test_after_a_run_the_collector_is_pythons_own(found: Any) -> None:
    # But for what was there after the first step, which nobody looks at again.
    assert all(rank["enabled"] and rank["frozen"] > 100_000 for rank in found)


@pytest.mark.parametrize("wait", ["item", "nonzero", "tolist", "bool"])
def test_what_makes_the_host_wait_is_noticed(wait: str) -> None:
    tensor = torch.ones(2)
    waits: dict[str, Callable[[], Any]] = {
        "item": lambda: tensor[0].item(),
        "nonzero": tensor.nonzero,
        "tolist": lambda: tensor.tolist(),
        "bool": lambda: bool(tensor.all()),
    }
    with pytest.raises((AssertionError, TypeError)), no_waits():
        waits[wait]()


@contextmanager
def errors_of_cuda() -> Iterator[None]:
    """Where CUDA itself refuses what waits."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("state", STATES)
def test_no_step_on_a_gpu_waits_for_it(state: StateFormat) -> None:
    on_ranks(1, steps_on_a_gpu, state)


def steps_on_a_gpu(state: StateFormat) -> None:
    torch.distributed.destroy_process_group()  # gloo's: Fabric makes one of NCCL
    take_steps(Case(param="bf16"), state, errors_of_cuda, "cuda")
