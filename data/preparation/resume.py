"""What a preparation that was killed or stopped has left, and what of it the next one takes over.

Records of parts are kept where the same configuration and input would make them again. Another
`data.invalid_text` keeps those in which nothing was bad: so a `strict` preparation that a bad
document stopped goes on with `replace` or `skip`.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from data.manifest import FORMAT_VERSION
from data.preparation.part import PartRecord, record_path
from data.preparation.state import read_marker, sweep, write_marker
from data.progress import PreparationProgress
from data.sources.corpora import Corpus, Part
from data.tokenizer import MODEL_FILE, Tokenizer


def begin_or_go_on(
    folder: Path,
    corpora: dict[str, Corpus],
    ready: Tokenizer | None,
    marker: TextIO,
    wanted: dict[str, Any],
    show: PreparationProgress,
) -> None:
    """Leaves of a preparation before this one what this one would make too, and nothing else."""
    parts = [part for corpus in corpora.values() for part in corpus.parts]
    # `FileRange` was called `Piece`: hashes of preparations begun then stay valid.
    cut = {
        name: repr((corpus.revision, corpus.parts)).replace("FileRange(", "Piece(")
        for name, corpus in corpora.items()
    }
    now: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "configuration": wanted,
        "input": {name: hashlib.sha256(each.encode()).hexdigest() for name, each in cut.items()},
        "tokenizer": ready.hash if ready is not None else None,
    }
    was = read_marker(marker)
    changed = [name for name in now if _without_policy(was.get(name)) != _without_policy(now[name])]
    policies = [values.get("configuration", {}).get("data.invalid_text") for values in (was, now)]
    if ready is None and policies[0] not in ("strict", policies[1]):
        changed.append("data.invalid_text")  # the tokenizer was trained on text repaired that way
    if changed:
        if was:
            show.say(f"{folder}: starting anew, changed since: {', '.join(changed)}")
        sweep(folder)
        (folder / MODEL_FILE).unlink(missing_ok=True)
    elif policies[0] != policies[1]:
        for path in [record_path(folder, part) for part in parts]:
            if not PartRecord.read(path).is_clean:
                path.unlink()
    kept = keep_done(folder, parts)
    if kept:
        n_done = sum(record.done for record in kept)
        show.say(f"{folder}: going on, {n_done} of {len(parts)} parts are done")
    if was != now:
        write_marker(marker, now)


def _without_policy(values: Any) -> Any:
    """Values of the marker without `data.invalid_text`, of which `begin_or_go_on` takes care."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if name != "data.invalid_text"}


def keep_done(folder: Path, parts: Sequence[Part]) -> list[PartRecord]:
    """The records whose files are there; everything else of ours is removed."""
    kept, files = [], set()
    for part in parts:
        path = record_path(folder, part)
        record = PartRecord.read(path)
        sizes = record.files()
        with suppress(FileNotFoundError):
            if record.n_closed and all(
                (folder / file).stat().st_size == size for file, size in sizes.items()
            ):
                kept.append(record)
                files |= {path.relative_to(folder).as_posix(), *sizes}
    sweep(folder, files)
    return kept
