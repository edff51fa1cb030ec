"""The fake device itself: tensors, copies, threads, kernel choice, and a complete training step."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_device import on_fake_device


def read_from_the_device() -> list[str]:
    """Return the recorded waits of operations that wait for the device, and of some that do not."""
    import cuda_stubs
    import torch

    names = []
    value = torch.zeros(3, device="cuda")
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned()
    operations: dict[str, Callable[[], Any]] = {
        "item": lambda: value[0].item(),
        "bool": lambda: bool(value.sum() > 0),
        "tolist": lambda: value.tolist(),
        "nonzero": lambda: value.nonzero(),
        "cpu": lambda: value.cpu(),
        "blocking copy to the device": lambda: torch.ones(2).to("cuda"),
        "synchronize": torch.cuda.synchronize,
        "event": lambda: torch.cuda.current_stream().record_event().synchronize(),
        "asynchronous copy": lambda: pinned.copy_(value, non_blocking=True),
        "asynchronous copy to the device": lambda: pinned.to("cuda", non_blocking=True),
        "product": lambda: value @ value,
    }
    for name, operation in operations.items():
        before = len(cuda_stubs.waits())
        operation()
        names += [name] * (len(cuda_stubs.waits()) > before)
    return names


def test_operations_that_wait_for_the_device_are_recorded() -> None:
    assert on_fake_device(read_from_the_device) == [
        *("item", "bool", "tolist", "nonzero", "cpu", "blocking copy to the device"),
        *("synchronize", "event"),
    ]


def copy_in_a_thread(sets_device: bool) -> Any:
    import torch

    raised = []

    def copy() -> None:
        if sets_device:
            torch.cuda.set_device(3)
        try:
            raised.append(str(torch.zeros(2, device="cuda").device))
        except RuntimeError as error:
            raised.append(str(error))

    torch.cuda.set_device(3)
    thread = threading.Thread(target=copy, name="copier")
    thread.start()
    thread.join()
    return raised[0]


def test_thread_without_set_device_raises() -> None:
    assert on_fake_device(copy_in_a_thread, True) == "cuda:3"
    assert "thread copier, which has not called" in on_fake_device(copy_in_a_thread, False)


def attention_backend(dtype: str, grouped: bool, masked: bool, head_dim: int) -> str:
    import cuda_stubs
    import torch
    import torch.nn.functional as F

    options: Any = {"dtype": getattr(torch, dtype), "device": "cuda"}
    q = torch.zeros(1, 4, 16, head_dim, **options).requires_grad_()
    k = torch.zeros(1, 2 if grouped else 4, 16, head_dim, **options)
    mask = torch.zeros(16, 16, **options) if masked else None
    out = F.scaled_dot_product_attention(
        q, k, k, attn_mask=mask, is_causal=not masked, enable_gqa=grouped
    )
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape
    (name,) = cuda_stubs.sdpa_backends()
    return name


def header_of_sdpa(dtype: str, head_dim: int, masked: bool, deterministic: bool) -> str:
    import torch

    from model.config import ModelConfig
    from training.flash_attention import selected_sdpa

    torch.use_deterministic_algorithms(deterministic)
    model = ModelConfig("small", 8 * head_dim, 1, 8, 4, 64, 64, attention="sdpa")
    return selected_sdpa(model, 2, getattr(torch, dtype), torch.device("cuda"), masked)


@pytest.mark.parametrize(
    ("capability", "arguments", "name"),
    [
        ((9, 0), ("bfloat16", 128, False, False), "cuDNN"),
        ((9, 0), ("bfloat16", 128, True, False), "cuDNN"),
        ((9, 0), ("bfloat16", 128, False, True), "FlashAttention-2"),
        ((9, 0), ("bfloat16", 256, False, False), "FlashAttention-2"),
        ((8, 0), ("bfloat16", 128, False, False), "FlashAttention-2"),
        ((8, 0), ("bfloat16", 128, True, False), "memory-efficient"),  # heads are expanded
        ((9, 0), ("float32", 128, False, False), "memory-efficient"),
    ],
)
def test_header_names_the_kernel_that_sdpa_selects(
    capability: tuple[int, int], arguments: Any, name: str
) -> None:
    assert on_fake_device(header_of_sdpa, *arguments, capability=capability) == name


@pytest.mark.parametrize(
    ("capability", "arguments", "backend"),
    [
        ((9, 0), ("bfloat16", True, False, 64), "cudnn"),
        ((9, 0), ("bfloat16", True, True, 64), "cudnn"),
        ((8, 0), ("bfloat16", True, False, 64), "flash"),
        ((8, 0), ("bfloat16", True, True, 64), "math"),
        ((8, 0), ("bfloat16", False, True, 64), "efficient"),
        ((9, 0), ("float32", True, False, 64), "math"),
        ((9, 0), ("float32", False, False, 64), "efficient"),
        ((7, 5), ("float16", False, False, 64), "efficient"),
        ((9, 0), ("bfloat16", False, False, 260), "math"),
        ((9, 0), ("bfloat16", False, False, 256), "flash"),
        ((8, 9), ("bfloat16", False, False, 208), "efficient"),
    ],
)
def test_sdpa_backend_follows_the_rules_of_pytorch(
    capability: tuple[int, int], arguments: Any, backend: str
) -> None:
    assert on_fake_device(attention_backend, *arguments, capability=capability) == backend


def failing() -> None:
    raise ValueError("as expected")


def test_errors_are_raised_with_their_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"failing\n(.|\n)*ValueError: as expected"):
        on_fake_device(failing)
