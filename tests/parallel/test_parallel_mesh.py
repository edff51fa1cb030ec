"""Mesh sizes derived from the configuration and the number of processes."""

import itertools

import pytest

from parallel.config import ParallelConfig
from parallel.mesh import AXES, MeshShape, resolve_mesh


def test_data_rank_is_the_index_on_the_data_axes() -> None:
    """The reference is the coordinates of a rank, outermost axis first."""
    shape = MeshShape(2, 3, 1, 2, pp=3)
    coordinates = itertools.product(*(range(size) for size in shape.sizes))
    for rank, (replicate, _, shard, _, _) in enumerate(coordinates):
        assert shape.data_rank(rank) == replicate * shape.dp_shard + shard
    assert {shape.data_rank(rank) for rank in range(shape.world_size)} == set(range(shape.dp))
    assert len(AXES) == len(shape.sizes)


def test_mesh_is_formatted_with_its_axes_larger_than_one() -> None:
    assert str(MeshShape(1, 1, 1, 1)) == "one process"
    assert str(MeshShape(1, 2, 1, 4)) == "dp_shard=2 × tp=4"
    assert str(MeshShape(1, 2, 1, 4, pp=2)) == "pp=2 × dp_shard=2 × tp=4"


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_default_dp_shard_uses_all_remaining_processes(tp: int) -> None:
    shape, problems = resolve_mesh(ParallelConfig(tp=tp), world_size=8)
    assert not problems
    assert shape.world_size == 8 and shape.tp == tp


@pytest.mark.parametrize(
    ("config", "world_size", "remedy"),
    [
        (ParallelConfig(tp=3), 8, "start a multiple of 3 processes"),
        (ParallelConfig(tp=4), 2, "start a multiple of 4 processes"),
        (ParallelConfig(dp_shard=2, tp=2), 8, "use parallel.dp_shard=-1, which resolves to 4"),
        (ParallelConfig(dp_shard=8, tp=2), 1, "start 16 processes (parallel.devices=16 if"),
    ],
)
def test_mesh_that_does_not_match_the_processes_is_rejected_with_a_valid_remedy(
    config: ParallelConfig, world_size: int, remedy: str
) -> None:
    _, [problem] = resolve_mesh(config, world_size)
    assert remedy in problem
    assert f"processes, not {world_size}; " in problem and f"parallel.tp={config.tp}" in problem
    if remedy.startswith("start"):
        sizes = [16] if config.dp_shard == 8 else [config.tp, 2 * config.tp]
        assert all(resolve_mesh(config, size)[1] == [] for size in sizes)
        if world_size == 1:
            assert problem.endswith(
                "or use parallel.dp_shard=-1 and let dp_replicate × pp × cp × tp be 1"
            )
    else:
        assert resolve_mesh(ParallelConfig(tp=config.tp), world_size)[1] == []


def test_sizes_of_a_mesh_without_processes_are_those_of_the_configuration() -> None:
    """So that rules do not report sizes that nobody has given, besides the missing GPU."""
    assert resolve_mesh(ParallelConfig(cp=2, tp=4), 0) == (MeshShape(1, 1, 2, 4), [])
