"""Run a compiled model on CPU through Inductor's Triton kernels, interpreted; print its errors.

A program of its own: TRITON_INTERPRET has to be set before Triton is imported. With
`cpu_backend="triton"` Inductor generates for CPU tensors the kernels that it generates for CUDA,
apart from choices that depend on the device; FlexAttention, which has another template on CPU, is
made to take the one of CUDA. Triton's interpreter evaluates the kernels with numpy. Matrix products
and SDPA are PyTorch's own on every device.
"""

import inspect
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.kernel.flex.flex_attention as flex_lowering
import torch.nn.attention.flex_attention as flex_frontend
import triton
import triton.language as tl
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic
from triton.backends.compiler import GPUTarget

from model.compiled import compile_for_any_shape
from model.config import ModelConfig
from model.llama import Llama
from parallel.compilation import apply_compile
from parallel.mixed_precision import apply_mixed_precision

CONFIG = ModelConfig("tiny", 64, 1, 4, 2, 96, 128, max_seq_len=512)
XBLOCK = 512  # the interpreter's time is proportional to the number of blocks
launched: list[str] = []


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        documents: Lengths of the documents of each row.
    """

    attention: Any
    dtype: torch.dtype
    documents: tuple[tuple[int, ...], ...]
    chunk: int  # tokens of a chunk of the loss, the last of which is shorter


CASES = {
    "sdpa bf16": Case("sdpa", torch.bfloat16, ((7, 7, 2), (7, 7, 2)), chunk=12),
    # Tile (1, 0) of 128 × 128 is skipped in the first row and full in the second.
    "flex fp32": Case("flex", torch.float32, ((50, 78, 128), (256,)), chunk=200),
}


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
    """Interpret a kernel, instead of `CachingAutotuner.run`; large blocks are fastest here."""
    constants = dict(self.configs[0].kwargs)
    if "XBLOCK" in constants:
        constants["XBLOCK"] = XBLOCK
    fixed = constants.keys() | self.triton_meta["constants"].keys()
    names = [name for name in self.fn.arg_names if name not in fixed]
    grid_names = self.inductor_meta.get("extra_launcher_args", [])
    scope = dict(zip([*names, *grid_names], args, strict=True)) | constants
    grid = triton_heuristics.GridExpr.from_meta(self.inductor_meta, triton.Config(constants))
    for line in grid.prefix:
        exec(line, scope)
    size = tuple(int(eval(str(each), scope)) for each in (grid.x_grid, grid.y_grid, grid.z_grid))
    launched.append(self.inductor_meta["kernel_name"])
    self.fn[size](**{name: scope[name] for name in self.fn.arg_names if name in scope})


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
    install_flex()


def install_flex() -> None:
    """Make FlexAttention take CUDA's templates and bf16 tile sizes of an H100 for CPU tensors.

    Replaces the conditions on the device in torch/nn/attention/flex_attention.py and in
    torch/_inductor/kernel/flex/flex_attention.py (`lower_cpu`).
    """
    frontend: Any = flex_frontend
    frontend._validate_device = lambda *_: None
    apply_kernel_options = frontend._apply_kernel_options

    def with_logsumexp(*args: Any, **kwargs: Any) -> Any:
        return {**apply_kernel_options(*args, **kwargs), "OUTPUT_LOGSUMEXP": True}

    frontend._apply_kernel_options = with_logsumexp
    source, condition = inspect.getsource(flex_lowering.flex_attention), '.type == "cpu"'
    assert source.count(condition) == 1
    code = compile(source.replace(condition, ' == "none"'), flex_lowering.__file__, "exec")
    exec(code, vars(flex_lowering))  # its decorator registers the lowering
    setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))  # noqa: B010
    tiles, choices = CUDAConfigHeuristic(), InductorChoices
    setattr(  # noqa: B010
        choices,
        "get_flex_attention_fwd_configs",
        lambda self, head_dim, *_: tiles.get_flex_attn_fwd_configs(head_dim, torch.bfloat16),
    )
    setattr(  # noqa: B010
        choices,
        "get_flex_attention_bwd_configs",
        lambda self, head_dim, *_: tiles.get_flex_attn_bwd_configs(head_dim, torch.bfloat16),
    )


def make_model(case: Case, dtype: torch.dtype) -> Llama:
    """Return a model with equal weights, which bf16 represents exactly, on each call."""
    torch.manual_seed(0)
    model = Llama(replace(CONFIG, attention=case.attention))
    for parameter in model.parameters():
        spread = 0.3 if parameter.dim() > 1 else 0.1
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=spread)
        parameter.data = parameter.data.bfloat16().float()
    model.loss.chunk = case.chunk
    apply_mixed_precision(model, dtype)
    return model


def loss_and_gradients(model: Llama, case: Case) -> dict[str, Tensor]:
    """Return the loss and the gradient of each parameter."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.stack([torch.cat([*map(torch.arange, row)]) for row in case.documents])
    shape = (2, *positions.shape)
    tokens, labels = torch.randint(0, CONFIG.vocab_size, shape, generator=generator)
    loss = model(tokens, positions, labels, n_documents=sum(map(len, case.documents)))
    loss.backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | gradients


def check_model(case: Case) -> dict[str, Any]:
    """Return errors relative to float32 in eager mode: interpreted, and of eager mode itself."""
    reference = replace(case, attention="sdpa")
    expected = loss_and_gradients(make_model(reference, torch.float32), reference)
    eager = loss_and_gradients(make_model(reference, case.dtype), reference)
    model = make_model(case, case.dtype)
    apply_compile(model)
    for module in (model.tok_embeddings, model.norm):  # training runs them in eager mode
        module.forward = compile_for_any_shape(module.forward)  # type: ignore[method-assign]
    launched.clear()
    found = loss_and_gradients(model, case)
    return {
        "errors": {name: relative(found[name], value) for name, value in expected.items()},
        "eager": {name: relative(eager[name], value) for name, value in expected.items()},
        "kernels": [*launched],
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    install()
    print(json.dumps({name: check_model(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
