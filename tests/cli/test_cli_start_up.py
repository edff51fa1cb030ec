"""Programs start and print safely with closed, broken or limited standard streams."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A pipe without a reader reports POLLERR: `true` has exited.
NO_READER = "import select; poll = select.poll(); poll.register(1, 0); poll.poll()"
PROGRAM = """
import os, sys
sys.argv = ["train.py", *{arguments}]
from cli.start_up import start_up
start_up({loading})
print("ä", flush=True)
print("error", file=sys.stderr)
print(open(os.devnull).fileno() > 2, os.environ["MPLBACKEND"])
{body}
"""


def run(
    redirections: str, loading: str = "'Loading …'", body: str = "", arguments: str = "[]"
) -> subprocess.CompletedProcess[str]:
    """Run a program after `start_up` in a shell with redirections."""
    return shell(redirections, PROGRAM.format(loading=loading, body=body, arguments=arguments))


def shell(redirections: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a shell with redirections."""
    command = f'"$0" -c "$1" {redirections}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, program],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://absent"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_first_line_is_printed_in_any_encoding_unless_output_is_data() -> None:
    done = run("")
    assert done.stdout.splitlines() == ["Loading \\u2026", "\\xe4", "True Agg"]
    assert done.stderr == "error\n"
    for silent in (run("", loading=""), run("", arguments="['--cfg', 'job']")):
        assert "Loading" not in silent.stdout + silent.stderr


@pytest.mark.parametrize(
    "redirections", [">&-", "<&- >&- 2>&-", "> /dev/full 2> /dev/full", "| true"]
)
def test_closed_and_full_streams_do_not_end_a_program(redirections: str) -> None:
    body = "sys.stdout.flush(); os._exit(7)"
    done = run(redirections + ("; exit ${PIPESTATUS[0]}" if "|" in redirections else ""), body=body)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("redirections", "code", "message"),
    [
        ("> /dev/full", 1, "Error: standard output cannot be written (No space left on device)\n"),
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
        (">&-", 0, ""),
    ],
)
@pytest.mark.parametrize("drop", ["", "with contextlib.suppress(OSError):"])
def test_result_that_cannot_be_printed_is_an_error(
    redirections: str, code: int, message: str, drop: str
) -> None:
    """Also if it is still buffered at the end, or a console has dropped the error."""
    wait = NO_READER if "|" in redirections else ""
    body = (
        f"import contextlib\n{wait}\n"
        f"with exit_on_user_error():\n  {drop or 'if True:'}\n    print('text', flush={bool(drop)})"
    )
    program = (
        "import sys\nfrom cli.start_up import start_up\n"
        f"from cli.errors import exit_on_user_error\nstart_up()\n{body}"
    )
    done = shell(redirections, program)
    assert (done.returncode, done.stderr) == (code, message)


def test_interrupt_before_main_prints_one_line() -> None:
    done = run("", body="raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "error\nInterrupted.\n")


def test_signals_that_the_parent_blocks_or_ignores_are_accepted() -> None:
    program = """
import os, signal, subprocess
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from cli.start_up import start_up
start_up()
child = subprocess.Popen(["sh", "-c", "kill -KILL $$"])
print(child.wait(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = shell("", program)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, f"{-signal.SIGKILL}\n")


CLOSED = ("closed at start", "closed at start")


@pytest.mark.parametrize(
    ("redirections", "output", "error"),
    [
        ("<&- >&- 2>&-", *CLOSED),
        (">&-", CLOSED[0], None),
        ("2> /dev/full", None, "No space left on device"),
        ("2>&1 | true; exit ${PIPESTATUS[0]}", "Broken pipe", "Broken pipe"),
    ],
)
@pytest.mark.parametrize("folder", ["run", "absent"])
def test_failing_streams_of_a_run_are_continued_in_its_console_log(
    redirections: str, output: str | None, error: str | None, folder: str, tmp_path: Path
) -> None:
    """Also what libraries and child processes write; without the folder, the output is dropped."""
    program = f"""
import os, subprocess, sys
from pathlib import Path
from cli.start_up import start_up
from resilience.standard_streams import continue_in
{NO_READER if "|" in redirections else ""}
start_up("Loading")
print("before", flush=True); print("before", file=sys.stderr)
continue_in(Path({str(tmp_path / folder)!r}), is_first_process=True)
print("after" * 10_000, flush=True); print("after" * 10_000, file=sys.stderr)
os.write(1, b"library\\n"); os.write(2, b"library\\n")
subprocess.run(["sh", "-c", "echo child; echo child >&2"])
print("last"); print("last", file=sys.stderr)
sys.exit(7)
"""
    (tmp_path / "run").mkdir()
    done = shell(redirections, program)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    names = ("standard output", output), ("standard error", error)
    reasons = " and ".join(f"{name} ({reason})" for name, reason in names if reason)
    if folder == "absent":
        assert not (tmp_path / folder).exists()
        return
    first, *lines = (tmp_path / folder / "console.log").read_text().splitlines()
    assert first.endswith(f": the run continues without {reasons}; its output follows here.")
    expected = ["before", "after" * 10_000, "library", "child", "last"]
    n_streams = len(reasons.split(" and "))
    assert sorted(lines) == sorted(n_streams * expected + ["Loading"] * (output is not None))
    if error is None:
        assert "The output continues in " in done.stderr


def test_console_log_that_is_a_named_pipe_without_a_reader_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "console.log")
    program = f"""
import sys
from pathlib import Path
from resilience import standard_streams
standard_streams.protect_streams(is_run=True)
standard_streams.continue_in(Path({str(tmp_path)!r}), is_first_process=True)
print("lost")
sys.exit(7)
"""
    assert shell(">&-", program).returncode == 7


def test_run_whose_reader_stops_reading_continues_in_its_console_log(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
reading, writing = os.pipe()  # of 64 KiB, which nobody reads
os.dup2(writing, 1)
from resilience import standard_streams
standard_streams.READER_SECONDS = 0.2
standard_streams.protect_streams(is_run=True)
standard_streams.continue_in(Path({str(tmp_path)!r}), is_first_process=True)
for line in range(20_000):
    print(line)
sys.exit(7)
"""
    done = shell("", program)
    assert done.returncode == 7
    heading, *lines = (tmp_path / "console.log").read_text().splitlines()
    assert "without standard output (not read for 0 s)" in heading
    assert lines[-1] == "19999" and len(lines) > 5000


@pytest.mark.parametrize("program", sorted(path.stem for path in ROOT.glob("*.py")))
def test_missing_dependencies_are_reported_with_the_environment_to_activate(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", f"{program}.py"],  # without site-packages
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"Not installed for {sys.executable}: hydra, omegaconf")
    assert "source .venv/bin/activate" in done.stderr and "Traceback" not in done.stderr
