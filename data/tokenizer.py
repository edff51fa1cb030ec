"""Encoding text as token ids with `tiktoken`: Llama 3's tokenizer, a trained BPE, or bytes.

All three consist of a `tokenizer.model` file (base64 token and rank per line), Llama 3's split
pattern, and special tokens after the last rank. Names of special tokens inside a text are encoded
as text.
"""

import binascii
import hashlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import tiktoken

from data.config import N_SPECIALS, TokenizerConfig
from data.errors import DataError
from data.files import read_file

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_TOKEN, EOS_TOKEN = "<|begin_of_text|>", "<|end_of_text|>"
# Special tokens 4 to 11 of Llama 3's 256; the others are reserved.
LLAMA3_NAMES = (
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
)
N_LLAMA3_SPECIALS = 256
BYTE_RANKS = {bytes([value]): value for value in range(256)}
MODEL_FILE = "tokenizer.model"
# A protobuf message whose first field is the first token of the vocabulary.
SENTENCEPIECE_START = b"\n"
GIT_LFS_START = b"version https://git-lfs"

# tiktoken panics on long texts and long runs. Meta's tokenizer splits at these numbers of
# characters; the same limits are needed to produce the same tokens.
MAX_SEGMENT = 400_000
MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Encode text as ids in [0, vocab_size): ranks first, then special tokens.

    Args:
        name: `llama3`, `bpe` or `byte`; determines the special tokens.
        ranks: Id of each ordinary token, 0 … len(ranks) - 1.
    """

    def __init__(self, name: str, ranks: dict[bytes, int]) -> None:
        self.name = name
        self.ranks = ranks
        names = special_names(name)
        self.specials = {special: len(ranks) + i for i, special in enumerate(names)}
        self.encoding = tiktoken.Encoding(
            name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )
        self.vocab_size = len(ranks) + len(self.specials)
        self.bos_id = self.specials[BOS_TOKEN]
        self.eos_id = self.specials[EOS_TOKEN]
        self._bos, self._eos = np.array([[self.bos_id], [self.eos_id]], dtype=np.uint32)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over ranks, split pattern and special tokens."""
        digest = hashlib.sha256(model_file(self.ranks))
        for part in (SPLIT_PATTERN, *self.specials):
            digest.update(b"\0" + part.encode())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the files that define this tokenizer, by name."""
        return {MODEL_FILE: model_file(self.ranks)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return [id_ for part in split_text(text) for id_ in self.encoding.encode_ordinary(part)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Return the ids of a text in which names of special tokens mean these tokens."""
        encode = partial(self.encoding.encode, allowed_special="all")
        return [id_ for part in split_text(text) for id_ in encode(part)]

    def encode_document(self, text: str) -> np.ndarray:
        """Return begin-of-text, the ids of the text and end-of-text, (n_tokens,) uint32."""
        # Arrays take a tenth of the memory of lists and are faster.
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([self._bos, *map(encode, split_text(text)), self._eos])

    def byte_lengths(self) -> list[int]:
        """Return the number of text bytes per id, (vocab_size,); 0 for special tokens."""
        ordinary = sorted(self.ranks, key=self.ranks.__getitem__)
        return [len(token) for token in ordinary] + [0] * len(self.specials)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids; special tokens become their names and invalid UTF-8 becomes U+FFFD.

        Raises:
            KeyError: An id is outside the vocabulary.
        """
        return self.encoding.decode([int(token) for token in ids], errors="replace")


def split_text(text: str) -> Iterator[str]:
    """Split a text where Meta's tokenizer does, so that no segment makes tiktoken panic.

    Segments have at most 400,000 characters, with at most 25,000 consecutive whitespace or
    non-whitespace characters.
    """
    for first in range(0, len(text), MAX_SEGMENT):
        segment = text[first : first + MAX_SEGMENT]
        if not _may_contain_long_run(segment):
            yield segment
            continue
        cuts = [0]
        for run in _RUN.finditer(segment):
            cuts += range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        yield from (segment[start:end] for start, end in pairwise([*cuts, len(segment)]))


def _may_contain_long_run(segment: str) -> bool:
    """Return whether a run of more than 25,000 characters is possible, by sampling.

    Such a run covers two consecutive multiples of 12,500, so a match at the first one reaches the
    second. Almost no text does, and a full search would take longer than encoding.
    """
    step = MAX_RUN // 2
    indices = range(0, len(segment) - step, step)
    runs = (_RUN.match(segment, index, index + step + 1) for index in indices)
    return any(run is not None and run.end() - run.start() > step for run in runs)


def special_names(name: str) -> list[str]:
    """Return the special tokens of a tokenizer, in id order."""
    is_llama3 = name == "llama3"
    named = LLAMA3_NAMES if is_llama3 else ()
    n_reserved = (N_LLAMA3_SPECIALS if is_llama3 else N_SPECIALS) - 2 - len(named)
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(n_reserved)]
    return [BOS_TOKEN, EOS_TOKEN, *reserved[:2], *named, *reserved[2:]]


def model_file(ranks: dict[bytes, int]) -> bytes:
    """Return the content of a `tokenizer.model`: base64 token, space and rank per line."""
    ordered = sorted(ranks.items(), key=itemgetter(1))
    encode = partial(binascii.b2a_base64, newline=False)
    return b"".join(encode(token) + b" %d\n" % rank for token, rank in ordered)


def read_tokenizer(path: Path, name: str) -> Tokenizer:
    """Load a tokenizer from a `tokenizer.model` file.

    Raises:
        DataError: The file is missing or has another format.
    """
    try:
        content = read_file(path)
        if content.startswith(SENTENCEPIECE_START) and not content.isascii():
            raise DataError(
                f"tokenizer.path={path} is a SentencePiece model, as in Llama 1, Llama 2 and "
                "Mistral; only Llama 3's tokenizer.model (lines of base64 token and rank) can be "
                "read. convert.py converts such weights with tokenizer_path=null"
            )
        reject_git_lfs(content, path)
        if content.lstrip().startswith(b"{"):
            raise DataError(
                f"tokenizer.path={path} is JSON, not lines of base64 token and rank; if it is a "
                "tokenizer.json, rename it so that it ends in .json"
            )
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {binascii.a2b_base64(token, strict_mode=True): int(rank) for token, rank in pairs}
    except FileNotFoundError:
        message = (
            f"tokenizer.path={path} does not exist; use a tokenizer.model, a tokenizer.json, or a "
            "folder with one of them"
        )
        raise DataError(message) from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"tokenizer.path={path} cannot be read ({error.strerror}); restore the file"
        ) from None
    except ValueError:
        raise DataError(
            f"tokenizer.path={path} is not a tokenizer.model, whose lines are a base64 token, a "
            "space and its rank; use the file of the model, or a tokenizer.json"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not BYTE_RANKS.keys() <= ranks.keys():
        raise DataError(
            f"tokenizer.path={path} is damaged: its {len(ranks)} ranks are not consecutive from 0 "
            "or do not include all 256 bytes; download or copy the file again"
        )
    return Tokenizer(name, ranks)


def reject_git_lfs(content: bytes, path: Path) -> None:
    """Raise DataError if a file was cloned without Git LFS."""
    if content.startswith(GIT_LFS_START):
        raise DataError(
            f"tokenizer.path={path} is a Git LFS pointer; download the file with `git lfs pull`"
        )


def ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Return the tokenizer if it needs no training, otherwise (`bpe` without a path) None.

    Raises:
        DataError: The file is missing, invalid or has another vocabulary size.
    """
    if config.name == "byte":
        return Tokenizer("byte", BYTE_RANKS)
    if config.name == "bpe" and config.path is None:
        return None
    path = _installed_llama3() if config.path is None else Path(config.path).expanduser()
    return _read_checked(path, config)


def load_tokenizer(config: TokenizerConfig, folder: Path | str) -> Tokenizer:
    """Load the tokenizer of a prepared folder, or one that needs no folder.

    Raises:
        DataError: Neither exists, or the vocabulary size differs from `config.vocab_size`.
    """
    path = Path(folder) / MODEL_FILE
    tokenizer = _read_checked(path, config) if path.exists() else ready_tokenizer(config)
    if tokenizer is None:
        raise DataError(f"{path} does not exist; prepare the data first with prepare.py")
    return tokenizer


def _read_checked(path: Path, config: TokenizerConfig) -> Tokenizer:
    from data.tokenizer_files import find_tokenizer_file, read_tokenizer_path

    file = find_tokenizer_file(path) if path.is_dir() else path
    if file is None or file.suffix == ".json":
        tokenizer = read_tokenizer_path(path)
        if tokenizer.name != config.name:
            raise DataError(
                f"tokenizer.name={config.name} differs from tokenizer.path={path}, which is "
                f"{tokenizer.name}; use tokenizer={tokenizer.name}"
            )
    else:
        tokenizer = read_tokenizer(file, config.name)
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={config.vocab_size} differs from {path}; "
            f"use {tokenizer.vocab_size}"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens, including the 16 special tokens.

    The result depends only on the texts: ties between pairs go to the lower ids.

    Raises:
        DataError: The texts have too few distinct pairs.
    """
    n_ranks = vocab_size - N_SPECIALS
    vocab = _train_library_bpe(texts, n_ranks).get_vocab()
    if len(vocab) < n_ranks:
        raise DataError(
            f"tokenizer.vocab_size={vocab_size} is too large for this text; "
            f"use at most {len(vocab) + N_SPECIALS}, or more text"
        )
    byte_of = byte_of_character()
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocab.items()}
    return Tokenizer("bpe", ranks)


def _train_library_bpe(texts: Iterable[str], n_ranks: int) -> Any:
    """Return a `tokenizers.Tokenizer` of at most `n_ranks` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = library_split()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=alphabet, show_progress=False
    )
    segments = (segment for text in texts for segment in split_text(text))
    _in_thread(lambda: tokenizer.train_from_iterator(segments, trainer))
    return tokenizer


def _in_thread(function: Callable[[], Any]) -> None:
    """Call library code that handles no signals, so that Ctrl-C interrupts it at once."""
    errors: SimpleQueue[BaseException | None] = SimpleQueue()

    def call() -> None:
        try:
            function()
            errors.put(None)
        except BaseException as error:  # re-raised in the calling thread
            errors.put(error)

    threading.Thread(target=call, daemon=True).start()  # does not outlive the process
    if error := errors.get():
        raise error


def library_split() -> Any:
    """Return the `tokenizers` pre-tokenizer for the split pattern and byte-level alphabet."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


def byte_of_character() -> dict[str, int]:
    """Return the byte for each character of the byte-level alphabet (GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    hidden = (value for value in range(256) if value not in set(printable))
    return table | {chr(256 + i): value for i, value in enumerate(hidden)}


def _installed_llama3() -> Path:
    """Return the path of `tokenizer.model` in the `llama-models` package, without importing it."""
    spec = importlib.util.find_spec("llama_models")
    for root in (spec and spec.submodule_search_locations) or []:
        path = Path(root) / "llama3" / MODEL_FILE
        if path.exists():
            return path
    raise DataError(
        "tokenizer.path=null needs the package llama-models, which contains Llama 3's "
        "tokenizer.model; install the extra `llama3` (pip install '.[llama3]'), or set "
        "tokenizer.path to the file"
    )
