"""Memory and communication of a step on a rank: reductions, copies, logits and dtypes."""

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

CHUNK = 45  # tokens per chunk of the loss; more than dim, the rows of the transposed weight


class OperationWatcher(TorchDispatchMode):
    """Count reduce-scatters and record the largest number of rows of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce_scatters = 0
        self.logits: dict[int, int] = {}  # size of the vocab dim → largest number of rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches to local operations, which are seen here
        out = func(*args, **(kwargs or {}))
        self.reduce_scatters += "reduce_scatter" in str(func)
        # DTensor propagates shapes with fake tensors.
        real = isinstance(out, Tensor) and not isinstance(out, FakeTensor)
        if real and out.ndim >= 2 and out.shape[-1] in (VOCAB, VOCAB // 2):
            rows = out.numel() // out.shape[-1]
            self.logits[out.shape[-1]] = max(rows, self.logits.get(out.shape[-1], 0))
        return out


def count_reductions() -> dict[str, Any]:
    """Count reduce-scatters on dp_shard=2: per step, and inside and after no_backward_sync."""
    run = build(Case(dp=2, n_layers=2))
    run_per_micro_batch = build(Case(dp=2, n_layers=2, reduce_gradients="micro_batch"))

    def reductions(n_micro: int, run: Any = run) -> int:
        with OperationWatcher() as watch:
            train_step(cast(Any, run), local_batches(batch(0), run.data_rank, 2, n_micro), OPTIM.lr)
        return watch.reduce_scatters

    def reductions_after(enabled: bool) -> tuple[int, int]:
        tokens, positions, labels = local_batches(batch(0), run.data_rank, 2, 1).micro_batches[0]
        with OperationWatcher() as inside, run.fabric.no_backward_sync(run.model, enabled=enabled):
            run.fabric.backward(run.model(tokens, positions, labels))
        with OperationWatcher() as outside:
            run.fabric.backward(run.model(tokens, positions, labels))
        run.optimizer.zero_grad()
        return inside.reduce_scatters, outside.reduce_scatters

    return {
        "one_micro_batch": reductions(1),
        "six_micro_batches": reductions(6),
        "six_micro_batches_each": reductions(6, run_per_micro_batch),
        "no_sync_enabled": reductions_after(enabled=True),
        "no_sync_disabled": reductions_after(enabled=False),
        "groups": len(run.llama.layers) + 1,
    }


@pytest.fixture(scope="module")
def reductions() -> dict[str, Any]:
    return on_ranks(2, count_reductions)[0]


def test_gradients_are_reduced_once_per_step_for_any_number_of_micro_batches(
    reductions: dict[str, Any],
) -> None:
    """There is one reduce-scatter per block and one for the remaining parameters."""
    assert reductions["one_micro_batch"] == reductions["groups"]
    assert reductions["six_micro_batches"] == reductions["groups"]


def test_reduce_gradients_micro_batch_reduces_once_per_micro_batch(
    reductions: dict[str, Any],
) -> None:
    assert reductions["six_micro_batches_each"] == 6 * reductions["groups"]


def test_gradient_sync_is_restored_after_no_backward_sync(reductions: dict[str, Any]) -> None:
    groups = reductions["groups"]
    assert reductions["no_sync_enabled"] == (0, groups)
    assert reductions["no_sync_disabled"] == (groups, groups)


class CopyCounter(TorchDispatchMode):
    """Count copies of full gradient groups and casts of weights, identified by element count."""

    def __init__(self, groups: set[int], weight: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, weight
        self.group_copies = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is torch.ops.aten.copy_.default and args[0].numel() in self.groups:
            self.group_copies += args[0] is not args[1]
        if func is torch.ops.aten._to_copy.default and args[0].numel() == self.weight:
            self.casts += kwargs["dtype"] == torch.bfloat16
        return func(*args, **(kwargs or {}))


def copies_in_a_step() -> tuple[int, int, int]:
    """Count gradient copies, weight casts and weights in a step of three micro-batches."""
    run = build(Case(tp=2, param="bf16", n_layers=2))
    block = run.llama.layers[0]
    weight = local_numel(block.feed_forward.w1.weight)
    weights = [p for p in run.llama.parameters() if local_numel(p) == weight]
    in_block = sum(local_numel(p) for p in block.parameters())
    outside_blocks = sum(local_numel(p) for p in run.llama.parameters()) - 2 * in_block
    with CopyCounter({in_block, outside_blocks}, weight) as counter:
        train_step(cast(Any, run), local_batches(batch(0), run.data_rank, 1, 3), OPTIM.lr)
    return counter.group_copies, counter.casts, len(weights)


def local_numel(parameter: Tensor) -> int:
    return local_block(parameter)[0].numel()


def test_without_data_sharding_weights_are_cast_once_per_step_and_gradients_not_copied() -> None:
    group_copies, casts, n_weights = on_ranks(2, copies_in_a_step)[0]
    assert group_copies == 0
    assert casts == n_weights > 1


def logits_rows(loss_parallel: bool) -> dict[int, int]:
    """Return the largest number of rows of logits by size of the vocab dim (dp_shard=2 × tp=2)."""
    run = build(Case(dp=2, tp=2, loss_parallel=loss_parallel))
    run.llama.loss.chunk = CHUNK
    tokens, positions, labels = local_batches(batch(0), run.data_rank, 2, 1).micro_batches[0]
    with OperationWatcher() as watch:
        run.fabric.backward(run.model(tokens, positions, labels))
    return watch.logits


def logits_rows_sharded_and_gathered() -> tuple[dict[int, int], dict[int, int]]:
    return logits_rows(True), logits_rows(False)


def test_logits_are_limited_to_one_chunk_and_stay_sharded_under_loss_parallel() -> None:
    assert BATCH // 2 * SEQ > CHUNK
    for sharded, gathered in on_ranks(4, logits_rows_sharded_and_gathered):
        assert sharded == {VOCAB // 2: CHUNK}
        assert gathered == {VOCAB // 2: CHUNK, VOCAB: CHUNK}


def dtypes() -> dict[str, Any]:
    """Return the dtypes of inputs, weights, loss and gradients under the bf16 policy."""
    run = build(Case(dp=2, tp=2, param="bf16"))
    seen: dict[str, Any] = {}

    def record_block_inputs(_: Any, inputs: Any) -> None:
        seen["x"], seen["rotations"] = (each.dtype for each in inputs[:2])

    def record_weight(name: str, module: Any, _: Any) -> None:
        seen[name] = module.weight.dtype

    def record_head_weight(_: Any, inputs: Any) -> None:
        seen["output"] = inputs[1].dtype

    for block in run.llama.layers:
        block.attention.register_forward_pre_hook(record_block_inputs)
    modules = dict(run.llama.named_modules())
    names = [name.removesuffix(".weight") for name, _ in run.llama.named_parameters()]
    for name in names:
        modules[name].register_forward_pre_hook(partial(record_weight, name))
    run.llama.loss.register_forward_pre_hook(record_head_weight)
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


def test_bf16_policy_computes_in_bf16_with_float32_masters_gradients_and_rope() -> None:
    for result in on_ranks(4, dtypes):
        seen = result["seen"]
        assert {seen[name] for name in result["names"]} == {torch.bfloat16}
        assert seen["x"] == torch.bfloat16
        assert seen["rotations"] == torch.float32
        assert result["loss"] == torch.float32
        assert result["master"] == result["gradients"] == {torch.float32}
        # bf16 has 8 bits: 0.4% per element, less in a mean over many. An error of zero would mean
        # that nothing was computed in bf16.
        assert 0 < result["error"] < 2**-8
