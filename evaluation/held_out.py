"""Loss on held-out text by data source, independent of mesh and batch size."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data.dataset import Dataset
from data.errors import DataError
from data.loader import Batch, validation_batches
from data.manifest import MANIFEST_FILE
from evaluation.config import EvaluationConfig
from evaluation.errors import NOT_FINITE, EvaluationError

if TYPE_CHECKING:
    from evaluation.inference import InferenceContext
    from formats.weights import Weights

DEFAULT_MAX_SEQ_LEN = 2048  # window length of weights without a training run


@dataclass(frozen=True)
class LossTotals:
    """Summed loss in nats, with the number of targets and bytes of text it covers."""

    nats: float = 0.0
    targets: int = 0
    n_bytes: int = 0

    def __add__(self, other: "LossTotals") -> "LossTotals":
        return LossTotals(
            self.nats + other.nats, self.targets + other.targets, self.n_bytes + other.n_bytes
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token.

        Raises:
            ValueError: There are no targets.
        """
        if self.targets == 0:
            raise ValueError("the held-out windows contain no target; evaluate more windows")
        return self.nats / self.targets

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity on overflow."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text, comparable across tokenizers."""
        return self.nats / math.log(2) / self.n_bytes

    def metrics(self) -> dict[str, float]:
        """Return loss in nats per token, perplexity and bits per byte, and what they cover."""
        values = {key: getattr(self, key) for key in ("loss", "perplexity", "bits_per_byte")}
        return values | {"targets": self.targets, "bytes": self.n_bytes}


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    device: torch.device,
    sum_over_data: Callable[[Tensor], Tensor],
    byte_lengths: Tensor | None = None,
) -> dict[str, LossTotals]:
    """Return the loss over the targets of all ranks' batches, by data source.

    Args:
        model: Called as `model(tokens, positions, labels)`; returns the sum over the targets.
        batches: Batches of this data rank; every rank has the same number of each source.
        device: Device of the model.
        sum_over_data: Sums a tensor over the data ranks in place.
        byte_lengths: Number of bytes of each token (vocab,) int64, 0 for special tokens; None to
            skip counting bytes.
    """
    totals = torch.zeros(len(batches), 3, dtype=torch.float64, device=device)  # (source, total)
    for total, source_batches in zip(totals, batches.values(), strict=True):
        for batch in source_batches:
            labels, positions = batch.labels.to(device), batch.positions
            if positions is not None:
                positions = positions.to(device)
            total[0] += model(batch.tokens.to(device), positions, labels)
            total[1] += (labels >= 0).sum()
            if byte_lengths is not None:
                total[2] += byte_lengths[batch.labels[batch.labels >= 0]].sum()
    summed = zip(batches, sum_over_data(totals).tolist(), strict=True)
    return {name: LossTotals(nats, int(n), int(n_bytes)) for name, (nats, n, n_bytes) in summed}


def evaluate_dataset(
    context: "InferenceContext", dataset: Dataset, seq_len: int, config: EvaluationConfig
) -> dict[str, LossTotals]:
    """Return the loss on the held-out windows by data source, equal on all ranks.

    Raises:
        EvaluationError: On all ranks, if the loss is not finite.
    """
    n_windows = dataset.n_validation_windows(seq_len)
    batches = validation_batches(
        dataset,
        samples=min(config.samples or n_windows, n_windows),
        seq_len=seq_len,
        micro_batch_size=config.micro_batch_size,
        rank=context.data_rank,
        size=context.mesh.dp,
    )
    byte_lengths = torch.tensor(dataset.tokenizer().byte_lengths())
    sum_over_data = context.strategy.sum_over_data
    model, device = context.model, context.fabric.device
    totals = evaluate_loss(model, batches, device, sum_over_data, byte_lengths)
    for name, total in totals.items():
        if not math.isfinite(total.nats):
            raise EvaluationError(
                f"the loss on the held-out text of {name} is {total.nats}: {NOT_FINITE}"
            )
    return totals


def open_held_out(
    weights: "Weights", config: EvaluationConfig, optional: bool
) -> tuple[Dataset | None, int]:
    """Return the dataset with held-out text and the window length in tokens.

    Args:
        optional: Whether to return no dataset, instead of raising, if none is configured and the
            training dataset is unknown or no longer exists.

    Raises:
        DataError: There is no held-out text, or it uses another tokenizer than the weights.
    """
    from formats.metadata import training_settings

    data, training = weights.config.get("data") or {}, training_settings(weights)
    default_seq_len = min(weights.model.max_seq_len, DEFAULT_MAX_SEQ_LEN)
    seq_len = config.seq_len or training.get("seq_len", default_seq_len)
    trained_on, folder = data.get("folder"), config.data
    is_mock = any(source.get("format") == "mock" for source in data.get("sources", {}).values())
    is_stream = data.get("stream_shards") is not None
    if folder is None and (trained_on is None or is_stream or is_mock):
        if optional:
            return None, seq_len
        if is_mock:
            raise DataError(
                "data=mock in the configuration of this checkpoint: it was trained on token ids "
                "without text; set evaluation.data to a prepared dataset to measure its loss on it"
            )
        if trained_on is not None:
            raise DataError(
                f"data.stream_shards={data['stream_shards']} in the configuration of this "
                "checkpoint: it was trained on a stream, which has no held-out text; set "
                "evaluation.data to a prepared dataset, or set tasks"
            )
        raise DataError(
            f"{weights.folder} does not name a dataset with held-out text; set evaluation.data to "
            "a prepared dataset (like shards/stdlib-bpe-4096, made by prepare.py), or set tasks"
        )
    path = Path(str(folder or trained_on))
    if folder is None and optional and not path.exists():
        return None, seq_len
    if folder is not None and not (path / MANIFEST_FILE).exists():
        prepared = sorted(each.parent.name for each in path.parent.glob(f"*/{MANIFEST_FILE}"))
        near = get_close_matches(path.name, prepared, n=1)
        near = near or [each for each in prepared if each.startswith(path.name)]
        remedy = "use a folder that prepare.py has written"
        remedy = f"did you mean {path.with_name(near[0])}?" if near else remedy
        raise DataError(f"evaluation.data={path} has no prepared data; {remedy}")
    dataset = Dataset.open(path, document_mask=training.get("document_mask", True))
    if not dataset.n_validation_windows(seq_len):
        raise DataError(
            f"{path} contains no held-out window of {seq_len} tokens; prepare it with a larger "
            "data.validation_fraction, or reduce evaluation.seq_len"
        )
    if seq_len > weights.model.max_seq_len:
        raise DataError(
            f"evaluation.seq_len={seq_len} exceeds max_seq_len={weights.model.max_seq_len} of "
            f"{weights.folder}; use at most {weights.model.max_seq_len}"
        )
    _check_vocabulary(dataset, weights)
    return dataset, seq_len


def _check_vocabulary(dataset: Dataset, weights: "Weights") -> None:
    """Raise DataError if dataset and weights use different tokenizers."""
    from formats.tokenizers import find_tokenizer

    data_tokenizer, model_tokenizer = dataset.tokenizer(), find_tokenizer(weights.folder)
    if model_tokenizer is not None and model_tokenizer.ranks != data_tokenizer.ranks:
        raise DataError(
            f"{dataset.folder} was tokenized with {data_tokenizer.name} "
            f"({data_tokenizer.vocab_size:,} tokens), but {weights.folder} uses "
            f"{model_tokenizer.name} ({model_tokenizer.vocab_size:,} tokens); prepare the text "
            f"with tokenizer={model_tokenizer.name} and tokenizer.path set to that folder's "
            "tokenizer.model"
        )
    if data_tokenizer.vocab_size > weights.model.vocab_size:
        raise DataError(
            f"{dataset.folder} has {data_tokenizer.vocab_size:,} tokens, more than "
            f"vocab_size={weights.model.vocab_size:,} of {weights.folder}; prepare the text with "
            "the model's own tokenizer"
        )
