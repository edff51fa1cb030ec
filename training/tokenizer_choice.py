"""The tokenizer of a run that was not configured: that of `run.init_from` or of `tokenizer.path`.

Weights are useful only with their own tokenizer, so a run that starts from weights takes the
tokenizer next to them unless the user sets one. A tokenizer file determines its name and vocabulary
size. Also the default of `data.folder`, which contains the size or hash of the vocabulary.
"""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import DataConfig, TokenizerConfig
from data.errors import DataError
from data.files import parse_json, read_file
from resilience.run_folder import checkpoints_in

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

# As in conf/data: the folder of a dataset if the user does not set one.
DEFAULT_FOLDER = "shards/${data.name}-${tokenizer.name}-${tokenizer.vocab_size}"
# SHA-256 of Meta's tokenizer (`Tokenizer.hash`), wherever its file is.
LLAMA3_HASH = "78da529cea2c3b057a63cf1679a0a45550135c39398a71fe42352766fa8cff09"


def tokenizer_overrides(
    tokenizer: dict[str, Any],
    explicit: Collection[str],
    init_from: str | None = None,
    run_dir: str | None = None,
) -> dict[str, Any]:
    """Return the values of keys that follow from a tokenizer file, for keys that are not explicit.

    Args:
        tokenizer: The composed section.
        explicit: Keys and groups that the user set, such as `tokenizer` or `tokenizer.path`.
        init_from, run_dir: `run.init_from` and `run.dir`, whose tokenizer is used if no key of the
            tokenizer is explicit.

    Returns:
        Values by dotted key; with `data.folder` for a tokenizer whose name and size do not
        identify it. Empty if there is no such file.

    Raises:
        DataError: The tokenizer cannot be read.
    """
    if init_from is None or any(key.split(".")[0] == "tokenizer" for key in explicit):
        path = tokenizer.get("path")
        file = Path(path).expanduser() if isinstance(path, str) else None
        if file is not None and checkpoints_in(file):
            file = _initial_tokenizer_file(file) or file
    elif isinstance(init_from, str):
        file = _initial_tokenizer_file(Path(init_from).expanduser(), run_dir)
    else:
        file = None  # from a damaged config.yaml, whose validation follows
    # A prepared dataset has a copy of a tokenizer file that is gone; only its size is needed here.
    is_sized = "tokenizer.vocab_size" in explicit or tokenizer.get("name") != "bpe"
    if file is None or (not file.exists() and (is_sized or "tokenizer.path" not in explicit)):
        return {}
    from data.tokenizer_files import read_tokenizer_path

    found = read_tokenizer_path(file)
    if {"tokenizer", "tokenizer.name"} & set(explicit) and found.name != tokenizer["name"]:
        raise DataError(
            f"tokenizer={tokenizer['name']} differs from tokenizer.path={file}, which is "
            f"{found.name}; use tokenizer={found.name}, or omit tokenizer"
        )
    size = tokenizer.get("vocab_size")
    if "tokenizer.vocab_size" in explicit and size != found.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={size} differs from {file}; use {found.vocab_size}, or omit "
            "tokenizer.vocab_size"
        )
    values = {
        "tokenizer.name": found.name,
        "tokenizer.vocab_size": found.vocab_size,
        "tokenizer.path": None if found.name == "byte" else str(file),
    }
    if _needs_hash(found):
        values["data.folder"] = f"{DEFAULT_FOLDER}-{found.hash[:8]}"
    return values


def _needs_hash(tokenizer: "Tokenizer") -> bool:
    return tokenizer.name != "byte" and tokenizer.hash != LLAMA3_HASH


def _initial_tokenizer_file(folder: Path, run_dir: str | None = None) -> Path | None:
    """Return the tokenizer file of weights or a run or, if absent, of `run_dir`'s checkpoint."""
    from data.tokenizer_files import find_tokenizer_file

    for each in (*checkpoints_in(folder), folder, *checkpoints_in(Path(run_dir or folder))):
        if (file := find_tokenizer_file(each)) is not None:
            return file
        # Checkpoints of version 0.1 do not contain the tokenizer.
        try:
            data = parse_json(read_file(each / "manifest.json"))["config"]["data"]
            file = find_tokenizer_file(Path(data["folder"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if file is not None:
            return file
    return None


def with_existing_folder(data: DataConfig, tokenizer: TokenizerConfig) -> DataConfig:
    """Return the data configuration with the folder in which the dataset is already prepared.

    The default of `data.folder` has changed: without the vocabulary size up to version 0.2, and
    without the hash for a tokenizer that was trained on the same data. A folder of such a name is
    used if it was prepared from this configuration, or its preparation was interrupted.
    """
    name = f"shards/{data.name}-{tokenizer.name}"
    folders = [data.folder, f"{name}-{tokenizer.vocab_size}", name]
    if not data.folder.startswith(folders[1]) or any(Path(data.folder).glob("*.json")):
        return data
    for folder in folders[1:]:
        older = dataclasses.replace(data, folder=folder)
        if _is_prepared_from(older, tokenizer):
            return older
    return data


def _is_prepared_from(data: DataConfig, tokenizer: TokenizerConfig) -> bool:
    """Return whether `data.folder` is or was being prepared from this configuration."""
    if not any(Path(data.folder).glob("*.json")):
        return False
    from data.manifest import MANIFEST_FILE, Manifest
    from data.preparation.identity import dataset_configuration, read_prepared
    from data.tokenizer import ready_tokenizer

    folder = Path(data.folder)
    wanted = dataset_configuration(data, tokenizer)
    try:
        if (folder / MANIFEST_FILE).exists():
            manifest = Manifest.read(folder)
            found, tokens_of = manifest.configuration, manifest.tokenizer.hash
        else:  # interrupted
            marker = parse_json(read_file(folder / "preparing.json"))
            found, tokens_of = marker["configuration"], marker["tokenizer"]
        paths = [values["tokenizer"].pop("path", None) for values in (found, wanted)]
        if _with_real_paths(found) != _with_real_paths(wanted):
            # The same corpus at another path; raises DataError otherwise.
            return bool(read_prepared(data, tokenizer, log=lambda _: None))
        if paths[0] == paths[1]:
            return True
        ready = ready_tokenizer(tokenizer)
        return ready is not None and ready.hash == tokens_of
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # includes DataError
        return False


def _with_real_paths(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return a dataset's configuration in which equal paths are spelled equally."""
    sources = {
        name: {**source, "path": source["path"] and os.path.realpath(source["path"])}
        for name, source in configuration["data.sources"].items()
    }
    return {**configuration, "data.sources": sources}
