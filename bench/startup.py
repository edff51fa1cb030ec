"""Time from the command to the first training step, with prepared data, and of `--help`.

    python -m bench.startup

Runs the default configuration and `python train.py --help` several times. Claims: the first step is
done within 10 s, `--help` within 1 s.
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
    """Run the benchmark and write `bench/results/startup.json`."""
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True)
    first_step = [seconds_to_first_step() for _ in range(REPEATS)]
    answer = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "train.py", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        answer.append(time.perf_counter() - start)
    write(
        Path(__file__).stem,
        {"first_step_seconds": spread(first_step), "help_seconds": spread(answer)},
    )


def seconds_to_first_step() -> float:
    """Start the default run and stop it after the first line of `metrics.jsonl`."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, "train.py", "model=llama3_tiny", f"run.dir={folder}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        metrics = Path(folder) / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert run.poll() is None, "the run exited before its first step"
            time.sleep(0.02)
        assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1
        seconds = time.perf_counter() - start
        run.kill()
        run.wait()
    return seconds


if __name__ == "__main__":
    main()
