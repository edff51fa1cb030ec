"""A small model, optimizer and batch on any mesh, without a dataset or run folder.

Shards are uneven: neither 3 nor 6 divides the dims. Batches are uneven too: packed documents,
masked labels and a rank with few targets.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from data.loader import Batch, StepBatches
from model.config import ModelConfig
from model.llama import Llama
from model.loss import IGNORE
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights, local_block, parallelize
from parallel.strategy import MeshStrategy
from training.config import OptimConfig
from training.optimizer import build_optimizer

SEED, STEPS = 7, 2
BATCH, SEQ, VOCAB = 12, 16, 58
# In its first steps Adam divides a gradient by itself; this eps keeps rounding errors small.
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, weight_decay=0.5)


@dataclass(frozen=True)
class Case:
    """Mesh, model and training options of one run."""

    dp: int = 1  # dp_shard
    tp: int = 1
    cp: int = 1
    dp_replicate: int = 1
    tied: bool = False
    sequence_parallel: bool = True
    loss_parallel: bool = True
    n_micro: int = 2
    max_norm: float = 0.5  # below the reference's gradient norm, so gradients are clipped
    param: Any = "fp32"
    n_layers: int = 1
    activation_checkpoint: Any = "none"
    compile: bool = False
    reshard_after_forward: bool | None = None
    reduce_gradients: Any = "step"
    pp: int = 1
    pp_parts: int = 1
    pp_checkpoint: Any = None

    @property
    def mesh(self) -> MeshShape:
        return MeshShape(self.dp_replicate, self.dp, self.cp, self.tp, self.pp)

    @property
    def world(self) -> int:
        return self.mesh.world_size

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            dp_replicate=self.dp_replicate,
            dp_shard=self.dp,
            cp=self.cp,
            tp=self.tp,
            pp=self.pp,
            pp_parts=self.pp_parts,
            pp_checkpoint=self.pp_checkpoint,
            sequence_parallel=self.sequence_parallel,
            loss_parallel=self.loss_parallel,
            activation_checkpoint=self.activation_checkpoint,
            compile=self.compile,
            reshard_after_forward=self.reshard_after_forward,
            reduce_gradients=self.reduce_gradients,
        )


def model_config(tied: bool, n_layers: int) -> ModelConfig:
    return ModelConfig("small", 40, n_layers, 4, 2, 52, VOCAB, tie_embeddings=tied)


ParallelizeFn = Callable[[Llama, DeviceMesh], Llama]
"""Transform of a model on the meta device."""

GlobalBatch = tuple[Tensor, Tensor, Tensor]
"""Tokens, positions and labels, each (batch, seq)."""


def batch(step: int) -> GlobalBatch:
    """Return packed documents whose first samples have many targets and the last ones few."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    positions = torch.arange(SEQ).repeat(BATCH, 1)
    for row in range(BATCH):
        cut = 3 + row
        positions[row, cut:] = torch.arange(SEQ - cut)
        labels[row, cut - 1] = IGNORE
        labels[row, SEQ - row :] = IGNORE
    labels[-2] = IGNORE  # on some meshes, a micro-batch without a target
    return tokens, positions, labels


def local_batches(global_batch: GlobalBatch, rank: int, size: int, n_micro: int) -> StepBatches:
    """Return the micro-batches of one data-parallel rank."""
    rows = len(global_batch[0]) // size
    local = [field[rank * rows : (rank + 1) * rows] for field in global_batch]
    chunks = list(zip(*(field.chunk(n_micro) for field in local), strict=True))
    assert len(chunks) == n_micro
    n_documents = [int((positions == 0).sum()) for _, positions, _ in chunks]
    micro_batches = [Batch(*fields) for fields in chunks]
    n_targets = int((local[2] != IGNORE).sum())
    return StepBatches(micro_batches, n_documents, n_targets, digest=rank + 1)


def build(
    case: Case, accelerator: str = "cpu", plan: ParallelizeFn | None = None
) -> SimpleNamespace:
    """Return the run state that `train_step` needs.

    Args:
        plan: Replaces `parallelize` with the case's settings.
    """
    config = model_config(case.tied, case.n_layers)
    precision = PrecisionConfig(param=case.param)
    plan = plan or partial(parallelize, parallel=case.parallel, precision=precision)
    strategy = MeshStrategy(case.mesh, plan, case.reduce_gradients)
    fabric = Fabric(accelerator=accelerator, devices=case.world, strategy=strategy)
    fabric.launch()
    with torch.device("meta"):
        llama = Llama(config)
    model = fabric.setup_module(llama)
    adamw = build_optimizer(llama, OPTIM)
    optimizer = fabric.setup_optimizers(adamw)
    initialize_weights(llama, config, SEED)
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_grad_norm=case.max_norm)),
        fabric=fabric,
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        llama=llama,
        adamw=adamw,
        data_rank=case.mesh.data_rank(fabric.global_rank),
    )


def full_tensor(tensor: Any) -> Tensor:
    """Return a copy of the unsharded tensor on every rank."""
    result: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return result.detach().clone()


def of_all_stages(tensors: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """Return full tensors by name; stages of a pipeline exchange theirs, which must be equal."""
    own = {name: full_tensor(tensor) for name, tensor in tensors}
    everyone: list[Any] = [own]
    if dist.is_initialized():
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, own)
    found: dict[str, Tensor] = {}
    for name, tensor in (item for each in everyone for item in each.items()):
        assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


def equals_local_shard(tensor: Any, expected: Tensor) -> bool:
    """Return whether the local shard of a tensor equals that slice of the full tensor exactly."""
    local, offsets = local_block(tensor.detach())
    for dim, (offset, size) in enumerate(zip(offsets, local.shape, strict=True)):
        expected = expected.narrow(dim, offset, size)
    return torch.equal(local, expected)
