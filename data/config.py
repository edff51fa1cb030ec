"""Configuration of a dataset: sources, shards, reading and tokenizer; of `prepare.py`.

Imports nothing heavy, so that `--help` stays fast. Rules that tie fields together are in
`training.config_rules`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval, Lt, MinLen

from model.config_base import FREE, ConfigSection, PositiveInt, ResumePolicy

Operator = Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"]
Value = bool | int | float | str | list[bool | int | float | str]

LLAMA3_VOCAB_SIZE = 128_256
N_SPECIALS = 16  # special tokens of the `bpe` and `byte` tokenizers
BYTE_VOCAB_SIZE = 256 + N_SPECIALS
MAX_PACK = 2**24  # tokens; above any context length, and small enough for memory
MAX_SAMPLE = 2**60  # the sample order does not overflow up to here

TOKENS = ResumePolicy("forbidden", "the tokens, and those held out")
SAMPLES_TAKEN = ResumePolicy("forbidden", "the samples of the steps so far", on_load=True)
SOURCE_WEIGHTS = ResumePolicy("forbidden", "the samples of the steps so far")
SAMPLE_ORDER = ResumePolicy("forbidden", "which tokens form a sample, and their order")
VOCABULARY = ResumePolicy("forbidden", "the vocabulary")

Weight = Annotated[float, Ge(0), Lt(math.inf)]
PackLength = Annotated[int, Interval(ge=1, le=MAX_PACK)]


@dataclass(frozen=True)
class SourceConfig(ConfigSection):
    """One named source of documents.

    Attributes:
        path: A file, folder or glob (`text`, `jsonl`, `parquet`, `arrow`), the name of a dataset or
            a local folder (`huggingface`), None for `stdlib` and `mock` (token ids by formula).
        weight: Relative sampling weight. A source of weight 0 is read from the first stage that
            gives it a weight.
        filter: Conditions (column, operator, value); a row must meet all.
        split: The split to read. For local formats, file names or `save_to_disk` folders give it;
            `train+test` reads two and `all` every file.
        name, revision: Arguments of `datasets.load_dataset` (`huggingface` only).
        streaming: Read rows while the dataset downloads (`huggingface` only).
    """

    format: Literal["stdlib", "text", "jsonl", "parquet", "arrow", "huggingface", "mock"]
    path: str | None = None
    weight: Annotated[Weight, SOURCE_WEIGHTS] = 1.0
    text_column: Annotated[str, MinLen(1)] = "text"
    filter: list[tuple[str, Operator, Value]] | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class StageConfig(ConfigSection):
    """A change of the run from one sample on; None leaves a value unchanged.

    `weights` are by source; a source that is not listed keeps its weight.
    """

    from_sample: PositiveInt
    weights: dict[str, Weight] | None = None
    seq_len: PositiveInt | None = None
    global_batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None


@dataclass(frozen=True)
class DataConfig(ConfigSection):
    """A dataset: its sources by name, the folder of its shards, and how they are read.

    Attributes:
        validation_fraction: Fraction of the text held out.
        shard_tokens: Tokens after which a shard is closed.
        invalid_text: Action on a document that is not valid text: `strict` aborts the preparation,
            `replace` inserts U+FFFD, `skip` drops and counts the document.
        workers: Processes that prepare shards; None is one per core.
        document_mask: Attention and labels stop at document boundaries.
        packing: Fill windows with complete documents instead of cutting at window boundaries.
        shuffle_block_tokens: Shuffle in blocks of this size, which keeps reads local; None shuffles
            the entire source.
        stages: Changes of weights, sequence length or batch size from a sample on.
        stream_shards: Train directly from the only source, split into this many stream shards,
            without preparing token shards.
        loader_threads, prefetch: Threads of the loader, and steps they read ahead.
        verify_reads: Compare checksums while reading.
    """

    name: Annotated[str, FREE]
    folder: Annotated[str, MinLen(1), FREE]
    sources: Annotated[dict[str, SourceConfig], MinLen(1), TOKENS]
    validation_fraction: Annotated[float, Interval(ge=0, lt=1), TOKENS] = 0.02
    shard_tokens: Annotated[PositiveInt, TOKENS] = 2**26
    invalid_text: Annotated[Literal["strict", "replace", "skip"], TOKENS] = "strict"
    workers: Annotated[PositiveInt | None, FREE] = None
    document_mask: Annotated[
        bool, ResumePolicy("override", "which tokens attend to each other, and the targets")
    ] = True
    packing: Annotated[Literal["best_fit"] | None, SAMPLE_ORDER] = None
    shuffle_block_tokens: Annotated[PositiveInt | None, SAMPLE_ORDER] = None
    stages: Annotated[list[StageConfig] | None, SAMPLES_TAKEN] = None
    stream_shards: Annotated[PositiveInt | None, SAMPLE_ORDER] = None
    loader_threads: Annotated[PositiveInt, FREE] = 1
    prefetch: Annotated[PositiveInt, FREE] = 2
    verify_reads: Annotated[bool, FREE] = True

    @property
    def is_mock(self) -> bool:
        """Whether token ids are computed (`data.mock`); other sources are rejected then."""
        return any(source.format == "mock" for source in self.sources.values())


@dataclass(frozen=True)
class TokenizerConfig(ConfigSection):
    """A tokenizer in tiktoken's format; `vocab_size` includes special tokens.

    `path` is a `tokenizer.model`, a `tokenizer.json`, or a folder with either; None selects the one
    in the installed `llama-models` package (`llama3`) or one trained on the first
    `training_characters` of the data (`bpe`).
    """

    name: Annotated[Literal["llama3", "bpe", "byte"], VOCABULARY]
    vocab_size: Annotated[PositiveInt, VOCABULARY]
    path: Annotated[str | None, FREE] = None
    training_characters: Annotated[PositiveInt, VOCABULARY] = 100_000_000


@dataclass(frozen=True)
class PrepareJobConfig(ConfigSection):
    """Root configuration of `prepare.py`; conf/prepare.yaml documents its own keys."""

    data: DataConfig
    tokenizer: TokenizerConfig
    pack: PackLength | Annotated[list[PackLength], MinLen(1)] | None
    verify: bool
    inspect: str | None
    sample: Annotated[int, Interval(ge=0, le=MAX_SAMPLE)]
    seq_len: PackLength | None
    seed: Annotated[int, Interval(ge=0, lt=2**63)] | None

    @property
    def lengths(self) -> list[int]:
        """The distinct lengths in `pack`, ascending."""
        return sorted({self.pack} if isinstance(self.pack, int) else set(self.pack or []))
