"""Goodput with failures: closed form against simulation and published runs, and its warning."""

import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hydra import compose, initialize_config_dir

from bench import goodput as bench_goodput
from bench.goodput import SimulatedJob, Simulation, simulated_job
from cli.arguments import CONF, plan_arguments
from cli.config import load_plan_config
from data.files import strict_json
from plan import _warn as warn
from planning import plan_json, report
from planning.config import PlanJobConfig
from planning.failures import FailurePlan, Interruptions, interval_warnings, time_text
from planning.hardware import LEAST, MOST, Hardware
from planning.plan import RunPlan, plan_run
from planning.request import configured_choice
from training.config_validation import ConfigError
from training.console import Console

PAPER = ("experiment=llama3_405b_paper", "tokenizer=byte")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def _config(*arguments: str) -> PlanJobConfig:
    return load_plan_config(compose("plan", plan_arguments(list(arguments))))


def planned(*arguments: str) -> tuple[PlanJobConfig, RunPlan, FailurePlan]:
    config = _config(*arguments)
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    return config, run, report.failure_plan(config, run)


def test_best_interval_is_youngs_for_short_saves_and_maximizes_the_goodput() -> None:
    job = Interruptions(mtbf_seconds=40_000, restart_seconds=400, stall_seconds=2, write_seconds=20)
    best = job.best_interval_seconds
    assert best == pytest.approx(math.sqrt(2 * 2 * 40_000), rel=0.01)
    peak = job.expected(best).productive
    assert all(job.expected(best * factor).productive < peak for factor in (0.5, 0.9, 1.1, 2))
    slow = replace(job, write_seconds=5000)  # saves must not overtake each other
    assert slow.best_interval_seconds == 5000
    assert slow.expected(5000).productive > slow.expected(2500).productive


@pytest.mark.parametrize("interval", [1, 400, 10_000, 10**7])
@pytest.mark.parametrize("write", [0, 300])
@pytest.mark.parametrize("skips", [False, True])
def test_expected_parts_of_the_time_add_up(interval: float, write: float, skips: bool) -> None:
    job = Interruptions(20_000, 500, 3, write, skips)
    parts = vars(job.expected(interval))
    assert sum(parts.values()) == pytest.approx(1)
    assert all(0 <= part <= 1 for part in parts.values())
    rare = replace(job, mtbf_seconds=1e12).expected(interval)
    if skips and interval == 1 < write:  # every 300th step saves
        assert rare.productive == pytest.approx(300 / 303)
    else:
        assert rare.productive == pytest.approx(interval / (3 + max(interval, write)), rel=1e-4)


def test_goodput_of_the_published_405b_run_is_above_nine_tenths() -> None:
    """More than 90% effective training time on 16,384 GPUs (arXiv:2407.21783, section 3.3.4)."""
    sizes = ("parallel.dp_shard=128", "parallel.cp=16", "parallel.tp=8")
    _, _, plan = planned(*PAPER, *sizes, "devices=16384")
    assert plan.interruptions.mtbf_seconds == pytest.approx(54 * 86_400 / 419, rel=1e-3)
    assert 0.9 < plan.best.productive < 0.98


def test_paper_recipe_is_warned_about_its_interval_and_the_remedy_works() -> None:
    _, run, plan = planned(*PAPER, "devices=4096")
    [warning] = interval_warnings(plan)
    assert warning.startswith("checkpoint.interval=1000 saves every 7")
    assert 0.7 < plan.configured.productive < 0.8 and plan.best.productive > 0.95
    short = replace(plan, stages=tuple((step, 100.0) for step, _ in plan.stages))
    assert not list(interval_warnings(short))
    remedies = re.findall(r"checkpoint\.interval\w*=\w+", warning.partition("; use ")[2])
    config, run, better = planned(*PAPER, "devices=4096", *remedies)
    assert not list(interval_warnings(better)) and better.best == better.configured
    assert better.expected_seconds == pytest.approx(run.seconds / better.best.productive)
    record = plan_json.plan_record(config, run)["failures"]
    assert record["days"] * 86_400 == pytest.approx(better.expected_seconds)
    assert run.cost is not None
    assert record["cost_usd"] == pytest.approx(run.cost / better.best.productive)


def test_warning_about_the_interval_names_the_larger_part_of_the_loss() -> None:
    _, _, often = planned("experiment=h100x8_8b", "checkpoint.async_save=false")
    assert often.configured.stalled > 0.02 > often.configured.lost
    [warning] = interval_warnings(often)
    assert "waiting for them takes 2.6% of the time: the goodput is 97.4%" in warning
    assert "fail" not in warning
    _, _, rarely = planned(*PAPER, "devices=4096")
    [warning] = interval_warnings(rarely)
    assert re.search(r"repeated after a failure every 12 h on 4,096 devices take 2\d", warning)
    [warning] = interval_warnings(replace(rarely, n_devices=1))
    assert " on 1 device take " in warning


def test_failures_before_any_save_are_reported() -> None:
    words = (*PAPER, "devices=4096")
    _, _, plan = planned(*words, "device_mtbf_days=1")
    [warning] = interval_warnings(plan)
    assert warning.startswith("device_mtbf_days=1 means a failure every 21 s on 4,096 devices")
    assert not any("device_mtbf" in each for each in interval_warnings(planned(*words)[2]))


@pytest.mark.parametrize("devices", [8, 4096])
def test_plan_warns_about_the_interval_only_if_the_run_fits(
    devices: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run, plan = planned(*PAPER, f"devices={devices}")
    assert run.fits == (devices == 4096) and list(interval_warnings(plan))
    warn(config, run)
    assert ("checkpoint.interval" in capsys.readouterr().err) == run.fits


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"interval": None}, "checkpoint.interval=null"),
        ({"interval": None, "interval_minutes": 500.0}, "checkpoint.interval_minutes=500"),
        ({"interval": 1, "async_save": False}, "checkpoint.interval=1"),
        ({"interval": 14, "interval_minutes": 0.1}, "checkpoint.interval_minutes=0.1"),
        ({"interval": 1}, "checkpoint.interval=1"),
        ({"interval": 30}, None),
        ({"interval_minutes": 20.0}, None),  # and 1,000 steps
    ],
)
def test_every_unfavorable_interval_is_reported(keys: dict[str, Any], name: str | None) -> None:
    words = [f"checkpoint.{key}={'null' if each is None else each}" for key, each in keys.items()]
    _, _, plan = planned(*PAPER, "devices=4096", *words)
    warnings = list(interval_warnings(plan))
    assert bool(warnings) == (name is not None)
    if name is not None:
        assert warnings[0].startswith(f"{name} saves every ")
        use = warnings[0].partition("; use ")[2].split()
        assert not list(interval_warnings(planned(*PAPER, "devices=4096", *words, *use)[2]))


def test_interval_is_that_of_the_run_if_it_is_short() -> None:
    _, _, plan = planned("hardware=cpu", "checkpoint.interval=1000")
    assert plan.best_interval == 160 == plan.interval_seconds / plan.stages[0][0]
    assert plan.configured == plan.best and plan.best.productive > 0.99
    _, _, shortest = planned("hardware=cpu", "tokens=1")
    assert shortest.best_interval == 1 == shortest.interval_seconds / shortest.stages[0][0]


def test_run_that_never_reaches_a_checkpoint_has_no_duration() -> None:
    config, run, plan = planned(*PAPER, "devices=4096", "checkpoint.interval=null")
    assert plan.expected_seconds == math.inf
    rows = dict(report._failure_rows(config, run))
    assert rows["total duration"] == "never finishes" and "total cost" not in rows
    record = json.loads(strict_json(plan_json.plan_record(config, run)))["failures"]
    assert record["days"] is None and record["cost"] is None


def test_restart_and_failure_rate_are_keys() -> None:
    _, _, plan = planned("experiment=h100x512_405b")
    words = ("device_mtbf_days=1056", "restart_seconds=3600")
    _, _, changed = planned("experiment=h100x512_405b", *words)
    assert changed.interruptions.mtbf_seconds == plan.interruptions.mtbf_seconds / 2
    assert changed.interruptions.restart_seconds == 3600
    config, run, _ = planned("experiment=h100x512_405b", *words)
    assert dict(report._failure_rows(config, run))["restart"] == "3,600 s (restart_seconds=3600)"
    # Without a key: a requeue, start-up, and loading of the checkpoint by 64 nodes.
    loading = 2 * plan.checkpoint_bytes / 64 / 0.5e9
    assert 150 + loading < plan.interruptions.restart_seconds < 150 + loading + 300


@pytest.mark.parametrize("value", ["1e306", "1e-300"])
@pytest.mark.parametrize("key", ["device_mtbf_days", "restart_seconds"])
def test_failure_rate_and_restart_that_no_run_has_are_rejected(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        planned("experiment=h100x8_8b", f"{key}={value}")
    assert f"{key}={float(value)} is " in str(raised.value)
    limit = re.search(r"use at (?:most|least) ([\de.-]+)", str(raised.value))
    assert limit
    planned("experiment=h100x8_8b", f"{key}={limit[1]}")


@pytest.mark.parametrize("seed", range(20))
def test_plan_is_finite_at_the_bounds_of_its_keys(seed: int) -> None:
    config = _config("model=llama3_8b", "tokenizer=llama3", "data=mock", "devices=16")
    choose = random.Random(seed).choice

    def extreme(value: Any) -> Any:
        if isinstance(value, dict):
            each = extreme(1.0)
            return {key: each or rate for key, rate in value.items()}
        return choose([None, LEAST, MOST])

    values = {
        name: new
        for name, annotation in get_type_hints(Hardware).items()
        if "float" in str(annotation) and name != "capability"
        if (new := extreme(getattr(config.hardware, name))) is not None
    }
    values["oversubscription"], values["devices_per_pod"] = choose([1.0, MOST]), 8
    config = replace(
        config,
        hardware=replace(config.hardware, **values),
        device_mtbf_days=choose([LEAST, 2112, MOST]),
        restart_seconds=choose([None, LEAST, MOST]),
    )
    run = plan_run(config.request.stages(configured_choice(config, config.mesh)), config.hardware)
    assert math.isfinite(run.tokens_per_second) and run.tokens_per_second > 0
    assert run.cost is None or math.isfinite(run.cost)
    report.print_plan(Console(enabled=True), config, run)
    json.loads(strict_json(plan_json.plan_record(config, run)))
    list(interval_warnings(report.failure_plan(config, run)))


def test_synchronous_saves_stall_until_the_commit() -> None:
    stalls = [
        planned("experiment=h100x8_8b", f"checkpoint.async_save={value}")[2].interruptions
        for value in ("true", "false")
    ]
    size = 8.03e9 * 12
    # PCIe to the host, or a node's storage.
    assert stalls[0].stall_seconds == pytest.approx(size / 8 / 20e9, abs=0.5)
    assert stalls[0].write_seconds == pytest.approx(size / 0.5e9, rel=0.01)
    assert stalls[1].stall_seconds == pytest.approx(size / 0.5e9, abs=0.5)
    assert stalls[1].write_seconds == 0


def test_time_has_its_usual_unit() -> None:
    texts = [time_text(seconds) for seconds in (0.1234, 100, 1500, 25_000, 1e6, 2e8)]
    assert texts == ["0.12 s", "100 s", "25 min", "6.9 h", "12 days", "6.3 years"]


# ---------------------------------------------------------------- simulation


job_plan = cache(bench_goodput.planned)


@pytest.mark.parametrize("devices", [512, 4096, 24_576])
def test_expected_goodput_is_within_two_points_of_the_simulated_one(devices: int) -> None:
    """At 40 and 4 times the best interval; the standard error is about one point."""
    plan = job_plan(devices)
    [(step_seconds, _)] = plan.stages
    for interval, failures in ((40 * plan.best_interval, 300), (4 * plan.best_interval, 60)):
        expected = plan.interruptions.expected(interval * step_seconds)
        found = Simulation(simulated_job(plan, interval)).run(failures)
        assert expected.productive == pytest.approx(found.goodput, abs=0.02)
        for part in ("stalled", "lost", "restart"):
            fraction = getattr(found, part) / found.wall
            assert getattr(expected, part) == pytest.approx(fraction, abs=0.02), part


@pytest.mark.parametrize("skips", [False, True])
def test_slow_writes_are_simulated_as_expected(skips: bool) -> None:
    """A write takes two and a half intervals: saves wait for it, or every third one is taken."""
    job = Interruptions(20_000, 500, 3, 250, skips)
    simulated = SimulatedJob(10, 10, 3, 250, 500, 20_000, skips)
    found = Simulation(simulated).run(150)
    assert job.expected(100).productive == pytest.approx(found.goodput, abs=0.02)
    assert job.expected(100).stalled == pytest.approx(found.stalled / found.wall, abs=0.01)


def test_best_interval_is_that_of_the_simulation() -> None:
    """It loses less than half a point of goodput against the best of seven intervals."""
    assert bench_goodput.compare(job_plan(24_576), 60)["loss_of_planned_interval"] < 0.005


def test_more_nodes_and_faster_restarts_increase_the_simulated_goodput() -> None:
    changes = bench_goodput.improvements(job_plan(24_576), 60)
    assert all(each >= changes["as configured"] for each in changes.values())
    both, faster = changes["best interval, spare nodes"], changes["both, half the restart time"]
    assert faster > both > 0.9 > changes["best interval"]


def test_recorded_run_with_kills_is_simulated_with_its_times() -> None:
    """`python -m bench.goodput record tests/planning/killed_run.json 6` records it.

    Six kills, two of them during set-up. The simulation resumes from the same checkpoint, its
    restarts take as long within 5%, and it loses a quarter more time at most: steps are slower
    while a checkpoint is written than on average, and the log does not have the last partial step.
    """
    recorded = json.loads((Path(__file__).parent / "killed_run.json").read_text())
    found, goodput = bench_goodput.replay(recorded), recorded["goodput"]
    last = recorded["launches"][-1]["restart_seconds"]  # after the last kill
    assert found.failures == 6 and found.step == recorded["last_start"]
    assert found.restart == pytest.approx(goodput["restart"] + goodput["between"] - last, rel=0.05)
    assert goodput["lost"] <= found.lost <= 1.25 * goodput["lost"]
