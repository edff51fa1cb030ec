"""Launch of a program's processes: Fabric on the mesh of `parallel.mesh`.

Also prepares each process: library warnings, memory allocation, termination together with the
launcher, and the watchdog. Imports Lightning Fabric and torch, so import this module inside
functions.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch.distributed import DistError, DistNetworkError

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.parallelize import parallelize
from parallel.strategy import MeshStrategy, OwnGpu
from resilience.errors import LaunchError, exceeded_limit
from resilience.exit_codes import ExitCode
from resilience.host_memory import keep_freed_memory
from resilience.launcher_variables import network_hint
from resilience.process_setup import bind_to_gpu, set_up_process
from resilience.processes import Processes, is_first_process, process_ranks
from resilience.rank_check import check_ranks
from resilience.rank_groups import without_rank
from resilience.slurm import host_name, rendezvous
from resilience.watchdog import Watchdog

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PORT_REMEDIES = {
    "self": "run: unset MASTER_PORT",
    "srun": "run: export MASTER_PORT=PORT with a port that is free",
    "torchrun": "start torchrun with another --master-port, or with --rdzv-endpoint=HOST:PORT",
}


def launch(
    processes: Processes,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    watchdog: Watchdog,
) -> tuple[Fabric, MeshStrategy]:
    """Start all processes and their process group; return in each of them.

    The watchdog observes the launched processes from their start and is connected on return.

    Raises:
        LaunchError: The process group cannot be initialized.
    """
    silence_libraries()
    faulthandler.enable()  # prints the Python stack after a crash outside of Python
    code = ExitCode.USER_ERROR  # if the processes cannot connect to each other
    if "MASTER_PORT" not in os.environ and processes.launcher in ("self", "srun"):
        # A relaunch has another port, and perhaps other nodes.
        code = ExitCode.RANK_FAILED_BEFORE_SAVE
    if processes.launcher == "self":
        # All processes are here; the address of another program's rank 0 may be left over.
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        _exit_with_main_process()
    elif processes.launcher == "torchrun":
        # Otherwise the processes of a killed torchrun keep training into the run folder.
        _kill_with_parent()
    if processes.launcher == "srun":
        os.environ.update(rendezvous(os.environ))
    set_up_process(processes, parallel)
    if processes.accelerator == "cpu":
        keep_freed_memory()
        if parallel.resolved("cpu").compile or precision.optimizer_state == "int8":
            from resilience.atomic_builds import make_builds_atomic

            make_builds_atomic()
    transform = partial(parallelize, parallel=parallel, precision=precision)
    strategy = MeshStrategy(
        mesh,
        transform,
        parallel.reduce_gradients,
        watchdog.children.extend,
        watchdog.limits.group_timeout,
    )
    # Fabric's detection differs: it takes any SLURM_NTASKS for srun, and imports mpi4py.
    environments = {"self": LightningEnvironment, "srun": SLURMEnvironment}
    fabric = Fabric(
        accelerator=OwnGpu() if processes.accelerator == "cuda" else processes.accelerator,
        devices=processes.per_node,
        num_nodes=processes.num_nodes,
        strategy=strategy,
        plugins=environments.get(processes.launcher, TorchElasticEnvironment)(),
    )
    compared = processes.launcher != "self" and processes.world_size > 1
    auto_choice = str(parallel) if parallel.auto else ""
    with _launch_errors(processes.launcher, code):
        store = check_ranks(processes, watchdog, auto_choice) if compared else None
    with (
        _launch_errors(processes.launcher, code, store),
        _without_children_on_error(watchdog),
    ):
        fabric.launch()
        del store  # the process group now owns its server
    if processes.accelerator == "cuda":
        bind_to_gpu()
    watchdog.connect()
    return fabric, strategy


@contextmanager
def _without_children_on_error(watchdog: Watchdog) -> Iterator[None]:
    """Kill the processes that this one has started if they cannot form a process group.

    A child dies together with this process only once it has called `_kill_with_parent`.
    """
    try:
        yield
    except BaseException:
        children = list(watchdog.children)
        watchdog.children.clear()  # their end is not a fault
        for child in children:
            child.kill()
        for child in children:
            child.wait()
        raise


@contextmanager
def _launch_errors(launcher: str, code: ExitCode, store: Any = None) -> Iterator[None]:
    """Raise LaunchError, with what to check, if the processes cannot connect to each other.

    Args:
        store: Store that all ranks have reached, which lets one of many print a common error.
    """
    try:
        yield
    except LaunchError:
        raise
    except (DistNetworkError, TimeoutError) as error:
        if exceeded_limit(error) is not None:
            raise
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            remedy = PORT_REMEDIES.get(launcher, "start the launcher with another MASTER_PORT")
            if launcher == "self" and code != ExitCode.USER_ERROR:
                remedy = "run the same command again, which chooses another port"
            raise LaunchError(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} is used by another process of "
                f"{host_name()}; {remedy}",
                code,
            ) from error
        raise LaunchError(
            f"cannot initialize the process group at {address} (MASTER_ADDR:MASTER_PORT): "
            f"{' '.join(str(error).split())}; check that this is the address of the first node, "
            "and use another MASTER_PORT if another program answers there",
            code,
        ) from error
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "Unable to find address for" in text:  # from gloo
            name = os.environ.get("GLOO_SOCKET_IFNAME")
            raise LaunchError(
                f"GLOO_SOCKET_IFNAME={name} names a network interface without an address; use "
                "another one, or run: unset GLOO_SOCKET_IFNAME"
            ) from error
        is_connection = isinstance(error, DistError) or "gloo" in text.lower()
        if not is_connection or exceeded_limit(error) is not None:
            raise
        message = f"the processes cannot connect to each other: {text}; {network_hint(os.environ)}"
        if not is_first_process() and _is_first_with(text, store):  # rank 0 may be waiting for it
            rank = f"rank {process_ranks()[0]} on {host_name()}"
            print(f"Error: {rank}: {message}", file=sys.stderr, flush=True)
        raise LaunchError(message, code) from error


def _is_first_with(error: str, store: Any) -> bool:
    """Return whether no other rank above 0 has the same error, except for ports and addresses."""
    cause = without_rank(error, host_name())
    with suppress(Exception):  # without a store, or if it disappeared with rank 0
        return bool(store.add(f"cause/{cause}", 1) == 1)
    return True


def silence_libraries() -> None:
    """Hide warnings meant for developers of the libraries, and all warnings of other local ranks.

    The libraries' other warnings are shown on rank 0.
    """
    for name in (
        "lightning",
        "lightning_fabric",
        "lightning.pytorch",
        "torch.distributed",
        "torchao",  # kernels not built for this machine
        "torch.utils._pytree",  # registrations
        "torch._dynamo",  # hints for authors of the compiled code
        "torch._higher_order_ops",  # the same
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    # Fabric warns on every machine that has SLURM installed, in a job or not.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # One process reads and writes checkpoints without collectives.
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled, )?unavailable or")
    if process_ranks()[1] > 0:
        warnings.simplefilter("ignore")


def _exit_with_main_process() -> None:
    """Make Linux kill the processes that a run starts itself when the main process dies.

    Every process calls it, the main process first. Otherwise a child of a killed main process
    waits until its rendezvous or collective times out.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        os.environ["LLAMESH_MAIN_PID"] = str(os.getpid())  # inherited by the children
    elif sys.platform == "linux":
        _kill_with_parent()
        if os.getppid() != int(os.environ["LLAMESH_MAIN_PID"]):  # it died before the call
            os._exit(1)


def _kill_with_parent() -> None:
    """Make Linux kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
