"""What `prepare.py inspect=…` shows of a dataset on the screen.

Figures and the sample come from `data.inspection`; here they are laid out for a terminal of 80
columns or more. Text of documents goes out unwrapped, so that it can be copied.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.segment import Segment, Segments
from rich.style import Style
from rich.table import Table
from rich.text import Text

from data.config import DataConfig, PrepareJobConfig, SourceConfig
from data.dataset import Dataset
from data.errors import DataError
from data.inspection import Lengths, Sample, document_lengths, read_sample
from data.manifest import SPLITS, Manifest
from data.stages import Stage, Stages
from data.tokenizer import Tokenizer

FATES = ("empty", "filtered", "skipped", "replaced")
NO_LABEL = "⊘"
SEQ_LEN, SEED = 256, 0  # defaults of train.py
BAR_WIDTH, REST_WIDTH = 60, 58  # columns of the histogram: its bars at most, and all else
# A document may hold what a terminal obeys: control characters are shown by their pictures.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


class Reading(NamedTuple):
    """How a sample is read, for its heading: whose it is, values by key, which are assumed.

    `n_steps` is None where there is no run.
    """

    title: str
    n_steps: int | None
    values: dict[str, object]
    assumed: list[str]


def inspect_dataset(folder: Path, config: PrepareJobConfig) -> None:
    """Print a dataset, and a sample as a run with this configuration would read it.

    Whatever the configuration leaves open has the default of `train.py` and is printed as assumed.

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
    seq_len = SEQ_LEN if config.seq_len is None else config.seq_len
    console = stdout_console()
    show_dataset(console, folder, dataset.manifest)
    for name, stream in dataset.train.items():
        if weights[name] and not data.packing and not stream.n_windows(seq_len):
            raise DataError(
                f"seq_len={seq_len} is too long for source {name}, which has "
                f"{stream.n_tokens:,} training tokens; use at most {max(stream.n_tokens - 1, 1)}"
            )
    stages = Stages([Stage(0, 0, 0, seq_len, 1, None, weights)])
    seed = SEED if config.seed is None else config.seed
    print_sample(
        console, dataset, data, config.sample, stages, seed, title=str(folder), assumed=assumed
    )


def print_sample(
    console: Console,
    dataset: Dataset,
    data: DataConfig,
    number: int,
    stages: Stages,
    seed: int,
    *,
    title: str,
    n_steps: int | None = None,
    assumed: Sequence[str] = (),
) -> None:
    """Print the sample with index `number` and the values that determine it.

    Args:
        title: Run or dataset folder.
        n_steps: Length of the run, or None without a run.
        assumed: Keys whose values are defaults.
    """
    blocks = data.shuffle_block_tokens
    sample = read_sample(dataset, stages, number, seed=seed, shuffle_block_tokens=blocks)
    values = {
        "seed": seed,
        "seq_len": sample.stage.seq_len,
        "weights": dict(sample.stage.weights),
        "document_mask": data.document_mask,
        "packing": data.packing,
        "shuffle_block_tokens": blocks,
    }
    reading = Reading(title, n_steps, values, list(assumed))
    show_sample(console, sample, dataset.tokenizer(), reading)


def show_dataset(console: Console, folder: Path, manifest: Manifest) -> None:
    """Sources, counts by source and split, lengths of documents, tokenizer.

    Raises:
        DataError: an offsets file is gone or damaged.
    """
    _line(console, f"{folder}, hash {manifest.hash[:12]}", "bold")
    _show_sources(console, manifest)
    for table in (_rows_read(manifest), _counts(manifest)):
        console.print(table, "")
    progress = Console(stderr=True)
    with Progress(console=progress, transient=True, disable=not progress.is_terminal) as bar:
        task = bar.add_task("lengths of documents", total=None)
        lengths = document_lengths(
            folder, manifest, lambda done, total: bar.update(task, completed=done, total=total)
        )
    bar_width = min(BAR_WIDTH, max(console.width - REST_WIDTH, 8))
    console.print(_histogram(lengths, bar_width), "")


def show_sample(console: Console, sample: Sample, tokenizer: Tokenizer, reading: Reading) -> None:
    """A sample's place in the order, and its documents with their boundaries."""
    console.rule(Text(f"sample {sample.number:,} of {reading.title}"), align="left", style="bold")
    _line(
        console,
        f"source {sample.source}, epoch {sample.epoch}, window {sample.window:,} of "
        f"{sample.n_windows:,}{_step(sample, reading.n_steps)}",
    )
    given = {key: value for key, value in reading.values.items() if value is not None}
    _line(console, ", ".join(f"{key} {_plain(value)}" for key, value in given.items()), "dim")
    if reading.assumed:
        assumed = ", ".join(reading.assumed)
        _line(console, f"assumed: {assumed}; a run's folder tells what it trains on", "yellow")
    pieces, masked = sample.pieces(), sample.masked()
    n_labels = len(sample.labels) - len(masked)
    mark = f"; {NO_LABEL} after a token: its label is masked" if masked else ""
    _line(
        console,
        f"{len(sample.labels):,} tokens and a last one that is a label alone, {n_labels:,} labels"
        f"{mark}",
        "dim",
    )
    for number, (begin, end) in enumerate(pieces, start=1):
        before = "" if sample.tokens[begin] == tokenizer.bos_id else ", begun before"
        after = "" if sample.tokens[end - 1] == tokenizer.eos_id else ", goes on"
        _rule(console, f"document {number}/{len(pieces)}, {_span(begin, end)}{before}{after}")
        _show_tokens(console, tokenizer, sample.tokens[begin:end], end - 1 in masked)
    if sample.n_padding:
        end = len(sample.tokens)
        _rule(console, f"padding without labels, {_span(end - sample.n_padding, end)}")


def stdout_console() -> Console:
    """Standard output; what its encoding lacks is replaced."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def _show_sources(console: Console, manifest: Manifest) -> None:
    """What each source was made from, with the revision of its input, and the tokenizer."""
    configured = manifest.configuration.get("data.sources", {})
    defaults = {**asdict(SourceConfig("text")), "format": None}
    for name, source in manifest.sources.items():
        told = [
            f"{key} {_plain(value)}"
            for key, value in configured.get(name, {}).items()
            if value != defaults.get(key)
        ]
        _line(console, f"{name}: {', '.join(told)}")
        _line(console, f"    revision {source.revision}", "dim")
    others = ("data.validation_fraction", "data.shard_tokens", "data.invalid_text")
    configured = manifest.configuration
    told = [f"{key} {_plain(configured[key])}" for key in others if key in configured]
    _line(console, ", ".join(told), "dim")
    entry = manifest.tokenizer
    _line(
        console,
        f"tokenizer: {entry.name}, {entry.vocab_size:,} ids, begin {entry.bos_id}, "
        f"end {entry.eos_id}, hash {entry.hash[:12]}",
    )
    console.print()


def _rows_read(manifest: Manifest) -> Table:
    """What became of each source's rows, by cause."""
    table = _table("rows", "read", *FATES)
    for name, source in manifest.sources.items():
        counts = [source.documents.get(fate, 0) for fate in ("read", *FATES)]
        table.add_row(Text(name), *(f"{count:,}" for count in counts))
    return table


def _counts(manifest: Manifest) -> Table:
    """Documents, tokens and shards by source and split."""
    table = _table("source", "split", "documents", "tokens", "of all", "a document", "shards")
    table.columns[1].justify = "left"
    all_tokens = sum(manifest.n_tokens(split) for split in SPLITS)
    names: list[str | None] = [*manifest.sources]
    for name in [*names, None] if len(names) > 1 else names:
        for split in SPLITS:
            n_documents = manifest.n_documents(split, name)
            n_tokens = manifest.n_tokens(split, name)
            table.add_row(
                Text("all" if name is None else name, style="bold" if name is None else ""),
                split,
                f"{n_documents:,}",
                f"{n_tokens:,}",
                f"{n_tokens / max(all_tokens, 1):.1%}",
                f"{n_tokens / n_documents:,.0f}" if n_documents else "",
                f"{len(manifest.shards(split, name)):,}",
            )
    return table


def _histogram(lengths: Lengths, bar_width: int) -> Table:
    """Documents by length, in powers of two: how many, and what share of all tokens they hold."""
    table = _table("tokens from", "documents", "", "of documents", "of tokens")
    table.columns[2].justify = "left"
    table.columns[0].justify, table.columns[0].no_wrap = "right", True
    (filled,) = lengths.documents.nonzero()
    for power in range(filled[0], filled[-1] + 1) if len(filled) else ():
        n_documents, n_tokens = int(lengths.documents[power]), int(lengths.tokens[power])
        table.add_row(
            f"{2**power:,}",
            f"{n_documents:,}",
            Bar(int(lengths.documents.max()), 0, n_documents, width=bar_width, color="cyan"),
            f"{n_documents / int(lengths.documents.sum()):.1%}",
            f"{n_tokens / int(lengths.tokens.sum()):.1%}",
        )
    return table


def _table(*headings: str) -> Table:
    """A table whose first column holds names, and the others numbers."""
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, show_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    return table


def _step(sample: Sample, n_steps: int | None) -> str:
    """Which step takes a sample, counted from 1 as in the log."""
    if n_steps is None:
        return ""
    size = sample.stage.global_batch_size
    first = sample.stage.first_sample + (sample.step - sample.stage.first_step) * size
    beyond = "" if sample.step < n_steps else ", after the run's end"
    return (
        f"\nstep {sample.step + 1:,} of {n_steps:,}{beyond} "
        f"(samples {first:,} … {first + size - 1:,})"
    )


def _show_tokens(
    console: Console, tokenizer: Tokenizer, tokens: np.ndarray, masks_last: bool
) -> None:
    """The text of a document's part, special tokens in colour, and a mark for a masked label."""
    parts = []
    # Runs of ordinary tokens are decoded together: a character may be made of several.
    for special, run in groupby(tokens.tolist(), key=lambda token: token >= len(tokenizer.ranks)):
        text = tokenizer.decode(run).translate(PICTURES)
        parts.append(Segment(text, Style(color="cyan" if special else None)))
    if masks_last:
        parts.append(Segment(f" {NO_LABEL}", Style(color="red", bold=True)))
    if not parts[-1].text.endswith("\n"):
        parts.append(Segment("\n"))
    # As it is: `Console.out` and `Text` put spaces in the place of tabs.
    console.print(Segments(parts), end="", crop=False)


def _span(begin: int, end: int) -> str:
    places = f"token {begin:,}" if end - begin == 1 else f"tokens {begin:,} … {end - 1:,}"
    return f"{places} ({end - begin:,})"


def _plain(value: object) -> str:
    """A value as a person types it."""
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rule(console: Console, title: str) -> None:
    console.rule(Text(title, style="green"), align="left", style="green dim")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text), style=style, soft_wrap=not console.is_terminal)
