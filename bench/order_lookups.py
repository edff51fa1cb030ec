"""Speed of sample order lookups, compared with a shuffled index array in memory.

    python -m bench.order_lookups

Looks up a million consecutive samples at once in one thread, alternating between one source, a
mixture, a mixture over three stages, a mixture shuffled by blocks, and the baseline: random gathers
from an index array of an epoch of ten million windows (shuffled once by NumPy outside the timing,
80 MB). Claim: ten million lookups per second for one source and for a mixture (blocks need a second
permutation and more time). The array covers one source and one epoch, takes 8 bytes per window on
every rank, and must be created before any position can be looked up.
"""

import time
from pathlib import Path

import numpy as np

from bench.measurement import spread, write
from data.order import Order, OrderStage

N_SAMPLES, REPEATS = 2**20, 15
WINDOWS = {"web": 10**9, "code": 10**8, "books": 10**7}


def stage(first_sample: int = 0, seq_len: int = 8, **weights: float) -> OrderStage:
    """Return a stage of the sources in `weights`."""
    n_windows = {name: WINDOWS[name] * 8 // seq_len for name in weights}
    return OrderStage(first_sample, seq_len, weights, n_windows)


def main() -> None:
    """Run the benchmark and write `bench/results/order_lookups.json`."""
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
    random_indices = np.random.default_rng(1).integers(0, 10**7, N_SAMPLES)
    rates: dict[str, list[float]] = {name: [] for name in (*orders, "list_in_memory")}
    step_seconds = []
    for repeat in range(REPEATS):
        for name, order in orders.items():
            start = time.perf_counter()
            order.locate(samples)
            rates[name].append(N_SAMPLES / (time.perf_counter() - start))
        start = time.perf_counter()
        epoch[random_indices]
        rates["list_in_memory"].append(N_SAMPLES / (time.perf_counter() - start))
        start = time.perf_counter()
        orders["mixture"].locate(samples[16 * repeat : 16 * repeat + 16])
        step_seconds.append(time.perf_counter() - start)
    results = {f"{name}_per_second": spread(values) for name, values in rates.items()}
    write(Path(__file__).stem, results | {"sixteen_samples_seconds": spread(step_seconds)})


if __name__ == "__main__":
    main()
