"""Duration of NCCL's collectives and sends in closed form.

A ring of n ranks transfers the bytes of the ring algorithm (Patarasuk and Yuan 2009) over its
slowest link, and each rank waits for n - 1 steps. Their latencies are those by which NCCL selects
its algorithms (src/graph/tuning.cc, protocol Simple).
"""

from dataclasses import dataclass
from math import gcd

from parallel.mesh import AXES, MeshShape
from parallel.traffic import Collective
from planning.hardware import Hardware

LINK_STEP_US, NETWORK_STEP_US = 3.4, 14.0
"""Latency of a step of a ring inside a node (NVLink), and between nodes."""


@dataclass(frozen=True)
class Placement:
    """How the groups of an axis are placed on nodes; the group with the slowest links counts.

    Attributes:
        ranks: Ranks of a group.
        nodes: Nodes with ranks of a group.
        ranks_per_node: Ranks of a group on the node with the fewest of them.
        reach: Distance from the first to the last rank of a group, in ranks.
    """

    ranks: int
    nodes: int
    ranks_per_node: int
    reach: int

    @property
    def inside_node(self) -> bool:
        return self.nodes == 1


def placement(axis: str, mesh: MeshShape, devices_per_node: int) -> Placement:
    """Return where the groups of an axis are: consecutive ranks share a node, tp is innermost.

    A group that fits in a node is split over two if groups do not divide the node evenly.

    Args:
        axis: Axes of the group, joined by "+".
    """
    axes = axis.split("+")
    stride, reach, ranks, per_node = 1, 1, 1, 1
    inner = 1  # stride of the group's innermost axis
    for name, size in zip(reversed(AXES), reversed(mesh.sizes), strict=True):
        if name in axes and size > 1:
            inner = stride if ranks == 1 else inner
            reach, ranks = stride * size, ranks * size
            per_node *= max(min(size, devices_per_node // stride), 1)
        stride *= size
    if stride <= devices_per_node or (devices_per_node % reach == 0):
        return Placement(ranks, 1, ranks, reach)
    if reach <= devices_per_node:
        # A node ends inside of a group, at a multiple of the greatest common divisor.
        return Placement(ranks, 2, max(gcd(devices_per_node, reach) // inner, 1), reach)
    return Placement(ranks, -(-ranks // per_node), per_node, reach)


def collective_seconds(
    each: Collective, mesh: MeshShape, hardware: Hardware, sharing: int = 1
) -> float:
    """Return the seconds of all `count` collectives.

    Args:
        sharing: Ranks that share the links (on CPU those of a node).
    """
    where = placement(each.axis, mesh, hardware.devices_per_node)
    is_send = each.kind == "send"  # between neighbors of a group, of which two may span nodes
    speed, latency = hardware.link_gb_s, hardware.link_latency_us
    if not where.inside_node:
        # One ring per network adapter of the group's ranks in a node; a send uses its rank's.
        network = hardware.network_gb_s * (1 if is_send else where.ranks_per_node)
        if hardware.devices_per_pod is not None and where.reach > hardware.devices_per_pod:
            network /= hardware.oversubscription
        speed, latency = min(speed, network), hardware.network_latency_us
    # The latencies of the hardware files are measured within one node and between two.
    times = 0 if is_send else 2 if each.kind == "all_reduce" else 1
    network_steps = max(where.nodes - 2, 0)
    link_steps = max(where.ranks - hardware.devices_per_node, 0) - network_steps
    latency += times * (network_steps * NETWORK_STEP_US + max(link_steps, 0) * LINK_STEP_US)
    sending = float(each.sent) * sharing / (speed * 1e9)
    return sending + each.count * latency * 1e-6
