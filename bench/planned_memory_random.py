"""Closed forms of memory compared with the traced step, over random jobs.

    python -m bench.planned_memory_random [COUNT] [SEED]

Jobs are drawn by `tests.planning.random_jobs`, on CPU and GPU, over every axis and setting. Claim:
the closed forms are within 3% of the trace, 5% under a memory budget of the compiler.
"""

import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path

from bench.measurement import write
from planning.memory import step_memory
from planning.step_spec import StepSpec
from planning.tracing import trace_memory

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "planning")]
_jobs = import_module("random_jobs")  # of tests/planning
overrides, random_jobs = _jobs.overrides, _jobs.random_jobs

TOLERANCE, TOLERANCE_OF_BUDGET = 0.03, 0.05


def relative_error(spec: StepSpec) -> float:
    """Return the error of the closed form's peak, relative to the trace's."""
    return step_memory(spec).peak / trace_memory(spec).peak - 1


def main() -> None:
    """Run the benchmark and write `bench/results/planned_memory_random.json`."""
    count, seed = [int(each) for each in [*sys.argv[1:], "500", "0"][:2]]
    jobs = list(random_jobs(count, seed))
    with ProcessPoolExecutor() as processes:
        signed = list(processes.map(relative_error, [spec for _, spec in jobs]))
    errors, outside = [], {}
    for (settings, spec), error in zip(jobs, signed, strict=True):
        budget = isinstance(spec.parallel.activation_checkpoint, float)
        errors.append(abs(error))
        if abs(error) > (TOLERANCE_OF_BUDGET if budget else TOLERANCE):
            outside[" ".join(overrides(settings))] = error
    deciles = statistics.quantiles(errors, n=100)
    results = {"jobs": count, "seed": seed, "worst": max(errors), "outside": outside}
    write(Path(__file__).stem, results | {f"p{n}": deciles[n - 1] for n in (50, 90, 99)})
    assert not outside, outside


if __name__ == "__main__":
    main()
