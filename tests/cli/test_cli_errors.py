"""User errors: reported by the first process; all processes exit with the same code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import ForkServer

import evaluate
import generate
from cli.composition import compose_config
from cli.config import load_evaluate_config, load_generate_config
from cli.errors import exit_on_user_error
from resilience.errors import OutOfMemory
from resilience.exit_codes import ExitCode

PROGRAM = """
import os, sys, time
from functools import partial
from training.shutdown import exit_early
import evaluate
import generate
from cli.composition import compose_config
from cli.config import load_evaluate_config, load_generate_config
from cli.errors import exit_on_user_error
from checkpoint.restore import NoCheckpoint
from resilience.signals import Requests

if sys.argv[1] == "gloo":
    import torch.distributed
    torch.distributed.init_process_group("gloo")
Requests().catch_signals(partial(exit_early, None))
with exit_on_user_error():
    if os.environ["RANK"] == sys.argv[2]:
        time.sleep(0.5)
    raise NoCheckpoint("the checkpoint is damaged")
"""


@pytest.mark.parametrize(("group", "late"), [("none", "0"), ("gloo", "0"), ("gloo", "1")])
def test_first_process_reports_and_all_exit_with_the_same_code(
    fork_server: ForkServer, tmp_path: Path, group: str, late: str
) -> None:
    """Before and after rendezvous, whichever process fails first."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    start = fork_server.run([group, late], 2, program=str(program))
    assert start.output(0) == "Error: the checkpoint is damaged\n"
    assert start.output(1) == ""
    assert start.exit_codes == {0: ExitCode.NO_CHECKPOINT, 1: ExitCode.NO_CHECKPOINT}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("NCCL: out of memory")]
)
def test_out_of_memory_has_its_own_code_and_a_remedy(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_, exit_on_user_error(smaller="use batch_size=1"):
        raise error
    assert exit_.value.code == ExitCode.OUT_OF_MEMORY
    assert capsys.readouterr().err == f"Error: out of memory ({error}); use batch_size=1\n"


def test_only_the_first_rank_that_is_out_of_memory_prints_its_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = OutOfMemory("rank 1 is out of memory")
    error.is_first = False
    with pytest.raises(SystemExit) as exit_, exit_on_user_error():
        raise error
    assert exit_.value.code == ExitCode.OUT_OF_MEMORY and capsys.readouterr().err == ""


def test_other_runtime_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="shape"), exit_on_user_error():
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(
    ("program", "load", "axis"),
    [
        (evaluate, load_evaluate_config, "parallel.dp_shard"),
        (generate, load_generate_config, "parallel.tp"),
    ],
    ids=["evaluate", "generate"],
)
def test_remedies_of_the_inference_programs_are_valid(program: Any, load: Any, axis: str) -> None:
    words = re.findall(r"[a-z_.]+=\w+", program.SMALLER)
    assert len(words) == 2 and f"({axis})" in program.SMALLER
    words += ["checkpoint=runs/x", f"{axis}=2", "parallel.accelerator=cpu"]
    assert load(compose_config(program.__name__, words)).precision.param == "bf16"
