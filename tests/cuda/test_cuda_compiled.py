"""Compiled training steps on fake CUDA tensors: every two options together."""

from typing import Any

import pytest
from test_cuda_covering import check, groups

# `check` runs the cases by `on_fake_device`.


@pytest.mark.parametrize("choices", groups(compiled=True))
def test_compiled_steps(choices: dict[str, Any]) -> None:
    check(choices, compiled=True)
