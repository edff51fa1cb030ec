"""The plot of a plan: peak memory by part, as stacked bars."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from planning.memory import GIB, PARTS, MemoryBreakdown

# Of `PARTS`: persistent state in blue, the rest in orange and grey.
COLORS = ("#08519c", "#3182bd", "#9ecae1", "#d94801", "#fd8d3c", "#fdbe85", "#74c476", "#bdbdbd")


def plot_memory(
    bars: Sequence[tuple[str, MemoryBreakdown]], limit: int, image: Path, title: str
) -> None:
    """Plot memory by part as stacked bars, with the available memory as a line.

    Raises:
        OSError: The image cannot be written.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # silence "building the font cache"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 + 0.55 * len(bars)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for part, color in zip(PARTS, COLORS, strict=True):
        sizes = [getattr(memory, part) / GIB for _, memory in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, color=color, label=part)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    for row, size in enumerate(left):
        text = axes.annotate(
            f"{size:.1f}", (size, row), (4, 0), textcoords="offset points", va="center"
        )
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # before the line
    limit_gib = limit / GIB
    axes.axvline(limit_gib, color="#252525", linestyle="--", linewidth=1.2)
    top = axes.get_xaxis_transform()
    axes.text(limit_gib, 1.01, f"available: {limit_gib:.1f}", transform=top, ha="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], parse_math=False)
    axes.invert_yaxis()
    figure.suptitle(title, x=0.01, fontsize=11, ha="left", fontweight="bold", parse_math=False)
    axes.set(xlabel="peak memory per rank (GiB)", axisbelow=True)
    axes.set_xlim(0, 1.12 * max(*left, limit_gib))
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    temporary = image.with_name(image.name + ".tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, image)
