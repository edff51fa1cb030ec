"""How long a person waits: from the command to the first step's line, data already prepared.

    python -m bench.startup

Whole processes of the default run, several times; and `python train.py --help`. The claims: the
first step is done within 10 s, the help is there within 1 s.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.measurement import spread, write

ROOT = Path(__file__).parent.parent
REPEATS = 3


def main() -> None:
    """Measures and writes `bench/results/startup.json`."""
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True)
    first_step = [seconds_to_first_step() for _ in range(REPEATS)]
    answer = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        answer.append(time.perf_counter() - begin)
    write(
        Path(__file__).stem,
        {"first_step_seconds": spread(first_step), "help_seconds": spread(answer)},
    )


def seconds_to_first_step() -> float:
    """Starts the default run, and stops it when the first step is in `metrics.jsonl`."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, "train.py", f"run.dir={folder}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        metrics = Path(folder) / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert run.poll() is None, "the run ended before its first step"
            time.sleep(0.02)
        assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1
        seconds = time.perf_counter() - begin
        run.kill()
        run.wait()
    return seconds


if __name__ == "__main__":
    main()
