"""Communicators of pipeline stages exist before the first step, one per direction."""

from collections import Counter
from typing import Any

import pytest
import torch.distributed as dist
from distributed import on_ranks
from small_run import Case, batch, build, local_batches
from torch.distributed.distributed_c10d import _world

from planning.communicators import n_communicators
from train import train_step


def messages_by_link(case: Case) -> dict[str, Any]:
    """Build a pipeline and run a step; return the messages of set-up and step by link."""
    sent: list[tuple[int, int, str]] = []
    functions = ("send", "recv", "isend", "irecv")
    originals = {name: getattr(dist, name) for name in functions}

    def recording(name: str) -> Any:
        def call(tensor: Any, peer: Any = None, group: Any = None, **kwargs: Any) -> Any:
            sent.append((id(group), tensor.numel(), name[-4:]))
            return originals[name](tensor, peer, group, **kwargs)

        return call

    for name in functions:
        setattr(dist, name, recording(name))
    run: Any = build(case)
    links = run.strategy.pipeline.links._groups
    set_up = Counter(group for group, _, _ in sent)
    assert all(size == 1 for _, size, _ in sent)
    sent.clear()
    train_step(run, local_batches(batch(0), run.data_rank, case.mesh.dp, case.n_micro), lr=1e-3)
    kinds: dict[int, set[str]] = {}
    for group, _, kind in sent:
        kinds.setdefault(group, set()).add(kind)
    between = {key: id(link) for key, link in links.items() if key[0] != key[1]}
    return {
        "ranks": {key: dist.get_process_group_ranks(link) for key, link in links.items()},
        "set_up": {key: set_up[link] for key, link in between.items()},
        "kinds": {key: kinds[link] for key, link in between.items()},
        "others": kinds.keys() - between.values(),
        "communicators": sum(group.size() > 1 for group in _world.pg_map),
    }


@pytest.mark.parametrize(
    "case",
    [
        Case(pp=3, n_layers=3, n_micro=4),
        Case(pp=2, pp_parts=2, n_layers=4, n_micro=2, tied=True),
        Case(pp=2, dp_replicate=2, n_layers=2, n_micro=2),
    ],
    ids=str,
)
def test_each_link_is_set_up_by_a_message_and_has_one_direction(case: Case) -> None:
    """NCCL creates the communicator of two ranks with their first message, and blocks until then.

    A receive that comes before the other rank can send would wait forever.
    """
    ranks = on_ranks(case.world, messages_by_link, case)
    planned = n_communicators(case.mesh, case.pp_parts, case.tied)
    assert max(found["communicators"] for found in ranks) == planned
    for rank, found in enumerate(ranks):
        stage = rank // (case.dp * case.cp * case.tp) % case.pp
        assert set(found["set_up"].values()) == {1}
        assert found["others"] == set()
        for (source, target, _), kinds in found["kinds"].items():
            assert kinds == {"send" if stage == source else "recv"}
            assert stage in (source, target)
        assert all(rank in ranks and len(ranks) <= 2 for ranks in found["ranks"].values())
