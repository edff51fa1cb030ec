"""`torch.compile` for functions that are called with many shapes.

A run has several: a short last chunk or micro-batch, stages of other lengths, validation. With
`fullgraph`, a function that needs more graphs than the limit fails instead of running eagerly.
"""

from collections.abc import Callable
from typing import Any

GRAPHS = 32
"""Graphs per function. A size becomes dynamic when it changes for the first time, so there is one
per combination of: gradients or not, each varying size first or dynamic, and a size of 1."""


def compile_for_any_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function without graph breaks. PyTorch's limit of 8 graphs is too low."""
    import torch._dynamo  # takes a second to import

    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(function, fullgraph=True)
