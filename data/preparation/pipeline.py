"""Preparation: documents → tokenizer → token shards → manifest, in one folder.

No shard is written before every source has given its first document, and a source that cannot be
read leaves nothing behind; the manifest comes last, so a folder is prepared or it is not. A
preparation that was killed or stopped goes on, part by part and inside a part, and ends with the
bytes of an undisturbed one. Only one process prepares (with its workers), the others
`wait_until_prepared`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ctypes import Array, c_int64
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import write_atomically
from data.manifest import MANIFEST_FILE, SPLITS, Manifest, SourceEntry, TokenizerEntry
from data.preparation.part import COUNTS, PartRecord, PartSettings, is_validation, record_path
from data.preparation.pool import N_COUNTERS, prepare_parts, shared_counters
from data.preparation.resume import begin_or_go_on, keep_done
from data.preparation.state import (
    claimed,
    end_claim,
    end_killed_claim,
    is_claimed,
    prepared_before,
    read_marker,
    refuse_foreign,
    remove_all,
)
from data.progress import Done, PreparationProgress
from data.sources.corpora import Corpus, Part, find
from data.sources.rows import rows
from data.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    model_file,
    read_tokenizer,
    ready_tokenizer,
    train_bpe,
)

__all__ = ["configuration", "is_validation", "prepare", "wait_until_prepared"]


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: bool = True,
    check: Callable[[Manifest], None] | None = None,
) -> Manifest:
    """Prepares `data.folder`, goes on with it, or finds it prepared from the same configuration.

    Args:
        progress: tell on standard error what is done: a bar on a terminal, else lines
        check: raises DataError for tokens that are no use to the caller; nothing is left then

    Raises:
        DataError: a source or the tokenizer is not usable, the folder is another configuration's,
            not ours, not writable, or being prepared by another process. Parts that are done stay.
    """
    folder = Path(data.folder)
    wanted = configuration(data, tokenizer)
    if (folder / MANIFEST_FILE).exists():
        manifest = prepared_before(folder, wanted)
        end_killed_claim(folder)
        return manifest
    refuse_foreign(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        with claimed(folder) as marker:
            if (folder / MANIFEST_FILE).exists():  # by another process, just now
                manifest = prepared_before(folder, wanted)
            else:
                work = _found(data, tokenizer, wanted, progress, marker, made)
                manifest = _prepare_claimed(work, marker, made, check)
            end_claim(folder)
    except OSError as error:
        raise DataError(
            f"data.folder ({folder}) cannot be written ({error.strerror or error}): make room or "
            "name another data.folder, then start again: it goes on from what is done"
        ) from error
    return manifest


def configuration(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What decides the content of a prepared folder, as JSON values.

    What decides how the shards are read is left out, and the number of workers.
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
    """Waits for another process's preparation to end, however long that takes.

    Raises:
        DataError: the folder is damaged, or for `idle_seconds` no process was preparing it.
    """
    folder = Path(folder)
    last_seen = time.monotonic()
    while not (folder / MANIFEST_FILE).exists():
        if is_claimed(folder):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > idle_seconds:
            raise DataError(
                f"data.folder ({folder}) is not prepared, and for {idle_seconds:.0f} s no process "
                "has been at it: see what the first process says, or run prepare.py first"
            )
        time.sleep(poll_seconds)
    return Manifest.read(folder)


@dataclass(frozen=True)
class _Work:
    """A preparation: what from (`ready` is None for a tokenizer to train), and who is told."""

    data: DataConfig
    tokenizer: TokenizerConfig
    wanted: dict[str, Any]
    corpora: dict[str, Corpus]
    ready: Tokenizer | None
    show: PreparationProgress

    @property
    def folder(self) -> Path:
        return Path(self.data.folder)

    @property
    def parts(self) -> list[Part]:
        """Of all sources, in order."""
        return [part for corpus in self.corpora.values() for part in corpus.parts]


def _found(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    wanted: dict[str, Any],
    progress: bool,
    marker: TextIO,
    made: list[Path],
) -> _Work:
    """What there is to prepare, found while the folder is ours.

    A dataset is downloaded here, and those who wait for the preparation see that it has begun.
    """
    try:
        corpora = {name: find(name, source) for name, source in data.sources.items()}
        _refuse_unreadable(data, corpora)
        ready = ready_tokenizer(tokenizer)
    except BaseException:
        if not read_marker(marker):  # else a preparation before this one has left its parts
            with suppress(OSError):  # the first error is the one to tell
                remove_all(Path(data.folder), made)
        raise
    return _Work(data, tokenizer, wanted, corpora, ready, PreparationProgress(progress))


def _prepare_claimed(
    work: _Work, marker: TextIO, made: list[Path], check: Callable[[Manifest], None] | None
) -> Manifest:
    """Prepares a folder that is ours, up to its manifest."""
    folder, parts = work.folder, work.parts
    try:
        begin_or_go_on(folder, work.corpora, work.ready, marker, work.wanted, work.show)
        used = _tokenizer(work)
        _write_parts(work, parts, used, marker)
    except BaseException as error:
        kept = []
        with suppress(OSError):  # the first error is the one to tell
            kept = keep_done(folder, parts)
            if not kept:
                remove_all(folder, made)
        if kept and isinstance(error, DataError):
            raise DataError(
                f"{error}\n{folder} keeps what is done: the next start goes on with it."
            ) from error
        raise
    try:
        manifest = _manifest(work, used)
        if check is not None:
            check(manifest)
    except DataError:
        remove_all(folder, made)
        raise
    manifest.write(folder)
    return manifest


def _refuse_unreadable(data: DataConfig, corpora: dict[str, Corpus]) -> None:
    """Reads the first document of each source."""
    for name, source in data.sources.items():
        if next(_texts(data, name, corpora[name]), None) is None:
            raise DataError(
                f"data.sources.{name}.path ({source.path}) holds no document: "
                "name a path with text in it"
            )


def _texts(data: DataConfig, name: str, corpus: Corpus) -> Iterator[str]:
    """The texts of a source's rows; empty where a row gives none."""
    for part in corpus.parts:
        for row in rows(part, data.sources[name], data.invalid_text, corpus.dataset):
            yield row.text


def _tokenizer(work: _Work) -> Tokenizer:
    """The tokenizer, in the folder: ready, trained before the preparation was killed, or now."""
    path = work.folder / MODEL_FILE
    if work.ready is None and path.exists():
        return read_tokenizer(path, work.tokenizer.name)
    used = work.ready or _train_tokenizer(work)
    write_atomically(path, model_file(used.ranks))
    return used


def _train_tokenizer(work: _Work) -> Tokenizer:
    """A tokenizer trained on the first documents, as many characters of each source."""
    share = work.tokenizer.training_characters // len(work.corpora)
    n_documents = 0

    def texts(name: str) -> Iterator[str]:
        nonlocal n_documents
        left = share
        for text in _texts(work.data, name, work.corpora[name]):
            yield text[:left]
            n_documents += 1
            left -= len(text)
            if left <= 0:
                return

    corpus = chain.from_iterable(map(texts, work.corpora))
    with work.show.watching("training the tokenizer", lambda: Done(0, n_documents, 0), None):
        trained = train_bpe(corpus, work.tokenizer.vocab_size)
    work.show.say(f"tokenizer trained: {trained.vocab_size:,} tokens")
    return trained


def _write_parts(work: _Work, parts: Sequence[Part], tokenizer: Tokenizer, marker: TextIO) -> None:
    """Tokenises every part that is not done."""
    data, folder = work.data, work.folder
    job = PartSettings(
        folder,
        dict(data.sources),
        {name: corpus.dataset for name, corpus in work.corpora.items()},
        data.invalid_text,
        data.validation_fraction,
        data.shard_tokens,
        tokenizer.name,
    )
    counters = shared_counters(len(parts))
    left = []
    for place, part in enumerate(parts):
        (folder / part.source).mkdir(exist_ok=True)
        record = PartRecord.read(record_path(folder, part))
        own = slice(place * N_COUNTERS, (place + 1) * N_COUNTERS)
        counters[own] = [record.n_bytes, record.n_documents, record.n_tokens]
        if not record.done:
            left.append((place, part))
    n_bytes = sum(part.n_bytes for part in parts) if all(p.n_bytes for p in parts) else None
    with work.show.watching(f"preparing {data.name}", lambda: _done(counters), n_bytes):
        prepare_parts(job, tokenizer, left, data.workers or _n_cores(), counters, marker.fileno())


def _done(counters: Array[c_int64]) -> Done:
    """The sums over all parts."""
    return Done(*(sum(counters[each::N_COUNTERS]) for each in range(N_COUNTERS)))


def _manifest(work: _Work, tokenizer: Tokenizer) -> Manifest:
    """What the parts' records tell, in the order of the parts."""
    sources = {}
    for name, corpus in work.corpora.items():
        records = [PartRecord.read(record_path(work.folder, part)) for part in corpus.parts]
        counts = {each: sum(record.documents[each] for record in records) for each in COUNTS}
        shards = {s: [shard for record in records for shard in record.shards[s]] for s in SPLITS}
        sources[name] = SourceEntry(corpus.revision, counts, shards)
        n_tokens = {s: sum(shard.n_tokens for shard in shards[s]) for s in SPLITS}
        told = ", ".join(f"{n:,} {what}" for what, n in counts.items() if n)
        work.show.say(
            f"{name}: {n_tokens['train']:,} training and {n_tokens['validation']:,} validation "
            f"tokens; documents: {told}"
        )
        if n_tokens["train"] == 0:
            raise DataError(
                f"data.sources.{name} has no token to train on (documents: {told}): add text, see "
                f"data.sources.{name}.text_column and filter, or lower data.validation_fraction "
                f"({work.data.validation_fraction})"
            )
    entry = TokenizerEntry(
        tokenizer.name,
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    return Manifest(entry, work.wanted, sources)


def _n_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
