"""The plot of a plan: peak memory by part, as stacked bars."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from planning.memory import PARTS, MemoryBreakdown, size_text, size_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of `PARTS`: persistent state in blue, the rest in orange and grey.
COLORS = ("#08519c", "#3182bd", "#9ecae1", "#d94801", "#fd8d3c", "#fdbe85", "#74c476", "#bdbdbd")


BEYOND = 10
"""The axis ends before available memory that is this many times the fullest bar."""


def plot_memory(
    bars: Sequence[tuple[str, MemoryBreakdown]], limits: Sequence[int], image: Path, title: str
) -> None:
    """Write the plot of memory.

    Raises:
        OSError: The image cannot be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silence "building the font cache"
    temporary = image.with_name(image.name + ".tmp")
    memory_figure(bars, limits, title).savefig(temporary, format="png")
    os.replace(temporary, image)


def memory_figure(
    bars: Sequence[tuple[str, MemoryBreakdown]], limits: Sequence[int], title: str
) -> "Figure":
    """Return memory by part as stacked bars, with a line at the available memory of each.

    Args:
        limits: Bytes available to a rank, of each bar.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 + 0.55 * len(bars)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    unit, size = size_unit(max(memory.peak for _, memory in bars))
    left = [0.0] * len(bars)
    for part, color in zip(PARTS, COLORS, strict=True):
        sizes = [getattr(memory, part) / size for _, memory in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, color=color, label=part)
            left = [before + more for before, more in zip(left, sizes, strict=True)]
    for row, peak in enumerate(left):
        text = axes.annotate(
            f"{peak:.1f}", (peak, row), (4, 0), textcoords="offset points", va="center"
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # before the line
    least, most = (size_text(each).removesuffix(f" {unit}") for each in (min(limits), max(limits)))
    available = f"available: {least}" if least == most else f"available: {least} to {most}"
    end = max(left)
    if min(limits) < BEYOND * size * end:
        for row, limit in enumerate(limits):
            axes.plot([limit / size] * 2, [row - 0.5, row + 0.5], color="#252525", linestyle="--")
        end = max(end, max(limits) / size)
    axes.set_title(available, fontsize="medium", loc="right")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], parse_math=False, fontsize=8)
    axes.invert_yaxis()
    figure.suptitle(title, x=0.01, fontsize=11, ha="left", fontweight="bold", parse_math=False)
    axes.set(xlabel=f"peak memory per rank ({unit})", axisbelow=True)
    axes.set_xlim(0, 1.12 * end)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    return figure
