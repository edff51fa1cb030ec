"""A picture of where a rank's memory goes: a stacked bar for each plan, its room a line."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from planning.memory import Memory
from planning.plan import GIB, PARTS

# At rest in blues, what comes and goes in warm colours.
COLOURS = {
    "parameters": "#08519c",
    "gradients": "#3182bd",
    "optimizer": "#9ecae1",
    "activations": "#d94801",
    "gathered": "#fd8d3c",
    "logits": "#fdbe85",
    "temporary": "#bdbdbd",
}


def draw_memory(bars: Sequence[tuple[str, Memory]], room: int, image: Path, title: str) -> None:
    """Draws a bar of GiB for each plan, under its name; written beside and renamed.

    Raises:
        OSError: the picture cannot be written.
    """
    if not bars:
        return
    # The first import may tell about its font cache: not for the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.55 * len(bars)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(bars)
    for part in PARTS:
        sizes = [getattr(memory, part) / GIB for _, memory in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, color=COLOURS[part], label=part)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, size in enumerate(left):
        axes.annotate(f"{size:.1f}", (size, place), (4, 0), textcoords="offset points", va="center")
    limit = room / GIB
    axes.axvline(limit, color="#252525", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"room: {limit:.1f}",
        (limit, 1),
        (0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], parse_math=False)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontweight="bold", pad=18, parse_math=False)
    axes.set_xlabel("memory of a rank at its fullest (GiB)")
    axes.set_xlim(0, 1.12 * max(*left, limit))
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    temporary = image.with_name(image.name + ".tmp")
    FigureCanvasAgg(figure).print_figure(temporary, format="png")
    os.replace(temporary, image)
