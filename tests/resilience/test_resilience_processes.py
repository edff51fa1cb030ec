"""Number and launcher of the processes, derived from the configuration and the environment."""

import os

import pytest

from parallel.config import ParallelConfig
from parallel.mesh import MeshShape, resolve_mesh
from resilience.accelerator import resolve_processes
from resilience.processes import (
    LOCAL_SIZES,
    OTHER,
    RANK_VARIABLES,
    Processes,
    is_first_process,
    launched_processes,
)

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_NAME": "llama",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "6",
    "SLURM_NNODES": "3",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
# The environment of a batch script, outside any srun step.
BATCH = {key: value for key, value in SRUN.items() if "STEP" not in key} | {"SLURM_PROCID": "0"}


def test_first_process_is_determined_by_the_variables_of_its_launcher() -> None:
    assert is_first_process({**SRUN, "SLURM_PROCID": "0"}) and not is_first_process(SRUN)
    # Processes started by a run inside a script without a task count inherit its variables.
    script = {key: value for key, value in BATCH.items() if key != "SLURM_NTASKS"}
    child = {**script, "LOCAL_RANK": "1", "LLAMESH_MAIN_PID": str(os.getppid())}
    assert is_first_process(script) and not is_first_process(child)


def test_processes_are_read_from_torchrun() -> None:
    assert launched_processes(TORCHRUN) == Processes("auto", 4, 2, "torchrun")


def test_processes_are_read_from_srun() -> None:
    assert launched_processes(SRUN) == Processes("auto", 2, 3, "srun")


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_interactive_slurm_shell_is_not_a_launcher(name: str) -> None:
    one_task = {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}
    one_task |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    shell = {**SRUN, "SLURM_JOB_NAME": name, **one_task}
    assert launched_processes(shell) is None
    assert launched_processes({**SRUN, "SLURM_JOB_NAME": name}) == Processes("auto", 2, 3, "srun")


@pytest.mark.parametrize("environment", [{}, {"MASTER_PORT": "29500"}, {"SLURM_JOB_ID": "1"}])
def test_run_without_a_launcher_starts_its_processes(environment: dict[str, str]) -> None:
    assert launched_processes(environment) is None
    config = ParallelConfig(dp_shard=3, tp=2, accelerator="cpu")
    processes, problems = resolve_processes(config, environment)
    assert (processes, problems) == (Processes("cpu", 6, 1, "self"), [])
    assert resolve_mesh(config, processes.world_size)[1] == []


def test_cpu_run_starts_one_process_unless_the_mesh_needs_more() -> None:
    for config, per_node in (
        (ParallelConfig(accelerator="cpu"), 1),
        (ParallelConfig(accelerator="cpu", tp=2), 2),
        (ParallelConfig(accelerator="cpu", devices=4), 4),
        (ParallelConfig(accelerator="cpu", devices=4, tp=2), 4),
    ):
        processes, problems = resolve_processes(config, {})
        assert (processes.per_node, problems) == (per_node, [])
    assert resolve_mesh(config, 4)[0] == MeshShape(1, 2, 1, 2)


def test_processes_of_the_mesh_are_divided_among_nodes() -> None:
    processes, problems = resolve_processes(
        ParallelConfig(accelerator="cpu", dp_shard=2, tp=2, num_nodes=2), {}
    )
    assert (processes, problems) == (Processes("cpu", 2, 2, "self"), [])


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_mismatch_between_launcher_and_configuration_names_both(
    environment: dict[str, str],
) -> None:
    started = launched_processes(environment)
    assert started is not None
    config = ParallelConfig(accelerator="cpu", devices=7, num_nodes=9)
    processes, problems = resolve_processes(config, environment)
    assert processes.world_size == started.world_size
    assert [problem.split(" does not")[0] for problem in problems] == [
        "parallel.devices=7",
        "parallel.num_nodes=9",
    ]
    for problem, actual in zip(problems, (started.per_node, started.num_nodes), strict=True):
        assert f"{started.launcher}, which started {actual};" in problem
    matching = ParallelConfig(
        accelerator="cpu", devices=started.per_node, num_nodes=started.num_nodes
    )
    assert resolve_processes(matching, environment)[1] == []


def test_exactly_one_process_of_a_run_is_the_first() -> None:
    assert is_first_process({})
    for rank in range(3):
        child = {"LOCAL_RANK": str(rank), "LLAMESH_MAIN_PID": str(os.getppid())}
        task = {**SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"}
        local = {**TORCHRUN, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        orphan = child | {"LLAMESH_MAIN_PID": "1"}  # its main process has just died
        for environment in (child, orphan, task, local):
            assert is_first_process(environment) == (rank == 0)
    # Local rank 0 of the second node is not the first process.
    assert not is_first_process({**TORCHRUN, "RANK": "4", "LOCAL_RANK": "0"})


def test_processes_are_read_from_launchers_that_set_the_variables_of_torchrun() -> None:
    other = {name: value for name, value in TORCHRUN.items() if name in RANK_VARIABLES}
    assert launched_processes(other) == Processes("auto", 8, 1, OTHER)
    for name in LOCAL_SIZES:
        assert launched_processes({**other, name: "4"}) == Processes("auto", 4, 2, OTHER)
    assert not is_first_process(other)


@pytest.mark.parametrize("name", [*RANK_VARIABLES, "LOCAL_WORLD_SIZE"])
def test_variables_left_by_another_program_are_no_launcher(name: str) -> None:
    """Each process is then the first one: it locks its run folder and prints its errors."""
    for value in ("0", "1", "x", ""):
        assert launched_processes({name: value}) is None
        assert is_first_process({name: value})
        broken = {**TORCHRUN, name: "" if name != "MASTER_ADDR" else value}
        if name != "MASTER_ADDR":
            assert launched_processes(broken) is None and is_first_process(broken)
