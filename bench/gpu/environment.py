"""Hardware, driver and versions of the packages that a report depends on."""

import importlib.metadata
import shutil
import subprocess

import torch

from bench.gpu.parts import Rows
from bench.measurement import environment

PACKAGES = ("triton", "torchao", "lightning-fabric", "lightning", "numpy")
QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm"


def describe(reduced: bool) -> Rows:
    """Yield one row, `environment`.

    Raises:
        SystemExit: torch sees no GPU.
    """
    if not reduced and not torch.cuda.is_available():
        sys_exit = f"torch {torch.__version__} sees no GPU; on CPU use python -m bench.gpu reduced"
        raise SystemExit(sys_exit)
    versions = {name: version(name) for name in PACKAGES}
    yield "environment", {**environment(), "packages": versions, "gpu": [] if reduced else gpus()}


def version(name: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpus() -> list[str]:
    """Return a line of nvidia-smi for each GPU: name, driver, memory, power limit, clock."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
