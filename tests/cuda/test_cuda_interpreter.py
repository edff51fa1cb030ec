"""The kernels that Inductor generates for a model compute what eager mode does."""

import json
from pathlib import Path

import pytest
from conftest import start_python

# float32 has 24 bits; sums of some hundred terms in another order differ by about 1e-6. bf16 has 8:
# compiled kernels round to it at most as often as eager mode, whose own error bounds theirs, and a
# value such as the loss may round in the other direction.
ROUNDING = {"flex fp32": 1e-5, "sdpa bf16": 2**-8}
# One kernel or more of each: block, FlexAttention, loss, embedding; `tem` are templates.
KERNELS = {
    "embedding",
    "embedding_dense_backward",
    "silu",
    "silu_backward",
    "rsqrt",
    "exp",
    "copy_",
}
FLEX = {"tem_fused__unsafe_view_flex_attention", "tem_fused_flex_attention_backward"}


@pytest.mark.slow
def test_interpreted_kernels_of_a_model_equal_eager_mode(tmp_path: Path) -> None:
    program = Path(__file__).with_name("interpreted_model.py")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = start_python([str(program)], timeout=600, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == ROUNDING.keys()
    for name, result in results.items():
        errors, eager = result["errors"], result["eager"]
        assert len(errors) == 13  # the loss and every parameter
        bounds = {each: 1.5 * eager[each] + ROUNDING[name] for each in errors}
        assert {each: e for each, e in errors.items() if not e <= bounds[each]} == {}, name
        kernels = " ".join(result["kernels"])
        wanted = KERNELS | (FLEX if "flex" in name else set())
        assert {kernel for kernel in wanted if kernel not in kernels} == set()
