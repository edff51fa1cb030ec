"""A prepared folder opened for reading: token streams per source, tokenizer and sample order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data.errors import DataError
from data.manifest import REPREPARE, SPLITS, Manifest
from data.mappings import Mappings
from data.order import Order, OrderStage, quotas
from data.packing import PackedStream
from data.shards import TokenStream
from data.stages import Stage, Stages
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer


class WindowStream(Protocol):
    """Tokens of one source and split, read by window (`data.shards.TokenStream` documents both)."""

    n_tokens: int

    def n_windows(self, seq_len: int) -> int: ...

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]: ...


class WindowDataset(ABC):
    """Data read by window in any order; `train` and `validation` are streams by source name."""

    train: Mapping[str, WindowStream]
    validation: Mapping[str, WindowStream]
    document_mask: bool

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 over everything that determines the tokens."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer that produced the tokens, or None if they have no text."""

    def n_validation_windows(self, seq_len: int) -> int:
        """Return the number of validation windows of `seq_len` tokens, over all sources."""
        return sum(stream.n_windows(seq_len) for stream in self.validation.values())

    def order(self, stages: Stages, seed: int, shuffle_block_tokens: int | None = None) -> Order:
        """Return the order of training samples over the stages of a run.

        Raises:
            DataError: A weight rounds to no sample, or a source with samples has no window.
        """
        order_stages = []
        for stage in stages.all:
            n_windows = {name: self.train[name].n_windows(stage.seq_len) for name in stage.weights}
            order_stages.append(
                OrderStage(stage.first_sample, stage.seq_len, stage.weights, n_windows)
            )
        return Order(order_stages, seed, shuffle_block_tokens)


class Dataset(WindowDataset):
    """A prepared folder opened for reading.

    Args:
        document_mask: Restrict attention and labels to a document.
        packing: Read packed training windows, for the lengths that `data.packing.pack` processed.
        verify: Compare the content read with its checksums.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        document_mask: bool = True,
        packing: Literal["best_fit"] | None = None,
        verify: bool = True,
    ) -> None:
        self.folder, self.manifest, self.document_mask = folder, manifest, document_mask
        mappings = Mappings()
        self.train, self.validation = (
            {
                name: TokenStream(folder, s.shards[split], verify, mappings)
                for name, s in manifest.sources.items()
            }
            for split in SPLITS
        )
        if packing:
            names = manifest.sources
            self.train = {
                name: PackedStream(folder, manifest, name, verify, mappings) for name in names
            }

    @classmethod
    def open(
        cls,
        folder: Path | str,
        document_mask: bool = True,
        packing: Literal["best_fit"] | None = None,
        verify: bool = True,
    ) -> "Dataset":
        """Open a prepared folder and check its manifest.

        Raises:
            DataError: The folder is not prepared or is damaged.
        """
        folder = Path(folder)
        return cls(folder, Manifest.read(folder), document_mask, packing, verify)

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards."""
        return self.manifest.hash

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that produced the tokens.

        Raises:
            DataError: Its file is missing, damaged or another tokenizer.
        """
        path = self.folder / MODEL_FILE
        tokenizer = read_tokenizer(path, self.manifest.tokenizer.name)
        if tokenizer.hash != self.manifest.tokenizer.hash:
            raise DataError(f"{path} is not the tokenizer that produced the tokens; {REPREPARE}")
        return tokenizer

    def order(self, stages: Stages, seed: int, shuffle_block_tokens: int | None = None) -> Order:
        """Return the order of training samples over the stages of a run.

        Raises:
            DataError: The stages name other sources, or a rule of `check` is violated.
        """
        self._check_sources(stages)
        return super().order(stages, seed, shuffle_block_tokens)

    def check(self, stages: Stages, vocab_size: int) -> None:
        """Check that a model of `vocab_size` can train on this data in every stage.

        Raises:
            DataError: All violated rules, one per line.
        """
        self._check_sources(stages)
        errors = [e for i, stage in enumerate(stages.all) for e in self._stage_errors(i, stage)]
        n_ids = self.manifest.tokenizer.vocab_size
        if n_ids > vocab_size:
            errors.append(
                f"model.vocab_size={vocab_size} is smaller than the tokenizer of {self.folder} "
                f"({n_ids} tokens); use model.vocab_size={n_ids}, or prepare other data"
            )
        if errors:
            raise DataError("\n".join(dict.fromkeys(errors)))

    def _check_sources(self, stages: Stages) -> None:
        if set(stages.all[0].weights) != set(self.train):
            raise DataError(
                f"data.sources={', '.join(stages.all[0].weights)} differ from the sources of "
                f"{self.folder} ({', '.join(self.train)}); {REPREPARE}"
            )

    def _stage_errors(self, index: int, stage: Stage) -> Iterator[str]:
        """Yield the violated rules of one stage; `index` 0 is the start of the run."""
        section = f"data.stages[{index - 1}]" if index else "train"
        weight_key = f"{section}.weights.{{}}" if index else "data.sources.{}.weight"
        seq_len = stage.seq_len
        used = [name for name, weight in stage.weights.items() if weight]
        n_windows = {name: self.train[name].n_windows(seq_len) for name in used}
        for name in used:
            if not n_windows[name]:
                yield (
                    f"data.sources.{name} has {self.train[name].n_tokens:,} training tokens, but a "
                    f"window of {section}.seq_len={seq_len} needs {seq_len + 1:,}; add text or use "
                    f"{section}.seq_len={max(self.train[name].n_tokens - 1, 1)} or less"
                )
        n_total = sum(n_windows.values())
        if all(n_windows.values()) and n_total < stage.global_batch_size:
            yield (
                f"{section}.global_batch_size={stage.global_batch_size} is larger than the "
                f"{n_total} windows of {seq_len} tokens in {self.folder}; add text or use "
                f"{section}.global_batch_size={n_total} or less"
            )
        try:
            quotas(stage.weights, weight_key)
        except DataError as error:
            yield str(error)
