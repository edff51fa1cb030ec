"""Head and loss by chunks are head and loss in one piece: in value and gradients, not in memory."""

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
CHUNKS = (1, 5, 8, 23, 24, 1000)  # of 24 tokens; the last chunk is shorter with 5 and 23
FACTOR = 3.0  # what the loss is multiplied by before its backward

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, weight and labels by what is special about them.

    The values are few bits on a grid, so that the logits are exact in any order of summation. The
    first dim of the hidden states is one, so that the weights there are added to all logits.
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
    spikes, far, sure = weight.clone(), weight.clone(), weight.clone()
    spikes[2, 0], spikes[9, 0] = 2**14, -(2**14)
    far[:, 0] = 2**15
    sure[5, 0] = 12
    return {
        "ordinary": (hidden, weight, labels),
        "some_ignored": (hidden, weight, holes),
        "all_ignored": (hidden, weight, torch.full_like(labels, IGNORE)),
        "extreme": (hidden, spikes, labels),
        "far_from_zero": (hidden, far, labels),
        "far_apart": (hidden * 2**12, weight, labels),
        "sure_of_the_target": (hidden, sure, torch.full_like(labels, 5)),
    }


def in_one_piece(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss of all logits at once, in float32."""
    logits = F.linear(hidden, weight).float().flatten(0, 1)  # (batch * seq, vocab)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def check(loss: Loss, case: tuple[Tensor, Tensor, Tensor], roundings: tuple[float, float]) -> None:
    """Value and gradients against F.cross_entropy of the logits, rounded as they are, in float64.

    Args:
        roundings: Of the gradients of hidden states and weight, relative to the sum of the sizes of
            their terms. On top comes one of float32 in a target's probability minus one.
    """
    hidden, weight = (each.clone().requires_grad_() for each in case[:2])
    labels = case[2].flatten()
    value = loss(hidden, weight, case[2])
    (value * FACTOR).backward()
    logits = F.linear(hidden, weight).detach().flatten(0, 1).double().requires_grad_()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    (expected * FACTOR).backward()
    assert value.dtype == torch.float32 and value.shape == ()
    # Of each token, 6e-8 of the loss, and of the argument of its logarithm.
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
    """A rounding is half of the last of 8 bits.

    There is one of the logits' gradient, one of the product, one of its scaling, and of the weight
    one for the sum after each chunk.
    """
    hidden, weight, labels = inputs()[name]
    n_chunks = -(-BATCH * SEQ // chunk)
    roundings = 3 * 2**-9, (3 + n_chunks) * 2**-9
    check(CrossEntropySum(chunk), (hidden.bfloat16(), weight.bfloat16(), labels), roundings)


@pytest.mark.parametrize("name", ["all_ignored", "extreme"])
def test_no_target_is_no_loss_and_no_gradient(name: str) -> None:
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
def test_gradients_are_scaled_by_a_float32_number(device: str) -> None:
    """1 / targets, rounded to bfloat16 before, would be wrong by up to 1 / 256 in all of them."""
    hidden, weight, labels = (each.to(device) for each in inputs()["ordinary"])
    found = []
    for factor in (1.0, 1 + 3 * 2**-10):  # the second rounds to 1 in bfloat16
        leaf = weight.bfloat16().requires_grad_()
        (CrossEntropySum()(hidden.bfloat16(), leaf, labels) * factor).backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    unscaled, scaled = found
    assert torch.equal(scaled, (unscaled.float() * (1 + 3 * 2**-10)).bfloat16())
    assert not torch.equal(scaled, unscaled)


class Operations(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("grad_enabled", "needed", "products"),
    [
        (False, (True, True), 3),  # the head's alone, one for each of three chunks
        (True, (False, False), 3),
        (True, (True, False), 6),
        (True, (False, True), 6),
        (True, (True, True), 9),
    ],
)
def test_only_gradients_that_are_needed_are_computed(
    grad_enabled: bool, needed: tuple[bool, bool], products: int
) -> None:
    hidden, weight, labels = inputs()["some_ignored"]
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    with torch.set_grad_enabled(grad_enabled), Operations() as operations:
        loss = CrossEntropySum(chunk=10)(hidden, weight, labels)
    assert sum(name in ("mm", "addmm") for name in operations.names) == products
    assert ("index_put_" in operations.names) == (products > 3)
    assert loss.requires_grad == (products > 3)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None, weight.grad is not None) == (
        needed if grad_enabled else (False, False)
    )


def test_second_backward_fails() -> None:
    """It would scale gradients that are scaled already, and that the parameters hold by now."""
    hidden, weight, labels = inputs()["ordinary"]
    loss = CrossEntropySum()(hidden, weight.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made inside held at once."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {each.untyped_storage()._cdata for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def large(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """16k tokens of Llama 3 8B, which take 3.9 GiB of logits in bfloat16 and twice in float32."""
    hidden = torch.ones(2, 8192, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.ones(128_256, 4096, dtype=torch.bfloat16, device=device, requires_grad=True)
    return hidden, weight, torch.ones(2, 8192, dtype=torch.int64, device=device)


def traced_peak(loss: Loss) -> float:
    """GiB above the inputs in forward and backward."""
    with FakeTensorMode():
        case = large("cpu")
        with LiveBytes(*case) as live:
            (loss(*case) / 3).backward()
        assert case[1].grad is not None
    return live.peak / 2**30


def test_peak_is_the_two_gradients_and_the_logits_of_one_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BLOCK, "cpu", BLOCK["cuda"])
    gradients_and_logits = 2 * (2 * 8192 * 4096 + 128_256 * 4096 + 2048 * 128_256) / 2**30
    block = 4 * BLOCK["cuda"] / 2**30  # in float32; two never exist
    peak = traced_peak(CrossEntropySum())
    assert gradients_and_logits < peak < gradients_and_logits + block + 0.01
    assert peak == pytest.approx(1.62, abs=0.01)
    # The trace sees logits where they are: in bfloat16 and float32, and their gradients.
    assert traced_peak(in_one_piece) > 4 * 3.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_peak_on_a_gpu_is_the_traced_one(compiled: bool) -> None:
    loss, case = CrossEntropySum(), large("cuda")
    if compiled:
        loss.compile_stages()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (loss(*case) / 3).backward()
    # Beside it only the workspace of the matrix products, tens of MiB.
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < 1.75


def test_compiled_stages_change_nothing_and_compile_once_for_each_shape() -> None:
    torch.compiler.reset()
    loss = CrossEntropySum(chunk=10)  # and a last chunk of 4
    loss.compile_stages()
    check(loss, inputs()["some_ignored"], (1e-6, 1e-6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for case in inputs().values():
            check(loss, case, (1e-6, 1e-6))
        with torch.no_grad():
            loss(*inputs()["ordinary"])
