"""FlashAttention-3 and -4, where their packages are installed, and the kernel that `sdpa` selects.

PyTorch replaces the kernels of FlashAttention-2 that it contains (torch.nn.attention._fa3 and _fa4,
PyTorch 2.11 and later), so that `varlen` uses them. `sdpa` does where PyTorch selects its flash
kernel; on Hopper and Blackwell it prefers that of cuDNN newer than 9.15, unless algorithms are
deterministic (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention
and check_cudnn_deterministic). Its order is kept: `bench.gpu` compares them. Imported on GPUs only.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.attention
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from model.attention import AttentionKernel
from model.config import ModelConfig

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


def select_flash_attention(head_dim: int, deterministic: bool, capability: tuple[int, int]) -> str:
    """Return the FlashAttention for a GPU and head size: FA2, or a later one that is installed.

    The GPU and head sizes are those of the packages: FlashAttention-3 has kernels for Hopper,
    -4 for Hopper and Blackwell with heads of up to 128, without a deterministic backward on Hopper.
    """
    if head_dim % 8:
        return "FA2"
    for name in {9: ("FA3", "FA4"), 10: ("FA4",)}.get(capability[0], ()):
        if head_dim > (256 if name == "FA3" and not deterministic else 128):
            continue
        if (not deterministic or name == "FA3") and _is_installed(PACKAGES[name]):
            return name
    return "FA2"


def activate_flash_attention(
    head_dim: int, deterministic: bool, report: Callable[[str], None]
) -> None:
    """Activate the selected FlashAttention on this GPU; report if that fails."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    name = select_flash_attention(head_dim, deterministic, torch.cuda.get_device_capability())
    if activate is None or name == "FA2":
        return
    try:
        activate(name)
    except Exception as error:  # built for other versions of PyTorch or CUDA
        report(
            f"Package {PACKAGES[name]} is installed but cannot be used ({error}); using "
            "FlashAttention-2"
        )


def active_flash_attention() -> str:
    """Return the name of the FlashAttention in use."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return f"FlashAttention-{(current or 'FA2').removeprefix('FA')}"


def selected_sdpa(
    model: ModelConfig, tp: int, dtype: torch.dtype, device: torch.device, masked: bool
) -> str:
    """Return the name of the kernel that PyTorch selects for `sdpa` in a training step.

    The selection depends on GPU, cuDNN, head size and data type, hardly on batch and sequence.

    Args:
        masked: With a dense mask of documents, or of keys from other ranks.
    """
    sizes = (model.n_heads // tp, model.n_kv_heads // tp)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": True}
    q, k = (torch.empty(1, 128, heads, model.head_dim, **options) for heads in sizes)
    mask = torch.empty(128, 128, dtype=dtype, device=device) if masked else None
    with _Selection() as selection:
        AttentionKernel(model.attention, model.head_dim)(q, k, k, mask)
    return {
        SDPBackend.CUDNN_ATTENTION: "cuDNN",
        SDPBackend.FLASH_ATTENTION: active_flash_attention(),
        SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
        SDPBackend.MATH: "math",
    }[selection.backend]


class _Selection(TorchFunctionMode):
    """Ask for the backend of scaled_dot_product_attention instead of computing it."""

    backend: SDPBackend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.backend = SDPBackend(torch._fused_sdp_choice(*args, **kwargs))
        return args[0]


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package
        return False
