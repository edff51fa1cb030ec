"""Preparation: documents → tokenizer → token shards → manifest, in one folder.

Nothing is written before every source has given its first document; the manifest comes last, so a
folder is prepared or it is not. What a killed preparation left is replaced by the next one. Only
one process prepares, the others `wait_until_prepared`.
"""

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.progress import PreparationProgress
from data.shards import (
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    Shard,
    ShardWriter,
    TokenizerEntry,
    write_atomically,
)
from data.tokenizer import (
    MODEL_FILE,
    Tokenizer,
    model_file,
    ready_tokenizer,
    train_bpe,
)

MARKER_FILE = "preparing.json"  # there while a folder is being prepared, and after a kill
BATCH_CHARACTERS = 4_000_000  # of text held at once; bounds memory and keeps all threads busy
OURS = re.compile(r"(train|validation)-\d{5,}\.(tokens|offsets)(\.tmp)?")


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: bool = True,
    check: Callable[[Manifest], None] | None = None,
) -> Manifest:
    """Prepares `data.folder`, or finds it prepared from the same configuration.

    Args:
        progress: tell on standard error what is done: a bar on a terminal, else lines
        check: raises DataError for tokens that are no use to the caller; nothing is left then

    Raises:
        DataError: a source or the tokenizer is not usable, the folder is another configuration's,
            not ours, not writable, or being prepared by another process.
    """
    folder = Path(data.folder)
    wanted = configuration(data, tokenizer)
    if (folder / MANIFEST_FILE).exists():
        return _prepared_before(folder, wanted)
    _refuse_foreign(folder)
    _refuse_unreadable(data)
    ready = ready_tokenizer(tokenizer)
    show = PreparationProgress(progress)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        with _claimed(folder, wanted), show:
            _remove_leftovers(folder)
            try:
                used = ready or _train_tokenizer(data, tokenizer, show)
                write_atomically(folder / MODEL_FILE, model_file(used.ranks))
                manifest = _write_sources(data, folder, used, wanted, show)
                if check is not None:
                    check(manifest)
            except DataError:
                _remove_all(data, folder, made)
                raise
            manifest.write(folder)
            (folder / MARKER_FILE).unlink()
    except OSError as error:
        raise DataError(
            f"data.folder ({folder}) cannot be written ({error.strerror or error}): make room or "
            "name another data.folder, then start again"
        ) from error
    return manifest


def configuration(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What decides the content of a prepared folder, as JSON values.

    Weights and the document mask are left out: they are used when the shards are read.
    """
    sources = {name: asdict(source) for name, source in data.sources.items()}
    for source in sources.values():
        del source["weight"]
    values = {
        "data.sources": sources,
        "data.validation_fraction": data.validation_fraction,
        "data.shard_tokens": data.shard_tokens,
        "tokenizer": asdict(tokenizer),
    }
    return json.loads(json.dumps(values))


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: by its content alone, so that a growing corpus moves none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"llamesh-split")
    return int.from_bytes(digest.digest(), "little") < fraction * 2**64


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
        if _is_being_prepared(folder):
            last_seen = time.monotonic()
        elif time.monotonic() - last_seen > idle_seconds:
            raise DataError(
                f"data.folder ({folder}) is not prepared, and for {idle_seconds:.0f} s no process "
                "has been at it: see what the first process says, or run prepare.py first"
            )
        time.sleep(poll_seconds)
    return Manifest.read(folder)


def _is_being_prepared(folder: Path) -> bool:
    """Whether a living process holds the folder's lock."""
    try:
        with open(folder / MARKER_FILE, encoding="utf-8") as marker:
            fcntl.flock(marker, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no marker, no preparation
        return False
    return False


def _prepared_before(folder: Path, wanted: dict[str, Any]) -> Manifest:
    """The manifest of a folder that is prepared, refused when from another configuration."""
    manifest = Manifest.read(folder)
    was, now = _flat(manifest.configuration), _flat(wanted)
    differences = [
        f"  {key}: {was.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, "absent") != now.get(key, "absent")
    ]
    if differences:
        raise DataError(
            f"data.folder ({folder}) was prepared from another configuration:\n"
            + "\n".join(differences)
            + "\nName another data.folder (or data.name), or delete this one."
        )
    return manifest


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _refuse_foreign(folder: Path) -> None:
    """A folder with files of someone else is left alone."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.folder ({folder}) is a file: name a folder")
    if folder.is_dir() and not (folder / MARKER_FILE).exists():
        found = next(folder.iterdir(), None)
        if found is not None:
            raise DataError(
                f"data.folder ({folder}) holds files that no preparation made ({found.name}, …): "
                "name a new or empty folder"
            )


def _refuse_unreadable(data: DataConfig) -> None:
    """Reads the first document of each source."""
    for name, source in data.sources.items():
        if next(_documents(name, source), None) is None:
            raise DataError(
                f"data.sources.{name}.path ({source.path}) holds no document: "
                "name a path with text in it"
            )


def _documents(name: str, source: SourceConfig) -> Iterator[str]:
    """The documents of a named source."""
    # Imported here: 1.4 s that a run on prepared data need not pay.
    from data.corpora import documents

    try:
        yield from documents(source, f"data.sources.{name}")
    except OSError as error:
        raise DataError(
            f"data.sources.{name}.path ({source.path}) cannot be read ({error})"
        ) from error


@contextmanager
def _claimed(folder: Path, wanted: dict[str, Any]) -> Iterator[None]:
    """Holds the folder for this process; its marker outlives a kill, the lock does not."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / MARKER_FILE, "w", encoding="utf-8") as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"data.folder ({folder}) is being prepared by another process: wait for it, "
                "or name another data.folder"
            ) from None
        json.dump(wanted, marker, indent=1)
        marker.flush()
        yield


def _remove_leftovers(folder: Path) -> None:
    """Removes the files that a killed preparation left, and no others."""
    for path in folder.glob("*/*"):
        if OURS.fullmatch(path.name):
            path.unlink()


def _remove_all(data: DataConfig, folder: Path, made: list[Path]) -> None:
    """Removes what this preparation made, so that data refused half-way leave nothing behind."""
    _remove_leftovers(folder)
    for file in (MODEL_FILE, MARKER_FILE):
        (folder / file).unlink(missing_ok=True)
    for path in (*(folder / name for name in data.sources), *made):
        with suppress(OSError):  # not empty, or not there
            path.rmdir()


def _train_tokenizer(
    data: DataConfig, config: TokenizerConfig, show: PreparationProgress
) -> Tokenizer:
    """A tokenizer trained on the first documents, as many characters of each source."""
    task = show.begin("training the tokenizer", None)
    share = config.training_characters // len(data.sources)

    def texts(name: str, source: SourceConfig) -> Iterator[str]:
        left = share
        for text in _documents(name, source):
            yield text[:left]
            show.advance(task, 1, 0)
            left -= len(text)
            if left <= 0:
                return

    corpus = chain.from_iterable(texts(name, source) for name, source in data.sources.items())
    trained = train_bpe(corpus, config.vocab_size)
    show.end(task, f"tokenizer trained: {trained.vocab_size:,} tokens")
    return trained


def _write_sources(
    data: DataConfig,
    folder: Path,
    tokenizer: Tokenizer,
    wanted: dict[str, Any],
    show: PreparationProgress,
) -> Manifest:
    """Tokenises every source into its shards."""
    shards: dict[str, dict[str, list[Shard]]] = {}
    empty: dict[str, int] = {}
    for name, source in data.sources.items():
        writers = {s: ShardWriter(folder, name, s, data.shard_tokens) for s in SPLITS}
        task = show.begin(f"preparing {name}", _n_documents(name, source))
        begin = time.monotonic()
        empty[name] = 0
        try:
            for texts, n_empty in _batches(_documents(name, source)):
                empty[name] += n_empty
                encoded = tokenizer.encode_documents(texts)
                for text, tokens in zip(texts, encoded, strict=True):
                    held_out = is_validation(text, data.validation_fraction)
                    writers["validation" if held_out else "train"].add(tokens)
                show.advance(task, len(texts) + n_empty, sum(map(len, encoded)))
            shards[name] = {split: writer.close() for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.abandon()
        counts = {s: sum(shard.n_tokens for shard in shards[name][s]) for s in SPLITS}
        seconds = time.monotonic() - begin
        documents = sum(shard.n_documents for s in SPLITS for shard in shards[name][s])
        show.end(
            task,
            f"{name}: {documents:,} documents, {counts['train']:,} training and "
            f"{counts['validation']:,} validation tokens in {seconds:.1f} s"
            + (f", {empty[name]:,} empty documents skipped" if empty[name] else ""),
        )
        if counts["train"] == 0:
            raise DataError(
                f"data.sources.{name} has no token to train on ({documents} documents, "
                f"{empty[name]} empty ones skipped): add text, or lower "
                f"data.validation_fraction ({data.validation_fraction})"
            )
    entry = TokenizerEntry(
        tokenizer.name,
        tokenizer.hash,
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    return Manifest(entry, wanted, shards, empty)


def _batches(texts: Iterator[str]) -> Iterator[tuple[list[str], int]]:
    """Documents in batches of about `BATCH_CHARACTERS`, with the number of empty ones left out."""
    batch: list[str] = []
    n_characters = n_empty = 0
    for text in texts:
        if text:
            batch.append(text)
            n_characters += len(text)
        else:
            n_empty += 1
        if n_characters >= BATCH_CHARACTERS:
            yield batch, n_empty
            batch, n_characters, n_empty = [], 0, 0
    yield batch, n_empty


def _n_documents(name: str, source: SourceConfig) -> int | None:
    """The number of documents to come, where each file is one."""
    from data.corpora import source_files

    if source.format in ("stdlib", "text"):
        return len(source_files(source, f"data.sources.{name}"))
    return None
