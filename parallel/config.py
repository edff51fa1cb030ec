"""Configuration of the mesh and of the precision. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the mesh axes and how the processes on them are started.

    `dp_shard: -1` fills what the other axes leave of the processes. `devices` (processes on each
    node) and `num_nodes` are null for "what is there": on CPU what the mesh asks for, on GPUs
    every visible one, under `srun` or `torchrun` what they started.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    cp: int = 1
    tp: int = 1
    devices: int | None = None
    num_nodes: int | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    # Activations between the tensor-parallel products are sharded along seq.
    sequence_parallel: bool = True
    # The loss is computed on shards of the vocabulary: no rank holds the full logits.
    loss_parallel: bool = True
    # Overlap tensor-parallel communication with the products around it.
    async_tp: bool = False
    # What a block keeps for its backward: "none" recomputes nothing, "full" all, "selective" all
    # but matrix products and attention; a number is the share to keep, which the compiler chooses.
    activation_checkpoint: Literal["none", "full", "selective"] | float = "none"
    # Compile each block.
    compile: bool = False
    # Free a block's gathered weights between its forward and its backward. null: where sharded,
    # but for the last block.
    reshard_after_forward: bool | None = None
    # How often gradients are summed over the data ranks: once a "step", until when each rank holds
    # them whole, or with each "micro_batch", so that it holds its shard alone.
    reduce_gradients: Literal["step", "micro_batch"] = "step"

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        found = []
        for axis in ("dp_replicate", "cp", "tp"):
            size = getattr(self, axis)
            if size < 1:
                found.append(f"parallel.{axis} ({size}) is below 1: use 1 to switch the axis off")
        if self.dp_shard != -1 and self.dp_shard < 1:
            found.append(
                f"parallel.dp_shard ({self.dp_shard}) is neither -1 nor at least 1: "
                "use -1 to fill the processes that the other axes leave"
            )
        kept = self.activation_checkpoint
        if isinstance(kept, float):
            if not 0 <= kept <= 1:
                found.append(
                    f"parallel.activation_checkpoint ({kept}) is not between 0 and 1: use a share "
                    "of what would be kept, or none, selective or full"
                )
            if not self.compile:
                found.append(
                    f"parallel.activation_checkpoint ({kept}) is a budget that the compiler keeps, "
                    "and parallel.compile is false: use parallel.compile=true, or none, selective "
                    "or full"
                )
        for key in ("devices", "num_nodes"):
            count = getattr(self, key)
            if count is not None and count < 1:
                found.append(f"parallel.{key} ({count}) is below 1: use null for what is there")
        return found


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats: forward and backward (`param`), the gradients' sum (`reduce`), and more.

    Master weights are float32. `auto` is bf16 parameters on GPUs and fp32 on CPUs, and an fp32 sum
    everywhere. `optimizer_state` is how AdamW's moments are kept; `fp8` how the matrix products of
    the blocks are scaled where they are computed in 8 bits, null for products in `param`.
    """

    param: Literal["auto", "fp32", "bf16"] = "auto"
    reduce: Literal["auto", "fp32", "bf16"] = "auto"
    optimizer_state: Literal["fp32", "bf16", "int8"] = "fp32"
    fp8: Literal["tensorwise", "rowwise"] | None = None

    def problems(self) -> list[str]:
        """Every broken rule, as messages that name key, value, rule and remedy."""
        if self.fp8 is not None and self.param == "fp32":
            return [
                f"precision.fp8 ({self.fp8}) multiplies bf16 activations, and precision.param is "
                "fp32: use precision.param=bf16, or precision.fp8=null"
            ]
        return []
