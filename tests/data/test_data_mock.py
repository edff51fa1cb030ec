"""Mock data: closed forms of the position, the same on every mesh, with realistic documents."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, StageConfig
from data.errors import DataError
from data.loader import TrainLoader, validation_batches
from data.mock import BLOCK, DOCUMENTS, MockDataset, MockStream, document_lengths
from data.stages import plan_stages

VOCAB_SIZE = 128_256
STAGES, _ = plan_stages(
    DataConfig("m", "m", {"mock": SourceConfig("mock")}, stages=[StageConfig(12, seq_len=512)]),
    seq_len=128,
    global_batch_size=12,
    micro_batch_size=2,
)


def dataset(vocab_size: int = VOCAB_SIZE) -> MockDataset:
    return MockDataset("mock", vocab_size, document_mask=True)


def test_windows_of_every_length_cut_one_sequence() -> None:
    stream = MockStream("train", VOCAB_SIZE)
    seq_len, first = 3_000, BLOCK // 3_000 - 1  # the windows cross the end of a block
    tokens, starts = stream.window(0, (first + 3) * seq_len)
    for index in range(first, first + 3):
        window_tokens, window_starts = stream.window(index, seq_len)
        begin = index * seq_len
        assert (window_tokens == tokens[begin : begin + seq_len + 1]).all()
        inside = starts[(starts >= begin) & (starts <= begin + seq_len)]
        assert window_starts.tolist() == (inside - begin).tolist()


def test_formulas_do_not_change() -> None:
    """A run that resumes with another version must read the same tokens."""
    tokens, starts = MockStream("train", VOCAB_SIZE).window(7, 8_192)
    assert tokens.dtype == np.uint32 and starts.dtype == np.int64
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
    assert digest[:16] == "ff5c8aa394f1ae93"


@pytest.mark.parametrize("vocab_size", [2, 272, VOCAB_SIZE])
def test_ids_cover_the_vocabulary_of_the_model(vocab_size: int) -> None:
    tokens, _ = MockStream("train", vocab_size).window(0, 100_000)
    assert tokens.min() == 0 and tokens.max() >= vocab_size * 0.999 - 1
    assert tokens.max() < vocab_size


def test_document_lengths_are_those_of_web_pages() -> None:
    lengths = document_lengths()
    assert lengths.sum() == BLOCK and len(lengths) == DOCUMENTS
    assert (lengths.mean(), np.median(lengths), lengths.min()) == (1_024, 600, 33)
    starts = MockStream("train", 272).window(0, 3 * BLOCK)[1]
    for block in range(3):
        inside = starts[(starts >= block * BLOCK) & (starts < (block + 1) * BLOCK)]
        found = np.diff(inside, append=(block + 1) * BLOCK)
        assert sorted(found) == lengths.tolist()
    assert len(set(np.diff(starts[:DOCUMENTS])) - set(lengths)) == 0
    assert np.diff(starts)[:20].tolist() != np.diff(starts)[DOCUMENTS : DOCUMENTS + 20].tolist()


def test_steps_are_equal_on_any_number_of_data_ranks_and_in_every_stage() -> None:
    for step in (0, 1, 5):
        (alone,) = (TrainLoader(dataset(), STAGES, seed=3, rank=0, size=1).step(step),)
        parts = [
            TrainLoader(dataset(), STAGES, seed=3, rank=rank, size=3).step(step)
            for rank in range(3)
        ]
        assert sum(part.digest for part in parts) == alone.digest
        assert sum(part.n_targets for part in parts) == alone.n_targets
        rows = [batch.tokens for part in parts for batch in part.micro_batches]
        whole = [batch.tokens for batch in alone.micro_batches]
        assert np.concatenate(rows).tolist() == np.concatenate(whole).tolist()
    assert alone.micro_batches[0].tokens.shape == (2, 512)


def test_validation_reads_other_tokens_than_training() -> None:
    batches = validation_batches(
        dataset(), samples=4, seq_len=64, micro_batch_size=4, rank=0, size=1
    )
    (batch,) = batches["mock"]
    training = [MockStream("train", VOCAB_SIZE).window(i, 64)[0][:-1].tolist() for i in range(4)]
    assert batch.tokens.tolist() != training


def test_hash_identifies_the_tokens_so_that_a_run_does_not_resume_on_others() -> None:
    assert dataset().hash == dataset().hash != dataset(4_096).hash


def test_evaluation_of_a_run_on_mock_data_names_a_remedy(tmp_path: Path) -> None:
    from evaluation.config import EvaluationConfig
    from evaluation.held_out import open_held_out

    config = {"data": {"folder": "shards/mock", "sources": {"mock": {"format": "mock"}}}}
    model = SimpleNamespace(max_seq_len=64, vocab_size=272)
    weights: Any = SimpleNamespace(config=config, model=model, folder=tmp_path)
    with pytest.raises(DataError, match=r"data=mock .* set evaluation.data"):
        open_held_out(weights, EvaluationConfig(), optional=False)
