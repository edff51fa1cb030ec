"""Inspection of a prepared folder: its contents, document lengths and single samples.

`prepare.py inspect=…` prints these on a terminal of at least 80 columns. A sample is computed as in
training: sample index → order → window → labels. Document text is printed without wrapping, so it
can be copied. Inspecting a run is left to `training.inspection`.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from data.config import DataConfig, PrepareJobConfig, SourceConfig
from data.dataset import Dataset
from data.errors import DataError
from data.loader import IGNORE_INDEX, make_batch
from data.manifest import OFFSET, OUTCOMES, SPLITS, Manifest
from data.packing import PackedStream
from data.progress import ProgressReporter
from data.shards import map_file
from data.stages import Stage, Stages
from data.tokenizer import Tokenizer

SEQ_LEN, SEED = 256, 0  # defaults of `train.py`
OFFSETS_PER_CHUNK = 2**20
MASKED_LABEL = "⊘"
BAR_WIDTH, OTHER_COLUMNS_WIDTH = 60, 58  # of the histogram, in characters
# Documents may contain terminal control characters; print their symbols instead.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROL_PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


class Sample(NamedTuple):
    """One training sample.

    Attributes:
        step: Step that takes the sample, from 0.
        tokens: (seq_len + 1,) uint32; the last token is only a label.
        labels: (seq_len,) int64; -100 if no loss is computed.
        starts: (n_documents,) int64, indices at which a document or a segment of one starts.
        n_padding: Padding tokens at the end of a packed window.
    """

    source: str
    epoch: int
    window: int
    n_windows: int
    step: int
    stage: Stage
    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    n_padding: int

    def segments(self) -> list[tuple[int, int]]:
        """Return the half-open token range of each document segment, without padding."""
        end = len(self.tokens) - self.n_padding
        cuts = sorted({0, *self.starts[self.starts < end].tolist(), end})
        return list(pairwise(cuts))

    def masked(self) -> set[int]:
        """Return the token indices whose label is masked."""
        return set(np.flatnonzero(self.labels == IGNORE_INDEX).tolist())


def inspect_dataset(folder: Path, config: PrepareJobConfig) -> None:
    """Print a dataset and one sample, as a run with this configuration would read it.

    Values that the configuration does not set have the default of `train.py` and are printed as
    assumed.

    Raises:
        DataError: The data is damaged, or `seq_len` is too long for a source.
    """
    data = config.data
    dataset = Dataset.open(folder, data.document_mask, data.packing)
    assumed = [key for key in ("seq_len", "seed") if getattr(config, key) is None]
    weights = dict.fromkeys(dataset.train, 1.0)
    if set(data.sources) == set(weights):
        weights = {name: data.sources[name].weight for name in weights}
    elif len(weights) > 1:
        assumed.append("weights (of data.sources)")
    if data.stages:
        assumed.append("no data.stages")
    seq_len, seed = config.seq_len or SEQ_LEN, config.seed or SEED
    console = stdout_console()
    show_dataset(console, folder, dataset.manifest)
    for name, stream in dataset.train.items():
        if weights[name] and not data.packing and not stream.n_windows(seq_len):
            raise DataError(
                f"seq_len={seq_len} is too long for source {name}, which has "
                f"{stream.n_tokens:,} training tokens; use at most {max(stream.n_tokens - 1, 1)}"
            )
    stages = Stages([Stage(0, 0, 0, seq_len, 1, None, weights)])
    show_sample(
        console, dataset, data, config.sample, stages, seed, title=str(folder), assumed=assumed
    )


class _ResultConsole(Console):
    """rich's console, which by default exits with code 1 when a pipe is closed."""

    def on_broken_pipe(self) -> None:
        """Raise the error."""
        raise


def stdout_console() -> Console:
    """Return a console for standard output that replaces characters outside its encoding."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return _ResultConsole(highlight=False)


def document_lengths(
    folder: Path, manifest: Manifest, update: Callable[[int, int], None] = lambda done, total: None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute a histogram of the lengths of all documents from the offsets files.

    Args:
        update: Called after each shard with the number of shards read and in total.

    Returns:
        Number of documents and their tokens, each (64,) int64; bin i is for lengths of
        2**i … 2**(i+1)-1 tokens.

    Raises:
        DataError: An offsets file is missing or damaged.
    """
    documents, tokens = (np.zeros(64, dtype=np.int64) for _ in range(2))
    shards = manifest.shards()
    for done, shard in enumerate(shards, start=1):
        offsets = map_file(folder, shard.offsets, OFFSET, verify=True)
        for start in range(0, shard.n_documents, OFFSETS_PER_CHUNK):
            lengths = np.diff(offsets[start : start + OFFSETS_PER_CHUNK + 1])
            # frexp is exact below 2**53: length = mantissa × 2**exponent, mantissa in [½, 1).
            bins = np.frexp(lengths.astype(np.float64))[1] - 1
            documents += np.bincount(bins, minlength=64)
            tokens += np.bincount(bins, weights=lengths, minlength=64).astype(np.int64)
        update(done, len(shards))
    return documents, tokens


def read_sample(
    dataset: Dataset,
    stages: Stages,
    index: int,
    *,
    seed: int,
    shuffle_block_tokens: int | None = None,
) -> Sample:
    """Read the training sample with this index, counted from 0.

    Raises:
        DataError: A source is too small, or a shard is damaged.
    """
    order = dataset.order(stages, seed, shuffle_block_tokens)
    source_index, epoch, window = (int(column[0]) for column in order.locate(np.array([index])))
    source = order.names[source_index]
    step = stages.step_of(index)
    stage = stages.at(step)
    stream = dataset.train[source]
    tokens, starts = stream.window(window, stage.seq_len)
    labels = make_batch([(tokens, starts)], dataset.document_mask, stage.seq_len).labels
    n_padding = 0
    if isinstance(stream, PackedStream):
        # Each padding token is a segment of length 1; document segments have at least 2 tokens.
        lengths = np.diff(starts, append=len(tokens))
        n_padding = int(np.argmax(lengths[::-1] > 1))
    position = source, epoch, window, stream.n_windows(stage.seq_len), step, stage
    return Sample(*position, tokens, labels[0].numpy(), starts, n_padding)


def show_dataset(console: Console, folder: Path, manifest: Manifest) -> None:
    """Print sources, tokenizer, counts by source and split, and document lengths.

    Raises:
        DataError: An offsets file is missing or damaged.
    """
    _print_line(console, f"{folder}, hash {manifest.hash[:12]}", "bold")
    _show_sources(console, manifest)
    console.print(_row_table(manifest), "")
    console.print(_split_table(manifest), "")
    with ProgressReporter(enabled=True).bar("reading document lengths") as update:
        documents, tokens = document_lengths(folder, manifest, update)
    bar_width = min(BAR_WIDTH, max(console.width - OTHER_COLUMNS_WIDTH, 8))
    console.print(_length_table(documents, tokens, bar_width), "")


def show_sample(
    console: Console,
    dataset: Dataset,
    data: DataConfig,
    index: int,
    stages: Stages,
    seed: int,
    *,
    title: str,
    n_steps: int | None = None,
    assumed: Sequence[str] = (),
) -> None:
    """Print a sample: the values that determine it, and its documents with their boundaries.

    Args:
        title: The run or dataset.
        n_steps: Steps of the run, or None without a run.
        assumed: Configuration keys that were not given.
    """
    tokenizer, blocks = dataset.tokenizer(), data.shuffle_block_tokens
    sample = read_sample(dataset, stages, index, seed=seed, shuffle_block_tokens=blocks)
    stage, step = sample.stage, sample.step
    console.rule(Text(f"sample {index:,} of {title}"), align="left", style="bold")
    position = f"epoch {sample.epoch}, window {sample.window:,} of {sample.n_windows:,}"
    _print_line(console, f"source {sample.source}, {position}")
    if n_steps is not None:
        first, last = stages.first_sample(step), stages.first_sample(step + 1) - 1
        after_end = "" if step < n_steps else ", after the last step of the run"
        line = f"step {step + 1:,} of {n_steps:,}{after_end} (samples {first:,} … {last:,})"
        _print_line(console, line)
    settings = {"seed": seed, "seq_len": stage.seq_len, "weights": dict(stage.weights)}
    keys = ("document_mask", "packing", "shuffle_block_tokens")
    settings |= {key: getattr(data, key) for key in keys}
    _print_line(console, _format_settings(settings), "dim")
    if assumed:
        line = f"assumed: {', '.join(assumed)} (inspect a run folder for its values)"
        _print_line(console, line, "yellow")
    segments, masked = sample.segments(), sample.masked()
    n_tokens = len(sample.labels)
    legend = f"; {MASKED_LABEL} marks a token whose label is masked" if masked else ""
    line = f"{n_tokens:,} tokens plus the last label, {n_tokens - len(masked):,} labels{legend}"
    _print_line(console, line, "dim")
    for number, (start, end) in enumerate(segments, start=1):
        before = "" if sample.tokens[start] == tokenizer.bos_id else ", starts earlier"
        after = "" if sample.tokens[end - 1] == tokenizer.eos_id else ", continues"
        span = _format_span(start, end)
        _print_rule(console, f"document {number}/{len(segments)}, {span}{before}{after}")
        _show_tokens(console, tokenizer, sample.tokens[start:end], end - 1 in masked)
    if sample.n_padding:
        end = len(sample.tokens)
        _print_rule(console, f"padding without labels, {_format_span(end - sample.n_padding, end)}")


def _show_sources(console: Console, manifest: Manifest) -> None:
    """Print each source's configuration and input revision, and the tokenizer."""
    configuration, entry = manifest.configuration, manifest.tokenizer
    defaults = {**asdict(SourceConfig("text")), "format": None}
    for name, source in manifest.sources.items():
        values = configuration.get("data.sources", {}).get(name, {})
        changed = {key: value for key, value in values.items() if value != defaults.get(key)}
        _print_line(console, f"{name}: {_format_settings(changed)}")
        _print_line(console, f"    revision {source.revision}", "dim")
    keys = ("data.validation_fraction", "data.shard_tokens", "data.invalid_text")
    _print_line(console, _format_settings({key: configuration.get(key) for key in keys}), "dim")
    _print_line(
        console,
        f"tokenizer: {entry.name}, {entry.vocab_size:,} ids, "
        f"bos {entry.bos_id}, eos {entry.eos_id}, hash {entry.hash[:12]}",
    )
    console.print()


def _row_table(manifest: Manifest) -> Table:
    """Return a table of row counts by source and outcome."""
    table = _make_table("rows", *OUTCOMES)
    for name, source in manifest.sources.items():
        counts = (source.documents.get(outcome, 0) for outcome in OUTCOMES)
        table.add_row(Text(name), *(f"{count:,}" for count in counts))
    return table


def _split_table(manifest: Manifest) -> Table:
    """Return a table of documents, tokens and shards by source and split."""
    headings = ("source", "split", "documents", "tokens", "% of tokens", "per document", "shards")
    table = _make_table(*headings)
    table.columns[1].justify = "left"
    all_tokens = manifest.n_tokens()
    names: list[str | None] = [*manifest.sources]
    for name in [*names, None] if len(names) > 1 else names:
        label = Text("all", style="bold") if name is None else Text(name)
        for split in SPLITS:
            n_documents = manifest.n_documents(split, name)
            n_tokens = manifest.n_tokens(split, name)
            fraction = f"{n_tokens / max(all_tokens, 1):.1%}"
            per_document = f"{n_tokens / n_documents:,.0f}" if n_documents else ""
            counts = f"{n_documents:,}", f"{n_tokens:,}", fraction, per_document
            table.add_row(label, split, *counts, f"{len(manifest.shards(split, name)):,}")
    return table


def _length_table(documents: np.ndarray, tokens: np.ndarray, bar_width: int) -> Table:
    """Return a histogram of document lengths in powers of two."""
    table = _make_table("tokens ≥", "documents", "", "% of documents", "% of tokens")
    table.columns[2].justify = "left"
    table.columns[0].justify, table.columns[0].no_wrap = "right", True
    (filled,) = documents.nonzero()
    for power in range(filled[0], filled[-1] + 1) if len(filled) else ():
        n = int(documents[power])
        bar = Bar(int(documents.max()), 0, n, width=bar_width, color="cyan")
        fractions = n / documents.sum(), tokens[power] / tokens.sum()
        table.add_row(f"{2**power:,}", f"{n:,}", bar, *(f"{each:.1%}" for each in fractions))
    return table


def _make_table(*headings: str) -> Table:
    """Return a table whose first column is text and whose other columns are numbers."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    return table


def _show_tokens(
    console: Console, tokenizer: Tokenizer, tokens: np.ndarray, last_label_masked: bool
) -> None:
    """Print decoded tokens, with special tokens in colour and a mark for a masked last label."""
    parts = []
    # Decode consecutive ordinary tokens together: a character may span several tokens.
    for special, run in groupby(tokens.tolist(), key=lambda token: token >= len(tokenizer.ranks)):
        text = tokenizer.decode(run).translate(CONTROL_PICTURES)
        parts.append(Segment(text, Style(color="cyan" if special else None)))
    if last_label_masked:
        parts.append(Segment(f" {MASKED_LABEL}", Style(color="red", bold=True)))
    if not parts[-1].text.endswith("\n"):
        parts.append(Segment("\n"))
    # Segments, because `Console.out` and `Text` replace tabs with spaces.
    console.print(Segments(parts), end="", crop=False)


def _format_span(start: int, end: int) -> str:
    indices = f"token {start:,}" if end - start == 1 else f"tokens {start:,} … {end - 1:,}"
    return f"{indices} ({end - start:,})"


def _format_settings(settings: dict[str, object]) -> str:
    """Format settings other than None as comma-separated `key value` pairs."""
    given = {key: value for key, value in settings.items() if value is not None}
    return ", ".join(f"{key} {_format_value(value)}" for key, value in given.items())


def _format_value(value: object) -> str:
    """Format a value as in a command-line override."""
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_rule(console: Console, title: str) -> None:
    console.rule(Text(title, style="green"), align="left", style="green dim")


def _print_line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text), style=style, soft_wrap=not console.is_terminal)
