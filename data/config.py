"""What a dataset is made of: its sources, where its shards lie, and the tokenizer.

Plain dataclasses without heavy imports, so that `--help` stays fast. Types are checked by the
loader of the configuration, rules by `problems()`, which tells all of them at once.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

LLAMA3_VOCAB_SIZE = 128_256
N_SPECIALS = 16  # special tokens of the `bpe` and `byte` tokenizers
BYTE_VOCAB_SIZE = 256 + N_SPECIALS


@dataclass(frozen=True)
class SourceConfig:
    """One named source of documents.

    `path` is a file, a folder or a glob (`text`, `jsonl`, `parquet`), the name of a dataset or a
    local folder (`huggingface`), and absent for `stdlib`. `name`, `split` and `revision` choose
    what `datasets.load_dataset` reads and hold for `huggingface` alone.
    """

    format: Literal["stdlib", "text", "jsonl", "parquet", "huggingface"]
    path: str | None = None
    weight: float = 1.0
    text_column: str = "text"
    split: str = "train"
    name: str | None = None
    revision: str | None = None

    def problems(self, key: str = "data.sources.<name>") -> list[str]:
        """Every broken rule as a message; `key` is the place of this source."""
        found = []
        if self.format == "stdlib" and self.path is not None:
            found.append(f"{key}.path ({self.path}) has no meaning for format stdlib: use null")
        if self.format != "stdlib" and not self.path:
            what = "a dataset's name" if self.format == "huggingface" else "a file, folder or glob"
            found.append(f"{key}.path ({self.path}) is missing for format {self.format}: {what}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            found.append(
                f"{key}.weight ({self.weight}) is not a positive number: "
                "use one, or remove the source"
            )
        if not self.text_column:
            found.append(f"{key}.text_column ('') is empty: name the column that holds the text")
        if self.format != "huggingface":
            for field, value in (("name", self.name), ("revision", self.revision)):
                if value is not None:
                    found.append(
                        f"{key}.{field} ({value}) has no meaning for format {self.format}: use null"
                    )
        return found


@dataclass(frozen=True)
class DataConfig:
    """A dataset: sources by name, and the folder that holds their shards.

    `validation_fraction` is the share of documents held out, `shard_tokens` the size at which a
    shard is closed, `document_mask` whether attention and labels stop at a document's end.
    """

    name: str
    folder: str
    sources: dict[str, SourceConfig]
    validation_fraction: float = 0.02
    document_mask: bool = True
    shard_tokens: int = 2**26

    def problems(self) -> list[str]:
        """Every broken rule as a message."""
        found = []
        if not self.folder:
            found.append("data.folder ('') is empty: name the folder for the shards")
        if not self.sources:
            found.append("data.sources ({}) is empty: name at least one source")
        for name, source in self.sources.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                found.append(
                    f"data.sources ({name}) is not a folder's name: "
                    "use letters, digits, '_', '-' and '.'"
                )
            found += source.problems(f"data.sources.{name}")
        if not 0 <= self.validation_fraction < 1:
            found.append(
                f"data.validation_fraction ({self.validation_fraction}) is not in [0, 1): "
                "use for example 0.02"
            )
        if self.shard_tokens < 1:
            found.append(
                f"data.shard_tokens ({self.shard_tokens}) is not positive: use {2**26} (256 MiB)"
            )
        return found


@dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer in tiktoken's format; `vocab_size` counts its special tokens too.

    `path` is a ready `tokenizer.model`; null means the one of the installed `llama-models`
    package (`llama3`) or one trained on the data's first `training_characters` (`bpe`).
    """

    name: Literal["llama3", "bpe", "byte"]
    vocab_size: int
    path: str | None = None
    training_characters: int = 100_000_000

    def problems(self) -> list[str]:
        """Every broken rule as a message."""
        found = []
        fixed = {"llama3": LLAMA3_VOCAB_SIZE, "byte": BYTE_VOCAB_SIZE}.get(self.name)
        if fixed is not None and self.vocab_size != fixed:
            found.append(
                f"tokenizer.vocab_size ({self.vocab_size}) is not that of {self.name}: use {fixed}"
            )
        if self.name == "bpe" and self.vocab_size < BYTE_VOCAB_SIZE:
            found.append(
                f"tokenizer.vocab_size ({self.vocab_size}) does not hold 256 bytes and "
                f"{N_SPECIALS} special tokens: use {BYTE_VOCAB_SIZE} or more"
            )
        if self.name == "byte" and self.path is not None:
            found.append(f"tokenizer.path ({self.path}) has no meaning for byte: use null")
        if self.training_characters < 1:
            found.append(
                f"tokenizer.training_characters ({self.training_characters}) is not positive: "
                "use for example 100000000"
            )
        return found
