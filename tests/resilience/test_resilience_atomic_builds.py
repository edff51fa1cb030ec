"""A build that is killed leaves nothing in Inductor's cache that a later run would load."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor import cpp_builder, exc
from torch._inductor.codecache import _worker_compile_cpp
from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder

from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from resilience import launch as launch_module
from resilience.atomic_builds import make_builds_atomic
from resilience.config import TimeLimits
from resilience.launch import launch
from resilience.processes import Processes

COMPILER = """#!/bin/sh
[ "$1" = --version ] && exit
while [ "$1" != -o ]; do shift; done
echo half > "$2"
[ -e ../complete ] || kill -9 $$
echo complete > "$2"
"""


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore Inductor's function after the test."""
    run = cpp_builder.run_compile_cmd
    monkeypatch.setattr(cpp_builder, "run_compile_cmd", getattr(run, "__wrapped__", run))


@pytest.mark.parametrize("options", [{}, {"compile_only": True}, {"precompiling": True}])
def test_killed_compiler_leaves_no_target_and_the_next_build_completes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Libraries, objects and precompiled headers; Inductor takes an existing file for complete."""
    make_builds_atomic()
    make_builds_atomic()  # no effect
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    build_options = BuildOptionsBase(str(compiler), **options)
    builder = CppBuilder("kernel", str(tmp_path / "a.cpp"), build_options, str(tmp_path))
    target, lock = Path(builder.get_target_file_path()), str(tmp_path / "lock")
    with pytest.raises(exc.CppCompileError):
        _worker_compile_cpp(lock, [builder])
    assert not target.exists()
    (tmp_path / "complete").touch()
    _worker_compile_cpp(lock, [builder])
    assert target.read_text() == "complete\n"
    assert not list(tmp_path.glob("*CxxBuild"))


@pytest.mark.parametrize(
    ("device", "compile", "optimizer_state", "expected"),
    [
        ("cpu", True, "fp32", True),
        ("cpu", False, "int8", True),
        ("cpu", "auto", "fp32", False),
        ("cuda", "auto", "int8", False),
    ],
)
def test_launch_of_a_run_that_compiles_on_cpu_makes_builds_atomic(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    compile: Any,
    optimizer_state: Any,
    expected: bool,
) -> None:
    for name in ("set_up_process", "keep_freed_memory", "bind_to_gpu"):
        monkeypatch.setattr(launch_module, name, lambda *_: None)
    monkeypatch.setattr(launch_module, "Fabric", lambda **_: SimpleNamespace(launch=lambda: None))
    for name in ("MASTER_ADDR", "LLAMESH_MAIN_PID"):
        monkeypatch.setenv(name, "")  # recorded, so that it is restored
    watchdog: Any = SimpleNamespace(limits=TimeLimits(), children=[], connect=lambda: None)
    parallel = ParallelConfig(compile=compile)
    precision = PrecisionConfig(optimizer_state=optimizer_state)
    launch(Processes(device, 1, 1, "self"), MeshShape(1, 1, 1, 1), parallel, precision, watchdog)
    assert hasattr(cpp_builder.run_compile_cmd, "__wrapped__") == expected
