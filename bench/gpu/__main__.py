"""Run the parts of `make gpu` and write one report.

    python -m bench.gpu [reduced] [PARTS=kernels,losses] [REPORT=bench/results/gpu.json]

Each part runs in a process of its own, at most for its limit, and writes its rows as they are
measured; the report is written after each part. A part that fails or exceeds its limit does not
stop the others. Parts start in order of value until `LIMIT_SECONDS`, and the rest is listed as not
reached. The same command continues a report of the same commit, GPU and versions with the parts
that it does not have; PARTS selects parts and runs them again. `reduced` runs on CPU with tiny
models.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.parts import ENVIRONMENT, PARTS, Part

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench" / "results" / "gpu.json"
LIMIT_SECONDS = 460.0
CPU_ALLOWANCE = 6.0  # of all limits in reduced runs, on a machine that may be busy
SHORTEST = 15.0  # seconds; a part is not started with less
DONE = ("passed", "failed", "skipped")


def main(arguments: Sequence[str]) -> int:
    """Run the selected parts and return the exit code."""
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\nParts: {', '.join(PARTS)}")
        return 0
    options = dict(word.split("=", 1) for word in arguments if "=" in word)
    words = [word for word in arguments if "=" not in word]
    names = [name for name in options.pop("PARTS", "").split(",") if name]
    path = Path(options.pop("REPORT", "") or REPORT)
    unknown = [*options, *(set(words) - {"reduced"})]
    unknown += [f"PARTS={name}" for name in names if name not in PARTS]
    if unknown:
        choices = f"reduced, REPORT=FILE and PARTS={','.join(PARTS)}"
        print(f"Error: {', '.join(unknown)} is not an argument; use {choices}", file=sys.stderr)
        return 2
    return run_parts(names, path, "reduced" in words)


def run_parts(
    names: Sequence[str],
    path: Path,
    reduced: bool,
    parts: dict[str, Part] = PARTS,
    describe: Part = ENVIRONMENT,
    limit_seconds: float = LIMIT_SECONDS,
) -> int:
    """Run the named parts, or those missing in the report, and return the exit code."""
    start = time.monotonic()
    allowance = CPU_ALLOWANCE if reduced else 1.0
    environment = run_part(describe, reduced, allowance * describe.limit_seconds)
    if environment["status"] != "passed":
        print(f"Error: {environment['error']}\n{environment['output']}", file=sys.stderr)
        return 1
    report = {"reduced": reduced, **environment["rows"]["environment"], "parts": {}}
    previous = read_report(path)
    if previous is not None and same_environment(previous, report):
        report["parts"] = previous["parts"]
    found: dict[str, Any] = report["parts"]
    selected = [name for name in parts if name in names or not names]
    missing = [name for name in selected if names or found.get(name, {}).get("status") not in DONE]
    found |= {name: {"status": "not reached"} for name in missing}
    for name in missing:
        left = allowance * limit_seconds - (time.monotonic() - start)
        if left < SHORTEST:
            break
        limit = min(left, allowance * parts[name].limit_seconds)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        found[name] = run_part(parts[name], reduced, limit)
        print_part(found[name])
        write_report(path, report)
    write_report(path, report)
    statuses = {name: found[name]["status"] for name in selected}
    print(
        f"Report: {path}\n" + "\n".join(f"  {name:<14} {each}" for name, each in statuses.items())
    )
    return int(any(status not in ("passed", "skipped") for status in statuses.values()))


def run_part(part: Part, reduced: bool, limit_seconds: float) -> dict[str, Any]:
    """Run a part in a process group of its own and return its entry of the report."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder, "rows.jsonl"), Path(folder, "log")
        words = [part.function, str(rows), str(int(reduced))]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.parts", *words],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},  # a killed process flushes nothing
            )
            try:
                exit_code = process.wait(limit_seconds)
            except BaseException as error:  # an interruption stops the part too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                exit_code = None
        found = [json.loads(line) for line in complete_lines(rows)]
        tail = log.read_text(errors="replace")[-4_000:]
    entry: dict[str, Any] = {
        "status": status(exit_code, found),
        "seconds": round(time.monotonic() - start, 1),
        "rows": {row.pop("name"): row for row in found},
    }
    if exit_code is None:
        entry["error"] = f"exceeded its limit of {limit_seconds:.0f} s"
    elif exit_code:
        entry["error"] = f"exit code {exit_code}"
    return entry if exit_code == 0 else entry | {"output": tail}


def status(exit_code: int | None, rows: Sequence[dict[str, Any]]) -> str:
    """Return the status of a part: a row that is not met fails it; one without results skips it."""
    if exit_code is None:
        return "timed out"
    if exit_code or any(row.get("passed") is False for row in rows):
        return "failed"
    return "skipped" if all("skipped" in row for row in rows) else "passed"


def complete_lines(path: Path) -> list[str]:
    """Return the lines of a file that have been written completely."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def same_environment(previous: dict[str, Any], report: dict[str, Any]) -> bool:
    """Return whether two reports have the same commit, device and versions, and no changes."""
    keys = report.keys() - {"parts"}
    return all(previous.get(key) == report[key] for key in keys) and "dirty" not in report["commit"]


def read_report(path: Path) -> dict[str, Any] | None:
    """Return an existing report, or None if there is none that can be read."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        return report
    except (OSError, ValueError):
        return None


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write the report; an interruption leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def print_part(entry: dict[str, Any]) -> None:
    """Print the rows of a part and, if it failed, the end of its output."""
    for name, row in entry["rows"].items():
        print(f"  {name}: {json.dumps(row)}")
    if "output" in entry:
        print(entry["output"])
    print(f"  {entry['status']} after {entry['seconds']} s {entry.get('error', '')}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
