"""Find and read tokenizer files: `tokenizer.model`, `tokenizer.json`, or a folder with either."""

from pathlib import Path

from data.errors import DataError
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer
from data.tokenizer_json import N_LLAMA3_RANKS, read_tokenizer_json, tokenizer_name

TOKENIZER_JSON = "tokenizer.json"
# Published repositories have Meta's files, with `tokenizer.model`, in the folder `original`.
FILES = (MODEL_FILE, TOKENIZER_JSON, f"original/{MODEL_FILE}")


def find_tokenizer_file(folder: Path) -> Path | None:
    """Return the tokenizer file in a folder, or None.

    `tokenizer.model` is preferred, except in a Hugging Face folder: transformers reads only
    `tokenizer.json` there, and the other file may be of another program or model.
    """
    names: tuple[str, ...] = FILES
    if (folder / "config.json").exists() and not (folder / "manifest.json").exists():
        names = (TOKENIZER_JSON, *FILES)
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` or, under any other suffix, a `tokenizer.model`.

    A `tokenizer.model` does not list special tokens, so its kind follows from its ranks: 128,000
    ranks are `llama3`, the 256 bytes in order are `byte`, anything else is `bpe`.

    Raises:
        DataError: It cannot be read.
    """
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    ranks = read_tokenizer(path, "bpe").ranks
    return Tokenizer(tokenizer_name(len(ranks) == N_LLAMA3_RANKS, ranks), ranks)


def read_tokenizer_path(path: Path) -> Tokenizer:
    """Read a tokenizer file or the one in a folder.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    if not path.is_dir():
        return read_tokenizer_file(path)
    file = find_tokenizer_file(path)
    if file is None:
        raise DataError(
            f"{path} contains neither {MODEL_FILE} nor {TOKENIZER_JSON}; use a folder with one of "
            "them, or the file itself"
        )
    return read_tokenizer_file(file)
