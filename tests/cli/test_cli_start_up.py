"""Programs start and print safely with closed, broken or limited standard streams."""

import io
import subprocess
import sys

import pytest
from conftest import ROOT

from cli.start_up import TolerantStream

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
    program = PROGRAM.format(loading=loading, body=body, arguments=arguments)
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


def test_interrupt_before_main_prints_one_line() -> None:
    done = run("", body="raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "error\nInterrupted.\n")


def test_tolerant_stream_keeps_the_attributes_of_its_stream() -> None:
    stream = TolerantStream(io.StringIO())
    print("text", file=stream, flush=True)
    assert stream.getvalue() == "text\n" and not stream.isatty()
