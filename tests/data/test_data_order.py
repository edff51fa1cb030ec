"""The sample order: bijective, exact mixture quotas, complete epochs, and frozen values."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_order import reference_keys, reference_permute, reference_quotas, reference_walk

from data.errors import DataError
from data.order import BLOCK, Order, OrderStage, quotas

Sources = Sequence[tuple[str, float, int]]
MIXTURE = [("web", 0.6, 1000), ("code", 0.3, 77), ("books", 0.1, 50)]


def stage_of(sources: Sources, first_sample: int = 0, seq_len: int = 8) -> OrderStage:
    weights = {name: weight for name, weight, _ in sources}
    n_windows = {name: n for name, _, n in sources}
    return OrderStage(first_sample, seq_len, weights, n_windows)


def order_of(sources: Sources, seed: int) -> Order:
    """Return the order of a run with one stage."""
    return Order([stage_of(sources)], seed)


def reference_locate(sample: int, sources: Sources, seed: int) -> tuple[int, int, int]:
    """Return (source, epoch, window) of one sample, computed from its mixture block only."""
    quota = reference_quotas({name: weight for name, weight, _ in sources})
    layout = [name for name in sorted(quota) for _ in range(quota[name])]
    block, position = divmod(sample, BLOCK)
    keys = reference_keys("mixture", seed, block)
    name = layout[reference_permute(position, BLOCK, keys)]
    before = range(position if len(sources) > 1 else 0)
    n_before = sum(layout[reference_permute(p, BLOCK, keys)] == name for p in before)
    if len(sources) == 1:
        n_before = position
    n_windows = {name: n for name, _, n in sources}[name]
    epoch, draw = divmod(quota[name] * block + n_before, n_windows)
    window = reference_permute(draw, n_windows, reference_keys("window", seed, name, epoch))
    return [name for name, _, _ in sources].index(name), epoch, window


def located(sources: Sources, seed: int, samples: Sequence[int]) -> list[list[int]]:
    return np.stack(order_of(sources, seed).locate(np.array(samples)), axis=1).tolist()


def test_order_equals_the_reference_and_frozen_values() -> None:
    samples = [0, 1, 2, 3, 499, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 123, 10**9]
    reference = [list(reference_locate(sample, MIXTURE, 42)) for sample in samples]
    assert located(MIXTURE, 42, samples) == reference
    # Frozen: a change here changes the sample order of every run and requires a new
    # ALGORITHM_VERSION.
    assert reference == FROZEN_MIXTURE
    single = [list(reference_locate(sample, [("stdlib", 1.0, 13_345)], 0)) for sample in samples]
    assert located([("stdlib", 1.0, 13_345)], 0, samples) == single == FROZEN_SINGLE


@settings(deadline=None, max_examples=20)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6),
    block=st.integers(0, 1000),
    seed=st.integers(0, 2**32),
)
def test_each_mixture_block_contains_exactly_the_quotas(
    weights: list[float], block: int, seed: int
) -> None:
    sources = [(f"s{i}", weight, 5000 + i) for i, weight in enumerate(weights)]
    order = order_of(sources, seed)
    source, _, _ = order.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
    counts = np.bincount(source, minlength=len(weights)).tolist()
    reference = reference_quotas({name: weight for name, weight, _ in sources})
    assert counts == [reference[name] for name, _, _ in sources]


def test_each_window_is_drawn_once_per_epoch_across_blocks() -> None:
    source, epoch, window = order_of(MIXTURE, 3).locate(np.arange(BLOCK + 9999))
    for index, (_, _, n_windows) in enumerate(MIXTURE):
        windows, epochs = window[source == index], epoch[source == index]
        assert (np.diff(epochs) >= 0).all()
        n_epochs = len(windows) // n_windows
        rows = np.sort(windows[: n_epochs * n_windows].reshape(n_epochs, n_windows), axis=1)
        assert (rows == np.arange(n_windows)).all()


def test_epochs_blocks_seeds_and_source_names_each_change_the_order() -> None:
    def windows_of_epoch(name: str, seed: int, start: int = 0) -> list[int]:
        samples = np.arange(start, start + 1000)
        return order_of([(name, 1.0, 1000)], seed).locate(samples)[2].tolist()

    runs = [windows_of_epoch("a", 0), windows_of_epoch("a", 1), windows_of_epoch("b", 0)]
    runs += [windows_of_epoch("a", 0, 1000), windows_of_epoch("a", 0, 2000), list(range(1000))]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            # Two independent orders agree at about one position.
            assert sum(x == y for x, y in zip(one, other, strict=True)) < 10
    source = order_of(MIXTURE, 0).locate(np.r_[0:999, BLOCK : BLOCK + 999])[0]
    assert (source[:999] != source[999:]).sum() > 99  # about half of independent draws differ


@settings(deadline=None, max_examples=25)
@given(samples=st.lists(st.integers(0, 4 * BLOCK), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_samples_located_individually_and_as_a_batch_are_equal(
    samples: list[int], seed: int
) -> None:
    batched = located(MIXTURE, seed, samples)
    assert batched == [located(MIXTURE, seed, [sample])[0] for sample in samples]


def test_order_of_the_sources_in_the_configuration_does_not_matter() -> None:
    samples = np.arange(5000)
    names = np.array([name for name, _, _ in MIXTURE])
    source, epoch, window = order_of(MIXTURE, 5).locate(samples)
    source_, epoch_, window_ = order_of(MIXTURE[::-1], 5).locate(samples)
    assert (names[source] == names[::-1][source_]).all()
    assert (epoch == epoch_).all()
    assert (window == window_).all()


def test_epochs_match_the_draws_of_locate() -> None:
    order, n_samples = order_of(MIXTURE, 1), BLOCK + 4321
    source, _, _ = order.locate(np.arange(n_samples))
    expected = {
        name: (source == i).sum() / n_windows for i, (name, _, n_windows) in enumerate(MIXTURE)
    }
    assert order.epochs(n_samples) == expected


def test_weight_that_rounds_to_zero_and_source_without_windows_are_rejected() -> None:
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight=1e-06 .*use at least"):
        quotas({"a": 1.0, "b": 1e-6})
    with pytest.raises(DataError, match="has 0 windows"):
        order_of([("a", 1.0, 0)], 0)


# ---------------------------------------------------------------- stages and blocks

# First the weights change, then seq_len (doubled), then the weights, then seq_len again.
STAGES = [
    stage_of(MIXTURE),
    stage_of([("web", 0.0, 1000), ("code", 0.5, 77), ("books", 0.5, 50)], 900),
    stage_of([("web", 0.2, 500), ("code", 0.5, 38), ("books", 0.3, 25)], 1300, seq_len=16),
    stage_of([("web", 0.5, 500), ("code", 0.4, 38), ("books", 0.1, 25)], 1800, 16),
    stage_of([("web", 1.0, 1000), ("code", 0.0, 77), ("books", 0.0, 0)], 2400, seq_len=8),
]


@pytest.mark.parametrize("block_tokens", [None, 80])
def test_stages_equal_counting_from_the_first_sample_and_frozen_values(
    block_tokens: int | None,
) -> None:
    n_samples = 3000
    reference = reference_walk(STAGES, 42, n_samples, block_tokens)
    order = Order(STAGES, 42, block_tokens)
    columns = order.locate(np.arange(n_samples))
    actual = [
        (order.names[source], epoch, window)
        for source, epoch, window in zip(*(column.tolist() for column in columns), strict=True)
    ]
    assert actual == reference
    assert [list(reference[sample]) for sample in FROZEN_AT] == FROZEN_STAGES[block_tokens]
    # Samples located individually give the same result.
    for sample in (0, 899, 900, 1299, 1300, 1799, 1800, 2399, 2400, 2999):
        single = [int(column[0]) for column in order.locate(np.array([sample]))]
        assert (order.names[single[0]], *single[1:]) == reference[sample]


@settings(deadline=None, max_examples=20)
@given(
    changes=st.lists(
        st.tuples(st.integers(1, 400), st.sampled_from([4, 8])),
        max_size=4,
    ),
    block_tokens=st.sampled_from([None, 1, 60]),
    data=st.data(),
)
def test_any_stages_equal_counting(
    changes: list[tuple[int, int]], block_tokens: int | None, data: st.DataObject
) -> None:
    stages, first = [], 0
    for length, seq_len in [(0, 8), *changes]:
        first += length
        weights = data.draw(
            st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=2, max_size=2).filter(any)
        )
        sizes = (90, 31) if seq_len == 8 else (180, 62)
        sources = list(zip("ab", weights, sizes, strict=True))
        stages.append(stage_of(sources, first, seq_len))
    n_samples = first + 300
    order = Order(stages, 1, block_tokens)
    columns = (column.tolist() for column in order.locate(np.arange(n_samples)))
    actual = [(order.names[s], epoch, window) for s, epoch, window in zip(*columns, strict=True)]
    reference = reference_walk(stages, 1, n_samples, block_tokens)
    assert actual == reference
    epochs = dict.fromkeys("ab", 0.0)
    for sample, (name, _, _) in enumerate(reference):
        stage = [stage for stage in stages if stage.first_sample <= sample][-1]
        epochs[name] += 1 / stage.n_windows[name]
    assert order.epochs(n_samples) == pytest.approx(epochs)


@pytest.mark.parametrize("block_tokens", [None, 80])
def test_epoch_continues_across_a_change_of_weights_and_ends_at_a_change_of_seq_len(
    block_tokens: int | None,
) -> None:
    order = Order(STAGES, 7, block_tokens)
    source, epoch, window = order.locate(np.arange(2400))
    books = order.names.index("books")
    for samples in (slice(0, 1300), slice(1300, 2400)):  # of equal seq_len
        is_books = source[samples] == books
        epochs, windows = epoch[samples][is_books], window[samples][is_books]
        assert (np.diff(epochs) >= 0).all()
        for number in np.unique(epochs)[:-1]:  # complete, also across the change of weights
            n = 50 if samples.start == 0 else 25
            assert sorted(windows[epochs == number].tolist()) == list(range(n))
    assert epoch[1300:][source[1300:] == books].min() > epoch[:1300][source[:1300] == books].max()


def test_adding_a_later_stage_changes_no_earlier_sample() -> None:
    samples = np.arange(1800)
    for one, other in zip(
        Order(STAGES, 3).locate(samples), Order(STAGES[:3], 3).locate(samples), strict=True
    ):
        assert (one == other).all()


def test_weights_are_exact_from_the_first_sample_of_a_stage() -> None:
    stages = [stage_of(MIXTURE), stage_of([("web", 3.0, 1000), ("code", 1.0, 77)], 1000)]
    stages[0] = stage_of([("web", 1.0, 1000), ("code", 1.0, 77)])
    source, _, _ = Order(stages, 0).locate(np.arange(1000, 1000 + 2 * BLOCK))
    for block in source.reshape(2, BLOCK):
        assert np.bincount(block).tolist() == [BLOCK * 3 // 4, BLOCK // 4]


def test_shuffle_blocks_are_read_one_at_a_time_and_each_window_once_per_epoch() -> None:
    n, block = 1050, 100
    order = Order([stage_of([("a", 1.0, n)], seq_len=8)], 0, block_tokens=8 * block + 3)
    _, epoch, window = order.locate(np.arange(3 * n))
    epochs = window.reshape(3, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert epoch.tolist() == [e for e in range(3) for _ in range(n)]
    for row in epochs:
        assert 1 + np.count_nonzero(np.diff(row // block)) == 11
    assert (epochs[0] != epochs[1]).sum() > n - 20  # independent orders agree at about one position


def test_stage_with_invalid_weights_is_rejected_with_its_key() -> None:
    def error(*sources: tuple[str, float, int]) -> str:
        with pytest.raises(DataError) as caught:
            Order([stage_of([("a", 1.0, 9), ("b", 1.0, 9)]), stage_of(sources, 100)], 0)
        return str(caught.value)

    assert "data.stages[0].weights.b=1e-09 gives" in error(("a", 1.0, 9), ("b", 1e-9, 9))
    assert "every weight is 0" in error(("a", 0.0, 9), ("b", 0.0, 9))
    assert "data.sources.b has 0 windows" in error(("a", 1.0, 9), ("b", 1.0, 0))


FROZEN_AT = [0, 899, 900, 1299, 1300, 1799, 1800, 2399, 2400, 2999]
FROZEN_STAGES = {
    None: [
        ["web", 0, 570],
        ["code", 3, 39],
        ["books", 1, 19],
        ["code", 5, 73],
        ["code", 6, 33],
        ["code", 12, 16],
        ["web", 1, 453],
        ["code", 19, 24],
        ["web", 2, 797],
        ["web", 2, 433],
    ],
    80: [
        ["web", 0, 395],
        ["code", 3, 28],
        ["books", 1, 1],
        ["code", 5, 6],
        ["code", 6, 3],
        ["code", 12, 36],
        ["web", 1, 258],
        ["code", 19, 2],
        ["web", 2, 482],
        ["web", 2, 145],
    ],
}
FROZEN_MIXTURE = [
    [0, 0, 570],
    [0, 0, 2],
    [2, 0, 44],
    [0, 0, 407],
    [0, 0, 318],
    [1, 255, 10],
    [0, 39, 923],
    [0, 39, 571],
    [1, 1787, 75],
    [1, 3896142, 62],
]
FROZEN_SINGLE = [
    [0, 0, 1092],
    [0, 0, 2683],
    [0, 0, 9931],
    [0, 0, 2347],
    [0, 0, 7981],
    [0, 4, 119],
    [0, 4, 326],
    [0, 4, 11522],
    [0, 34, 1254],
    [0, 74934, 1508],
]
