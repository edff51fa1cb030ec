"""Listing the files of a local source: folders, links, globs, splits, and which files are data.

Folders are walked with the links in them. Every file is read once, whatever the number of links to
it. Files that other programs leave next to data are ignored and reported, unless the path names
them.
"""

import fnmatch
import glob
import os
import re
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.config import SourceConfig
from data.errors import DataError
from data.files import parse_json, read_file
from data.sources.compression import SUFFIXES as COMPRESSED
from data.sources.content import (
    NAMES,
    SUFFIXES,
    format_override,
    full_suffix,
    inspect_file,
    is_documentation,
)

# Files and folders that are not data, by name: hidden ones; unfinished, backup and checksum files;
# files of Spark, Delta Lake, `datasets`, operating systems, NAS servers and Python.
_IGNORED = re.compile(
    r"\..*|.*~|~\$.*|#.*#"
    r"|.*\.(crc|part|partial|filepart|tmp|temp|incomplete|crdownload|download|aria2|sw[op]|bak|orig)"
    r"|.*\.(md5|sha1|sha256|sha512)|(md5|sha1|sha256|sha512)sums?(\.txt)?"
    r"|_success|_temporary|_committed_.*|_started_.*|_delta_log|_change_data|_(common_)?metadata"
    r"|dataset_infos?\.json|cache-[0-9a-f]{8,}(_\d+_of_\d+)?\.arrow|tmp[a-z0-9_]{8}"
    r"|__macosx|thumbs\.db|desktop\.ini|\$recycle\.bin|system volume information|lost\+found"
    r"|@eadir|#recycle|#snapshot|__pycache__",
    re.IGNORECASE | re.DOTALL,
)
# Names of files by which dataset folders (during and after the preparation) and run folders are
# recognised; `path=.` contains them by default.
_OWN_FOLDERS = (
    {"preparing.json"},
    {"manifest.json", "tokenizer.model"},
    {"config.yaml", "ledger.jsonl"},
)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD_OF_SPLIT = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_INDEX_FILES = {"state.json", "dataset_dict.json", "dataset_info.json"}  # of `save_to_disk`
N_NAMED = 5  # ignored files listed by name


@dataclass
class _File:
    path: Path
    splits: tuple[str, ...] = ()  # names of its split, the most general first


def list_files(source: SourceConfig, key: str, notes: list[str]) -> list[Path]:
    """Return the files of a local source, sorted.

    Args:
        notes: Receives lines about paths that are not read.

    Raises:
        DataError: The path matches no data, or a part of it cannot be read.
    """
    assert source.path is not None
    path = Path(source.path).expanduser()
    walk = _Walk(source, key)
    if path.is_file():
        return [
            file.path
            for file in _select([_File(path, _splits_of(Path(path.name)))], source, key, [])
        ]
    if path.is_dir():
        walk.root = path
        walk.folder(path)
    else:
        walk.glob(path)
    walk.drop_compressed_copies()
    files = sorted(walk.files.values(), key=lambda file: file.path)
    if not files:
        raise DataError(walk.no_files_error(path))
    notes += walk.notes()
    return [file.path for file in _select(files, source, key, notes)]


class _Walk:
    """Collects the files of a source.

    Attributes:
        files: By real path.
        ignored: Files and folders that are not read.
        root: Folder that names in messages are relative to.
        n_linked: Paths of files and folders that other paths lead to as well.
    """

    def __init__(self, source: SourceConfig, key: str) -> None:
        self.source, self.key = source, key
        self.suffixes = SUFFIXES[source.format]
        self.files: dict[str, _File] = {}
        self.ignored: list[Path] = []
        self.n_linked = 0
        self.root = Path()
        self._visited: set[str] = set()

    def glob(self, pattern: Path) -> None:
        """Add the files that a glob matches, and the folders unless it is recursive."""
        fixed = next((i for i, part in enumerate(pattern.parts) if glob.has_magic(part)), None)
        if fixed is None:
            return
        base, parts = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
        self.root = base
        if base.is_dir():
            self._entries(base)  # `glob` finds nothing in a folder that is not readable
        if "**" in parts:  # `glob` would follow cyclic links
            self.suffixes = ("",)
            if base.is_dir():
                self.folder(base)
            self.files = {
                real: file
                for real, file in self.files.items()
                if _matches(file.path.relative_to(base).parts, parts)
            }
            self.ignored = [
                path for path in self.ignored if _matches(path.relative_to(base).parts, parts)
            ]
        else:
            for path in sorted(Path(name) for name in glob.glob(str(pattern))):
                relative = Path(*path.parts[fixed:])
                if any(map(_IGNORED.fullmatch, relative.parts)):
                    self.ignored.append(path)
                elif path.is_dir():
                    self.folder(path, relative)
                else:
                    self._file(path, os.path.realpath(path), relative)
        if not self.files:  # the pattern names the ignored files
            named = [path for path in self.ignored if path.is_file()]
            self.ignored = [path for path in self.ignored if path not in named]
            for path in named:
                self._file(path, os.path.realpath(path), Path(path.name))

    def folder(self, root: Path, relative: Path = Path()) -> None:
        """Add the files below a folder; linked folders follow the others."""
        real = deque([(root, relative, tuple[str, ...]())])
        linked: deque[tuple[Path, Path, tuple[str, ...]]] = deque()
        while real or linked:
            folder, relative, splits = (real or linked).popleft()
            real_path = os.path.realpath(folder)
            if real_path in self._visited:
                self.n_linked += 1
                continue
            self._visited.add(real_path)
            entries = self._entries(folder)
            names = [entry.name for entry in entries]
            if relative.parts and any(own.issubset(names) for own in _OWN_FOLDERS):
                self.ignored.append(folder)
                continue
            saved = self._saved_dataset(folder, names, splits)
            for entry in entries:
                path, name = folder / entry.name, relative / entry.name
                own = saved.get(entry.name, ()) if saved is not None else splits
                is_link = entry.is_symlink()
                if saved is not None and entry.name in _INDEX_FILES:
                    continue
                if _IGNORED.fullmatch(entry.name):
                    self.ignored.append(path)
                elif path.is_dir():
                    (linked if is_link else real).append((path, name, own))
                elif saved is not None and entry.name not in saved:
                    self.ignored.append(path)
                else:
                    found = os.path.realpath(path) if is_link else f"{real_path}/{entry.name}"
                    self._file(path, found, name, self.suffixes, own)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"{self.key}.path={self.source.path}: cannot read folder {folder} "
                f"({error.strerror}); make it readable for this user, or move it elsewhere"
            ) from error

    def _file(
        self,
        path: Path,
        real_path: str,
        relative: Path,
        suffixes: tuple[str, ...] = ("",),
        splits: tuple[str, ...] = (),
    ) -> None:
        """Add a file, or ignore it if it is not a regular file with one of the suffixes."""
        if path.is_symlink() and not path.exists():
            raise DataError(
                f"{self.key}.path={self.source.path}: {path} is a link to {os.readlink(path)}, "
                "which does not exist; restore that file or folder, or delete the link"
            )
        if not path.is_file() or not path.name.lower().endswith(suffixes):
            self.ignored.append(path)
            return
        file = _File(path, splits or _splits_of(relative))
        other = self.files.setdefault(real_path, file)
        if other is not file and other.path != path:
            self.n_linked += 1
            if (len(path.parts), path) < (len(other.path.parts), other.path):
                self.files[real_path] = file

    def _saved_dataset(
        self, folder: Path, names: list[str], splits: tuple[str, ...]
    ) -> dict[str, tuple[str, ...]] | None:
        """Return the data files or folders of a dataset that `datasets` wrote, with their splits.

        None for other folders: those have no index.

        Args:
            splits: Split of the folder.
        """
        if self.source.format != "arrow":
            return None
        state, group = (
            _read_json(folder / file) if file in names else {}
            for file in ("state.json", "dataset_dict.json")
        )
        if state.get("_indices_data_files"):
            raise DataError(
                f"{self.key}.path={self.source.path}: {folder} selects rows by an index file of an "
                "old version of `datasets`; load it with that version and save it with "
                "`flatten_indices().save_to_disk(…)`"
            )
        if isinstance(state.get("_data_files"), list):
            split = str(state.get("_split") or "")
            own = splits or ((split,) if re.fullmatch(r"\w+", split) else ())
            saved: dict[str, tuple[str, ...]] = {
                str(file["filename"]): own for file in state["_data_files"]
            }
            index = folder / "state.json"
        elif isinstance(group.get("splits"), list):
            saved = {str(split): (str(split),) for split in group["splits"]}
            index = folder / "dataset_dict.json"
        elif "dataset_info.json" in names:  # the cache of `load_dataset`
            known = _read_json(folder / "dataset_info.json").get("splits") or {}
            return {name: _cached_split(name, known) for name in names}
        else:
            return None
        if missing := sorted(saved.keys() - set(names)):
            raise DataError(
                f"{self.key}.path={self.source.path}: {index} lists {missing[0]}, which does not "
                "exist; copy the missing files, or save the dataset again"
            )
        return saved

    def drop_compressed_copies(self) -> None:
        """Ignore each compressed file whose uncompressed copy is in the same folder."""
        paths = {file.path for file in self.files.values()}
        for real_path, file in list(self.files.items()):
            if file.path.suffix in COMPRESSED and file.path.with_suffix("") in paths:
                self.ignored.append(self.files.pop(real_path).path)

    def notes(self) -> list[str]:
        """Return lines about paths that are not read."""
        lines = []
        if self.ignored:
            lines.append(f"{self.key}: not read as {self.source.format}: {self._names()}")
        if self.n_linked:
            lines.append(
                f"{self.key}: {self.n_linked:,} links or folders lead to files that other paths "
                "lead to as well; each file is read once"
            )
        return lines

    def _names(self) -> str:
        paths = sorted(self.ignored)
        names = [
            str(p.relative_to(self.root) if p.is_relative_to(self.root) else p)
            for p in paths[:N_NAMED]
        ]
        rest = len(paths) - len(names)
        return ", ".join(names) + (f" and {rest:,} more" if rest else "")

    def no_files_error(self, path: Path) -> str:
        """Return the message for a path without files of the format."""
        start = f"{self.key}.path={self.source.path}"
        here = f"(working directory {Path.cwd()})"
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(self.source.path)):
            return (
                f"{start} is a URL, but format {self.source.format} reads local files; download "
                f"the files, or use the name of a dataset with {self.key}.format=huggingface"
            )
        if path.is_symlink():
            return (
                f"{start} is a link to {os.readlink(path)}, which does not exist {here}; repair it"
            )
        if path.exists() and not path.is_dir():
            return f"{start} is neither a file nor a folder; write its content to a file"
        if len(several := _split_paths(str(self.source.path))) > 1:
            other = f"data.sources.more.format={self.source.format} data.sources.more.path="
            return (
                f"{start} is several paths, but a source has one; use {self.key}.path={several[0]} "
                f"and another source for each further path, like {other}{several[1]}"
            )
        if not path.is_dir():
            brackets = "; in a glob, write [[] for [" if "[" in str(path) else ""
            if "{" in path.name and "," in path.name:
                brackets = "; globs have * ? and [], but no {a,b}"
            return f"{start} matches no file or folder {here}; use an existing path{brackets}"
        wanted = " or ".join(self.suffixes[:2]).strip() or "visible"
        if self.source.format == "jsonl":
            wanted += " (compressed or not)"
        message = f"{start} is a folder without {wanted} files {here}"
        if not self.ignored:
            return f"{message}; use a path that contains data"
        return f"{message}, with {self._names()}; {self._remedy(path)}"

    def _remedy(self, root: Path) -> str:
        others = [file for file in sorted(self.ignored) if file.is_file()]
        for file in [file for file in others if not _IGNORED.fullmatch(file.name)][:100]:
            content = inspect_file(file, self.source.text_column)
            if content.kind == self.source.format:
                if content.compression and self.source.format in ("parquet", "arrow"):
                    return f"decompress {file.name} with `{content.compression} -d`"
                return f"use {self.key}.path={root}/**/*{full_suffix(file)}"
            if content.description:
                return f"{file.name} is {content.description}: {content.remedy}"
            if content.kind in NAMES and not is_documentation(file):
                return f"use {format_override(self.source, self.key, content.kind, file)}"
        if len(others) == len(self.ignored):
            return f"to read such files, use {self.key}.path={root}/*{full_suffix(others[0])}"
        return "use a path that contains data"


def _split_paths(text: str) -> list[str]:
    """Return the existing paths that a list, separated by commas or spaces, consists of."""
    paths = [part.strip("'\"") for part in re.split(r"[,\s]+", text.strip("[]() ")) if part]
    return paths if all(Path(part).expanduser().exists() for part in paths) else []


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether a path matches a glob, in which `**` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        starts = range(len(parts) + 1)
        return any(_matches(parts[i:], patterns[1:]) for i in starts)
    first = bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0])
    return first and _matches(parts[1:], patterns[1:])


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty dict if it holds none."""
    with suppress(ValueError):
        values = parse_json(read_file(path))
        return values if isinstance(values, dict) else {}
    return {}


def _cached_split(name: str, splits: Iterable[str]) -> tuple[str, ...]:
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.arrow$", "", name)
    return tuple(split for split in splits if stem == split or stem.endswith(f"-{split}"))[:1]


def _splits_of(relative: Path) -> tuple[str, ...]:
    """Return the names of the split that folders or file name give, the general one first."""
    for parts in (relative.parts[:-1], relative.parts[-1:]):
        tokens = [token for part in parts for token in re.split(r"[-._ 0-9]+", part.lower())]
        names = [token for token in tokens if token in _SPLITS]
        if len({_SPLITS[name] for name in names}) == 1:
            return (_SPLITS[names[0]], names[0], *_shard_prefix(relative))
    return ()


def _shard_prefix(path: Path) -> tuple[str, ...]:
    """Return the split in a name like `SPLIT-00000-of-00001.parquet`."""
    match = _SHARD_OF_SPLIT.match(path.name)
    return (match[1],) if match else ()


def _select(files: list[_File], source: SourceConfig, key: str, notes: list[str]) -> list[_File]:
    """Return the files of `source.split`.

    Files carry splits if the names of all, apart from documentation, do and there are several.
    Otherwise, there is nothing to separate: the default, `train`, takes all, and other splits need
    files that carry them.

    Raises:
        DataError: There is no such split.
    """
    wanted, start = source.split.split("+"), f"{key}.split={source.split}"
    if source.split == "all":
        return files
    general = {file.splits[0] for file in files if file.splits}
    if len(general) > 1:  # others, like `unsupervised-00000-of-00001.parquet`, are splits too
        files = [replace(f, splits=f.splits or _shard_prefix(f.path)) for f in files]
    plain = [file.path for file in files if not (file.splits or is_documentation(file.path))]
    all_carry = len(general) > 1 and not plain
    if source.split == "train" and not all_carry:
        if len(general) > 1:
            notes.append(
                f"{key}: reads all {len(files):,} files, also those named for the splits "
                f"{', '.join(sorted(general - {'train'}))}, because {plain[0]} is named for none"
            )
        return files
    known = {name for file in files for name in file.splits}
    wanted = [name if name in known else _SPLITS.get(name, name) for name in wanted]
    if missing := [name for name in wanted if name not in known]:
        choices = sorted({file.splits[0] for file in files if file.splits})
        if not choices:
            raise DataError(
                f"{start} does not apply to {key}.path={source.path}, whose file names give no "
                f"split; remove {key}.split to read all files"
            )
        raise DataError(
            f"{start}: {key}.path={source.path} has no split {missing[0]}; use "
            f"{', '.join(choices)}, or all"
        )
    chosen = [file for file in files if not set(wanted).isdisjoint(file.splits)]
    rest = {file.splits[0] for file in files if file.splits} | ({"none"} if plain else set())
    if len(chosen) < len(files):
        notes.append(
            f"{start}: reads {len(chosen):,} of {len(files):,} files; other splits: "
            f"{', '.join(sorted(rest - set(wanted)))} ({key}.split=all reads all files)"
        )
    return chosen
