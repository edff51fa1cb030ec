"""Batches: the same samples on every mesh, documents kept apart, threads that end."""

import gc
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from data.dataset import Dataset
from data.errors import DataError
from data.loader import IGNORE, StepBatches, TrainLoader, make_batch, validation_batches
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
    """Stages over the sources a and b that begin with `SEQ_LEN` and `BATCH`."""
    given = weights or {"a": 1.0, "b": 1.0}
    sources = {name: SourceConfig("stdlib", weight=weight) for name, weight in given.items()}
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


def joined(*steps: StepBatches) -> list[torch.Tensor]:
    """All rows of the micro-batches, one after another: tokens, positions, labels."""
    return [
        torch.cat(parts) for parts in zip(*(b for s in steps for b in s.micro_batches), strict=True)
    ]


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (6, 1), (12, 1)])
def test_ranks_and_micro_batches_only_deal_out_the_one_process_batch(
    folder: Path, size: int, micro: int
) -> None:
    for step in (0, 1, 5000):
        whole = loader(folder).step(step)
        parts = [loader(folder, rank, size, micro).step(step) for rank in range(size)]
        assert all(len(batch.tokens) == micro for part in parts for batch in part.micro_batches)
        for one, other in zip(joined(whole), joined(*parts), strict=True):
            assert torch.equal(one, other)
        assert sum(part.digest for part in parts) == whole.digest
        assert sum(part.n_targets for part in parts) == whole.n_targets
        assert whole.n_targets == int((joined(whole)[2] != IGNORE).sum())
        for part in (whole, *parts):  # a bound for what attention has to keep apart
            begun = [int(torch.eq(batch.positions, 0).sum()) for batch in part.micro_batches]  # type: ignore[arg-type]
            assert all(n >= found for n, found in zip(part.n_documents, begun, strict=True))


def test_digest_changes_with_the_step_and_with_any_token(folder: Path) -> None:
    step = loader(folder).step(0)
    assert loader(folder).step(1).digest != step.digest
    changed = loader(folder)
    stream = changed.dataset.train["a"]
    window = stream.window

    def with_one_other_token(index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, starts = window(index, seq_len)
        changed = tokens.copy()
        changed[3] ^= 1
        return changed, starts

    stream.window = with_one_other_token  # type: ignore[method-assign]
    assert changed.step(0).digest != step.digest

    same_windows = loader(folder)
    place = same_windows.order.locate(np.arange(BATCH))
    same_windows.order.locate = lambda samples: place  # type: ignore
    assert same_windows.step(0).digest == step.digest
    assert same_windows.step(1).digest != step.digest  # the same tokens as other samples


def test_an_epoch_of_steps_reads_each_window_once(folder: Path) -> None:
    one = loader(folder, weights={"a": 1.0, "b": 1e-4})
    n_windows = one.dataset.train["a"].n_windows(SEQ_LEN)
    source, epoch, window = one.order.locate(np.arange(n_windows + 40))
    first = window[(source == 0) & (epoch == 0)]
    assert sorted(first.tolist()) == list(range(n_windows))


def test_positions_and_labels_stop_at_each_document(folder: Path) -> None:
    one = loader(folder)
    bos, eos = one.dataset.manifest.tokenizer.bos_id, one.dataset.manifest.tokenizer.eos_id
    tokens, positions, labels = joined(*(one.step(step) for step in range(20)))
    expected = torch.zeros_like(positions)
    for row in range(len(tokens)):
        for i in range(1, SEQ_LEN):
            expected[row, i] = 0 if tokens[row, i] == bos else expected[row, i - 1] + 1
    assert torch.equal(positions, expected)
    assert torch.equal(labels == IGNORE, tokens == eos)  # what follows is another document's
    inside = labels[:, :-1] != IGNORE
    assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
    assert (labels == IGNORE).any()


def test_without_the_document_mask_a_row_is_one_document_and_every_label_counts(
    folder: Path,
) -> None:
    masked, plain = loader(folder).step(3), loader(folder, mask=False).step(3)
    assert all(batch.positions is None for batch in plain.micro_batches)
    tokens, labels = (
        torch.cat([getattr(batch, name) for batch in plain.micro_batches])
        for name in ("tokens", "labels")
    )
    assert torch.equal(tokens, joined(masked)[0])
    assert torch.equal(labels[:, :-1], tokens[:, 1:])
    assert plain.n_targets == labels.numel()
    assert plain.digest == masked.digest


@settings(deadline=None, max_examples=50)
@given(starts=st.sets(st.integers(0, 8)))
def test_a_batch_equals_the_definition_for_any_document_starts(starts: set[int]) -> None:
    window = np.arange(100, 109, dtype=np.uint32)
    batch = make_batch([(window, np.array(sorted(starts), dtype=np.int64))], True)
    begin = [max([s for s in starts if s <= i], default=0) for i in range(8)]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[i - b for i, b in enumerate(begin)]]
    assert batch.labels.tolist() == [[IGNORE if i + 1 in starts else 101 + i for i in range(8)]]
    for part in (batch.tokens, batch.positions, batch.labels):
        assert part.dtype == torch.int64 and part.is_contiguous()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_steps_read_ahead_are_the_steps_read_alone_from_any_position(
    folder: Path, threads: int, prefetch: int
) -> None:
    steps = loader(folder, threads=threads, prefetch=prefetch).steps(11)
    alone = loader(folder)
    for number in range(11, 25):
        ahead, here = next(steps), alone.step(number)
        assert ahead.digest == here.digest
        for one, other in zip(joined(ahead), joined(here), strict=True):
            assert torch.equal(one, other)
    steps.close()


SKIPS = ((2, 3), (6, 9), (15, 16))


@pytest.mark.parametrize("first", [0, 2, 7])
@pytest.mark.parametrize(("size", "threads", "prefetch"), [(1, 1, 0), (2, 3, 4), (3, 1, 2)])
def test_skipped_batches_are_left_out_and_all_others_stay(
    folder: Path, size: int, threads: int, prefetch: int, first: int
) -> None:
    """The list of all batches without those of the ranges, under their own numbers."""
    stages = planned(None, {"a": 1.0, "b": 1.0}, *STAGED[:2])
    left_out = {number for begin, stop in SKIPS for number in range(begin, stop)}
    kept = [number for number in range(first, 18) if number not in left_out]
    ranks = [
        loader(folder, r, size, threads=threads, prefetch=prefetch, stages=stages)
        for r in range(size)
    ]
    for rank in ranks:
        steps = rank.steps(first, SKIPS)
        for number in kept:
            found, expected = next(steps), rank.step(number)
            assert (found.number, found.digest) == (number, expected.digest)
            for one, other in zip(joined(found), joined(expected), strict=True):
                assert torch.equal(one, other)
        steps.close()


STAGED = [
    StageConfig(60, {"a": 0.0}),
    StageConfig(96, {"a": 3.0}, seq_len=24),
    StageConfig(132, global_batch_size=6, micro_batch_size=1),
]


def test_stages_read_the_samples_and_lengths_that_they_tell(folder: Path) -> None:
    """Against the order and the streams themselves, sample by sample."""
    stages = planned(2, {"a": 1.0, "b": 1.0}, *STAGED)
    one = loader(folder, stages=stages)
    dataset = one.dataset
    sample = 0
    for step in range(15):
        seq_len = SEQ_LEN if sample < 96 else 24
        batch, micro = (BATCH, 2) if sample < 132 else (6, 1)
        found = one.step(step)
        assert [b.tokens.shape for b in found.micro_batches] == [(micro, seq_len)] * (
            batch // micro
        )
        for row in joined(found)[0]:
            source, _, window = (int(c[0]) for c in one.order.locate(np.array([sample])))
            name = one.order.names[source]
            assert name == "b" or not 60 <= sample < 96
            expected = dataset.train[name].window(window, seq_len)[0][:-1]
            assert row.tolist() == expected.tolist()
            sample += 1


def test_a_change_of_ranks_threads_and_read_ahead_keeps_every_digest(folder: Path) -> None:
    """Three starts of one run, on 1, 3 and 2 data ranks: the digest of each step stays."""
    stages = planned(None, {"a": 1.0, "b": 1.0}, *STAGED[:2])
    alone = [loader(folder, stages=stages).step(step).digest for step in range(18)]
    found: list[int] = []
    for size, threads, prefetch in ((1, 1, 1), (3, 2, 4), (2, 3, 2)):
        ranks = [
            loader(folder, r, size, threads=threads, prefetch=prefetch, stages=stages).steps(
                len(found)
            )
            for r in range(size)
        ]
        found += [sum(next(rank).digest for rank in ranks) for _ in range(6)]
        for rank in ranks:
            rank.close()
    assert found == alone


def test_memory_stands_still_over_many_steps(folder: Path) -> None:
    """What Python holds after 400 steps is what it held after 40, within 64 kB of its own books."""
    steps = loader(folder, threads=2).steps(0)
    tracemalloc.start()
    try:
        held: list[int] = []
        for _ in range(2):
            for _ in range(40 if not held else 360):
                next(steps)
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        steps.close()
    assert held[1] - held[0] < 2**16


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("llamesh-loader")]


def test_threads_end_with_their_iterator_and_errors_reach_the_reader(folder: Path) -> None:
    together = loader(folder, threads=3, prefetch=3)
    meeting, alone = threading.Barrier(3, timeout=60), together.step

    def met(number: int) -> StepBatches:
        if number < 3:
            meeting.wait()  # a quick step would leave its thread for the next one
        return alone(number)

    together.step = met  # type: ignore
    steps = together.steps(0)
    next(steps)
    assert len(loader_threads()) == 3
    steps.close()
    assert loader_threads() == []

    broken = loader(folder)
    whole_step = broken.step

    def step(number: int) -> StepBatches:
        if number == 2:
            raise OSError("the folder vanished")
        return whole_step(number)

    broken.step = step  # type: ignore
    steps = broken.steps(0)
    next(steps), next(steps)
    with pytest.raises(OSError, match="the folder vanished"):
        next(steps)
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("samples", "size", "micro"), [(10, 1, 4), (10, 2, 4), (7, 3, 2), (9**9, 4, 8)]
)
def test_validation_rows_are_dealt_once_and_every_rank_gets_equal_shapes(
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
        of_ranks = [rank[name] for rank in ranks]
        assert {len(batches) for batches in of_ranks} == {len(of_ranks[0])}
        rows = []
        for group in zip(*of_ranks, strict=True):
            for batch in group:
                assert batch.tokens.shape == (micro, SEQ_LEN)
                real = (batch.labels != IGNORE).any(dim=1)
                rows += batch.tokens[real].tolist()
        indices = [i for of, i in chosen if of == name]
        assert rows == [stream.window(i, SEQ_LEN)[0][:-1].tolist() for i in indices]


def test_data_that_does_not_fit_the_model_is_told_all_at_once(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.check(planned(), vocab_size=272)
    n_tokens = dataset.train["a"].n_tokens
    with pytest.raises(DataError) as caught:
        dataset.check(planned(2, None, StageConfig(24, seq_len=10**6)), vocab_size=256)
    message = str(caught.value)
    assert f"data.sources.a has {n_tokens:,} tokens" in message
    assert "data.stages[0].seq_len (1000000) needs 1,000,001" in message
    assert "data.sources.b has" in message
    assert "model.vocab_size (256) is less than the 272" in message
    too_large = planned(2, None, StageConfig(24, global_batch_size=10**6))
    with pytest.raises(
        DataError, match=r"data\.stages\[0\]\.global_batch_size \(1000000\) is more than"
    ):
        dataset.check(too_large, vocab_size=272)
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight"):
        dataset.check(planned(2, {"a": 1.0, "b": 1e-9}), 272)
    with pytest.raises(DataError, match="are not those of"):
        dataset.order(planned(2, {"a": 1.0}), seed=0)
    with pytest.raises(DataError, match="are not those of"):
        dataset.check(planned(2, {"a": 1.0, "b": 1.0, "c": 1.0}), 272)


def test_a_source_that_a_stage_leaves_out_may_be_too_short_for_it(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.train["b"].n_tokens = 20  # one window of 16, none of 24
    dataset.check(planned(2, {"a": 1.0, "b": 1.0}, StageConfig(24, {"b": 0.0}, seq_len=24)), 272)
    with pytest.raises(DataError, match=r"data\.sources\.b has 20 tokens .*seq_len \(24\)"):
        dataset.check(planned(2, {"a": 1.0, "b": 1.0}, StageConfig(24, seq_len=24)), 272)


def test_another_tokenizer_file_is_told(folder: Path) -> None:
    path = folder / "tokenizer.model"
    whole = path.read_bytes()
    swapped = (
        whole.replace(b" 65\n", b" x\n").replace(b" 66\n", b" 65\n").replace(b" x\n", b" 66\n")
    )
    path.write_bytes(swapped)
    try:
        with pytest.raises(DataError, match="is not the tokenizer that made the tokens"):
            Dataset.open(folder).tokenizer()
    finally:
        path.write_bytes(whole)
