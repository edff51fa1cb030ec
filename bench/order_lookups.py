"""How fast the order of samples is looked up, beside a shuffled list in memory.

    python -m bench.order_lookups

A million consecutive samples at once, one thread, in turn: one source, a mixture, a mixture over
three stages, a mixture shuffled by blocks; and the peer, an index array of an epoch of ten million
windows (shuffled once by NumPy, 80 MB, beyond the clock), gathered from at random. The claim: ten
million look-ups a second of one source and of a mixture (blocks take a second permutation, and
more time). The list knows one source and one epoch, takes 8 bytes a window on every rank, and
cannot be entered in its middle without being made.
"""

import time
from pathlib import Path

import numpy as np

from bench.measurement import spread, write
from data.order import Order, OrderStage

N_SAMPLES, REPEATS = 2**20, 15
WINDOWS = {"web": 10**9, "code": 10**8, "books": 10**7}


def stage(first_sample: int = 0, seq_len: int = 8, **weights: float) -> OrderStage:
    """A stage of the sources in `weights`."""
    n_windows = {name: WINDOWS[name] * 8 // seq_len for name in weights}
    return OrderStage(first_sample, seq_len, weights, n_windows)


def main() -> None:
    """Measures and writes `bench/results/order_lookups.json`."""
    mixture = stage(web=0.6, code=0.3, books=0.1)
    later = [
        stage(N_SAMPLES // 4, web=0.2, code=0.4, books=0.4),
        stage(N_SAMPLES // 2, 16, web=0.2, code=0.4, books=0.4),
    ]
    orders = {
        "single": Order([stage(web=1.0)], 0),
        "mixture": Order([mixture], 0),
        "three_stages": Order([mixture, *later], 0),
        "mixture_in_blocks": Order([mixture], 0, block_tokens=2**15),
    }
    samples = np.arange(N_SAMPLES)
    epoch = np.random.default_rng(0).permutation(10**7)
    at_random = np.random.default_rng(1).integers(0, 10**7, N_SAMPLES)
    rates: dict[str, list[float]] = {name: [] for name in (*orders, "list_in_memory")}
    step_seconds = []
    for repeat in range(REPEATS):
        for name, order in orders.items():
            begin = time.perf_counter()
            order.locate(samples)
            rates[name].append(N_SAMPLES / (time.perf_counter() - begin))
        begin = time.perf_counter()
        epoch[at_random]
        rates["list_in_memory"].append(N_SAMPLES / (time.perf_counter() - begin))
        begin = time.perf_counter()
        orders["mixture"].locate(samples[16 * repeat : 16 * repeat + 16])
        step_seconds.append(time.perf_counter() - begin)
    figures = {f"{name}_per_second": spread(found) for name, found in rates.items()}
    write(Path(__file__).stem, figures | {"sixteen_samples_seconds": spread(step_seconds)})


if __name__ == "__main__":
    main()
