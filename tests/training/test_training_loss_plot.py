"""The loss plot shows training and validation loss with centred smoothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.failed_outputs import FailedOutputs
from training.loss_plot import plot_loss, smooth
from training.metrics import MetricsLog


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 512 * step, "loss": 8.0 / step} | changes


def has_colour(image: Path, colour: tuple[int, int, int]) -> bool:
    from matplotlib.image import imread

    pixels = torch.tensor(imread(image))[..., :3]  # (height, width, 3), 0 to 1
    return bool(((pixels * 255).round() == torch.tensor(colour)).all(-1).any())


def test_plot_shows_training_and_validation_loss_once_logged(tmp_path: Path) -> None:
    blue, orange = (8, 81, 156), (217, 72, 1)
    warnings: list[str] = []
    log = MetricsLog(
        tmp_path, False, None, "a $run_1$", {}, 0, FailedOutputs(tmp_path, warnings.append)
    )  # not parsed as mathtext
    image = tmp_path / "loss.png"
    log.plot()
    log.write(record(1, loss=float("nan")))
    log.plot()
    assert not image.exists()
    for step in range(2, 30):
        log.write(record(step))
    log.plot()
    assert has_colour(image, blue) and not has_colour(image, orange)
    log.write(record(30, loss=float("inf"), val_loss=1.0))
    log.plot()
    assert has_colour(image, blue) and has_colour(image, orange)
    assert not warnings
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_plot_without_tokens_has_steps_on_x_axis(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "val_loss": 1.0}\n')
    plot_loss(tmp_path / "m.jsonl", tmp_path / "steps.png", "run")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.floats(-100, 100), max_size=60), st.integers(0, 80))
def test_smoothed_value_is_mean_of_window(values: list[float], half: int) -> None:
    smoothed = smooth(values, half)
    assert len(smoothed) == len(values)
    for i, value in enumerate(smoothed):
        reach = min(half, i)
        window = values[i - reach : i + reach + 1]
        # Running sums of up to 60 values below 100 have errors of 60 * 100 * 2**-53.
        assert value == pytest.approx(sum(window) / len(window), abs=1e-9)


def test_smoothing_starts_at_first_loss_without_lag() -> None:
    falling = [10.0 - 0.1 * i for i in range(50)]
    # A centred mean of a straight line is the line itself; 1e-12 covers rounding.
    assert smooth(falling, 5)[:45] == pytest.approx(falling[:45], abs=1e-12)
