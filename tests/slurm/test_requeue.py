"""slurm/requeue.py decides for each exit code; slurm/environment.sh finds a Python."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from resilience.exit_codes import ExitCode
from resilience.replica_check import Difference
from resilience.run_folder import RunFolder

# Prints the file for its arguments, or fails, and records them.
FAKE_COMMAND = """#!/bin/bash
echo "${0##*/} $*" >>"$FAKE/calls"
[[ $2 != hostnames ]] || exec cat "$FAKE/$3"
name="$FAKE/${0##*/}-$1"
[[ ! -e "$name" ]] || cat "$name"
[[ ! -e "$name-fails" ]]
"""
RUNNING = "JobId=7 JobName=a b JobState=RUNNING Restarts=0 PreemptTime=None NodeList=n1"
REQUEUED = (71, 72, 74, 75, 79, 128 + 6, 128 + 7, 128 + 9, 128 + 11, 140, 233)
ENDED = (1, 2, 65, 66, 67, 70, 73, 76, 126, 127, 130, 143, 253)

Requeue = Callable[..., str]


def import_requeue() -> ModuleType:
    """Import slurm/requeue.py, whose folder is not a package."""
    spec = importlib.util.spec_from_file_location("requeue", ROOT / "slurm/requeue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["requeue"] = module
    spec.loader.exec_module(module)
    return module


requeue_script = import_requeue()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the answers of a fake scontrol, which is in PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name in ("scontrol", "sinfo"):
        (folder / name).write_text(FAKE_COMMAND)
        (folder / name).chmod(0o755)
    (folder / "scontrol-show").write_text(RUNNING)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return folder


@pytest.fixture
def requeue(
    tmp_path: Path,
    fake: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Requeue:
    """`requeue(code)` runs requeue.py and returns what it prints, and `scontrol requeue` if run."""

    def run(code: int, *overrides: str) -> str:
        with monkeypatch.context() as patch:
            if not overrides:  # composing takes 0.3 s
                patch.setattr(requeue_script, "run_folder", lambda _: RunFolder(tmp_path / "run"))
            requeue_script.main([str(code), *overrides])
        calls = fake / "calls"
        text = calls.read_text() if calls.exists() else ""
        calls.unlink(missing_ok=True)
        captured = capfd.readouterr()
        called = [
            line for line in text.splitlines() if " show " not in line and "sinfo" not in line
        ]
        return "\n".join([captured.out + captured.err, *called])

    return run


def commit(folder: Path, step: int) -> None:
    """Write the marker of a committed checkpoint."""
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").touch()


@pytest.mark.parametrize("code", REQUEUED)
def test_ends_that_a_restart_can_cure_are_requeued(requeue: Requeue, code: int) -> None:
    assert "\nscontrol requeue 7" in requeue(code)


@pytest.mark.parametrize("code", ENDED)
def test_errors_of_the_user_divergence_and_cancellation_are_not_requeued(
    requeue: Requeue, code: int
) -> None:
    text = requeue(code)
    assert "scontrol requeue" not in text and "not requeued" in text


def test_every_exit_code_has_a_rule_which_the_documentation_lists() -> None:
    assert {*ExitCode} <= requeue_script.RULES.keys()
    text = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| (requeued|ends)", text, re.MULTILINE)
    documented = {int(code): decision for codes, decision in rows for code in codes.split(", ")}
    assert documented == {
        int(code): "requeued" if rule.restarts else "ends"
        for code, rule in requeue_script.RULES.items()
    }


def test_preempted_job_is_requeued_without_a_limit(requeue: Requeue, fake: Path) -> None:
    running = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T00:00:00")
    (fake / "scontrol-show").write_text(running)
    for _ in range(5):
        assert "scontrol requeue 7" in requeue(143)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT", ""])
def test_job_that_is_cancelled_while_it_saves_is_not_requeued(
    requeue: Requeue, fake: Path, state: str
) -> None:
    (fake / "scontrol-show").write_text(RUNNING.replace("RUNNING", state) if state else "")
    text = requeue(137)
    assert f"not requeued; the job is {state or 'unknown to SLURM: submit it again'}" in text
    assert "scontrol requeue" not in text


def test_job_that_slurm_has_requeued_is_left_alone(requeue: Requeue, fake: Path) -> None:
    (fake / "scontrol-show").write_text(RUNNING.replace("Restarts=0", "Restarts=1"))
    text = requeue(71)
    assert "SLURM has requeued the job already" in text and "scontrol requeue" not in text


def test_restarts_without_progress_are_limited(
    requeue: Requeue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for restart in (1, 2, 3):
        assert f"restart {restart} of at most 3 before the first checkpoint" in requeue(137)
    text = requeue(137)
    assert "not requeued, because 3 restarts made no progress before the first" in text
    assert "scontrol requeue" not in text and "submit the same command again" in text

    commit(run, 40)  # progress
    assert "restart 1 of at most 3 since step 40" in requeue(71)
    # A full disk is given one more chance, until the next checkpoint.
    assert "not requeued, because 1 restart made no progress since step 40" in requeue(74)
    commit(run, 60)
    assert "restart 1 of at most 1 since step 60" in requeue(74)

    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted again
    assert "restart 1 of at most 1 since step 60" in requeue(74)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert "\nscontrol requeue 8_3" in requeue(74)


@pytest.mark.parametrize("problem", ["folder is a file", "invalid overrides"])
def test_restarts_that_cannot_be_counted_are_limited_by_those_of_the_job(
    requeue: Requeue, tmp_path: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").touch()
    overrides = ["nonsense"] if problem == "invalid overrides" else []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert "scontrol requeue 7" in requeue(137, *overrides)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    text = requeue(137, *overrides)
    assert "Warning: " in text and "scontrol requeue" not in text


@pytest.mark.parametrize("content", ["", "\0\0", "[]", "{}", '{"job": "7", "step": "0"}'])
def test_damaged_count_of_restarts_starts_anew(
    requeue: Requeue, tmp_path: Path, content: str
) -> None:
    state = tmp_path / "run/slurm/requeue.json"
    state.parent.mkdir(parents=True)
    state.write_text(content)
    text = requeue(137)
    assert f"{state} is damaged" in text and "restart 1 of at most 3" in text


def test_rejected_requeue_names_the_remedy(requeue: Requeue, fake: Path) -> None:
    (fake / "scontrol-requeue-fails").touch()
    assert "SLURM did not requeue the job; submit it again" in requeue(71)


@pytest.mark.parametrize(
    ("job", "restarts"),
    [
        (RUNNING.replace("Restarts=0", "Restarts=(null)"), "0"),
        (RUNNING, ""),
        (RUNNING.replace("JobName=a", "JobName=\udcff"), "0"),  # not UTF-8
    ],
)
def test_unexpected_answers_of_slurm_do_not_prevent_a_requeue(
    requeue: Requeue, fake: Path, job: str, restarts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fake / "scontrol-show").write_bytes(job.encode(errors="surrogateescape"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert "scontrol requeue 7" in requeue(137)


def test_controller_that_does_not_answer_is_asked_again(
    requeue: Requeue, fake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pauses: list[float] = []

    def recover(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            (fake / "scontrol-show-fails").unlink()

    monkeypatch.setattr(requeue_script, "time", SimpleNamespace(sleep=recover))
    script = (fake / "scontrol").read_text()
    (fake / "scontrol").write_text(script + '[[ $? == 0 ]] || ! echo "Socket timed out" >&2\n')
    (fake / "scontrol-show-fails").touch()
    assert "scontrol requeue 7" in requeue(71)
    assert len(pauses) == 2

    (fake / "scontrol").write_text(script + '[[ $? == 0 ]] || ! echo "Access denied" >&2\n')
    (fake / "scontrol-requeue-fails").touch()
    assert "Warning: scontrol requeue 7: Access denied" in requeue(71)
    assert len(pauses) == 2


def test_program_outside_of_a_job_requeues_nothing(
    requeue: Requeue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    text = requeue(71)
    assert "the job is unknown to SLURM: submit it again" in text and "requeue 7" not in text


# ---------------------------------------------------------------- bad hosts

SILENT = "no heartbeat from rank 3 (pid 7 on n2) for 60 s"
ECC = "rank 3 on n2 has a hardware fault: CUDA error: uncorrectable ECC error encountered"


def corruption(*hosts: str, majority: bool = True) -> str:
    return str(Difference(list(range(len(hosts))), list(hosts), majority, ["weights of output"]))


def fault(reason: str = SILENT, *hosts: str, code: int = 71) -> dict[str, Any]:
    return {"event": "fault", "code": code, "reason": reason, "hosts": [*(hosts or ("n2",))]}


START: dict[str, Any] = {"event": "start", "step": 0}


def write_events(run: Path, *events: dict[str, Any], end: str = "") -> None:
    run.mkdir(parents=True, exist_ok=True)
    text, launch = "", 0
    for second, event in enumerate(events):
        launch += event is START
        added = {"time": f"2026-01-01T00:00:{second:02}+00:00", "launch": f"7.{launch}"}
        text += json.dumps(added | event) + "\n"
    (run / "ledger.jsonl").write_text(text + end)


@pytest.fixture
def nodes(fake: Path) -> Path:
    """Let the job run on n1 and n2 of four equal nodes; n5 is down and n6 has other GPUs."""
    job = "JobState=RUNNING Partition=p NodeList=n[1-2] ReqNodeList=(null) ExcNodeList=(null)"
    (fake / "scontrol-show").write_text(job)
    (fake / "n[1-2]").write_text("n1\nn2\n")
    states = {"n1": "alloc", "n2": "alloc", "n3": "idle", "n4": "mix", "n5": "down*", "n6": "idle"}
    write_nodes(fake, states)
    return fake


def write_nodes(fake: Path, states: dict[str, str]) -> None:
    kinds = {"n6": "a100 gpu:8"}
    lines = [f"{name} {state} {kinds.get(name, 'h100 gpu:8')}\n" for name, state in states.items()]
    (fake / "sinfo--h").write_text("".join(lines))


@pytest.mark.parametrize(
    ("events", "excluded"),
    [
        ([START, fault(), START], []),
        ([START, fault(), START, fault()], ["n2"]),
        ([START, fault(), fault()], []),  # of one launch
        ([START, fault(SILENT, "n1"), START, fault()], []),
        ([START, fault(ECC)], ["n2"]),
        ([START, fault("NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off")], ["n2"]),
        ([START, fault("rank 1: Xid 13")], []),  # an error of a program
        ([START, fault(corruption("n2", "n2"), "n2", "n2", code=77)], ["n2"]),
        ([START, fault(corruption("n2", "n1", majority=False), "n2", "n1", code=77)], []),
        ([START, fault(ECC, code=76), START, fault(code=70)], []),
        (
            [fault(), *(e for n in range(9) for e in (START, fault(SILENT, f"x{n}"))), fault()],
            ["n2"],
        ),
        ([fault(), *(e for n in range(10) for e in (START, fault(SILENT, f"x{n}"))), fault()], []),
        ([{**fault(), "launch": None}, START, {**fault(), "launch": None}], []),  # not of SLURM
        # The worst first; the job needs two of the four nodes.
        (
            3 * [START, fault(SILENT, "n3", "n1")] + [fault(ECC), START, fault(SILENT, "n4")],
            ["n2", "n3"],
        ),
        ([START, fault(ECC, "another-cluster")], []),
        ([{"event": "fault", "code": 71, "hosts": "n2"}, {"event": "fault"}], []),  # older versions
    ],
)
def test_bad_hosts_are_excluded_while_the_job_can_run(
    requeue: Requeue,
    nodes: Path,
    tmp_path: Path,
    events: list[dict[str, Any]],
    excluded: list[str],
) -> None:
    write_events(tmp_path / "run", *events, end='{"event": "fa')
    text = requeue(71)
    command = f"scontrol update jobid=7 excnodelist={','.join(excluded)}"
    assert text.endswith(command if excluded else "scontrol requeue 7")
    assert not excluded or f"Excluded from this job: {', '.join(excluded)}" in text
    if len(excluded) == 2:
        assert (
            "Bad host n1 (faults in 3 of the last 4 launches with faults) is not excluded: too few"
            in text
        )


def test_hosts_that_the_user_excluded_or_requested_stay_so(
    requeue: Requeue, nodes: Path, tmp_path: Path
) -> None:
    write_events(tmp_path / "run", fault(ECC, "n1", "n2", "n3"))
    job = (nodes / "scontrol-show").read_text()
    job = job.replace("ReqNodeList=(null) ExcNodeList=(null)", "ReqNodeList=n1 ExcNodeList=n[3-4]")
    (nodes / "scontrol-show").write_text(job.replace("NodeList=n[1-2]", "NodeList=n1"))
    (nodes / "n1").write_text("n1\n")
    (nodes / "n[3-4]").write_text("n3\nn4\n")
    text = requeue(71)
    assert "Bad host n1 (" in text and "is not excluded: --nodelist requests it" in text
    assert text.endswith("scontrol update jobid=7 excnodelist=n[3-4],n2")


def test_damaged_event_log_excludes_nothing(requeue: Requeue, nodes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for content in (b"\0\xff\n[1]\n", b""):
        (tmp_path / "run/ledger.jsonl").write_bytes(content)
        assert requeue(71).endswith("scontrol requeue 7")
    (tmp_path / "run/ledger.jsonl").unlink()
    (tmp_path / "run/ledger.jsonl").mkdir()
    assert requeue(71).endswith("scontrol requeue 7")


# ---------------------------------------------------------------- scripts


def bash(script: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an environment like that of `sbatch --export=NONE`."""
    environment = {"PATH": "/usr/bin:/bin", "SLURM_EXPORT_ENV": "NONE", **variables}
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_job_script_requeues_and_exits_with_the_code_of_the_tasks(
    fake: Path, tmp_path: Path
) -> None:
    variables = {"FAKE": str(fake), "PATH": f"{fake}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    script = f'source "{ROOT}/slurm/requeue.sh" 137 "run.dir={tmp_path}/a run"'
    done = bash(script, tmp_path, **variables, LLAMESH_PYTHON=sys.executable)
    assert done.returncode == 137 and "requeuing the job" in done.stdout, done.stderr
    assert "scontrol requeue 7" in (fake / "calls").read_text()
    assert (tmp_path / "a run/slurm/requeue.json").exists()
    (fake / "calls").unlink()
    done = bash(f"{script} &>/dev/full", tmp_path, **variables, LLAMESH_PYTHON=sys.executable)
    assert "scontrol requeue 7" in (fake / "calls").read_text()  # the log of the job is full
    done = bash(script, tmp_path, **variables, LLAMESH_PYTHON="/nowhere/python")
    assert done.returncode == 137 and "submit it again" in done.stderr


def interpreter(folder: Path, works: bool = True) -> Path:
    """Create a folder with a `python` that has the dependencies, or has not."""
    folder.mkdir(parents=True)
    python = folder / "python"
    python.write_text(f'#!/bin/bash\n{"exec " + sys.executable if works else "exit 1"} "$@"\n')
    python.chmod(0o755)
    return python


def test_job_without_the_variables_of_the_submitting_shell_finds_python(tmp_path: Path) -> None:
    source = f"source {ROOT}/slurm/environment.sh"
    show = f"{source}; echo $LLAMESH_PYTHON; bash -c 'type -P python; echo $SLURM_EXPORT_ENV'"
    module = interpreter(tmp_path / "module")
    path = {"PATH": f"{interpreter(tmp_path / 'old', works=False).parent}:/usr/bin:/bin"}
    done = bash(show, tmp_path, **path)
    assert done.returncode == 1 and done.stdout == ""
    assert "add --export=ALL,LLAMESH_PYTHON=/path/to/python to sbatch" in done.stderr
    assert f"install them into {tmp_path}/.venv" in done.stderr

    # Both remedies, and each environment that a job can inherit.
    done = bash(show, tmp_path, **path, LLAMESH_PYTHON=str(module))
    assert done.stdout == f"{module}\n{module}\nALL\n", done.stderr
    done = bash(show, tmp_path, PATH=f"{module.parent}:/usr/bin:/bin")
    assert done.stdout.startswith(f"{module}\n")
    conda = interpreter(tmp_path / "conda/bin")
    done = bash(show, tmp_path, **path, CONDA_PREFIX=str(tmp_path / "conda"))
    assert done.stdout.startswith(f"{conda}\n")
    done = bash(show, tmp_path, PATH=f"{path['PATH']}:{module.parent}")  # behind a conda base
    assert done.stdout.startswith(f"{module}\n")
    done = bash(f"{source}; cd /; type -P python", tmp_path, **path, LLAMESH_PYTHON="module/python")
    assert done.stdout == f"{module}\n"
    own = interpreter(tmp_path / ".venv/bin")
    done = bash(show, tmp_path, **path, CONDA_PREFIX=str(tmp_path / "conda"))
    assert done.stdout == f"{own}\n{own}\nALL\n"
    active = interpreter(tmp_path / "a venv/bin")
    done = bash(show, tmp_path, **path, VIRTUAL_ENV=str(tmp_path / "a venv"))
    assert done.stdout.startswith(f"{active}\n")
    done = bash(show, tmp_path, **path, LLAMESH_PYTHON="/nowhere/python")
    assert done.returncode == 1 and "among /nowhere/python;" in done.stderr


def test_job_submitted_outside_the_checkout_names_the_remedy(tmp_path: Path) -> None:
    done = bash(f"source {ROOT}/slurm/train.sbatch", tmp_path)
    assert done.returncode == 1
    assert "run sbatch in its root, or add --chdir=/path/to/checkout" in done.stderr
