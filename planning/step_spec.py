"""The planner's input: one training step of one model on one mesh, fully resolved.

`StepSpec` contains no "auto" values and does not depend on files, data or the launcher. Imports no
heavy packages.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from model.config import ModelConfig, ModelPart, attention_kernel
from parallel.config import BF16_CAPABILITY, ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.pipeline_schedule import parts_of_rank, stage_layers
from parallel.traffic import Collective, Step, block_matrices, step_traffic
from planning.frameworks import DEFAULT

HEAD_CHUNK = 2048
"""Tokens per chunk of logits; equals `model.loss.CHUNK`, which importing would load torch."""

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
MOMENT_BLOCK = 256
"""8-bit values of a moment per float32 scale."""


@dataclass(frozen=True)
class StepSpec:
    """One optimizer step of `global_batch_size` sequences of `seq_len` tokens on a mesh.

    Attributes:
        parallel: `compile=auto` is resolved on construction, and `activation_checkpoint` is that of
            the pipeline rank `stage`. To change it, set `pp_checkpoint` to None as well.
        precision: Data types, with `auto` resolved (see `resolved_precision`).
        micro_batch_size: Sequences per data-parallel rank and micro-batch.
        document_mask: Attention is restricted to documents.
        async_save: Checkpoints are copied to host memory and written in the background.
        prefetch: Steps that the loader reads ahead; None: batches are not counted.
        capability: Compute capability of a GPU.
        flash_attention: Kernel that `varlen` runs: FA2, FA3 or FA4; other frameworks than ours also
            cuDNN or Triton.
        framework: Training framework, a key of `planning.frameworks.FRAMEWORKS`.
        stage: Pipeline rank whose memory, traffic and computation is meant.
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
    async_save: bool = False
    prefetch: int | None = None
    capability: tuple[int, int] = (9, 0)
    flash_attention: str = "FA2"
    framework: str = DEFAULT
    stage: int = 0

    def __post_init__(self) -> None:
        parallel = self.parallel.resolved(self.accelerator).of_stage(self.stage)
        object.__setattr__(self, "parallel", parallel)

    @property
    def stages(self) -> list["StepSpec"]:
        """The step on each pipeline rank."""
        return [replace(self, stage=stage) for stage in range(self.mesh.pp)]

    @cached_property
    def parts(self) -> list[ModelPart]:
        """The parts of the model on this pipeline rank."""
        return parts_of_rank(self.model, self.parallel, self.mesh.pp, self.stage)

    @property
    def layers_of_stages(self) -> list[int]:
        """Layers of each of the pp × pp_parts stages, in the order of the model."""
        return stage_layers(self.model, self.parallel, self.mesh.pp)

    @property
    def n_layers(self) -> int:
        """Layers on this pipeline rank."""
        return sum(len(part.layers) for part in self.parts)

    @property
    def has_embedding(self) -> bool:
        return self.parts[0].has_embedding

    @property
    def has_head(self) -> bool:
        return self.parts[-1].has_head

    @property
    def ties_on_rank(self) -> bool:
        """Whether embedding and head are one weight on this pipeline rank."""
        return self.model.tie_embeddings and self.has_embedding and self.has_head

    @property
    def micro_batches(self) -> int:
        """Micro-batches per rank and step (gradient accumulation steps)."""
        return self.global_batch_size // self.mesh.dp // self.micro_batch_size

    @property
    def tokens(self) -> int:
        """Tokens per step over the entire mesh."""
        return self.global_batch_size * self.seq_len

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch per tensor-parallel group: micro_batch_size × seq_len / cp."""
        return self.micro_batch_size * self.seq_len // self.mesh.cp

    @property
    def param_bytes(self) -> int:
        """Bytes per element in forward and backward."""
        return DTYPE_BYTES[self.precision.param]

    @property
    def matrix_dtype(self) -> str:
        """Data type of matrix products other than fp8: that of the parameters, or tf32 on GPUs."""
        param, highest = self.precision.param, self.precision.float32_matmul == "highest"
        return "tf32" if param == "fp32" and self.accelerator == "cuda" and not highest else param

    @property
    def attention(self) -> str:
        """The attention kernel, as `model.attention` selects it: `sdpa`, `flex` or `varlen`."""
        if not self.document_mask and self.mesh.cp == 1:
            return "sdpa"
        capability = self.capability if self.accelerator == "cuda" else None
        model, is_16_bit = self.model, self.precision.param == "bf16"
        complete = self.mesh.cp == 1
        return attention_kernel(model.attention, model.head_dim, capability, is_16_bit, complete)

    @property
    def runs_flash_attention(self) -> bool:
        """Whether attention is computed by the kernel `flash_attention`."""
        on_gpu = self.accelerator == "cuda" and self.precision.param == "bf16"
        if self.framework != DEFAULT:
            return on_gpu
        return on_gpu and self.attention == "varlen" and self.flash_attention.startswith("FA")

    @property
    def attention_name(self) -> str:
        """The attention kernel in reports."""
        if self.runs_flash_attention:
            return self.flash_attention.replace("FA", "FlashAttention-")
        names = {"varlen": "FlashAttention-2", "flex": "FlexAttention", "sdpa": "SDPA"}
        return names[self.attention] + (", dense mask" if self.has_dense_mask else "")

    @property
    def has_dense_mask(self) -> bool:
        """Whether attention reads a mask with an element for each query and key."""
        return self.attention == "sdpa" and (self.document_mask or self.mesh.cp > 1)

    @property
    def expanded_kv_heads(self) -> int:
        """Heads of the keys and values that the attention kernel reads, over all `tp` ranks.

        On GPUs `model.attention._sdpa` expands grouped heads if no fused kernel takes them.
        """
        model, wide = self.model, self.precision.param == "fp32" or self.model.head_dim > 192
        on_gpu = self.accelerator == "cuda" and self.attention == "sdpa"
        return model.n_heads if on_gpu and (self.has_dense_mask or wide) else model.n_kv_heads

    @property
    def reduce_bytes(self) -> int:
        """Bytes per element in gradient reduction."""
        return DTYPE_BYTES[self.precision.reduce]

    @property
    def step(self) -> Step:
        """The step as `parallel.traffic` represents it."""
        return Step(
            micro_batches=self.micro_batches,
            micro_batch_size=self.micro_batch_size,
            seq_len=self.seq_len,
            param_bytes=self.param_bytes,
            reduce_bytes=self.reduce_bytes,
            head_chunk=HEAD_CHUNK,
            norm_bytes=8 if self.accelerator == "cpu" else 4,
            fp8_gather=bool(self.fp8_gathered),
        )

    @property
    def fp8_gathered(self) -> list[tuple[int, int]]:
        """The local shapes of a block's matrices that are gathered in fp8."""
        shards = self.mesh.dp_shard * self.mesh.cp
        if self.precision.fp8 != "tensorwise" or shards == 1 or self.mesh.tp > 1:
            return []
        matrices = block_matrices(self.model, tp=1)[:-2]  # without norms
        return [each for each in matrices if each[0] % shards == 0]

    def traffic(self) -> list[Collective]:
        """Return the collectives of a rank of the pipeline rank `stage` in one step."""
        return step_traffic(self.model, self.mesh, self.parallel, self.step, self.stage)


def resolved_precision(
    precision: PrecisionConfig, accelerator: str, capability: tuple[int, int] = BF16_CAPABILITY
) -> PrecisionConfig:
    """Resolve `auto` the same way as `parallel.data_parallel`."""
    param = precision.param
    if param == "auto":
        param = "bf16" if accelerator == "cuda" and capability >= BF16_CAPABILITY else "fp32"
    reduce = "fp32" if precision.reduce == "auto" else precision.reduce
    return replace(precision, param=param, reduce=reduce)
