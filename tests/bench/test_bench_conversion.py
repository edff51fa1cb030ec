"""The memory claim of bench.conversion, on small weights that exceed the limit."""

from pathlib import Path

import pytest

from bench.conversion import STEPS, measure, tensor_sizes
from model.config import ModelConfig

TINY = ModelConfig("tiny", 64, 1, 4, 4, 64, 64)
SMALL = ModelConfig("small", 512, 32, 8, 4, 1024, 4096)  # 320 MB in tensors of at most 8 MB
SLABS = 128 * 2**20  # bytes of the 16 MiB buffers between input and output file


@pytest.mark.slow
def test_conversion_memory_is_independent_of_checkpoint_size(tmp_path: Path) -> None:
    steps = [STEPS[0], STEPS[2]]  # from a checkpoint to a Hugging Face folder and to Meta's
    baseline = measure(TINY, tmp_path, steps)  # memory of torch and the program
    sizes = tensor_sizes(SMALL)
    limit = SLABS + sum(sizes[-2:])
    assert sum(sizes) > 1.5 * limit, "the weights must exceed the limit"
    for step, result in measure(SMALL, tmp_path, steps).items():
        assert result["peak_bytes"] - baseline[step]["peak_bytes"] < limit, step
