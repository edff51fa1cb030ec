"""Keeps what libraries say among themselves away from the person at the terminal.

Our own messages go through the console. Libraries' warnings are shown on rank 0 unless they are
known to be for developers: deprecations, and notes about how Fabric or DTensor work inside.
"""

import logging
import os
import warnings


def quieten() -> None:
    """Silences import chatter, deprecations and repeated lines from the other ranks."""
    for name in (
        *("lightning", "lightning.fabric", "lightning.pytorch", "torch.distributed"),
        *("torchao", "torch.utils._pytree"),  # kernels not built for this machine; registrations
        *("torch._dynamo", "torch._higher_order_ops"),  # hints for who writes the compiled code
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    # Fabric says so on every machine that has SLURM installed, cluster or not.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # One process reads and writes checkpoints without collectives.
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled, )?unavailable or")
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        warnings.simplefilter("ignore")
