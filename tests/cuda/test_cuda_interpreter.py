"""The kernels that Inductor generates for a block compute what eager mode does."""

import json
from pathlib import Path

import pytest
from conftest import start_python


@pytest.mark.slow
def test_interpreted_kernels_of_a_block_equal_eager_mode(tmp_path: Path) -> None:
    program = Path(__file__).with_name("interpreted_block.py")
    done = start_python([str(program)], environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # float32 has 24 bits; sums of some hundred terms in another order differ by about 1e-6.
    assert {name: error for name, error in result["errors"].items() if error > 1e-5} == {}
    assert len(result["errors"]) == 13  # the loss and every parameter
    backward = [name for name in result["kernels"] if "backward" in name]
    assert len(result["kernels"]) > 10 and backward
