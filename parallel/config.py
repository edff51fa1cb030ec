"""Configuration of the device mesh and of the number formats. Imports nothing heavy."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from model.config_base import FREE, ConfigSection, PositiveInt, ResumePolicy

FP8_MULTIPLE = 16
"""fp8 products need widths, and tokens per micro-batch, that are multiples of this."""

BF16_CAPABILITY = (8, 0)
"""Compute capability of Ampere, the first GPUs with bf16 tensor cores and FlashAttention."""

ROUNDING = ResumePolicy("override", "rounding")

CheckpointMode = Literal["none", "full", "selective"] | Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class ParallelConfig(ConfigSection):
    """Sizes of the mesh axes, how processes are launched, and how a step is computed.

    Attributes:
        dp_shard: -1 uses the processes that the other axes do not need.
        pp: Pipeline stages: consecutive layers on different ranks.
        pp_parts: Parts of the model on each pipeline rank. More than one interleave: the bubble is
            shorter by their number, and hidden states are sent as many times as often.
        pp_layers: Layers of each of the `pp` × `pp_parts` stages. None: balanced.
        pp_checkpoint: `activation_checkpoint` of each pipeline rank. None: the same on all.
        devices, num_nodes: Processes per node and nodes. None: on CPU as many as the mesh needs,
            on GPUs all visible devices, under `srun` or `torchrun` the launched ones.
        sequence_parallel: Shard activations along the sequence between tensor-parallel layers.
        loss_parallel: Compute the loss on vocabulary shards; no rank holds the full logits.
        async_tp: Overlap tensor-parallel communication with the matrix products around it.
        activation_checkpoint: Activations that a block keeps for its backward: `none` recomputes
            nothing, `full` everything, `selective` everything but matrix products and attention. A
            number is the fraction that the compiler may keep (its memory budget).
        compile: Compile each block and the loss. `auto` compiles on GPUs only.
        reshard_after_forward: Free a block's gathered weights between forward and backward. None:
            where weights are sharded, except for the last block.
        reduce_gradients: Reduce gradients over the data ranks once per `step`, with full gradients
            held in between, or per `micro_batch`, with sharded gradients.
        auto: Let the planner's search choose axes, micro-batch, recomputation, resharding and
            reduction that the command does not set.
        auto_record: Set by `train.py`: the devices of that choice, and the keys that were given.
    """

    dp_replicate: PositiveInt = 1
    dp_shard: Literal[-1] | PositiveInt = -1
    cp: PositiveInt = 1
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    pp_parts: PositiveInt = 1
    pp_layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    pp_checkpoint: tuple[CheckpointMode, ...] | None = None
    devices: PositiveInt | None = None
    num_nodes: PositiveInt | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    sequence_parallel: bool = True
    loss_parallel: bool = True
    async_tp: bool = False
    activation_checkpoint: CheckpointMode = "none"
    compile: Literal["auto"] | bool = "auto"
    reshard_after_forward: bool | None = None
    reduce_gradients: Literal["step", "micro_batch"] = "step"
    auto: bool = False
    auto_record: str | None = None

    def resolved(self, accelerator: str) -> "ParallelConfig":
        """Return the configuration with `compile` resolved for a device type."""
        is_auto = self.compile == "auto"
        return replace(self, compile=accelerator == "cuda") if is_auto else self

    def of_stage(self, rank: int) -> "ParallelConfig":
        """Return the configuration with the activation checkpointing of a pipeline rank."""
        modes = self.pp_checkpoint
        return replace(self, activation_checkpoint=modes[rank]) if modes else self


@dataclass(frozen=True)
class PrecisionConfig(ConfigSection):
    """Number formats. Master weights are float32.

    Attributes:
        param: Format of forward and backward; `auto` is bf16 on GPUs since Ampere, else fp32.
        reduce: Format of the gradient reduction; `auto` is fp32.
        optimizer_state: Storage format of AdamW's moments.
        fp8: Scaling recipe of 8-bit matrix products in the blocks; None computes them in `param`.
        float32_matmul: `torch.set_float32_matmul_precision` on GPUs: `high` computes float32
            products in TF32, `highest` in float32.
    """

    param: Annotated[Literal["auto", "fp32", "bf16"], ROUNDING] = "auto"
    reduce: Annotated[Literal["auto", "fp32", "bf16"], ROUNDING] = "auto"
    optimizer_state: Annotated[Literal["fp32", "bf16", "int8"], FREE] = "fp32"
    fp8: Annotated[Literal["tensorwise", "rowwise"] | None, ROUNDING] = None
    float32_matmul: Annotated[Literal["highest", "high", "medium"], ROUNDING] = "high"
