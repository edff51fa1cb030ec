"""The memory tracker against cases counted by hand: live tensors, once, by category."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from planning.memory_tracker import MemoryTracker

FLOAT = 4  # bytes


def test_adamw_step_matches_count_by_hand() -> None:
    rows, inner, columns = 2, 3, 5
    matrix, batch, output = inner * columns, rows * inner, rows * columns
    with MemoryTracker() as tracker:
        model = torch.nn.Linear(inner, columns, bias=False)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        tracker.model, tracker.optimizer = model, optimizer
        for _ in range(2):
            tracker.phase = "forward"
            x = torch.ones(rows, inner)
            y = model(x)
            loss = y.sum()
            tracker.phase = "backward"
            loss.backward()
            tracker.phase = "update"
            optimizer.step()
            optimizer.zero_grad()
    assert tracker.peaks["update"] == {
        "parameters": FLOAT * matrix,
        "gradients": FLOAT * matrix,
        "optimizer": FLOAT * (2 * matrix + 1),  # two moments and the step
        "forward": FLOAT * (batch + output + 1),  # and the loss
        "update": FLOAT * matrix,  # the root of the second moment
    }
    # End of a forward: the previous step left no gradient; `x` and `y` are rebound while the old
    # `y` and `loss` are still alive.
    assert tracker.peaks["forward"] == {
        "parameters": FLOAT * matrix,
        "optimizer": FLOAT * (2 * matrix + 1),
        "forward": FLOAT * (batch + 2 * output + 1),
    }


def test_freed_memory_is_subtracted_and_views_count_once() -> None:
    with MemoryTracker() as tracker:
        a = torch.zeros(100)
        b = a.view(10, 10).t()[2:]
        a.add_(1)
        assert tracker.total() == FLOAT * 100
        del a
        assert tracker.total() == FLOAT * 100  # `b` still references it
        c = b + 1  # (8, 10)
        assert tracker.total() == FLOAT * 180
        c.untyped_storage().resize_(0)  # as FSDP2 frees its buffers
        assert tracker.total() == FLOAT * 100
        del b
        assert tracker.total() == 0
    assert tracker.peaks == {"setup": {"setup": FLOAT * 180}}


def test_tensors_saved_by_autograd_are_counted() -> None:
    with MemoryTracker() as tracker:
        x = torch.ones(10, requires_grad=True)
        y = x.exp().sin().sum()  # saves exp(x) for both backwards; the result of sin is freed
        assert tracker.total() == FLOAT * (10 + 10 + 1)
        del x, y
        assert tracker.total() == 0


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """Make this process rank 0 of a fake process group of size 4."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("four_ranks")
def test_dtensor_counts_local_shard_and_shape_propagation_counts_nothing() -> None:
    mesh = init_device_mesh("cpu", (4,))
    with MemoryTracker() as tracker:
        weight = torch.nn.Parameter(DTensor.from_local(torch.ones(12, 8), mesh, [Shard(1)]))
        x = DTensor.from_local(torch.ones(2, 12), mesh)  # replicated
        y = x @ weight
        assert weight.shape == (12, 32) and y.shape == (2, 32)
        tracker.model = torch.nn.ParameterList([weight])
        tracker.optimizer = torch.optim.AdamW([weight])
        held = {"parameters": FLOAT * 12 * 8, "setup": FLOAT * (2 * 12 + 2 * 8)}
        assert tracker.held() == held
    assert sum(tracker.peaks["setup"].values()) == sum(held.values())  # no earlier peak was higher


def test_sum_of_gradients_takes_no_memory_on_fake_tensors() -> None:
    """As on real ones, without a dispatch mode: autograd adds in place."""
    with FakeTensorMode(), MemoryTracker(fake=True) as tracker:
        x = torch.empty(100, requires_grad=True) * 1
        loss = (x * 2 + x * 3).sum()
        tracker.phase = "backward"
        loss.backward()
    # Both `x`, the loss and its gradient, and two gradients of `x`.
    assert sum(tracker.peaks["backward"].values()) == FLOAT * (2 * 100 + 2 + 2 * 100)


@pytest.mark.usefixtures("four_ranks")
def test_collectives_count_the_copies_of_gloo() -> None:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        MemoryTracker(fake=True, on_cpu=True) as tracker,
    ):
        shard, complete = torch.empty(10), torch.empty(40)
        dist.all_gather_into_tensor(complete, shard)
        tracker.phase = "reduction"
        dist.reduce_scatter_tensor(shard, complete)
    assert tracker.peaks["setup"]["buffer"] == tracker.peaks["reduction"]["buffer"] == FLOAT * 40


@pytest.mark.parametrize(
    ("total", "term", "converted"),
    [("float32", "float32", 0), ("float32", "bfloat16", 1), ("bfloat16", "float32", 2)],
)
def test_sums_of_two_data_types_count_their_conversions(
    total: str, term: str, converted: int
) -> None:
    """Bytes that a preloaded malloc counted on CPU: 4 or 8 per element."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        MemoryTracker(fake=True, on_cpu=True) as tracker,
    ):
        sums, terms = (torch.empty(40, dtype=getattr(torch, each)) for each in (total, term))
        tracker.phase = "sum"
        sums += terms
    assert tracker.peaks["sum"].get("buffer", 0) == converted * FLOAT * 40


@pytest.mark.parametrize("reduced", ["float32", "bfloat16"])
def test_copy_in_of_fsdp_counts_the_conversion_of_its_largest_input(reduced: str) -> None:
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        MemoryTracker(fake=True, on_cpu=True) as tracker,
    ):
        gradients = [torch.empty(4, 10), torch.empty(2, 10)]
        output = torch.empty(2, 30, dtype=getattr(torch, reduced))
        tracker.phase = "copy-in"
        torch.ops.fsdp.chunk_cat(gradients, dim=0, num_chunks=2, out=output)
    expected = 0 if reduced == "float32" else FLOAT * 40
    assert tracker.peaks["copy-in"].get("buffer", 0) == expected
