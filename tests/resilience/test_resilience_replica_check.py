"""Copies of replicated state are compared between ranks; a changed bit is found and located."""

import random
from functools import partial
from typing import Any
from unittest import mock

import pytest
import small_run
import torch
import torch.distributed as dist
from distributed import on_ranks
from small_run import Case, batch, build, local_batches
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from resilience.replica_check import TIED, ReplicaCheck, hash_tensor
from train import train_step
from training.optimizer import StateFormat, build_optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 7, 1024, 9000])
def test_any_changed_bit_changes_the_hash(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(n + 1, generator=generator).mul(9).to(dtype)[1:]  # not aligned
    expected = hash_tensor(tensor)
    content = tensor.view(torch.uint8)
    picked = random.Random(0).sample(range(8 * content.numel()), min(64, 8 * content.numel()))
    for bit in picked:
        content[bit // 8] ^= 1 << bit % 8
        assert hash_tensor(tensor) != expected, bit
        content[bit // 8] ^= 1 << bit % 8
    assert hash_tensor(tensor) == expected


def test_exchanged_values_change_the_hash() -> None:
    tensor = torch.arange(5000, dtype=torch.float64)
    expected = hash_tensor(tensor)
    tensor[[3, 4]] = tensor[[4, 3]]
    assert hash_tensor(tensor) != expected


def local_tensors(run: Any, kind: str) -> list[Tensor]:
    """Return this rank's tensors of the model or its optimizer."""
    weights = list(run.llama.parameters())
    if kind == "weights":
        tensors = weights
    elif kind == "gradients":
        tensors = [weight.grad for weight in weights]
    else:
        tensors = [run.adamw.state[weight][kind] for weight in weights]
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def flip(tensors: list[Tensor], generator: random.Random) -> None:
    """Change one bit of one of the tensors."""
    tensor = generator.choice([each for each in tensors if each.numel()])
    content = tensor.detach().view(-1).view(torch.uint8)
    content[generator.randrange(content.numel())] ^= 1 << generator.randrange(8)


def train_and_compare(case: Case, flips: list[tuple[str, int]], seed: int) -> list[Any]:
    """Train with a flipped bit before each step; return its effect and what was found.

    Args:
        flips: Kind of the tensor and rank of each flip; `none` for a step without.
    """
    run: Any = build(case)
    check = ReplicaCheck(run.llama, run.adamw, 1, case.mesh)
    step = 0

    def train(kind: str = "none", rank: int = -1) -> None:
        nonlocal step
        step += 1
        generator = random.Random(seed + step)
        handle = None
        if rank == dist.get_rank() and kind == "gradients":
            handle = run.adamw.register_step_pre_hook(
                lambda *_: flip(local_tensors(run, kind), generator)
            )
        elif rank == dist.get_rank() and kind != "none":
            flip(local_tensors(run, kind), generator)
        train_step(run, local_batches(batch(step), run.data_rank, case.mesh.dp, 1), lr=1e-3)
        if handle is not None:
            handle.remove()

    train()
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    saved = {kind: [each.detach().clone() for each in local_tensors(run, kind)] for kind in kinds}
    found = []
    for kind, rank in flips:
        for each in kinds:
            for tensor, value in zip(local_tensors(run, each), saved[each], strict=True):
                tensor.detach().copy_(value)
        check.prepare(step + 1)
        train(kind, rank)
        content = [
            t.detach().view(-1).view(torch.uint8) for k in kinds for t in local_tensors(run, k)
        ]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, torch.cat(content).numpy().tobytes())
        group = [r for r in range(len(gathered)) if len(gathered) == 2 or r % 2 == rank % 2]
        persists = len({gathered[r] for r in group}) > 1
        found.append((kind, rank, persists, check.compare()))
    return found


KINDS = ["weights", "exp_avg", "exp_avg_sq", "gradients"]


def test_flipped_bits_of_replicas_are_found_and_located() -> None:
    """Of four replicas, the rank with the flipped bit is named."""
    case = Case(dp_replicate=4)
    flips = [*((kind, 1) for kind in [*KINDS, "none"]), ("gradients", 3), ("weights", 3)]
    for kind, rank, persists, difference in on_ranks(4, train_and_compare, case, flips, 0)[2]:
        assert (kind == "none") <= (difference is None and not persists), (kind, rank)
        assert persists <= (difference is not None), (kind, rank)
        if difference is not None:
            assert difference.ranks == [rank] and difference.has_majority
            assert str(difference).startswith(f"Silent data corruption on rank {rank} (")


def find_flip(case: Case, name: str, rank: int) -> tuple[Any, Any]:
    """Return the results after a step without and with a flipped bit in one parameter's state.

    Args:
        name: Kind of the tensor and name of the parameter; `gathered` for gathered weights.
    """
    run: Any = build(case)
    check = ReplicaCheck(run.llama, run.adamw, 1, case.mesh)
    for step in (1, 2):
        check.prepare(step)
        train_step(run, local_batches(batch(step), run.data_rank, case.mesh.dp, 1), lr=1e-3)
        clean = check.compare()
    kind, parameter = name.split()
    if dist.get_rank() == rank:
        weight = dict(run.llama.named_parameters())[parameter]
        if kind == "gathered":
            unshard = FSDPModule.unshard

            def unshard_and_flip(module: Any) -> None:
                unshard(module)
                weights = {id(w): n for n, w in run.llama.named_parameters()}
                for each in module.parameters():
                    if weights[id(each)] == parameter and not hasattr(each, "placements"):
                        flip([each], random.Random(0))

            FSDPModule.unshard = unshard_and_flip  # type: ignore[method-assign, assignment]
        else:
            tensor = weight if kind == "weights" else run.adamw.state[weight][kind]
            flip([tensor.to_local()], random.Random(0))
    return clean, check.compare()


MATRIX, NORM = "layers.0.attention.wq.weight", "layers.0.attention_norm.weight"


@pytest.mark.parametrize(
    ("case", "name", "ranks"),
    [
        (Case(dp_replicate=2, dp=2), f"weights {MATRIX}", [0, 2]),
        (Case(dp_replicate=2, dp=2), f"gathered {MATRIX}", [2]),
        (Case(dp_replicate=2, tp=2), f"exp_avg {MATRIX}", [0, 2]),
        (Case(dp_replicate=2, tp=2), f"exp_avg_sq {NORM}", [2]),
        (Case(dp=2, tp=2), f"weights {NORM}", [2, 3]),
        (Case(dp=2, cp=2, tied=True), f"gathered {MATRIX}", [2]),
        (Case(dp=3, param="bf16"), f"gathered {NORM}", [2]),
        (Case(tp=2, sequence_parallel=False), f"weights {NORM}", [0, 1]),
        (Case(dp=2), f"weights {MATRIX}", []),  # sharded: no other rank has a copy
        (Case(pp=3, n_layers=2), "weights norm.weight", []),
        (Case(pp=2, tp=2), "weights norm.weight", [2, 3]),  # the last stage is the head alone
        (Case(pp=2, dp=2, n_layers=3), "gathered layers.2.attention_norm.weight", [2, 3]),
        (Case(pp=2, dp_replicate=2), f"exp_avg {MATRIX}", [0, 2]),
        (Case(pp=3, n_layers=2, tied=True), f"weights {TIED}", [0, 2]),
        (Case(pp=2, dp=2, tied=True), f"exp_avg_sq {TIED}", [0, 2]),
        (Case(pp=2, tp=2, tied=True), f"weights {TIED}", [0, 2]),
        (Case(pp=2, dp_replicate=2, tied=True), f"weights {TIED}", [2]),  # of four copies
        (Case(pp=2, dp=2, tied=True), f"gathered {TIED}", [2]),
    ],
    ids=str,
)
def test_copies_on_each_mesh_are_compared(case: Case, name: str, ranks: list[int]) -> None:
    """No difference is found in clean steps. Two copies have no majority, so both are named."""
    flipped = 2 if case.world > 2 else 1
    results = on_ranks(case.world, find_flip, case, name, flipped)
    assert [clean for clean, _ in results] == [None] * case.world
    differences = [difference for _, difference in results]
    assert differences == [differences[0]] * case.world, "equal on all ranks"
    if not ranks:
        assert differences[0] is None
        return
    assert differences[0].ranks == ranks
    assert differences[0].has_majority == (len(ranks) == 1)
    kind, parameter = name.split()
    label = f"gathered weights of {parameter}" if kind == "gathered" else f"{kind} of {parameter}"
    assert label in differences[0].tensors


def compare_low_bit(state: StateFormat) -> tuple[Any, set[str], Any]:
    """Compare after two steps, and after a flipped bit in a moment of rank 1."""
    with mock.patch.object(small_run, "build_optimizer", partial(build_optimizer, state=state)):
        run: Any = build(case := Case(dp_replicate=2))
    check = ReplicaCheck(run.llama, run.adamw, 1, case.mesh)
    for step in (1, 2):
        train_step(run, local_batches(batch(step), run.data_rank, 2, 1), lr=1e-3)
    clean, kinds = check.compare(), {copy.kind for copy in check._state()}
    if dist.get_rank() == 1:
        moment = run.adamw.state[run.llama.layers[0].attention.wq.weight]["exp_avg"]
        flip([each for each in vars(moment).values() if isinstance(each, Tensor)], random.Random(0))
    return clean, kinds, check.compare()


@pytest.mark.parametrize("state", ["bf16", "int8"])
def test_low_bit_moments_are_compared(state: StateFormat) -> None:
    """They are objects with tensors as attributes."""
    clean, kinds, difference = on_ranks(2, compare_low_bit, state)[0]
    assert clean is None and {"weights", "exp_avg", "exp_avg_sq"} <= kinds
    assert difference.tensors == [f"exp_avg of {MATRIX}"]
