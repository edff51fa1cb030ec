"""Read `tokenizer.model` and `tokenizer.json`; write the tokenizer files of a Hugging Face folder.

The written tokenizer produces the token ids of `Tokenizer.encode`, with two exceptions. Names of
special tokens in a text are encoded as special tokens by Hugging Face (unless loaded with
`split_special_tokens=True`) and as ordinary text by `Tokenizer.encode`. Texts over 400,000
characters and runs of over 25,000 whitespace or non-whitespace characters are split by Meta's
tokenizer and therefore by ours, but not by Hugging Face.
"""

from pathlib import Path
from typing import Any

from data import tokenizer_files
from data.config import TokenizerConfig
from data.errors import DataError
from data.files import parse_json, read_file
from data.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    MODEL_FILE,
    Tokenizer,
    library_split,
    load_tokenizer,
)
from data.tokenizer_files import TOKENIZER_JSON, find_tokenizer_file
from data.tokenizer_json import bpe_merges, byte_level_encoder
from formats.config_json import write_json
from formats.detection import find_checkpoint
from formats.errors import FormatError

LLAMA3_STOPS = ("<|eom_id|>", "<|eot_id|>")  # end of message and of turn: Meta's `stop_tokens`
# Not the end-of-text token: a padding mask derived from it would also hide the end of a text.
LLAMA3_PAD = "<|finetune_right_pad_id|>"
DEFAULT_PAD = "<|reserved_special_token_0|>"


# A message is a header with the role, a blank line, and the text; Meta's chat_format.py.
LLAMA3_CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a generated text; for `llama3` also end of message and of turn."""
    names = LLAMA3_STOPS if tokenizer.name == "llama3" else ()
    return [tokenizer.eos_id, *(tokenizer.specials[name] for name in names)]


# ---------------------------------------------------------------- write


def write_hugging_face(
    tokenizer: Tokenizer, folder: Path, max_seq_len: int, chat_template: str | None = None
) -> None:
    """Write the files that `transformers.AutoTokenizer.from_pretrained(folder)` loads.

    Args:
        folder: An existing folder, to which `tokenizer.json`, `tokenizer_config.json` and
            `special_tokens_map.json` are written.
        max_seq_len: Context length of the model; the loaded tokenizer warns about longer texts.
        chat_template: Jinja template of an instruct model.

    Raises:
        OSError: A file cannot be written.
    """
    names = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": LLAMA3_PAD if tokenizer.name == "llama3" else DEFAULT_PAD,
    }
    if chat_template is not None and tokenizer.name == "llama3":
        names["eos_token"] = LLAMA3_STOPS[1]
    config = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names)
    # The library's `save` does not raise OSError.
    content = _to_library(tokenizer).to_str(pretty=True)
    (folder / TOKENIZER_JSON).write_text(content, encoding="utf-8")


def _to_library(tokenizer: Tokenizer) -> Any:
    """Return a `tokenizers.Tokenizer` structured like the published one of Llama 3."""
    from tokenizers import AddedToken, decoders, models, processors
    from tokenizers import Tokenizer as LibraryTokenizer

    as_text = byte_level_encoder()
    vocabulary = {as_text(token): rank for token, rank in tokenizer.ranks.items()}
    merges = [(as_text(left), as_text(right)) for left, right in bpe_merges(tokenizer.ranks)]
    # ignore_merges: text that equals a token is encoded as that token, as in tiktoken, even if no
    # sequence of merges produces it.
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
    # Their ids follow the vocabulary, in this order.
    built.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in tokenizer.specials]
    )
    return built


# ---------------------------------------------------------------- read


def resolve_tokenizer(
    folder: Path, choice: str | None = "auto", remedy: str = ""
) -> Tokenizer | None:
    """Return the tokenizer for the weights in `folder`.

    Args:
        remedy: What else a program accepts, appended to the message if there is no tokenizer.
        choice: `auto` for the tokenizer in `folder`; the path of a `tokenizer.model`, a
            `tokenizer.json`, a folder with either, or a run; or None for no tokenizer.

    Raises:
        FormatError: There is no such tokenizer, it cannot be read, or it has other tokens than the
            one in `folder`.
    """
    if choice is None:
        return None
    if choice == "auto":
        found = find_tokenizer(folder) or _tokenizer_of_dataset(folder)
    else:
        path = find_checkpoint(Path(choice), verify=False)
        found = find_tokenizer(path) if path.is_dir() else read_tokenizer_file(path)
        try:
            own = find_tokenizer(folder)
        except FormatError:
            own = None  # the chosen one replaces a damaged tokenizer
        if found is not None and own is not None and own.ranks != found.ranks:
            raise FormatError(
                f"tokenizer_path={choice} ({found.name}, {found.vocab_size:,} tokens) has other "
                f"tokens than the tokenizer in {folder} ({own.name}, {own.vocab_size:,} tokens), "
                "which the weights were trained with; omit tokenizer_path"
            )
    if found is None:
        raise FormatError(
            f"{folder if choice == 'auto' else choice} contains neither {MODEL_FILE} nor "
            f"{TOKENIZER_JSON}; use tokenizer_path=PATH of one of them{remedy}"
        )
    return found


def _tokenizer_of_dataset(checkpoint: Path) -> Tokenizer | None:
    """Return the tokenizer of a run's dataset; old checkpoints do not contain the tokenizer."""
    try:
        config = parse_json(read_file(checkpoint / "manifest.json"))["config"]
        return load_tokenizer(TokenizerConfig(**config["tokenizer"]), config["data"]["folder"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a folder, preferring `tokenizer.model`; None if there is none.

    Raises:
        FormatError: It cannot be read.
    """
    file = find_tokenizer_file(folder)
    return None if file is None else read_tokenizer_file(file)


def read_tokenizer_file(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` or, under any other suffix, a `tokenizer.model`.

    Raises:
        FormatError: It cannot be read.
    """
    try:
        return tokenizer_files.read_tokenizer_file(path)
    except DataError as error:
        raise FormatError(str(error).removeprefix("tokenizer.path=")) from None
