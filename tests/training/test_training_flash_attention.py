"""FlashAttention-3 and -4 are used where GPU, head size, package and determinism permit."""

import importlib.machinery
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig, PrecisionConfig
from training import flash_attention
from training.flash_attention import activate_flash_attention, active_flash_attention
from training.run_summary import _compute

BOTH = ("flash_attn_interface", "flash_attn.cute")


def activated(
    monkeypatch: pytest.MonkeyPatch, major: int, installed: tuple[str, ...], **options: Any
) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    spec = importlib.machinery.ModuleSpec("package", None)
    monkeypatch.setattr(
        flash_attention, "find_spec", lambda package: spec if package in installed else None
    )
    monkeypatch.setattr(
        torch.nn.attention, "activate_flash_attention_impl", names.append, raising=False
    )
    arguments = {"head_dim": 128, "deterministic": False} | options
    activate_flash_attention(**arguments, report=pytest.fail)
    return names


@pytest.mark.parametrize(
    ("major", "installed", "options", "expected"),
    [
        (9, BOTH, {}, ["FA3"]),
        (9, BOTH[1:], {}, ["FA4"]),
        (10, BOTH, {}, ["FA4"]),
        (8, BOTH, {}, []),
        (12, BOTH, {}, []),
        (9, (), {}, []),
        (9, BOTH, {"head_dim": 256}, ["FA3"]),
        (10, BOTH, {"head_dim": 256}, []),
        (9, BOTH, {"head_dim": 100}, []),
        (9, BOTH, {"deterministic": True}, ["FA3"]),
        (9, BOTH, {"deterministic": True, "head_dim": 256}, []),
        (10, BOTH, {"deterministic": True}, []),
    ],
)
def test_newest_supported_version_is_activated(
    monkeypatch: pytest.MonkeyPatch,
    major: int,
    installed: tuple[str, ...],
    options: Any,
    expected: list[str],
) -> None:
    assert activated(monkeypatch, major, installed, **options) == expected


def test_package_that_cannot_be_imported_is_reported_and_version_2_remains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch imports the package; here it is not installed."""
    activated(monkeypatch, 9, BOTH)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_attention, "_is_installed", lambda package: True)
    reports: list[str] = []
    activate_flash_attention(128, deterministic=False, report=reports.append)
    (report,) = reports
    assert "flash_attn_interface is installed but cannot be used" in report
    assert active_flash_attention() == "FlashAttention-2"


@pytest.mark.parametrize(
    ("attention", "document_mask", "cp", "expected"),
    [
        ("auto", True, 1, "bf16, compiled, varlen (FlashAttention-2) attention"),
        ("auto", True, 2, "bf16, compiled, flex attention"),
        ("sdpa", True, 1, "bf16, compiled, sdpa (masked) attention"),
        ("auto", False, 1, "bf16, compiled, sdpa (plain) attention"),
        ("varlen", False, 1, "bf16, compiled, sdpa (plain) attention"),
        ("sdpa", False, 2, "bf16, compiled, sdpa (masked) attention"),
    ],
)
def test_header_names_the_kernel_that_runs(
    monkeypatch: pytest.MonkeyPatch, attention: str, document_mask: bool, cp: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    selected = lambda *_: "masked" if _[-1] else "plain"  # noqa: E731
    monkeypatch.setattr(flash_attention, "selected_sdpa", selected)
    config = SimpleNamespace(
        model=SimpleNamespace(attention=attention, head_dim=128),
        data=SimpleNamespace(document_mask=document_mask),
        parallel=ParallelConfig(cp=cp),
        precision=PrecisionConfig(),
    )
    fabric = SimpleNamespace(device=torch.device("cuda"))
    run: Any = SimpleNamespace(config=config, fabric=fabric, compiled=True)
    assert _compute(run) == expected
