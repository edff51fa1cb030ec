"""Run a compiled block on CPU through Inductor's Triton kernels, interpreted; print its errors.

A program of its own: TRITON_INTERPRET has to be set before Triton is imported. With
`cpu_backend="triton"` Inductor generates for CPU tensors the kernels that it generates for CUDA,
apart from choices that depend on the device. Triton's interpreter evaluates them with numpy.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch._functorch.config
import torch._inductor.config
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget

from model.config import ModelConfig
from model.llama import Llama

CONFIG = ModelConfig("block", 64, 1, 4, 2, 96, 128, max_seq_len=64)
launched: list[str] = []


class Libdevice:
    """CUDA's math library, whose functions the interpreter replaces by Triton's own."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl.math, name)


class Driver:
    """What Inductor reads of a driver; nothing is compiled."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def is_active(self) -> bool:
        return True


def launch(self: Any, *args: Any, stream: Any = None, **kwargs: Any) -> None:
    """Interpret a kernel with its first configuration, instead of `CachingAutotuner.run`."""
    configuration = self.configs[0]
    names = self.fn.arg_names
    values = dict(zip(names, args, strict=False)) | configuration.kwargs
    grid = triton_heuristics.GridExpr.from_meta(self.inductor_meta, configuration)
    scope = dict(values)
    for line in grid.prefix:
        exec(line, scope)
    size = tuple(int(eval(str(each), scope)) for each in (grid.x_grid, grid.y_grid, grid.z_grid))
    launched.append(self.inductor_meta["kernel_name"])
    self.fn[size](**{name: values[name] for name in names})


def install() -> None:
    """Make Inductor generate Triton code for CPU tensors, and interpret it."""
    config: Any = torch._inductor.config
    config.cpu_backend, config.compile_threads, config.fx_graph_cache = "triton", 1, False
    torch._functorch.config.enable_autograd_cache = False
    triton.runtime.driver.set_active(Driver())
    helpers: Any = triton_helpers
    helpers.set_driver_to_cpu = lambda: None
    helpers.libdevice = Libdevice()
    autotuner: Any = triton_heuristics.CachingAutotuner
    autotuner.precompile = lambda self, *args, **kwargs: None
    autotuner.run = launch


def loss_and_gradients(model: Llama) -> dict[str, Tensor]:
    """Return the loss and the gradient of each parameter, of two rows with several documents."""
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(0, CONFIG.vocab_size, (2, 2, 16), generator=generator)
    positions = (torch.arange(16) % 7).repeat(2, 1)
    model.zero_grad()
    loss = model(tokens, positions, labels, n_documents=6)
    loss.backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | {name: g.clone() for name, g in gradients.items()}


def main() -> None:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() > 1 else 0.1
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=spread)
    expected = loss_and_gradients(model)
    install()
    for block in model.layers:
        cast(Any, block).compile(fullgraph=True)
    found = loss_and_gradients(model)
    errors = {name: float((found[name] - e).norm() / e.norm()) for name, e in expected.items()}
    print(json.dumps({"errors": errors, "kernels": launched}))


if __name__ == "__main__":
    main()
