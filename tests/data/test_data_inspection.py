"""Inspection shows samples, counts and lengths as training reads them; docs/shards.md is valid."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from rich.console import Console

from data.config import DataConfig, SourceConfig, StageConfig, TokenizerConfig
from data.dataset import Dataset
from data.errors import DataError
from data.inspection import (
    MASKED_LABEL,
    document_lengths,
    read_sample,
    show_dataset,
    show_sample,
)
from data.loader import TrainLoader
from data.manifest import SPLITS, Manifest
from data.packing import pack
from data.preparation.pipeline import prepare
from data.shards import TokenStream
from data.stages import Stages, plan_stages

ROOT = Path(__file__).parents[2]
SEED, SEQ_LENS = 7, (16, 24)
STAGES = [
    StageConfig(24, weights={"b": 3.0}),
    StageConfig(48, seq_len=SEQ_LENS[1]),
    StageConfig(60, global_batch_size=5),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Prepare and pack two sources of sixty short documents in shards of up to 500 tokens."""
    root = tmp_path_factory.mktemp("inspection")
    sources = {}
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(60):
            (root / name / f"{i:02d}.txt").write_text(f"{name} {i}\n" * (1 + i % 9))
        (root / name / "60.txt").write_text("")
        sources[name] = SourceConfig("text", str(root / name))
    folder = str(root / "shards")
    data = DataConfig("two", folder, sources, 0.3, shard_tokens=500, stages=STAGES)
    prepare(data, TokenizerConfig("byte", 272), progress=False)
    for seq_len in SEQ_LENS:
        pack(folder, seq_len, progress=False)
    return data


@pytest.fixture(scope="module")
def stages(config: DataConfig) -> Stages:
    planned, problems = plan_stages(
        config, seq_len=SEQ_LENS[0], global_batch_size=12, micro_batch_size=None
    )
    assert problems == []
    return planned


def rendered(data: DataConfig, dataset: Dataset, index: int, stages: Stages, seed: int) -> str:
    """Return the console output for a sample."""
    console = Console(file=io.StringIO(), width=80)
    show_sample(console, dataset, data, index, stages, seed, title="it", n_steps=100)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("packing", [None, "best_fit"])
@pytest.mark.parametrize("blocks", [None, 64])
def test_sample_equals_the_row_of_the_training_batch(
    config: DataConfig,
    stages: Stages,
    packing: Literal["best_fit"] | None,
    mask: bool,
    blocks: int | None,
) -> None:
    dataset = Dataset.open(config.folder, mask, packing)
    loader = TrainLoader(dataset, stages, seed=SEED, rank=0, size=1, shuffle_block_tokens=blocks)
    seen = set()
    for step in (0, 1, 2, 3, 4, 5, 6, 1000):
        (batch,) = loader.step(step).micro_batches
        first = stages.first_sample(step)
        for row in (0, 3, len(batch.tokens) - 1):
            sample = read_sample(
                dataset, stages, first + row, seed=SEED, shuffle_block_tokens=blocks
            )
            assert torch.equal(
                torch.from_numpy(sample.tokens[:-1].astype(np.int64)), batch.tokens[row]
            )
            assert np.array_equal(sample.labels, batch.labels[row].numpy())
            masked = sample.masked()
            assert all(
                sample.tokens[i + 1] == sample.labels[i]
                for i in range(len(sample.labels))
                if i not in masked
            )
            assert sample.step == step
            seen.add((sample.source, len(sample.labels)))
    assert len(seen) == 4  # both sources, both lengths


@pytest.mark.parametrize("packing", [None, "best_fit"])
def test_output_lists_each_document_with_its_token_range_and_masked_label(
    config: DataConfig, stages: Stages, packing: Literal["best_fit"] | None
) -> None:
    dataset = Dataset.open(config.folder, packing=packing)
    tokenizer = dataset.tokenizer()
    n_boundaries = n_padding = 0
    for number in range(0, 90, 3):
        sample = read_sample(dataset, stages, number, seed=SEED)
        text = rendered(config, dataset, number, stages, SEED)
        documents = re.findall(
            r"document (\d+)/(\d+), tokens? (\d+)(?: … (\d+))? \((\d+)\)(.*?) ─+\n"
            r"(.*?)(?=\n(?:document |padding |\Z)|\Z)",
            text,
            flags=re.DOTALL,
        )
        decoded = []
        for index, (k, n, first, last, size, notes, content) in enumerate(documents, start=1):
            end = int(last or first) + 1
            ids = sample.tokens[int(first) : end]
            assert (int(k), int(n), int(size)) == (index, len(documents), len(ids))
            assert ("starts earlier" in notes) == (ids[0] != tokenizer.bos_id)
            assert ("continues" in notes) == (ids[-1] != tokenizer.eos_id)
            has_mark = content.endswith(f" {MASKED_LABEL}")
            # Without the mark, a newline is added to a document that does not end with one.
            assert has_mark == (end - 1 in sample.masked())
            content = content.removesuffix(f" {MASKED_LABEL}")
            expected = tokenizer.decode(ids)
            assert content == (expected if has_mark else expected.removesuffix("\n"))
            decoded += ids.tolist()
            n_boundaries += has_mark
        padding = [int(n) for n in re.findall(r"padding without labels, .*\((\d+)\)", text)]
        assert decoded == sample.tokens[: len(sample.tokens) - sum(padding)].tolist()
        assert (sample.tokens[len(decoded) :] == tokenizer.eos_id).all()
        n_padding += sum(padding)
    assert n_boundaries > 10
    assert bool(n_padding) == bool(packing)


def test_terminal_control_characters_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red \x1b[31m bell \x07 \x9b0m\nend\ttab" * 3)
    sources = {"text": SourceConfig("text", str(tmp_path / "a.txt"))}
    data = DataConfig("x", str(tmp_path / "shards"), sources, validation_fraction=0)
    prepare(data, TokenizerConfig("byte", 272), progress=False)
    dataset = Dataset.open(data.folder)
    stages, _ = plan_stages(data, seq_len=40, global_batch_size=1, micro_batch_size=None)
    texts = [rendered(data, dataset, index, stages, seed=0) for index in range(2)]
    assert not any(set(text) & {"\x1b", "\x07", "\x9b"} for text in texts)
    assert any("red ␛[31m bell ␇ \ufffd0m\nend\ttab" in text for text in texts)


def test_counts_and_lengths_match_the_shards(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.inspection.OFFSETS_PER_CHUNK", 7)  # a shard has more than twenty
    folder = Path(config.folder)
    manifest = Manifest.read(folder)
    console = Console(file=io.StringIO(), width=100)
    show_dataset(console, folder, manifest)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    for name in config.sources:
        assert [name, "61", "1", "0", "0", "0"] in lines  # the documents of the fixture
        for split in SPLITS:
            (line,) = [line for line in lines if line[:2] == [name, split]]
            counts = manifest.n_documents(split, name), manifest.n_tokens(split, name)
            assert line[2:4] == [f"{n:,}" for n in counts]
            assert line[-1] == f"{len(manifest.shards(split, name))}"
        assert manifest.n_documents("train", name) + manifest.n_documents("validation", name) == 60
    sizes = np.array(
        [
            2 + len(path.read_bytes())  # BOS, bytes, EOS
            for source in config.sources.values()
            for path in Path(source.path or "").glob("*.txt")
            if path.stat().st_size
        ]
    )
    n_documents, n_tokens = document_lengths(folder, manifest)
    for power in range(64):
        in_bin = sizes[(sizes >= 2**power) & (sizes < 2 ** (power + 1))]
        assert (n_documents[power], n_tokens[power]) == (len(in_bin), in_bin.sum())
        if len(in_bin):
            (line,) = [line for line in lines if line[:2] == [f"{2**power:,}", str(len(in_bin))]]


def test_damaged_file_is_reported_by_name(config: DataConfig, stages: Stages) -> None:
    folder = Path(config.folder)
    for ending in ("offsets", "tokens"):
        path = next(folder.glob(f"a/train-*.{ending}"))
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        try:
            with pytest.raises(DataError, match=f"{path.name} is damaged"):
                document_lengths(folder, Manifest.read(folder))
                for number in range(200):
                    read_sample(Dataset.open(folder), stages, number, seed=SEED)
        finally:
            path.write_bytes(original)


def test_numpy_example_in_docs_reads_the_same_window_as_token_stream(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i:02d}.txt").write_text(f"{i} " * (20 + 5 * i))
    sources = {"stdlib": SourceConfig("text", str(corpus))}
    data = DataConfig(
        "x", str(tmp_path / "shards/stdlib-bpe-4096"), sources, 0.1, shard_tokens=1000
    )
    manifest = prepare(data, TokenizerConfig("byte", 272), progress=False)
    page = (ROOT / "docs/shards.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = f"{example}\nnp.save('window', window); np.save('inside', inside)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    shards = manifest.shards("train")
    assert len(shards) > 3
    tokens, starts = TokenStream(Path(data.folder), shards).window(7, 256)
    assert np.array_equal(np.load(tmp_path / "window.npy"), tokens)
    assert len(starts) and np.array_equal(np.load(tmp_path / "inside.npy"), starts)
