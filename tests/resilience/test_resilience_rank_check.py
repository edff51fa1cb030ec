"""Ranks that cannot start, or that see other devices, are named before a group waits for them."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fork_server import ForkServer

from resilience import rank_check
from resilience.exit_codes import ExitCode
from resilience.gpu_probe import Gpu
from resilience.processes import Processes
from resilience.rank_check import RankReport, compare

H100, A100, T4 = "NVIDIA H100, 80 GiB", "NVIDIA A100, 40 GiB", "Tesla T4, 15 GiB"


def reports(*devices: str, per_node: int = 2, **of_last: Any) -> dict[int, RankReport]:
    """Return the reports of a run with one GPU per rank; `of_last` are fields of the last one."""
    found = {}
    for rank, device in enumerate(devices):
        has_bf16 = None if device == "cpu" else device != T4
        values: dict[str, Any] = {
            "uuid": "" if device == "cpu" else f"GPU-{rank}",
            "has_bf16": has_bf16,
        }
        values |= {"torch": "2.13.0"} | (of_last if rank == len(devices) - 1 else {})
        found[rank] = RankReport(rank, f"n{rank // per_node + 1}", device, **values)
    return found


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (reports(H100, H100, H100, H100), None),
        (reports("cpu", "cpu"), None),
        (
            reports(H100, H100, H100, "cpu"),
            "different kinds of devices: rank 3 on n2: no GPU (cpu); ranks 0-2 on n1, n2: " + H100,
        ),
        (reports(A100, A100, T4, T4), f"ranks 2-3 on n2: {T4}"),
        (
            reports(H100, H100, uuid="GPU-0"),
            f"ranks 0-1 on n1 use the same GPU ({H100}, UUID GPU-0); start one process per GPU",
        ),
        (
            reports(H100, H100, H100, H100, error="torch sees no GPU"),
            "rank 3 on n2: torch sees no GPU",
        ),
        (
            {rank: each for rank, each in reports(*[H100] * 8).items() if rank not in (4, 6, 7)},
            "ranks 4, 6-7 of 8 did not start (n1, n2, n3 did)",
        ),
    ],
)
def test_broken_ranks_are_named_with_what_they_see(
    found: dict[int, RankReport], words: str | None
) -> None:
    errors, warnings = compare(found, max(found) + 1 if len(found) != 5 else 8)
    assert warnings == []
    assert len(errors) == (words is not None), errors
    assert all(str(words) in error for error in errors), errors


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (reports(A100, A100, H100, A100), f"rank 2 on n2: {H100}, torch 2.13.0; ranks 0-1, 3 on"),
        (reports(H100, H100, torch="2.11.0"), f"rank 1 on n1: {H100}, torch 2.11.0"),
    ],
)
def test_nodes_that_differ_but_work_are_reported(found: dict[int, RankReport], words: str) -> None:
    errors, (warning,) = compare(found, len(found))
    assert errors == [] and words in warning


SLICE = "NVIDIA A100-SXM4-40GB MIG 3g.20gb"


@pytest.mark.parametrize("in_properties", ["slice", "gpu"])
@pytest.mark.parametrize(("slices", "shares"), [("12", False), ("11", True)])
def test_slices_of_a_gpu_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, slices: str, shares: bool, in_properties: str
) -> None:
    """Whether CUDA reports the UUID of the slice or that of the GPU."""
    found = {}
    for rank, name in enumerate(slices):
        uuid = f"MIG-{name}" if in_properties == "slice" else "GPU-1"
        gpu = Gpu(SLICE, (8, 0), 2**34, uuid, "0000:1b:00.0")
        monkeypatch.setattr(rank_check, "own_gpu", lambda gpu=gpu: (0, gpu))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{name}")
        found[rank] = replace(rank_check.own_report(Processes("cuda", 2, 1, "srun")), rank=rank)
    errors, warnings = compare(found, 2)
    if shares:
        assert "use the same GPU" in errors[0] and warnings == []
    else:
        (warning,) = warnings
        assert errors == [] and "ranks 0-1" in warning and "NCCL before 2.30" in warning


PROGRAM = """
import os, sys, time
from cli.errors import exit_on_user_error
from parallel.config import ParallelConfig, PrecisionConfig
from parallel.mesh import MeshShape
from resilience import rank_check
from resilience.config import TimeLimits
from resilience.gpu_probe import Machine
from resilience.launch import launch
from resilience.accelerator import resolve_processes
from resilience.watchdog import Watchdog
from training.config_validation import ConfigError

case, rank = sys.argv[1], int(os.environ["RANK"])
broken = Machine(torch="2.13.0", cuda="13.0", driver="550.54.15", device_files=("/dev/nvidia0",))
with exit_on_user_error():
    machine = broken if case == f"driver of rank {rank}" else Machine()
    processes, errors = resolve_processes(ParallelConfig(), machine=machine)
    if errors:
        raise ConfigError(errors)
    own_report = rank_check.own_report
    if case == "gpu of rank 0" and rank == 0:
        rank_check.own_report = lambda _: rank_check.RankReport(0, "n1", "H100", has_bf16=True)
    watchdog = Watchdog(TimeLimits())
    launch(processes, MeshShape(1, 2, 1, 1), ParallelConfig(), PrecisionConfig(), watchdog)
    print("launched")
    watchdog.close()
"""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", "launched\n"),
        ("driver of rank 1", f"- rank 1 on {socket.gethostname()}: Invalid configuration:"),
        ("driver of rank 0", "Invalid configuration:\n  - torch sees no GPU"),
        ("gpu of rank 0", f"rank 0 on n1: H100; rank 1 on {socket.gethostname()}: no GPU (cpu)"),
    ],
)
def test_two_processes_agree_before_they_create_a_group(
    fork_server: ForkServer, tmp_path: Path, case: str, words: str
) -> None:
    """The watchdog has no limit here, and gloo would wait for half an hour."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    start = fork_server.run([case], 2, program=str(program))
    assert words in start.output(0), start.output(0) + start.output(1)
    code = 0 if case == "none" else ExitCode.USER_ERROR
    assert start.exit_codes == {0: code, 1: code}
    if case != "none":
        assert start.output(1) == ""  # one message for the run
        assert "torch sees no GPU" in start.output(0) or "kinds of devices" in start.output(0)


def test_error_that_rank_0_does_not_read_is_printed_by_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody serves the store: `cli.errors` then prints the message on this rank."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}
    for name, value in {**values, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_check, "REPORT_SECONDS", 0.05)
    assert not rank_check.report_error("no disk")
    monkeypatch.setenv(
        "RANK", "0"
    )  # it has printed its error, whether another rank reads it or not
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(rank_check, "ANSWER_SECONDS", 0.05)
    assert rank_check.report_error("no disk")
    monkeypatch.delenv("RANK")  # a run without other processes reports nothing
    assert rank_check.report_error("no disk")


@pytest.mark.parametrize(
    "error", ["invalid device cuda:{}", "process {} failed", "no route to <node 0x{}>", "n{} fails"]
)
def test_errors_that_differ_in_numbers_and_hosts_are_one_cause(error: str) -> None:
    reports = {r: RankReport(r, f"n{r}", error=error.format(r), order=9 - r) for r in range(8)}
    [text] = rank_check.compare(reports, 8)[0]
    assert text.startswith("ranks 0-7 on n7, n6, n5, n4 and 4 more hosts: ")
    assert text.endswith(f"{error.format(7)} (on rank 7)")


def test_first_rank_that_cannot_reach_its_own_address_prints_no_trace(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setattr(rank_check, "process_ranks", lambda: (0, 0))
    with pytest.raises(TimeoutError, match="no answer within"):
        rank_check.open_store(0.2)
    assert capfd.readouterr().err == ""


def test_program_that_accepts_connections_but_is_no_store_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_check, "HANDSHAKE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setattr(rank_check, "process_ranks", lambda: (1, 1))
        with pytest.raises(TimeoutError, match="is not this run's store"):
            rank_check.open_store(1.0)
