"""What a run leaves behind in figures: metrics.jsonl, TensorBoard, W&B, loss.png, and the meter.

`MetricsLog` lives on rank 0 and never stops training: a full disk, a missing package or a tracker
that cannot be reached is told once and left. `Throughput` turns counted tokens and seconds into
tokens/s, TFLOP/s and MFU; Fabric's own monitor counts tensor-parallel peers as data and does not
know recent cards. What to log and when, and what a person sees, is left to the loop and console.
"""

import logging
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.event_log import RetryingWriter, json_line, read_json_lines
from training.wandb_logger import Tracker

FIELDS = (
    *("step", "samples", "tokens", "loss", "grad_norm", "lr"),
    *("tokens_per_second", "tflops", "mfu_causal", "mfu_full"),
    *("peak_memory_gib", "step_seconds", "data_wait_seconds", "batch_hash", "val_loss"),
)

AGAIN_SECONDS = 60.0  # after a failure, before TensorBoard is tried again

# Dense bf16 peaks in TFLOP/s, by the names that torch.cuda.get_device_name gives.
_PEAK_TFLOPS = (
    (r"\bA100\b", 312.0),
    (r"\bH100\b.*(PCIe|HBM2e)", 756.0),
    (r"\bH100\b.*(SXM|HBM3\b)", 989.0),
    (r"\bH200\b(?!.*NVL)", 989.0),
    (r"\bB200\b", 2250.0),
    (r"\bMI300X\b", 1307.0),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of one device in FLOP/s for bf16 or fp16 matrix products, or None when unknown.

    None for CPUs, other types, a slice of a card (MIG) and every card not in the table: no MFU is
    better than a wrong one. Source: the vendors' data sheets for A100, H100, H200, HGX B200 and
    Instinct MI300X, without the doubling for structured sparsity.
    """
    if dtype not in (torch.bfloat16, torch.float16) or " MIG " in f"{device_name} ":
        return None
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return tflops * 1e12
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: CUDA's peak allocated bytes, on CPU the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


class Throughput:
    """The speed meter of a run on a mesh of `world_size` devices, each with `peak_flops` or None.

    FLOPs per token are 6·N + 12·layers·heads·head_dim·seq_len ("full", PaLM, arXiv:2204.02311,
    appendix B), the second term halved for "causal", which counts only what a causal mask needs.
    Recomputed activations do not count.
    """

    def __init__(
        self,
        flops_per_token_causal: float,
        flops_per_token_full: float,
        world_size: int,
        peak_flops: float | None,
        device: torch.device,
    ) -> None:
        self.flops_per_token_causal = flops_per_token_causal
        self.flops_per_token_full = flops_per_token_full
        self.world_size = world_size
        self.peak_flops = peak_flops
        self.device = device

    def figures(
        self, tokens: int, seconds: float, data_wait_seconds: float, steps: int
    ) -> dict[str, float | None]:
        """The figures of `steps` steps in which the whole mesh took `tokens` in `seconds`.

        `tokens_per_second` is the whole mesh's; `tflops` is per device, causal convention;
        `mfu_causal` and `mfu_full` are fractions of the device's peak, None when it is unknown;
        `step_seconds` and `data_wait_seconds` (waiting for data) are means over the steps.
        """
        tokens_per_second = tokens / seconds
        causal = tokens_per_second * self.flops_per_token_causal / self.world_size
        full = tokens_per_second * self.flops_per_token_full / self.world_size
        return {
            "tokens_per_second": tokens_per_second,
            "tflops": causal / 1e12,
            "mfu_causal": causal / self.peak_flops if self.peak_flops else None,
            "mfu_full": full / self.peak_flops if self.peak_flops else None,
            "peak_memory_gib": peak_memory_gib(self.device),
            "step_seconds": seconds / steps,
            "data_wait_seconds": data_wait_seconds / steps,
        }


def drop_lost_steps(path: Path, first_step: int) -> int:
    """Remove the lines of steps that will be done again, and torn ones; returns how many steps.

    Lines after `first_step` tell of work lost with a kill; at `first_step` 0 nothing is left to
    keep. The end is cut off, or a file of the rest renamed in place: a kill here loses nothing.
    """
    if not path.exists():
        return 0
    records = read_json_lines(path)
    kept = [r for r in records if first_step > 0 and r.get("step", 0) <= first_step]
    text = "".join(json_line(record) + "\n" for record in kept).encode()
    before = path.read_bytes()
    if before.startswith(text):  # as ever, but for lines torn in the middle; a full disk allows it
        os.truncate(path, len(text))
    else:
        temporary = path.with_suffix(".jsonl.tmp")
        with open(temporary, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return len(records) - len(kept)


class MetricsLog:
    """Writes the figures of a run to its folder and to the trackers asked for; rank 0 only.

    `first_step` is the number of steps done when this start begins: what the files hold beyond it
    is dropped. `wandb` is a W&B project, None for off. No method raises over a disk or a tracker,
    or waits for one; each kind of failure goes once to `warn`. Files are tried again: once the disk
    has space, lines of figures that waited are written, and TensorBoard goes on.
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        wandb: str | None,
        run_name: str,
        run_config: dict[str, Any],
        first_step: int,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.run_name = run_name
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned: set[str] = set()
        self._lines = RetryingWriter(self.path)
        self._wants_tensorboard = tensorboard
        self._tensorboard: Any = None
        self._tensorboard_again = 0.0  # when to try again
        self._wandb: Tracker | None = None
        self.truncate_metrics(first_step)
        if wandb is not None:
            self._wandb = Tracker(folder, wandb, run_name, run_config, first_step)

    def truncate_metrics(self, step: int) -> None:
        """Drop what the files hold beyond a step: at the start of a run, and for a rewind."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            drop_lost_steps(self.path, step)
        except OSError as error:
            self._fail("metrics.jsonl", error)
        self._close_tensorboard()
        self._open_tensorboard(step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Log one step. `record` has the fields of `FIELDS` that apply, `step` always."""
        ordered = {key: record[key] for key in FIELDS if key in record}
        ordered.update(record)  # fields outside FIELDS come last
        try:
            self._lines.append(json_line(ordered))
        except OSError as error:
            self._fail("metrics.jsonl", error)
        self._write_tensorboard(ordered)
        if self._wandb is not None:
            self._wandb.log(ordered)
            self._tell_wandb_failure()

    def write_sample(self, step: int, text: str) -> None:
        """Add generated text to `samples.txt`, under a line that tells its step."""
        try:
            with (self.folder / "samples.txt").open("a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n\n")
        except OSError as error:
            self._fail("samples.txt", error)

    def draw(self) -> None:
        """Redraw `loss.png` from `metrics.jsonl`; no picture before the first finite loss."""
        try:
            draw_loss(self.path, self.folder / "loss.png", self.run_name)
        except Exception as error:
            self._fail("loss.png", error)

    def close(self) -> None:
        """Finish the trackers. The log can be closed twice, and needs no closing after a kill."""
        self._wants_tensorboard = False
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
            self._tell_wandb_failure()
        self._wandb = None

    def _open_tensorboard(self, step: int) -> None:
        """Open a file of events; those of other files beyond the step no longer count."""
        if not self._wants_tensorboard:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            purge = step + 1 if step > 0 else 0
            self._tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge)
        except Exception as error:
            self._tensorboard_fails(error)

    def _write_tensorboard(self, record: Mapping[str, Any]) -> None:
        again = not self._lines.waiting and time.monotonic() >= self._tensorboard_again
        if self._tensorboard is None and again:  # where metrics.jsonl fails, this will too
            self._open_tensorboard(record["step"] - 1)
        if self._tensorboard is None:
            return
        try:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, record["step"])
            self._tensorboard.flush()  # a kill must not cost figures, and errors come up here
        except Exception as error:
            self._tensorboard_fails(error)

    def _tensorboard_fails(self, error: Exception) -> None:
        self._tensorboard = None
        self._tensorboard_again = time.monotonic() + AGAIN_SECONDS
        self._fail("TensorBoard", error)

    def _close_tensorboard(self) -> None:
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except Exception as error:
            self._fail("TensorBoard", error)
        self._tensorboard = None

    def _tell_wandb_failure(self) -> None:
        if self._wandb is not None and (failure := self._wandb.failure()) is not None:
            self._fail("W&B", failure)
            self._wandb = None

    def _fail(self, what: str, error: object) -> None:
        if what not in self._warned:
            self._warned.add(what)
            reason = " ".join(str(error).split())
            self._warn(f"{what} in {self.folder} fails ({reason}): training goes on without it")


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Mean over a window centred on each point.

    At the start, where a loss falls fast, the window narrows to stay centred, so the line does
    not begin too low; at the end it is cut, so the last value is a mean and no single step.
    """
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        half = min(half_width, i)
        first, end = i - half, min(i + half + 1, len(values))
        out.append((sums[end] - sums[first]) / (end - first))
    return out


def draw_loss(metrics: Path, image: Path, title: str) -> None:
    """Draw training and validation loss (nats per token) over tokens, or steps without tokens.

    Written to a temporary name and renamed. Draws nothing while there is no finite loss.
    Raises OSError when the picture cannot be written, ImportError without matplotlib.
    """
    records = read_json_lines(metrics)
    x_key = "tokens" if records and all("tokens" in r for r in records) else "step"
    train = [(r[x_key], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r[x_key], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if not train and not validation:
        return
    # The first import may tell about its font cache: not for the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    largest = max(x for x, _ in train + validation)
    units = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
    unit, word = next(((u, w) for u, w in units if largest >= u), (1, ""))
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if train:
        xs, ys = [x / unit for x, _ in train], [y for _, y in train]
        smoothed = smooth(ys, max(1, len(ys) // 50))
        axes.plot(xs, ys, color="#9ecae1", linewidth=0.8, label="training, each logged step")
        label = f"training, smoothed: {smoothed[-1]:.3f}"
        axes.plot(xs, smoothed, color="#08519c", linewidth=1.8, label=label)
    if validation:
        xs, ys = [x / unit for x, _ in validation], [y for _, y in validation]
        label = f"validation: {ys[-1]:.3f}"
        axes.plot(xs, ys, color="#d94801", linewidth=1.4, marker="o", markersize=4, label=label)
    axes.set_title(title, loc="left", fontweight="bold", parse_math=False)
    name = "tokens" if x_key == "tokens" else "steps"
    axes.set_xlabel(f"{name} ({word})" if word else name)
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    temporary = image.with_name(image.name + ".tmp")
    FigureCanvasAgg(figure).print_figure(temporary, format="png")
    os.replace(temporary, image)
