"""The loss on vocabulary shards is the loss on whole logits, value and gradient."""

from typing import Any

import pytest
import torch
from distributed import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from model.loss import IGNORE, CrossEntropySum
from parallel.tensor_parallel import VocabParallelCrossEntropySum

RANKS = 3
BATCH, SEQ, VOCAB = 2, 6, 12  # four entries a rank


def inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and labels by what is special about them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, SEQ, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    holes = labels.clone()
    holes[0, ::2] = IGNORE
    borders = torch.tensor([0, 3, 4, 7, 8, 11]).repeat(BATCH, 1)  # the ends of every shard
    spikes = logits.clone()
    spikes[0, :, 2], spikes[1, :, 9] = 1e4, -1e4
    return {
        "ordinary": (logits, labels),
        "some_ignored": (logits, holes),
        "all_ignored": (logits, torch.full_like(labels, IGNORE)),
        "labels_on_borders_of_shards": (logits, borders),
        "extreme": (spikes, labels),
        "far_from_zero": (logits + 3e4, labels),
        "far_apart": (logits * 1e4, labels),
        "bf16": (logits.bfloat16(), holes),
    }


def sharded() -> dict[str, tuple[Tensor, Tensor]]:
    """Loss, and this rank's part of the gradient of three times the loss."""
    mesh = init_device_mesh("cpu", (RANKS,))
    module = VocabParallelCrossEntropySum(mesh)
    found = {}
    for name, (logits, labels) in inputs().items():
        local = logits.chunk(RANKS, dim=-1)[mesh.get_local_rank()].clone().requires_grad_()
        loss = module(DTensor.from_local(local, mesh, [Shard(2)]), labels)
        (3 * loss).backward()
        assert local.grad is not None
        found[name] = loss.detach(), local.grad
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, tuple[Tensor, Tensor]]]:
    return on_ranks(RANKS, sharded)


@pytest.mark.parametrize("name", inputs())
def test_vocabulary_shards_give_the_loss_and_gradient_of_whole_logits(
    found: Any, name: str
) -> None:
    logits, labels = inputs()[name]
    logits.requires_grad_()
    expected = CrossEntropySum()(logits, labels)
    (3 * expected).backward()
    for by_name in found:
        assert by_name[name][0].dtype == torch.float32
        # Another order of a dozen float32 sums; an error of a label or a shard is of order 1.
        torch.testing.assert_close(by_name[name][0], expected.detach(), rtol=1e-6, atol=1e-5)
    gradient = torch.cat([by_name[name][1] for by_name in found], dim=-1)
    assert logits.grad is not None and gradient.dtype == logits.dtype
    # bf16 keeps 8 bits, so that a last bit of float32 may turn one of its own.
    tolerance = 2**-7 if name == "bf16" else 1e-6
    torch.testing.assert_close(gradient, logits.grad, rtol=tolerance, atol=1e-6)


def test_every_rank_has_the_same_loss_bit_for_bit(found: Any) -> None:
    for name in inputs():
        assert len({by_name[name][0].item() for by_name in found}) == 1
