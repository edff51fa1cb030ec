"""Save a checkpoint in tests, without the background thread of `checkpoint.saver`."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint.position import Position
from checkpoint.writer import tensors_of, write_checkpoint
from resilience.run_folder import RunFolder

RUN_ID = "0123456789abcdef" * 2


def save(
    folder: RunFolder,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    position: Position,
    config: dict[str, Any],
    create: bool = True,
) -> Path:
    """Save a checkpoint on all ranks and return its folder.

    Args:
        create: Create the run folder, as a launch does.
    """
    if create:
        folder.path.mkdir(parents=True, exist_ok=True)
    values, state = dataclasses.asdict(position), tensors_of(model, optimizer)
    write_checkpoint(folder, RUN_ID, state, values, config, dist.group.WORLD, lambda error: None)
    return folder.step_folder(position.step)
