"""The preparation of a dataset folder, from documents to the manifest.

No shard is written before every source has yielded its first document, and the manifest is written
last, so a folder is either prepared or not. An interrupted preparation resumes, also inside a part,
and produces the same bytes as an uninterrupted one. One process prepares (with its workers); all
others call `wait_until_prepared`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import is_locked, write_atomically
from data.manifest import MANIFEST_FILE, SPLITS, Manifest, SourceEntry, TokenizerEntry
from data.preparation import state
from data.preparation.part import OUTCOMES, PartRecord, PartSettings, record_path
from data.preparation.pool import N_COUNTERS, prepare_parts, shared_counters
from data.progress import ProgressCounts, ProgressReporter
from data.sources.corpora import find_corpus
from data.sources.rows import rows
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
) -> Manifest:
    """Prepare `data.folder`, resume its preparation, or return the manifest if it is prepared.

    Args:
        progress: Report on standard error.
        check: Called with the manifest before it is written; may raise DataError to reject the
            data, which deletes everything written.

    Raises:
        DataError: A source or the tokenizer is unusable; or the folder belongs to another
            configuration, contains other files, is not writable or is being prepared by another
            process. Finished parts are kept.
    """
    folder = Path(data.folder)
    wanted = dataset_configuration(data, tokenizer)
    if (folder / MANIFEST_FILE).exists():
        manifest = state.read_prepared(folder, wanted)
        state.finish_interrupted(folder)
        return manifest
    state.reject_foreign_files(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        with state.lock_folder(folder) as marker:
            if (folder / MANIFEST_FILE).exists():  # written by another process just before
                manifest = state.read_prepared(folder, wanted)
            else:
                reporter = ProgressReporter(progress)
                preparation = _Preparation(data, tokenizer, wanted, marker, created, reporter)
                manifest = preparation.run(check)
            state.finish(folder)
    except OSError as error:
        raise DataError(
            f"data.folder={folder} cannot be written ({error.strerror or error}); free disk space "
            "or choose another data.folder, then run again to resume"
        ) from error
    return manifest


def dataset_configuration(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return the keys that determine the content of a prepared folder, as JSON values.

    Keys that only affect reading, and the number of workers, are excluded.
    """
    sources = {name: asdict(source) for name, source in data.sources.items()}
    for source in sources.values():
        del source["weight"]
    values = {
        "data.sources": sources,
        "data.validation_fraction": data.validation_fraction,
        "data.shard_tokens": data.shard_tokens,
        "data.invalid_text": data.invalid_text,
        "tokenizer": asdict(tokenizer),
    }
    return json.loads(json.dumps(values))


def wait_until_prepared(
    folder: Path | str, poll_seconds: float = 0.5, idle_seconds: float = 60
) -> Manifest:
    """Wait, without time limit, until another process has prepared the folder.

    Raises:
        DataError: The folder is damaged, or no process prepared it for `idle_seconds`.
    """
    folder = Path(folder)
    last_active = time.monotonic()
    while not (folder / MANIFEST_FILE).exists():
        if is_locked(folder / state.MARKER_FILE):
            last_active = time.monotonic()
        elif time.monotonic() - last_active > idle_seconds:
            raise DataError(
                f"data.folder={folder} is not prepared, and no process has worked on it for "
                f"{idle_seconds:.0f} s; see the first process's output, or run prepare.py first"
            )
        time.sleep(poll_seconds)
    return Manifest.read(folder)


class _Preparation:
    """One preparation of a folder whose lock this process holds.

    Finds the sources on construction, which downloads hub datasets.

    Args:
        wanted: `dataset_configuration(…)`
        marker: The open marker file that holds the lock.
        created: Folders that exist only because of this preparation, deepest first.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: TokenizerConfig,
        wanted: dict[str, Any],
        marker: TextIO,
        created: list[Path],
        reporter: ProgressReporter,
    ) -> None:
        self.data, self.tokenizer, self.wanted = data, tokenizer, wanted
        self.folder, self.marker, self.created = Path(data.folder), marker, created
        self.reporter = reporter
        try:
            self.corpora = {name: find_corpus(name, s) for name, s in data.sources.items()}
            self._check_first_documents()
            self.ready = ready_tokenizer(tokenizer)  # None: to be trained
        except BaseException:
            if not state.read_marker(marker):  # otherwise keep the parts of an earlier preparation
                with suppress(OSError):  # report the original error
                    state.remove_all(self.folder, created)
            raise
        self.parts = [part for corpus in self.corpora.values() for part in corpus.parts]

    def run(self, check: Callable[[Manifest], None] | None) -> Manifest:
        """Prepare everything up to and including the manifest."""
        folder = self.folder
        try:
            state.resume(folder, self.corpora, self.ready, self.marker, self.wanted, self.reporter)
            tokenizer = self._make_tokenizer()
            self._write_parts(tokenizer)
        except BaseException as error:
            kept = []
            with suppress(OSError):  # report the original error
                kept = state.keep_complete(folder, self.parts)
                if not kept:
                    state.remove_all(folder, self.created)
            if kept and isinstance(error, DataError):
                raise DataError(
                    f"{error}\nFinished parts are kept in {folder}; run again to resume."
                ) from error
            raise
        try:
            manifest = self._make_manifest(tokenizer)
            if check is not None:
                check(manifest)
        except DataError:
            state.remove_all(folder, self.created)
            raise
        manifest.write(folder)
        return manifest

    def _check_first_documents(self) -> None:
        for name, source in self.data.sources.items():
            if next(self._texts(name), None) is None:
                raise DataError(
                    f"data.sources.{name}.path={source.path} contains no document; use a path that "
                    "contains text"
                )

    def _texts(self, name: str) -> Iterator[str]:
        """Yield the text of each row of a source; empty for rows without text."""
        corpus = self.corpora[name]
        for part in corpus.parts:
            for row in rows(part, self.data.sources[name], self.data.invalid_text, corpus.dataset):
                yield row.text

    def _make_tokenizer(self) -> Tokenizer:
        """Load or train the tokenizer and write it to the folder."""
        path = self.folder / MODEL_FILE
        if self.ready is None and path.exists():  # trained before an interruption
            return read_tokenizer(path, self.tokenizer.name)
        tokenizer = self.ready or self._train_tokenizer()
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

    def _write_parts(self, tokenizer: Tokenizer) -> None:
        """Tokenize all parts that are not done."""
        data, folder, parts = self.data, self.folder, self.parts
        datasets = {name: corpus.dataset for name, corpus in self.corpora.items()}
        settings = PartSettings(data, datasets, tokenizer.name)
        counters = shared_counters(len(parts))
        remaining = []
        for index, part in enumerate(parts):
            (folder / part.source).mkdir(exist_ok=True)
            record = PartRecord.read(record_path(folder, part))
            part_counters = slice(index * N_COUNTERS, (index + 1) * N_COUNTERS)
            counters[part_counters] = [record.n_bytes, record.n_documents, record.n_tokens]
            if not record.done:
                remaining.append((index, part))

        def read_counts() -> ProgressCounts:
            return ProgressCounts(*(sum(counters[i::N_COUNTERS]) for i in range(N_COUNTERS)))

        n_bytes = sum(part.n_bytes for part in parts) if all(p.n_bytes for p in parts) else None
        n_workers = data.workers or _n_cores()
        with self.reporter.watch(f"preparing {data.name}", read_counts, n_bytes):
            prepare_parts(settings, tokenizer, remaining, n_workers, counters, self.marker.fileno())

    def _make_manifest(self, tokenizer: Tokenizer) -> Manifest:
        sources = {}
        for name, corpus in self.corpora.items():
            records = [PartRecord.read(record_path(self.folder, part)) for part in corpus.parts]
            counts = {o: sum(record.documents[o] for record in records) for o in OUTCOMES}
            shards = {s: [shard for r in records for shard in r.shards[s]] for s in SPLITS}
            sources[name] = SourceEntry(corpus.revision, counts, shards)
            n_tokens = {s: sum(shard.n_tokens for shard in shards[s]) for s in SPLITS}
            documents = ", ".join(f"{n:,} {outcome}" for outcome, n in counts.items() if n)
            self.reporter.log(
                f"{name}: {n_tokens['train']:,} training and {n_tokens['validation']:,} validation "
                f"tokens; documents: {documents}"
            )
            if n_tokens["train"] == 0:
                raise DataError(
                    f"data.sources.{name} has no training token (documents: {documents}); add "
                    f"text, check data.sources.{name}.text_column and filter, or lower "
                    f"data.validation_fraction={self.data.validation_fraction}"
                )
        entry = TokenizerEntry(
            tokenizer.name,
            tokenizer.hash,
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        return Manifest(entry, self.wanted, sources)


def _n_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
