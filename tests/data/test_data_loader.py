"""Batches: the same samples on every mesh, documents kept apart, threads that end."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.loader import IGNORE, Dataset, StepBatches, TrainLoader, make_batch, validation_batches
from data.prepare import prepare

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


def loader(
    folder: Path,
    rank: int = 0,
    size: int = 1,
    micro: int = 2,
    weights: dict[str, float] | None = None,
    mask: bool = True,
    prefetch: int = 2,
) -> TrainLoader:
    return TrainLoader(
        Dataset.open(folder, weights, mask),
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        micro_batch_size=micro,
        seed=7,
        rank=rank,
        size=size,
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


def test_digest_changes_with_the_step_and_with_any_token(folder: Path) -> None:
    step = loader(folder).step(0)
    assert loader(folder).step(1).digest != step.digest
    changed = loader(folder)
    stream = changed.dataset.train["a"]
    window = stream.window

    def with_one_other_token(index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, starts = window(index, seq_len)
        tokens[3] ^= 1
        return tokens, starts

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


def test_without_the_document_mask_positions_run_on_and_every_label_counts(folder: Path) -> None:
    masked, plain = loader(folder).step(3), loader(folder, mask=False).step(3)
    tokens, positions, labels = joined(plain)
    assert torch.equal(tokens, joined(masked)[0])
    assert torch.equal(positions, torch.arange(SEQ_LEN).expand_as(positions))
    assert torch.equal(labels[:, :-1], tokens[:, 1:])
    assert plain.n_targets == labels.numel()
    assert plain.digest == masked.digest


@settings(deadline=None, max_examples=50)
@given(starts=st.sets(st.integers(0, 8)))
def test_a_batch_equals_the_definition_for_any_document_starts(starts: set[int]) -> None:
    window = np.arange(100, 109, dtype=np.uint32)
    batch = make_batch([(window, np.array(sorted(starts), dtype=np.int64))], True)
    begin = [max([s for s in starts if s <= i], default=0) for i in range(8)]
    assert batch.positions.tolist() == [[i - b for i, b in enumerate(begin)]]
    assert batch.labels.tolist() == [[IGNORE if i + 1 in starts else 101 + i for i in range(8)]]
    assert all(part.dtype == torch.int64 and part.is_contiguous() for part in batch)


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_steps_read_ahead_are_the_steps_read_alone_from_any_position(
    folder: Path, prefetch: int
) -> None:
    steps = loader(folder, prefetch=prefetch).steps(11)
    alone = loader(folder)
    for number in range(11, 16):
        ahead, here = next(steps), alone.step(number)
        assert ahead.digest == here.digest
        for one, other in zip(joined(ahead), joined(here), strict=True):
            assert torch.equal(one, other)
    steps.close()


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "llamesh-loader"]


def test_the_thread_ends_with_its_iterator_and_its_errors_reach_the_reader(folder: Path) -> None:
    steps = loader(folder).steps(0)
    next(steps)
    assert len(loader_threads()) == 1
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
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
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
    assert {len(batches) for batches in ranks} == {len(ranks[0])}
    rows = []
    for group in zip(*ranks, strict=True):
        for batch in group:
            assert batch.tokens.shape == (micro, SEQ_LEN)
            real = (batch.labels != IGNORE).any(dim=1)
            rows += batch.tokens[real].tolist()
    order = [(s, i) for i in range(max(counts)) for s in dataset.validation.values()]
    chosen = [(s, i) for s, i in order if i < s.n_windows(SEQ_LEN)][:samples]
    assert rows == [s.window(i, SEQ_LEN)[0][:-1].tolist() for s, i in chosen]


def test_data_that_does_not_fit_the_model_is_told_all_at_once(folder: Path) -> None:
    dataset = Dataset.open(folder)
    dataset.check(SEQ_LEN, vocab_size=272, global_batch_size=BATCH)
    n_tokens = dataset.train["a"].n_tokens
    with pytest.raises(DataError) as caught:
        dataset.check(10**6, vocab_size=256, global_batch_size=BATCH)
    message = str(caught.value)
    assert f"data.sources.a has {n_tokens:,} tokens" in message
    assert "needs 1,000,001" in message
    assert "data.sources.b has" in message
    assert "model.vocab_size (256) is less than the 272" in message
    with pytest.raises(DataError, match=r"train\.global_batch_size \(1000000\) is more than"):
        dataset.check(SEQ_LEN, vocab_size=272, global_batch_size=10**6)
    with pytest.raises(DataError, match=r"data\.sources\.b\.weight"):
        Dataset.open(folder, {"a": 1.0, "b": 1e-9}).check(SEQ_LEN, 272, BATCH)
    with pytest.raises(DataError, match="are not those of"):
        Dataset.open(folder, {"a": 1.0})


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
