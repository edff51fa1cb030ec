"""A prepared folder opened for reading: token streams per source, tokenizer and sample order."""

from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.manifest import REPREPARE, Manifest
from data.order import Order, OrderStage, quotas
from data.packing import PackedStream
from data.shards import TokenStream
from data.stages import Stage, Stages
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer


class Dataset:
    """A prepared folder opened for reading; `train` and `validation` are streams by source name.

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
        self.folder = folder
        self.manifest = manifest
        self.document_mask = document_mask
        self.train: dict[str, TokenStream] | dict[str, PackedStream]
        self.train, self.validation = (
            {
                name: TokenStream(folder, source.shards[split], verify)
                for name, source in manifest.sources.items()
            }
            for split in ("train", "validation")
        )
        if packing:
            self.train = {
                name: PackedStream(folder, manifest, name, verify) for name in manifest.sources
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

    def n_validation_windows(self, seq_len: int) -> int:
        """Return the number of validation windows of `seq_len` tokens, over all sources."""
        return sum(stream.n_windows(seq_len) for stream in self.validation.values())

    def order(self, stages: Stages, seed: int, shuffle_block_tokens: int | None = None) -> Order:
        """Return the order of training samples over the stages of a run.

        Raises:
            DataError: The stages name other sources, or a rule of `check` is violated.
        """
        self._check_sources(stages)
        order_stages = [
            OrderStage(
                stage.first_sample,
                stage.seq_len,
                stage.weights,
                {name: self.train[name].n_windows(stage.seq_len) for name in stage.weights},
            )
            for stage in stages.all
        ]
        return Order(order_stages, seed, shuffle_block_tokens)

    def check(self, stages: Stages, vocab_size: int) -> None:
        """Check that a model of `vocab_size` can train on this data in every stage.

        Raises:
            DataError: All violated rules, one per line.
        """
        self._check_sources(stages)
        errors: dict[str, None] = {}  # ordered, without duplicates
        for index, stage in enumerate(stages.all):
            errors.update(dict.fromkeys(self._stage_errors(index, stage)))
        dataset_vocab_size = self.manifest.tokenizer.vocab_size
        if dataset_vocab_size > vocab_size:
            errors[
                f"model.vocab_size={vocab_size} is smaller than the tokenizer of {self.folder} "
                f"({dataset_vocab_size} tokens); use model.vocab_size={dataset_vocab_size}, or "
                "prepare other data"
            ] = None
        if errors:
            raise DataError("\n".join(errors))

    def _check_sources(self, stages: Stages) -> None:
        if set(stages.all[0].weights) != set(self.train):
            raise DataError(
                f"data.sources={', '.join(stages.all[0].weights)} differ from the sources of "
                f"{self.folder} ({', '.join(self.train)}); {REPREPARE}"
            )

    def _stage_errors(self, index: int, stage: Stage) -> list[str]:
        """Return the violated rules of one stage; `index` 0 is the start of the run."""
        section = f"data.stages[{index - 1}]" if index else "train"
        weight_key = f"{section}.weights.{{}}" if index else "data.sources.{}.weight"
        seq_len = stage.seq_len
        found = []
        n_windows = 0
        for name, weight in stage.weights.items():
            stream = self.train[name]
            n_windows += stream.n_windows(seq_len) if weight else 0
            if weight and not stream.n_windows(seq_len):
                found.append(
                    f"data.sources.{name} has {stream.n_tokens:,} training tokens, but a window of "
                    f"{section}.seq_len={seq_len} needs {seq_len + 1:,}; add text or use a shorter "
                    "seq_len"
                )
        if not found and n_windows < stage.global_batch_size:
            found.append(
                f"{section}.global_batch_size={stage.global_batch_size} is larger than the "
                f"{n_windows} windows of {seq_len} tokens in {self.folder}; use a smaller batch or "
                "add text"
            )
        try:
            quotas(list(stage.weights.items()), weight_key)
        except DataError as error:
            found.append(str(error))
        return found
