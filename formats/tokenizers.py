"""Tokenizers at rest: `tokenizer.json` and its companions out, that and `tokenizer.model` in.

The ids of the written file are those of `Tokenizer.encode`, but for two kinds of text. The names
of special tokens in a text become special tokens in Hugging Face's tokenizers (unless loaded with
`split_special_tokens=True`), and are text here. Runs of over 25,000 characters of space, or of no
space, and texts of over 400,000 are cut by Meta's tokenizer and so here, and not there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data.config import LLAMA3_VOCAB_SIZE, N_SPECIALS
from data.errors import DataError
from data.tokenizer import (
    BOS_TOKEN,
    BYTE_RANKS,
    EOS_TOKEN,
    MODEL_FILE,
    N_LLAMA3_SPECIALS,
    Tokenizer,
    byte_of_character,
    library_split,
    read_tokenizer,
    special_names,
)
from formats.errors import FormatError

TOKENIZER_JSON = "tokenizer.json"
LLAMA3_STOPS = ("<|eom_id|>", "<|eot_id|>")  # end a message and a turn: `stop_tokens` of Meta's
# What pads a batch: a token that no text has, so that a mask made from it hides no end of text.
PAD = {"llama3": "<|finetune_right_pad_id|>"}
OTHER_PAD = "<|reserved_special_token_0|>"
N_LLAMA3_RANKS = LLAMA3_VOCAB_SIZE - N_LLAMA3_SPECIALS


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text: end-of-text and, of `llama3`, what ends a message and a turn."""
    names = LLAMA3_STOPS if tokenizer.name == "llama3" else ()
    return [tokenizer.eos_id, *(tokenizer.specials[name] for name in names)]


# ---------------------------------------------------------------- out


def write_hugging_face(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """Writes what `transformers.AutoTokenizer.from_pretrained(folder)` loads.

    Args:
        folder: Exists; of its files `tokenizer.json`, `tokenizer_config.json` and
            `special_tokens_map.json` are written.
        max_seq_len: Of the model; the loaded tokenizer warns of texts of more tokens.

    Raises:
        OSError: a file cannot be written.
    """
    names = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD.get(tokenizer.name, OTHER_PAD),
    }
    config = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for file, values in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
    ):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    # Not by the library's `save`, whose errors are no OSErrors.
    content = _in_the_library(tokenizer).to_str(pretty=True)
    (folder / TOKENIZER_JSON).write_text(content, encoding="utf-8")


def _in_the_library(tokenizer: Tokenizer) -> Any:
    """The tokenizer as the library's own object, built like the published Llama 3's."""
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as LibraryTokenizer

    written = _writer()
    vocabulary = {written(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(written(left), written(right)) for left, right in merges_of(tokenizer.ranks)]
    # A piece of text that is a token is that token, as in tiktoken, whether merges reach it or not.
    built = LibraryTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    built.pre_tokenizer = library_split()
    built.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS_TOKEN} $A",
                pair=f"{BOS_TOKEN} $A {BOS_TOKEN}:1 $B:1",
                special_tokens=[(BOS_TOKEN, tokenizer.bos_id)],
            ),
        ]
    )
    built.decoder = decoders.ByteLevel()
    # Their ids count on from the vocabulary's, in this order.
    built.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in tokenizer.specials]
    )
    return built


def _writer() -> Callable[[bytes], str]:
    """What writes bytes in the characters of the byte-level alphabet."""
    character = {byte: character for character, byte in byte_of_character().items()}
    return lambda token: "".join(character[byte] for byte in token)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make the library's BPE that of tiktoken, in their order.

    tiktoken joins, again and again, the leftmost of the pairs whose joined bytes have the lowest
    rank. So what becomes of the bytes between two borders of tokens depends on them alone, and a
    token only ever comes from the two parts that encoding its own bytes comes to last. These are
    its merge; where encoding them ends in more parts, as for 588 of Llama 3's tokens, it has none.
    The list of all splits of each token, which transformers' converter writes, gives the same ids:
    its other pairs never stand side by side. For Llama 3 it has 280,147 entries, this one 127,156.
    """
    merges, none = [], len(ranks)
    for token in sorted(ranks, key=lambda token: ranks[token]):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, none) for left, right in pairwise(parts)]
            rank = min(joined)
            if rank == none:
                break
            place = joined.index(rank)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


# ---------------------------------------------------------------- in


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder: its `tokenizer.model`, else its `tokenizer.json`, else None.

    Raises:
        FormatError: it cannot be read.
    """
    for name in (MODEL_FILE, TOKENIZER_JSON):
        if (folder / name).exists():
            return read_tokenizer_file(folder / name)
    return None


def read_tokenizer_file(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` or, under any other name, a `tokenizer.model`.

    The latter tells no special tokens: 128,000 ranks are `llama3`'s, the 256 bytes in their order
    are `byte`, and everything else is a `bpe`.

    Raises:
        FormatError: it cannot be read.
    """
    if path.suffix == ".json":
        return read_tokenizer_json(path)
    try:
        ranks = read_tokenizer(path, "bpe").ranks
    except DataError as error:
        raise FormatError(str(error)) from None
    return Tokenizer("llama3" if len(ranks) == N_LLAMA3_RANKS else _small_name(ranks), ranks)


def _small_name(ranks: dict[bytes, int]) -> str:
    """The name of a tokenizer with 16 special tokens."""
    return "byte" if ranks == BYTE_RANKS else "bpe"


@dataclass(frozen=True)
class _Added:
    """A special token in a `tokenizer.json`."""

    id: int
    content: str


@dataclass(frozen=True)
class _Model:
    """The BPE in a `tokenizer.json`, without what Llama 3's has not.

    Its merges are pairs, and in older files words with a blank between them.
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
    """What decides the ids in a `tokenizer.json`."""

    model: _Model
    added_tokens: list[_Added]
    pre_tokenizer: dict[str, Any]
    normalizer: None = None


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` that encodes like one of ours.

    The number of its special tokens tells its name: 256 are `llama3`'s, whatever a release calls
    those after the first two, and 16 are those of `byte` and `bpe`.

    Raises:
        FormatError: it cannot be read, or is another kind of tokenizer.
    """
    from pydantic import TypeAdapter, ValidationError

    # Not loaded by the library: some damaged files make it abort the process.
    try:
        file = TypeAdapter(_File).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error}): get it again") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        if not wrong["loc"]:  # no JSON, or no object
            raise FormatError(f"{path} cannot be read ({wrong['msg']}): get it again") from None
        key, value = ".".join(map(str, wrong["loc"])), _short(wrong["input"])
        raise _refusal(path, f"{key} ({value}): {wrong['msg']}") from None
    if file.pre_tokenizer != json.loads(library_split().__getstate__()):
        what = _short(file.pre_tokenizer)
        raise _refusal(path, f"pre_tokenizer ({what}) is not Llama 3's pattern and ByteLevel")
    ranks = _ranks_of(path, file.model.vocab)
    _check_merges(path, file.model, ranks)
    return Tokenizer(_name_by_specials(path, file.added_tokens, ranks), ranks)


def _refusal(path: Path, rule: str) -> FormatError:
    return FormatError(
        f"{path} is no tokenizer of Llama 3's kind: {rule}. Use the model's tokenizer.model, or "
        "the tokenizer.json of Llama 3 or of a folder that convert.py wrote"
    )


def _short(value: Any) -> str:
    """A value of the file, in JSON, as long as a message bears."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _ranks_of(path: Path, vocabulary: dict[str, int]) -> dict[bytes, int]:
    """The bytes of each token, and its id.

    Raises:
        FormatError: they are not bytes, all 256 among them, numbered from 0 on.
    """
    as_byte = byte_of_character()
    ranks = {}
    for token, rank in vocabulary.items():
        if strange := set(token) - as_byte.keys():
            raise _refusal(
                path, f"token {_short(token)} has {_short(min(strange))}, no byte's name"
            )
        ranks[bytes(as_byte[character] for character in token)] = rank
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _refusal(path, f"the ids of its {len(ranks)} tokens do not count from 0 on")
    if absent := [value for value in range(256) if bytes([value]) not in ranks]:
        raise _refusal(path, f"the byte {absent[0]} is no token")
    return ranks


def _check_merges(path: Path, model: _Model, ranks: dict[bytes, int]) -> None:
    """Whether the library encodes with these merges as tiktoken does with the ranks.

    Raises:
        FormatError: it does not.
    """
    merges = [tuple(each.split(" ")) if isinstance(each, str) else each for each in model.merges]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= model.vocab.keys():
            raise _refusal(path, f"the merge {_short(pair)} does not make a token of two tokens")
    order = [model.vocab["".join(pair)] for pair in merges]
    for place, (first, second) in enumerate(pairwise(order)):
        if first > second:
            early, late = _short(merges[place]), _short(merges[place + 1])
            raise _refusal(path, f"the merge {early} comes before {late}, which has the lower id")
    reached = merges_of(ranks)
    written = _writer()
    if absent := {(written(left), written(right)) for left, right in reached} - set(merges):
        raise _refusal(path, f"{len(absent)} merges are absent, {_short(min(absent))} among them")
    unreached = len(ranks) - 256 - len(reached)
    if unreached and not model.ignore_merges:
        rule = f"ignore_merges (false) loses {unreached} tokens that no merge reaches"
        raise _refusal(path, rule)


def _name_by_specials(path: Path, added: list[_Added], ranks: dict[bytes, int]) -> str:
    """The name of the tokenizer that has these special tokens.

    Raises:
        FormatError: none has.
    """
    names = {token.id: token.content for token in added}
    name = "llama3" if len(names) == N_LLAMA3_SPECIALS else _small_name(ranks)
    ours = special_names(name)
    if len(added) != len(ours) or sorted(names) != list(range(len(ranks), len(ranks) + len(ours))):
        rule = (
            f"its {len(added)} special tokens are not {N_LLAMA3_SPECIALS} or {N_SPECIALS} with the "
            f"ids from {len(ranks)} on"
        )
        raise _refusal(path, rule)
    fixed = 2 if name == "llama3" else len(ours)
    for place, special in enumerate(ours[:fixed], start=len(ranks)):
        if names[place] != special:
            raise _refusal(path, f"token {place} ({_short(names[place])}) is not {special}")
    return name
