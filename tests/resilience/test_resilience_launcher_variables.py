"""Only a complete and consistent set of variables is a launcher; any other set is an error."""

import re
import socket

import pytest

from parallel.config import ParallelConfig
from resilience.launcher_variables import launcher_errors
from resilience.processes import is_first_process, launched_processes

COMPLETE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}
TASK = {
    **{"SLURM_JOB_NAME": "llama", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"},
    **{"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4"},
    **{"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"},
    "SLURM_NTASKS_PER_NODE": "2",
}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


def errors(environment: dict[str, str], accelerator: str = "cpu") -> list[str]:
    return list(launcher_errors(ParallelConfig(), accelerator, environment))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        COMPLETE,
        {**COMPLETE, "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"},
        {**COMPLETE, "LOCAL_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        TASK,
        {**TASK, "RANK": "0"},  # exported in the shell that submitted the job
        {**BATCH, **COMPLETE, "TORCHELASTIC_RUN_ID": "none"},  # torchrun in a job's script
        {**BATCH, "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"},
        {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"},
        {
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_SIZE": "1",
            "PMI_RANK": "0",
            "PMI_SIZE": "1",
        },
        {"GLOO_SOCKET_IFNAME": "lo"},
        {"NCCL_SOCKET_IFNAME": "no-such-interface"},  # not used on CPU
    ],
    ids=str,
)
def test_valid_variables_are_accepted(environment: dict[str, str]) -> None:
    assert errors(environment) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "0"}, "RANK=0"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 and WORLD_SIZE=2"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4"),
        ({"NODE_RANK": "1"}, "NODE_RANK=1"),
        ({"GROUP_RANK": "1"}, "GROUP_RANK=1"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE="),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, "TORCHELASTIC_USE_AGENT_STORE=True"),
        ({k: v for k, v in COMPLETE.items() if k != "LOCAL_RANK"}, "but not LOCAL_RANK:"),
        ({**COMPLETE, "RANK": "4"}, "RANK must be from 0 to WORLD_SIZE - 1 = 3"),
        ({**COMPLETE, "RANK": "-1"}, "RANK must be from 0"),
        ({**COMPLETE, "RANK": "x"}, "RANK=x is not an integer"),
        ({**COMPLETE, "LOCAL_RANK": "1"}, "LOCAL_RANK is never above RANK"),
        ({**COMPLETE, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must divide WORLD_SIZE"),
        ({**COMPLETE, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK must be from 0"),
        ({**COMPLETE, "MASTER_PORT": "abc"}, "MASTER_PORT=abc is not a port"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_RANK=0"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1 and PMI_SIZE=2"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1"),
        ({k: v for k, v in TASK.items() if k != "SLURM_LOCALID"}, "SLURM_PROCID=3"),
        ({**TASK, "SLURM_NTASKS": "8"}, "SLURM_NTASKS=8"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT=x"),
        ({**TASK, "SLURM_RESTART_COUNT": ""}, "SLURM_RESTART_COUNT="),
        ({"GLOO_SOCKET_IFNAME": "absent0"}, "GLOO_SOCKET_IFNAME=absent0"),
        ({**COMPLETE, "GLOO_SOCKET_IFNAME": "lo,absent0"}, "no network interface absent0"),
    ],
    ids=str,
)
def test_invalid_variables_are_named_and_the_remedy_works(
    environment: dict[str, str], named: str
) -> None:
    found = errors(environment)
    assert found and named in found[0]
    assert is_first_process(environment) or launched_processes(environment) is not None
    while found:  # each error names the variables to unset
        assert all("unset" in error for error in found)
        for error in found:
            for name in re.findall(r"unset ((?:\w+ ?)+)$", error)[0].split():
                environment = {k: v for k, v in environment.items() if k != name}
        found = errors(environment)


def test_nccl_interfaces_may_be_prefixes_exclusions_and_ports() -> None:
    for value in ("l", "^docker,absent", "=lo", "lo:1"):
        assert errors({"NCCL_SOCKET_IFNAME": value}, "cuda") == []
    for value in ("absent", "=l", "lo,absent"):
        (error,) = errors({"NCCL_SOCKET_IFNAME": value}, "cuda")
        assert f"NCCL_SOCKET_IFNAME={value}" in error


def test_address_that_does_not_resolve_is_an_error_of_a_launched_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr("resilience.launcher_variables.RESOLVE_SECONDS", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    (error,) = errors({**COMPLETE, "MASTER_ADDR": "node-17"})
    assert "MASTER_ADDR=node-17" in error and "Name or service not known" in error


def test_job_script_without_srun_is_rejected_with_the_missing_command() -> None:
    (error,) = errors(BATCH)
    assert "put srun before" in error


def test_uneven_tasks_per_node_are_rejected_with_their_numbers() -> None:
    uneven = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "3,1"}
    (error,) = errors(uneven)
    assert "4 tasks unevenly on 2 nodes (3, 1)" in error


def test_srun_without_tasks_per_node_is_rejected_with_the_option_to_add() -> None:
    (error,) = errors({k: v for k, v in TASK.items() if k != "SLURM_NTASKS_PER_NODE"})
    assert "add --ntasks-per-node=2" in error


def test_several_nodes_need_a_launcher() -> None:
    (error,) = launcher_errors(ParallelConfig(num_nodes=2), "cpu", {})
    assert "parallel.num_nodes=2" in error and "torchrun --nnodes=2" in error
