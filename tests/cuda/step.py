"""One training step of the real program on fake CUDA tensors, on any rank of any mesh.

Launch, strategy, `parallelize`, FSDP2, optimizer and `train.train_step` are the product's; the
process group is PyTorch's fake one, in which no other rank exists. Call these functions inside
`fake_device.on_fake_device`.
"""

import inspect
import os
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import contracts
import cuda_stubs
import fake_inductor
import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from data.loader import Batch, StepBatches
from model.config import ModelConfig
from model.llama import Llama
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights
from resilience.config import TimeLimits
from resilience.processes import Processes
from training.config import OptimConfig
from training.optimizer import build_optimizer

DEVICE = 6  # the local rank
MODEL = ModelConfig("fake", 256, 2, 4, 2, 512, 512)


@dataclass(frozen=True)
class Case:
    """A run, and the rank that is played.

    Attributes:
        mesh: Sizes in the order of the fields of `MeshShape`: dp_replicate, dp_shard, cp, tp, pp.
        documents: Documents per micro-batch; None: no document mask.
        micro_batches, batch, seq: Number and shape of the micro-batches.
    """

    mesh: tuple[int, ...] = (1, 1, 1, 1)
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


def fake_processes(world_size: int, rank: int) -> Processes:
    """Let `launch` find one rank of a run that torchrun started, in a fake process group.

    The process always uses GPU `DEVICE` of eight, which is neither the default one nor the rank.
    The environment and the patches stay: they are replaced by the next case.
    """
    variables = {
        "RANK": rank,
        "LOCAL_RANK": DEVICE,
        "GROUP_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": 8,
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
    for name, collective in _REAL_REDUCTIONS.items():
        setattr(dist, name, partial(_reduce, collective))
    return Processes("cuda", 8, 1, "torchrun")


def _reduce(collective: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a reduction as NCCL does; in the operation, its kind cannot be read."""
    arguments = inspect.signature(collective).bind(*args, **kwargs).arguments
    tensor: Any = arguments.get("input", arguments.get("tensor"))
    contracts.check_reduction(arguments.get("op", dist.ReduceOp.SUM), tensor)
    return collective(*args, **kwargs)


_real_init = dist.init_process_group
_REAL_REDUCTIONS = {name: getattr(dist, name) for name in ("all_reduce", "reduce_scatter_tensor")}

groups: list[dict[str, Any]] = []
"""Arguments of `init_process_group`."""


def build(case: Case) -> Any:
    """Return the run state that `train_step` needs, on this case's rank."""
    from resilience import launch as launcher
    from resilience.launch import launch

    launcher.check_ranks = lambda *_: None  # there are no other ranks to compare with
    shape = MeshShape(*case.mesh)
    parallel = replace(case.parallel, **vars(shape))
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


@dataclass(frozen=True)
class Report:
    """What a step left behind, after the checks that hold for every case.

    Attributes:
        operations: Calls of each operation in the last step.
        gathered: Bytes of all weights that FSDP2 gathered in the last step.
        sdpa: Choices of scaled_dot_product_attention in all steps.
        first_graphs, graphs: Compiled graphs after the first step, and in total.
        collectives: Calls of each compiled collective, in the graphs.
    """

    operations: Counter[str]
    gathered: int
    sdpa: dict[str, int]
    first_graphs: int
    graphs: int
    collectives: Counter[str]


def check_steps(case: Case) -> Report:
    """Take the steps of a case; check what holds for every case and return what depends on it.

    Devices and dtypes are right, only the first step waits for the device or compiles, and the
    compiler finds no graph break.
    """
    cuda_stubs.reset()
    fake_inductor.graphs.clear()
    counters.clear()
    run = build(case)
    device = torch.device("cuda", DEVICE)
    hook_dtypes = _record_gradients(run)
    for step in range(case.steps):
        waits = len(cuda_stubs.waits())
        cuda_stubs.operations.clear()
        cuda_stubs.gathered.clear()
        results = train.train_step(run, batches(case), 1e-3)
        if step == 0:
            first_graphs = int(counters["stats"]["unique_graphs"])
        assert step == 0 or len(cuda_stubs.waits()) == waits, cuda_stubs.waits()[waits:]
    assert results["scalars"].dtype == torch.float32 and results["batch_hash"].dtype == torch.int64
    assert {result.device for result in results.values()} == {device}
    for parameter in run.llama.parameters():
        assert (parameter.device, parameter.dtype) == (device, torch.float32)
        _check_state(run.adamw.state[parameter], parameter, case, device)
    assert hook_dtypes == {(device, torch.float32)}
    assert not counters["graph_break"], counters["graph_break"]
    assert {group["backend"] for group in groups} == {"nccl"}
    graphs = int(counters["stats"]["unique_graphs"])
    collectives: Counter[str] = Counter()
    for graph in fake_inductor.graphs:
        collectives += Counter(
            {name: n for name, n in graph.operations.items() if "c10d" in name or "symm" in name}
        )
    operations = Counter(cuda_stubs.operations)
    gathered = sum(cuda_stubs.gathered)
    sdpa = cuda_stubs.sdpa_backends()
    return Report(operations, gathered, sdpa, first_graphs, graphs, collectives)


def _record_gradients(run: Any) -> set[tuple[torch.device, torch.dtype]]:
    """Return a set to which each optimizer step adds devices and dtypes of its gradients."""
    found: set[tuple[torch.device, torch.dtype]] = set()

    def record(*_: Any) -> None:
        gradients = [parameter.grad for parameter in run.llama.parameters()]
        found.update((gradient.device, gradient.dtype) for gradient in gradients)

    run.adamw.register_step_pre_hook(record)
    return found


def _check_state(state: dict[str, Any], parameter: Any, case: Case, device: torch.device) -> None:
    """Check devices and formats of a parameter's moments."""
    assert (state["step"].device, state["step"].dtype) == (device, torch.float32)
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.uint8}
    expected = formats[case.precision.optimizer_state if parameter.ndim > 1 else "fp32"]
    for key in ("exp_avg", "exp_avg_sq"):
        moment = state[key]
        if not isinstance(moment, Tensor):
            moment = getattr(moment, "codes", None) if hasattr(moment, "codes") else moment.values
        assert (moment.device, moment.dtype) == (device, expected)


class _ClearInBackward(torch.autograd.Function):
    """Clears the cache of the thread that runs backwards, in which checkpoints recompute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _clear_sharding_prop_cache()
        return gradient


def run_cases(cases: dict[str, Case]) -> dict[str, Report | str]:
    """Return the report or the traceback of each case, run one after another in this process.

    A process for each would spend most of its time on what torch caches.
    """
    reports: dict[str, Report | str] = {}
    for name, case in cases.items():
        try:
            reports[name] = check_steps(case)
        except Exception:
            reports[name] = traceback.format_exc()
        groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        _clear_sharding_prop_cache()  # its meshes have the names of this case's groups
        _ClearInBackward.apply(torch.ones(1, device="cuda", requires_grad=True)).backward()
        torch._dynamo.reset()
        torch._inductor.config._micro_pipeline_tp = False
    return reports
