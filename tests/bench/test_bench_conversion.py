"""The bench of conversion in small: its claim about memory, on weights larger than the limit."""

from pathlib import Path

import pytest

from bench.conversion import STEPS, measure, tensor_sizes
from model.config import ModelConfig

TINY = ModelConfig("tiny", 64, 1, 4, 4, 64, 64)
SMALL = ModelConfig("small", 512, 32, 8, 4, 1024, 4096)  # 320 MB in tensors of 8 MB at most
SLABS = 128 * 2**20  # bytes: some slabs of 16 MiB, on their way from one file into the other


@pytest.mark.slow
def test_a_conversion_does_not_hold_what_it_converts(tmp_path: Path) -> None:
    steps = [STEPS[0], STEPS[2]]  # from a checkpoint to a Hugging Face folder and to Meta's
    alone = measure(TINY, tmp_path, steps)  # what torch and the program take by themselves
    sizes = tensor_sizes(SMALL)
    limit = SLABS + sum(sizes[-2:])
    assert sum(sizes) > 1.5 * limit, "weights that fit show nothing"
    for step, figures in measure(SMALL, tmp_path, steps).items():
        assert figures["peak_bytes"] - alone[step]["peak_bytes"] < limit, step
