"""Read a `tokenizer.json` of Hugging Face that is equivalent to one of our tokenizers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from data.config import LLAMA3_VOCAB_SIZE, N_SPECIALS
from data.errors import DataError
from data.files import read_file
from data.tokenizer import (
    BYTE_RANKS,
    N_LLAMA3_SPECIALS,
    Tokenizer,
    byte_of_character,
    library_split,
    reject_git_lfs,
    special_names,
)

N_LLAMA3_RANKS = LLAMA3_VOCAB_SIZE - N_LLAMA3_SPECIALS


def tokenizer_name(is_llama3: bool, ranks: dict[bytes, int]) -> str:
    """Return the name of a tokenizer with these ranks."""
    small = "byte" if ranks == BYTE_RANKS else "bpe"
    return "llama3" if is_llama3 else small


def byte_level_encoder() -> Callable[[bytes], str]:
    """Return a function that maps bytes to the characters of the byte-level alphabet."""
    character = {byte: character for character, byte in byte_of_character().items()}
    return lambda token: "".join(character[byte] for byte in token)


def bpe_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the ordered merges with which the library's BPE equals tiktoken's.

    tiktoken repeatedly merges the leftmost pair whose concatenation has the lowest rank. The result
    between two token boundaries therefore depends only on the bytes between them, and a token is
    only ever formed from the two parts that remain last when its own bytes are encoded. This pair
    is its merge. A token whose bytes end in more than two parts, as 588 of Llama 3's do, has none.
    The converter of transformers lists all splits of each token, with the same ids, since its other
    pairs are never adjacent: 280,147 entries for Llama 3 instead of 127,156.
    """
    merges, no_rank = [], len(ranks)
    for token in sorted(ranks, key=lambda token: ranks[token]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(left + right, no_rank) for left, right in pairwise(parts)]
            lowest = min(pair_ranks)
            if lowest == no_rank:
                break
            i = pair_ranks.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


@dataclass(frozen=True)
class _Added:
    """A special token in a `tokenizer.json`."""

    id: int
    content: str


@dataclass(frozen=True)
class _Model:
    """The `model` section of a `tokenizer.json`, restricted to the features of Llama 3's BPE.

    Merges are pairs; in files of older releases, strings separated by a space.
    """

    type: Literal["BPE"]
    vocab: dict[str, int]
    merges: list[tuple[str, str] | str]
    ignore_merges: bool = False
    dropout: None = None
    unk_token: None = None
    byte_fallback: Literal[False, None] = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None


@dataclass(frozen=True)
class _File:
    """The fields of a `tokenizer.json` that determine the token ids."""

    model: _Model
    added_tokens: list[_Added]
    pre_tokenizer: dict[str, Any]
    normalizer: None = None


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` that is equivalent to one of our tokenizers.

    256 special tokens identify `llama3`, regardless of the names of all but the first two, which
    differ between releases; 16 identify `byte` and `bpe`.

    Raises:
        DataError: It cannot be read, or is another kind of tokenizer.
    """
    from pydantic import TypeAdapter, ValidationError

    # Parsed without the library, which aborts the process on some damaged files.
    try:
        content = read_file(path)
        reject_git_lfs(content, path)
        file = TypeAdapter(_File).validate_json(content, strict=True)
        reason = next(_differences(file), None)
    except FileNotFoundError:
        raise DataError(
            f"tokenizer.path={path} does not exist; use a tokenizer.model, a tokenizer.json, or a "
            "folder with one of them"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); download or copy it again") from None
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # not JSON, or not an object
            raise DataError(
                f"{path} cannot be read ({first['msg']}); download or copy it again"
            ) from None
        key, value = ".".join(map(str, first["loc"])), _shortened(first["input"])
        reason = f"{key}={value}: {first['msg']}"
        if key == "model.byte_fallback":
            reason = f"{key}={value}, a SentencePiece model as in Llama 1, Llama 2 and Mistral"
    if reason is not None:
        raise DataError(
            f"{path} is not a tokenizer like Llama 3's: {reason}; use the model's tokenizer.model, "
            "or the tokenizer.json of Llama 3 or of a folder written by convert.py"
        )
    ranks = _ranks(file.model.vocab)
    return Tokenizer(tokenizer_name(len(file.added_tokens) == N_LLAMA3_SPECIALS, ranks), ranks)


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _ranks(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """Return the id of each token by its bytes."""
    as_byte = byte_of_character()
    return {bytes(as_byte[each] for each in token): rank for token, rank in vocabulary.items()}


def _differences(file: _File) -> Iterator[str]:
    """Yield the properties of a `tokenizer.json` that none of our tokenizers has.

    Each check assumes that the earlier ones have passed, so only the first result is valid.
    """
    if file.pre_tokenizer != json.loads(library_split().__getstate__()):
        value = _shortened(file.pre_tokenizer)
        yield f"pre_tokenizer={value} is not Llama 3's pattern and ByteLevel"
    vocabulary, alphabet = file.model.vocab, byte_of_character().keys()
    for token in vocabulary:
        if invalid := set(token) - alphabet:
            name, character = _shortened(token), _shortened(min(invalid))
            yield f"token {name} contains {character}, which is not in the byte-level alphabet"
    ranks = _ranks(vocabulary)
    if sorted(ranks.values()) != list(range(len(ranks))):
        yield f"the ids of its {len(ranks)} tokens are not consecutive from 0"
    if absent := BYTE_RANKS.keys() - ranks.keys():
        yield f"byte {ord(min(absent))} is not a token"
    yield from _merge_differences(file.model, ranks)

    names = {token.id: token.content for token in file.added_tokens}
    name = tokenizer_name(len(file.added_tokens) == N_LLAMA3_SPECIALS, ranks)
    expected = dict(enumerate(special_names(name), start=len(ranks)))
    if len(file.added_tokens) != len(expected) or names.keys() != expected.keys():
        yield (
            f"{len(file.added_tokens)} special tokens found; expected {N_LLAMA3_SPECIALS} or "
            f"{N_SPECIALS} with consecutive ids from {len(ranks)}"
        )
    for index in islice(expected, 2 if name == "llama3" else None):
        if names[index] != expected[index]:
            yield f"token {index} is {_shortened(names[index])}, not {expected[index]}"


def _merge_differences(model: _Model, ranks: dict[bytes, int]) -> Iterator[str]:
    """Yield why BPE with these merges is not equivalent to tiktoken's with these ranks."""
    merges = [tuple(each.split(" ")) if isinstance(each, str) else each for each in model.merges]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= model.vocab.keys():
            yield f"merge {_shortened(pair)} does not join two tokens into one"
    for early, late in pairwise(merges):
        if model.vocab["".join(early)] > model.vocab["".join(late)]:
            yield f"merge {_shortened(early)} precedes {_shortened(late)}, which has a lower id"
    required = bpe_merges(ranks)
    as_text = byte_level_encoder()
    if absent := {(as_text(left), as_text(right)) for left, right in required} - set(merges):
        example = _shortened(min(absent))
        yield f"{len(absent)} required merges are missing, including {example}"
    unreachable = len(ranks) - 256 - len(required)
    if unreachable and not model.ignore_merges:
        yield f"with ignore_merges=false, {unreachable} tokens are not reachable by merges"
