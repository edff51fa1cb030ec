"""Text to token ids and back, with `tiktoken`: Llama 3's tokenizer, a trained one, or bytes.

All three have the same shape, a `tokenizer.model` file (one base64 token and its rank a line),
Llama 3's split pattern, and special tokens after the last rank. Text that happens to contain the
name of a special token is text.
"""

import binascii
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from data.config import N_SPECIALS, TokenizerConfig
from data.errors import DataError

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_TOKEN, EOS_TOKEN = "<|begin_of_text|>", "<|end_of_text|>"
# Names 2 to 11 of Llama 3's 256 special tokens; the others are reserved, counted on from 2.
LLAMA3_NAMES = (
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
N_LLAMA3_SPECIALS = 256
BYTE_RANKS = {bytes([value]): value for value in range(256)}
MODEL_FILE = "tokenizer.model"

# tiktoken panics on long texts and long runs; Meta's tokenizer cuts at these numbers of characters,
# and so must we to get its tokens.
MAX_PIECE = 400_000
MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class Tokenizer:
    """Encodes text as ids in [0, vocab_size): ranks first, then the special tokens.

    Args:
        name: `llama3`, `bpe` or `byte`; decides the special tokens
        ranks: bytes of each ordinary token → its id, 0 … len-1
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
        self._bos = np.array([self.bos_id], dtype=np.uint32)
        self._eos = np.array([self.eos_id], dtype=np.uint32)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides the ids of a text: ranks, pattern, special tokens."""
        digest = hashlib.sha256(model_file(self.ranks))
        for part in (SPLIT_PATTERN, *self.specials):
            digest.update(b"\0" + part.encode())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """What others need to have this tokenizer, by file name."""
        return {MODEL_FILE: model_file(self.ranks)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, no special token among them."""
        return [
            token for piece in split_text(text) for token in self.encoding.encode_ordinary(piece)
        ]

    def encode_document(self, text: str) -> np.ndarray:
        """A document as begin-of-text, its ids, end-of-text: uint32 (tokens,)."""
        # Into arrays at once: a tenth of the memory of lists, and faster than those.
        ids = [
            self.encoding.encode_to_numpy(piece, disallowed_special=())
            for piece in split_text(text)
        ]
        return np.concatenate([self._bos, *ids, self._eos])

    def byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for, (vocab_size,); 0 for special tokens."""
        lengths = [0] * self.vocab_size
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens by their names, broken UTF-8 as U+FFFD.

        Raises:
            KeyError: an id that is no token's.
        """
        return self.encoding.decode([int(token) for token in ids], errors="replace")


def split_text(text: str) -> Iterator[str]:
    """The text cut where Meta's tokenizer cuts it: so that no piece makes tiktoken panic.

    Pieces of 400,000 characters, and in each no more than 25,000 characters of space, or of no
    space, in a row.
    """
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        if not _may_hold_long_run(piece):
            yield piece
            continue
        cuts = [0]
        for run in _RUN.finditer(piece):
            cuts += range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        yield from (piece[begin:end] for begin, end in pairwise([*cuts, len(piece)]))


def _may_hold_long_run(piece: str) -> bool:
    """Whether a run of over 25,000 characters is possible, looked up at a few places alone.

    Such a run covers two neighbouring multiples of 12,500, so the run at one of them reaches the
    next one; almost no text does that, and searching all of it would take longer than encoding.
    """
    step = MAX_RUN // 2
    for place in range(0, len(piece) - step, step):
        run = _RUN.match(piece, place, place + step + 1)
        if run is not None and run.end() > place + step:
            return True
    return False


def special_names(name: str) -> list[str]:
    """The special tokens of a tokenizer in the order of their ids."""
    if name == "llama3":
        reserved = range(2, N_LLAMA3_SPECIALS - len(LLAMA3_NAMES))
        numbered = [f"<|reserved_special_token_{i}|>" for i in reserved]
        return [BOS_TOKEN, EOS_TOKEN, *LLAMA3_NAMES, *numbered]
    return [
        BOS_TOKEN,
        EOS_TOKEN,
        *(f"<|reserved_special_token_{i}|>" for i in range(N_SPECIALS - 2)),
    ]


def model_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a `tokenizer.model`: base64 token, space, rank, one a line by rank."""
    lines = (
        binascii.b2a_base64(token, newline=False) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )
    return b"".join(lines)


def read_tokenizer(path: Path, name: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` file.

    Raises:
        DataError: no such file, or not of this format.
    """
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
    except FileNotFoundError:
        raise DataError(
            f"tokenizer.path ({path}) does not exist: name a tokenizer.model file"
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(
            f"tokenizer.path ({path}) is not a tokenizer.model file ({error}): "
            "each line must be a base64 token, a space and its rank"
        ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not BYTE_RANKS.keys() <= ranks.keys():
        raise DataError(
            f"tokenizer.path ({path}) is damaged: its {len(ranks)} ranks do not count from 0 on "
            "over 256 bytes and more: get the file again"
        )
    return Tokenizer(name, ranks)


def ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that needs no training, or None for a `bpe` to be trained.

    Raises:
        DataError: no file, not that format, or another vocabulary than `config.vocab_size`.
    """
    if config.name == "byte":
        return Tokenizer("byte", BYTE_RANKS)
    if config.path is not None:
        path = Path(config.path).expanduser()
    elif config.name == "llama3":
        path = _installed_llama3()
    else:
        return None
    tokenizer = read_tokenizer(path, config.name)
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size ({config.vocab_size}) is not that of {path}: "
            f"use {tokenizer.vocab_size}"
        )
    return tokenizer


def load_tokenizer(config: TokenizerConfig, folder: Path | str) -> Tokenizer:
    """The tokenizer of a prepared folder, else the one that needs no folder.

    Raises:
        DataError: neither is there, or its vocabulary is not `config.vocab_size`.
    """
    path = Path(folder) / MODEL_FILE
    tokenizer = read_tokenizer(path, config.name) if path.exists() else ready_tokenizer(config)
    if tokenizer is None:
        raise DataError(f"{path} does not exist: prepare the data first, with prepare.py")
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size ({config.vocab_size}) is not that of {path}: "
            f"use {tokenizer.vocab_size}"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, the 16 special ones among them.

    The result depends on the texts alone: ties between pairs go to the lower ids.

    Raises:
        DataError: the texts have too few different pairs for so many tokens.
    """
    n_ranks = vocab_size - N_SPECIALS
    vocabulary = _trained_by_library(texts, n_ranks).get_vocab()
    if len(vocabulary) < n_ranks:
        raise DataError(
            f"tokenizer.vocab_size ({vocab_size}) is more than this text can fill: "
            f"use at most {len(vocabulary) + N_SPECIALS}, or more text"
        )
    as_byte = byte_of_character()
    ranks = {
        bytes(as_byte[character] for character in token): rank for token, rank in vocabulary.items()
    }
    return Tokenizer("bpe", ranks)


def _trained_by_library(texts: Iterable[str], n_ranks: int) -> Any:
    """The library's own tokenizer of at most `n_ranks` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = library_split()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator((piece for text in texts for piece in split_text(text)), trainer)
    return trained


def library_split() -> Any:
    """The split pattern, and then the byte-level alphabet, as the library's pre-tokenizer."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_of_character() -> dict[str, int]:
    """The byte behind each printable stand-in of the byte-level alphabet (GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(value): value for value in printable}
    hidden = (value for value in range(256) if value not in set(printable))
    return table | {chr(256 + i): value for i, value in enumerate(hidden)}


def _installed_llama3() -> Path:
    """Meta's `tokenizer.model` inside the `llama-models` package, found without importing it."""
    spec = importlib.util.find_spec("llama_models")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(root) / "llama3" / MODEL_FILE
        if path.exists():
            return path
    raise DataError(
        "tokenizer.path (null) needs the package llama-models, which carries Llama 3's "
        "tokenizer.model: install the extra `llama3` (pip install '.[llama3]'), or set "
        "tokenizer.path to the file"
    )
