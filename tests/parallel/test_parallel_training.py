"""A mesh changes nothing: weights, loss, gradients, norm and step are those of one process.

`train_step` of the program runs on every mesh, through Fabric and `MeshStrategy`; beside it a plain
loop on the unsharded model, with torch's own clipping. Dims that neither 3 nor 3·2 divides make the
shards uneven; packed documents, masked labels and a rank with few targets make the batch so.
"""

import math
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from distributed import on_ranks
from lightning.fabric import Fabric
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.loader import Batch, StepBatches
from model.config import ModelConfig
from model.init import initialize
from model.llama import Llama
from model.loss import IGNORE
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from parallel.parallelize import initialize_weights, parallelize
from parallel.strategy import MeshStrategy
from train import train_step
from training.config import OptimConfig
from training.optimizer import build_optimizer

SEED, STEPS = 7, 2
BATCH, SEQ, VOCAB = 12, 16, 58
# The first steps of Adam divide a gradient by itself; this eps keeps rounding errors small.
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, weight_decay=0.5)


@dataclass(frozen=True)
class Case:
    """One way to spread the model over processes, and to cut its batch."""

    dp: int = 1
    tp: int = 1
    tied: bool = False
    sequence_parallel: bool = True
    loss_parallel: bool = True
    n_micro: int = 2
    max_norm: float = 0.5  # below the norm of the reference: it clips
    param: Any = "fp32"
    n_layers: int = 1

    @property
    def world(self) -> int:
        return self.dp * self.tp


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
]


def model_config(tied: bool, n_layers: int) -> ModelConfig:
    return ModelConfig("small", 40, n_layers, 4, 2, 52, VOCAB, tie_embeddings=tied)


def batch(step: int) -> Batch:
    """Packed documents; the first samples have many targets, the last ones hardly any."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    positions = torch.arange(SEQ).repeat(BATCH, 1)
    for row in range(BATCH):
        cut = 3 + row
        positions[row, cut:] = torch.arange(SEQ - cut)
        labels[row, cut - 1] = IGNORE
        labels[row, SEQ - row :] = IGNORE
    labels[-2] = IGNORE  # a whole micro-batch without a target on some meshes
    return Batch(tokens, positions, labels)


def share(whole: Batch, rank: int, size: int, n_micro: int) -> StepBatches:
    """What one data rank computes."""
    rows = BATCH // size
    own = Batch(*(field[rank * rows : (rank + 1) * rows] for field in whole))
    pieces = [Batch(*fields) for fields in zip(*(f.chunk(n_micro) for f in own), strict=True)]
    assert len(pieces) == n_micro
    return StepBatches(pieces, int((own.labels != IGNORE).sum()), digest=rank + 1)


# ---------------------------------------------------------------- on the ranks


class Watch(TorchDispatchMode):
    """Sees every local operation: counts reduce-scatters, notes where full logits lie."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce_scatters, self.full_logits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor turns it into local operations, which come here
        out = func(*args, **(kwargs or {}))
        self.reduce_scatters += "reduce_scatter" in str(func)
        real = isinstance(out, Tensor) and not isinstance(out, FakeTensor)  # shapes are tried out
        if real and out.ndim >= 2 and out.shape[-1] == VOCAB:
            self.full_logits += 1
        return out


def build(case: Case) -> SimpleNamespace:
    """As `train.set_up` does, without data and folder."""
    config = model_config(case.tied, case.n_layers)
    parallel = ParallelConfig(
        dp_shard=case.dp,
        tp=case.tp,
        sequence_parallel=case.sequence_parallel,
        loss_parallel=case.loss_parallel,
    )
    plan = partial(parallelize, parallel=parallel, precision=PrecisionConfig(param=case.param))
    mesh = MeshShape(1, case.dp, 1, case.tp)
    strategy = MeshStrategy(mesh, plan)
    fabric = Fabric(accelerator="cpu", devices=case.world, strategy=strategy)
    fabric.launch()
    with torch.device("meta"):
        llama = Llama(config)
    model = fabric.setup_module(llama)
    adamw = build_optimizer(llama, OPTIM)
    optimizer = fabric.setup_optimizers(adamw)
    initialize_weights(llama, config, SEED)
    return SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(max_grad_norm=case.max_norm)),
        fabric=fabric,
        strategy=strategy,
        model=model,
        optimizer=optimizer,
        llama=llama,
        adamw=adamw,
        data_rank=mesh.data_rank(fabric.global_rank),
    )


def whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor().clone()


def run_case(case: Case) -> dict[str, Any]:
    """Trains, and tells everything as whole tensors."""
    run = build(case)
    found: dict[str, Any] = {"loss": [], "norm": [], "hash": [], "local": []}
    found["initial"] = {name: whole(p) for name, p in run.llama.named_parameters()}
    clipped: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        if not clipped:
            clipped.append({n: whole(p.grad) for n, p in run.llama.named_parameters()})

    run.adamw.register_step_pre_hook(note)
    for step in range(STEPS):
        batches = share(batch(step), run.data_rank, case.dp, case.n_micro)
        tensors = train_step(cast(Any, run), batches, OPTIM.lr)
        found["loss"].append(run.strategy.sum_over_data(tensors["loss"].double()).item())
        found["norm"].append(tensors["grad_norm"].item())
        found["hash"].append(tensors["batch_hash"].item())
    found["gradients"] = clipped[0]
    found["final"] = {name: whole(p) for name, p in run.llama.named_parameters()}
    found["tied"] = run.llama.output.weight is run.llama.tok_embeddings.weight
    return found


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
    return found


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
    names = [f"dp{case.dp}", f"tp{case.tp}", f"micro{case.n_micro}"]
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
        assert found["hash"] == [case.dp * (case.dp + 1) // 2] * STEPS
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


# ---------------------------------------------------------------- what a rank holds and sends


def held_and_sent() -> dict[str, Any]:
    """On dp_shard=2: reductions of a step by its number of micro-batches, and after each exit."""
    run = build(Case(dp=2, n_layers=2))

    def reductions(n_micro: int) -> int:
        with Watch() as watch:
            train_step(cast(Any, run), share(batch(0), run.data_rank, 2, n_micro), OPTIM.lr)
        return watch.reduce_scatters

    def reductions_after(enabled: bool) -> tuple[int, int]:
        tokens, positions, labels = share(batch(0), run.data_rank, 2, 1).micro_batches[0]
        with Watch() as inside, run.fabric.no_backward_sync(run.model, enabled=enabled):
            run.fabric.backward(run.model(tokens, positions, labels))
        with Watch() as outside:
            run.fabric.backward(run.model(tokens, positions, labels))
        run.optimizer.zero_grad()
        return inside.reduce_scatters, outside.reduce_scatters

    return {
        "one": reductions(1),
        "six": reductions(6),
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


def test_synchronisation_is_on_after_no_backward_sync(sent: dict[str, Any]) -> None:
    groups = sent["groups"]
    assert sent["with"] == (0, groups)
    assert sent["without"] == (groups, groups)


def logits_held(loss_parallel: bool) -> tuple[int, int, list[int]]:
    """How often a rank held full logits in forward and backward, on dp_shard=2 × tp=2."""
    run = build(Case(dp=2, tp=2, loss_parallel=loss_parallel))
    shapes: list[list[int]] = []

    def note(_: Any, inputs: Any) -> None:
        logits = inputs[0]
        shapes.append(list((logits.to_local() if isinstance(logits, DTensor) else logits).shape))

    run.llama.loss.register_forward_pre_hook(note)
    tokens, positions, labels = share(batch(0), run.data_rank, 2, 1).micro_batches[0]
    with Watch() as forward:
        loss = run.model(tokens, positions, labels)
    with Watch() as backward:
        run.fabric.backward(loss)
    return forward.full_logits, backward.full_logits, shapes[0]


def both_ways() -> list[tuple[int, int, list[int]]]:
    return [logits_held(True), logits_held(False)]


def test_no_rank_holds_full_logits_under_loss_parallel() -> None:
    for sharded, gathered in on_ranks(4, both_ways):
        assert sharded == (0, 0, [BATCH // 2, SEQ, VOCAB // 2])
        assert gathered[0] > 0 and gathered[1] > 0  # what is looked for is seen where it is
        assert gathered[2] == [BATCH // 2, SEQ, VOCAB]


def dtypes() -> dict[str, Any]:
    """Number formats under the bf16 policy: what a block and its matrices see in the forward."""
    run = build(Case(dp=2, tp=2, param="bf16"))
    seen: dict[str, Any] = {}

    def block_inputs(_: Any, inputs: Any) -> None:
        seen["x"], seen["cos"], seen["sin"] = (each.dtype for each in inputs[:3])

    def weight(name: str, module: Any, _: Any) -> None:
        seen[name] = module.weight.dtype

    for block in run.llama.layers:
        block.attention.register_forward_pre_hook(block_inputs)
    modules = dict(run.llama.named_modules())
    names = [name.removesuffix(".weight") for name, _ in run.llama.named_parameters()]
    for name in names:
        modules[name].register_forward_pre_hook(partial(weight, name))
    tokens, positions, labels = share(batch(0), run.data_rank, 2, 1).micro_batches[0]
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
        assert (seen["cos"], seen["sin"]) == (torch.float32, torch.float32)
        assert found["loss"] == torch.float32
        assert found["master"] == found["gradients"] == {torch.float32}
        # bf16 has 8 bits: 0.4% an element, less in a mean over many; equal would be no bf16.
        assert 0 < found["error"] < 2**-8


def test_reference_batch_has_what_it_claims() -> None:
    """Packed documents, masked labels, and numbers of targets that differ between the ranks."""
    for size in (2, 3):
        counts = [share(batch(0), rank, size, 1).n_targets for rank in range(size)]
        assert len(set(counts)) == size
    tokens, positions, labels = batch(0)
    assert ((positions[:, 1:] == 0).sum(dim=1) == 1).sum() > BATCH // 2
    assert (labels == IGNORE).any() and math.prod(tokens.shape) == labels.numel()
