"""What a rank holds and sends in a step: reductions, logits, number formats."""

from functools import partial
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from small_run import BATCH, OPTIM, SEED, SEQ, VOCAB, Case, batch, build, local_batches
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.init import initialize
from model.llama import Llama
from parallel.parallelize import local_block
from train import train_step

CHUNK = 45  # tokens of which the loss holds logits; above dim, the rows of the weight transposed


class Watch(TorchDispatchMode):
    """Sees every local operation: counts reduce-scatters, notes how many rows logits have."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce_scatters = 0
        self.logits: dict[int, int] = {}  # by their vocab, the most rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        self.reduce_scatters += "reduce_scatter" in str(func)
        real = isinstance(out, Tensor) and not isinstance(out, FakeTensor)  # shapes are tried out
        if real and out.ndim >= 2 and out.shape[-1] in (VOCAB, VOCAB // 2):
            rows = out.numel() // out.shape[-1]
            self.logits[out.shape[-1]] = max(rows, self.logits.get(out.shape[-1], 0))
        return out


def held_and_sent() -> dict[str, Any]:
    """On dp_shard=2: reductions of a step by its number of micro-batches, and after each exit."""
    run = build(Case(dp=2, n_layers=2))
    each = build(Case(dp=2, n_layers=2, reduce_gradients="micro_batch"))

    def reductions(n_micro: int, run: Any = run) -> int:
        with Watch() as watch:
            train_step(cast(Any, run), local_batches(batch(0), run.data_rank, 2, n_micro), OPTIM.lr)
        return watch.reduce_scatters

    def reductions_after(enabled: bool) -> tuple[int, int]:
        tokens, positions, labels = local_batches(batch(0), run.data_rank, 2, 1).micro_batches[0]
        with Watch() as inside, run.fabric.no_backward_sync(run.model, enabled=enabled):
            run.fabric.backward(run.model(tokens, positions, labels))
        with Watch() as outside:
            run.fabric.backward(run.model(tokens, positions, labels))
        run.optimizer.zero_grad()
        return inside.reduce_scatters, outside.reduce_scatters

    return {
        "one": reductions(1),
        "six": reductions(6),
        "each_of_six": reductions(6, each),
        "with": reductions_after(enabled=True),
        "without": reductions_after(enabled=False),
        "groups": len(run.llama.layers) + 1,
    }


@pytest.fixture(scope="module")
def sent() -> dict[str, Any]:
    return on_ranks(2, held_and_sent)[0]


def test_a_step_reduces_once_however_many_micro_batches_it_has(sent: dict[str, Any]) -> None:
    """One reduce-scatter for each block and one for what lies around them."""
    assert sent["one"] == sent["six"] == sent["groups"]


def test_a_step_reduces_with_each_micro_batch_where_that_is_asked_for(sent: dict[str, Any]) -> None:
    assert sent["each_of_six"] == 6 * sent["groups"]


def test_synchronisation_is_on_after_no_backward_sync(sent: dict[str, Any]) -> None:
    groups = sent["groups"]
    assert sent["with"] == (0, groups)
    assert sent["without"] == (groups, groups)


class Copies(TorchDispatchMode):
    """Counts copies of whole groups of gradients, and casts of weights, by numbers of elements."""

    def __init__(self, groups: set[int], weight: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, weight
        self.of_groups = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops.aten.copy_.default and args[0].numel() in self.groups:
            self.of_groups += args[0] is not args[1]
        if func is torch.ops.aten._to_copy.default and args[0].numel() == self.weight:
            self.casts += kwargs["dtype"] == torch.bfloat16
        return func(*args, **(kwargs or {}))


def copies_of_one_shard() -> tuple[int, int, int]:
    """In a step of three micro-batches: copies of gradients, casts of some weights, how many."""
    run = build(Case(tp=2, param="bf16", n_layers=2))
    block = run.llama.layers[0]
    weight = size(block.feed_forward.w1.weight)
    weights = [p for p in run.llama.parameters() if size(p) == weight]
    in_blocks = sum(size(p) for p in block.parameters())
    around = sum(size(p) for p in run.llama.parameters()) - 2 * in_blocks
    with Copies({in_blocks, around}, weight) as copies:
        train_step(cast(Any, run), local_batches(batch(0), run.data_rank, 1, 3), OPTIM.lr)
    return copies.of_groups, copies.casts, len(weights)


def size(parameter: Tensor) -> int:
    """Elements of a parameter's local shard."""
    return local_block(parameter)[0].numel()


def test_one_shard_is_cast_once_a_step_and_its_gradients_are_not_copied() -> None:
    of_groups, casts, weights = on_ranks(2, copies_of_one_shard)[0]
    assert of_groups == 0
    assert casts == weights > 1


def logits_held(loss_parallel: bool) -> dict[int, int]:
    """By vocab, the most rows of logits in forward and backward, on dp_shard=2 × tp=2."""
    run = build(Case(dp=2, tp=2, loss_parallel=loss_parallel))
    run.llama.loss.chunk = CHUNK
    tokens, positions, labels = local_batches(batch(0), run.data_rank, 2, 1).micro_batches[0]
    with Watch() as watch:
        run.fabric.backward(run.model(tokens, positions, labels))
    return watch.logits


def both_ways() -> tuple[dict[int, int], dict[int, int]]:
    return logits_held(True), logits_held(False)


def test_no_rank_holds_full_logits_under_loss_parallel_and_never_those_of_a_batch() -> None:
    assert BATCH // 2 * SEQ > CHUNK
    for sharded, gathered in on_ranks(4, both_ways):
        assert sharded == {VOCAB // 2: CHUNK}
        assert gathered == {VOCAB // 2: CHUNK, VOCAB: CHUNK}


def dtypes() -> dict[str, Any]:
    """Number formats under the bf16 policy: what a block and its matrices see in the forward."""
    run = build(Case(dp=2, tp=2, param="bf16"))
    seen: dict[str, Any] = {}

    def block_inputs(_: Any, inputs: Any) -> None:
        seen["x"], seen["rotations"] = (each.dtype for each in inputs[:2])

    def weight(name: str, module: Any, _: Any) -> None:
        seen[name] = module.weight.dtype

    def head_weight(_: Any, inputs: Any) -> None:
        seen["output"] = inputs[1].dtype

    for block in run.llama.layers:
        block.attention.register_forward_pre_hook(block_inputs)
    modules = dict(run.llama.named_modules())
    names = [name.removesuffix(".weight") for name, _ in run.llama.named_parameters()]
    for name in names:
        modules[name].register_forward_pre_hook(partial(weight, name))
    run.llama.loss.register_forward_pre_hook(head_weight)
    tokens, positions, labels = local_batches(batch(0), run.data_rank, 2, 1).micro_batches[0]
    loss = run.model(tokens, positions, labels)
    run.fabric.backward(loss)
    exact = Llama(run.llama.config)
    initialize(exact, exact.config, SEED)
    return {
        "seen": seen,
        "names": names,
        "loss": loss.dtype,
        "error": abs(loss.item() / exact(tokens, positions, labels).item() - 1),
        "master": {p.dtype for p in run.llama.parameters()},
        "gradients": {p.grad.dtype for p in run.llama.parameters()},
    }


def test_bf16_policy_computes_in_bf16_and_keeps_masters_gradients_and_rope_in_float32() -> None:
    for found in on_ranks(4, dtypes):
        seen = found["seen"]
        assert {seen[name] for name in found["names"]} == {torch.bfloat16}
        assert seen["x"] == torch.bfloat16
        assert seen["rotations"] == torch.float32
        assert found["loss"] == torch.float32
        assert found["master"] == found["gradients"] == {torch.float32}
        # bf16 has 8 bits: 0.4% an element, less in a mean over many; equal would be no bf16.
        assert 0 < found["error"] < 2**-8
