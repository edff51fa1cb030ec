"""Check the environment variables of launchers, networks and SLURM before anything is launched.

A variable that another program left in the environment (`RANK` of an old shell, `NODE_RANK` of a
container) must not make a process wait for others, write without a lock or print nothing. A
launcher therefore counts only with its complete and consistent set (`parallel.mesh`); here every
other set is an error that names the variables and the remedy.
"""

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping

from parallel.config import ParallelConfig
from resilience.processes import LOCAL_SIZES, RANK_VARIABLES, is_self_launched, launched_processes
from resilience.slurm import TASK_VARIABLES, in_slurm, tasks_per_node

RESOLVE_SECONDS = 20.0  # names of a new pod or node may take a moment to resolve
SIOCGIFADDR = 0x8915  # linux/sockios.h
# Set by launchers in addition to `RANK_VARIABLES`; they mean nothing without them.
OTHER_VARIABLES = (
    *("LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
)
# Rank and number of processes, by MPI implementation.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)


def launcher_errors(
    parallel: ParallelConfig, accelerator: str, environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Yield errors in the variables of this process's launcher and network.

    Args:
        accelerator: Device type of the processes, `cpu` or `cuda`.
    """
    if is_self_launched(environment):
        return  # the main process has checked them
    started = launched_processes(environment)
    if started is None:
        yield from _incomplete_launcher_errors(environment)
        if (nodes := parallel.num_nodes or 1) > 1:
            yield (
                f"parallel.num_nodes={nodes} needs a launcher that starts processes on every node: "
                f"torchrun --nnodes={nodes} …, or srun; use parallel.num_nodes=null for one node"
            )
    elif started.launcher == "srun":
        yield from _task_errors(environment)
    restarts = environment.get("SLURM_RESTART_COUNT", "0")
    if not restarts.isdecimal():
        rule = "is not a number of restarts; run: unset SLURM_RESTART_COUNT"
        yield f"SLURM_RESTART_COUNT={restarts} {rule}"
    yield from _port_errors(environment)
    if started is not None:
        yield from _address_errors(environment)
    yield from _interface_errors("GLOO_SOCKET_IFNAME", environment)
    if accelerator == "cuda":
        yield from _interface_errors("NCCL_SOCKET_IFNAME", environment)


def _incomplete_launcher_errors(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield errors in the variables of a process that no known launcher started."""
    # An address and a port alone choose where the processes of this run meet.
    names = (*RANK_VARIABLES[:3], *OTHER_VARIABLES)
    if present := [name for name in names if name in environment]:
        shown = _shown(present, environment)
        remedy = f"if no launcher started this process, run: unset {' '.join(present)}"
        missing = [name for name in RANK_VARIABLES if name not in environment]
        if missing:
            yield (
                f"{shown} set, but not {', '.join(missing)}: a launcher such as torchrun sets all "
                f"of {', '.join(RANK_VARIABLES)}; {remedy}"
            )
        elif message := _inconsistency(environment):
            yield f"{message}; {remedy}"
    elif message := _mpi_error(environment):
        yield message
    yield from _slurm_errors(environment)


def _inconsistency(environment: Mapping[str, str]) -> str | None:
    """Return the rule that the numbers of a complete set break."""
    local = next((name for name in LOCAL_SIZES if name in environment), "WORLD_SIZE")
    names = list(dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", local)))
    for name in names:
        try:
            int(environment[name])
        except ValueError:
            return f"{name}={environment[name]} is not an integer"
    values = {name: int(environment[name]) for name in names}
    rank, local_rank, size, per_node = (*list(values.values())[:3], values[local])
    if not 0 <= rank < size:
        rule = f"RANK must be from 0 to WORLD_SIZE - 1 = {size - 1}"
    elif not 0 <= local_rank < per_node:
        rule = f"LOCAL_RANK must be from 0 to {local} - 1 = {per_node - 1}"
    elif local_rank > rank:
        rule = "LOCAL_RANK is never above RANK"
    elif size % per_node:
        rule = f"{local} must divide WORLD_SIZE: every node has the same number of processes"
    else:
        return None
    return f"{_shown(names, environment)} inconsistent: {rule}"


def _mpi_error(environment: Mapping[str, str]) -> str | None:
    """Return the error for processes of `mpirun` without torch's variables."""
    for rank, size in MPI_VARIABLES:
        if rank in environment and environment.get(size) != "1":
            present = [name for name in (rank, size) if name in environment]
            return (
                f"{_shown(present, environment)} set, but not {', '.join(RANK_VARIABLES)}, which "
                "torch needs; let mpirun start a script that exports these five (RANK from "
                f"{rank}), use torchrun, or, if mpirun did not start this process, run: unset "
                f"{' '.join(present)}"
            )
    return None


def _slurm_errors(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield errors about a SLURM job whose tasks `srun` did not start."""
    numbers = {name: environment.get(name, "0") for name in TASK_VARIABLES}
    invalid = [name for name, value in numbers.items() if not value.isdecimal()]
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    # The script of a job is not a task, although it has the rank 0.
    if invalid or numbers["SLURM_PROCID"] != "0":
        names = invalid or [name for name in TASK_VARIABLES if name in environment]
        yield (
            f"{_shown(names, environment)} set, but not the complete and consistent variables of a "
            f"task of srun; if srun did not start this process, run: unset {' '.join(names)}"
        )
    elif in_slurm(environment):
        yield (
            "this is the script of a SLURM job, not one of its tasks; put srun before the "
            "command (srun python train.py …), as slurm/train.sbatch does"
        )
    elif int(numbers["SLURM_NTASKS"]) > 1 and not interactive:
        yield (
            f"SLURM_NTASKS={numbers['SLURM_NTASKS']} is set, but srun did not start this process; "
            "put srun before the command, or run: unset SLURM_NTASKS"
        )


def _task_errors(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield errors in the task layout that `srun` started."""
    tasks = tasks_per_node(environment)
    if len(set(tasks)) > 1:
        yield (
            f"srun started {sum(tasks)} tasks unevenly on {len(tasks)} nodes "
            f"({', '.join(map(str, tasks))}); use --nodes and --ntasks-per-node"
        )
    elif "SLURM_NTASKS_PER_NODE" not in environment:
        yield (
            f"srun --ntasks={sum(tasks)} does not set the number of tasks per node; add "
            f"--ntasks-per-node={tasks[0]}"
        )


def _port_errors(environment: Mapping[str, str]) -> Iterator[str]:
    port = environment.get("MASTER_PORT")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 65_536):
        yield f"MASTER_PORT={port} is not a port (1 to 65535); run: unset MASTER_PORT"


def _address_errors(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield an error if the address of rank 0 cannot be resolved, after some attempts."""
    address = environment.get("MASTER_ADDR")
    deadline = time.monotonic() + RESOLVE_SECONDS
    while address is not None:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                yield (
                    f"MASTER_ADDR={address} cannot be resolved to the address of rank 0 "
                    f"({error.strerror or error}); use its host name or IP address"
                )
                return
            time.sleep(1.0)
        except UnicodeError:
            yield f"MASTER_ADDR={address} is not a host name; use the name or IP address of rank 0"
            return


def _interface_errors(name: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield an error for each network interface that does not exist here.

    NCCL takes prefixes, with `=` exact names and with `^` what to exclude.
    """
    value = environment.get(name, "")
    if name.startswith("NCCL") and value.startswith("^"):
        return
    existing = [interface for _, interface in socket.if_nameindex()]
    remedy = f"use one of {', '.join(filter(_address, existing))}, or run: unset {name}"
    for chosen in filter(None, value.lstrip("=").split(",")):
        chosen = chosen.partition(":")[0] if name.startswith("NCCL") else chosen
        prefix = name.startswith("NCCL") and not value.startswith("=")
        if not any(each == chosen or (prefix and each.startswith(chosen)) for each in existing):
            yield (
                f"{name}={value}: there is no network interface {chosen} on "
                f"{socket.gethostname()}; {remedy}"
            )


def network_hint(environment: Mapping[str, str]) -> str:
    """Return the network interfaces and settings of this process, and a remedy."""
    found = [(name, _address(name)) for _, name in socket.if_nameindex()]
    interfaces = ", ".join(f"{name} ({address})" for name, address in found if address)
    names = sorted(name for name in environment if name.startswith(("NCCL_", "GLOO_")))
    settings = ", ".join(f"{name}={environment[name]}" for name in names) or "none"
    return (
        f"interfaces of {socket.gethostname()}: {interfaces}; NCCL_* and GLOO_* variables: "
        f"{settings}; set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to an interface that reaches "
        "the other nodes, and NCCL_DEBUG=INFO for more details"
    )


def _address(interface: str) -> str | None:
    """Return the IPv4 address of a network interface, if it has one."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])  # ifreq: 16 bytes of name, then sockaddr_in


def _shown(names: Iterable[str], env: Mapping[str, str]) -> str:
    """Return `RANK=0 and LOCAL_RANK=1` with the verb that follows."""
    pairs = [f"{name}={env[name]}" for name in names]
    *first, last = pairs
    return f"{', '.join(first)} and {last} are" if first else f"{last} is"
