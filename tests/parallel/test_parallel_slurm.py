"""SLURM's variables are read as SLURM itself reads them; tests/slurm has the real ones."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.slurm import FIRST_PORT, N_PORTS, rendezvous, slurm_time_left, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "rack[1-2]n[05-08]",
}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_tasks_of_each_node_come_out_of_slurms_short_form(tasks: list[int]) -> None:
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


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="SLURM is not installed: scontrol")
@pytest.mark.parametrize("nodes", NODES)
def test_tasks_meet_at_the_first_of_the_nodes_that_slurm_lists(nodes: str, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"  # one that names no node of any cluster
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env={**os.environ, "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert rendezvous({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == listed[0]


def test_what_a_person_sets_is_kept() -> None:
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rendezvous({**STEP, **own}) == own


def test_steps_that_may_run_at_a_time_on_a_node_meet_at_different_ports() -> None:
    """Neighbouring jobs, however often requeued, their steps, and starts still ending."""
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
    given_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if given_out.exists():
        assert max(ports) < max(int(given_out.read_text().split()[0]), 32_768)


# ---------------------------------------------------------------- the time limit


def answering(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a `squeue` that answers so before all others."""
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
def test_time_left_is_what_squeue_answers(
    answer: str,
    days: int,
    hours: int,
    minutes: int,
    seconds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(tmp_path, f'test "$2" = --jobs=4711 && echo {answer}', monkeypatch)
    expected = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    # The limit may have been moved since SLURM set the variable: its answer counts.
    for known in ({}, {"SLURM_JOB_END_TIME": "1000"}):
        assert slurm_time_left({"SLURM_JOB_ID": "4711", **known}, now=400.0) == expected


@pytest.mark.parametrize("answer", ["UNLIMITED", "NOT_SET", "INVALID", ""])
def test_no_time_limit_is_none(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(tmp_path, f"echo {answer}", monkeypatch)
    assert slurm_time_left({"SLURM_JOB_ID": "4711"}, now=400.0) is None


def test_where_squeue_does_not_answer_the_variable_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(tmp_path, "exit 1", monkeypatch)
    job = {"SLURM_JOB_ID": "4711"}
    assert slurm_time_left({**job, "SLURM_JOB_END_TIME": "1000"}, now=400.0) == 600
    assert slurm_time_left(job, now=400.0) is None
    monkeypatch.setenv("PATH", "")
    assert slurm_time_left({**job, "SLURM_JOB_END_TIME": "1000"}, now=400.0) == 600


def test_outside_a_job_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(tmp_path, f"touch {tmp_path / 'asked'}; echo 5:00", monkeypatch)
    assert slurm_time_left({}, now=400.0) is None
    assert not (tmp_path / "asked").exists()
