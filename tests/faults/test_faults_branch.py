"""A branched decay equals a run with that schedule, whatever interrupts it."""

from pathlib import Path
from typing import Any

from conftest import reproducible_metrics
from fault_injection import Fault
from fork_server import ForkServer

SCHEDULE = ("optim.schedule=wsd", "optim.warmup_steps=4")
FORWARD = "model.llama.Llama.forward"


def test_killed_branch_equals_a_run_with_its_schedule_and_leaves_its_parent_unchanged(
    fork_server: ForkServer, train_arguments: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    words = (*SCHEDULE, "train.max_steps=12", "optim.schedule_steps=24")
    assert fork_server.run(train_arguments(parent, *words), 1).exit_codes == {0: 0}
    files = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    branch = [f"run.branch={parent}", "optim.decay_type=sqrt", "train.max_steps=20"]
    # Killed before its first checkpoint, and after it; the last launch names the folder alone.
    assert fork_server.run(branch, 1, Fault(0, 2, "SIGKILL", FORWARD)).exit_codes == {0: -9}
    assert fork_server.run(branch, 1, Fault(0, 6, "SIGKILL", FORWARD)).exit_codes == {0: -9}
    launch = fork_server.run([f"run.dir={parent}-decay"], 1)
    assert launch.exit_codes == {0: 0}, launch.output()
    expected = uninterrupted(
        1, *SCHEDULE, "train.max_steps=20", "optim.decay_start=12", "optim.decay_type=sqrt"
    )
    found = reproducible_lines(Path(f"{parent}-decay"))
    assert found == expected[12:] and reproducible_metrics(parent) == expected[:12]
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == files


def reproducible_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a branch, which start after those of its parent."""
    from conftest import REPRODUCIBLE_KEYS, read_metrics

    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(13, 21))
    return [{key: line[key] for key in REPRODUCIBLE_KEYS} for line in lines]
