"""Runs of `train.py` on a pipeline: hang reports, outputs, and programs that use its results."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import read_events, read_metrics
from fork_server import Fault, ForkServer, read
from processes import linux, paused_training, wait_for, wait_until_blocked

from resilience.exit_codes import ExitCode

PP2 = "parallel.pp=2"
STEP_SECONDS = 20  # longer than a step on a loaded machine


@linux
@pytest.mark.parametrize("action", ["SIGKILL", "SIGSTOP"])
def test_report_of_a_dead_stage_says_what_the_other_stage_waits_for(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path, action: str
) -> None:
    """The last stage dies in step 6, before it sends the gradients of micro-batch 1."""
    fault = Fault(1, 12, action, "parallel.pipeline_links.Links.send")
    limit = f"watchdog.step_seconds={STEP_SECONDS}"
    options = (PP2, "train.micro_batch_size=4", "checkpoint.async_save=false", limit)
    arguments = train_arguments(tmp_path / "run", *options)
    launch = fork_server.start(arguments, 2, fault, terminate_on_failure=False)
    wait_for(lambda: "Last collectives" in read(launch.stderr[0]), "the report")
    if action == "SIGSTOP":
        os.kill(launch.pids[1], signal.SIGKILL)
    codes = fork_server.wait(launch)
    assert codes == [ExitCode.RANK_FAILED, -signal.SIGKILL]
    errors = launch.output(0)
    assert "no heartbeat from rank 1 (pid" in errors
    report = "rank 0 (stage 0) waits for micro-batch 1 from stage 1 (gradients)"
    assert report in errors.splitlines()


@linux
def test_report_of_a_stage_that_hangs_says_what_the_other_stage_waits_for(
    command: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    limits = [f"watchdog.step_seconds={STEP_SECONDS}", "validation.sample_tokens=1"]
    report = "rank 1 (stage 1) waits for micro-batch 0 from stage 0 (hidden states)"
    with paused_training([*command(folder), PP2, *limits], folder) as program:
        wait_until_blocked(program.main.pid)
        errors = program.main.communicate(timeout=300)[1]
        program.wait_for_child()
    assert program.main.returncode == ExitCode.RANK_FAILED
    assert re.search(r"^rank 0 \(pid .* stuck in step ", errors.removeprefix("Aborting: "))
    assert report in errors.splitlines()


@linux
def test_stage_reports_what_it_waits_for_from_a_suspended_main_process(
    command: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    limits = [f"watchdog.step_seconds={STEP_SECONDS}", "validation.sample_tokens=1"]
    report = "rank 1 (stage 1) waits for micro-batch 0 from stage 0 (hidden states)"
    with paused_training([*command(folder), PP2, *limits], folder) as program:
        wait_until_blocked(program.main.pid)
        program.main.send_signal(signal.SIGSTOP)
        errors = program.main.communicate(timeout=300)[1]
        program.wait_for_child()
    assert program.main.returncode == -signal.SIGKILL
    assert errors.startswith("Aborting: no heartbeat from rank 0")
    assert report in errors.splitlines()


# ---------------------------------------------------------------- outputs


@pytest.fixture(scope="module")
def runs(
    fork_server: ForkServer, train_arguments: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Folders of the same ten steps on one process and on two stages.

    Steps 5 and 10 have validation and a text sample, and step 7 a profile.
    """
    folders = {size: tmp_path_factory.mktemp("runs") / f"pp{size}" for size in (1, 2)}
    options = ["train.max_steps=10", "train.micro_batch_size=2", "log.profile=[7]"]
    options += ["validation.interval=5", "validation.sample_tokens=16"]
    for size, folder in folders.items():
        launch = fork_server.run(train_arguments(folder, f"parallel.pp={size}", *options), size)
        assert set(launch.exit_codes.values()) == {0}, launch.output()
        assert "Profile of step 7" in launch.output()
    return folders


def test_validation_and_text_samples_of_a_pipeline_equal_those_of_one_process(
    runs: dict[int, Path],
) -> None:
    lines = {size: read_metrics(folder) for size, folder in runs.items()}
    for one, two in zip(lines[1], lines[2], strict=True):
        assert one["batch_hash"] == two["batch_hash"]
        # Micro-batches are summed in the same order; the optimizer's norm is not.
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two.get("val_loss", 0) == pytest.approx(one.get("val_loss", 0), rel=1e-6)
    samples = {(folder / "samples.txt").read_bytes() for folder in runs.values()}
    assert len(samples) == 1 and b"--- step 10 ---" in samples.pop()


def test_profile_of_a_pipeline_shows_the_waits_of_the_first_stage_as_communication(
    runs: dict[int, Path],
) -> None:
    tables = [(runs[size] / "profile/step-00000007/time.txt").read_text() for size in (1, 2)]
    for table in tables:
        assert "matrix products" in table and "data wait" in table
    exposed = [re.search(r"exposed communication +([\d.]+) ms", table) for table in tables]
    assert exposed[1] is not None and float(exposed[1][1]) > 0


def test_checkpoint_of_a_pipeline_is_evaluated_and_generated_from_like_that_of_one_process(
    runs: dict[int, Path], fork_server: ForkServer
) -> None:
    losses, texts = [], []
    for folder in runs.values():
        checkpoint = folder / "checkpoints/step-00000010"
        named = [f"checkpoint={checkpoint}", "parallel.accelerator=cpu", "parallel.tp=2"]
        launch = fork_server.run(named, 2, program="evaluate.py")
        assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
        losses.append(json.loads((checkpoint / "evaluation.json").read_text())["loss"])
        named += ["prompt=def", "temperature=0", "max_new_tokens=12"]
        launch = fork_server.run(named, 2, program="generate.py")
        assert launch.exit_codes == {0: 0, 1: 0}, launch.output()
        texts.append(read(launch.stdout[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # of trained weights, as above
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("program", ["evaluate.py", "generate.py"])
def test_other_programs_reject_pipeline_stages(
    runs: dict[int, Path], fork_server: ForkServer, program: str
) -> None:
    named = [f"checkpoint={runs[2]}", "parallel.accelerator=cpu", PP2]
    launch = fork_server.run(named, 2, program=program)
    assert launch.exit_codes == {0: ExitCode.USER_ERROR, 1: ExitCode.USER_ERROR}
    assert "parallel.pp=2 is for training only" in launch.output()


def test_non_finite_hidden_states_of_a_stage_are_skipped_and_rewound_as_on_one_process(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    """Two micro-batches a step: step 6 is skipped, steps 10 to 12 are rewound to step 8."""
    forward = "model.llama.Llama.forward"
    bad = [Fault(0, 11, "nan", forward), Fault(0, 19, "nan", forward, last_call=24)]
    found, events = [], []
    for size in (1, 2):
        folder = tmp_path / f"pp{size}"
        options = (f"parallel.pp={size}", "train.micro_batch_size=4")
        launch = fork_server.run(train_arguments(folder, *options), size, *bad)
        assert set(launch.exit_codes.values()) == {0}, launch.output()
        found.append(read_metrics(folder))
        kinds = ("skip", "rewind", "rewound")
        events.append([(e["event"], e["step"]) for e in read_events(folder) if e["event"] in kinds])
    assert events[0] == events[1]
    assert events[1][0] == ("skip", 6) and ("rewound", 12) in events[1]
    for one, two in zip(*found, strict=True):
        assert (one["step"], one["batch_hash"]) == (two["step"], two["batch_hash"])
        # Rounding of the norm, as above; the skipped step has no loss.
        assert (two["loss"] or 0) == pytest.approx(one["loss"] or 0, rel=1e-6)


@pytest.mark.slow
def test_pipeline_continues_with_longer_sequences_on_a_mesh_with_context_parallelism(
    fork_server: ForkServer, train_arguments: Any, tmp_path: Path
) -> None:
    """As `experiment=h100x16k_405b_long` continues `h100x16k_405b`, in small."""
    longer = "data.stages=[{from_sample:64,seq_len:128,global_batch_size:4}]"
    both = (longer, "train.micro_batch_size=1", "optim.schedule_steps=16", "optim.warmup_steps=2")
    meshes = {1: ["pp=1"], 4: ["pp=2", "dp_shard=2"]}, {1: ["pp=1"], 4: ["pp=2", "cp=2"]}
    for steps, sizes in zip((8, 16), meshes, strict=True):
        for size, mesh in sizes.items():
            axes = [f"parallel.{axis}" for axis in mesh]
            options = (*both, *axes, f"train.max_steps={steps}")
            arguments = train_arguments(tmp_path / f"{size}", *options)
            launch = fork_server.run(arguments, size)
            assert set(launch.exit_codes.values()) == {0}, launch.output()
    one, four = (read_metrics(tmp_path / f"{size}") for size in (1, 4))
    assert [line["step"] for line in four] == [*range(1, 17)]
    for first, second in zip(one, four, strict=True):
        assert first["batch_hash"] == second["batch_hash"]
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)  # order of sums
