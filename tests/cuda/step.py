"""One training step of the real program on fake CUDA tensors, on any rank of any mesh.

Launch, strategy, `parallelize`, FSDP2, optimizer and `train.train_step` are the product's; the
process group is PyTorch's fake one, in which no other rank exists. Call these functions inside
`fake_device.on_fake_device`.
"""

import inspect
import os
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import contracts
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from data.loader import Batch, StepBatches
from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape, Processes
from parallel.parallelize import initialize_weights
from resilience.config import TimeLimits
from training.config import OptimConfig
from training.optimizer import build_optimizer

MODEL = ModelConfig("fake", 256, 2, 4, 2, 512, 512)


@dataclass(frozen=True)
class Case:
    """A run, and the rank that is played.

    Attributes:
        mesh: dp_replicate, dp_shard, cp, tp.
        documents: Documents per micro-batch; None: no document mask.
        micro_batches, batch, seq: Number and shape of the micro-batches.
    """

    mesh: tuple[int, int, int, int] = (1, 1, 1, 1)
    rank: int = 0
    model: ModelConfig = MODEL
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(compile=False))
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    documents: int | None = 5
    micro_batches: int = 2
    batch: int = 2
    seq: int = 256
    steps: int = 2
    initialize: bool = False  # takes as long as a step


def fake_processes(world_size: int, rank: int, per_node: int = 8) -> Processes:
    """Let `launch` find one rank of a run that torchrun started, in a fake process group.

    The environment and the patch stay: each case has a process of its own.
    """
    per_node = min(per_node, world_size)
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank % per_node,
        "GROUP_RANK": rank // per_node,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": per_node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29511,
        "TORCHELASTIC_RUN_ID": "tests",
    }
    os.environ.update({name: str(value) for name, value in variables.items()})
    real = _real_init

    def init_process_group(backend: str, **kwargs: Any) -> None:
        groups.append({"backend": backend, **kwargs})
        kwargs.pop("device_id", None)  # the fake group creates no communicator
        real("fake", store=FakeStore(), **kwargs)

    setattr(dist, "init_process_group", init_process_group)  # noqa: B010
    for name in ("all_reduce", "reduce_scatter_tensor"):
        setattr(dist, name, partial(_reduce, getattr(dist, name)))
    return Processes("cuda", per_node, world_size // per_node, "torchrun")


def _reduce(collective: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a reduction as NCCL does; in the operation, its kind cannot be read."""
    arguments = inspect.signature(collective).bind(*args, **kwargs).arguments
    tensor: Any = arguments.get("input", arguments.get("tensor"))
    contracts.check_reduction(arguments.get("op", dist.ReduceOp.SUM), tensor)
    return collective(*args, **kwargs)


_real_init = dist.init_process_group

groups: list[dict[str, Any]] = []
"""Arguments of `init_process_group`."""


def build(case: Case) -> Any:
    """Return the run state that `train_step` needs, on this case's rank."""
    from resilience import launch as launcher
    from resilience.launch import launch

    launcher.check_ranks = lambda *_: None  # there are no other ranks to compare with
    shape = MeshShape(*case.mesh)
    axes: Any = dict(zip(("dp_replicate", "dp_shard", "cp", "tp"), case.mesh, strict=True))
    parallel = replace(case.parallel, **axes)
    processes = fake_processes(shape.world_size, case.rank)
    # Without threads or a store: there are no other ranks to watch.
    limits = TimeLimits(setup=1800.0, step=600.0, checkpoint=1800.0)
    watchdog: Any = SimpleNamespace(children=[], connect=lambda: None, limits=limits)
    fabric, strategy = launch(processes, shape, parallel, case.precision, watchdog)
    with torch.device("meta"):
        llama = Llama(case.model)
    model = fabric.setup_module(llama)
    adamw = build_optimizer(llama, OptimConfig(lr=1e-3), case.precision.optimizer_state)
    optimizer = fabric.setup_optimizers(adamw)
    if case.initialize:
        initialize_weights(llama, case.model, seed=0)
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_grad_norm=1.0)),
        fabric=fabric,
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        llama=llama,
        adamw=adamw,
    )


def batches(case: Case) -> StepBatches:
    """Return the micro-batches of one step in pinned memory, as the loader does."""

    def pinned() -> Tensor:
        return torch.zeros(case.batch, case.seq, dtype=torch.int64, pin_memory=True)

    micro_batches = []
    for _ in range(case.micro_batches):
        positions = pinned() if case.documents else None
        micro_batches.append(Batch(pinned(), positions, pinned()))
    n_documents = [case.documents or case.batch] * case.micro_batches
    return StepBatches(micro_batches, n_documents, case.batch * case.seq, digest=1)


def take_steps(run: Any, case: Case) -> dict[str, Tensor]:
    """Run the steps of a case and return the last one's result; only the first one may wait."""
    import cuda_stubs

    for step in range(case.steps):
        before = len(cuda_stubs.waits())
        result = train.train_step(run, batches(case), 1e-3)
        waits = cuda_stubs.waits()[before:]
        assert step == 0 or not waits, waits
    return result


def check_steps(case: Case) -> None:
    """Take the steps of a case, and check devices and dtypes of all that they leave."""
    run = build(case)
    device = torch.device("cuda", case.rank % 8)
    results = take_steps(run, case)
    assert results["scalars"].dtype == torch.float32 and results["batch_hash"].dtype == torch.int64
    assert {result.device for result in results.values()} == {device}
    for parameter in run.llama.parameters():
        assert (parameter.device, parameter.dtype) == (device, torch.float32)
        state = run.adamw.state[parameter]
        assert {tensor.device for tensor in _tensors(state)} == {device}
        assert state["step"].dtype == torch.float32


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of an optimizer state, also those inside low-bit moments."""
    found = []
    for value in state.values():
        inner = [value] if isinstance(value, Tensor) else list(vars(value).values())
        found += [each for each in inner if isinstance(each, Tensor)]
    return found
