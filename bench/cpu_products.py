"""Float32 matrix products of oneDNN compared with MKL, for `model.kernels.onednn_linear`.

    python -m bench.cpu_products

Alternates both on the three products of training, in the layers of the two models of
`bench.training_step` and of a larger one, with 2,048 tokens. A ratio above 1 means that oneDNN is
faster.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measurement import spread, write
from model.kernels.onednn_linear import linear

TOKENS, ROUNDS, WARM_UP = 2048, 40, 3
LAYERS = ((384, 384), (384, 1024), (1024, 384), (640, 640), (640, 1792), (1792, 640), (2048, 2048))


def main() -> None:
    """Run the benchmark and write `bench/results/cpu_products.json`."""
    results = {}
    for width_in, width_out in LAYERS:
        x, weight = torch.randn(TOKENS, width_in), torch.randn(width_out, width_in)
        gradient = torch.randn(TOKENS, width_out)
        flops = 2 * TOKENS * width_in * width_out
        for name, left, right in (
            ("output", x, weight),
            ("input's gradient", gradient, weight.t()),
            ("weight's gradient", gradient.t(), x.t()),
        ):
            mkl, onednn = _in_turns(left, right)
            results[f"{width_in} to {width_out}, {name}"] = {
                "ratio": spread([a / b for a, b in zip(mkl, onednn, strict=True)]),
                "mkl_gflops": spread([flops / each / 1e9 for each in mkl]),
                "onednn_gflops": spread([flops / each / 1e9 for each in onednn]),
            }
    write(Path(__file__).stem, results)
    for name, each in results.items():
        ratio = each["ratio"]
        quartiles = f"{ratio['quartile_1']:.2f}, {ratio['quartile_3']:.2f}"
        print(f"{name:36} {ratio['median']:.2f} ({quartiles})")


def _in_turns(left: Tensor, right: Tensor) -> tuple[list[float], list[float]]:
    """Return the seconds of left · rightᵀ by MKL and by oneDNN."""
    with torch.no_grad():
        for _ in range(WARM_UP):
            F.linear(left, right)
            linear(left, right)
        taken = [
            (_seconds(F.linear, left, right), _seconds(linear, left, right)) for _ in range(ROUNDS)
        ]
    return [mkl for mkl, _ in taken], [onednn for _, onednn in taken]


def _seconds(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    product(left, right)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
