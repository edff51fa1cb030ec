"""CPUs of the tasks that slurm/train.sbatch and slurm/sweep.py start."""

import os
import subprocess

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "12", "SLURM_CPUS_ON_NODE": "96"}, 12),
        ({"SLURM_CPUS_ON_NODE": "96", "SLURM_NTASKS_PER_NODE": "8"}, 12),  # --exclusive
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "8"}, 1),
        ({"SLURM_CPUS_ON_NODE": "1", "SLURM_NTASKS_PER_NODE": "2"}, 1),
        ({}, 1),
    ],
)
def test_tasks_share_the_cpus_of_the_job(variables: dict[str, str], cpus: int) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("S")}
    script = "set -e; source slurm/cpus_per_task.sh; printenv SRUN_CPUS_PER_TASK"
    done = subprocess.run(
        ["bash", "-c", script], env=clean | variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"{cpus}\n", done.stderr
    for user in ("train.sbatch", "sweep.py"):
        assert "cpus_per_task.sh" in (ROOT / "slurm" / user).read_text()
