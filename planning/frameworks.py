"""Training frameworks as the planner models them: this one, and those with published throughput.

A plan of a published run is compared with its result (tests/planning). The frameworks differ in
the kernels that they run and in what they overlap; each difference has its source here. What
remains is one constant per framework, `efficiency`, fitted to the published runs of the fitted set.
"""

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Framework:
    """How a training framework executes a step, where it matters for time and memory.

    Attributes:
        efficiency: Rate of computation inside a step relative to single operations, which run at
            higher clocks and without the host's gaps. Fitted.
        selective: Recomputed fractions of a block's matrix products, elementwise operations and
            attention under selective checkpointing.
        fused_norms: RMSNorm is one kernel each way, also where blocks are not compiled.
        fused_casts: Casts to fp8 are part of the kernels that write their input.
        tp_gathers: All-gathers of the hidden states in a block's forward under tensor parallelism:
            two, or one for each matrix product that reads them.
        fp8_tp_gather: Those all-gathers transfer fp8 (tensorwise).
        tp_overlap: Tensor-parallel collectives are split into `tp` chunks and overlap with the
            matrix products next to them.
        ring_attention: Context parallelism exchanges keys and values during attention.
        merges_eagerly: The outputs and gradients of its `cp` parts are merged by separate float32
            operations (torch.distributed.tensor.experimental).
        fills_bubble: In a pipeline, weights are gathered before the first hidden states arrive, and
            gradients are reduced while other ranks run their last backward.
        graphs: CUDA graphs launch the kernels, without time of the host.
        whole_logits: How the loss holds the logits of a micro-batch; None: a chunk of tokens.
    """

    efficiency: float
    selective: tuple[float, float, float] = (0.0, 1.0, 0.0)
    fused_norms: bool = True
    fused_casts: bool = False
    tp_gathers: int = 2
    fp8_tp_gather: bool = False
    tp_overlap: bool = False
    ring_attention: bool = False
    merges_eagerly: bool = False
    fills_bubble: bool = False
    graphs: bool = False
    whole_logits: Literal["eager", "compiled"] | None = None


# torchtitan saves every second matrix product; PyTorch's RMSNorm was several kernels; tensorwise
# fp8 casts before the all-gathers of tensor parallelism (torchao's Float8ColwiseParallel).
_TORCHTITAN = Framework(
    0.81,
    selective=(0.5, 1.0, 0.0),
    fused_norms=False,
    fp8_tp_gather=True,
    ring_attention=True,
    merges_eagerly=True,
    whole_logits="compiled",
)
DEFAULT = "llamesh"
FRAMEWORKS = {
    # Not measured on GPUs with a published result: the constant of torchtitan, which runs the same
    # FSDP2, compiler and kernels.
    DEFAULT: Framework(_TORCHTITAN.efficiency, fills_bubble=True),
    "torchtitan": _TORCHTITAN,
    "torchtitan-2024": replace(_TORCHTITAN, whole_logits="eager"),
    # Gathers the hidden states for each product (kempnerforge/distributed/tensor_parallel.py).
    "kempnerforge": replace(_TORCHTITAN, tp_gathers=5, fp8_tp_gather=False),
    "fms-fsdp": Framework(0.88, fused_norms=False, whole_logits="eager"),
    # NeMo and Megatron-Bridge: Transformer Engine fuses casts into norms and activations, and
    # overlaps tensor parallelism through user buffers. The buffers of its loss are assumed.
    "nemo": Framework(
        0.76,
        fused_casts=True,
        fp8_tp_gather=True,
        tp_overlap=True,
        ring_attention=True,
        fills_bubble=True,  # --overlap-param-gather and --overlap-grad-reduce of Megatron-LM
        whole_logits="compiled",
    ),
    "llm-foundry": Framework(0.86, whole_logits="eager"),
    "internevo": Framework(0.81, whole_logits="eager"),
    # XLA with Transformer Engine's attention; saves the projections of attention.
    "maxtext": Framework(
        0.86, (0.8, 1.0, 1.0), fused_casts=True, graphs=True, whole_logits="eager"
    ),
    # The same compiler.
    "paxml": Framework(0.81, (0.0, 1.0, 1.0), fused_casts=True, graphs=True, whole_logits="eager"),
    # C++ and CUDA.
    "llmq": Framework(1.07, fused_casts=True, graphs=True),
}
