"""Fraction of a training step spent waiting for data, in the default run.

    python -m bench.data_wait

Runs `python train.py` for some steps and divides the time that the loop waits for batches by the
step time, from metrics.jsonl. Claim: under 0.5%. The first step, which waits for the first batch to
be read, is reported separately.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.measurement import spread, write

ROOT = Path(__file__).parent.parent
STEPS, REPEATS = 60, 3


def main() -> None:
    """Run the benchmark and write `bench/results/data_wait.json`."""
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True)
    first, shares = [], []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "train.py", "model=llama3_tiny", f"run.dir={folder}"),
                f"train.max_steps={STEPS}",
                *("optim.schedule_steps=160", "checkpoint.interval=null"),
                *("validation.interval=null", "validation.samples=0"),
            ]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        first.append(lines[0]["data_wait_seconds"])
        before, waited, seconds = 1, 0.0, 0.0
        for line in lines[1:]:  # each line contains the means since the previous one
            steps = line["step"] - before
            waited += steps * line["data_wait_seconds"]
            seconds += steps * line["step_seconds"]
            before = line["step"]
        shares.append(waited / seconds)
    write(
        Path(__file__).stem,
        {"share_of_step": spread(shares), "first_step_seconds": spread(first), "steps": STEPS},
    )


if __name__ == "__main__":
    main()
