"""Training and validation batches: independence of ranks and threads, labels and data checks."""

import gc
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import DEADLINE

from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from data.dataset import Dataset
from data.errors import DataError
from data.loader import (
    IGNORE_INDEX,
    Loader,
    StepBatches,
    TrainLoader,
    make_batch,
    validation_batches,
)
from data.preparation.pipeline import prepare
from data.stages import Stages, plan_stages

SEQ_LEN, BATCH = 16, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    sources = {}
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(60):
            (root / name / f"{i:02d}.txt").write_text(f"{name} {i} " * (1 + i % 9))
        sources[name] = SourceConfig("text", str(root / name))
    data = DataConfig(
        "two", str(root / "shards"), sources, validation_fraction=0.3, shard_tokens=500
    )
    prepare(data, TokenizerConfig("byte", 272), progress=False)
    return root / "shards"


def planned(
    micro: int | None = None, weights: dict[str, float] | None = None, *changes: StageConfig
) -> Stages:
    """Return stages over the sources a and b whose first stage has `SEQ_LEN` and `BATCH`."""
    weights = weights or {"a": 1.0, "b": 1.0}
    sources = {name: SourceConfig("stdlib", weight=weight) for name, weight in weights.items()}
    data = DataConfig("x", "x", sources, stages=list(changes))
    stages, problems = plan_stages(
        data, seq_len=SEQ_LEN, global_batch_size=BATCH, micro_batch_size=micro
    )
    assert problems == []
    return stages


def loader(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    micro: int | None = 2,
    weights: dict[str, float] | None = None,
    mask: bool = True,
    threads: int = 1,
    prefetch: int = 2,
    stages: Stages | None = None,
) -> TrainLoader:
    return TrainLoader(
        Dataset.open(folder, mask),
        stages or planned(micro, weights),
        seed=7,
        rank=rank,
        size=size,
        threads=threads,
        prefetch=prefetch,
    )


def concatenated(*steps: StepBatches) -> list[torch.Tensor]:
    """Return tokens, positions and labels of all micro-batches, concatenated."""
    return [
        torch.cat(parts) for parts in zip(*(b for s in steps for b in s.micro_batches), strict=True)
    ]


def test_threads_that_pin_memory_select_the_gpu_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise CUDA would create a context on GPU 0 for every rank."""
    selected: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: selected.update({threading.current_thread().name: device}),
    )

    def read(number: int) -> StepBatches:
        assert selected[threading.current_thread().name] == 3
        return StepBatches([], [], 0, 0, number)

    pinned = Loader(rank=0, size=1, pin_memory=True).read_ahead(read, 2, 0, ())
    assert [next(pinned).number for _ in range(3)] == [0, 1, 2]
    pinned.close()


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (6, 1), (12, 1)])
def test_ranks_and_micro_batches_partition_the_batch_of_one_process(
    folder: Path, size: int, micro: int
) -> None:
    for step in (0, 1, 5000):
        full = loader(folder).step(step)
        ranks = [loader(folder, rank, size, micro).step(step) for rank in range(size)]
        assert all(len(batch.tokens) == micro for rank in ranks for batch in rank.micro_batches)
        for expected, actual in zip(concatenated(full), concatenated(*ranks), strict=True):
            assert torch.equal(expected, actual)
        assert sum(rank.digest for rank in ranks) == full.digest
        assert sum(rank.n_targets for rank in ranks) == full.n_targets
        assert full.n_targets == int((concatenated(full)[2] != IGNORE_INDEX).sum())
        for each in (full, *ranks):  # an upper bound on the documents that attention separates
            starts = [int(torch.eq(batch.positions, 0).sum()) for batch in each.micro_batches]  # type: ignore[arg-type]
            assert all(bound >= n for bound, n in zip(each.n_documents, starts, strict=True))


def test_digest_changes_with_the_step_and_with_any_token(folder: Path) -> None:
    step = loader(folder).step(0)
    assert loader(folder).step(1).digest != step.digest
    changed = loader(folder)
    stream = changed.dataset.train["a"]
    window = stream.window

    def with_one_changed_token(index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, starts = window(index, seq_len)
        changed = tokens.copy()
        changed[3] ^= 1
        return changed, starts

    stream.window = with_one_changed_token  # type: ignore[method-assign]
    assert changed.step(0).digest != step.digest

    same_windows = loader(folder)
    windows = same_windows.order.locate(np.arange(BATCH))
    same_windows.order.locate = lambda samples: windows  # type: ignore
    assert same_windows.step(0).digest == step.digest
    assert same_windows.step(1).digest != step.digest  # equal tokens, other sample indices


def test_epoch_reads_each_window_once(folder: Path) -> None:
    train_loader = loader(folder, weights={"a": 1.0, "b": 1e-4})
    n_windows = train_loader.dataset.train["a"].n_windows(SEQ_LEN)
    source, epoch, window = train_loader.order.locate(np.arange(n_windows + 40))
    first = window[(source == 0) & (epoch == 0)]
    assert sorted(first.tolist()) == list(range(n_windows))


def test_positions_restart_and_labels_are_masked_at_document_boundaries(folder: Path) -> None:
    train_loader = loader(folder)
    tokenizer = Dataset.open(folder).manifest.tokenizer
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    tokens, positions, labels = concatenated(*(train_loader.step(step) for step in range(20)))
    expected = torch.zeros_like(positions)
    for row in range(len(tokens)):
        for i in range(1, SEQ_LEN):
            expected[row, i] = 0 if tokens[row, i] == bos else expected[row, i - 1] + 1
    assert torch.equal(positions, expected)
    assert torch.equal(
        labels == IGNORE_INDEX, tokens == eos
    )  # the next token is in another document
    inside = labels[:, :-1] != IGNORE_INDEX
    assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
    assert (labels == IGNORE_INDEX).any()


def test_without_document_mask_a_row_is_one_document_and_all_labels_are_targets(
    folder: Path,
) -> None:
    masked, plain = loader(folder).step(3), loader(folder, mask=False).step(3)
    assert all(batch.positions is None for batch in plain.micro_batches)
    tokens, labels = (
        torch.cat([getattr(batch, name) for batch in plain.micro_batches])
        for name in ("tokens", "labels")
    )
    assert torch.equal(tokens, concatenated(masked)[0])
    assert torch.equal(labels[:, :-1], tokens[:, 1:])
    assert plain.n_targets == labels.numel()
    assert plain.digest == masked.digest


@settings(deadline=None, max_examples=50)
@given(starts=st.sets(st.integers(0, 8)))
def test_batch_matches_the_definition_for_any_document_starts(starts: set[int]) -> None:
    window = np.arange(100, 109, dtype=np.uint32)
    batch = make_batch([(window, np.array(sorted(starts), dtype=np.int64))], True)
    start_of = [max([s for s in starts if s <= i], default=0) for i in range(8)]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[i - start for i, start in enumerate(start_of)]]
    assert batch.labels.tolist() == [
        [IGNORE_INDEX if i + 1 in starts else 101 + i for i in range(8)]
    ]
    for field in (batch.tokens, batch.positions, batch.labels):
        assert field.dtype == torch.int64 and field.is_contiguous()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_prefetched_steps_equal_steps_read_individually(
    folder: Path, threads: int, prefetch: int
) -> None:
    steps = loader(folder, threads=threads, prefetch=prefetch).steps(11)
    reference = loader(folder)
    for number in range(11, 25):
        actual, expected = next(steps), reference.step(number)
        assert actual.digest == expected.digest
        for one, other in zip(concatenated(actual), concatenated(expected), strict=True):
            assert torch.equal(one, other)
    steps.close()


SKIPS = ((2, 3), (6, 9), (15, 16))


@pytest.mark.parametrize("first", [0, 2, 7])
@pytest.mark.parametrize(("size", "threads", "prefetch"), [(1, 1, 0), (2, 3, 4), (3, 1, 2)])
def test_skipped_batches_are_excluded_and_others_keep_number_and_content(
    folder: Path, size: int, threads: int, prefetch: int, first: int
) -> None:
    stages = planned(None, {"a": 1.0, "b": 1.0}, *STAGED[:2])
    skipped = {number for start, stop in SKIPS for number in range(start, stop)}
    kept = [number for number in range(first, 18) if number not in skipped]
    ranks = [
        loader(folder, r, size, threads=threads, prefetch=prefetch, stages=stages)
        for r in range(size)
    ]
    for rank in ranks:
        steps = rank.steps(first, SKIPS)
        for number in kept:
            actual, expected = next(steps), rank.step(number)
            assert (actual.number, actual.digest) == (number, expected.digest)
            for one, other in zip(concatenated(actual), concatenated(expected), strict=True):
                assert torch.equal(one, other)
        steps.close()


STAGED = [
    StageConfig(60, {"a": 0.0}),
    StageConfig(96, {"a": 3.0}, seq_len=24),
    StageConfig(132, global_batch_size=6, micro_batch_size=1),
]


def test_stages_set_the_weights_sequence_length_and_batch_size_of_each_step(folder: Path) -> None:
    """The expected windows are read from order and streams, sample by sample."""
    stages = planned(2, {"a": 1.0, "b": 1.0}, *STAGED)
    train_loader = loader(folder, stages=stages)
    dataset = train_loader.dataset
    sample = 0
    for step in range(15):
        seq_len = SEQ_LEN if sample < 96 else 24
        batch, micro = (BATCH, 2) if sample < 132 else (6, 1)
        batches = train_loader.step(step)
        assert [b.tokens.shape for b in batches.micro_batches] == [(micro, seq_len)] * (
            batch // micro
        )
        for row in concatenated(batches)[0]:
            source, _, window = (int(c[0]) for c in train_loader.order.locate(np.array([sample])))
            name = train_loader.order.names[source]
            assert name == "b" or not 60 <= sample < 96
            expected = dataset.train[name].window(window, seq_len)[0][:-1]
            assert row.tolist() == expected.tolist()
            sample += 1


def test_digests_do_not_depend_on_ranks_threads_or_prefetch(folder: Path) -> None:
    """A run is resumed twice, on 1, 3 and 2 data ranks."""
    stages = planned(None, {"a": 1.0, "b": 1.0}, *STAGED[:2])
    expected = [loader(folder, stages=stages).step(step).digest for step in range(18)]
    digests: list[int] = []
    for size, threads, prefetch in ((1, 1, 1), (3, 2, 4), (2, 3, 2)):
        ranks = [
            loader(folder, r, size, threads=threads, prefetch=prefetch, stages=stages).steps(
                len(digests)
            )
            for r in range(size)
        ]
        digests += [sum(next(rank).digest for rank in ranks) for _ in range(6)]
        for rank in ranks:
            rank.close()
    assert digests == expected


def test_memory_does_not_grow_over_many_steps(folder: Path) -> None:
    """Python's allocations after 400 steps exceed those after 40 by less than 64 kB."""
    steps = loader(folder, threads=2).steps(0)
    tracemalloc.start()
    try:
        allocated: list[int] = []
        for _ in range(2):
            for _ in range(40 if not allocated else 360):
                next(steps)
            gc.collect()
            allocated.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        steps.close()
    assert allocated[1] - allocated[0] < 2**16


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("llamesh-loader")]


def test_threads_exit_with_their_iterator_and_errors_reach_the_reader(folder: Path) -> None:
    concurrent = loader(folder, threads=3, prefetch=3)
    barrier, read_step = threading.Barrier(3, timeout=DEADLINE), concurrent.step

    def step_after_barrier(number: int) -> StepBatches:
        if number < 3:
            barrier.wait()  # otherwise one thread might read several steps
        return read_step(number)

    concurrent.step = step_after_barrier  # type: ignore
    steps = concurrent.steps(0)
    next(steps)
    assert len(loader_threads()) == 3
    steps.close()
    assert loader_threads() == []

    broken = loader(folder)
    intact_step = broken.step

    def failing_step(number: int) -> StepBatches:
        if number == 2:
            raise OSError("the folder vanished")
        return intact_step(number)

    broken.step = failing_step  # type: ignore
    steps = broken.steps(0)
    next(steps), next(steps)
    with pytest.raises(OSError, match="the folder vanished"):
        next(steps)
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("samples", "size", "micro"), [(10, 1, 4), (10, 2, 4), (7, 3, 2), (9**9, 4, 8)]
)
def test_validation_rows_are_distributed_once_and_all_ranks_get_equal_shapes(
    folder: Path, samples: int, size: int, micro: int
) -> None:
    dataset = Dataset.open(folder)
    counts = [stream.n_windows(SEQ_LEN) for stream in dataset.validation.values()]
    assert min(counts) > 4
    ranks = [
        validation_batches(
            dataset,
            samples=samples,
            seq_len=SEQ_LEN,
            micro_batch_size=micro,
            rank=rank,
            size=size,
        )
        for rank in range(size)
    ]
    order = [(name, i) for i in range(max(counts)) for name in dataset.validation]
    streams = dataset.validation
    chosen = [(name, i) for name, i in order if i < streams[name].n_windows(SEQ_LEN)][:samples]
    for name, stream in streams.items():
        by_rank = [rank[name] for rank in ranks]
        assert {len(batches) for batches in by_rank} == {len(by_rank[0])}
        rows = []
        for group in zip(*by_rank, strict=True):
            for batch in group:
                assert batch.tokens.shape == (micro, SEQ_LEN)
                real = (batch.labels != IGNORE_INDEX).any(dim=1)
                rows += batch.tokens[real].tolist()
        n_selected = [source for source, _ in chosen].count(name)
        spacing = stream.n_windows(SEQ_LEN) / n_selected  # over the entire split
        indices = [int(n * spacing + 1e-9) for n in range(n_selected)]
        assert rows == [stream.window(i, SEQ_LEN)[0][:-1].tolist() for i in indices]


def test_all_mismatches_of_data_and_model_are_reported_together(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.check(planned(), vocab_size=272)
    n_tokens = dataset.train["a"].n_tokens
    with pytest.raises(DataError) as caught:
        dataset.check(planned(2, None, StageConfig(24, seq_len=10**6)), vocab_size=256)
    message = str(caught.value)
    assert f"data.sources.a has {n_tokens:,} training tokens" in message
    assert "data.stages[0].seq_len=1000000 needs 1,000,001" in message
    assert "data.sources.b has" in message
    assert "model.vocab_size=256 is smaller than the tokenizer" in message
    too_large = planned(2, None, StageConfig(24, global_batch_size=10**6))
    with pytest.raises(
        DataError, match=r"data\.stages\[0\]\.global_batch_size=1000000 is larger than"
    ):
        dataset.check(too_large, vocab_size=272)
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight"):
        dataset.check(planned(2, {"a": 1.0, "b": 1e-9}), 272)
    with pytest.raises(DataError, match="differ from the sources of"):
        dataset.order(planned(2, {"a": 1.0}), seed=0)
    with pytest.raises(DataError, match="differ from the sources of"):
        dataset.check(planned(2, {"a": 1.0, "b": 1.0, "c": 1.0}), 272)


def test_source_with_weight_zero_in_a_stage_may_be_too_short_for_it(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.train["b"].n_tokens = 20  # one window of 16, none of 24
    dataset.check(planned(2, {"a": 1.0, "b": 1.0}, StageConfig(24, {"b": 0.0}, seq_len=24)), 272)
    with pytest.raises(DataError, match=r"data\.sources\.b has 20 training tokens.*seq_len=24 "):
        dataset.check(planned(2, {"a": 1.0, "b": 1.0}, StageConfig(24, seq_len=24)), 272)


def test_replaced_tokenizer_file_is_rejected(folder: Path) -> None:
    path = folder / "tokenizer.model"
    original = path.read_bytes()
    swapped = (
        original.replace(b" 65\n", b" x\n").replace(b" 66\n", b" 65\n").replace(b" x\n", b" 66\n")
    )
    path.write_bytes(swapped)
    try:
        with pytest.raises(DataError, match="is not the tokenizer that produced the tokens"):
            Dataset.open(folder).tokenizer()
    finally:
        path.write_bytes(original)
