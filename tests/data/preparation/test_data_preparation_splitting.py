"""Held-out text of corpora of one file, a few, and many documents."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.manifest import SPLITS
from data.preparation import splitting
from data.preparation.pipeline import prepare
from data.preparation.splitting import (
    LONG_BYTES,
    is_validation,
    split_document,
    tail_threshold,
)
from data.shards import TokenStream
from data.tokenizer import load_tokenizer

BYTE = TokenizerConfig("byte", 272)
PLAY = "".join(f"SPEAKER {i % 9}:\nLine {i} of the play, naïve 🙂.\n\n" for i in range(26_000))


def texts_of(data: DataConfig) -> dict[str, list[str]]:
    """Prepare data and return the documents of each split."""
    manifest = prepare(data, BYTE, progress=False)
    tokenizer, found = load_tokenizer(BYTE, data.folder), {}
    for split in SPLITS:
        stream = TokenStream(Path(data.folder), manifest.shards(split))
        tokens, starts = stream.window(0, stream.n_tokens - 1)
        found[split] = [tokenizer.decode(ids[1:-1]) for ids in np.split(tokens, starts[1:])]
    return found


def test_one_large_file_is_trained_on_except_for_its_tail(tmp_path: Path) -> None:
    assert len(PLAY.encode()) > LONG_BYTES
    (tmp_path / "play.txt").write_text(PLAY)
    source = SourceConfig("text", str(tmp_path / "play.txt"))
    found = texts_of(DataConfig("play", str(tmp_path / "shards"), {"text": source}))
    ((train,), (validation,)) = found.values()
    assert train + validation == PLAY
    assert train.endswith("\n")
    assert len(validation) / len(PLAY) == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("sizes", [[20_000], [9_000, 30_000, 11_000], [500] * 8])
def test_a_few_documents_leave_text_for_both_splits(sizes: list[int], tmp_path: Path) -> None:
    """By their hashes alone, all of them fall into one split."""
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_text(PLAY[number * 100 :][:size])
    source = SourceConfig("text", str(tmp_path / "*.txt"))
    data = DataConfig("few", str(tmp_path / "a"), {"text": source}, validation_fraction=0.05)
    found = texts_of(data)
    n_held_out = sum(map(len, found["validation"]))
    assert n_held_out / sum(sizes) == pytest.approx(0.05, rel=0.5)
    assert sum(map(len, found["train"])) + n_held_out == sum(sizes)
    assert texts_of(replace(data, folder=str(tmp_path / "b"), workers=3)) == found


def test_large_corpora_of_short_documents_are_split_by_hash_as_before() -> None:
    documents = [f"document {i} ".encode() * 20 for i in range(3000)]
    assert tail_threshold(documents, 0.02) == LONG_BYTES
    for content in documents[:200]:
        parts = split_document(content.decode(), content, 0.02)
        assert parts[is_validation(content, 0.02)] == content.decode()


def test_a_large_document_in_the_hashed_half_does_not_hold_out_far_too_much() -> None:
    number = next(i for i in range(999) if is_validation(f"{i:<9}".encode() * 2000, 0.02))
    documents = [f"{i:<9}".encode() * 2000 for i in range(number - 9, number + 1)]
    assert tail_threshold(documents, 0.02) == 0  # by hash, a tenth of the text would be held out


def test_no_split_of_a_document_loses_text_or_holds_out_far_too_much() -> None:
    texts = ["", "x", "naïve🙂" * 40, "a b " * 300, "line\n" * 1000, "x" * 999, "\n" * 500]
    for text, fraction in product(texts, (0.0, 0.001, 0.02, 0.3, 0.99)):
        train, validation = split_document(text, text.encode(), fraction, threshold=0)
        assert train + validation == text
        assert len(validation) <= round(len(text) * fraction)
        assert len(validation) >= round(len(text) * fraction) * 0.875 - 1


def test_few_documents_are_read_to_choose_between_hash_and_tail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_read = 0

    def documents() -> Iterator[bytes]:
        nonlocal n_read
        for n_read in range(1, 10**6):
            yield f"document {n_read} ".encode() * 100

    assert tail_threshold(documents(), 0.02) == LONG_BYTES
    assert n_read < 2000
    monkeypatch.setattr(splitting, "MAX_READ_BYTES", 10_000)
    assert tail_threshold((b"x" * 1000 for _ in range(10**9)), 1e-12) == LONG_BYTES
    assert tail_threshold([], 0.02) == 0
