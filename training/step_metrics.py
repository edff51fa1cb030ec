"""What a run tells as it goes on: figures, validation, a little text.

Each of these waits for the device, so the loop calls them on the steps that are logged alone.
"""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from data.stages import Stage
from training.run import Run
from training.run_summary import meter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from data.loader import Batch


def read_figures(run: Run, tensors: "dict[str, Tensor]", rate: float) -> dict[str, Any]:
    """The figures of the step just done, waited for."""
    from parallel.compilation import compiled_graphs

    loss, grad_norm = tensors["vitals"][:2].tolist()
    compiled = {"compiled_graphs": compiled_graphs()} if run.config.parallel.compile else {}
    return {
        "step": run.position.step,
        "samples": run.position.samples,
        "tokens": run.position.tokens,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": rate,
        "batch_hash": f"{tensors['batch_hash'].item() % 2**32:08x}",
    } | compiled


def profiled(run: Run, step: int) -> AbstractContextManager[None]:
    """To be around a step: looks into it where `log.profile` lists it, on rank 0."""
    if step not in (run.config.log.profile or ()) or not run.fabric.is_global_zero:
        return nullcontext()
    return _profiled(run, step)


@contextmanager
def _profiled(run: Run, step: int) -> "Iterator[None]":
    """Around a step that is looked into; afterwards writes and tells what was seen."""
    from training.profile import StepProfile

    profile = StepProfile(run.fabric.device)
    run.clock.around_data = profile.data
    with profile.record():
        yield
    run.clock.around_data = nullcontext
    folder = run.folder.profile_folder(step)
    with run.clock.stall():
        try:
            table = profile.write(folder).table()
            run.console.note(f"Step {step} with its profile, in {folder}:\n{table}")
        except Exception as error:  # no disk stops the training for a profile
            reason = " ".join(str(error).split())
            run.console.note(f"The profile of step {step} cannot be written: {reason}")


def log(run: Run, figures: dict[str, Any], stage: Stage) -> None:
    """Adds the speed since the last logged step, and tells the figures to console and files."""
    steps, seconds, data_wait_seconds = run.clock.read()
    tokens = steps * stage.global_batch_size * stage.seq_len
    throughput = meter(run.config, run.mesh, run.fabric.device, stage.seq_len)
    figures |= throughput.figures(tokens, seconds, data_wait_seconds, steps)
    run.last_figures |= figures
    run.console.log(figures)
    if run.metrics is not None:
        run.metrics.write(figures)


def validate(run: Run) -> float:
    """Mean loss over the held-out windows, the same figure on every mesh."""
    from data.dataset import Dataset
    from data.loader import validation_batches
    from evaluation.perplexity import NOTHING, measure

    assert isinstance(run.dataset, Dataset)  # a stream holds nothing out, and is not validated on
    batches = validation_batches(
        run.dataset,
        samples=run.config.validation.samples,
        seq_len=run.config.train.seq_len,
        micro_batch_size=run.validation_batch_size,
        rank=run.data_rank,
        size=run.mesh.dp,
    )
    watched = {name: _watched(run, of_source) for name, of_source in batches.items()}
    measured = measure(run.model, watched, run.fabric.device, run.strategy.sum_over_data)
    return sum(measured.values(), NOTHING).loss


def _watched(run: Run, batches: "list[Batch]") -> "Iterator[Batch]":
    """The same batches; each has the time of a step."""
    for batch in batches:
        run.watchdog.enter("step", run.position.step)
        yield batch


def write_sample(run: Run) -> None:
    """Generates a little text, all ranks together; rank 0 appends it to `samples.txt`."""
    from evaluation.sampling import sample_text

    config = run.config.validation
    if config.sample_tokens == 0:
        return
    text = sample_text(
        run.model,
        run.dataset.tokenizer(),
        config.prompt,
        n_tokens=config.sample_tokens,
        temperature=config.temperature,
        seed=run.position.step,
        device=run.fabric.device,
        multiple_of=run.mesh.seq_multiple,
    )
    if run.metrics is not None:
        run.metrics.write_sample(run.position.step, text)
