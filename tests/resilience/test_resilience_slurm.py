"""SLURM environment variables are parsed as SLURM does. tests/slurm uses a real SLURM."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.slurm import FIRST_PORT, N_PORTS, rendezvous, tasks_per_node
from resilience.slurm_time_limit import slurm_time_left

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "rack[1-2]n[05-08]",
}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_tasks_per_node_are_parsed_from_the_compressed_form(tasks: list[int]) -> None:
    short = []
    for count, group in itertools.groupby(tasks):
        times = len(list(group))
        short.append(f"{count}(x{times})" if times > 1 else str(count))
    assert tasks_per_node({"SLURM_STEP_TASKS_PER_NODE": ",".join(short)}) == tasks


NODES = [
    "n1",
    "n[1-2]",
    "gpu-[017,020-031]",
    "rack[1-2]n[05-08]",
    "rack[3,7-9]-n[11]",
    "a1,b[2-3]",
    "login.cluster.org",
    "n[08-12],m3",
]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol (SLURM)")
@pytest.mark.parametrize("nodes", NODES)
def test_rendezvous_address_is_the_first_node_listed_by_slurm(nodes: str, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"  # a configuration without any nodes
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env={**os.environ, "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert rendezvous({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == listed[0]


def test_address_and_port_set_by_the_user_are_kept() -> None:
    preset = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous({**STEP, **preset}) == preset


def test_job_steps_that_may_share_a_node_use_different_ports() -> None:
    """Jobs with close ids, their steps, and requeued launches whose predecessors still exit."""
    ports = [
        int(
            rendezvous(
                {
                    **STEP,
                    "SLURM_JOB_ID": str(4711 + job),
                    "SLURM_STEP_ID": str(step),
                    "SLURM_RESTART_COUNT": str(restart),
                }
            )["MASTER_PORT"]
        )
        for job, step, restart in itertools.product(range(500), range(3), range(7))
    ]
    assert len(set(ports)) == len(ports)
    assert all(FIRST_PORT <= port < FIRST_PORT + N_PORTS for port in ports)
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if ephemeral.exists():
        assert max(ports) < max(int(ephemeral.read_text().split()[0]), 32_768)


# ---------------------------------------------------------------- the time limit


def install_squeue(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake `squeue` that runs `script` first on PATH."""
    squeue = folder / "squeue"
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("answer", "days", "hours", "minutes", "seconds"),
    [
        ("0:07", 0, 0, 0, 7),
        ("5:00", 0, 0, 5, 0),
        ("1:00:09", 0, 1, 0, 9),
        ("23:59:59", 0, 23, 59, 59),
        ("3-04:05:06", 3, 4, 5, 6),
    ],
)
def test_time_left_is_read_from_squeue(
    answer: str,
    days: int,
    hours: int,
    minutes: int,
    seconds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_squeue(tmp_path, f'test "$2" = --jobs=4711 && echo {answer}', monkeypatch)
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    # The limit may have changed since SLURM set the variable, so squeue takes precedence.
    for variables in ({}, {"SLURM_JOB_END_TIME": "1000"}):
        assert slurm_time_left({"SLURM_JOB_ID": "4711", **variables}, now=400.0) == expected


@pytest.mark.parametrize("answer", ["UNLIMITED", "NOT_SET", "INVALID", ""])
def test_job_without_time_limit_returns_none(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_squeue(tmp_path, f"echo {answer}", monkeypatch)
    assert slurm_time_left({"SLURM_JOB_ID": "4711"}, now=400.0) is None


def test_end_time_variable_is_used_if_squeue_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_squeue(tmp_path, "exit 1", monkeypatch)
    job = {"SLURM_JOB_ID": "4711"}
    assert slurm_time_left({**job, "SLURM_JOB_END_TIME": "1000"}, now=400.0) == 600
    assert slurm_time_left(job, now=400.0) is None
    monkeypatch.setenv("PATH", "")
    assert slurm_time_left({**job, "SLURM_JOB_END_TIME": "1000"}, now=400.0) == 600


def test_limit_of_a_job_that_has_ended_is_ignored_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_END_TIME": "1000"}
    for script in ("exit 1", "echo 0:00"):
        install_squeue(tmp_path, script, monkeypatch)
        warnings: list[str] = []
        assert slurm_time_left(job, now=2000.0, warn=warnings.append) is None
        assert "unset SLURM_JOB_ID SLURM_JOB_END_TIME" in warnings[0]
    broken = {**job, "SLURM_JOB_END_TIME": "soon", "SLURM_ARRAY_JOB_ID": "4711"}
    install_squeue(tmp_path, "exit 1", monkeypatch)
    assert slurm_time_left(broken, now=400.0) is None


def test_squeue_is_not_called_outside_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_squeue(tmp_path, f"touch {tmp_path / 'called'}; echo 5:00", monkeypatch)
    assert slurm_time_left({}, now=400.0) is None
    assert not (tmp_path / "called").exists()
