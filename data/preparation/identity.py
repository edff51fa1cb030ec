"""Whether a prepared folder is what a configuration asks for.

The identity of a corpus is its content: its path and that of the tokenizer may change, as long as
files and tokenizer are the same or are no longer there (the shards suffice for training). Names of
datasets on the Hub are compared as names.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import Manifest
from data.sources.corpora import find_corpus, list_revision
from data.sources.fingerprints import changed_files, input_paths, read_sources
from data.tokenizer import ready_tokenizer

MAX_LINES = 10  # changed files listed in a message


def dataset_configuration(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Return the keys that determine the content of a prepared folder, as JSON values.

    Keys that only affect reading, and the number of workers, are excluded.
    """
    sources = {name: asdict(source) for name, source in data.sources.items()}
    for source in sources.values():
        del source["weight"]
    keys = ("validation_fraction", "shard_tokens", "invalid_text")
    values = {"data.sources": sources, **{f"data.{key}": getattr(data, key) for key in keys}}
    return json.loads(json.dumps({**values, "tokenizer": asdict(tokenizer)}))


def read_prepared(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    trained_on: str | None = None,
    log: Callable[[str], None] = print,
) -> Manifest:
    """Read the manifest of a prepared folder and compare configuration and source files with it.

    Args:
        trained_on: Hash of the data that the run was trained on so far. If this folder has it, the
            run resumes even if source files have changed since; that is only logged.

    Raises:
        DataError: The folder was prepared from another configuration, other files or another
            tokenizer, or is damaged.
    """
    manifest = Manifest.read(Path(data.folder))
    resumes = manifest.hash == trained_on
    wanted = dataset_configuration(data, tokenizer)
    differences = _differences(_with_defaults(manifest.configuration), wanted)
    for name in (name for name in data.sources if name in manifest.sources):
        key = f"data.sources.{name}.path"
        before, now = differences.pop(key, ("", ""))
        is_moved = before != now and not _same_path(before, now)
        changes = _source_changes(data, manifest, name, is_moved)
        if changes is None and is_moved and not resumes:
            differences[key] = before, now
        if changes:
            there = f" (there: {before})" if is_moved else ""
            message = _revision_message(data, name, there, changes)
            if not resumes and data.sources[name].format != "stdlib":
                raise DataError(f"{message}\n{_remedy(data)}")
            log(f"{message}\nThe prepared shards are used, not the present files.")
    paths = differences.pop("tokenizer.path", None)
    if not _same_tokenizer(tokenizer, manifest, paths is not None):
        differences["tokenizer.path"] = paths or ("another tokenizer", tokenizer.path)
    if differences:
        rows = [
            f"  {key}: {old} in the folder, {new} requested"
            for key, (old, new) in sorted(differences.items())
        ]
        remedy = "Choose another data.folder (or data.name), or delete this one."
        if resumes:
            remedy = "Restore the values in the folder to resume the run, or use another run.dir."
        raise DataError(
            f"data.folder={data.folder} was prepared from another configuration:\n"
            + "\n".join([*rows, remedy])
        )
    return manifest


def _source_changes(
    data: DataConfig, manifest: Manifest, name: str, is_moved: bool
) -> list[str] | None:
    """Return the changes of a source's files since the preparation; None if they are not known."""
    source = data.sources[name]
    fingerprints, taken_ns = read_sources(Path(data.folder))
    if source.format == "huggingface" and not Path(str(source.path)).is_dir():
        return None
    try:
        if recorded := fingerprints.get(name):
            return changed_files(recorded, input_paths(source, recorded), taken_ns)
        # Version 0.2 recorded only a hash of names and sizes.
        is_local = source.format != "huggingface"
        if is_local or is_moved:
            found = list_revision(source) if is_local else find_corpus(name, source).revision
            if found == manifest.sources[name].revision:
                return []
            return None if is_moved else ["another number of files, other names, or other sizes"]
    except (OSError, DataError):  # the files are no longer there, or not on this machine
        pass
    return None


def _with_defaults(configuration: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that an earlier version did not have, at their defaults."""
    source, tokenizer = asdict(SourceConfig("text")), asdict(TokenizerConfig("byte", 1))
    del source["weight"]
    sources = configuration.get("data.sources", {})
    return {
        **configuration,
        "data.sources": {name: source | values for name, values in sources.items()},
        "tokenizer": tokenizer | configuration.get("tokenizer", {}),
    }


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the leaves at which two configurations differ, `(in the folder, requested)`."""
    old, new = _flatten(old), _flatten(new)
    absent = dict.fromkeys(old | new, "absent")
    old, new = absent | old, absent | new
    return {key: (old[key], new[key]) for key in absent if old[key] != new[key]}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def _same_path(old: Any, new: Any) -> bool:
    """Return whether two spellings name one path: relative, absolute or through links."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    return os.path.realpath(os.path.expanduser(old)) == os.path.realpath(os.path.expanduser(new))


def _same_tokenizer(tokenizer: TokenizerConfig, manifest: Manifest, moved: bool) -> bool:
    """Return whether the requested tokenizer file is the one that produced the tokens."""
    if tokenizer.path is None and not moved:
        return True
    try:
        requested = ready_tokenizer(tokenizer)
    except DataError:  # not on this machine: the folder has a copy
        recorded = manifest.configuration.get("tokenizer", {}).get("path")
        return not moved or _same_path(recorded, tokenizer.path)
    return requested is not None and requested.hash == manifest.tokenizer.hash


def _revision_message(data: DataConfig, name: str, there: str, changes: Sequence[str]) -> str:
    path = data.sources[name].path
    files = f"data.sources.{name}.path={path}{there}" if path else "the standard library"
    rows = [f"  {change}" for change in changes[:MAX_LINES]]
    if len(changes) > MAX_LINES:
        rows.append(f"  … and {len(changes) - MAX_LINES:,} more")
    heading = (
        f"data.folder={data.folder} was prepared from another revision of the files of {files}"
    )
    return "\n".join([f"{heading}:", *rows])


def _remedy(data: DataConfig) -> str:
    """Return how to prepare the present files."""
    return (
        f"Use data.folder={data.folder}-2 (or another data.name, which names the default folder) "
        f"to prepare the present files, delete {data.folder} to prepare it again, or restore the "
        "files."
    )
