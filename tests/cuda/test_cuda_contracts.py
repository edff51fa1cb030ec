"""Contracts of CUDA kernels that fake tensors ignore: wrong calls raise, as they do on a GPU.

The sources are named in `contracts`. That the product's own calls keep the contracts is shown by
every other test in this folder, because each operation on a fake tensor is checked.
"""

from typing import Any

import pytest
from fake_device import on_fake_device

BF16 = "bfloat16"


def call_varlen(dtype: str, head_dim: int, offsets: str, kv_heads: int, stride: int) -> None:
    import torch
    from torch.nn.attention.varlen import varlen_attn

    def states(heads: int) -> Any:
        wide = torch.zeros(8, heads, head_dim * stride, device="cuda", dtype=getattr(torch, dtype))
        return wide[..., ::stride]

    k = states(kv_heads)
    cu_seqlens = torch.zeros(3, device="cuda", dtype=getattr(torch, offsets))
    varlen_attn(states(4), k, k, cu_seqlens, cu_seqlens, 8, 8, window_size=(-1, 0), enable_gqa=True)


@pytest.mark.parametrize(
    ("capability", "arguments", "message"),
    [
        ((9, 0), (BF16, 64, "int32", 2, 1), None),
        ((8, 0), (BF16, 256, "int32", 4, 1), None),
        ((9, 0), (BF16, 260, "int32", 2, 1), "head dimension at most 256"),
        ((9, 0), (BF16, 60, "int32", 2, 1), "must be a multiple of 8"),
        ((9, 0), ("float32", 64, "int32", 2, 1), "only support fp16 and bf16"),
        ((9, 0), (BF16, 64, "int64", 2, 1), "must have dtype int32"),
        ((9, 0), (BF16, 64, "int32", 2, 2), "contiguous last dimension"),
        ((7, 5), ("float16", 64, "int32", 2, 1), "Ampere GPUs or newer"),
    ],
)
def test_varlen_attention(capability: tuple[int, int], arguments: Any, message: str | None) -> None:
    expect(message, call_varlen, *arguments, capability=capability)


def call_scaled_mm(
    recipe: str, tokens: int, width: int, transposed: bool, out: str, types: tuple[str, str]
) -> None:
    import torch

    first, second = (getattr(torch, f"float8_{each}") for each in types)
    a = torch.zeros(tokens, width, device="cuda").to(first)
    b = torch.zeros(64, width, device="cuda").to(second)
    rows, columns = ((tokens, 1), (1, 64)) if recipe == "rowwise" else ((), ())
    scales = torch.zeros(rows, device="cuda"), torch.zeros(columns, device="cuda")
    b = b.t() if transposed else b.t().contiguous()
    torch._scaled_mm(a, b, *scales, out_dtype=getattr(torch, out))


E4M3, E5M2 = ("e4m3fn", "e4m3fn"), ("e5m2", "e5m2")


@pytest.mark.parametrize(
    ("capability", "arguments", "message"),
    [
        ((9, 0), ("tensorwise", 32, 64, True, BF16, E4M3), None),
        ((8, 9), ("tensorwise", 32, 64, True, "float32", E4M3), None),
        ((9, 0), ("rowwise", 32, 64, True, BF16, E4M3), None),
        ((8, 0), ("tensorwise", 32, 64, True, BF16, E4M3), "needs compute capability 8.9"),
        ((8, 9), ("rowwise", 32, 64, True, BF16, E4M3), "need compute capability 9.0"),
        ((9, 0), ("rowwise", 32, 64, True, "float32", E4M3), "out_dtype bf16"),
        ((9, 0), ("tensorwise", 32, 64, False, BF16, E4M3), "must be col_major"),
        ((9, 0), ("tensorwise", 32, 40, True, BF16, E4M3), "divisible by 16"),
        ((9, 0), ("tensorwise", 32, 64, True, BF16, E5M2), "two float8_e5m2 matrices"),
    ],
)
def test_scaled_product(capability: tuple[int, int], arguments: Any, message: str | None) -> None:
    expect(message, call_scaled_mm, *arguments, capability=capability)


def call_adamw(gradient: str, step: str, found_inf: str, transposed: bool) -> None:
    import torch
    from torch.optim.adamw import adamw

    def tensor(*size: int, dtype: str = "float32") -> torch.Tensor:
        return torch.zeros(size, device="cuda", dtype=getattr(torch, dtype))

    weight = tensor(4, 8)
    grad = tensor(8, 4, dtype=gradient).t() if transposed else tensor(4, 8, dtype=gradient)
    options: Any = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}
    options |= {"amsgrad": False, "maximize": False, "fused": True, "foreach": False}
    options |= {"found_inf": tensor(dtype=found_inf)}
    moments = tensor(4, 8), tensor(4, 8)
    steps = [tensor(dtype=step)]
    adamw([weight], [grad], [moments[0]], [moments[1]], [], steps, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32", "float32", "float32", False), None),
        ((BF16, "float32", "float32", False), "one dtype and device"),
        (("float32", "int64", "float32", False), "except `step` tensors"),
        (("float32", "float32", BF16, False), "found_inf must be float32"),
        (("float32", "float32", "float32", True), "one layout"),
    ],
)
def test_fused_adamw(arguments: Any, message: str | None) -> None:
    expect(message, call_adamw, *arguments)


def reduce(dtype: str, operator: str, device: str, contiguous: bool) -> None:
    import step
    import torch
    import torch.distributed as dist

    step.fake_processes(2, 1)
    torch.cuda.set_device(1)
    dist.init_process_group("nccl", rank=1, world_size=2)
    tensor = torch.zeros(4, 4, dtype=getattr(torch, dtype), device=device)
    premultiplied = operator == "PREMUL_SUM"
    op = dist._make_nccl_premul_sum(0.5) if premultiplied else getattr(dist.ReduceOp, operator)
    dist.all_reduce(tensor if contiguous else tensor.t(), op)
    parts = torch.zeros(8, 4, dtype=tensor.dtype, device=device)
    dist.all_gather_into_tensor(parts, tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float32", "SUM", "cuda", True), None),
        (("float64", "SUM", "cuda", True), None),
        (("int64", "SUM", "cuda", True), None),
        ((BF16, "AVG", "cuda", True), None),
        ((BF16, "PREMUL_SUM", "cuda", True), None),
        (("int64", "PREMUL_SUM", "cuda", True), "PreMulSum of torch.int64"),
        (("int64", "BOR", "cuda", True), "Cannot use ReduceOp.BOR with NCCL"),
        (("bool", "AVG", "cuda", True), "AVG with bool"),
        (("int16", "SUM", "cuda", True), "Unconvertible NCCL type"),
        (("float32", "SUM", "cuda", False), "must be contiguous"),
        (("float32", "SUM", "cpu", True), "device type cpu"),
    ],
)
def test_collectives_of_nccl(arguments: Any, message: str | None) -> None:
    expect(message, reduce, *arguments)


def expect(message: str | None, function: Any, *arguments: Any, **gpu: Any) -> None:
    """Call a function on the fake device; assert that it fails with `message`, if any."""
    if message is None:
        on_fake_device(function, *arguments, **gpu)
    else:
        with pytest.raises(RuntimeError, match=message):
            on_fake_device(function, *arguments, **gpu)
