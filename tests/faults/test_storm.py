"""A storm of kills: random ranks at random times, on changing meshes, and the run comes out right.

`make storm` is the long one. Its seed is told, so that a storm that finds something comes again.
"""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import figures, ledger
from zygote import Zygote

MESHES = {"one": (1, ()), "tp2": (2, ("parallel.tp=2",)), "dp2": (2, ("parallel.dp_shard=2",))}
STEPS_A_KILL = 12
# A kill comes at a random time within this of a start, which takes about 2 s until its first step.
SECONDS = 5.0


def test_run_in_a_storm_of_kills_on_changing_meshes_ends_as_if_undisturbed(
    zygote: Zygote,
    run_of: Any,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> None:
    kills = pytestconfig.getoption("storm")
    seed = pytestconfig.getoption("storm_seed") or random.SystemRandom().randrange(10**6)
    print(f"a storm of {kills} kills, --storm-seed={seed}")
    chance = random.Random(seed)
    more = (f"train.max_steps={STEPS_A_KILL * kills}", "checkpoint.interval=3")
    references = {}
    for mesh in ("one", "tp2"):
        folder = tmp_path_factory.mktemp("calm") / "run"
        ranks, keys = MESHES[mesh]
        assert set(zygote.run(run_of(folder, *more, *keys), ranks).codes.values()) == {0}
        references[mesh] = figures(folder)

    folder = tmp_path / "run"
    killed = starts = 0
    while True:
        ranks, keys = MESHES[chance.choice(list(MESHES))]
        start = zygote.start(run_of(folder, *more, *keys), ranks)
        starts += 1
        if killed < kills:
            time.sleep(chance.uniform(0, SECONDS))  # the storm's own time, nothing waits for it
            os.kill(start.pids[victim := chance.randrange(ranks)], signal.SIGKILL)
        codes = zygote.wait(start)
        if set(codes) == {0} and killed >= kills:
            break
        if killed < kills:
            killed += codes[victim] == -signal.SIGKILL
        else:
            raise AssertionError(f"seed {seed}: {codes}\n{start.told()}")
        assert 0 not in codes or folder_is_finished(folder), start.told()

    storm, calm = figures(folder), references["one"]
    for key in ("batch_hash", "samples", "tokens", "lr"):
        assert [line[key] for line in storm] == [line[key] for line in calm], f"seed {seed}"
    # What two calm runs on different meshes differ by, whose sums are rounded in another order.
    spread = max(
        abs(one["loss"] - two["loss"]) for one, two in zip(calm, references["tp2"], strict=True)
    )
    away = max(abs(one["loss"] - two["loss"]) for one, two in zip(calm, storm, strict=True))
    assert away <= 4 * spread, f"seed {seed}"
    check_ledger(folder, starts, calm[-1])
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    last = len(calm)
    assert names == [f"step-{step:08d}" for step in (last - 3, last)], f"seed {seed}"
    print(json.dumps({"kills": killed, "starts": starts, "spread": spread, "away": away}))


def folder_is_finished(folder: Path) -> bool:
    """Whether a start may have ended by itself: it was the last one."""
    return ledger(folder)[-1].get("reason") == "finished"


def check_ledger(folder: Path, starts: int, last: dict[str, Any]) -> None:
    """Every start goes on from a step that was saved before, and the last one ends the run."""
    events = ledger(folder)
    saved = {0}
    begun = 0
    for event in events:
        if event["event"] == "start":
            begun += 1
            assert event["step"] in saved
        elif event["event"] == "save":
            saved.add(event["step"])
    assert 1 <= begun <= starts  # a start killed in its set-up has no line
    assert (events[-1]["event"], events[-1]["reason"]) == ("stop", "finished")
    assert events[-1]["step"] * 8 == last["samples"]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
