"""Printed results of `evaluate.py`: a table of losses and a table of benchmark scores."""

from collections.abc import Mapping, Sequence
from typing import Any

LOSS_HEADER = ("", "loss", "perplexity", "bits per byte", "tokens")
TASK_HEADER = ("task", "metric", "score", "standard error")


def report_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the results of `evaluate.py` as lines; metrics without a value are omitted."""
    step = "" if results["step"] is None else f", step {results['step']:,}"
    lines = [f"{results['checkpoint']}{step}"]
    if "loss" in results:
        lines += [f"held-out text of {results['data']}, windows of {results['seq_len']:,} tokens"]
        sources = results["sources"] if len(results["sources"]) > 1 else {}
        rows = [_loss_row("all", results)]
        rows += [_loss_row(name, metrics) for name, metrics in sources.items()]
        lines += ["", *_table([LOSS_HEADER, *rows], n_left=1)]
    if scores := results.get("tasks", {}).get("results"):
        scored = [row for task, metrics in scores.items() for row in _score_rows(task, metrics)]
        lines += ["", *_table([TASK_HEADER, *scored], n_left=2)]
    return [*lines, ""]


def _loss_row(name: str, metrics: Mapping[str, Any]) -> tuple[str, ...]:
    perplexity, bits = metrics["perplexity"], metrics["bits_per_byte"]
    return (
        name,
        f"{metrics['loss']:.4f}",
        f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.2e}",
        f"{bits:.4f}",
        f"{metrics['targets']:,}",
    )


def _score_rows(task: str, metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per metric of a task, from lm-eval's keys such as `acc,none`."""
    rows = list[tuple[str, ...]]()
    for key, value in metrics.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{name}_stderr,{kind}")
        shown = f"{error:.4f}" if isinstance(error, int | float) else ""
        label = name if kind == "none" else f"{name} ({kind})"
        rows.append((task, label, f"{value:,.4f}", shown))
    return rows


def _table(rows: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """Return the rows with aligned columns, the first `n_left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < n_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
