"""bench.gpu: the report of parts that pass, fail or hang, their selection and continuation."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu.__main__ import LIMIT_SECONDS, ROOT, main, run_part, run_parts
from bench.gpu.parts import ENVIRONMENT, PARTS, Part
from bench.gpu.throughput import CASES, METRICS, MICRO_BATCHES

HERE = "tests.bench.gpu_parts"
DESCRIBE = Part(f"{HERE}:environment", 10)


def parts(*names: str) -> dict[str, Part]:
    limits = {"hanging": 5.0}  # its process starts within 2 s on a busy machine
    return {name: Part(f"{HERE}:{name}", limits.get(name, 10)) for name in names}


def report(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def statuses(path: Path) -> dict[str, str]:
    return {name: entry["status"] for name, entry in report(path)["parts"].items()}


def test_failing_and_hanging_parts_do_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    selected = parts("failing", "hanging", "missed", "inapplicable", "passing")
    assert run_parts([], path, False, selected, DESCRIBE) == 1
    assert statuses(path) == {
        "failing": "failed",
        "hanging": "timed out",
        "missed": "failed",
        "inapplicable": "skipped",
        "passing": "passed",
    }
    found = report(path)
    assert (found["device"], found["commit"], found["reduced"]) == ("none", "abc", False)
    entries = found["parts"]
    assert "ValueError: kernel not found" in entries["failing"]["output"]
    assert entries["hanging"]["error"] == "exceeded its limit of 5 s"
    assert entries["hanging"]["output"] == "compiling\n"
    # Rows from before the end of a part are kept.
    assert entries["failing"]["rows"] == entries["hanging"]["rows"] == {"before": {"passed": True}}
    assert entries["passing"]["rows"]["second"] == {"value": 2.5}
    assert entries["hanging"]["seconds"] < 9


def test_report_lists_parts_that_were_not_reached_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, selected = tmp_path / "gpu.json", parts("passing", "hanging", "inapplicable")
    now = [0.0]

    def slow(part: Part, reduced: bool, limit_seconds: float) -> dict[str, Any]:
        now[0] += 100.0 * part.function.endswith("hanging")
        return run_part(part, reduced, limit_seconds)

    monkeypatch.setattr("bench.gpu.__main__.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("bench.gpu.__main__.run_part", slow)
    assert run_parts([], path, False, selected, DESCRIBE, limit_seconds=60) == 1
    assert statuses(path)["inapplicable"] == "not reached"
    process = report(path)["parts"]["passing"]["rows"]["first"]["process"]

    selected["hanging"] = parts("passing")["passing"]
    assert run_parts([], path, False, selected, DESCRIBE) == 0
    assert statuses(path) == {"passing": "passed", "hanging": "passed", "inapplicable": "skipped"}
    assert report(path)["parts"]["passing"]["rows"]["first"]["process"] == process  # not repeated

    assert run_parts(["passing"], path, False, selected, DESCRIBE) == 0
    assert report(path)["parts"]["passing"]["rows"]["first"]["process"] != process
    assert set(statuses(path)) == set(selected)


@pytest.mark.parametrize("change", ["commit", "dirty", "reduced"])
def test_report_of_another_commit_or_form_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setenv("COMMIT", "abc-dirty" if change == "dirty" else "abc")
    run_parts(["passing"], path, False, parts("passing", "missed"), DESCRIBE)
    monkeypatch.setenv("COMMIT", {"commit": "def", "dirty": "abc-dirty"}.get(change, "abc"))
    run_parts(["missed"], path, change == "reduced", parts("passing", "missed"), DESCRIBE)
    assert statuses(path) == {"missed": "failed"}


def test_report_is_not_written_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert run_parts([], path, False, parts("passing"), Part(f"{HERE}:no_gpu", 10)) == 1
    assert "torch sees no GPU" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize("word", ["PARTS=kernel", "reduce", "LIMIT=1"])
def test_unknown_argument_is_reported_with_the_choices(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {word.removesuffix('=1')} is not an argument; ")
    assert "use reduced, REPORT=FILE and PARTS=kernels,losses" in error


def test_help_lists_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "Parts: kernels, losses" in capsys.readouterr().out


def test_parts_exist_and_their_limits_leave_time_for_each_other() -> None:
    import importlib

    for part in (ENVIRONMENT, *PARTS.values()):
        module, _, name = part.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert part.limit_seconds <= 180
    # The first parts have their full limits, in the worst case; the rest has what is left.
    first = [ENVIRONMENT, *(PARTS[name] for name in ("kernels", "losses", "8b"))]
    assert list(PARTS)[:3] == ["kernels", "losses", "8b"]
    assert sum(part.limit_seconds for part in first) < LIMIT_SECONDS < 8 * 60


def test_make_uses_the_given_interpreter_and_wheels(tmp_path: Path) -> None:
    def commands(*words: str) -> str:
        done = subprocess.run(
            ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.replace("\\\n", "").replace("  ", "")

    with pytest.raises(AssertionError, match=f"WHEELS={tmp_path} contains no wheels; use the"):
        commands("gpu", "PYTHON=python3", f"WHEELS={tmp_path}")
    (tmp_path / "a.whl").touch()
    given = commands("gpu", "PYTHON=python3", f"WHEELS={tmp_path}", "PARTS=kernels,losses")
    assert "python3 -m pip install --quiet --no-index --no-deps" in given
    assert "python3-m bench.gpu PARTS=kernels,losses" in given.replace("python3 -m", "python3-m")
    assert ".venv" not in given
    assert ".venv/bin/python" in commands(
        "gpu"
    ) and "pip install --quiet --no-index" not in commands("gpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_reduced_part_runs_on_cpu(name: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "reduced", f"PARTS={name}", f"REPORT={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report(path)["parts"]) == [name] and report(path)["reduced"]
    rows = report(path)["parts"][name]["rows"]
    assert rows
    if name in CASES:
        check_reduced_case(rows["speed"], rows["memory"], rows["profile"])


def check_reduced_case(speed: dict[str, Any], memory: Any, profile: Any) -> None:
    """Check that every metric of a throughput case was measured."""
    for metric in set(METRICS) - {"mfu_causal"}:  # the peak of a CPU is unknown
        found = speed[metric]
        assert 0 < found["quartile_1"] <= found["median"] <= found["quartile_3"]
    # The median of a metric and that of its reciprocal come from the same step.
    tokens = speed["tokens_per_second"]["median"] * speed["step_seconds"]["median"]
    assert tokens == pytest.approx(MICRO_BATCHES * 2 * 64)
    assert speed["planned"]["step_seconds"] > 0 and "passed" not in speed
    assert 0 < memory["planned_gib"] < memory["peak_gib"]
    seconds = profile["seconds"]
    assert sum(seconds.values()) == pytest.approx(profile["total_seconds"], rel=0.01)
    assert seconds["matrix products"] > 0
