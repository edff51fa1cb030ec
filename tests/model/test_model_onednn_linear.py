"""float32 products by oneDNN: those of a Linear layer, and taken only where they may be."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import on_ranks
from small_run import Case, batch, build, model_config, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels import onednn_linear as products
from model.llama import Llama
from parallel.config import PrecisionConfig
from parallel.mesh import AXES
from parallel.parallelize import parallelize
from parallel.trace import fake_processes

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)
EPS = torch.finfo(torch.float32).eps


def test_output_and_gradients_are_a_linear_layer_s() -> None:
    """As close to exact ones as a sum of so many rounded products can be off, for any order."""
    torch.manual_seed(0)
    x = torch.randn(3, 17, 40, requires_grad=True)
    weight = torch.randn(24, 40, requires_grad=True)
    gradient = torch.randn(3, 17, 24)

    def all_of(product: Any, *leaves: Tensor) -> list[Tensor]:
        y = product(*leaves)
        return [y, *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]

    found = all_of(products.linear, x, weight)
    exact = all_of(F.linear, x.double(), weight.double())
    gradient = gradient.abs()
    magnitudes = all_of(F.linear, x.abs().double(), weight.abs().double())
    for value, true, magnitude, terms in zip(
        found, exact, magnitudes, (40, 24, 3 * 17), strict=True
    ):
        assert value.shape == true.shape and value.dtype == torch.float32
        assert ((value - true).abs() <= terms * EPS * magnitude).all()


@pytest.mark.parametrize("strides", ["plain", "transposed"])
def test_what_the_compiler_is_told_of_it_is_what_it_does(strides: str) -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    if strides == "transposed":
        weight = torch.randn(8, 6).t()
    torch.library.opcheck(products.OPERATION, (x.requires_grad_(), weight.requires_grad_()))


MAY = [
    Case(),
    Case(dp=2),
    Case(cp=2),
    Case(activation_checkpoint="full"),
    Case(activation_checkpoint="selective", compile=True),
    Case(activation_checkpoint=1.0, compile=True),
]
MAY_NOT = [
    Case(tp=2),
    Case(param="bf16"),
    Case(activation_checkpoint="full", compile=True),
    Case(activation_checkpoint=0.5, compile=True),
]


@pytest.mark.parametrize(
    ("case", "slower", "expected"),
    [(case, True, True) for case in MAY]
    + [(case, True, False) for case in MAY_NOT]
    + [(Case(), False, False)],
)
def test_a_plan_takes_them_for_whole_float32_weights_where_mkl_is_slower(
    case: Case, slower: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_mkl_is_slower", lambda: slower)
    with fake_processes(case.world):
        mesh = init_device_mesh("cpu", case.mesh.sizes, mesh_dim_names=AXES)
        with torch.device("meta"):
            llama = Llama(model_config(tied=False, n_layers=1))
        parallelize(llama, mesh, case.parallel, PrecisionConfig(param=case.param))
    block: Any = llama.layers[0]
    assert isinstance(block.feed_forward.w1, products._Linear) == expected
    assert not isinstance(llama.output, products._Linear)


class Counted(TorchDispatchMode):
    """How often oneDNN is asked."""

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += operation == products.OPERATION
        return operation(*args, **(kwargs or {}))


def step(case: Case, slower: bool) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and how often oneDNN was asked in forward and backward."""
    products._mkl_is_slower = lambda: slower  # type: ignore[assignment]
    run = build(case)
    tokens, positions, labels = batch(0)
    with Counted() as counted:
        loss = run.model(tokens, positions, labels)
        run.fabric.backward(loss)
    return loss.item(), [whole(each.grad) for each in run.llama.parameters()], counted.count


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Seven layers: outputs, and gradients of their inputs.
        (Case(), 7 + 7),
        (Case(dp=2), 7 + 7),
        # All outputs again.
        (Case(activation_checkpoint="full"), 7 + 7 + 7),
        # Their outputs are kept.
        (Case(activation_checkpoint="selective"), 7 + 7),
    ],
)
def test_a_step_computes_by_them_what_it_computes_without(case: Case, expected: int) -> None:
    loss, gradients, count = on_ranks(case.world, step, case, True)[0]
    other_loss, other_gradients, none = on_ranks(case.world, step, case, False)[0]
    assert (count, none) == (expected, 0)
    assert loss == pytest.approx(other_loss, rel=1e-6)  # sums in another order
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
