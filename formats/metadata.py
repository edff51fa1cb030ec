"""Files of a Hugging Face folder that conversions keep: tokenizer, chat template, generation.

A native checkpoint carries them next to its shards. A run that was initialized from weights has
none of its own; the folder of `run.init_from` is used if it still exists. Meta folders have none.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.config import N_SPECIALS
from data.files import parse_json
from data.tokenizer import N_LLAMA3_SPECIALS, Tokenizer
from data.tokenizer_files import TOKENIZER_JSON
from formats.config_json import read_json
from formats.errors import FormatError
from formats.file_names import CONFIG, TRAINING
from formats.tokenizers import LLAMA3_CHAT_TEMPLATE, find_tokenizer, stop_token_ids
from formats.weights import Weights

GENERATION, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    *(TOKENIZER_JSON, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(CHAT_TEMPLATE, "chat_template.json"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def kept_files(
    weights: Weights, tokenizer: Tokenizer | None, with_tokenizer: bool
) -> dict[str, bytes]:
    """Return the files of the source that a Hugging Face or native folder keeps, by name.

    Args:
        tokenizer: The tokenizer that is written. If it is not that of the source, nothing is kept.
        with_tokenizer: Whether to keep the tokenizer's files and the chat template.
    """
    folder = _source_folder(weights, tokenizer)
    if folder is None:
        return {}
    names = (CONFIG, GENERATION, *(TOKENIZER_FILES if with_tokenizer else ()))
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if with_tokenizer and not has_chat_template(files) and _is_instruct(weights, tokenizer):
        files[CHAT_TEMPLATE] = LLAMA3_CHAT_TEMPLATE.encode()
    return files


def training_settings(weights: Weights) -> dict[str, Any]:
    """Return `seq_len` and `document_mask` of the training run, on which held-out loss depends.

    They are in the configuration of a run's checkpoint, and in `training.json` of its conversions.
    Empty for other weights.

    Raises:
        FormatError: `training.json` is damaged.
    """
    train: Any = weights.config.get("train")
    if train:
        data: Any = weights.config.get("data") or {}
        return {"seq_len": train["seq_len"], "document_mask": data.get("document_mask", True)}
    path = weights.folder / TRAINING
    return read_json(path) if path.is_file() else {}


def _source_folder(weights: Weights, tokenizer: Tokenizer | None) -> Path | None:
    """Return the folder whose files are kept: of the weights or of a run's initial weights."""
    candidates = [weights.folder]
    run: Any = weights.config.get("run") or {}
    if initial := run.get("init_from"):
        candidates.append(Path(initial).expanduser())
    for folder in reversed(candidates):
        if folder.is_dir() and (tokenizer is None or _same(folder, tokenizer)):
            return folder
    return None


def _same(folder: Path, tokenizer: Tokenizer) -> bool:
    """Return whether a folder contains this tokenizer, or only one that cannot be read."""
    try:
        found = find_tokenizer(folder)
    except FormatError:
        return False
    return found is not None and found.ranks == tokenizer.ranks


def _is_instruct(weights: Weights, tokenizer: Tokenizer | None) -> bool:
    """Return whether the weights are for chat, by their names: Meta's files do not say."""
    run: Any = weights.config.get("run") or {}
    paths = [weights.folder.absolute(), Path(run.get("init_from") or "")]
    # Repositories on the hub have Meta's files in the folder `original`.
    names = [path.parent.name if path.name == "original" else path.name for path in paths]
    is_llama3 = tokenizer is not None and tokenizer.name == "llama3"
    return is_llama3 and any("instruct" in name.lower() for name in names)


def chat_template(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template among the files, if it is in its own file."""
    content = files.get(CHAT_TEMPLATE)
    return None if content is None else content.decode("utf-8", errors="replace")


def has_chat_template(files: Mapping[str, bytes]) -> bool:
    """Return whether the files contain a chat template."""
    in_config = bool(json_of(files, "tokenizer_config.json").get("chat_template"))
    return in_config or CHAT_TEMPLATE in files or "chat_template.json" in files


def json_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it is absent or damaged."""
    try:
        values = parse_json(files[name])
    except (KeyError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def token_ids(
    weights: Weights, tokenizer: Tokenizer | None, files: Mapping[str, bytes]
) -> dict[str, Any]:
    """Return the ids that start, end and pad a text, as in `config.json`.

    They are those of the source. If it has none, they are those of the tokenizer, of the tokenizer
    next to the weights, or of the tokenizer that a native checkpoint was written with.
    """
    stored: dict[str, Any] = {}
    for name in (GENERATION, CONFIG):
        values = json_of(files, name)
        stored |= {key: values[key] for key in TOKEN_IDS if values.get(key) is not None}
    return _tokenizer_ids(weights, tokenizer) | stored


def _tokenizer_ids(weights: Weights, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        with suppress(FormatError):
            tokenizer = find_tokenizer(weights.folder)
    if tokenizer is not None:
        stops = stop_token_ids(tokenizer)
        eos: int | list[int] = stops if len(stops) > 1 else stops[0]
        return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
    section: Any = weights.config.get("tokenizer") or {}
    if isinstance(size := section.get("vocab_size"), int):
        first = size - (N_LLAMA3_SPECIALS if section.get("name") == "llama3" else N_SPECIALS)
        return {"bos_token_id": first, "eos_token_id": first + 1}
    return {"bos_token_id": None, "eos_token_id": None}
