"""What is planned: one training step of one model on one mesh, every choice made.

The planner's own view of a configuration: no "auto" is left in it, and it knows nothing of files,
data or who starts the processes. Imports nothing heavy.
"""

from dataclasses import dataclass, replace
from typing import Literal

from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.traffic import Collective, Step, step_traffic

HEAD_CHUNK = 2048
"""Tokens whose logits exist at once: `model.loss.CHUNK`, held against it by a test."""

BYTES = {"fp32": 4, "bf16": 2}
"""Of an element."""


@dataclass(frozen=True)
class Job:
    """One step: `global_batch_size` sequences of `seq_len` tokens on all of the mesh's ranks.

    `precision` holds no `auto` (see `resolved_precision`); `micro_batch_size` counts the sequences
    that a data rank computes at a time. `document_mask`: attention stays inside documents.
    """

    model: ModelConfig
    mesh: MeshShape
    parallel: ParallelConfig
    precision: PrecisionConfig
    accelerator: Literal["cpu", "cuda"]
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    document_mask: bool = True

    @property
    def micro_batches(self) -> int:
        """Forwards and backwards of a rank in a step."""
        return self.global_batch_size // self.mesh.dp // self.micro_batch_size

    @property
    def tokens(self) -> int:
        """Tokens of a step, over the whole mesh."""
        return self.global_batch_size * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch that a rank and its tp peers compute: (batch, seq / cp)."""
        return self.micro_batch_size * self.seq_len // self.mesh.cp

    @property
    def param_bytes(self) -> int:
        """Of an element in forward and backward."""
        return BYTES[self.precision.param]

    @property
    def reduce_bytes(self) -> int:
        """Of an element in the sum of gradients."""
        return BYTES[self.precision.reduce]

    @property
    def step(self) -> Step:
        """The same as `parallel.traffic` and `parallel.trace` take it."""
        return Step(
            micro_batches=self.micro_batches,
            micro_batch_size=self.micro_batch_size,
            seq_len=self.seq_len,
            param_bytes=self.param_bytes,
            reduce_bytes=self.reduce_bytes,
            head_chunk=HEAD_CHUNK,
            norm_bytes=8 if self.accelerator == "cpu" else 4,
        )

    def traffic(self) -> list[Collective]:
        """What each rank sends in a step."""
        return step_traffic(self.model, self.mesh, self.parallel, self.step)


def resolved_precision(precision: PrecisionConfig, accelerator: str) -> PrecisionConfig:
    """The same precision with `auto` decided as `parallel.data_parallel` decides it."""
    param = precision.param
    if param == "auto":
        param = "bf16" if accelerator == "cuda" else "fp32"
    reduce = "fp32" if precision.reduce == "auto" else precision.reduce
    return replace(precision, param=param, reduce=reduce)
