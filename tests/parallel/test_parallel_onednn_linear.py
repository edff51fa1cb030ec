"""float32 linear layers by oneDNN match nn.Linear and are used only where supported."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import on_ranks
from small_run import Case, batch, build, full_tensor, model_config
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from model import kernels
from model.kernels.onednn_linear import LINEAR_OP, OneDNNLinear, linear
from model.llama import Llama
from parallel.config import PrecisionConfig
from parallel.mesh import AXES
from parallel.parallelize import parallelize
from planning.fake_model import fake_processes

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)
EPS = torch.finfo(torch.float32).eps


def test_output_and_gradients_match_a_linear_layer() -> None:
    """The bound is the worst-case rounding error of the sums in any order."""
    torch.manual_seed(0)
    x = torch.randn(3, 17, 40, requires_grad=True)
    weight = torch.randn(24, 40, requires_grad=True)
    gradient = torch.randn(3, 17, 24)

    def output_and_gradients(linear: Any, *leaves: Tensor) -> list[Tensor]:
        y = linear(*leaves)
        return [y, *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]

    actual = output_and_gradients(linear, x, weight)
    exact = output_and_gradients(F.linear, x.double(), weight.double())
    gradient = gradient.abs()
    magnitudes = output_and_gradients(F.linear, x.abs().double(), weight.abs().double())
    for value, true, magnitude, terms in zip(
        actual, exact, magnitudes, (40, 24, 3 * 17), strict=True
    ):
        assert value.shape == true.shape and value.dtype == torch.float32
        assert ((value - true).abs() <= terms * EPS * magnitude).all()


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_custom_op_passes_opcheck(strides: str) -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(6, 8)
    if strides == "transposed":
        weight = torch.randn(8, 6).t()
    torch.library.opcheck(LINEAR_OP, (x.requires_grad_(), weight.requires_grad_()))


SUPPORTED = [
    Case(),
    Case(dp=2),
    Case(cp=2),
    Case(activation_checkpoint="full"),
    Case(activation_checkpoint="selective", compile=True),
    Case(activation_checkpoint=1.0, compile=True),
]
UNSUPPORTED = [
    Case(tp=2),
    Case(param="bf16"),
    Case(activation_checkpoint="full", compile=True),
    Case(activation_checkpoint=0.5, compile=True),
]


@pytest.mark.parametrize(
    ("case", "slower", "expected"),
    [(case, True, True) for case in SUPPORTED]
    + [(case, True, False) for case in UNSUPPORTED]
    + [(Case(), False, False)],
)
def test_onednn_is_used_for_unsharded_float32_weights_where_mkl_is_slower(
    case: Case, slower: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_is_amd_cpu_with_mkl", lambda: slower)
    with fake_processes(case.world):
        mesh = init_device_mesh("cpu", case.mesh.sizes, mesh_dim_names=AXES)
        with torch.device("meta"):
            llama = Llama(model_config(tied=False, n_layers=1))
        parallelize(llama, mesh, case.parallel, PrecisionConfig(param=case.param))
    block: Any = llama.layers[0]
    assert isinstance(block.feed_forward.w1, OneDNNLinear) == expected
    assert not isinstance(llama.output, OneDNNLinear)


class CallCounter(TorchDispatchMode):
    """Count calls of the custom oneDNN operation."""

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += operation == LINEAR_OP
        return operation(*args, **(kwargs or {}))


def step(case: Case, slower: bool) -> tuple[float, list[Tensor], int]:
    """Return loss, gradients and the number of oneDNN calls in forward and backward."""
    kernels._is_amd_cpu_with_mkl = lambda: slower  # type: ignore[assignment]
    run = build(case)
    tokens, positions, labels = batch(0)
    with CallCounter() as counter:
        loss = run.model(tokens, positions, labels)
        run.fabric.backward(loss)
    return loss.item(), [full_tensor(each.grad) for each in run.llama.parameters()], counter.count


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Seven layers: outputs and gradients of the inputs.
        (Case(), 7 + 7),
        (Case(dp=2), 7 + 7),
        # All outputs are recomputed.
        (Case(activation_checkpoint="full"), 7 + 7 + 7),
        # The outputs are saved.
        (Case(activation_checkpoint="selective"), 7 + 7),
    ],
)
def test_step_with_onednn_matches_step_without(case: Case, expected: int) -> None:
    loss, grads, n_calls = on_ranks(case.world, step, case, True)[0]
    expected_loss, expected_grads, n_calls_without = on_ranks(case.world, step, case, False)[0]
    assert (n_calls, n_calls_without) == (expected, 0)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # sums in a different order
    for actual, reference in zip(grads, expected_grads, strict=True):
        atol = 1e-5 * reference.abs().max().item()
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=atol)
