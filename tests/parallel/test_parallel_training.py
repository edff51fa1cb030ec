"""A mesh changes nothing: weights, loss, gradients, norm and step are those of one process.

`train_step` of the program runs on every mesh, through Fabric and `MeshStrategy`; beside it a plain
loop on the unsharded model, with torch's own clipping.
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
    full_tensor,
    local_batches,
    model_config,
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
]


# ---------------------------------------------------------------- on the ranks


def run_case(case: Case) -> dict[str, Any]:
    """Trains, and tells everything as whole tensors."""
    run = build(case)
    found: dict[str, Any] = {"loss": [], "norm": [], "hash": []}
    found["initial"] = {name: full_tensor(p) for name, p in run.llama.named_parameters()}
    clipped: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        if not clipped:
            clipped.append({n: full_tensor(p.grad) for n, p in run.llama.named_parameters()})

    run.adamw.register_step_pre_hook(note)
    for step in range(STEPS):
        batches = local_batches(batch(step), run.data_rank, case.mesh.dp, case.n_micro)
        tensors = train_step(cast(Any, run), batches, OPTIM.lr)
        loss, norm, *_ = tensors["scalars"].tolist()
        found["loss"].append(loss)
        found["norm"].append(norm)
        found["hash"].append(tensors["batch_hash"].item())
    found["gradients"] = clipped[0]
    found["final"] = {name: full_tensor(p) for name, p in run.llama.named_parameters()}
    found["tied"] = run.llama.output.weight is run.llama.tok_embeddings.weight
    found |= without_gradients(run.model)
    return found


@torch.no_grad()
def without_gradients(model: Any) -> dict[str, Tensor]:
    """What validation and sampling ask for, each a row: the loss, and logits of whole rows."""
    tokens, positions, labels = (field[:1] for field in batch(STEPS))
    logits = model(tokens)  # (batch, seq, vocab)
    return {
        "held_out": model(tokens, positions, labels),
        "logits": logits.full_tensor() if isinstance(logits, DTensor) else logits,
    }


def run_cases(chosen: list[Case]) -> dict[Case, dict[str, Any]]:
    return {case: run_case(case) for case in chosen}


# ---------------------------------------------------------------- on one process


@cache
def reference(tied: bool, n_layers: int, max_norm: float) -> dict[str, Any]:
    """The same steps on the unsharded model, the batch in one piece, with torch's own parts."""
    config = model_config(tied, n_layers)
    model = Llama(config)
    initialize(model, config, SEED)
    adamw = build_optimizer(model, OPTIM)
    found: dict[str, Any] = {"loss": [], "norm": []}
    found["initial"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(STEPS):
        tokens, positions, labels = batch(step)
        loss = model(tokens, positions, labels) / (labels != IGNORE).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        grads = {n: cast(Tensor, p.grad).clone() for n, p in model.named_parameters()}
        found.setdefault("gradients", grads)
        adamw.step()
        adamw.zero_grad()
        found["loss"].append(loss.item())
        found["norm"].append(norm.item())
    found["final"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found | without_gradients(model)


@pytest.fixture(scope="module")
def results() -> dict[Case, list[dict[str, Any]]]:
    """The findings of each case by rank; one launch for each number of processes."""
    found: dict[Case, list[dict[str, Any]]] = {}
    for world in sorted({case.world for case in CASES}):
        chosen = [case for case in CASES if case.world == world]
        ranks = on_ranks(world, run_cases, chosen)
        found |= {case: [by_case[case] for by_case in ranks] for case in chosen}
    return found


def name_of(case: Case) -> str:
    names = [f"mesh{''.join(map(str, case.mesh.sizes))}", f"micro{case.n_micro}"]
    names += [name for name in ("tied", "sequence_parallel", "loss_parallel") if vars(case)[name]]
    return "-".join([*names, f"clip{case.max_norm:g}"])


every_case = pytest.mark.parametrize("case", CASES, ids=name_of)


@every_case
def test_initial_weights_are_bit_for_bit_those_of_one_process(results: Any, case: Case) -> None:
    expected = reference(case.tied, case.n_layers, case.max_norm)["initial"]
    for found in results[case]:
        assert found["initial"].keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found["initial"][name], weight), name


@every_case
def test_mesh_changes_neither_loss_nor_norm(results: Any, case: Case) -> None:
    """A sum in another order rounds differently: a few float32 units, 1e-7 each."""
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for found in results[case]:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["norm"] == pytest.approx(expected["norm"], rel=3e-6)
        assert found["hash"] == [case.mesh.dp * (case.mesh.dp + 1) // 2] * STEPS
        assert found["tied"] == case.tied
    assert (min(expected["norm"]) > case.max_norm) == (case.max_norm < 1e6)


@every_case
def test_mesh_changes_no_clipped_gradient(results: Any, case: Case) -> None:
    """Elements are sums of terms much larger than themselves, so the unit is the largest one."""
    expected = reference(case.tied, case.n_layers, case.max_norm)["gradients"]
    for found in results[case]:
        for name, gradient in expected.items():
            worst = (found["gradients"][name] - gradient).abs().max()
            assert worst <= 1e-5 * gradient.abs().max(), (name, worst)


@every_case
def test_mesh_changes_no_weight_after_adamw_steps(results: Any, case: Case) -> None:
    """A step moves weights by 1e-3 and more; lost decay alone is 1e-4."""
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for found in results[case]:
        for name, weight in expected["final"].items():
            torch.testing.assert_close(found["final"][name], weight, rtol=0, atol=1e-6)
            assert (weight - expected["initial"][name]).abs().max() > 1e-4


@every_case
def test_mesh_changes_nothing_that_is_computed_without_gradients(results: Any, case: Case) -> None:
    """Weights differ by 1e-6 at most, see above, and a logit is a sum over dim of them."""
    expected = reference(case.tied, case.n_layers, case.max_norm)
    for found in results[case]:
        torch.testing.assert_close(found["held_out"], expected["held_out"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)


def test_reference_batch_has_what_it_claims() -> None:
    """Packed documents, masked labels, and numbers of targets that differ between the ranks."""
    for size in (2, 3):
        counts = [local_batches(batch(0), rank, size, 1).n_targets for rank in range(size)]
        assert len(set(counts)) == size
    _, positions, labels = batch(0)
    assert ((positions[:, 1:] == 0).sum(dim=1) == 1).sum() > BATCH // 2
    assert (labels == IGNORE).any()
