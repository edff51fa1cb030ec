"""The preparation of a dataset folder, from documents to the manifest.

No shard is written before every source has yielded its first document, and the manifest is written
last, so a folder is either prepared or not. An interrupted preparation resumes, also inside a part,
and produces the same bytes as an uninterrupted one. One process prepares (with its workers); all
others call `wait_until_prepared`.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any, TextIO

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import wait_for_writer, write_atomically, write_error
from data.manifest import (
    MANIFEST_FILE,
    OUTCOMES,
    SPLITS,
    TOKEN,
    Manifest,
    SourceEntry,
    TokenizerEntry,
)
from data.mappings import raise_file_limit
from data.preparation import state
from data.preparation.identity import dataset_configuration, read_prepared
from data.preparation.part import PartCounts, PartRecord, prepare_part, record_path
from data.preparation.pool import prepare_parts
from data.preparation.splitting import tail_threshold
from data.progress import ProgressCounts, ProgressReporter
from data.sources.corpora import Corpus, Part, find_corpus
from data.sources.fingerprints import Fingerprints, input_paths, take_fingerprints, write_sources
from data.sources.rows import Row, rows
from data.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    model_file,
    read_tokenizer,
    ready_tokenizer,
    train_bpe,
)


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: bool = True,
    check: Callable[[Manifest], None] | None = None,
    trained_on: str | None = None,
) -> Manifest:
    """Prepare `data.folder`, resume its preparation, or return the manifest if it is prepared.

    Args:
        progress: Report on standard error.
        check: Called with the manifest before it is written; may raise DataError to reject the
            data, which deletes everything written.
        trained_on: See `read_prepared`.

    Raises:
        DataError: A source or the tokenizer is unusable; or the folder belongs to another
            configuration, contains other files, is not writable or is being prepared by another
            process. Finished parts are kept.
    """
    raise_file_limit()  # the `datasets` library keeps every file of a dataset mapped
    folder = Path(data.folder)
    reporter = ProgressReporter(progress)
    if (folder / MANIFEST_FILE).exists():
        manifest = read_prepared(data, tokenizer, trained_on, reporter.log)
        state.finish_interrupted(folder)
        return manifest
    state.reject_foreign_files(folder)
    preparation = None
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        with state.lock_folder(folder) as marker:
            if (folder / MANIFEST_FILE).exists():  # written by another process just before
                manifest = read_prepared(data, tokenizer, trained_on, reporter.log)
            else:
                preparation = _Preparation(data, tokenizer, marker, created, reporter)
                manifest = preparation.run(check)
            state.finish(folder)
    except OSError as error:
        n_needed = preparation.bytes_needed() if preparation else 0
        raise DataError(
            f"{write_error(folder, error, n_needed)}, then run again to resume"
        ) from error
    return manifest


def wait_until_prepared(folder: Path | str) -> Manifest:
    """Wait, without time limit, until another process has prepared the folder.

    Raises:
        DataError: The folder is damaged, or no process works on it.
    """
    folder = Path(folder)
    is_ready = (folder / MANIFEST_FILE).exists
    marker = folder / state.MARKER_FILE
    wait_for_writer(is_ready, marker, f"data.folder={folder} is not prepared", "prepare.py")
    return Manifest.read(folder)


@dataclass
class _Preparation:
    """One preparation of a folder whose lock this process holds.

    Args:
        marker: The open marker file that holds the lock.
        created: Folders that exist only because of this preparation, deepest first.
    """

    data: DataConfig
    tokenizer: TokenizerConfig
    marker: TextIO
    created: list[Path]
    reporter: ProgressReporter

    def __post_init__(self) -> None:
        self.folder = Path(self.data.folder)
        self.wanted = dataset_configuration(self.data, self.tokenizer)
        self.corpora: dict[str, Corpus] = {}
        self.fingerprints: dict[str, Fingerprints] = {}
        self.thresholds: dict[str, int] = {}  # of `tail_threshold`

    def run(self, check: Callable[[Manifest], None] | None) -> Manifest:
        """Prepare everything up to and including the manifest."""
        parts: list[Part] = []
        try:
            for name in self.data.sources:
                self._find_source(name)
            ready = ready_tokenizer(self.tokenizer)  # None: to be trained
            parts = [part for corpus in self.corpora.values() for part in corpus.parts]
            new = state.make_marker(self.data, self.wanted, self.corpora, self.fingerprints, ready)
            state.resume(self.folder, parts, new, self.marker, self.reporter)
            tokenizer = self._make_tokenizer(ready)
            self._write_parts(tokenizer, parts)
        except BaseException as error:
            kept = []
            with suppress(OSError):  # report the original error
                kept = state.keep_complete(self.folder, parts) if parts else []
                # Before the parts are known, keep those of an earlier preparation.
                if not kept and (parts or not state.read_marker(self.marker)):
                    state.remove_all(self.folder, self.created)
            if kept and isinstance(error, DataError):
                raise DataError(
                    f"{error}\nFinished parts are kept in {self.folder}; run again to resume."
                ) from error
            raise
        try:
            manifest = self._make_manifest(tokenizer)
            if check is not None:
                check(manifest)
        except DataError:
            state.remove_all(self.folder, self.created)
            raise
        write_sources(self.folder, self.fingerprints)
        manifest.write(self.folder)
        return manifest

    def bytes_needed(self) -> int:
        """Estimate the size of the shards that are not written yet."""
        parts = [part for corpus in self.corpora.values() for part in corpus.parts]
        records = [PartRecord.read(record_path(self.folder, part)) for part in parts]
        n_total = sum(part.n_bytes for part in parts)
        n_read = sum(record.n_bytes for record in records)
        n_written = sum(shard.n_bytes for record in records for shard in record.all_shards)
        if not n_read:  # four bytes of text are about one token, which is stored in four bytes
            return n_total * (TOKEN.itemsize if self.tokenizer.name == "byte" else 1)
        return n_written * max(n_total - n_read, 0) // n_read

    def _find_source(self, name: str) -> None:
        """Find the input of a source (a hub dataset is downloaded) and read its first documents."""
        source = self.data.sources[name]
        self.corpora[name] = find_corpus(name, source, self.data.invalid_text)
        for note in self.corpora[name].notes:
            self.reporter.log(note)
        parts = self.corpora[name].parts
        is_stdlib = source.format == "stdlib"
        paths = [one.path for part in parts for one in part.ranges] if is_stdlib else []
        try:
            self.fingerprints[name] = take_fingerprints(paths or input_paths(source, {}))
        except OSError as error:
            raise DataError(
                f"data.sources.{name}.path={source.path}: cannot read ({error})"
            ) from None
        self._check_text(name)
        corpus = self.corpora[name]
        contents = (
            row.content  # the same for every data.invalid_text
            for part in corpus.parts
            for row in rows(part, source, "skip", corpus.dataset)
        )
        self.thresholds[name] = tail_threshold(contents, self.data.validation_fraction)

    def _check_text(self, name: str) -> None:
        """Raise DataError if no document of a source has text."""
        n_rows = Counter[str]()
        for row in self._rows(name):
            if row.text.strip():
                return
            n_rows["whitespace" if row.text else row.outcome] += 1
        key = f"data.sources.{name}"
        start = f"{key}.path={self.data.sources[name].path} contains no"
        if not n_rows:
            raise DataError(f"{start} document; use a path that contains text")
        counts = ", ".join(f"{n:,} {outcome}" for outcome, n in n_rows.items())
        raise DataError(
            f"{start} text (documents: {counts}); use other files, or change {key}.text_column, "
            f"{key}.filter or data.invalid_text"
        )

    def _rows(self, name: str) -> Iterator[Row]:
        corpus = self.corpora[name]
        for part in corpus.parts:
            yield from rows(part, self.data.sources[name], self.data.invalid_text, corpus.dataset)

    def _texts(self, name: str) -> Iterator[str]:
        """Yield the text of each row of a source; empty for rows without text."""
        return (row.text for row in self._rows(name))

    def _make_tokenizer(self, ready: Tokenizer | None) -> Tokenizer:
        """Load or train the tokenizer and write it to the folder."""
        path = self.folder / MODEL_FILE
        if ready is None and path.exists():  # trained before an interruption
            return read_tokenizer(path, self.tokenizer.name)
        tokenizer = ready or self._train_tokenizer()
        write_atomically(path, model_file(tokenizer.ranks))
        return tokenizer

    def _train_tokenizer(self) -> Tokenizer:
        """Train a tokenizer on the first documents, with equally many characters per source."""
        n_characters = self.tokenizer.training_characters // len(self.corpora)
        n_documents = 0

        def texts(name: str) -> Iterator[str]:
            nonlocal n_documents
            remaining = n_characters
            for text in self._texts(name):
                yield text[:remaining]
                n_documents += 1
                remaining -= len(text)
                if remaining <= 0:
                    return

        corpus = chain.from_iterable(map(texts, self.corpora))
        with self.reporter.watch(
            "training the tokenizer", lambda: ProgressCounts(0, n_documents, 0), None
        ):
            trained = train_bpe(corpus, self.tokenizer.vocab_size)
        self.reporter.log(f"Trained a tokenizer with {trained.vocab_size:,} tokens")
        return trained

    def _write_parts(self, tokenizer: Tokenizer, parts: list[Part]) -> None:
        """Tokenize all parts that are not done."""
        counters: Any = RawArray(PartCounts, len(parts))
        remaining = []
        for index, part in enumerate(parts):
            path = record_path(self.folder, part)
            path.parent.mkdir(exist_ok=True)
            record = PartRecord.read(path)
            counters[index] = record.counts
            if not record.done:
                remaining.append((index, part))

        def read_counts() -> ProgressCounts:
            names = ProgressCounts._fields
            return ProgressCounts(
                *(sum(getattr(part, name) for part in counters) for name in names)
            )

        datasets = {name: corpus.dataset for name, corpus in self.corpora.items()}
        prepare = partial(prepare_part, self.data, tokenizer, datasets, self.thresholds)
        n_bytes = (
            sum(part.n_bytes for part in parts) if all(part.n_bytes for part in parts) else None
        )
        n_workers = self.data.workers or _n_cores()
        with self.reporter.watch(f"preparing {self.data.name}", read_counts, n_bytes):
            prepare_parts(prepare, remaining, n_workers, counters, self.marker.fileno())

    def _make_manifest(self, tokenizer: Tokenizer) -> Manifest:
        sources = {}
        for name, corpus in self.corpora.items():
            records = [PartRecord.read(record_path(self.folder, part)) for part in corpus.parts]
            counts = {
                outcome: sum(record.documents[outcome] for record in records)
                for outcome in OUTCOMES
            }
            shards = {
                split: [shard for record in records for shard in record.shards[split]]
                for split in SPLITS
            }
            sources[name] = SourceEntry(corpus.revision, counts, shards)
        tokenizer_entry = TokenizerEntry(
            tokenizer.name, tokenizer.hash, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id
        )
        manifest = Manifest(tokenizer_entry, self.wanted, sources)
        for name, entry in sources.items():
            documents = ", ".join(f"{n:,} {outcome}" for outcome, n in entry.documents.items() if n)
            n_train, n_validation = (manifest.n_tokens(split, name) for split in SPLITS)
            self.reporter.log(
                f"{name}: {n_train:,} training and {n_validation:,} validation tokens; "
                f"documents: {documents}"
            )
            if n_train == 0:
                raise DataError(
                    f"data.sources.{name} has no training token (documents: {documents}); add "
                    f"text, check data.sources.{name}.text_column and filter, or lower "
                    f"data.validation_fraction={self.data.validation_fraction}"
                )
        return manifest


def _n_cores() -> int:
    """Return the number of cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
