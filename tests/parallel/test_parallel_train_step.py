"""Weights, loss, gradients, norm and optimizer steps on any mesh match one process.

`train_step` of train.py runs on each mesh through Fabric and `MeshStrategy`. The reference is a
plain loop on the unsharded model with PyTorch's gradient clipping.
"""

from functools import cache
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from small_run import (
    BATCH,
    OPTIM,
    SEED,
    STEPS,
    Case,
    batch,
    build,
    local_batches,
    model_config,
    of_all_stages,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.init import initialize
from model.llama import Llama
from model.loss import IGNORE
from train import train_step
from training.optimizer import build_optimizer

CASES = [
    *(Case(tied=tied) for tied in (False, True)),
    *(Case(dp=2, tied=tied) for tied in (False, True)),
    Case(dp=2, n_micro=1),
    *(
        Case(tp=2, sequence_parallel=sequence, loss_parallel=loss)
        for sequence in (True, False)
        for loss in (True, False)
    ),
    Case(tp=2, tied=True),
    Case(dp=3),
    *(Case(dp=2, tp=2, tied=tied, n_layers=2) for tied in (False, True)),
    Case(dp=2, tp=2, sequence_parallel=False, loss_parallel=False, max_norm=1e6),
    Case(dp=3, tp=2, tied=True),
    Case(cp=2, tp=2, tied=True, sequence_parallel=False, loss_parallel=False, n_layers=2),
    Case(dp_replicate=2, dp=2, tied=True, n_layers=2, n_micro=1, reshard_after_forward=True),
    Case(dp_replicate=2, dp=2, tied=True, n_layers=2, n_micro=3, reduce_gradients="micro_batch"),
    Case(dp_replicate=2, cp=2, tied=True, n_layers=2, activation_checkpoint="full"),
    Case(dp_replicate=2, n_layers=2, n_micro=3, reduce_gradients="micro_batch"),
    Case(dp=2, n_layers=2, n_micro=3, reshard_after_forward=False),
    *(Case(pp=2, tied=tied, n_micro=n) for tied in (False, True) for n in (1, 3)),
    *(Case(pp=2, pp_parts=2, tied=tied, n_layers=5, n_micro=4) for tied in (False, True)),
    Case(pp=3, tied=True, n_layers=3, n_micro=4),
    Case(pp=2, dp=2, tied=True, n_layers=2, n_micro=3),
    Case(pp=2, tp=2, n_layers=2, tied=True, n_micro=3),
    Case(pp=2, cp=2, n_layers=2, tied=True, n_micro=3, activation_checkpoint="full"),
    Case(pp=2, dp_replicate=2, n_layers=2, n_micro=3, reduce_gradients="micro_batch"),
    Case(pp=2, pp_parts=2, dp=2, n_layers=4, n_micro=2, reshard_after_forward=True),
    Case(pp=2, pp_parts=2, dp_replicate=2, n_layers=4, n_micro=2, reduce_gradients="micro_batch"),
]


# ---------------------------------------------------------------- on the ranks


def run_case(case: Case) -> dict[str, Any]:
    """Train and return statistics, and weights and gradients as full tensors."""
    run = build(case)
    record: dict[str, Any] = {"loss": [], "norm": [], "hash": []}
    record["initial"] = of_all_stages(run.llama.named_parameters())
    clipped: list[dict[str, Tensor]] = []

    def record_gradients(*_: Any) -> None:
        if not clipped:
            gradients = ((name, p.grad) for name, p in run.llama.named_parameters())
            clipped.append(of_all_stages(gradients))

    run.adamw.register_step_pre_hook(record_gradients)
    for step in range(STEPS):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        tensors = train_step(cast(Any, run), batches, OPTIM.lr)
        loss, norm, *_ = tensors["scalars"].tolist()
        record["loss"].append(loss)
        record["norm"].append(norm)
        record["hash"].append(tensors["batch_hash"].item())
    record["gradients"] = clipped[0]
    record["final"] = of_all_stages(run.llama.named_parameters())
    if len({"output", "tok_embeddings"} & vars(run.llama)["_modules"].keys()) == 2:
        record["tied"] = run.llama.output.weight is run.llama.tok_embeddings.weight
    record |= without_gradients(run.model, run.strategy.pipeline)
    return record


@torch.no_grad()
def without_gradients(model: Any, pipeline: Any = None) -> dict[str, Tensor]:
    """Return the loss (as in validation) and the logits (as in sampling) of one row."""
    tokens, positions, labels = (field[:1] for field in batch(STEPS))
    logits = model(tokens)  # (batch, seq, vocab)
    loss = model(tokens, positions, labels)
    if pipeline is not None:
        pipeline.broadcast_from_last(loss)
    return {
        "validation_loss": loss,
        "logits": logits.full_tensor() if isinstance(logits, DTensor) else logits,
    }


def run_cases(cases: list[Case]) -> dict[Case, dict[str, Any]]:
    return {case: run_case(case) for case in cases}


# ---------------------------------------------------------------- on one process


@cache
def reference(tied: bool, n_layers: int, max_norm: float) -> dict[str, Any]:
    """Run the same steps on the unsharded model without micro-batches, with PyTorch only."""
    config = model_config(tied, n_layers)
    model = Llama(config)
    initialize(model, config, SEED)
    adamw = build_optimizer(model, OPTIM)
    record: dict[str, Any] = {"loss": [], "norm": []}
    record["initial"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(STEPS):
        tokens, positions, labels = batch(step)
        loss = model(tokens, positions, labels) / (labels != IGNORE).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        grads = {n: cast(Tensor, p.grad).clone() for n, p in model.named_parameters()}
        record.setdefault("gradients", grads)
        adamw.step()
        adamw.zero_grad()
        record["loss"].append(loss.item())
        record["norm"].append(norm.item())
    record["final"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return record | without_gradients(model)


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, Any]]]:
    """Return the results of each case by rank, with one launch per number of processes."""
    by_case: dict[Case, list[dict[str, Any]]] = {}
    for world in sorted({case.world for case in CASES}):
        cases = [case for case in CASES if case.world == world]
        ranks = on_ranks(world, run_cases, cases)
        by_case |= {case: [rank[case] for rank in ranks] for case in cases}
    return by_case


def name_of(case: Case) -> str:
    names = [f"mesh{''.join(map(str, case.mesh.sizes))}", f"micro{case.n_micro}"]
    names += [f"parts{case.pp_parts}"] * (case.pp > 1)
    names += [name for name in ("tied", "sequence_parallel", "loss_parallel") if vars(case)[name]]
    return "-".join([*names, f"clip{case.max_norm:g}"])


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


@every_case
def test_initial_weights_are_bit_identical_to_one_process(results: Any, case: Case) -> None:
    expected = reference(case.tied, case.n_layers, case.max_norm)["initial"]
    for result in results[case]:
        assert result["initial"].keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(result["initial"][name], weight), name


@every_case
def test_loss_and_norm_match_one_process(results: Any, case: Case) -> None:
    """A sum in a different order rounds differently: a few float32 ulps of 1e-7."""
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for result in results[case]:
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert result["norm"] == pytest.approx(expected["norm"], rel=3e-6)
        assert result["hash"] == [case.mesh.dp * (case.mesh.dp + 1) // 2] * STEPS
        assert result.get("tied", case.tied) == case.tied
    assert (min(expected["norm"]) > case.max_norm) == (case.max_norm < 1e6)


@every_case
def test_clipped_gradients_match_one_process(results: Any, case: Case) -> None:
    """Elements are sums of much larger terms, so the error is relative to the largest element."""
    expected = reference(case.tied, case.n_layers, case.max_norm)["gradients"]
    for result in results[case]:
        for name, gradient in expected.items():
            worst = (result["gradients"][name] - gradient).abs().max()
            assert worst <= 1e-5 * gradient.abs().max(), (name, worst)


@every_case
def test_weights_after_adamw_steps_match_one_process(results: Any, case: Case) -> None:
    """A step changes matrices by 5e-4 and more, vectors of norms by 5e-5.

    Missing weight decay alone, which matrices have, would be 1e-4.
    """
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for result in results[case]:
        for name, weight in expected["final"].items():
            torch.testing.assert_close(result["final"][name], weight, rtol=0, atol=1e-6)
            change = (weight - expected["initial"][name]).abs().max()
            assert change > (5e-4 if weight.ndim == 2 else 5e-5)


@every_case
def test_validation_loss_and_logits_match_one_process(results: Any, case: Case) -> None:
    """Weights differ by at most 1e-6 (see above), and a logit is a sum of dim such terms."""
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for result in results[case]:
        for key, rtol, atol in (("validation_loss", 1e-6, 0.0), ("logits", 0.0, 1e-5)):
            torch.testing.assert_close(result[key], expected[key], rtol=rtol, atol=atol)


def test_batch_has_packed_documents_masked_labels_and_unequal_targets_per_rank() -> None:
    for size in (2, 3):
        counts = [local_batches(batch(0), rank, size, 1).n_targets for rank in range(size)]
        assert len(set(counts)) == size
    _, positions, labels = batch(0)
    assert ((positions[:, 1:] == 0).sum(dim=1) == 1).sum() > BATCH // 2
    assert (labels == IGNORE).any()
