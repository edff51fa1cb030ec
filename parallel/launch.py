"""Starts the processes of a program: Fabric on our mesh. Heavy: import it inside a function."""

import faulthandler
import os
from functools import partial

from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import DistNetworkError

from cli.errors import LaunchError
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.host_memory import keep_freed_memory
from parallel.mesh import MeshShape, Processes
from parallel.parallelize import parallelize
from parallel.quiet import quieten
from parallel.slurm import rendezvous
from parallel.strategy import MeshStrategy, end_with_main_process, end_with_torchrun
from resilience.watchdog import Watchdog


def launch(
    processes: Processes,
    mesh: MeshShape,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    watchdog: Watchdog,
) -> tuple[Fabric, MeshStrategy]:
    """Every process of the mesh returns from here, in one process group, looked after."""
    quieten()
    faulthandler.enable()  # what a crash outside of Python interrupted is told
    if processes.launcher == "self":
        end_with_main_process()
    elif processes.launcher == "torchrun":
        end_with_torchrun()
    else:
        os.environ.update(rendezvous(os.environ))
    if processes.accelerator == "cpu":
        keep_freed_memory()
    plan = partial(parallelize, parallel=parallel, precision=precision)
    strategy = MeshStrategy(mesh, plan, parallel.reduce_gradients)
    strategy.on_children = watchdog.watch_children
    # Fabric itself takes the tasks of a job named interactive for shells.
    environment = SLURMEnvironment() if processes.launcher == "srun" else None
    fabric = Fabric(
        accelerator=processes.accelerator,
        devices=processes.per_node,
        num_nodes=processes.num_nodes,
        strategy=strategy,
        plugins=environment,
    )
    try:
        fabric.launch()
    except DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"the processes cannot meet at {address} (MASTER_ADDR and MASTER_PORT): "
            f"{' '.join(str(error).split())}. Where another program has the port, choose another "
            "MASTER_PORT, or leave it unset"
        ) from error
    watchdog.connect()
    return fabric, strategy
