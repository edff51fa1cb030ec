"""Run what Inductor would compile for a GPU on fake tensors, without generating code for it.

Dynamo, AOTAutograd, the partitioner and Inductor's passes over the graphs are real. The graph that
would be lowered to kernels is kept in `graphs`, and interpreted where the kernels would run.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._inductor import compile_fx
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.output_code import OutputCode
from torch._inductor.virtualized import V
from torch.fx import GraphModule, Interpreter


@dataclass
class Graph:
    """A graph after all passes, with the operations that it had before them."""

    module: GraphModule
    backward: bool
    before: Counter[str] = field(default_factory=Counter)

    @property
    def operations(self) -> Counter[str]:
        """Number of calls of each operation."""
        return operations(self.module)


graphs: list[Graph] = []
"""Graphs of this process, in the order in which they were compiled."""


def operations(module: GraphModule) -> Counter[str]:
    """Return the number of calls of each operation in a graph, by its name."""
    calls = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return Counter(str(getattr(target, "_opname", None) or target) for target in calls)


def install() -> None:
    """Patch Inductor in this process."""
    config: Any = torch._inductor.config
    config.compile_threads = 1
    config.fx_graph_cache = False
    config.joint_graph_constant_folding = False  # it computes on the device
    torch._functorch.config.enable_autograd_cache = False
    compile_fx._InProcessFxCompile.codegen_and_compile = _compile  # type: ignore[assignment]


class _Interpreted(OutputCode):
    """Interprets a graph on the tensors that it is called with."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self._boxed_call = True

    def __call__(self, inputs: Sequence[Any]) -> Any:
        arguments = list(inputs)
        if isinstance(inputs, list):
            inputs.clear()  # as compiled code does, to free them early
        with torch.no_grad():
            return Interpreter(self.module).run(*arguments, enable_io_processing=False)

    def post_compile(self, *args: Any) -> None:
        """Do nothing: there is no code to load."""

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Do nothing: there are no kernels."""


def _compile(
    scheme: Any,
    gm: GraphModule,
    example_inputs: Sequence[Any],
    inputs_to_check: Sequence[int],
    graph_kwargs: Any,
) -> OutputCode:
    """Do what `_InProcessFxCompile.codegen_and_compile` does before it lowers the graph."""
    before = operations(gm)
    view_to_reshape(gm)
    with torch.no_grad():
        fake_mode = compile_fx.fake_tensor_prop(gm, example_inputs)
    with V.set_fake_mode(fake_mode):
        compile_fx._recursive_post_grad_passes(gm, graph_kwargs.get("is_inference", False))
    graphs.append(Graph(gm, bool(graph_kwargs.get("is_backward")), before))
    return _Interpreted(gm)


def tensors(graph: Graph) -> list[Tensor]:
    """Return the values of a graph's operations."""
    values = [node.meta.get("val") for node in graph.module.graph.nodes]
    return [value for value in values if isinstance(value, Tensor)]
