"""A prepared folder, open for reading: streams of windows by source, tokenizer, order."""

from pathlib import Path
from typing import Literal

from data.errors import DataError
from data.manifest import ANEW, Manifest
from data.order import Order, OrderStage, quotas
from data.packing import PackedStream
from data.shards import TokenStream
from data.stages import Stage, Stages
from data.tokenizer import MODEL_FILE, Tokenizer, read_tokenizer


class Dataset:
    """A prepared folder, open for reading; `train` and `validation` are streams by source name.

    `document_mask` keeps attention and labels inside a document; `packing` reads training windows
    of whole documents, for the lengths that `data.packing.pack` made; `verify` compares what is
    read with its checksums.
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
        """Opens and verifies a folder that `data.preparation.pipeline` made.

        Raises:
            DataError: not prepared, or damaged.
        """
        folder = Path(folder)
        return cls(folder, Manifest.read(folder), document_mask, packing, verify)

    @property
    def hash(self) -> str:
        """SHA-256 over tokenizer and shards: the same tokens at the same places, or another one."""
        return self.manifest.hash

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DataError: its file is missing, damaged or another one.
        """
        tokenizer = read_tokenizer(self.folder / MODEL_FILE, self.manifest.tokenizer.name)
        if tokenizer.hash != self.manifest.tokenizer.hash:
            raise DataError(
                f"{self.folder / MODEL_FILE} is not the tokenizer that made the tokens: {ANEW}"
            )
        return tokenizer

    def n_validation_windows(self, seq_len: int) -> int:
        """Validation windows of `seq_len` tokens, over all sources."""
        return sum(stream.n_windows(seq_len) for stream in self.validation.values())

    def order(self, stages: Stages, seed: int, shuffle_block_tokens: int | None = None) -> Order:
        """The order of training samples over the stages of a run.

        Raises:
            DataError: the stages weigh other sources, or what `check` tells.
        """
        self._refuse_other_sources(stages)
        of_stages = [
            OrderStage(
                stage.first_sample,
                stage.seq_len,
                stage.weights,
                {name: self.train[name].n_windows(stage.seq_len) for name in stage.weights},
            )
            for stage in stages.all
        ]
        return Order(of_stages, seed, shuffle_block_tokens)

    def check(self, stages: Stages, vocab_size: int) -> None:
        """Whether a model of `vocab_size` can train on this data, in every stage.

        Raises:
            DataError: every rule that is broken, one a line.
        """
        self._refuse_other_sources(stages)
        found: list[str] = []
        for place, stage in enumerate(stages.all):
            for problem in self._stage_errors(place, stage):
                if problem not in found:
                    found.append(problem)
        if self.manifest.tokenizer.vocab_size > vocab_size:
            found.append(
                f"model.vocab_size ({vocab_size}) is less than the "
                f"{self.manifest.tokenizer.vocab_size} tokens of {self.folder}'s tokenizer: use "
                f"model.vocab_size={self.manifest.tokenizer.vocab_size}, or prepare other data"
            )
        if found:
            raise DataError("\n".join(found))

    def _refuse_other_sources(self, stages: Stages) -> None:
        """Raises DataError where the stages weigh other sources than the folder has."""
        if set(stages.all[0].weights) != set(self.train):
            raise DataError(
                f"data.sources ({', '.join(stages.all[0].weights)}) are not those of "
                f"{self.folder} ({', '.join(self.train)}): {ANEW}"
            )

    def _stage_errors(self, place: int, stage: Stage) -> list[str]:
        """The broken rules of one stage; `place` is 0 for the run's first."""
        found = []
        section = f"data.stages[{place - 1}]" if place else "train"
        seq_len = stage.seq_len
        n_windows = 0
        for name, weight in stage.weights.items():
            stream = self.train[name]
            n_windows += stream.n_windows(seq_len) if weight else 0
            if weight and not stream.n_windows(seq_len):
                found.append(
                    f"data.sources.{name} has {stream.n_tokens:,} tokens to train on, a window "
                    f"of {section}.seq_len ({seq_len}) needs {seq_len + 1:,}: add text, or use a "
                    "shorter one"
                )
        if not found and n_windows < stage.global_batch_size:
            found.append(
                f"{section}.global_batch_size ({stage.global_batch_size}) is more than the "
                f"{n_windows} windows of {seq_len} tokens in {self.folder}: use a smaller one, or "
                "add text"
            )
        key = f"{section}.weights.{{}}" if place else "data.sources.{}.weight"
        try:
            quotas(list(stage.weights.items()), key)
        except DataError as error:
            found.append(str(error))
        return found
