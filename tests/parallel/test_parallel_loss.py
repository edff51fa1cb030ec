"""Head and loss on shards of the vocabulary are those of one process, value and gradients."""

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
BATCH, SEQ, DIM, VOCAB = 2, 6, 5, 12  # four entries a rank
CHUNK = 5  # of 12 tokens, so that the last chunk is shorter
FACTOR = 3.0  # what the loss is multiplied by before its backward
WAYS = ("sharded", "gathered", "compiled")


def inputs() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, weight and labels by what is special about them; the logits are exact."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-8, 9, (BATCH, SEQ, DIM), generator=generator) / 8
    weight = torch.randint(-8, 9, (VOCAB, DIM), generator=generator) / 8
    hidden[..., 0] = 1
    weight[:, 0] = 0
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    holes = labels.clone()
    holes[0, ::2] = IGNORE
    borders = torch.tensor([0, 3, 4, 7, 8, 11]).repeat(BATCH, 1)  # the ends of every shard
    spikes = weight.clone()
    spikes[2, 0], spikes[9, 0] = 2**13, -(2**13)
    return {
        "ordinary": (hidden, weight, labels),
        "some_ignored": (hidden, weight, holes),
        "all_ignored": (hidden, weight, torch.full_like(labels, IGNORE)),
        "labels_on_borders_of_shards": (hidden, weight, borders),
        "extreme": (hidden, spikes, labels),
        "far_apart": (hidden * 2**12, weight, labels),
        "bf16": (hidden.bfloat16(), weight.bfloat16(), holes),
    }


Found = tuple[Tensor, Tensor, Tensor]  # the loss and the two gradients, whole


def on_shards(
    module: VocabParallelCrossEntropySum, mesh: DeviceMesh, name: str, layout: Shard | Replicate
) -> Found:
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


class Sent(TorchDispatchMode):
    """Kind and bytes of each collective call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come here
        name = func.overloadpacket.__name__.strip("_")
        if "c10d" in func.namespace and ("reduce" in name or "gather" in name):
            sends = args[1] if name == "allgather" else args[0]
            while isinstance(sends, list | tuple):
                sends = sends[0]
            self.calls.append((name, sends.nbytes))
        return func(*args, **(kwargs or {}))


def on_rank() -> tuple[dict[tuple[str, str, str], Found], dict[str, list[tuple[str, int]]]]:
    """Findings by way, layout of the hidden states and case; what a way sends in a step."""
    torch._inductor.config.compile_threads = 1  # a daemonic process has no children
    mesh = init_device_mesh("cpu", (RANKS,))
    found, sent = {}, {}
    for way in WAYS:
        gathered = way == "gathered"
        module = VocabParallelCrossEntropySum(
            GatheredVocabulary(mesh) if gathered else ShardedVocabulary(mesh, VOCAB)
        )
        module.chunk = CHUNK
        if way == "compiled":
            module.compile_stages()
        for name in inputs():
            found[way, "whole", name] = on_shards(module, mesh, name, Replicate())
            found[way, "cut", name] = on_shards(module, mesh, name, Shard(1))
        if way != "compiled":  # which no dispatch mode can watch
            hidden, weight, labels = inputs()["ordinary"]
            cut = distribute_tensor(hidden, mesh, [Shard(1)]).requires_grad_()
            head = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
            with Sent() as calls:
                module(cut, head, labels).backward()
            sent[way] = calls.calls
    return found, sent


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return on_ranks(RANKS, on_rank)


@pytest.mark.parametrize("layout", ["whole", "cut"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", inputs())
def test_vocabulary_shards_give_loss_and_gradients_of_whole_logits(
    ranks: Any, way: str, layout: str, name: str
) -> None:
    hidden, weight, labels = inputs()[name]
    logits = F.linear(hidden, weight).double().flatten(0, 1).requires_grad_()
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    (expected * FACTOR).backward()
    assert logits.grad is not None
    right = weight.double(), hidden.double().flatten(0, 1)
    left = logits.grad, logits.grad.T
    # bf16: half of the last of 8 bits, of the logits' gradient, the product, its sum over three
    # ranks or three chunks, and its scaling. float32: sums of a dozen; p - 1 is rounded as 1 is.
    relative, absolute = (6 * 2**-9, 0.0) if name == "bf16" else (1e-6, 1e-6)
    for found, _ in ranks:
        loss, *gradients = found[way, layout, name]
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        for gradient, a, b in zip(gradients, left, right, strict=True):
            size = ((a.abs() @ b.abs()) * relative).max() + b.abs().max() * absolute
            error = gradient.double().view(-1, DIM) - a @ b
            assert error.abs().max() <= size


@pytest.mark.parametrize("way", WAYS)
def test_every_rank_has_the_same_loss_bit_for_bit(ranks: Any, way: str) -> None:
    for name in inputs():
        assert len({found[way, "cut", name][0].item() for found, _ in ranks}) == 1


def test_a_chunk_sends_three_numbers_a_token_or_its_local_logits(ranks: Any) -> None:
    """In forward alone; around it the hidden states are gathered, and their gradients reduced."""
    rows = (5, 5, 2)
    expected = {
        "sharded": [("allreduce", 4 * n * numbers) for n in rows for numbers in (1, 2)],
        "gathered": [("allgather", 4 * n * VOCAB // RANKS) for n in rows],
    }
    own = BATCH * SEQ * DIM * 4  # bytes of the whole hidden states
    for _, sent in ranks:
        for way, calls in expected.items():
            assert sent[way] == [
                ("all_gather_into_tensor", own // RANKS),
                *calls,
                ("reduce_scatter_tensor", own),
            ]
