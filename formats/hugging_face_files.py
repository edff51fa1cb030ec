"""The weight files of a Hugging Face folder: which are read, and the tensors they contain.

A folder may contain files of several exports. As in transformers, `model.safetensors` is preferred
to `model.safetensors.index.json` with its files, and both to `pytorch_model.bin` and its index. An
index none of whose files exists is ignored if there are other weights.
"""

import os
from pathlib import Path
from typing import Any

from data.files import parse_json
from formats.config_json import read_json
from formats.errors import FormatError
from formats.file_names import INDEX, SINGLE, WEIGHT_FILES
from formats.stored_tensor import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    TensorSlice,
    reject_lfs_pointer,
    unreadable,
)
from formats.torch_file import read_torch_file

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def read_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of a folder by name without reading their values, and warnings.

    Raises:
        FormatError: There are no weight files, or one is missing, damaged or inconsistent.
    """
    present = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not present:
        raise FormatError(_without_weights(folder))
    chosen = next((name for name in present if _has_files(folder, name)), present[0])
    warnings = []
    if chosen == SINGLE and INDEX in present and _lists_files(folder):
        warnings.append(
            f"{folder} contains {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does"
        )
    if not chosen.endswith(".index.json"):
        return _read_file(folder / chosen), warnings
    return _read_indexed(folder, chosen), warnings


def _has_files(folder: Path, name: str) -> bool:
    """Return whether a weight file exists, or any file of an index."""
    if not name.endswith(".index.json"):
        return True
    files = _weight_map(folder / name).values()
    return any(os.path.isfile(folder / file) for file in files)


def _lists_files(folder: Path) -> bool:
    """Return whether any file of the index next to a single file exists; a damaged one has none."""
    try:
        return _has_files(folder, INDEX)
    except FormatError:
        return False


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor in an index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise FormatError(f"{path} has no weight_map; download or copy it again")
    return weight_map


def _read_indexed(folder: Path, index: str) -> dict[str, StoredTensor]:
    weight_map = _weight_map(folder / index)
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if not os.path.isfile(folder / file):  # also False for a name that is too long
            raise FormatError(
                f"{folder / file} does not exist but is listed in {index}; download or copy it "
                "again"
            )
        found = _read_file(folder / file)
        if twice := sorted(stored.keys() & found.keys()):
            raise FormatError(
                f"{folder / index}: {file} and an earlier file both contain {twice[0]}; the files "
                "are of different exports; download or copy the folder again"
            )
        stored |= found
    absent = [f"{name} in {file}" for name, file in weight_map.items() if name not in stored]
    if absent:
        raise FormatError(
            f"{folder / index} lists tensors that do not exist ({', '.join(absent[:8])}); "
            "download or copy the folder again"
        )
    return stored


def _without_weights(folder: Path) -> str:
    """Return the error for a folder without weight files."""
    suffixes = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack")
    others = sorted(path.name for path in folder.iterdir() if path.name.endswith(suffixes))
    found = f" (only {', '.join(others[:8])})" if others else ""
    for path in folder.iterdir():
        if path.name in WEIGHT_FILES and path.is_symlink() and not path.exists():
            return f"{path} is a link to {path.readlink()}, which does not exist; download it again"
    message = f"{folder} contains neither {SINGLE} nor {INDEX}, nor {WEIGHT_FILES[2]} or its index"
    if (folder / "original").is_dir():
        return f"{message}{found}; download them, or use {folder / 'original'} if it has weights"
    return f"{message}{found}; download them, or write them with transformers' save_pretrained"


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return read_torch_file(path) if path.suffix == ".bin" else _read_header(path)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file without reading their values."""
    from safetensors import SafetensorError, safe_open

    reject_lfs_pointer(path)
    try:
        with safe_open(path, framework="pt"):
            pass  # validates the header and the file length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = parse_json(file.read(length))
    except OSError as error:
        raise unreadable(path, error) from None
    except RuntimeError as error:  # it cannot be mapped: a limit of the address space
        raise FormatError(f"{path} cannot be read ({error}); raise ulimit -v or memory") from None
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); download or copy it again") from None
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in TORCH_DTYPES:
            raise FormatError(
                f"{path}: {name} has dtype={entry['dtype']}; use weights in F32, BF16 or F16"
            )
        shape = tuple(entry["shape"])
        full = TensorSlice((0,) * len(shape), shape, path, 8 + length + entry["data_offsets"][0])
        stored[name] = StoredTensor(TORCH_DTYPES[entry["dtype"]], shape, [full])
    return stored
