"""The chunked output projection and cross-entropy match the unchunked loss and use less memory."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.loss import BLOCK, IGNORE, CrossEntropySum

BATCH, SEQ, DIM, VOCAB = 3, 8, 6, 37
CHUNKS = (1, 5, 8, 23, 24, 1000)  # chunk sizes for 24 tokens; 5 and 23 have a shorter last chunk
FACTOR = 3.0  # multiplies the loss before backward

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return hidden states, weight and labels of each test case.

    The values have few bits, so that the logits are exact in any order of summation. The first
    element of each hidden state is one, so that the first column of the weight is added to the
    logits.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-8, 9, (BATCH, SEQ, DIM), generator=generator) / 8
    weight = torch.randint(-8, 9, (VOCAB, DIM), generator=generator) / 8
    hidden[..., 0] = 1
    weight[:, 0] = 0
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    holes = labels.clone()
    holes[0, ::2] = IGNORE
    holes[1] = IGNORE
    extreme, shifted, confident = weight.clone(), weight.clone(), weight.clone()
    extreme[2, 0], extreme[9, 0] = 2**14, -(2**14)
    shifted[:, 0] = 2**15
    confident[5, 0] = 12
    return {
        "ordinary": (hidden, weight, labels),
        "some_ignored": (hidden, weight, holes),
        "all_ignored": (hidden, weight, torch.full_like(labels, IGNORE)),
        "extreme": (hidden, extreme, labels),
        "all_logits_large": (hidden, shifted, labels),
        "logits_far_apart": (hidden * 2**12, weight, labels),
        "confident_in_target": (hidden, confident, torch.full_like(labels, 5)),
    }


def unchunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss from the logits of all tokens, in float32."""
    logits = F.linear(hidden, weight).float().flatten(0, 1)  # (batch * seq, vocab)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def check(loss: Loss, case: tuple[Tensor, Tensor, Tensor], roundings: tuple[float, float]) -> None:
    """Compare value and gradients with float64 F.cross_entropy of the same (rounded) logits.

    Args:
        roundings: Rounding errors of the gradients of hidden states and weight, relative to the sum
            of the magnitudes of their terms. In addition, the probability of a target minus one is
            rounded to float32.
    """
    hidden, weight = (each.clone().requires_grad_() for each in case[:2])
    labels = case[2].flatten()
    value = loss(hidden, weight, case[2])
    (value * FACTOR).backward()
    logits = F.linear(hidden, weight).detach().flatten(0, 1).double().requires_grad_()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    (expected * FACTOR).backward()
    assert value.dtype == torch.float32 and value.shape == ()
    # For each token, rounding errors of 6e-8 in the loss and in the argument of its logarithm.
    torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=len(labels) * 1.2e-7)

    d_logits = logits.grad
    assert d_logits is not None
    at_target = F.one_hot(labels.clamp(min=0), VOCAB) * FACTOR * (labels != IGNORE).unsqueeze(-1)
    flat = hidden.detach().flatten(0, 1).double()  # (batch * seq, dim)
    for leaf, left, target, right, relative in (
        (hidden, d_logits, at_target, weight.detach().double(), roundings[0]),
        (weight, d_logits.T, at_target.T, flat, roundings[1]),
    ):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        sizes = left.abs() @ right.abs() * relative + target.double() @ right.abs() * 2e-7
        error = (leaf.grad.double().view(sizes.shape) - left @ right).abs()
        assert (error <= sizes.max()).all(), (error.max(), sizes.max())


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", inputs())
def test_chunks_change_neither_loss_nor_gradients(name: str, chunk: int) -> None:
    check(CrossEntropySum(chunk), inputs()[name], (1e-6, 1e-6))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", inputs())
def test_bfloat16_rounds_logits_and_gradients_and_not_the_loss(name: str, chunk: int) -> None:
    """One rounding is half of the last of 8 bits.

    The gradient of the logits, the product and its scaling are rounded once each; the gradient of
    the weight is also rounded after each chunk.
    """
    hidden, weight, labels = inputs()[name]
    n_chunks = -(-BATCH * SEQ // chunk)
    roundings = 3 * 2**-9, (3 + n_chunks) * 2**-9
    check(CrossEntropySum(chunk), (hidden.bfloat16(), weight.bfloat16(), labels), roundings)


@pytest.mark.parametrize("name", ["all_ignored", "extreme"])
def test_batch_without_targets_has_zero_loss_and_gradient(name: str) -> None:
    hidden, weight, labels = inputs()[name]
    loss = CrossEntropySum()(hidden, weight.requires_grad_(), torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss == 0 and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_gradients_are_scaled_by_a_float32_factor(device: str) -> None:
    """A factor 1 / n_targets rounded to bfloat16 would have an error of up to 1 / 256."""
    hidden, weight, labels = (each.to(device) for each in inputs()["ordinary"])
    grads = []
    for factor in (1.0, 1 + 3 * 2**-10):  # the second rounds to 1 in bfloat16
        leaf = weight.bfloat16().requires_grad_()
        (CrossEntropySum()(hidden.bfloat16(), leaf, labels) * factor).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    unscaled, scaled = grads
    assert torch.equal(scaled, (unscaled.float() * (1 + 3 * 2**-10)).bfloat16())
    assert not torch.equal(scaled, unscaled)


class OperationRecorder(TorchDispatchMode):
    """Record the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("grad_enabled", "needed", "products"),
    [
        (False, (True, True), 3),  # only the output projection, once per chunk
        (True, (False, False), 3),
        (True, (True, False), 6),
        (True, (False, True), 6),
        (True, (True, True), 9),
    ],
)
def test_only_required_gradients_are_computed(
    grad_enabled: bool, needed: tuple[bool, bool], products: int
) -> None:
    hidden, weight, labels = inputs()["some_ignored"]
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    with torch.set_grad_enabled(grad_enabled), OperationRecorder() as operations:
        loss = CrossEntropySum(chunk=10)(hidden, weight, labels)
    assert sum(name in ("mm", "addmm") for name in operations.names) == products
    assert ("index_put_" in operations.names) == (products > 3)
    assert loss.requires_grad == (products > 3)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (
        needed if grad_enabled else (False, False)
    )


def test_second_backward_raises() -> None:
    """It would scale, a second time, gradients that the parameters already hold."""
    hidden, weight, labels = inputs()["ordinary"]
    loss = CrossEntropySum()(hidden, weight.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


class LiveBytes(TorchDispatchMode):
    """Record the peak bytes of the storages created inside the context."""

    def __init__(self, *existing: Tensor) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {each.untyped_storage()._cdata for each in existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def large_case(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return 16k tokens of Llama 3 8B, whose logits take 3.9 GiB in bfloat16."""
    hidden = torch.ones(2, 8192, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.ones(128_256, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    return hidden, weight, torch.ones(2, 8192, dtype=torch.int64, device=device)


def traced_peak(loss: Loss) -> float:
    """Return the peak memory of forward and backward in GiB, inputs excluded."""
    with FakeTensorMode():
        case = large_case("cpu")
        with LiveBytes(*case) as live:
            (loss(*case) / 3).backward()
        assert case[1].grad is not None
    return live.peak / 2**30


def test_peak_is_the_two_gradients_and_the_logits_of_one_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BLOCK, "cpu", BLOCK["cuda"])
    gradients_and_logits = 2 * (2 * 8192 * 4096 + 128_256 * 4096 + 2048 * 128_256) / 2**30
    block = 4 * BLOCK["cuda"] / 2**30  # float32; at most one block exists at a time
    peak = traced_peak(CrossEntropySum())
    assert gradients_and_logits < peak < gradients_and_logits + block + 0.01
    assert peak == pytest.approx(1.62, abs=0.01)
    # Unchunked: the logits in bfloat16 and in float32, and the gradients of both.
    assert traced_peak(unchunked_loss) > 4 * 3.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_peak_on_a_gpu_matches_the_traced_peak(compiled: bool) -> None:
    loss, case = CrossEntropySum(), large_case("cuda")
    if compiled:
        loss.compile_stages()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (loss(*case) / 3).backward()
    # The workspace of the matrix products adds tens of MiB.
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < 1.75


def test_compiled_stages_match_eager_and_have_no_graph_per_shape() -> None:
    torch.compiler.reset()
    loss = CrossEntropySum(chunk=10)  # the last chunk has 4 tokens
    loss.compile_stages()
    check(loss, inputs()["some_ignored"], (1e-6, 1e-6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in inputs().values():
            check(loss, case, (1e-6, 1e-6))
        with torch.no_grad():
            loss(*inputs()["ordinary"])
