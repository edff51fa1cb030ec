"""Choose few cases of which any two values of different options occur together in some case."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

Choice = dict[str, Any]
CANDIDATES = 60  # random completions of which the best is taken

Pair = tuple[str, Any, str, Any]


def covering_set(
    options: Mapping[str, Sequence[Any]], is_valid: Callable[[Choice], bool], seed: int = 0
) -> list[Choice]:
    """Return a pairwise covering set of the valid choices: greedy, equal for equal arguments.

    Each choice starts with a pair that is not covered yet, and is the one of `CANDIDATES` random
    choices that covers most pairs. A pair that no candidate makes valid is skipped.
    """
    generator = random.Random(seed)
    missing = {pair: None for pair in _all_pairs(options)}  # a dict keeps the order
    chosen: list[Choice] = []
    while missing:
        first = next(iter(missing))
        best: Choice | None = None
        best_gain = 0
        for _ in range(CANDIDATES):
            choice = {name: generator.choice(list(values)) for name, values in options.items()}
            choice |= {first[0]: first[1], first[2]: first[3]}
            if is_valid(choice):
                gain = sum(pair in missing for pair in _pairs(choice))
                if gain > best_gain:
                    best, best_gain = choice, gain
        if best is None:
            del missing[first]
            continue
        chosen.append(best)
        for pair in _pairs(best):
            missing.pop(pair, None)
    return chosen


def _all_pairs(options: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    for (first, values), (second, others) in combinations(options.items(), 2):
        for value in values:
            for other in others:
                yield first, value, second, other


def _pairs(choice: Choice) -> Iterator[Pair]:
    for (first, value), (second, other) in combinations(choice.items(), 2):
        yield first, value, second, other
