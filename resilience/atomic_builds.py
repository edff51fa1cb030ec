"""Atomic builds of the C++ libraries that Inductor compiles in a CPU run.

Inductor lets the compiler write into its cache, where a file that exists counts as complete
(torch/_inductor/codecache.py, `_worker_compile_cpp`; cpp_builder.py, `CppBuilder.build`). A file
that a killed compiler leaves truncated would fail each later run with the same kernels ("file too
short"). Here the compiler writes into the temporary folder of the build, and its output is moved
into the cache when it is complete. Imports Inductor: import it only where the CPU compiles.
"""

import os
import shlex
from functools import wraps
from pathlib import Path

from torch._inductor import cpp_builder


def make_builds_atomic() -> None:
    """Patch Inductor's builds in this process; the threads of its pool run them here."""
    run = cpp_builder.run_compile_cmd
    if hasattr(run, "__wrapped__"):  # patched already
        return

    @wraps(run)
    def run_atomically(cmd_line: str, cwd: str) -> None:
        command = shlex.split(cmd_line)
        output = command.index("-o") + 1
        target = Path(cwd, command[output])
        # A compiler that outlives its killed run may still write to the file of that run.
        unfinished = Path(cwd, f"{os.getpid()}-{target.name}")
        command[output] = str(unfinished)
        run(shlex.join(command), cwd)
        unfinished.replace(target)

    cpp_builder.run_compile_cmd = run_atomically
