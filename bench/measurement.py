"""Records of measurements: median and spread, with hardware, versions and commit."""

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and count of repeated measurements."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile_1": low, "quartile_3": high, "n": len(values)}


def write(name: str, results: dict[str, Any]) -> None:
    """Print results and write them to `bench/results/NAME.json`."""
    record = {"figures": results, **environment()}
    print(json.dumps(record, indent=1))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Return hardware, versions and commit of this measurement."""
    import torch

    commit = _git("describe", "--always")
    # Ignore results that another bench has just written.
    changed = _git("status", "--porcelain", "--", ":/", f":!{FOLDER.name}")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": f"{commit}-dirty" if changed else commit,
    }


def _git(*arguments: str) -> str:
    """Return the output of git, or an empty string outside a repository."""
    return subprocess.run(
        ["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=False
    ).stdout.strip()


def _cpu_name() -> str:
    """Return the processor's name from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
