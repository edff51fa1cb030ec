"""Plot of training and validation loss (`loss.png`)."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.metrics_file import read_records


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Return the mean over a window centred on each point.

    At the start, where the loss falls fast, the window shrinks to stay centred, so that the curve
    does not start too low. At the end it is cut off, so that the last value is still a mean.
    """
    index = np.arange(len(values))
    half = np.minimum(half_width, index)
    start, stop = index - half, np.minimum(index + half + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return ((sums[stop] - sums[start]) / (stop - start)).tolist()


def plot_loss(metrics: Path, image: Path, title: str) -> None:
    """Plot training and validation loss (nats per token) over tokens, or over steps without tokens.

    The image is replaced atomically. Nothing is written before the first finite loss.

    Raises:
        OSError: The image cannot be written.
        ImportError: matplotlib is not installed.
    """
    records = read_records(metrics)
    has_tokens = records and all(record.get("tokens") is not None for record in records)
    x_key = "tokens" if has_tokens else "step"
    train = [(r[x_key], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r[x_key], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if not train and not validation:
        return
    # The first import may log that the font cache is being built.
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
