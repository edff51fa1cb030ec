"""A training step never triggers garbage collection and never synchronizes host and device."""

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
# Operators that synchronize with the device, and methods that do so without an operator.
SYNC_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique")
SYNC_METHODS = ("tolist", "numpy")


class ForbidSyncOperators(TorchDispatchMode):
    """Raise at operators that synchronize with the device, in forward and backward."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in SYNC_OPERATORS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def forbid_sync() -> Iterator[None]:
    """Raise if the host waits for values of a tensor."""
    with ForbidSyncOperators(), pytest.MonkeyPatch.context() as patch:
        for name in SYNC_METHODS:
            patch.setattr(torch.Tensor, name, None)
        yield


def take_steps(case: Case, state: StateFormat, around: Any, accelerator: str = "cpu") -> None:
    """Run three steps, the last two in the context manager `around`.

    The first step may synchronize: it creates optimizer states, process groups and tables.
    """
    run: Any = build(case, accelerator)
    run.adamw = build_optimizer(run.llama, OPTIM, state)
    run.optimizer = run.fabric.setup_optimizers(run.adamw)
    for step in range(3):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        with around() if step else nullcontext():
            train.train_step(run, batches, 1e-3)


def take_steps_without_sync(cases: list[Case]) -> None:
    for case in cases:
        for state in STATES if case is cases[0] else STATES[:1]:
            take_steps(case, state, forbid_sync)


def test_step_on_one_process_does_not_synchronize() -> None:
    on_ranks(1, take_steps_without_sync, [Case(param="bf16"), Case(n_micro=1)])


def test_varlen_mask_does_not_synchronize_if_the_number_of_documents_is_given() -> None:
    """On GPUs, the loader passes the number of documents with the batch."""
    _, positions, _ = batch(0)
    with ForbidSyncOperators():
        AttentionKernel("varlen").mask(positions, None, positions, n_documents=positions.numel())
        with pytest.raises(AssertionError, match="waits for the device"):
            AttentionKernel("varlen").mask(positions, None, positions)


def record_collections(overrides: list[str]) -> dict[str, Any]:
    """Train with the lowest collection thresholds and record when and what is collected."""
    garbage.INTERVAL = EVERY
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", hydra_arguments(overrides, "train"))
    config, processes, mesh = check_config(composed)
    run = train.set_up(config, processes, mesh, prepare_data(config), Changes())
    results: dict[str, Any] = {"within_step": 0, "after_steps": [], "tensors": 0}
    in_step = False
    step = run.clock.step

    @contextmanager
    def watched_step() -> Iterator[None]:
        nonlocal in_step
        with step():
            in_step = True
            yield
            in_step = False

    def on_collection(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            results["within_step"] += in_step
            results["after_steps"].append(run.position.step)
        else:
            results["tensors"] += sum(isinstance(each, torch.Tensor) for each in gc.garbage)
            gc.garbage.clear()

    run.clock.step = watched_step  # type: ignore[method-assign]
    gc.collect()
    gc.callbacks.append(on_collection)
    gc.set_threshold(1, 1, 1)  # automatic collection, if enabled, would run all the time
    gc.set_debug(gc.DEBUG_SAVEALL)
    train.train(run)
    gc.set_debug(0)
    gc.callbacks.remove(on_collection)
    return results | {"enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}


def steps_and_run_on_two_ranks(overrides: list[str]) -> dict[str, Any]:
    take_steps_without_sync([Case(dp=2), Case(tp=2), Case(cp=2)])
    return record_collections(overrides)


@pytest.fixture(scope="module")
def collections(data_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the recorded collections of two ranks; also checks that no step synchronizes."""
    folder: Path = tmp_path_factory.mktemp("run")
    overrides = [
        *("experiment=smoke", *data_overrides, f"run.dir={folder}", "parallel.dp_shard=2"),
        *("parallel.accelerator=cpu", f"train.max_steps={STEPS}", "validation.samples=0"),
        *("log.tensorboard=false", "validation.sample_tokens=0"),
    ]
    return on_ranks(2, steps_and_run_on_two_ranks, overrides)


def test_garbage_is_collected_between_steps_only_and_after_the_same_steps_on_all_ranks(
    collections: Any,
) -> None:
    for rank in collections:
        assert rank["within_step"] == 0
        assert sorted({*rank["after_steps"]} - {0}) == [3, 6]  # every third step


def test_step_creates_no_reference_cycles_with_tensors(collections: Any) -> None:
    # Such tensors would keep their memory until the next collection.
    assert [rank["tensors"] for rank in collections] == [0, 0]


def test_automatic_collection_is_restored_after_a_run(collections: Any) -> None:
    # Objects that existed after the first step stay frozen.
    assert all(rank["enabled"] and rank["frozen"] > 100_000 for rank in collections)


@pytest.mark.parametrize("wait", ["item", "nonzero", "tolist", "bool"])
def test_synchronizing_calls_are_detected(wait: str) -> None:
    tensor = torch.ones(2)
    waits: dict[str, Callable[[], Any]] = {
        "item": lambda: tensor[0].item(),
        "nonzero": tensor.nonzero,
        "tolist": lambda: tensor.tolist(),
        "bool": lambda: bool(tensor.all()),
    }
    with pytest.raises((AssertionError, TypeError)), forbid_sync():
        waits[wait]()


@contextmanager
def cuda_sync_errors() -> Iterator[None]:
    """Let CUDA raise an error at synchronizing calls."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("state", STATES)
def test_step_on_a_gpu_does_not_synchronize(state: StateFormat) -> None:
    on_ranks(1, steps_on_a_gpu, state)


def steps_on_a_gpu(state: StateFormat) -> None:
    torch.distributed.destroy_process_group()  # the gloo group; Fabric creates an NCCL group
    take_steps(Case(param="bf16"), state, cuda_sync_errors, "cuda")
