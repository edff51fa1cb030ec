"""Vocab-parallel output projection and loss match one process in value and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.loss import IGNORE
from parallel.tensor_parallel import (
    GatheredVocabulary,
    ShardedVocabulary,
    VocabParallelCrossEntropySum,
)

RANKS = 3
BATCH, SEQ, DIM, VOCAB = 2, 6, 5, 12  # four vocabulary entries per rank
CHUNK = 5  # for 12 tokens, so that the last chunk is shorter
FACTOR = 3.0  # multiplies the loss before backward
VARIANTS = ("sharded", "gathered", "compiled")


def inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return hidden states, weight and labels of each test case; the logits are exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-8, 9, (BATCH, SEQ, DIM), generator=generator) / 8
    weight = torch.randint(-8, 9, (VOCAB, DIM), generator=generator) / 8
    hidden[..., 0] = 1
    weight[:, 0] = 0
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    holes = labels.clone()
    holes[0, ::2] = IGNORE
    borders = torch.tensor([0, 3, 4, 7, 8, 11]).repeat(BATCH, 1)  # first and last of each shard
    extreme = weight.clone()
    extreme[2, 0], extreme[9, 0] = 2**13, -(2**13)
    return {
        "ordinary": (hidden, weight, labels),
        "some_ignored": (hidden, weight, holes),
        "all_ignored": (hidden, weight, torch.full_like(labels, IGNORE)),
        "labels_on_borders_of_shards": (hidden, weight, borders),
        "extreme": (hidden, extreme, labels),
        "logits_far_apart": (hidden * 2**12, weight, labels),
        "bf16": (hidden.bfloat16(), weight.bfloat16(), holes),
    }


Result = tuple[Tensor, Tensor, Tensor]  # the loss and the full gradients of hidden and weight


def on_shards(
    module: VocabParallelCrossEntropySum, mesh: DeviceMesh, name: str, layout: Shard | Replicate
) -> Result:
    hidden, weight, labels = inputs()[name]
    leaves = [
        distribute_tensor(hidden, mesh, [layout]).requires_grad_(),
        distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(),
    ]
    loss = module(*leaves, labels)
    (loss * FACTOR).backward()
    gradients = []
    for leaf in leaves:
        assert isinstance(leaf.grad, DTensor) and leaf.grad.dtype == leaf.dtype
        gradients.append(leaf.grad.full_tensor())
    return loss.detach(), gradients[0], gradients[1]


class CollectiveRecorder(TorchDispatchMode):
    """Record kind and bytes of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches to local operations, which are seen here
        name = func.overloadpacket.__name__.strip("_")
        if "c10d" in func.namespace and ("reduce" in name or "gather" in name):
            buffer = args[1] if name == "allgather" else args[0]
            while isinstance(buffer, list | tuple):
                buffer = buffer[0]
            self.calls.append((name, buffer.nbytes))
        return func(*args, **(kwargs or {}))


def on_rank() -> tuple[dict[tuple[str, str, str], Result], dict[str, list[tuple[str, int]]]]:
    """Return results by variant, layout of hidden states and case, and collectives by variant."""
    torch._inductor.config.compile_threads = 1  # a daemonic process cannot start children
    mesh = init_device_mesh("cpu", (RANKS,))
    results, sent = {}, {}
    for variant in VARIANTS:
        gathered = variant == "gathered"
        module = VocabParallelCrossEntropySum(
            vocabulary=GatheredVocabulary(mesh) if gathered else ShardedVocabulary(mesh, VOCAB)
        )
        module.chunk = CHUNK
        if variant == "compiled":
            module.compile_stages()
        for name in inputs():
            results[variant, "replicated", name] = on_shards(module, mesh, name, Replicate())
            results[variant, "sharded", name] = on_shards(module, mesh, name, Shard(1))
        if variant != "compiled":  # dispatch modes do not see compiled code
            hidden, weight, labels = inputs()["ordinary"]
            sharded = distribute_tensor(hidden, mesh, [Shard(1)]).requires_grad_()
            head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
            with CollectiveRecorder() as recorder:
                module(sharded, head, labels).backward()
            sent[variant] = recorder.calls
    return results, sent


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return on_ranks(RANKS, on_rank)


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", inputs())
def test_vocab_parallel_loss_and_gradients_match_full_logits(
    ranks: Any, variant: str, layout: str, name: str
) -> None:
    hidden, weight, labels = inputs()[name]
    logits = F.linear(hidden, weight).double().flatten(0, 1).requires_grad_()
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected * FACTOR).backward()
    assert logits.grad is not None
    right = weight.double(), hidden.double().flatten(0, 1)
    left = logits.grad, logits.grad.T
    # bf16: half of the last of 8 bits for the gradient of the logits, the product, its sum over
    # three ranks or three chunks, and its scaling. float32: sums of a dozen terms; p - 1 has the
    # absolute rounding error of 1.
    relative, absolute = (6 * 2**-9, 0.0) if name == "bf16" else (1e-6, 1e-6)
    for results, _ in ranks:
        loss, *gradients = results[variant, layout, name]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        for gradient, a, b in zip(gradients, left, right, strict=True):
            size = ((a.abs() @ b.abs()) * relative).max() + b.abs().max() * absolute
            error = gradient.double().view(-1, DIM) - a @ b
            assert error.abs().max() <= size


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_bit_identical_on_all_ranks(ranks: Any, variant: str) -> None:
    for name in inputs():
        assert len({results[variant, "sharded", name][0].item() for results, _ in ranks}) == 1


def test_a_chunk_sends_three_numbers_per_token_or_its_local_logits(ranks: Any) -> None:
    """Only the forward sends per chunk; hidden states are gathered once, gradients reduced once."""
    rows = (5, 5, 2)
    expected = {
        "sharded": [("allreduce", 4 * n * numbers) for n in rows for numbers in (1, 2)],
        "gathered": [("allgather", 4 * n * VOCAB // RANKS) for n in rows],
    }
    n_bytes = BATCH * SEQ * DIM * 4  # of the full hidden states
    for _, sent in ranks:
        for variant, calls in expected.items():
            assert sent[variant] == [
                ("all_gather_into_tensor", n_bytes // RANKS),
                *calls,
                ("reduce_scatter_tensor", n_bytes),
            ]
