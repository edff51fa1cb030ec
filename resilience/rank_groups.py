"""Causes that many ranks have in common, in one message."""

import re
from collections.abc import Iterable, Sequence


def name_ranks(ranks: Iterable[int]) -> str:
    """Return `rank 3` or `ranks 0-3, 8`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    shown = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(spans) > 1 or len(spans[0]) > 1 else ''} {shown}"


def group_causes(causes: Sequence[tuple[int, str]]) -> dict[str, list[int]]:
    """Return the ranks of each cause, in the order in which the causes first occur.

    Args:
        causes: Rank and cause, first failure first.
    """
    groups: dict[str, list[int]] = {}
    for rank, cause in causes:
        groups.setdefault(cause, []).append(rank)
    return groups


def without_rank(cause: str, host: str) -> str:
    """Return a cause without what differs on each rank: host, device, process and addresses."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", cause.replace(host, "#"))
