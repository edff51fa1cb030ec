"""FlashAttention-3 and -4, where their packages are installed.

PyTorch replaces the kernels of FlashAttention-2 that it contains (torch.nn.attention._fa3 and _fa4,
PyTorch 2.11 and later), so that `varlen` uses them. `sdpa` does where PyTorch selects its flash
kernel; on Hopper and Blackwell it prefers that of cuDNN newer than 9.15
(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention). Imported on
GPUs only.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.attention

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}


def activate_flash_attention(
    head_dim: int, deterministic: bool, report: Callable[[str], None]
) -> None:
    """Activate the newest FlashAttention for this GPU and head size; report if that fails.

    The GPU and head sizes are those of the packages: FlashAttention-3 has kernels for Hopper,
    -4 for Hopper and Blackwell with heads of up to 128, without a deterministic backward on Hopper.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    major = torch.cuda.get_device_capability()[0]
    if activate is None or head_dim % 8 or major not in (9, 10):
        return
    for name in {9: ("FA3", "FA4"), 10: ("FA4",)}[major]:
        if head_dim > (256 if name == "FA3" and not deterministic else 128):
            continue
        if (deterministic and name == "FA4") or not _is_installed(PACKAGES[name]):
            continue
        try:
            activate(name)
        except Exception as error:  # built for other versions of PyTorch or CUDA
            report(
                f"Package {PACKAGES[name]} is installed but cannot be used ({error}); using "
                "FlashAttention-2"
            )
        return


def active_flash_attention() -> str:
    """Return the name of the FlashAttention in use."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return f"FlashAttention-{(current or 'FA2').removeprefix('FA')}"


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package
        return False
