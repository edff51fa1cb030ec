"""Validation loss and generated text samples during training.

All ranks take part in both. Each waits for the device, so the training loop calls them on
validation steps only.
"""

import textwrap
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from training.run import Run

SAMPLE_CHARACTERS = 200  # of a sample on the console; samples.txt has all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from data.loader import Batch


def validate(run: Run) -> float:
    """Return the mean loss over the validation windows; it does not depend on the mesh."""
    from data.dataset import WindowDataset
    from data.loader import validation_batches
    from evaluation.held_out import LossTotals, evaluate_loss

    assert isinstance(run.dataset, WindowDataset)  # streams have no validation split
    train = run.config.train
    batches = validation_batches(
        run.dataset,
        samples=run.config.validation.samples,
        seq_len=train.seq_len,
        micro_batch_size=train.micro_batch_size or train.global_batch_size // run.mesh.dp,
        rank=run.data_rank,
        size=run.mesh.dp,
    )
    watched = {name: _watched(run, of_source) for name, of_source in batches.items()}
    measured = evaluate_loss(run.model, watched, run.fabric.device, run.strategy.sum_losses)
    return sum(measured.values(), LossTotals()).loss


def _watched(run: Run, batches: "list[Batch]") -> "Iterator[Batch]":
    """Yield the batches, restarting the watchdog's step timeout for each."""
    for batch in batches:
        run.watchdog.enter("step", run.position.step)
        yield batch


def write_sample(run: Run) -> None:
    """Generate text on all ranks; rank 0 appends it to `samples.txt`."""
    from evaluation.generation import sample_text

    config = run.config.validation
    tokenizer = run.dataset.tokenizer()
    if config.sample_tokens == 0 or tokenizer is None:
        return
    context: AbstractContextManager[None] = nullcontext()
    if run.config.train.deterministic and run.fabric.device.type == "cuda":
        from training.deterministic import nondeterministic

        context = nondeterministic()  # sampling sums probabilities by cumsum, which has no other
    with context:
        text = sample_text(
            run.model,
            tokenizer,
            config.prompt,
            n_tokens=config.sample_tokens,
            temperature=config.temperature,
            seed=run.position.step,
            device=run.fabric.device,
            seq_multiple=run.mesh.seq_multiple,
        )
    if run.metrics is not None:
        run.metrics.write_sample(run.position.step, text)
    run.console.note(f"Sample: {textwrap.shorten(text, SAMPLE_CHARACTERS, placeholder=' …')}")
