"""What a dataset is made of: its sources, where its shards lie, how it is read, and the tokenizer.

Plain dataclasses without heavy imports, so that `--help` stays fast. Types are checked by the
loader of the configuration, rules by `problems()`, which tells all of them at once.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Operator = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]
Value = bool | int | float | str | list[bool | int | float | str]

LLAMA3_VOCAB_SIZE = 128_256
N_SPECIALS = 16  # special tokens of the `bpe` and `byte` tokenizers
BYTE_VOCAB_SIZE = 256 + N_SPECIALS


@dataclass(frozen=True)
class SourceConfig:
    """One named source of documents.

    `path` is a file, a folder or a glob (`text`, `jsonl`, `parquet`, `arrow`), the name of a
    dataset or a local folder (`huggingface`), and absent for `stdlib`. `name`, `split`, `revision`
    and `streaming` choose what `datasets.load_dataset` reads, and whether while it arrives or after
    all of it has; they hold for `huggingface` alone. `filter` lists conditions (column, operator,
    value) that a row must meet, all of them. A source of weight 0 is read from the first stage on
    that gives it a weight.
    """

    format: Literal["stdlib", "text", "jsonl", "parquet", "arrow", "huggingface"]
    path: str | None = None
    weight: float = 1.0
    text_column: str = "text"
    filter: list[tuple[str, Operator, Value]] | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = False

    def problems(self, key: str = "data.sources.<name>") -> list[str]:
        """Every broken rule as a message; `key` is the place of this source."""
        found = []
        if self.format == "stdlib" and self.path is not None:
            found.append(f"{key}.path ({self.path}) has no meaning for format stdlib: use null")
        if self.format != "stdlib" and not self.path:
            what = "a dataset's name" if self.format == "huggingface" else "a file, folder or glob"
            found.append(f"{key}.path ({self.path}) is missing for format {self.format}: {what}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            found.append(
                f"{key}.weight ({self.weight}) is not a number from 0 on: use for example 1"
            )
        if not self.text_column:
            found.append(f"{key}.text_column ('') is empty: name the column that holds the text")
        if self.filter and self.format in ("stdlib", "text"):
            found.append(
                f"{key}.filter has no meaning for format {self.format}, whose rows are text alone: "
                "use null"
            )
        for column, operator, value in self.filter or []:
            if (operator in ("in", "not in")) != isinstance(value, list):
                what = "a list" if operator in ("in", "not in") else "one value"
                found.append(
                    f"{key}.filter ({column} {operator} {value}): {operator} compares with {what}"
                )
        if self.format != "huggingface":
            only_hub = {"name": self.name, "revision": self.revision, "streaming": self.streaming}
            for field, given in only_hub.items():
                if given:
                    unset = "false" if field == "streaming" else "null"
                    found.append(
                        f"{key}.{field} ({given}) has no meaning for format {self.format}: "
                        f"use {unset}"
                    )
        return found


@dataclass(frozen=True)
class StageConfig:
    """A change of the run from one sample on; what is null stays as it was before.

    `weights` are by source, and a source that they do not name keeps its own.
    """

    from_sample: int
    weights: dict[str, float] | None = None
    seq_len: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None

    def problems(self, key: str, source_names: Collection[str]) -> list[str]:
        """Every broken rule as a message; `key` is the place of this stage."""
        found = [
            f"{key}.{name} ({value}) is below 1: use at least 1"
            for name in ("from_sample", "seq_len", "global_batch_size", "micro_batch_size")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        for name, weight in (self.weights or {}).items():
            if name not in source_names:
                found.append(
                    f"{key}.weights.{name} is no source: use {', '.join(sorted(source_names))}"
                )
            if not (math.isfinite(weight) and weight >= 0):
                found.append(
                    f"{key}.weights.{name} ({weight}) is not a number from 0 on: "
                    "use 0 to leave the source out"
                )
        return found


@dataclass(frozen=True)
class DataConfig:
    """A dataset: sources by name, the folder that holds their shards, and how they are read.

    What is made: `validation_fraction` is the share of documents held out, `shard_tokens` the size
    at which a shard is closed, `invalid_text` what becomes of a document that is not text (`strict`
    ends the preparation, `replace` puts U+FFFD, `skip` leaves it out and counts it), `workers` the
    processes that prepare (null: one a core).

    What is read: `document_mask` stops attention and labels at a document's end; `packing` puts
    whole documents into windows instead of cutting where a window ends; `shuffle_block_tokens`
    keeps reads near each other, in blocks of that size; `stages` change weights, length or batch
    size from a sample on. `stream_shards` trains straight from the one source, without shards.
    How fast: `loader_threads` read `prefetch` steps ahead; `verify_reads` compares checksums.
    """

    name: str
    folder: str
    sources: dict[str, SourceConfig]
    validation_fraction: float = 0.02
    shard_tokens: int = 2**26
    invalid_text: Literal["strict", "replace", "skip"] = "strict"
    workers: int | None = None
    document_mask: bool = True
    packing: Literal["best_fit"] | None = None
    shuffle_block_tokens: int | None = None
    stages: list[StageConfig] | None = None
    stream_shards: int | None = None
    loader_threads: int = 1
    prefetch: int = 2
    verify_reads: bool = True

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
        found += [
            f"data.{key} ({value}) is below 1: {remedy}"
            for key, remedy in (
                ("shard_tokens", f"use {2**26} (256 MiB)"),
                ("workers", "use null for one a core"),
                ("shuffle_block_tokens", "use null to shuffle the whole source"),
                ("stream_shards", "use null to prepare shards"),
                ("loader_threads", "use 1"),
                ("prefetch", "use 2"),
            )
            if (value := getattr(self, key)) is not None and value < 1
        ]
        if self.packing and not self.document_mask:
            found.append(
                f"data.packing ({self.packing}) puts documents side by side, and "
                "data.document_mask (false) would let them see each other: use "
                "data.document_mask=true or data.packing=null"
            )
        found += self._stage_errors() + self._stream_errors()
        return found

    def _stage_errors(self) -> list[str]:
        """What is wrong with the stages, and with weights that no stage uses."""
        found = []
        before = 0
        for place, stage in enumerate(self.stages or []):
            key = f"data.stages[{place}]"
            found += stage.problems(key, self.sources)
            if 0 < stage.from_sample <= before:
                found.append(
                    f"{key}.from_sample ({stage.from_sample}) is not after the stage before it "
                    f"({before}): list the stages in order"
                )
            before = stage.from_sample
        weighted = {
            name for stage in self.stages or [] for name, w in (stage.weights or {}).items() if w
        }
        weighted |= {name for name, source in self.sources.items() if source.weight}
        for name, source in self.sources.items():
            if name not in weighted:
                found.append(
                    f"data.sources.{name}.weight ({source.weight}) is 0 in every stage: "
                    "give it a weight, or remove the source"
                )
        if weighted and not any(source.weight for source in self.sources.values()):
            found.append(
                "data.sources: every weight is 0 at the first sample: give one source a weight"
            )
        return found

    def _stream_errors(self) -> list[str]:
        """What training without shards does not have."""
        if self.stream_shards is None:
            return []
        key = f"data.stream_shards ({self.stream_shards})"
        found = []
        if [source.format for source in self.sources.values()] not in (["huggingface"],):
            found.append(f"{key} reads one source of format huggingface: name one, or use null")
        for name in ("packing", "shuffle_block_tokens", "stages"):
            if getattr(self, name):
                found.append(f"{key} reads in stored order, without data.{name}: use null for one")
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
