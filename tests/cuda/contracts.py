"""What CUDA kernels require of their arguments and PyTorch's fake kernels do not check.

`check` runs before every operation on a fake tensor, in eager mode and while the compiler traces.
Each function names the source that it follows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Capability = tuple[int, int]
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


class ContractError(RuntimeError):
    """A call that the kernel on a GPU would reject."""


def check(func: Any, args: Any, kwargs: Any, capability: Capability) -> None:
    """Raise ContractError if the GPU's kernel would reject this call."""
    rule = _RULES.get(str(func))
    if rule is not None:
        rule(args, kwargs, capability)
    elif str(func).startswith(("c10d.", "_c10d_functional.")):
        _collective(str(func), args)
    if capability < (8, 0):
        for tensor in tensors(args):
            if tensor.is_cuda and tensor.dtype == torch.bfloat16 and str(func) in _PRODUCTS:
                raise ContractError(f"{func} in bfloat16 needs sm_80, not sm_{_name(capability)}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def tensors(arguments: Any) -> list[Tensor]:
    """Return the tensors among nested arguments."""
    return [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]


def _name(capability: Capability) -> str:
    return "".join(map(str, capability))


# ---------------------------------------------------------------- attention


def _flash_varlen(args: Any, _: Any, capability: Capability) -> None:
    """aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd."""
    q, k, v, cu_seqlens_q, cu_seqlens_k = args[:5]
    _flash(q, k, v, capability)
    for offsets in (cu_seqlens_q, cu_seqlens_k):
        require(offsets.dtype == torch.int32, f"cu_seqlens must have dtype int32: {offsets.dtype}")
        require(offsets.is_contiguous(), "cu_seqlens must be contiguous")
        require(offsets.device == q.device, f"cu_seqlens on {offsets.device}, query on {q.device}")
    require(q.shape[-1] % 8 == 0, f"head_size must be a multiple of 8: {q.shape[-1]}")


def _flash_varlen_backward(args: Any, kwargs: Any, capability: Capability) -> None:
    """flash_api.cpp, mha_varlen_bwd: the backward of these head sizes needs 160 KiB and more."""
    grad, q, k, v, out = args[:5]
    _flash(q, k, v, capability)
    require(grad.dtype == out.dtype == q.dtype, "query, out and dout must have the same dtype")
    large = 192 < q.shape[-1] <= 224
    small_memory = capability in ((8, 6), (8, 7), (8, 9)) or capability[0] == 12
    require(
        not (large and small_memory), f"backward of head_dim {q.shape[-1]} needs sm_80 or sm_90"
    )


def _flash_dense(args: Any, _: Any, capability: Capability) -> None:
    """flash_api.cpp, mha_fwd, as called by _scaled_dot_product_flash_attention."""
    q, k, v = args[:3]
    _flash(q, k, v, capability)
    require(q.shape[-1] % 8 == 0, f"head_size must be a multiple of 8: {q.shape[-1]}")


def _flash(q: Tensor, k: Tensor, v: Tensor, capability: Capability) -> None:
    require(capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer")
    require(q.dtype in SIXTEEN_BIT, f"FlashAttention only support fp16 and bf16: {q.dtype}")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    require(q.device == k.device == v.device, "query, key and value must be on one device")
    require(q.shape[-1] <= 256, f"FlashAttention supports head dimension at most 256: {q.shape}")
    for each in (q, k, v):
        require(each.stride(-1) == 1, "input tensor must have contiguous last dimension")
    # (batch, heads, seq, head_dim), or (tokens, heads, head_dim) for varlen
    require(q.shape[1] % k.shape[1] == 0, "heads of key must divide heads of query")


def _efficient(args: Any, kwargs: Any, capability: Capability) -> None:
    """aten/src/ATen/native/transformers/cuda/attention.cu, _efficient_attention_forward."""
    q, k, v, bias = args[:4]
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    if bias is not None:
        require(bias.dtype == q.dtype, f"invalid dtype for bias: {bias.dtype}, query {q.dtype}")
        require(bias.stride(-1) in (0, 1), "bias must have contiguous last dimension")


def _flex(args: Any, _: Any, capability: Capability) -> None:
    """torch/nn/attention/flex_attention.py, _validate_embed_dim, and the Triton templates.

    Shared memory: of the backward in bf16 with tiles of 256 elements, as Triton allocates it.
    """
    q, k, v = args[:3]
    require(q.device == k.device == v.device, "query, key and value must be on one device")
    require(q.shape[-1] >= 16, f"head_dim must be at least 16 for tensor cores: {q.shape[-1]}")
    properties: Any = torch.cuda.get_device_properties(q.device)
    shared = properties.shared_memory_per_block_optin
    if q.dtype == torch.bfloat16 and q.shape[-1] > 128:
        require(shared >= 114_688, f"out of shared memory: 114688 of {shared}, {q.shape}")


# ---------------------------------------------------------------- products


def _scaled_mm(args: Any, kwargs: Any, capability: Capability) -> None:
    """aten/src/ATen/native/cuda/ScaledBlas.cpp, _scaled_mm_out_cuda.

    Layouts and multiples of 16 are in torch/_meta_registrations.py, _check_scaled_mm_sizes.
    """
    a, b, scale_a, scale_b = args[:4]
    out_dtype = kwargs.get("out_dtype") or (args[6] if len(args) > 6 else None)
    require(capability >= (8, 9), "_scaled_mm needs compute capability 8.9")
    types = (torch.float8_e4m3fn, torch.float8_e5m2)
    require(a.dtype in types and b.dtype in types, f"fp8 operands, not {a.dtype} and {b.dtype}")
    require(not a.dtype == b.dtype == torch.float8_e5m2, "product of two float8_e5m2 matrices")
    require(scale_a.dtype == scale_b.dtype == torch.float32, "scales must be float32")
    for scale in (scale_a, scale_b):
        require(scale.device == a.device, f"scale on {scale.device}, matrix on {a.device}")
    if scale_a.numel() > 1 or scale_b.numel() > 1:
        require(capability >= (9, 0), "row-wise scales need compute capability 9.0")
        require(scale_a.is_contiguous() and scale_b.is_contiguous(), "scales must be contiguous")
        require(out_dtype == torch.bfloat16, f"row-wise scales need out_dtype bf16: {out_dtype}")


_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")

# ---------------------------------------------------------------- optimizer


def _fused_adamw(args: Any, kwargs: Any, _: Capability) -> None:
    """aten/src/ATen/native/cuda/FusedAdamWKernel.cu, and check_fast_path_restrictions.

    "params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout".
    """
    parameters, gradients, exp_avgs, exp_avg_sqs, _, steps = args[:6]
    for group in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        first = group[0]
        for each in group:
            same = each.dtype == parameters[0].dtype and each.device == first.device
            require(same, f"one dtype and device: {[(t.dtype, t.device) for t in group]}")
            require(each.shape == first.shape, f"one shape: {[t.shape for t in group]}")
            require(each.stride() == first.stride(), f"one layout: {[t.stride() for t in group]}")
    for step in steps:
        require(step.dtype == torch.float32 and step.is_cuda, f"step: {step.dtype}, {step.device}")
    found_inf = kwargs.get("found_inf")
    if found_inf is not None:
        require(found_inf.dtype == torch.float32, f"found_inf must be float32: {found_inf.dtype}")
        require(found_inf.device == parameters[0].device, f"found_inf on {found_inf.device}")


# ---------------------------------------------------------------- collectives

# torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, ncclDataType (bool is sent as uint8).
_NCCL_DTYPES = {torch.int8, torch.uint8, torch.float32, torch.float64, torch.int32, torch.int64}
_NCCL_DTYPES |= {torch.float16, torch.bfloat16, torch.bool}
_NCCL_DTYPES |= {torch.float8_e4m3fn, torch.float8_e5m2}
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _collective(name: str, args: Any) -> None:
    """ProcessGroupNCCL.cpp, check_gpu_single_tensor and getNcclDataType."""
    if "wait_tensor" in name or "_wrap_tensor_autograd" in name:
        return
    for tensor in tensors(args):
        require(tensor.is_cuda, f"{name}: No backend type associated with device type cpu")
        require(tensor.dtype in _NCCL_DTYPES, f"{name}: Unconvertible NCCL type {tensor.dtype}")
        require(tensor.is_contiguous(), f"{name}: Tensors must be contiguous")


def check_reduction(operation: Any, tensor: Tensor) -> None:
    """ProcessGroupNCCL.cpp, getNcclReduceOp."""
    require(tensor.is_cuda, "No backend type associated with device type cpu")
    operator = str(operation.op if hasattr(operation, "op") else operation).rpartition(".")[2]
    if operator == "PREMUL_SUM":
        require(tensor.dtype in _FLOATS, f"PreMulSum of {tensor.dtype}")
    require(operator not in ("BAND", "BOR", "BXOR"), f"Cannot use ReduceOp.{operator} with NCCL")
    bool_average = operator == "AVG" and tensor.dtype == torch.bool
    require(not bool_average, "Cannot use ReduceOp.AVG with bool inputs")


Rule = Callable[[Any, Any, Capability], None]
_RULES: dict[str, Rule] = {
    "torch_attn._varlen_attn.default": _flash_varlen,
    "torch_attn._varlen_attn_backward.default": _flash_varlen_backward,
    "aten._scaled_dot_product_flash_attention.default": _flash_dense,
    "aten._scaled_dot_product_efficient_attention.default": _efficient,
    "flex_attention": _flex,
    "aten._scaled_mm.default": _scaled_mm,
    "aten._fused_adamw_.default": _fused_adamw,
}
