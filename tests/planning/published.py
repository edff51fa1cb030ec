"""Published training runs in the planner's terms: model, hardware, settings, throughput.

Throughput is in tokens/s per device. `planning.speed.MATMUL_EFFICIENCY` was fitted to `FITTED`;
`HELD_OUT` and `ADDED_LATER` were not used. Differences of other software (attention kernel, head,
recomputation) are parameters of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

from model.config import ModelConfig
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from planning.hardware import Hardware, load_hardware
from planning.step_spec import StepSpec

H100, H200, A100 = (load_hardware(name) for name in ("h100", "h200", "a100"))


def with_attention(hardware: Hardware, tflops: float) -> Hardware:
    """Return the same device with another attention kernel."""
    return replace(hardware, attention_tflops={**hardware.attention_tflops, "bf16": tflops})


# Forward and backward, from the authors' benchmarks on H100 (arXiv:2407.08608): cuDNN is about 1.7
# times as fast as FlashAttention-2. The Triton kernel of llm-foundry is 1.8 times slower than
# FlashAttention-2 (arXiv:2307.08691).
CUDNN, TRITON = with_attention(H100, 450), with_attention(H100, 145)
# 96 GB of HBM2e at 2.4 TB/s, limited to 500 W of 700; clocks scale with the cube root of power.
LIMITED = replace(
    H100,
    bandwidth_gb_s=H100.bandwidth_gb_s * 2.4 / 3.35,
    matrix_tflops={key: rate * (500 / 700) ** (1 / 3) for key, rate in H100.matrix_tflops.items()},
)

LLAMA_8B = ModelConfig("8b", 4096, 32, 32, 8, 14336, 128256)
LLAMA_70B = ModelConfig("70b", 8192, 80, 64, 8, 28672, 128256)


def mpt(dim: int, layers: int, heads: int) -> ModelConfig:
    """Return MPT, with its FFN of two products of 4·dim as three of 8/3·dim."""
    return ModelConfig("mpt", dim, layers, heads, heads, 8 * dim // 3, 50368, tie_embeddings=True)


def qwen(dim: int, layers: int, heads: int, kv: int, ffn: int, tied: bool) -> ModelConfig:
    """Return Qwen2.5 without its biases."""
    vocab = 151936 if tied else 152064
    return ModelConfig("qwen", dim, layers, heads, kv, ffn, vocab, tie_embeddings=tied)


@dataclass(frozen=True)
class Row:
    """One published run: `micro` micro-batches of `local` sequences of `seq_len` tokens."""

    name: str
    hardware: Hardware
    model: ModelConfig
    mesh: tuple[int, int, int, int]
    seq_len: int
    local: int
    micro: int
    tokens_per_second: float
    settings: dict[str, Any]

    @property
    def spec(self) -> StepSpec:
        mesh, settings = MeshShape(*self.mesh), dict(self.settings)
        fp8, state = settings.pop("fp8", None), settings.pop("optimizer_state", "fp32")
        return StepSpec(
            model=self.model,
            mesh=mesh,
            parallel=ParallelConfig(**{"compile": False, **settings}),
            precision=PrecisionConfig("bf16", "fp32", state, fp8),
            accelerator="cuda",
            seq_len=self.seq_len,
            global_batch_size=self.local * self.micro * mesh.dp,
            micro_batch_size=self.local,
            document_mask=False,
        )


EIGHT = (1, 8, 1, 1)
FULL: dict[str, Any] = {"activation_checkpoint": "full"}
COMPILED: dict[str, Any] = {"compile": True}
# torchtitan saves every other product, and attention; compiled or not.
HALF: dict[str, Any] = {"activation_checkpoint": 0.5}
SELECTIVE = HALF | COMPILED
FP8: dict[str, Any] = {"fp8": "tensorwise"}
BF16_MOMENTS: dict[str, Any] = {"optimizer_state": "bf16"}
MPT_1B, MPT_3B, MPT_7B = mpt(2048, 24, 16), mpt(2560, 32, 20), mpt(4096, 32, 32)

FITTED = [
    # llm-foundry, scripts/train/benchmarking/README.md, H100 80GB BF16.
    Row("MosaicML 1B, 1,024", TRITON, MPT_1B, EIGHT, 1024, 18, 4, 48910, {}),
    Row("MosaicML 1B, 2,048", TRITON, MPT_1B, EIGHT, 2048, 14, 1, 45455, {}),
    Row("MosaicML 1B, 4,096", TRITON, MPT_1B, EIGHT, 4096, 7, 4, 38535, {}),
    Row("MosaicML 1B, 16,384", TRITON, MPT_1B, EIGHT, 16384, 2, 4, 19649, {}),
    Row("MosaicML 3B, 1,024", TRITON, MPT_3B, EIGHT, 1024, 20, 6, 27046, {}),
    Row("MosaicML 3B, 4,096", TRITON, MPT_3B, EIGHT, 4096, 5, 6, 20964, {}),
    Row("MosaicML 3B, 16,384", TRITON, MPT_3B, EIGHT, 16384, 1, 6, 11152, {}),
    Row("MosaicML 7B, 2,048", TRITON, MPT_7B, EIGHT, 2048, 6, 1, 10643, {}),
    Row("MosaicML 7B, 4,096, full", TRITON, MPT_7B, EIGHT, 4096, 16, 2, 8611, FULL),
    Row("MosaicML 13B, 2,048", TRITON, mpt(5120, 40, 40), EIGHT, 2048, 2, 1, 4792, {}),
    Row(
        "MosaicML 30B on 32, full",
        TRITON,
        mpt(7168, 48, 56),
        (1, 32, 1, 1),
        2048,
        14,
        3,
        2308,
        FULL,
    ),
    # torchtitan, docs/performance.md of 2024 (64 × A100) and the other tables of 2024-12.
    Row("torchtitan 8B, 64 A100", A100, LLAMA_8B, (1, 64, 1, 1), 8192, 1, 1, 2973, HALF),
    Row("torchtitan 70B, 64 A100", A100, LLAMA_70B, (1, 64, 1, 1), 8192, 1, 1, 331, FULL),
    Row("torchtitan 8B, 128 H100", LIMITED, LLAMA_8B, (1, 128, 1, 1), 8192, 2, 1, 5605, HALF),
    Row("  compiled", LIMITED, LLAMA_8B, (1, 128, 1, 1), 8192, 2, 1, 6514, SELECTIVE),
    Row("  and fp8", LIMITED, LLAMA_8B, (1, 128, 1, 1), 8192, 2, 1, 8380, SELECTIVE | FP8),
    Row(
        "torchtitan 8B, 32,768, fp8",
        *(LIMITED, LLAMA_8B, EIGHT, 32768, 1, 1, 3890),
        FULL | COMPILED | FP8,
    ),
]

ADDED_LATER = [
    # The remaining measurements of the two torchtitan reports, without pipeline parallelism.
    Row(
        "torchtitan 8B, 64 H200", H200, LLAMA_8B, (1, 64, 1, 1), 8192, 2, 1, 10753, SELECTIVE | FP8
    ),
    Row(
        "torchtitan 70B, fp8, 256 H100",
        *(LIMITED, LLAMA_70B, (1, 32, 1, 8), 8192, 16, 1, 829),
        FULL | COMPILED | FP8,
    ),
    Row(
        "  async TP",
        *(LIMITED, LLAMA_70B, (1, 32, 1, 8), 8192, 16, 1, 876),
        FULL | COMPILED | FP8 | {"async_tp": True},
    ),
    *(
        Row(
            f"torchtitan 8B, {seq_len:,}, cp={cp}",
            *(LIMITED, LLAMA_8B, (1, 8 // cp, cp, 1), seq_len, 1, 1, published),
            FULL | COMPILED | FP8,
        )
        for seq_len, cp, published in ((65536, 2, 2540), (131072, 4, 1071), (262144, 8, 548))
    ),
]

HELD_OUT = [
    Row("NeMo 8B, 8 H100", CUDNN, LLAMA_8B, EIGHT, 8192, 1, 1, 10682, COMPILED),
    Row("  fp8", CUDNN, LLAMA_8B, EIGHT, 8192, 1, 1, 14048, COMPILED | FP8),
    Row("torchtitan 8B, 8 H100", LIMITED, LLAMA_8B, EIGHT, 8192, 2, 1, 5762, HALF),
    Row("  compiled", LIMITED, LLAMA_8B, EIGHT, 8192, 2, 1, 6667, SELECTIVE),
    Row("  and fp8", LIMITED, LLAMA_8B, EIGHT, 8192, 2, 1, 8532, SELECTIVE | FP8),
    Row(
        "torchtitan 8B, 32 H200", H200, LLAMA_8B, (1, 32, 1, 1), 8192, 2, 1, 10938, SELECTIVE | FP8
    ),
    Row(
        "torchtitan 70B, 256 H100",
        *(LIMITED, LLAMA_70B, (1, 32, 1, 8), 8192, 16, 1, 597),
        FULL | COMPILED,
    ),
    Row(
        "  async TP",
        *(LIMITED, LLAMA_70B, (1, 32, 1, 8), 8192, 16, 1, 652),
        FULL | COMPILED | {"async_tp": True},
    ),
    Row("MosaicML 1B, 8,192", TRITON, MPT_1B, EIGHT, 8192, 3, 4, 29157, {}),
    Row("MosaicML 3B, 8,192", TRITON, MPT_3B, EIGHT, 8192, 3, 6, 16578, {}),
    Row(
        "llmq 1.5B, one H100",
        *(CUDNN, qwen(1536, 28, 12, 2, 8960, True), (1, 1, 1, 1), 1024, 32, 16, 59000),
        COMPILED | BF16_MOMENTS,
    ),
    Row(
        "llmq 3B",
        CUDNN,
        qwen(2048, 36, 16, 2, 11008, True),
        (1, 1, 1, 1),
        1024,
        16,
        32,
        31000,
        COMPILED | BF16_MOMENTS,
    ),
    Row(
        "llmq 7B",
        CUDNN,
        qwen(3584, 28, 28, 4, 18944, False),
        (1, 1, 1, 1),
        1024,
        4,
        128,
        14000,
        COMPILED | BF16_MOMENTS,
    ),
]
