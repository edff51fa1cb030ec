"""Machine code of every recipe's compiled step for sm_80, sm_90, sm_100 and sm_120, without a GPU.

    python tests/cuda/compile_recipes.py [NAME …]

Needs the extra `triton`. Claims: every case of `code_generation.py` compiles and fits
into shared memory, and no kernel spills more registers than `MAX_STACK`. Each case is written when
it is done, and the same command at the same commit continues; names select recipes, variants or
architectures.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from code_generation import (  # noqa: E402
    ARCHITECTURES,
    Step,
    cases,
    compile_steps,
    excess,
    make_step,
    rejection,
)
from fake_device import on_fake_device  # noqa: E402

from bench.measurement import FOLDER, environment, write  # noqa: E402

GROUP = 5  # cases per process, which share what PyTorch caches
Group = tuple[str, dict[str, Step]]  # an architecture and its steps by name


def main() -> None:
    """Compile what is missing, and write `bench/results/code_generation.json`."""
    name = "code_generation"
    results = known(FOLDER / f"{name}.json")
    missing: dict[str, dict[str, Step]] = {each: {} for each in ARCHITECTURES}
    for case in cases():
        key = ", ".join(case)
        if key in results or not {*sys.argv[1:]} <= {*case}:
            continue
        if error := rejection(*case):
            results[key] = {"rejected": error}
        else:
            recipe, variant, architecture = case
            missing[architecture][key] = make_step(recipe, variant)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for compiled in pool.map(compile_group, groups(missing)):
            results |= compiled
            write(name, {"triton": version("triton"), "cases": results})
    failed = {key: each["failed"] for key, each in results.items() if "failed" in each}
    assert not failed, "\n".join(f"{key}: {error}" for key, error in failed.items())
    spilling = {key: excess(each) for key, each in results.items() if "kernels" in each}
    assert not any(spilling.values()), spilling


def known(path: Path) -> dict[str, Any]:
    """Return the cases that have been compiled at this commit."""
    record = json.loads(path.read_text()) if path.exists() else {}
    return record["figures"]["cases"] if record.get("commit") == environment()["commit"] else {}


def groups(missing: dict[str, dict[str, Step]]) -> Iterator[Group]:
    """Yield the next cases of each architecture, in turns."""
    for first in range(0, max(map(len, missing.values())), GROUP):
        for architecture, steps in missing.items():
            if keys := [*steps][first : first + GROUP]:
                yield architecture, {key: steps[key] for key in keys}


def compile_group(group: Group) -> dict[str, Any]:
    """Return the result of each step, or the traceback of its failure."""
    architecture, steps = group
    found = on_fake_device(
        compile_steps,
        [*steps.values()],
        capability=ARCHITECTURES[architecture],
        generates_code=True,
    )
    shown = [{"failed": each} if isinstance(each, str) else each for each in found]
    return dict(zip(steps, shown, strict=True))


if __name__ == "__main__":
    main()
