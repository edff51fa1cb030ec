"""Placement of groups on nodes, and durations of collectives."""

from dataclasses import replace

import pytest

from parallel.mesh import AXES, MeshShape
from parallel.traffic import Collective
from planning.collectives import collective_seconds, placement
from planning.hardware import load_hardware

H100 = load_hardware("h100")


def placed_by_counting(axis: str, mesh: MeshShape, per_node: int) -> tuple[int, int]:
    """Return the most nodes of a group, and the fewest ranks on a node of such a group."""
    strides, stride = {}, 1
    for name, size in zip(reversed(AXES), reversed(mesh.sizes), strict=True):
        strides[name] = stride
        stride *= size
    groups: dict[int, list[int]] = {}
    for rank in range(mesh.world_size):
        inside = sum(
            rank // strides[name] % getattr(mesh, name) * strides[name] for name in axis.split("+")
        )
        groups.setdefault(rank - inside, []).append(rank // per_node)
    most = max(len(set(nodes)) for nodes in groups.values())
    spread = [nodes for nodes in groups.values() if len(set(nodes)) == most]
    return most, min(nodes.count(node) for nodes in spread for node in nodes)


@pytest.mark.parametrize("per_node", [4, 8, 72])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshShape(1, 18, 1, 8),  # 144 ranks: groups of 8 divide nodes of 72
        MeshShape(1, 9, 1, 16),  # groups of 16 do not
        MeshShape(2, 9, 1, 8),
        MeshShape(2, 2, 4, 8),
        MeshShape(1, 36, 4, 1),
        MeshShape(1, 8, 1, 1),
        MeshShape(16, 8, 1, 1),
        MeshShape(1, 24, 2, 3),
    ],
)
def test_placement_is_that_of_consecutive_ranks(mesh: MeshShape, per_node: int) -> None:
    for axis in (*AXES, "dp_shard+cp"):
        if all(getattr(mesh, name) == 1 for name in axis.split("+")):
            continue
        nodes, ranks_per_node = placed_by_counting(axis, mesh, per_node)
        where = placement(axis, mesh, per_node)
        assert where.inside_node == (nodes == 1), axis
        complete = mesh.world_size % per_node == 0  # otherwise the last node has fewer
        if complete and (nodes <= 2 or per_node != 72):
            assert where.ranks_per_node == ranks_per_node, (axis, where)


def gather(mesh: MeshShape, payload: int = 2**20) -> Collective:
    return Collective("dp_shard", mesh.dp_shard, "all_gather", 1, payload, "weights")


def test_latency_grows_with_the_length_of_the_ring() -> None:
    """A small gather over 512 ranks takes a hop for each of them, not two."""
    seconds = [
        collective_seconds(gather(mesh), mesh, H100)
        for mesh in (MeshShape(1, size, 1, 1) for size in (8, 16, 64, 512, 4096))
    ]
    assert seconds == sorted(seconds)
    assert seconds[3] > 1e-3 > seconds[1]
    assert seconds[4] / seconds[3] == pytest.approx(8, rel=0.05)


def test_group_that_straddles_two_nodes_communicates_between_nodes() -> None:
    """Ranks 64 to 79 of nodes with 72 devices are on two nodes, with 8 adapters on each side."""
    hardware, mesh = replace(H100, devices_per_node=72), MeshShape(1, 9, 1, 16)
    where = placement("tp", mesh, 72)
    assert (where.nodes, where.ranks_per_node) == (2, 8)
    assert placement("tp", MeshShape(1, 4, 1, 16), 72).inside_node  # all on one node
    each = Collective("tp", 16, "all_gather", 1, 2**30, "activations")
    wide = replace(hardware, network_gb_s=1)
    assert collective_seconds(each, mesh, wide) == pytest.approx(2**30 * 15 / 16 / 8e9, rel=1e-3)


def test_oversubscription_slows_groups_between_pods() -> None:
    hardware = replace(H100, devices_per_pod=64, oversubscription=7.0)
    inside, between = MeshShape(1, 64, 1, 1), MeshShape(1, 128, 1, 1)
    for mesh, slower in ((inside, 1.0), (between, 7.0)):
        collective = gather(mesh, 2**36)
        seconds = [collective_seconds(collective, mesh, each) for each in (H100, hardware)]
        assert seconds[1] / seconds[0] == pytest.approx(slower, rel=0.05)
